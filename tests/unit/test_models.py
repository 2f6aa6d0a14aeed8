"""Caches, checkpoints, loading and quantisation, on tiny models."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4TextConfig, LlamaForCausalLM, Qwen3Config

from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.draft import draft
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.errors import ConfigError, ModelLoadError
from dspark_stream.models.cache import GRAIN, Extent, ExtentAllocator, slots_for_budget
from dspark_stream.models.checkpoint import load_drafter, read_config, save_drafter
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.loading import load_target, pick_dtype
from dspark_stream.models.protocols import Rows
from dspark_stream.models.tokenizer import TextCodec
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.models.torch.quant import quantise_linears
from tiny import tiny_drafter, tiny_rounds, tiny_target


@pytest.mark.parametrize("ring", [0, 64])
def test_extents_never_overlap_and_all_come_back(ring):
    """Guards against lost or doubly given slots: random allocate/free against a map of who owns what.

    With rings, too, which lie in a store of their own: as long as there is one, whoever had it, a stream gets it.
    """
    rng = random.Random(0)
    allocator = ExtentAllocator(1000, ring, 5 if ring else 0)
    assert allocator.total == 1000 - 1000 % GRAIN
    live = []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            allocator.free(live.pop(rng.randrange(len(live))))
        elif (extent := allocator.allocate(rng.randint(1, 200))) is not None:
            live.append(extent)
        taken = sorted(live)
        assert all(a.slot + a.size <= b.slot for a, b in itertools.pairwise(taken))
        rings = [e.context for e in live]
        assert not ring or (len(set(rings)) == len(rings) <= 5 and set(rings) <= {ring * seat for seat in range(5)})
        assert allocator.used == sum(e.size for e in live)
    for extent in live:
        allocator.free(extent)
    whole = allocator.allocate(allocator.total)
    assert whole[:2] == (0, allocator.total)
    assert allocator.allocate(1) is None
    if ring:
        small = ExtentAllocator(1000, ring, 1)
        first = small.allocate(100)
        assert small.allocate(100) is None  # slots enough, and no ring
        assert small.used == first.size
        small.free(first)
        assert small.allocate(100) == first


def test_a_budget_too_small_for_one_stream_names_what_is_needed():
    assert slots_for_budget(1000, 10, 50) == 100
    with pytest.raises(ConfigError, match="at least 1MiB"):
        slots_for_budget(1000, 10, 90)


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
@pytest.mark.parametrize("draft_vocab", [None, 20])
@pytest.mark.parametrize("options", [{}, {"enable_confidence_head": False}, {"confidence_head_with_markov": False}])
def test_checkpoints_read_back_what_was_written(head, draft_vocab, options, tmp_path):
    """Guards against a field or tensor that is written under one name and read under another: same drafts after."""
    target = tiny_target()
    if head == "none":
        options = {"confidence_head_with_markov": False} | options
    drafter = tiny_drafter(target, head=head, draft_vocab=draft_vocab, **options)
    save_drafter(drafter, tmp_path, torch.float32)
    again = load_drafter(tmp_path, target)
    assert again.config.markov_head_type == drafter.config.markov_head_type or head == "none"
    for a, b in zip(drafter.state_dict().items(), again.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1])
    extra = {"lm_head.weight", "embed_tokens.weight"} & load_file(tmp_path / "model.safetensors").keys()
    assert not extra  # the target's own are meant


class View:
    """One greedy stream at position 0."""

    adjustment = None

    def __init__(self, extent):
        from dspark_stream.types import SamplingParams

        self.extent, self.position, self.anchor = extent, 0, 5
        self.sampling, self.acceptance = SamplingParams(max_tokens=1, temperature=0.0), "greedy"


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantised_drafters_draft_and_leave_the_shared_head_alone(quant):
    """Trap: a packed LM head cannot be shared, and a drafter built under quantisation is silently wrong."""
    target = tiny_target(hidden_size=64, intermediate_size=96)
    drafter = tiny_drafter(target)
    models = tiny_rounds(target, drafter).models
    extent = tiny_extent()
    before = drafter.draft_hidden([(extent, 0, 5)], models.drafter_kv)
    count = quantise_linears(drafter, quant)
    assert count == (8 if quant == "int8" else 7)  # fc, q, k, v, o, gate, up, down; nf4 cannot pack 96 inputs
    assert type(target.lm_head) is torch.nn.Linear
    after = drafter.draft_hidden([(extent, 0, 5)], models.drafter_kv)
    error = float((after - before).norm() / before.norm())
    assert 0 < error < (0.1 if quant == "int8" else 0.6)
    block = draft(drafter, models.drafter_kv, [View(extent)], Calibration(), AcceptanceHistory(4))[0]
    assert len(block.tokens) == 4


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_quantised_targets_stay_close(quant):
    target = tiny_target(hidden_size=64, intermediate_size=128)
    models = tiny_rounds(target).models
    batch = [Rows(tiny_extent(), 0, [3, 4, 5])]
    before = target.forward(batch, models.target_kv).rows
    assert quantise_linears(target.decoder, quant) == 21
    after = target.forward(batch, models.target_kv).rows
    assert 0 < float((after - before).norm() / before.norm()) < (0.1 if quant == "int8" else 0.7)


def tiny_extent():

    return Extent(0, 64)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "no DSpark drafter"),
        ({"block_size": None}, "block_size"),
        ({"target_layer_ids": None}, "target_layer_ids"),
        ({"markov_head_type": "lstm"}, "lstm"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": "seven"}, "block_size"),
        ({"mask_token_id": 400}, "mask_token_id 400"),
        ({"target_layer_ids": 3}, "target_layer_ids"),
        ({"hidden_size": 64}, "hidden size 64"),
        ({"target_layer_ids": [0, 2]}, "layer 2"),
        ({"markov_rank": 9}, "wrong shape"),
        ({"enable_confidence_head": False}, "unknown: confidence_head.proj"),
        ({"num_hidden_layers": 2}, "missing: layers.1"),
        ({"model_type": "mamba"}, "mamba"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 2**63}, "head_dim"),
        ({"intermediate_size": 2**63}, "intermediate_size"),
        ({"intermediate_size": 10**6}, "wrong shape"),
        ({"num_attention_heads": 10**6}, "attention heads"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"markov_rank": 2**63}, "markov_rank"),
        ({"mask_token_id": 2**63}, "mask_token_id"),
        ({"block_size": 10**9}, "block_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"target_layer_ids": [1] * 1000}, "target_layer_ids"),
        ({"quantization_config": 5}, "config.json"),
        ({"dtype": float("nan")}, "config.json"),
    ],
)
def test_unfit_drafters_are_named(change, said, tmp_path):
    """Guards against a drafter that loads by half: accepted length 1.0 with no error."""
    target = tiny_target()
    save_drafter(tiny_drafter(target), tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    for key, value in change.items():
        raw.pop(key) if value is None else raw.update({key: value})
    path.write_text(json.dumps(raw))
    with pytest.raises(ModelLoadError, match=said):
        load_drafter(tmp_path, target)


def test_broken_drafter_files(tmp_path):
    target = tiny_target()
    with pytest.raises(ModelLoadError, match="no readable drafter config"):
        load_drafter(tmp_path, target)
    save_drafter(tiny_drafter(target), tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match="broken"):
        load_drafter(tmp_path, target)
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"no \*\.safetensors"):
        load_drafter(tmp_path, target)
    for text in ("{", "[" * 100_000, '{"a":' * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelLoadError, match="no readable drafter config"):
            read_config(tmp_path)


def test_released_checkpoints_carry_frozen_copies_that_are_not_loaded(tmp_path):
    """The aliased embedding and LM head may be in the file; the target's own are used."""
    target = tiny_target()
    save_drafter(tiny_drafter(target), tmp_path, torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {"embed_tokens.weight": torch.zeros(48, 32), "lm_head.weight": torch.zeros(48, 32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_drafter(tmp_path, target).base_logits(torch.ones(1, 32)).abs().sum() > 0


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_families_build_a_drafter_from_a_targets_config(softcap):
    """Backbones of every family: shapes of the context keys and values, soft cap on base logits."""
    gemma = Gemma4TextConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, num_global_key_value_heads=1, attention_k_eq_v=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"], sliding_window=8,
        num_kv_shared_layers=0, hidden_size_per_layer_input=0, final_logit_softcapping=softcap,
    )  # fmt: skip
    qwen = Qwen3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    for config, shape in ((gemma, (1, 16, 16)), (qwen, (2, 8, 8))):
        assert backbone_config(config, 2).layer_types == ["full_attention"] * 2
        target = family_target(config)
        drafter_config = DrafterConfig(
            backbone=backbone_config(config, 2), num_layers=2, block_size=3, mask_token_id=0,
            target_layer_ids=(0,), markov_rank=4,
        )  # fmt: skip
        target.set_taps((0,))
        drafter = Drafter(drafter_config, target).eval()
        assert drafter.kv_shapes == [shape, shape]
        logits = drafter.base_logits(torch.randn(2, 32) * 100)
        cap = getattr(config, "final_logit_softcapping", None)
        assert cap is None or float(logits.abs().max()) <= cap


def family_target(config):
    from transformers import AutoModelForCausalLM

    from dspark_stream.models.torch.layers import ATTENTION_NAME
    from dspark_stream.models.torch.target import Target

    torch.manual_seed(0)
    return Target(AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME))


def test_targets_that_cannot_be_served_are_named(tmp_path):
    for name, said in (("./nowhere", "no model folder"), (str(tmp_path / "x.gguf"), "no GGUF file")):
        with pytest.raises(ModelLoadError, match=said):
            load_target(name)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ModelLoadError, match="not a readable GGUF"):
        load_target(str(tmp_path / "bad.gguf"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ModelLoadError, match="gpt2; supported"):
        load_target(str(tmp_path))
    with pytest.raises(ModelLoadError, match="target_layer_ids"):
        tiny_target().set_taps((2,))


def test_a_folder_loads_in_its_own_precision(tmp_path):
    target = tiny_target()
    assert isinstance(target.model, LlamaForCausalLM)
    target.model.save_pretrained(tmp_path)
    loaded = load_target(str(tmp_path))
    assert loaded.codec is None
    assert loaded.target.dtype == torch.float32
    assert loaded.target.eos_token_ids == (1,)
    store = tiny_rounds(target).models.target_kv
    batch = [Rows(tiny_extent(), 0, [3, 4])]
    assert torch.equal(loaded.target.forward(batch, store).rows, target.forward(batch, store).rows)
    assert pick_dtype("float16", None, torch.device("cpu")) == torch.float16
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelLoadError, match="does not load"):
        load_target(str(tmp_path))


