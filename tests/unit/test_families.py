"""Every family and rotary scaling, from folders and GGUF files, on torch and on the kernels: the model that plain
`transformers` runs.
"""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4TextConfig,
    LlamaConfig,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dspark_kernels.cpu import Context, Kind, best_isa
from dspark_kernels.cpu import build as building
from dspark_stream.errors import ModelLoadError
from dspark_stream.models.cache import Extent
from dspark_stream.models.geometry import UnsupportedError, geometry_of
from dspark_stream.models.loading import load_target
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Rows
from dspark_stream.models.rotary import Rotary, RotaryError, rotary_of_config, rotary_of_gguf
from ggufs import changed
from tiny_families import HEAD, POSITIONS, SCALINGS, THETA, VOCAB, WINDOW, config_of, randomise, save, write_gguf

IDS = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 48)]
"""Three times the original context and six windows."""
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
FAMILY_SCALINGS = [(family, scaling) for family in FAMILIES for scaling in SCALINGS]
EXACT = 1e-4
ROUNDED = 0.06
"""Of the logits' size: activations of 8 bits in groups of 32 are half a step, 1/254 of their greatest, off at most, a
few thousandths of their size on average; some 15 products in a row make that one or two percent."""
pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler: apt-get install g++")


def off(got, want):
    """How far logits [T, V] are from others, by their size."""
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(scope="module")
def kernels():
    return Context(2, best_isa())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder, GGUF files and what `transformers` says, of a family and a scaling."""

    @cache
    def make(family, scaling):
        at = tmp_path_factory.mktemp("model")
        model = save(at / "folder", family, SCALINGS[scaling])
        write_gguf(at / "f32.gguf", model, SCALINGS[scaling])
        write_gguf(at / "q8.gguf", model, SCALINGS[scaling], gguf.GGMLQuantizationType.Q8_0)
        plain = AutoModelForCausalLM.from_pretrained(at / "folder", attn_implementation="eager", dtype=torch.float32)
        with torch.inference_mode():
            logits = plain(torch.tensor([IDS])).logits[0]
        return SimpleNamespace(folder=at / "folder", f32=at / "f32.gguf", q8=at / "q8.gguf", logits=logits)

    return make


def load(path, kernels=None, kind=None):
    if kernels is None:
        return load_target(str(path), dtype="float32", device="cpu").target
    target = load_target(str(path), kernels=kernels, kind=kind).target
    assert isinstance(target, NativeTarget)
    return target


def logits_of(target, ids=IDS, pieces=()):
    """Of all positions, the text handed over in pieces of those lengths, and one token after another then."""
    store, at, out = target.make_store(2 * POSITIONS), 0, []
    for piece in (*pieces, *[1] * (len(ids) - sum(pieces))) if pieces else (len(ids),):
        run = target.forward([Rows(Extent(32, POSITIONS), at, ids[at : at + piece])], store)
        out.append(run.logits(range(piece)).clone())
        at += piece
    return torch.cat(out)


# --- the same model everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "scaling"), FAMILY_SCALINGS)
def test_torch_is_the_library(made, family, scaling):
    own = made(family, scaling)
    assert off(logits_of(load(own.folder)), own.logits) < EXACT
    assert off(logits_of(load(own.f32)), own.logits) < EXACT


@pytest.mark.parametrize(("family", "scaling"), FAMILY_SCALINGS)
def test_the_kernels_differ_by_rounding_alone(made, kernels, family, scaling):
    own = made(family, scaling)
    same_weights = logits_of(load(own.q8))
    assert off(same_weights, own.logits) < ROUNDED
    rounded = off(logits_of(load(own.q8, kernels)), same_weights)  # of activations alone
    assert rounded < ROUNDED
    for target in (load(own.f32, kernels), load(own.folder, kernels, Kind.EIGHT)):
        assert off(logits_of(target), own.logits) < 1.5 * ROUNDED  # of weights too
    if scaling != "plain":
        assert off(logits_of(load(made(family, "plain").q8, kernels)), own.logits) > 3 * ROUNDED


@pytest.mark.parametrize(("family", "scaling"), [(f, s) for f, s in FAMILY_SCALINGS if s != "plain"])
def test_a_scaling_that_is_dropped_is_seen(made, family, scaling):
    """The comparison above can fail: without its scaling, or with its amplitude alone left out, a model is another."""
    own = made(family, scaling)
    target = load(own.folder)
    embedding, prefix = target.decoder.rotary_emb, "full_attention_" if family == "gemma3_text" else ""
    right = getattr(embedding, prefix + "inv_freq").clone()
    getattr(embedding, prefix + "inv_freq").copy_(torch.from_numpy(Rotary(base=THETA).frequencies(HEAD)))
    assert off(logits_of(target), own.logits) > 3 * ROUNDED
    getattr(embedding, prefix + "inv_freq").copy_(right)
    assert off(logits_of(target), own.logits) < EXACT
    if scaling.startswith("yarn"):
        setattr(embedding, prefix + "attention_scaling", 1.0)
        assert off(logits_of(target), own.logits) > 1.5 * ROUNDED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["torch", "kernels"])
def test_in_pieces_it_is_the_same(made, kernels, family, where):
    target = load(made(family, "yarn").q8, kernels if where == "kernels" else None)
    whole, pieces = logits_of(target), logits_of(target, pieces=(13, 20))
    if where == "kernels":
        assert torch.equal(whole, pieces)  # no row knows which others are in its pass
    else:
        assert off(pieces, whole) < EXACT


def test_five_windows_for_one_that_sees_all_where_a_file_does_not_say(tmp_path, kernels):
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    model = save(tmp_path / "folder", "gemma3_text", SCALINGS["linear"], layer_types=kinds)
    path = write_gguf(tmp_path / "a.gguf", model, SCALINGS["linear"], fields={"attention.sliding_window_pattern": None})
    as_list = write_gguf(
        tmp_path / "b.gguf",
        model,
        SCALINGS["linear"],
        fields={"attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds]},
    )
    with torch.inference_mode():
        want = model(torch.tensor([IDS])).logits[0]
    for target in (load(path), load(as_list)):
        assert off(logits_of(target), want) < EXACT
    for target in (load(path, kernels), load(as_list, kernels)):
        assert off(logits_of(target), want) < 1.5 * ROUNDED


@pytest.mark.parametrize("where", ["torch", "kernels"])
def test_a_window_is_what_it_says(tmp_path, kernels, where):
    """Itself and the seven before: with one layer, the eighth before is not seen."""
    save(tmp_path, "gemma3_text", SCALINGS["plain"], layer_types=["sliding_attention"], num_hidden_layers=1)
    target = load(tmp_path, *([kernels, Kind.EIGHT] if where == "kernels" else []))
    before = logits_of(target)
    for at, seen in ((len(IDS) - WINDOW, True), (len(IDS) - WINDOW - 1, False)):
        changed = [(token + 1) % VOCAB if i == at else token for i, token in enumerate(IDS)]
        assert torch.equal(logits_of(target, changed)[-1], before[-1]) is not seen


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_of_other_families(tmp_path, kernels, family):
    """With the rotary embedding of all layers."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
    model = save(tmp_path, family, SCALINGS["yarn"], sliding_window=WINDOW, **kinds)
    with torch.inference_mode():
        want = model(torch.tensor([IDS])).logits[0]
    assert off(logits_of(load(tmp_path)), want) < EXACT
    assert off(logits_of(load(tmp_path, kernels, Kind.EIGHT)), want) < 1.5 * ROUNDED


