"""Targets for the CPU's integer kernels, packed one tensor at a time: from GGUF blocks as they are, or from safetensors
with weights rounded on the way. A copy of the whole model in full precision never exists.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dspark_kernels.cpu import Context, Kind, LayerWeights, Llama, PackedMatrix, Rope, Source, Table
from dspark_stream.errors import ModelLoadError
from dspark_stream.files import read_json
from dspark_stream.models.families import Family
from dspark_stream.models.geometry import Geometry, UnsupportedError, geometry_of, geometry_of_gguf
from dspark_stream.models.gguf import GgufFile, TensorInfo
from dspark_stream.models.native.drafter import PAST_THE_END
from dspark_stream.models.native.target import NativeTarget


class Weights(Protocol):
    """Where tensors come from, by the names that they have in `transformers` checkpoints."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""

    def floats(self, name: str, size: int, *, norm: bool = False) -> npt.NDArray[np.float32]:
        """A vector [size]; ``norm``: a norm's weight."""

    def matrix(self, name: str, rows: int, inputs: int, heads: int = 0) -> PackedMatrix:
        """A matrix; ``heads``: of so many query or key heads, whose rows stand in rotary order."""

    def table(self, name: str, rows: int, inputs: int) -> Table:
        """An embedding."""


def assemble(g: Geometry, weights: Weights, context: Context, eos_token_ids: tuple[int, ...]) -> NativeTarget:
    """Pack all layers.

    Raises:
        UnsupportedError: sizes or tensor types that the kernels cannot do.
        ModelLoadError: a tensor missing or of the wrong shape.
    """
    q, kv, h, family = g.heads * g.head_size, g.kv_heads * g.head_size, g.hidden_size, g.family

    def norm(name: str, size: int, there: bool) -> npt.NDArray[np.float32] | None:
        return weights.floats(f"{name}.weight", size, norm=True) if there else None

    def biases(attention: str) -> npt.NDArray[np.float32]:
        sizes = {"q": q, "k": kv, "v": kv}
        return np.concatenate([weights.floats(f"{attention}{part}_proj.bias", n) for part, n in sizes.items()])

    def layer(i: int) -> LayerWeights:
        name = f"model.layers.{i}."
        attention, mlp = name + "self_attn.", name + "mlp."
        before_mlp = "pre_feedforward_layernorm" if family.sandwich else "post_attention_layernorm"
        windowed = bool(g.windowed) and g.windowed[i]
        return LayerWeights(
            q=weights.matrix(f"{attention}q_proj.weight", q, h, g.heads),
            k=weights.matrix(f"{attention}k_proj.weight", kv, h, g.kv_heads),
            v=weights.matrix(f"{attention}v_proj.weight", kv, h),
            o=weights.matrix(f"{attention}o_proj.weight", h, q),
            gate=weights.matrix(f"{mlp}gate_proj.weight", g.inner, h),
            up=weights.matrix(f"{mlp}up_proj.weight", g.inner, h),
            down=weights.matrix(f"{mlp}down_proj.weight", h, g.inner),
            input_norm=weights.floats(f"{name}input_layernorm.weight", h, norm=True),
            post_norm=weights.floats(f"{name}{before_mlp}.weight", h, norm=True),
            q_norm=norm(f"{attention}q_norm", g.head_size, family.qk_norm),
            k_norm=norm(f"{attention}k_norm", g.head_size, family.qk_norm),
            bias=biases(attention) if family.qkv_bias else None,
            after_attention=norm(f"{name}post_attention_layernorm", h, family.sandwich),
            after_mlp=norm(f"{name}post_feedforward_layernorm", h, family.sandwich),
            window=g.window if windowed else 0,
            rope=1 if windowed and g.local_rotary else 0,
        )

    rotaries = [g.rotary, *([g.local_rotary] if g.local_rotary else [])]
    try:
        llama = Llama(
            context,
            heads=g.heads,
            kv_heads=g.kv_heads,
            eps=g.eps,
            final_norm=weights.floats("model.norm.weight", h, norm=True),
            ropes=[Rope(r.frequencies(g.head_size), r.amplitude) for r in rotaries],
            positions=g.positions + PAST_THE_END,
            score_scale=g.score_scale,
            gelu=family.gelu,
            layers=[layer(i) for i in range(g.layers)],
        )
        if weights.has("lm_head.weight"):
            embedding = weights.table("model.embed_tokens.weight", g.vocab, h)
            head = weights.matrix("lm_head.weight", g.vocab, h)
        else:
            head = weights.matrix("model.embed_tokens.weight", g.vocab, h)
            embedding = Table.of(head)
    except ValueError as error:  # what the kernels say of sizes and shapes
        raise UnsupportedError(str(error)) from error
    return NativeTarget(
        llama,
        embedding,
        head,
        family=family.name,
        max_positions=g.positions,
        eos_token_ids=eos_token_ids,
        embedding_scale=float(np.float32(h**0.5)) if family.scaled_embedding else 1.0,
    )


