"""Qwen2 and Qwen2.5, Coder and Math too: Llama's layers with biases in the query, key and value projections."""

from dspark_stream.models.families.facts import Family

QWEN2 = Family(
    name="qwen2",
    title="qwen2",
    gguf="qwen2",
    layers="qwen2.modeling_qwen2.Qwen2",
    drafter="Qwen2DSparkModel",
    qkv_bias=True,
    end_tokens=("<|im_end|>",),
)
