"""Drafter checkpoints in DeepSpec's format (design/checkpoints.md, A), read and written.

Ours beside theirs: `draft_vocab_size` in the config with a tensor `d2t` [Vd] of offsets (target id = draft id +
d2t[draft id], as the speculators format has it), and no `embed_tokens`, no `lm_head` where the target's are meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.drafter import (
    ARCHITECTURES,
    LAYERS,
    Drafter,
    DrafterConfig,
    backbone_config,
    full_attention_shape,
)
from dspark_stream.models.heads import HeadType
from dspark_stream.models.target import Target

FROZEN = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's tensors that released checkpoints carry; the target's own are used instead."""


def read_config(folder: Path) -> DrafterConfig:
    """`config.json` of a drafter checkpoint.

    Raises:
        ModelLoadError: missing, not JSON, or a field missing or out of range; the message names it.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"no readable drafter config at {path}: {error}", param="drafter") from error
    architecture = (raw.get("architectures") or ["(none)"])[0]
    if architecture not in ARCHITECTURES.values():
        raise ModelLoadError(
            f"{path}: architecture {architecture} is no DSpark drafter; known: {', '.join(ARCHITECTURES.values())}",
            param="architectures",
        )
    for field in ("num_hidden_layers", "block_size", "mask_token_id", "target_layer_ids"):
        if field not in raw:
            raise ModelLoadError(f"{path}: field {field} is missing", param=field)
    rank = int(raw.get("markov_rank") or 0)
    head_type: HeadType = raw.get("markov_head_type") or "vanilla"
    if head_type not in get_args(HeadType):
        raise ModelLoadError(
            f"{path}: markov_head_type {head_type!r}; known: vanilla, gated, rnn", param="markov_head_type"
        )
    if not 1 <= int(raw["block_size"]) <= 64:
        raise ModelLoadError(f"{path}: block_size {raw['block_size']} is not in 1 … 64", param="block_size")
    num_layers = int(raw["num_hidden_layers"])
    return DrafterConfig(
        backbone=backbone_config(_text_config(raw, path), num_layers),
        num_layers=num_layers,
        block_size=int(raw["block_size"]),
        mask_token_id=int(raw["mask_token_id"]),
        target_layer_ids=tuple(int(i) for i in raw["target_layer_ids"]),
        markov_rank=rank,
        markov_head_type=head_type,
        enable_confidence_head=bool(raw.get("enable_confidence_head", False)),
        confidence_head_with_markov=bool(raw.get("confidence_head_with_markov", False)) and rank > 0,
        num_anchors=int(raw.get("num_anchors") or 512),
        draft_vocab_size=raw.get("draft_vocab_size"),
    )


def _text_config(raw: dict[str, Any], path: Path) -> Any:
    """The inherited target config as the library reads it; the layer types in it may be the target's or ours."""
    fields = {name: value for name, value in raw.items() if name not in ("architectures", "layer_types")}
    model_type = fields.pop("model_type", None)
    if model_type not in LAYERS:
        raise ModelLoadError(f"{path}: model_type {model_type!r}; known: {', '.join(LAYERS)}", param="model_type")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # the library's own validation: any of several classes, all about this file
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error


def load_drafter(folder: Path, target: Target) -> Drafter:
    """A drafter checkpoint as a module on the target's device and in its dtype. Sets the target's taps.

    Raises:
        ModelLoadError: unreadable, tensors missing, left over or of the wrong shape, or made for another target.
    """
    config = read_config(folder)
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
    for name in FROZEN:
        tensors.pop(name, None)
    draft_ids = None
    if (d2t := tensors.pop("d2t", None)) is not None:
        draft_ids = (d2t.long() + torch.arange(len(d2t))).to(target.device)
    target.set_taps(config.target_layer_ids)
    bias = "confidence_head.proj.bias" in tensors
    config = DrafterConfig(**{**config.__dict__, "confidence_bias": bias})
    drafter = Drafter(config, target, draft_ids)
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


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config and weights so that `load_drafter` (and, vocabulary permitting, DeepSpec) reads them back."""
    folder.mkdir(parents=True, exist_ok=True)
    c = drafter.config
    raw: dict[str, Any] = c.backbone.to_dict()
    for derived in ("_name_or_path", "per_layer_config"):
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
