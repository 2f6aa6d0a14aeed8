"""Targets for the CPU's integer kernels, packed one tensor at a time: from GGUF blocks as they are, or from safetensors
with weights rounded on the way. A copy of the whole model in full precision never exists.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from dspark_kernels.cpu import Context, Llama, PackedMatrix, Source
from dspark_kernels.cpu.library import LayerWeights
from dspark_stream.errors import ModelLoadError
from dspark_stream.models.geometry import KERNEL_FAMILIES, Geometry, UnsupportedError, checked, geometry_of
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.native import PAST_THE_END, NativeTarget, rotary_tables


class Part(NamedTuple):
    """Rows of a matrix: one tensor, by the name that it has in `transformers` checkpoints."""

    name: str
    rows: int
    heads: int = 0
    """Query or key heads whose rows stand in rotary order; 0: no such rows."""


class Weights(Protocol):
    """Where tensors come from."""

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """A norm's weight [size]."""

    def matrix(self, parts: Sequence[Part], inputs: int) -> PackedMatrix:
        """Tensors one below the other."""


def assemble(g: Geometry, weights: Weights, context: Context, eos_token_ids: tuple[int, ...]) -> NativeTarget:
    """Pack all layers.

    Raises:
        UnsupportedError: sizes or tensor types that the kernels cannot do.
        ModelLoadError: a tensor missing or of the wrong shape.
    """
    q, kv = g.heads * g.head_size, g.kv_heads * g.head_size

    def layer(i: int) -> LayerWeights:
        name = f"model.layers.{i}."
        attention, mlp = name + "self_attn.", name + "mlp."
        normed = weights.has(attention + "q_norm.weight")
        return LayerWeights(
            qkv=weights.matrix(
                [
                    Part(attention + "q_proj.weight", q, g.heads),
                    Part(attention + "k_proj.weight", kv, g.kv_heads),
                    Part(attention + "v_proj.weight", kv),
                ],
                g.hidden_size,
            ),
            o=weights.matrix([Part(attention + "o_proj.weight", g.hidden_size)], q),
            gate=weights.matrix([Part(mlp + "gate_proj.weight", g.inner)], g.hidden_size),
            up=weights.matrix([Part(mlp + "up_proj.weight", g.inner)], g.hidden_size),
            down=weights.matrix([Part(mlp + "down_proj.weight", g.hidden_size)], g.inner),
            input_norm=weights.floats(name + "input_layernorm.weight", g.hidden_size),
            post_norm=weights.floats(name + "post_attention_layernorm.weight", g.hidden_size),
            q_norm=weights.floats(attention + "q_norm.weight", g.head_size) if normed else None,
            k_norm=weights.floats(attention + "k_norm.weight", g.head_size) if normed else None,
        )

    try:
        cosine, sine = rotary_tables(g.positions + PAST_THE_END, g.head_size, g.rope_base)
        llama = Llama(
            context,
            heads=g.heads,
            kv_heads=g.kv_heads,
            eps=g.eps,
            final_norm=weights.floats("model.norm.weight", g.hidden_size),
            cosine=cosine,
            sine=sine,
            layers=[layer(i) for i in range(g.layers)],
        )
        embedding = weights.matrix([Part("model.embed_tokens.weight", g.vocab)], g.hidden_size)
        tied = not weights.has("lm_head.weight")
        head = embedding if tied else weights.matrix([Part("lm_head.weight", g.vocab)], g.hidden_size)
    except ValueError as error:  # what the kernels say of sizes and shapes
        raise UnsupportedError(str(error)) from error
    return NativeTarget(
        llama, embedding, head, family=g.model_type, max_positions=g.positions, eos_token_ids=eos_token_ids
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


def gguf_name(name: str) -> str:
    """What a tensor of a `transformers` checkpoint is called in GGUF files."""
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"
    return f"{GGUF_NAMES[stem]}.weight"


class GgufWeights:
    """Blocks of a GGUF file."""

    def __init__(self, gguf: GgufFile, context: Context, *, interleaved: bool) -> None:
        self.gguf, self.context = gguf, context
        self.interleaved = interleaved
        """Whether query and key rows are stored with the two halves of a head interleaved (llama)."""

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return gguf_name(name) in self.gguf.tensors

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """See `Weights`."""
        return self.gguf.floats(gguf_name(name))

    def matrix(self, parts: Sequence[Part], inputs: int) -> PackedMatrix:
        """See `Weights`: of as many bits as the finest of the parts needs."""
        names = [gguf_name(part.name) for part in parts]
        kinds = []
        for name, part in zip(names, parts, strict=True):
            info = self.gguf.tensor(name)
            if info.shape != (part.rows, inputs):
                raise ModelLoadError(
                    f"{self.gguf.path}: {name} is {info.shape}, expected {(part.rows, inputs)}", param="model"
                )
            if info.type not in set(Source) - {Source.F32}:
                raise UnsupportedError(f"{name}, which has GGUF type {info.type}")
            kinds.append(Source(info.type))
        bits = max(kind.bits for kind in kinds)
        out = PackedMatrix(self.context, sum(part.rows for part in parts), inputs, bits)
        first = 0
        for name, part, kind in zip(names, parts, kinds, strict=True):
            order = _halves(part.heads, part.rows // part.heads) if part.heads and self.interleaved else None
            out.pack(first, part.rows, self.gguf.bytes_of(name), kind, order)
            first += part.rows
        return out


def target_from_gguf(gguf: GgufFile, context: Context, eos_token_ids: tuple[int, ...]) -> NativeTarget:
    """Pack a GGUF file's blocks.

    Raises:
        UnsupportedError: an architecture, a tensor type or a size that the kernels cannot do.
        ModelLoadError: a tensor missing or of the wrong shape.
    """
    family = gguf.fields.get("general.architecture")
    if family not in KERNEL_FAMILIES:
        raise UnsupportedError(f"architecture {family}")
    if "rope_freqs.weight" in gguf.tensors or gguf.fields.get(f"{family}.rope.scaling.type", "none") != "none":
        raise UnsupportedError("scaled rotary positions")

    def number(name: str, default: Any = None) -> Any:
        value = gguf.fields.get(f"{family}.{name}", default)
        if value is None:
            raise ModelLoadError(f"{gguf.path}: no {family}.{name}", param="model")
        return value

    biased = [name for name in gguf.tensors if name.endswith(".bias")]
    if biased:
        raise UnsupportedError(f"{biased[0]}")
    hidden, heads = int(number("embedding_length")), int(number("attention.head_count"))
    tokens = gguf.fields.get("tokenizer.ggml.tokens", ())
    geometry = checked(
        {
            "model_type": family,
            "hidden_size": hidden,
            "heads": heads,
            "kv_heads": int(number("attention.head_count_kv", heads)),
            "head_size": int(number("attention.key_length", hidden // max(1, heads))),
            "inner": int(number("feed_forward_length")),
            "positions": int(number("context_length")),
            "layers": int(number("block_count")),
            "vocab": len(tokens) or gguf.tensor("token_embd.weight").shape[0],
            "eps": float(number("attention.layer_norm_rms_epsilon")),
            "rope_base": float(number("rope.freq_base", 10000.0)),
        },
        str(gguf.path),
    )
    if int(number("rope.dimension_count", geometry.head_size)) != geometry.head_size:
        raise UnsupportedError("rotary positions of a part of each head")
    return assemble(geometry, GgufWeights(gguf, context, interleaved=family == "llama"), context, eos_token_ids)


def _halves(heads: int, size: int) -> npt.NDArray[np.int32]:
    """Which stored row each row is: of each head, all first elements of the pairs and then all second ones."""
    order = np.arange(heads * size, dtype=np.int32).reshape(heads, size // 2, 2)
    return np.ascontiguousarray(order.transpose(0, 2, 1).reshape(-1))


# --- safetensors -------------------------------------------------------------------------------------------------


class SafetensorsWeights:
    """Tensors of a `transformers` checkpoint folder, rounded to 8 bits or to 4 with a scale for each group of 32."""

    def __init__(self, folder: Path, context: Context, bits: int) -> None:
        self.folder, self.context, self.bits = folder, context, bits
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

    def has(self, name: str) -> bool:
        """See `Weights`."""
        return name in self._file

    def _tensor(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        if name not in self._file:
            raise ModelLoadError(f"{self.folder} has no tensor {name}", param="model")
        tensor = self._file[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelLoadError(f"{self.folder}: {name} is {tuple(tensor.shape)}, expected {shape}", param="model")
        values: npt.NDArray[np.float32] = tensor.float().numpy()
        return values

    def floats(self, name: str, size: int) -> npt.NDArray[np.float32]:
        """See `Weights`."""
        return self._tensor(name, (size,))

    def matrix(self, parts: Sequence[Part], inputs: int) -> PackedMatrix:
        """See `Weights`."""
        out = PackedMatrix(self.context, sum(part.rows for part in parts), inputs, self.bits)
        first = 0
        for part in parts:
            out.pack(first, part.rows, self._tensor(part.name, (part.rows, inputs)), Source.F32)
            first += part.rows
        return out


def target_from_folder(folder: Path, bits: int, context: Context) -> NativeTarget:
    """Quantise a checkpoint folder on load.

    Raises:
        UnsupportedError: a family, a setting or a size that the kernels cannot do.
        ModelLoadError: a file unreadable, a tensor missing or of the wrong shape.
    """
    path = folder / "config.json"
    try:
        raw: dict[str, Any] = json.loads(path.read_text())
        geometry = geometry_of(raw, str(path))
        if raw.get("use_sliding_window"):
            raise UnsupportedError("sliding windows")
        eos = raw.get("eos_token_id")
        generation = folder / "generation_config.json"
        if generation.exists():
            eos = json.loads(generation.read_text()).get("eos_token_id", eos)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{path} cannot be used: {error}", param="model") from error
    weights = SafetensorsWeights(folder, context, bits)
    biased = [name for name in weights._file if name.endswith(".bias")]
    if biased:
        raise UnsupportedError(biased[0])
    ids = tuple(int(i) for i in eos) if isinstance(eos, list) else () if eos is None else (int(eos),)
    return assemble(geometry, weights, context, ids)
