"""Drafter checkpoints in DeepSpec's format, read and written.

What we add to the format:

- `draft_vocab_size` in the config, with a tensor `d2t` [Vd] of offsets: target id = draft id + d2t[draft id], as in the
  speculators format;
- W1 may have rows for the draft vocabulary alone;
- `context_window` in the config;
- matrices in GGUF's blocks (`weight_blocks`, see blocks.py);
- without `embed_tokens` or `lm_head`, the target's are used.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast, get_args, overload

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark_kernels.cpu import Kind, Source
from dspark_stream.errors import ModelLoadError
from dspark_stream.files import read_json
from dspark_stream.models.blocks import Blocks, as_floats, quantised
from dspark_stream.models.drafter_config import DrafterConfig, HeadType
from dspark_stream.models.families import FAMILIES
from dspark_stream.models.geometry import LARGEST, UnsupportedError, geometry_of
from dspark_stream.models.native.drafter import NativeDrafter, native_shapes
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.torch.drafter import Drafter, backbone_config, full_attention_shape
from dspark_stream.models.torch.target import Target

FROZEN = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's tensors that released checkpoints carry; the target's own are used instead."""


class _Fields(msgspec.Struct):
    """The fields of a `config.json` that are about the drafter; the others are about its backbone."""

    architectures: list[str]
    num_hidden_layers: Annotated[int, msgspec.Meta(ge=1, le=64)]
    block_size: Annotated[int, msgspec.Meta(ge=1, le=64)]
    mask_token_id: Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]
    target_layer_ids: Annotated[tuple[int, ...], msgspec.Meta(min_length=1, max_length=64)]
    markov_rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 16)] | None = 0
    markov_head_type: str | None = "vanilla"
    enable_confidence_head: bool = False
    confidence_head_with_markov: bool = False
    num_anchors: int | None = None
    draft_vocab_size: int | None = None
    context_window: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)] = 0
    weight_blocks: dict[str, str] = {}


def read_config(folder: Path, *, native: bool = False) -> DrafterConfig:
    """`config.json` of a drafter checkpoint; ``native``: for the CPU's kernels.

    Raises:
        UnsupportedError: native, and the kernels cannot run these layers.
        ModelLoadError: missing, not JSON, or a field missing or out of range; the message names it.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"no readable drafter config at {path}: {error}", param="drafter") from error
    try:
        fields = msgspec.convert(raw, _Fields)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error
    known = dict.fromkeys(family.drafter for family in FAMILIES.values())
    if not set(fields.architectures) & set(known):
        raise ModelLoadError(
            f"{path}: architecture {fields.architectures} is no DSpark drafter; known: {', '.join(known)}",
            param="architectures",
        )
    if (model_type := raw.get("model_type")) not in FAMILIES:
        raise ModelLoadError(f"{path}: model_type {model_type!r}; known: {', '.join(FAMILIES)}", param="model_type")
    rank = fields.markov_rank or 0
    kind = fields.markov_head_type or "vanilla" if rank else "vanilla"
    if kind not in get_args(HeadType):
        raise ModelLoadError(
            f"{path}: markov_head_type {kind!r}; known: {', '.join(get_args(HeadType))}", param="markov_head_type"
        )
    return DrafterConfig(
        backbone=geometry_of(_of_drafter(raw), str(path), "drafter")
        if native
        else _torch_backbone(raw, path, fields.num_hidden_layers),
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
        context_window=fields.context_window,
    )


INHERITED = ("architectures", "layer_types", "sliding_window", "use_sliding_window", "per_layer_config")
"""Fields about the target's own layers, which must not be read as the drafter's."""


def _of_drafter(raw: dict[str, Any]) -> dict[str, Any]:
    """A config for the kernels: all layers of a drafter see everything."""
    fields = {name: value for name, value in raw.items() if name not in INHERITED}
    return fields | {"layer_types": ["full_attention"] * raw["num_hidden_layers"]}


def _torch_backbone(raw: dict[str, Any], path: Path, layers: int) -> Any:
    """A config of the library's; it warns at most of numbers that cannot be, and fails on some in ways of its own."""
    with contextlib.suppress(UnsupportedError):
        geometry_of(_of_drafter(raw), str(path), "drafter")
    config = _text_config(raw, path)
    try:
        return backbone_config(config, layers)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ModelLoadError(f"{path}: {error}", param="drafter") from error


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


