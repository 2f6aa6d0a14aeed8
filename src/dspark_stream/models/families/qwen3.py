"""Qwen3's dense models: norms of each query and key head instead of biases."""

from dspark_stream.models.families.facts import Family

QWEN3 = Family(
    name="qwen3",
    title="qwen3",
    gguf="qwen3",
    layers="qwen3.modeling_qwen3.Qwen3",
    drafter="Qwen3DSparkModel",
    qk_norm=True,
    default_head_size=128,
    end_tokens=("<|im_end|>",),
)
