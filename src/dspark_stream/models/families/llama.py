"""Llama 1 to 3.3, and what is built like them: Mistral's first models, SmolLM, TinyLlama."""

from dspark_stream.models.families.facts import Family

LLAMA = Family(
    name="llama",
    title="llama",
    gguf="llama",
    layers="llama.modeling_llama.Llama",
    drafter="LlamaDSparkModel",
    interleaved=True,
    end_tokens=("<|eot_id|>", "<|im_end|>"),
)