def test_gemma4_runs_on_torch(tmp_path):
    config = Gemma4TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
        sliding_window=WINDOW, layer_types=["sliding_attention"] * 3 + ["full_attention"], num_kv_shared_layers=0,
        hidden_size_per_layer_input=0, final_logit_softcapping=5.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        want = model(torch.tensor([IDS])).logits[0]
    assert off(logits_of(load(tmp_path)), want) < EXACT
    with pytest.raises(UnsupportedError, match="gemma4_text"):
        geometry_of(json.loads((tmp_path / "config.json").read_text()), "config.json")


def test_a_text_model_inside_of_a_wrapper(tmp_path, kernels):
    """Gemma 3's larger models come with a vision tower: their text model is found, and its config's gaps filled."""
    text = config_of("gemma3_text", SCALINGS["linear"])
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, eos_token_id=1)
    ).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        want = model(input_ids=torch.tensor([IDS])).logits[0]
    target = load(tmp_path)
    assert target.family == "gemma3_text"
    assert off(logits_of(target), want) < EXACT
    assert off(logits_of(load(tmp_path, kernels, Kind.EIGHT)), want) < 1.5 * ROUNDED
    few = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560,
           "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
           "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}  # fmt: skip
    g = geometry_of(few, "config.json")
    assert (g.vocab, g.heads, g.kv_heads, g.head_size, g.positions) == (262_208, 8, 4, 256, 131_072)
    assert (g.rotary.kind, g.rotary.base, g.rotary.factor) == ("linear", 1e6, 8.0)
    assert (g.local_rotary.kind, g.local_rotary.base) == ("default", 1e4)
    assert g.windowed[4:6] == (True, False)


