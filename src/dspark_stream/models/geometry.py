"""Sizes and constants of a decoder, as a `config.json` of `transformers` or a GGUF file's metadata has them.

The CPU's kernels need no more of a config than this; the library that would read all of it takes 150 MB and three
seconds to import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.families import FAMILIES, Family, by_gguf, family_named, supported
from dspark_stream.models.gguf import GgufFile
from dspark_stream.models.rotary import Rotary, RotaryError, rotary_of_config, rotary_of_gguf

LARGEST = 1 << 31
Size = Annotated[int, msgspec.Meta(ge=1, le=LARGEST)]
Constant = Annotated[float, msgspec.Meta(gt=0.0, le=1e12)]
LOCAL_BASE = 10_000.0
"""Rotary base of Gemma's layers with a window, where nothing else is said."""
GEMMA3_27B_LAYERS = 62
"""Its GGUF files do not say that its queries are scaled by H / heads instead of the head size."""


NOT_IN_GGUF = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "expert_count",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
)
"""Metadata of GGUF files that changes what is computed and that nothing here heeds."""


class UnsupportedError(Exception):
    """A model that the CPU's kernels cannot run; torch can. The message says why."""


class Geometry(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner is told about a model."""

    model_type: str
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_size: Size
    inner: Size
    positions: Size
    layers: Size
    vocab: Size
    eps: Constant
    rotary: Rotary
    local_rotary: Rotary | None = None
    """Of layers with a window, where it is another."""
    window: int = 0
    """Positions that a row of such a layer sees, itself among them; 0: there are none."""
    windowed: tuple[bool, ...] = ()
    """Which layers have one; empty: none."""
    score_scale: Constant | None = None
    """Of query · key; None: 1/√D."""

    @property
    def family(self) -> Family:
        """Its facts."""
        return FAMILIES[self.model_type]


class _WindowError(ValueError):
    """Windows that contradict themselves; the message says which field."""


class _Fields(msgspec.Struct):
    """The fields of a `config.json` that matter here, with the library's defaults where it has the same for all."""

    hidden_size: Size
    num_attention_heads: Size
    intermediate_size: Size
    max_position_embeddings: Size
    num_hidden_layers: Size
    vocab_size: Size
    rms_norm_eps: Constant = 1e-6
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    rope_theta: Constant | None = None
    rope_local_base_freq: Constant | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None
    attention_bias: bool | None = False
    mlp_bias: bool | None = False
    hidden_act: str | None = None
    hidden_activation: str | None = None
    use_sliding_window: bool | None = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    sliding_window_pattern: int | None = None
    query_pre_attn_scalar: Constant | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    use_bidirectional_attention: bool | None = False


def _checked(geometry: dict[str, Any], source: str, param: str) -> Geometry:
    """A geometry whose numbers are in range; the error names ``source``, the field and its limit."""
    try:
        checked = msgspec.convert(geometry, Geometry)
    except msgspec.ValidationError as error:
        raise ModelLoadError(f"{source}: {error}", param=param) from error
    if checked.heads % checked.kv_heads or checked.head_size % 2:
        said = f"{checked.heads} query heads and {checked.kv_heads} key heads of {checked.head_size}"
        raise ModelLoadError(f"{source}: {said}, which cannot be", param=param)
    return checked


def geometry_of(raw: Mapping[str, Any], source: str, param: str = "model") -> Geometry:
    """Of a `config.json`, read from ``source``.

    Raises:
        UnsupportedError: a family or a setting that the kernels cannot do.
        ModelLoadError: a field that is missing, of another type or out of range; rotary scaling that is not known.
    """
    family = family_named(raw.get("model_type"))
    if family is None or not family.native:
        raise UnsupportedError(f"model type {raw.get('model_type')}; known: {supported()}")
    if raw.get("model_type") in family.wrappers and isinstance(raw.get("text_config"), dict):
        raw = raw["text_config"]
    try:
        f = msgspec.convert({**family.defaults, **raw}, _Fields)
        rotary, local = _rotaries(family, f)
        windowed = _windowed(family, f)
    except (msgspec.ValidationError, RotaryError, _WindowError) as error:
        raise ModelLoadError(f"{source}: {error}", param=param) from error
    _refuse_unknown_parts(family, f)
    heads = f.num_attention_heads
    return _checked(
        {
            "model_type": family.name,
            "hidden_size": f.hidden_size,
            "heads": heads,
            "kv_heads": f.num_key_value_heads or heads,
            "head_size": f.head_dim or family.default_head_size or f.hidden_size // heads,
            "inner": f.intermediate_size,
            "positions": f.max_position_embeddings,
            "layers": f.num_hidden_layers,
            "vocab": f.vocab_size,
            "eps": f.rms_norm_eps,
            "rotary": rotary,
            "local_rotary": local,
            "window": (f.sliding_window or 0) if any(windowed) else 0,
            "windowed": windowed if any(windowed) else (),
            "score_scale": f.query_pre_attn_scalar**-0.5 if f.query_pre_attn_scalar else None,
        },
        source,
        param,
    )


def _refuse_unknown_parts(family: Family, f: _Fields) -> None:
    """What some checkpoints of these families have and the kernels do not."""
    if (f.attention_bias and not family.qkv_bias) or f.mlp_bias:
        raise UnsupportedError("attention_bias, mlp_bias: biases in layers of its family")
    if f.attn_logit_softcapping or f.final_logit_softcapping:
        raise UnsupportedError("attn_logit_softcapping, final_logit_softcapping: soft-capped logits")
    if f.use_bidirectional_attention:
        raise UnsupportedError("use_bidirectional_attention")
    if f.partial_rotary_factor not in (None, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {f.partial_rotary_factor}")
    activation = f.hidden_activation or f.hidden_act
    known = ("gelu_pytorch_tanh", "gelu_tanh") if family.gelu else ("silu", "swish")
    if activation is not None and activation not in known:
        raise UnsupportedError(f"activation {activation}")


def _windowed(family: Family, f: _Fields) -> tuple[bool, ...]:
    """Which layers have a window."""
    if f.layer_types is not None:
        if len(f.layer_types) != f.num_hidden_layers:
            raise _WindowError(f"{len(f.layer_types)} layer_types for {f.num_hidden_layers} layers")
        if not set(f.layer_types) <= {"full_attention", "sliding_attention"}:
            raise UnsupportedError(f"layer_types {', '.join(sorted(set(f.layer_types)))}")
        windowed = tuple(kind == "sliding_attention" for kind in f.layer_types)
    elif family.windows:
        windowed = every(f.sliding_window_pattern or family.windows, f.num_hidden_layers)
    elif f.use_sliding_window:
        raise UnsupportedError("use_sliding_window, windows in some of its layers, without layer_types")
    else:
        windowed = (False,) * f.num_hidden_layers
    if any(windowed) and not (f.sliding_window and f.sliding_window > 0 and (family.windows or f.use_sliding_window)):
        raise _WindowError(f"layers with a window, and sliding_window {f.sliding_window}")
    return windowed


def every(pattern: int, layers: int) -> tuple[bool, ...]:
    """All layers have a window but each ``pattern``-th."""
    return tuple((i + 1) % pattern != 0 for i in range(layers))


def _rotaries(family: Family, f: _Fields) -> tuple[Rotary, Rotary | None]:
    """The rotary embedding, and that of layers with a window where the family has another. Which field counts where
    several say something is the library's rule."""
    given, scaling, positions = f.rope_parameters or {}, f.rope_scaling or {}, f.max_position_embeddings
    by_layer = {name: value for name, value in given.items() if isinstance(value, dict)}
    for fields in (scaling, given, *by_layer.values()):
        if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise UnsupportedError(f"partial_rotary_factor {fields['partial_rotary_factor']}")
    if not family.windows:
        if by_layer:
            raise RotaryError(f"rope_parameters by layer type ({', '.join(by_layer)}), which {family.title} has not")
        whole = dict(scaling or given)
        if f.original_max_position_embeddings is not None:
            whole["original_max_position_embeddings"] = f.original_max_position_embeddings
        return rotary_of_config(whole, 10_000.0 if f.rope_theta is None else f.rope_theta, positions), None
    flat = [name for name, value in given.items() if name not in by_layer and value is not None]
    if flat:
        raise RotaryError(f"rope_parameters {', '.join(flat)}, not by layer type as {family.title} has them")
    whole = {**by_layer.get("full_attention", {}), **scaling}
    local = by_layer.get("sliding_attention", {})
    return (
        rotary_of_config(whole, f.rope_theta or 1_000_000.0, positions),
        rotary_of_config(local, f.rope_local_base_freq or LOCAL_BASE, positions),
    )


def _divisors(gguf: GgufFile, size: int) -> tuple[float, ...]:
    """The tensor `rope_freqs`, one for each frequency of heads of ``size``; empty where there is none."""
    if "rope_freqs.weight" not in gguf.tensors:
        return ()
    factors = gguf.floats("rope_freqs.weight")
    if factors.shape != (size // 2,):
        raise ModelLoadError(
            f"{gguf.path}: rope_freqs.weight has {factors.size} factors for heads of {size}", param="model"
        )
    return tuple(factors.tolist())


def geometry_of_gguf(gguf: GgufFile) -> Geometry:
    """Of a GGUF file's metadata.

    Raises:
        UnsupportedError: an architecture that the kernels cannot run.
        ModelLoadError: a field that is missing or out of range; rotary scaling that is not known.
    """
    architecture = gguf.fields.get("general.architecture")
    family = by_gguf(architecture)
    if family is None:
        raise ModelLoadError(
            f"{gguf.path} is a {architecture}; supported from GGUF: "
            f"{', '.join(f.gguf for f in FAMILIES.values() if f.gguf)} (and from folders: {supported()})",
            param="model",
        )
    if not family.native:
        raise UnsupportedError(f"architecture {architecture}")

    def number(name: str, default: Any = None) -> Any:
        value = gguf.fields.get(f"{architecture}.{name}", default)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            said = "is missing" if value is None else f"is {str(value)[:40]}, one number is needed"
            raise ModelLoadError(f"{gguf.path}: {architecture}.{name} {said}", param="model")
        return value

    def count(name: str, default: int | None = None) -> int:
        value = number(name, default)
        if not isinstance(value, int) or not 0 < value <= LARGEST:
            raise ModelLoadError(f"{gguf.path}: {architecture}.{name} is {value}, not 1 … {LARGEST}", param="model")
        return value

    for name in NOT_IN_GGUF:
        if gguf.fields.get(f"{architecture}.{name}"):
            raise UnsupportedError(f"{architecture}.{name}")
    hidden, heads, positions = (count(name) for name in ("embedding_length", "attention.head_count", "context_length"))
    layers = count("block_count")
    size = count("attention.key_length", family.default_head_size or max(1, hidden // heads))
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := count(name, size)) != size:
            raise UnsupportedError(f"{architecture}.{name} {other} with keys of {size}")
    divisors = _divisors(gguf, size)
    windowed: tuple[bool, ...] = ()
    if family.windows:
        pattern = gguf.fields.get(f"{architecture}.attention.sliding_window_pattern")
        if isinstance(pattern, list) and len(pattern) == layers and set(pattern) <= {True, False}:
            windowed = tuple(map(bool, pattern))
        else:
            windowed = every(count("attention.sliding_window_pattern", family.windows), layers)
    scale = None
    if family.windows and layers == GEMMA3_27B_LAYERS:
        scale = (hidden / heads) ** -0.5
    try:
        rotary = rotary_of_gguf(
            gguf.fields, str(architecture), float(number("rope.freq_base", 10_000.0)), positions, divisors
        )
    except RotaryError as error:
        raise ModelLoadError(f"{gguf.path}: {error}", param="model") from error
    return _checked(
        {
            "model_type": family.name,
            "hidden_size": hidden,
            "heads": heads,
            "kv_heads": count("attention.head_count_kv", heads),
            "head_size": size,
            "inner": count("feed_forward_length"),
            "positions": positions,
            "layers": layers,
            "vocab": gguf.tensor("token_embd.weight").shape[0],
            "eps": float(number("attention.layer_norm_rms_epsilon")),
            "rotary": rotary,
            "local_rotary": Rotary(base=float(number("rope.freq_base_swa", LOCAL_BASE))) if family.windows else None,
            "window": count("attention.sliding_window") if any(windowed) else 0,
            "windowed": windowed,
            "score_scale": scale,
        },
        str(gguf.path),
        "model",
    )