def test_chat_templates_are_sandboxed_and_their_refusals_typed():
    from tokenizers import Tokenizer, models

    from dspark_stream.errors import InvalidRequestError

    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("ab: user\nsit")}, merges=[]))
    refuse = "{% if messages|length > 1 %}{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
    codec = TextCodec(raw, refuse, {"bos_token": None, "eos_token": None})
    assert codec.decode(codec.encode_chat([("user", "ab")])).replace(" ", "") == "ab"
    with pytest.raises(InvalidRequestError, match="one turn only"):
        codec.encode_chat([("user", "a"), ("user", "b")])
    with pytest.raises(InvalidRequestError):
        TextCodec(raw, "{{ messages.__class__.__mro__ }}", {}).encode_chat([("user", "a")])


def test_rotary_frequencies_stay_in_float32(tmp_path):
    """Trap: cast with the weights, they ruin positions at long context; only acceptance would show it."""
    target = tiny_target()
    save_drafter(tiny_drafter(target), tmp_path)
    target.dtype = torch.bfloat16
    drafter = load_drafter(tmp_path, target)
    assert drafter.fc.weight.dtype == torch.bfloat16
    positions = torch.tensor([4096])
    cos, _ = drafter.rope(positions)
    inv_freq = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(cos[0, 0, :4].float(), torch.cos(4096 * inv_freq), atol=4e-3)


def test_draft_vocabularies_must_be_ascending_and_different(tmp_path):
    """Guards against a residual that counts a token twice, or not at all: biased text with no error."""
    target = tiny_target()
    save_drafter(tiny_drafter(target, draft_vocab=20), tmp_path, torch.float32)
    path = tmp_path / "model.safetensors"
    for change in (lambda t: t.index_fill(0, torch.tensor([5]), -1), lambda t: t + 48, lambda t: t.flip(0)):
        tensors = load_file(path)
        good = tensors["d2t"].clone()
        tensors["d2t"] = change(good)
        save_file(tensors, path)
        with pytest.raises(ModelLoadError, match="d2t"):
            load_drafter(tmp_path, target)
        tensors["d2t"] = good
        save_file(tensors, path)


def test_a_target_with_tensors_missing_is_refused(tmp_path):
    """Guards against a model that the library fills up with random numbers."""
    tiny_target().model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if "layers.1.mlp" in name)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=gone):
        load_target(str(tmp_path))