def test_a_llama_with_biases_runs_on_torch(tmp_path, kernels):
    """The kernels do not know it; the library does, and its scaling."""
    model = save(tmp_path, "llama", SCALINGS["yarn"], attention_bias=True)
    with torch.inference_mode():
        want = model(torch.tensor([IDS])).logits[0]
    assert off(logits_of(load(tmp_path)), want) < EXACT
    with pytest.raises(ModelLoadError, match="attention_bias"):
        load_target(str(tmp_path), kernels=kernels, kind=Kind.EIGHT)


# --- frequencies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize(
    "scaling",
    [
        *(scaling for name, scaling in SCALINGS.items() if name != "plain"),
        {"rope_type": "linear", "factor": 1},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "truncate": False},
        {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096, "mscale": 1.0,
         "mscale_all_dim": 0.7},
        {"rope_type": "yarn", "factor": 40.0, "beta_fast": 8, "beta_slow": 8, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"type": "yarn", "factor": 2.0},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_frequencies_are_the_librarys(scaling, theta, size):
    config = LlamaConfig(
        head_dim=size, hidden_size=4 * size, num_attention_heads=4, max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": theta},
    )  # fmt: skip
    kind = scaling.get("rope_type", scaling.get("type"))
    want, amplitude = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    rotary = rotary_of_config(scaling, theta, 131072)
    np.testing.assert_allclose(rotary.frequencies(size), want.double().numpy(), rtol=1e-5)
    assert rotary.amplitude == pytest.approx(amplitude)
    assert rotary_of_config(rotary.parameters, 1.0, 1).frequencies(size) == pytest.approx(rotary.frequencies(size))


def gguf_rotary(divisors=(), **fields):
    return rotary_of_gguf({f"llama.rope.{name}": v for name, v in fields.items()}, "llama", 1e4, 64, divisors)


def test_scaling_of_gguf_files():
    """As llama.cpp reads it: a factor without a kind is linear, `scale_linear` an older name of it, and a kind of none
    has no factor, whatever stands beside."""
    four = Rotary(base=1e4, kind="linear", factor=4.0, original=64)
    assert gguf_rotary(**{"scaling.type": "linear", "scaling.factor": 4.0}) == four
    assert gguf_rotary(**{"scaling.factor": 4.0}) == gguf_rotary(scale_linear=4.0) == four
    plain = Rotary(base=1e4, original=64)
    assert gguf_rotary() == gguf_rotary(**{"scaling.type": "none", "scaling.factor": 4.0}) == plain
    assert gguf_rotary(scale_linear=0.0) == plain
    yarn = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 16}
    assert gguf_rotary(**yarn).amplitude == pytest.approx(0.1 * np.log(4) + 1)
    assert gguf_rotary(**yarn, **{"scaling.attn_factor": 0.5}).amplitude == pytest.approx(0.05 * np.log(4) + 0.5)
    assert gguf_rotary(**{"scaling.attn_factor": 0.5}).amplitude == 0.5
    assert gguf_rotary(**yarn, **{"scaling.yarn_beta_fast": 8.0}).beta_fast == 8.0
    assert gguf_rotary(**yarn, **{"scaling.finetuned": True, "scaling.yarn_ext_factor": 1.0}) == gguf_rotary(**yarn)
    np.testing.assert_allclose(gguf_rotary((1.0, 8.0)).frequencies(4), [1.0, 0.01 / 8])


