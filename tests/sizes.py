"""A LLaDA2 small enough for tests."""

MASK, EOS = 62, 63
SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_experts=16,
    num_experts_per_tok=2,
    num_shared_experts=1,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    max_position_embeddings=256,
    initializer_range=0.3,
    mask_token_id=MASK,
    eos_token_id=EOS,
)
