"""Gemma 3's text models (arXiv 2503.19786): norms on both sides of attention and MLP, query and key norms, embeddings
times √H. For each layer that sees everything there are five with a window, which have a rotary base of their own."""

from dspark_stream.models.families.facts import Family

GEMMA3 = Family(
    name="gemma3_text",
    title="gemma3",
    wrappers=("gemma3",),
    gguf="gemma3",
    layers="gemma3.modeling_gemma3.Gemma3",
    drafter="Gemma3DSparkModel",
    qk_norm=True,
    sandwich=True,
    norm_offset=1.0,
    gelu=True,
    scaled_embedding=True,
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    default_head_size=256,
    windows=6,
    end_tokens=("<end_of_turn>",),
)
