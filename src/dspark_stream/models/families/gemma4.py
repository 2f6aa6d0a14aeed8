"""Gemma 4's text models, on torch only: layers of two head sizes, keys that double as values, soft-capped logits."""

from dspark_stream.models.families.facts import Family

GEMMA4 = Family(
    name="gemma4_text",
    title="gemma4",
    wrappers=("gemma4",),
    layers="gemma4.modeling_gemma4.Gemma4Text",
    drafter="Gemma4DSparkModel",
    native=False,
    end_tokens=("<turn|>", "<end_of_turn>"),
)
GEMMA4_UNIFIED = Family(
    name="gemma4_unified_text",
    title="gemma4",
    wrappers=("gemma4_unified",),
    layers="gemma4_unified.modeling_gemma4_unified.Gemma4UnifiedText",
    drafter="Gemma4DSparkModel",
    native=False,
    end_tokens=("<turn|>", "<end_of_turn>"),
)
