"""What the CPU's kernels read of a config: every number checked, every refusal saying why."""

from __future__ import annotations

import pytest

from dspark_stream.errors import ModelLoadError
from dspark_stream.models.geometry import UnsupportedError, geometry_of

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}


def test_sizes_and_defaults():
    g = geometry_of(CONFIG, "config.json")
    assert (g.heads, g.kv_heads, g.head_size, g.rotary.base) == (4, 2, 16, 5000.0)
    few = {k: v for k, v in CONFIG.items() if k not in ("num_key_value_heads", "rope_parameters", "rms_norm_eps")}
    g = geometry_of(few | {"rope_theta": 7000.0, "head_dim": 32}, "config.json")
    assert (g.kv_heads, g.head_size, g.rotary.base, g.eps) == (4, 32, 7000.0, 1e-6)
    assert geometry_of(CONFIG | {"model_type": "qwen3"}, "config.json").head_size == 128  # as the library has it


def test_scaling_and_windows_are_read():
    g = geometry_of(CONFIG | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json")
    assert (g.rotary.kind, g.rotary.factor, g.rotary.base) == (
        "linear",
        2.0,
        10_000.0,
    )  # the library's rule
    old = {k: v for k, v in CONFIG.items() if k != "rope_parameters"} | {"rope_theta": 5000.0}
    g = geometry_of(old | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "config.json")
    assert (g.rotary.kind, g.rotary.factor, g.rotary.base, g.windowed) == ("linear", 2.0, 5000.0, ())
    types = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 33, "use_sliding_window": True}
    g = geometry_of(CONFIG | types | {"model_type": "qwen2"}, "config.json")
    assert (g.window, g.windowed, g.local_rotary, g.family.qkv_bias) == (33, (True, False), None, True)
    gemma = old | {"model_type": "gemma3_text", "num_hidden_layers": 7, "sliding_window": 512,
                   "query_pre_attn_scalar": 64, "rope_theta": 1e6}  # fmt: skip
    for config in (gemma, {"model_type": "gemma3", "text_config": gemma}):
        g = geometry_of(config, "config.json")
        assert (g.model_type, g.head_size, g.score_scale, g.window) == ("gemma3_text", 256, 0.125, 512)
        assert g.windowed == (True,) * 5 + (False, True)
        assert (g.rotary.base, g.local_rotary.base) == (1e6, 10_000.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"num_attention_heads": -1}, "num_attention_heads"),
        ({"intermediate_size": "many"}, "intermediate_size"),
        ({"vocab_size": float("inf")}, "vocab_size"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta"),
        ({"rope_parameters": "yes"}, "rope_parameters"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "llama3 without factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not known"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear without factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "factor is 0.0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "by layer"),
        ({"model_type": "gemma3_text"}, "not by layer type"),
        ({"model_type": "gemma3_text", "rope_parameters": None, "sliding_window": None}, "sliding_window None"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 2 layers"),
    ],
)
def test_bad_numbers_are_named_with_their_file(change, said):
    with pytest.raises(ModelLoadError) as refused:
        geometry_of(CONFIG | change, "folder/config.json", "drafter")
    assert "folder/config.json" in refused.value.message
    assert said in refused.value.message
    assert refused.value.param == "drafter"


def test_a_missing_field_is_named():
    with pytest.raises(ModelLoadError, match="intermediate_size"):
        geometry_of({k: v for k, v in CONFIG.items() if k != "intermediate_size"}, "config.json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gemma4_text"}, "gemma4_text"),
        ({"model_type": "mamba"}, "mamba"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"final_logit_softcapping": 30.0}, "soft-capped"),
        ({"use_sliding_window": True}, "windows"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, said):
    with pytest.raises(UnsupportedError, match=said):
        geometry_of(CONFIG | change, "config.json")