@pytest.mark.parametrize("fields", [{"rope.scale_linear": 4.0}, {"rope.scaling.factor": 4.0}], ids=str)
def test_older_words_for_linear_scaling(made, kernels, tmp_path, fields):
    own = made("llama", "linear")
    model = AutoModelForCausalLM.from_pretrained(own.folder)
    path = write_gguf(tmp_path / "a.gguf", model, SCALINGS["plain"], fields=fields)
    assert off(logits_of(load(path)), own.logits) < EXACT
    assert off(logits_of(load(path, kernels)), own.logits) < 1.5 * ROUNDED


def test_a_config_made_of_a_file_says_its_scaling(made):
    """Drafters trained for it start from its config."""
    said = load(made("llama", "linear").f32).config.rope_parameters
    assert (said["rope_type"], said["factor"]) == ("linear", 4.0)


# --- refusals ----------------------------------------------------------------------------------------------------

LINEAR, YARN = SCALINGS["linear"], SCALINGS["yarn"]


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        *(({"rope_type": kind, "factor": 2.0}, kind) for kind in ("dynamic", "longrope", "su", "Linear")),
        ({"type": "su", "factor": 2.0}, "su"),
        ({"rope_type": ["linear"]}, "rope_type"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "yarn", "factor": None}, "factor"),
        *(({**LINEAR, "factor": factor}, "factor") for factor in (0, 0.0, -2.0, float("nan"), float("inf"), "4", True)),
        ({**YARN, "beta_fast": 0.0}, "beta_fast"),
        ({**YARN, "attention_factor": "1"}, "attention_factor"),
        ({**YARN, "attention_factor": 0.0}, "attention_factor"),
        ({**YARN, "mscale": "a"}, "mscale"),
        ({**YARN, "mscale_all_dim": float("nan")}, "mscale_all_dim"),
        ({**YARN, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        ({**YARN, "original_max_position_embeddings": 16.5}, "original_max_position_embeddings"),
        ({**SCALINGS["llama3"], "low_freq_factor": None}, "low_freq_factor"),
        ({**SCALINGS["llama3"], "high_freq_factor": 1.0}, "high_freq_factor"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": "1e4"}, "rope_theta"),
    ],
    ids=str,
)
def test_a_scaling_that_cannot_be_is_refused_everywhere(made, tmp_path, kernels, scaling, said):
    with pytest.raises(RotaryError, match=said):
        rotary_of_config(scaling, 1e4, 64)
    config = json.loads((made("llama", "plain").folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": THETA, **scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in ({"dtype": "float32"}, {"kernels": kernels, "kind": Kind.EIGHT}):
        with pytest.raises(ModelLoadError, match=said):
            load_target(str(tmp_path), device="cpu", **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "relu"}, "relu"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types chunked_attention"),
        ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2"}, "gemma2; known: llama, qwen2, qwen3, gemma3, gemma4"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_know_is_named(change, said):
    with pytest.raises(UnsupportedError, match=said):
        geometry_of(config_of("llama", {"rope_type": "default"}).to_dict() | change, "config.json")


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("qwen2", {"layer_types": ["full_attention"] * 3}, "3 layer_types for 2 layers"),
        ("gemma3_text", {"layer_types": []}, "0 layer_types for 6 layers"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window None"),
        ("gemma3_text", {"sliding_window": -1}, "sliding_window -1"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8}, "sliding_window"),
        ("llama", {"rope_parameters": {"full_attention": LINEAR}}, "by layer type"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "not by layer type"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "su"}}}, "su"),
        ("llama", {"num_key_value_heads": 3}, "3 key heads"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_itself_is_refused(family, change, said):
    with pytest.raises(ModelLoadError, match=said):
        geometry_of(config_of(family, {"rope_type": "default"}).to_dict() | change, "config.json")


NAN = float("nan")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"context_length": None}, "llama.context_length is missing"),
        ({"context_length": 64.5}, "llama.context_length is 64.5"),
        ({"context_length": NAN}, "llama.context_length"),
        ({"block_count": 0}, "llama.block_count is 0"),
        ({"block_count": 1}, "tensors that no llama has: blk.1"),
        ({"attention.head_count": [4, 2]}, r"llama.attention.head_count is \[4, 2\]"),
        ({"attention.head_count_kv": 3}, "3 key heads"),
        ({"attention.value_length": 64}, "llama.attention.value_length 64"),
        ({"rope.dimension_count": 16}, "llama.rope.dimension_count 16"),
        ({"rope.freq_base": NAN}, "rope_theta|rope.freq_base"),
        ({"expert_count": 8}, "llama.expert_count"),
        ({"attn_logit_softcapping": 50.0}, "llama.attn_logit_softcapping"),
        *(({"rope.scaling.type": kind, "rope.scaling.factor": 4.0}, kind) for kind in ("longrope", "su", "dynamic")),
        ({"rope.scaling.type": "linear"}, "rope.scaling.*factor"),
        *(({"rope.scaling.type": "linear", "rope.scaling.factor": f}, "rope.scaling.*factor") for f in (0.0, NAN, "4")),
        ({"rope.scaling.alpha": 1000.0}, "rope.scaling.alpha"),
        ({"rope.scaling.yarn_ext_factor": 0.5}, "rope.scaling.yarn_ext_factor"),
        ({"rope.scaling.attn_factor": "1"}, "rope.scaling.attn_factor"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_heeded_is_refused_everywhere(made, tmp_path, kernels, fields, said):
    model = AutoModelForCausalLM.from_pretrained(made("llama", "plain").folder)
    path = write_gguf(tmp_path / "a.gguf", model, {"rope_type": "default"}, fields=fields)
    for options in ({"dtype": "float32"}, {"kernels": kernels}):
        with pytest.raises(ModelLoadError, match=said):
            load_target(str(path), device="cpu", **options)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"rope_freqs.weight": np.ones(8, np.float32)}, "rope_freqs.weight has 8 factors for heads of 32"),
        ({"rope_freqs.weight": np.zeros(16, np.float32)}, "rope_freqs.weight"),
        ({"rope_factors_long.weight": np.ones(16, np.float32)}, "rope_factors_long.weight"),
        ({"blk.0.attn_q.bias": np.ones(128, np.float32)}, "blk.0.attn_q.bias"),
        ({"blk.0.ffn_gate_exps.weight": np.ones((2, 96, 64), np.float32)}, "blk.0.ffn_gate_exps.weight"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_nobody_would_read_are_refused_everywhere(made, tmp_path, kernels, tensors, said):
    model = AutoModelForCausalLM.from_pretrained(made("llama", "plain").folder)
    path = write_gguf(tmp_path / "a.gguf", model, {"rope_type": "default"}, tensors=tensors)
    for options in ({"dtype": "float32"}, {"kernels": kernels}):
        with pytest.raises(ModelLoadError, match=said):
            load_target(str(path), device="cpu", **options)


def test_an_architecture_that_is_not_known(made, tmp_path, kernels):
    model = AutoModelForCausalLM.from_pretrained(made("llama", "plain").folder)
    path = write_gguf(tmp_path / "a.gguf", model, {"rope_type": "default"})
    path.write_bytes(path.read_bytes().replace(b"llama", b"phi33"))
    with pytest.raises(ModelLoadError, match=r"is a phi33; supported.*llama, qwen2, qwen3, gemma3"):
        load_target(str(path), kernels=kernels)


def test_a_type_that_only_torch_reads(made, tmp_path, kernels, caplog, monkeypatch):
    """Guards against a minute of the library's own reader, and against a slow model that nobody can explain."""
    model = AutoModelForCausalLM.from_pretrained(made("llama", "plain").folder)
    path = write_gguf(tmp_path / "a.gguf", model, {"rope_type": "default"})
    kind = gguf.GGMLQuantizationType.IQ4_NL
    name = "blk.0.ffn_down.weight"
    rows, inputs = model.model.layers[0].mlp.down_proj.weight.shape
    blocks = np.random.default_rng(1).integers(0, 256, (rows * inputs // 32, 18), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), dtype=np.uint8)
    blocks = blocks.reshape(rows, -1)
    changed(path, tmp_path / "b.gguf", {}, {name: blocks}, kind)
    monkeypatch.setattr(type(model), "from_pretrained", None)
    target = load_target(str(tmp_path / "b.gguf"), kernels=kernels).target
    assert not isinstance(target, NativeTarget)
    weight = target.model.model.layers[0].mlp.down_proj.weight
    np.testing.assert_allclose(weight.float().numpy(), gguf.dequantize(blocks, kind), rtol=2**-8)
    assert "runs on torch" in caplog.text
    assert f"do not know {name}, which is of type IQ4_NL" in caplog.text
