"""The config of a checkpoint that LLaDA2ForDiffusion.save_pretrained wrote, for AutoConfig: transformers and SGLang read it
from the checkpoint's folder, with trust_remote_code=True."""

from transformers import PretrainedConfig


class LLaDA2MoeConfig(PretrainedConfig):
    """Every key of config.json becomes an attribute; save_pretrained writes all that the released model code reads."""

    model_type = "llada2_moe"
    use_cache = False  # transformers 5 takes it for a setting of generate() and drops the key