@overload
def load_drafter(folder: Path, target: Target, kind: Kind | None = None) -> Drafter: ...
@overload
def load_drafter(folder: Path, target: NativeTarget, kind: Kind | None = None) -> NativeDrafter: ...
def load_drafter(folder: Path, target: Target | NativeTarget, kind: Kind | None = None) -> Drafter | NativeDrafter:
    """A drafter checkpoint on the target's runner, device and precision. Sets the target's taps.

    Args:
        folder: the checkpoint.
        target: what it drafts for; its own family may be another.
        kind: on the CPU's kernels, how matrices are kept that come as floats; None: as `NativeDrafter` says.

    Raises:
        UnsupportedError: the target runs on the CPU's kernels, and these cannot run the drafter.
        ModelLoadError: unreadable, tensors missing, left over or of the wrong shape, or made for another target.
    """
    native = isinstance(target, NativeTarget)
    config = read_config(folder, native=native)
    tensors = _read_tensors(folder)
    hidden = int(config.backbone.hidden_size)
    if hidden != target.hidden_size:
        raise ModelLoadError(
            f"{folder} drafts for a target of hidden size {hidden}; this one is a {target.family} of "
            f"{target.hidden_size}",
            param="drafter",
        )
    if config.mask_token_id >= target.vocab_size:
        raise ModelLoadError(
            f"{folder}: mask_token_id {config.mask_token_id} is not in the target's vocabulary of {target.vocab_size}",
            param="mask_token_id",
        )
    for name in FROZEN:
        tensors.pop(name, None)
    draft_ids = _draft_ids(folder, tensors, target.vocab_size)
    w1 = tensors.get(W1)
    config = replace(
        config,
        confidence_bias="confidence_head.proj.bias" in tensors,
        w1_of_drafts=w1 is not None and draft_ids is not None and w1.shape[0] == len(draft_ids) != target.vocab_size,
    )
    target.set_taps(config.target_layer_ids)
    if isinstance(target, NativeTarget):
        vocab = target.vocab_size if draft_ids is None else len(draft_ids)
        _check_shapes(folder, tensors, native_shapes(config, target.vocab_size, vocab))
        return NativeDrafter(config, target, tensors, draft_ids, kind)
    with contextlib.suppress(UnsupportedError):  # before anything of an absurd size is made
        geometry = geometry_of(_of_drafter(read_json(folder / "config.json")), str(folder), "drafter")
        vocab = target.vocab_size if draft_ids is None else len(draft_ids)
        _check_shapes(folder, tensors, native_shapes(replace(config, backbone=geometry), target.vocab_size, vocab))
    try:
        drafter = Drafter(config, target, None if draft_ids is None else draft_ids.to(target.device))
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:  # torch's, and the library's
        raise ModelLoadError(f"{folder}: these sizes cannot be: {error}", param="drafter") from error
    _check_shapes(folder, tensors, {name: tensor.shape for name, tensor in drafter.state_dict().items()})
    drafter.load_state_dict({name: as_floats(tensor) for name, tensor in tensors.items()})
    return drafter.to(device=target.device, dtype=target.dtype).eval().requires_grad_(False)


