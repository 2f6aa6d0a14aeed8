"""Drafter checkpoints in DeepSpec's format (design/checkpoints.md, A), read and written.

Ours beside theirs: `draft_vocab_size` in the config with a tensor `d2t` [Vd] of offsets (target id = draft id +
d2t[draft id], as the speculators format has it), and no `embed_tokens`, no `lm_head` where the target's are meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.drafter import (
    ARCHITECTURES,
    Drafter,
    DrafterConfig,
    backbone_config,
    full_attention_shape,
)
from dspark_stream.models.geometry import geometry_of
from dspark_stream.models.heads import HeadType
from dspark_stream.models.native import NativeDrafter, NativeTarget
from dspark_stream.models.target import Target

FROZEN = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's tensors that released checkpoints carry; the target's own are used instead."""


class _Fields(msgspec.Struct):
    """The fields of a `config.json` that are about the drafter; the others are about its backbone."""

    architectures: list[str]
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=64)]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    mask_token_id: Annotated[int, msgspec.Meta(ge=0)]
    target_layer_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    markov_rank: Annotated[int, msgspec.Meta(ge=0)] | None = 0
    markov_head_type: str | None = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    num_anchors: int | None = None
    draft_vocab_size: int | None = None


def read_config(folder: Path, *, native: bool = False) -> DrafterConfig:
    """`config.json` of a drafter checkpoint; ``native``: for the CPU's kernels.

    Raises:
        UnsupportedError: native, and the kernels cannot run these layers.
        ModelLoadError: missing, not JSON, or a field missing or out of range; the message names it.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"no readable drafter config at {path}: {error}", param="drafter") from error
    try:
        fields = msgspec.convert(raw, _Fields)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error
    if not set(fields.architectures) & set(ARCHITECTURES.values()):
        raise ModelLoadError(
            f"{path}: architecture {fields.architectures} is no DSpark drafter; known: "
            f"{', '.join(dict.fromkeys(ARCHITECTURES.values()))}",
            param="architectures",
        )
    if (model_type := raw.get("model_type")) not in ARCHITECTURES:
        raise ModelLoadError(
            f"{path}: model_type {model_type!r}; known: {', '.join(ARCHITECTURES)}", param="model_type"
        )
    rank = fields.markov_rank or 0
    kind = fields.markov_head_type or "vanilla" if rank else "vanilla"
    if kind not in get_args(HeadType):
        raise ModelLoadError(
            f"{path}: markov_head_type {kind!r}; known: {', '.join(get_args(HeadType))}", param="markov_head_type"
        )
    return DrafterConfig(
        backbone=geometry_of(raw, str(path), "drafter")
        if native
        else backbone_config(_text_config(raw, path), fields.num_hidden_layers),
        num_layers=fields.num_hidden_layers,
        block_size=fields.block_size,
        mask_token_id=fields.mask_token_id,
        target_layer_ids=fields.target_layer_ids,
        markov_rank=rank,
        markov_head_type=cast(HeadType, kind),
        enable_confidence_head=fields.enable_confidence_head,
        confidence_head_with_markov=fields.confidence_head_with_markov and rank > 0,
        num_anchors=fields.num_anchors or 512,
        draft_vocab_size=fields.draft_vocab_size,
    )


INHERITED = ("architectures", "layer_types", "sliding_window", "per_layer_config")
"""Fields about the target's own layers, which must not be read as the drafter's."""


def _text_config(raw: dict[str, Any], path: Path) -> Any:
    """The inherited target config as the library reads it, without what is about the target's layers alone."""
    fields = {name: value for name, value in raw.items() if name not in INHERITED}
    model_type = fields.pop("model_type")
    for layer in (raw.get("per_layer_config") or {}).values():
        # newer libraries write the full-attention layers' shape here; older ones, and we, in fields of its own
        fields.setdefault("global_head_dim", layer.get("head_dim"))
        fields.setdefault("num_global_key_value_heads", layer.get("num_key_value_heads"))
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # the library's own validation: any of several classes, all about this file
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error


