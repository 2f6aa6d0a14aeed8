"""Tiny models of every family, random weights, as `transformers` folders and as GGUF files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dspark_stream.models.families import FAMILIES
from dspark_stream.models.native.loading import gguf_name

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD, INNER, POSITIONS = 96, 64, 4, 2, 32, 96, 256
ORIGINAL = 16
"""Positions that stretched models were first trained for."""
WINDOW, PATTERN = 8, 3
"""Of layers with windows, of which each third has none."""
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "attention_factor": 1.5,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": ORIGINAL,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
}
THETA = 3000.0


def config_of(family: str, scaling: dict[str, Any], **options: Any) -> Any:
    """The library's config."""
    windowed = bool(FAMILIES[family].windows)
    rope = {**scaling, "rope_theta": THETA}
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 6 if windowed else 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        if windowed
        else rope,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": windowed,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    if windowed:
        kinds = ["full_attention" if (i + 1) % PATTERN == 0 else "sliding_attention" for i in range(6)]
        fields |= {"sliding_window": WINDOW, "query_pre_attn_scalar": HEAD, "layer_types": kinds}
    return AutoConfig.for_model(family, **(fields | options))


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights under which attention looks at something, and logits tell models apart."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            sharp = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.data = noise * sharp * parameter.shape[1] ** -0.5
        elif name.endswith("bias"):
            parameter.data = noise * 0.5
        else:  # norms: of another weight in each column, about 1 with Gemma's offset or without
            sharp = 0.15 if "q_norm" in name or "k_norm" in name else 0.0
            parameter.data = parameter.data.mean() + sharp + 0.2 * noise


def save(folder: Path, family: str, scaling: dict[str, Any], **options: Any) -> Any:
    """A model's folder; returns the model."""
    model = AutoModelForCausalLM.from_config(config_of(family, scaling, **options))
    randomise(model)
    model.eval().save_pretrained(folder)
    return model


def gguf_scaling(scaling: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a GGUF file says of a scaling below `rope.scaling`, and its `rope_freqs`."""
    kind = scaling["rope_type"]
    if kind == "default":
        return {}, None
    if kind == "llama3":
        config = config_of("llama", scaling)
        stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = THETA ** -(np.arange(0, HEAD, 2) / HEAD)
        return {}, (plain / stretched.double().numpy()).astype(np.float32)
    fields: dict[str, Any] = {"type": kind, "factor": scaling["factor"]}
    if kind == "yarn":
        fields["original_context_length"] = scaling["original_max_position_embeddings"]
        fields |= {f"yarn_{name}": scaling[name] for name in ("beta_fast", "beta_slow") if name in scaling}
        _, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config_of("llama", scaling), torch.device("cpu"))
        own = 0.1 * math.log(scaling["factor"]) + 1.0
        if abs(amplitude / own - 1) > 1e-6:
            fields["attn_factor"] = amplitude / own
    return fields, None


def write_gguf(
    path: Path,
    model: Any,
    scaling: dict[str, Any],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    *,
    fields: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """``model`` as such files have it; ``fields`` below its architecture (None: left out) and ``tensors`` besides."""
    c, family = model.config, FAMILIES[model.config.model_type]
    said, divisors = gguf_scaling(scaling)
    own: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": THETA,
        "rope.dimension_count": c.head_dim,
        **{f"rope.scaling.{name}": value for name, value in said.items()},
    }
    if family.windows:
        own |= {"attention.sliding_window": c.sliding_window, "attention.sliding_window_pattern": PATTERN}
        del own["rope.dimension_count"]
    writer = gguf.GGUFWriter(path, family.gguf)
    add = {str: "string", list: "array", bool: "bool", int: "uint32", float: "float32"}
    for name, value in (own | (fields or {})).items():
        if value is not None:
            getattr(writer, f"add_{add[type(value)]}")(f"{family.gguf}.{name}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "1", "t1", *(f"x{i}" for i in range(c.vocab_size - 3))])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(1)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors)
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, tensor)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        if "norm" in name:
            data = data + np.float32(family.norm_offset)
        if family.interleaved and ("q_proj" in name or "k_proj" in name):
            heads = data.shape[0] // c.head_dim
            data = data.reshape(heads, 2, c.head_dim // 2, *data.shape[1:]).swapaxes(1, 2).reshape(data.shape)
        if data.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            data = gguf.quants.quantize(data, kind)
            writer.add_tensor(gguf_name(name, family), data, raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name, family), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
