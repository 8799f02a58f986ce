"""What AutoModelForCausalLM makes of a checkpoint that LLaDA2ForDiffusion.save_pretrained wrote (trust_remote_code=True):
that class, of the installed dmoe_ops."""

from dmoe_ops.models import LLaDA2ForDiffusion

from .configuration_llada2_moe import LLaDA2MoeConfig

# What AutoModelForCausalLM passes on beside the caller's own arguments, and has no bearing on how weights are read.
IGNORED = {"_commit_hash", "_from_auto", "adapter_kwargs", "code_revision", "low_cpu_mem_usage", "trust_remote_code"}


class LLaDA2MoeModelLM(LLaDA2ForDiffusion):
    config_class = LLaDA2MoeConfig

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModelForCausalLM"):
        """Asked for by AutoModelForCausalLM; the files of a checkpoint are written by save_pretrained anyway."""

    @classmethod
    def from_pretrained(cls, folder, *, config=None, device_map=None, **options):
        """See LLaDA2ForDiffusion.from_pretrained. config: of transformers, read anew here; device_map: one device."""
        options = {name: value for name, value in options.items() if name not in IGNORED}
        return super().from_pretrained(folder, **{"device": device_map, **options})
