"""What families of models differ in, a file of facts each; read by torch's side and by the CPU's kernels.

A new family is one file here, its line in `FAMILIES`, and its row in tests/unit/test_families.py.
"""

from __future__ import annotations

from dspark_stream.models.families.facts import Family
from dspark_stream.models.families.gemma3 import GEMMA3
from dspark_stream.models.families.gemma4 import GEMMA4, GEMMA4_UNIFIED
from dspark_stream.models.families.llama import LLAMA
from dspark_stream.models.families.qwen2 import QWEN2
from dspark_stream.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family", "by_gguf", "family_named", "supported"]

FAMILIES: dict[str, Family] = {f.name: f for f in (LLAMA, QWEN2, QWEN3, GEMMA3, GEMMA4, GEMMA4_UNIFIED)}
"""By the `model_type` of a text model's `config.json`."""


def family_named(model_type: object) -> Family | None:
    """The family of a `model_type`, a multimodal wrapper's too; None where it is not known."""
    return next((f for f in FAMILIES.values() if model_type in (f.name, *f.wrappers)), None)


def by_gguf(architecture: object) -> Family | None:
    """The family of a GGUF file's `general.architecture`; None where it is not known."""
    return next((f for f in FAMILIES.values() if f.gguf == architecture), None)


def supported() -> str:
    """The names of all, for messages."""
    return ", ".join(dict.fromkeys(f.title for f in FAMILIES.values()))