# --- GGUF --------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


SANDWICH_NAMES = {
    "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Where norms stand on both sides the same names mean others."""


def gguf_name(name: str, family: Family) -> str:
    """What a tensor of a `transformers` checkpoint is called in GGUF files."""
    names = GGUF_NAMES | (SANDWICH_NAMES if family.sandwich else {})
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{names[rest]}.{kind}"
    return f"{names[stem]}.{kind}"


def check_tensors(gguf: GgufFile, geometry: Geometry) -> None:
    """That a file has nothing that nobody would read, and weights of types that weights have: biases, experts or rotary
    factors left out give wrong text.

    Raises:
        ModelLoadError: it is otherwise.
    """
    family = geometry.family
    parts = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    parts += [f"self_attn.{p}_proj.bias" for p in "qkv"] if family.qkv_bias else []
    parts += [f"self_attn.{p}_norm.weight" for p in "qk"] if family.qk_norm else []
    parts += ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"] if family.sandwich else []
    names = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.layers.{i}.{part}" for i in range(geometry.layers) for part in parts]
    unknown = gguf.tensors.keys() - {gguf_name(name, family) for name in names} - {"rope_freqs.weight"}
    if unknown:
        said = ", ".join(sorted(unknown)[:4])
        raise ModelLoadError(f"{gguf.path}: tensors that no {family.title} has: {said}", param="model")
    for name, info in gguf.tensors.items():
        if info.type_name in NO_WEIGHTS:
            raise ModelLoadError(f"{gguf.path}: {name} is of type {info.type_name}, as no weights are", param="model")


class GgufWeights:
    """Blocks of a GGUF file."""

    def __init__(self, gguf: GgufFile, context: Context, geometry: Geometry) -> None:
        self.gguf, self.context, self._family = gguf, context, geometry.family

    def name_of(self, name: str) -> str:
        """See `gguf_name`."""
        return gguf_name(name, self._family)

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return self.name_of(name) in self.gguf.tensors

    def floats(self, name: str, size: int, *, norm: bool = False) -> npt.NDArray[np.float32]:
        """See `Weights`; norms' offsets are in already. Biases of interleaved heads are not known to exist."""
        own = self.name_of(name)
        values = self.gguf.floats(own)
        if values.shape != (size,):
            raise ModelLoadError(f"{self.gguf.path}: {own} is {values.shape}, expected {(size,)}", param="model")
        return values

    def _info(self, own: str, rows: int, inputs: int) -> TensorInfo:
        info = self.gguf.tensor(own)
        if info.shape != (rows, inputs):
            raise ModelLoadError(f"{self.gguf.path}: {own} is {info.shape}, expected {(rows, inputs)}", param="model")
        return info

    def table(self, name: str, rows: int, inputs: int) -> Table:
        """See `Weights`: blocks stay in their file."""
        own = self.name_of(name)
        info = self._info(own, rows, inputs)
        if info.type not in set(Source):
            return Table.of(self.matrix(name, rows, inputs))
        path, offset = self.gguf.place_of(own)
        try:
            return Table.in_file(self.context, rows, inputs, Source(info.type), path, offset)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path} changed while it was read: {error}", param="model") from error

    def matrix(self, name: str, rows: int, inputs: int, heads: int = 0) -> PackedMatrix:
        """See `Weights`: quants as they are; floats are rounded to 8 bits."""
        own = self.name_of(name)
        info = self._info(own, rows, inputs)
        data: npt.NDArray[Any]
        if info.type in FLOATS:
            source, data = Source.F32, self.gguf.floats(own)
        elif info.type in set(Source):
            source, data = Source(info.type), self.gguf.bytes_of(own)
        else:
            raise UnsupportedError(f"{own}, which is of type {info.type_name}")
        out = PackedMatrix(self.context, rows, inputs, source.kind if source.kind is not None else Kind.EIGHT)
        return out.pack(data, source, _halves(heads, rows // heads) if heads and self._family.interleaved else None)


NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")
FLOATS = (0, 1, 30)
"""GGUF's F32, F16 and BF16."""


def target_from_gguf(gguf: GgufFile, context: Context, eos_token_ids: tuple[int, ...]) -> NativeTarget:
    """Pack a GGUF file's blocks.

    Raises:
        UnsupportedError: a tensor type or a size that the kernels cannot do.
        ModelLoadError: an architecture or rotary scaling that is not known; a tensor missing, of the wrong shape, or
            one that such a model does not have.
    """
    geometry = geometry_of_gguf(gguf)
    check_tensors(gguf, geometry)
    return assemble(geometry, GgufWeights(gguf, context, geometry), context, eos_token_ids)


def _halves(heads: int, size: int) -> npt.NDArray[np.int32]:
    """Which stored row each row is: of each head, all first elements of the pairs and then all second ones."""
    order = np.arange(heads * size, dtype=np.int32).reshape(heads, size // 2, 2)
    return np.ascontiguousarray(order.transpose(0, 2, 1).reshape(-1))


# --- safetensors -------------------------------------------------------------------------------------------------


class SafetensorsWeights:
    """Tensors of a `transformers` checkpoint folder, rounded to 8 bits or to 4 with a scale for each group of 32."""

    def __init__(self, folder: Path, context: Context, kind: Kind, geometry: Geometry) -> None:
        self.folder, self.context, self.kind = folder, context, kind
        self._offset = np.float32(geometry.family.norm_offset)
        self._file: dict[str, Any] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelLoadError(f"no *.safetensors in {folder}", param="model")
        for path in files:
            try:
                file = safe_open(str(path), framework="pt")
                self._file |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise ModelLoadError(f"{path} is broken: {error}", param="model") from error
        self._file = {_of_text(name): (file, name) for name, file in self._file.items()}

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, as text models call them."""
        return self._file.keys()

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return name in self._file

    def _tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        if name not in self._file:
            raise ModelLoadError(f"{self.folder} has no tensor {name}", param="model")
        file, own = self._file[name]
        tensor = file.get_tensor(own)
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(f"{self.folder}: {name} is {tuple(tensor.shape)}, expected {shape}", param="model")
        values: npt.NDArray[np.float32] = tensor.float().numpy()
        return values

    def floats(self, name: str, size: int, *, norm: bool = False) -> npt.NDArray[np.float32]:
        """See `Weights`."""
        return self._tensor(name, (size,)) + (self._offset if norm else np.float32(0))

    def matrix(self, name: str, rows: int, inputs: int, heads: int = 0) -> PackedMatrix:
        """See `Weights`."""
        out = PackedMatrix(self.context, rows, inputs, self.kind)
        return out.pack(self._tensor(name, (rows, inputs)), Source.F32)

    def table(self, name: str, rows: int, inputs: int) -> Table:
        """See `Weights`."""
        return Table.of(self.matrix(name, rows, inputs))


def _of_text(name: str) -> str:
    """A tensor's name in a text model that is a part of a wrapper: old ones and new ones name that part otherwise."""
    for part, own in (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
                      ("model.language_model.", "model.")):  # fmt: skip
        if name.startswith(part):
            return own + name.removeprefix(part)
    return name


def target_from_folder(folder: Path, kind: Kind, context: Context) -> NativeTarget:
    """Quantise a checkpoint folder on load.

    Raises:
        UnsupportedError: a family, a setting or a size that the kernels cannot do.
        ModelLoadError: a file unreadable, a tensor missing or of the wrong shape.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = read_json(path)
        geometry = geometry_of(raw, str(path))
        eos = raw.get("eos_token_id")
        generation = folder / "generation_config.json"
        if generation.exists():
            eos = read_json(generation).get("eos_token_id", eos)
        ids = tuple(int(i) for i in eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ModelLoadError(f"{path} cannot be used: {error}", param="model") from error
    weights = SafetensorsWeights(folder, context, kind, geometry)
    text = ("model.layers.", "lm_head.")
    read = tuple(f"{part}_proj.bias" for part in "qkv") if geometry.family.qkv_bias else ()
    unknown = [n for n in weights.names if n.startswith(text) and n.endswith(".bias") and not n.endswith(read)]
    if unknown:
        raise UnsupportedError(unknown[0])
    return assemble(geometry, weights, context, ids)