def load_drafter(folder: Path, target: Target) -> Drafter:
    """A drafter checkpoint as a module on the target's device and in its dtype. Sets the target's taps.

    Raises:
        UnsupportedError: the target runs on the CPU's kernels, and these cannot run the drafter.
        ModelLoadError: unreadable, tensors missing, left over or of the wrong shape, or made for another target.
    """
    # the kernels refuse other families by themselves; of another one than the target's more is to be said
    native = isinstance(target, NativeTarget) and _model_type(folder) in (target.config.model_type, None)
    config = read_config(folder, native=native)
    tensors: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"no *.safetensors in {folder}", param="drafter")
    try:
        for file in files:
            tensors.update(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file} is broken: {error}", param="drafter") from error
    hidden = int(config.backbone.hidden_size)
    if hidden != target.hidden_size or config.family != target.config.model_type:
        raise ModelLoadError(
            f"{folder} drafts for a {config.family} of hidden size {hidden}; the target is a "
            f"{target.config.model_type} of {target.hidden_size}",
            param="drafter",
        )
    if config.mask_token_id >= target.vocab_size:
        raise ModelLoadError(
            f"{folder}: mask_token_id {config.mask_token_id} is not in the target's vocabulary of {target.vocab_size}",
            param="mask_token_id",
        )
    for name in FROZEN:
        tensors.pop(name, None)
    draft_ids = None
    if (d2t := tensors.pop("d2t", None)) is not None:
        draft_ids = (d2t.long() + torch.arange(len(d2t))).to(target.device)
        if (
            not len(d2t)
            or int(d2t.min()) < 0
            or int(draft_ids[-1]) >= target.vocab_size
            or bool((d2t.diff() < 0).any())
        ):
            raise ModelLoadError(
                f"{folder}: d2t does not name ascending, different token ids below {target.vocab_size}", param="drafter"
            )
    target.set_taps(config.target_layer_ids)
    bias = "confidence_head.proj.bias" in tensors
    config = DrafterConfig(**{**config.__dict__, "confidence_bias": bias})
    drafter = NativeDrafter(config, target, draft_ids) if native else Drafter(config, target, draft_ids)
    expected = drafter.state_dict()
    wrong = [
        f"{name} {tuple(tensors[name].shape)} ≠ {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra or wrong:
        parts = [("missing", sorted(missing)), ("unknown", sorted(extra)), ("of the wrong shape", wrong)]
        said = "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts if names)
        raise ModelLoadError(f"{folder}: tensors {said}", param="drafter")
    drafter.load_state_dict(tensors)
    return drafter.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def _model_type(folder: Path) -> str | None:
    try:
        found = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None  # `read_config` says what is wrong
    return found if isinstance(found, str) else None


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config and weights so that `load_drafter` (and, vocabulary permitting, DeepSpec) reads them back."""
    folder.mkdir(parents=True, exist_ok=True)
    c = drafter.config
    raw: dict[str, Any] = c.backbone.to_dict()
    for derived in ("_name_or_path", "_model_name_or_path", "per_layer_config"):
        raw.pop(derived, None)
    raw |= full_attention_shape(c.backbone)
    raw |= {
        "architectures": [ARCHITECTURES[c.family]],
        "num_target_layers": drafter.target.num_layers,
        "num_hidden_layers": c.num_layers,
        "block_size": c.block_size,
        "mask_token_id": c.mask_token_id,
        "target_layer_ids": list(c.target_layer_ids),
        "num_anchors": c.num_anchors,
        "markov_rank": c.markov_rank,
        "markov_head_type": c.markov_head_type,
        "enable_confidence_head": c.enable_confidence_head,
        "confidence_head_with_markov": c.confidence_head_with_markov,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in drafter.state_dict().items()}
    if drafter.draft_ids is not None:
        raw["draft_vocab_size"] = drafter.draft_vocab_size
        ids = drafter.draft_ids.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