def _check_shapes(folder: Path, tensors: Mapping[str, Tensor | Blocks], expected: Mapping[str, Sequence[int]]) -> None:
    wrong = [
        f"{name} {tuple(tensors[name].shape)} ≠ {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra or wrong:
        parts = [("missing", sorted(missing)), ("unknown", sorted(extra)), ("of the wrong shape", wrong)]
        said = "; ".join(f"{what}: {', '.join(names[:4])}" for what, names in parts if names)
        raise ModelLoadError(f"{folder}: tensors {said}", param="drafter")


W1 = "markov_head.markov_w1.weight"


def _read_tensors(folder: Path) -> dict[str, Tensor | Blocks]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError(f"no *.safetensors in {folder}", param="drafter")
    read: dict[str, Tensor] = {}
    try:
        for file in files:
            read.update(load_file(file))
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{file} is broken: {error}", param="drafter") from error
    kinds = msgspec.convert(read_json(folder / "config.json"), _Fields).weight_blocks
    tensors: dict[str, Tensor | Blocks] = dict(read)
    for name, source in kinds.items():
        data = read.get(name)
        if source not in Source.__members__ or source == "F32":
            raise ModelLoadError(
                f"{folder}: weight_blocks of {name} are {source!r}, which is not known", param="drafter"
            )
        if data is None or data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] % _row(source):
            raise ModelLoadError(f"{folder}: {name} does not have rows of {source} blocks", param="drafter")
        tensors[name] = Blocks(data, Source[source])
    return tensors


def _row(source: str) -> int:
    return Source[source].nbytes(Source[source].block)


def _draft_ids(folder: Path, tensors: dict[str, Tensor | Blocks], vocab: int) -> Tensor | None:
    """The draft vocabulary [Vd], taken out of the tensors; None where there is none."""
    d2t = tensors.pop("d2t", None)
    if d2t is None:
        return None
    ids = as_floats(d2t).long() + torch.arange(d2t.shape[0])
    if not len(ids) or int(ids[0]) < 0 or int(ids[-1]) >= vocab or bool((ids.diff() < 1).any()):
        raise ModelLoadError(
            f"{folder}: d2t does not name ascending, different token ids below {vocab}", param="drafter"
        )
    return ids


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config and weights so that `load_drafter` (and, vocabulary permitting, DeepSpec) reads them back."""
    c = drafter.config
    raw: dict[str, Any] = c.backbone.to_dict()
    for derived in ("_name_or_path", "_model_name_or_path", "per_layer_config"):
        raw.pop(derived, None)
    raw |= full_attention_shape(c.backbone)
    raw |= {
        "architectures": [FAMILIES[c.family].drafter],
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
    if c.context_window:
        raw["context_window"] = c.context_window
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in drafter.state_dict().items()}
    if drafter.draft_ids is not None:
        raw["draft_vocab_size"] = drafter.draft_vocab_size
        ids = drafter.draft_ids.cpu()
        tensors["d2t"] = ids - torch.arange(len(ids))
    write_checkpoint(folder, raw, tensors)


def write_checkpoint(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Config and tensors as a checkpoint; the weights appear whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "model.safetensors.part"
    save_file(dict(tensors), part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def quantise_checkpoint(source: Path, folder: Path, blocks: Source, ends: Source, keep: Collection[str] = ()) -> None:
    """A checkpoint with its matrices in GGUF's blocks: what the kernels run is then what the file has.

    Args:
        source: of floats.
        folder: where it goes.
        blocks: of the layers' matrices.
        ends: of `fc` and W2, which are the smallest and the most sensitive.
        keep: names of matrices that stay as they are.

    Raises:
        ModelLoadError: ``source`` is no checkpoint.
    """
    read_config(source, native=True)
    raw = read_json(source / "config.json")
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name, tensor in _read_tensors(source).items():
        floats = as_floats(tensor)
        kind = ends if name in ("fc.weight", "markov_head.markov_w2.weight") else blocks
        if floats.dim() == 2 and name.startswith(("layers.", "fc.", "markov_head.markov_w2")) and name not in keep:
            tensors[name], kinds[name] = quantised(floats, kind).data, kind.name
        else:
            tensors[name] = floats if floats.dtype in (torch.int32, torch.int64) else floats.half()
    if "d2t" in tensors:
        tensors["d2t"] = tensors["d2t"].to(torch.int32)
    write_checkpoint(folder, raw | {"weight_blocks": kinds, "dtype": "float16"}, tensors)
