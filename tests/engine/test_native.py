"""Targets and drafters on the CPU's integer kernels: the same model as torch runs, and the same text in any company."""

from __future__ import annotations

import json
from dataclasses import replace

import gguf
import msgspec
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dspark_kernels.cpu import Context, Kind, Source, best_isa
from dspark_kernels.cpu import build as building
from dspark_stream.config import Config
from dspark_stream.console import SILENT
from dspark_stream.decoding.accept import accept
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.draft import acceptance_of, draft
from dspark_stream.decoding.noise import NoiseCache
from dspark_stream.decoding.schedule import Adaptive, Fixed
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.build import build_engine, open_kernels
from dspark_stream.engine.eager import EagerRounds
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.rounds import Models
from dspark_stream.errors import ConfigError, ModelLoadError
from dspark_stream.load.controller import Controller
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import load_drafter, quantise_checkpoint, save_drafter
from dspark_stream.models.loading import load_target
from dspark_stream.models.native.drafter import NativeDrafter
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Rows
from dspark_stream.models.torch.distributions import Dense
from dspark_stream.models.torch.target import TargetOutput
from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams, TokensEvent
from ggufs import split
from shared_data import shared
from tiny import FLAT, GAMMA, request, tiny_drafter, tiny_engine

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler: apt-get install g++")

VOCAB, HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 64, 128, 4, 2, 160, 3
KIND = gguf.GGMLQuantizationType


def write_model(path, kind=KIND.Q4_1, *, tied=False, change=lambda name, data: data, arch="llama", size=None):
    """A tiny Llama in GGUF, its query and key rows in the order in which such files have them."""
    rng = np.random.default_rng(3)
    size = size or (128 if arch == "qwen3" else HIDDEN // HEADS)  # the library knows no other for Qwen3
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["t", "1", "t1", *(f"x{i}" for i in range(VOCAB - 3))])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(1)

    def add(name, *shape, matrix=True):
        scale = 2.5 * shape[-1] ** -0.5
        data = change(name, (rng.standard_normal(shape) * scale if matrix else np.ones(shape)).astype(np.float32))
        if matrix:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", VOCAB, HIDDEN)
    if not tied:
        add("output.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN, matrix=False)
    queries, kv = size * HEADS, size * KV_HEADS
    for i in range(LAYERS):
        for name, shape in {"attn_q": (queries, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN),
                            "attn_output": (HIDDEN, queries), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
                            "ffn_down": (HIDDEN, INNER)}.items():  # fmt: skip
            add(f"blk.{i}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", HIDDEN, matrix=False)
        for name in ("attn_q_norm", "attn_k_norm") if arch == "qwen3" else ():
            add(f"blk.{i}.{name}.weight", size, matrix=False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def context():
    return Context(2, best_isa())


def logits_and_taps(target, ids):
    target.set_taps((0, 1))
    out = target.forward([Rows(Extent(0, 64), 0, ids)], target.make_store(64))
    return out.logits(range(len(ids))).clone(), out.taps.clone()


@pytest.mark.parametrize(
    "kind", [KIND.Q4_0, KIND.Q4_1, KIND.Q5_0, KIND.Q5_1, KIND.Q8_0, KIND.F16, KIND.BF16], ids=lambda kind: kind.name
)
@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("qwen3", False)])
def test_it_is_the_model_that_torch_loads(tmp_path, context, kind, arch, tied):
    path = write_model(tmp_path / "model.gguf", kind, tied=tied, arch=arch)
    native = load_target(str(path), kernels=context)
    assert isinstance(native.target, NativeTarget)
    plain = load_target(str(path), dtype="float32", device="cpu")
    assert native.target.eos_token_ids == plain.target.eos_token_ids == (1,)
    assert (native.name, native.fingerprint) == (plain.name, plain.fingerprint)
    ids = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 40)]
    (own, own_taps), (want, want_taps) = logits_and_taps(native.target, ids), logits_and_taps(plain.target, ids)
    assert torch.nn.functional.cosine_similarity(own, want).mean() > 0.99
    assert torch.nn.functional.cosine_similarity(own_taps, want_taps).mean() > 0.99
    rows = torch.from_numpy(native.target.head.rows([3, 5]))
    assert torch.allclose(
        rows, plain.target.head_rows(torch.tensor([3, 5])), atol=1e-2 if kind in (KIND.F16, KIND.BF16) else 1e-6
    )


@pytest.mark.parametrize("runner", ["kernels", "torch"])
def test_taps_outlive_the_next_pass(tmp_path, context, runner):
    """Guards against features of another round: texts would stay right, drafts would not. They are kept, not copied."""
    path = str(write_model(tmp_path / "model.gguf"))
    target = (load_target(path, kernels=context) if runner == "kernels" else load_target(path, device="cpu")).target
    assert isinstance(target, NativeTarget) == (runner == "kernels")
    target.set_taps((0, 1))
    store = target.make_store(64)
    first = target.forward([Rows(Extent(0, 64), 0, [3, 4, 5, 6])], store)
    seen = first.taps.clone()
    target.forward([Rows(Extent(0, 64), 4, [7, 8, 9])], store)
    assert torch.equal(first.taps, seen)


@pytest.mark.parametrize(("kind", "least"), [(Kind.EIGHT, 0.999), (Kind.FIVE_M, 0.98), (Kind.FOUR_M, 0.9)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_checkpoint_folder_is_quantised_on_load(tmp_path, context, kind, least, family):
    save_tiny(tmp_path, family)
    native = load_target(str(tmp_path), kernels=context, kind=kind).target
    plain = load_target(str(tmp_path), dtype="float32", device="cpu").target
    assert native.eos_token_ids == plain.eos_token_ids
    ids = [int(i) for i in np.random.default_rng(1).integers(0, VOCAB, 40)]
    (own, own_taps), (want, want_taps) = logits_and_taps(native, ids), logits_and_taps(plain, ids)
    assert torch.nn.functional.cosine_similarity(own, want).mean() > least
    assert torch.nn.functional.cosine_similarity(own_taps, want_taps).mean() > least


def save_tiny(folder, family):
    options = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "intermediate_size": INNER,
               "num_key_value_heads": KV_HEADS, "num_hidden_layers": LAYERS, "head_dim": 32, "eos_token_id": [1, 2],
               "max_position_embeddings": 256, "tie_word_embeddings": family == "llama"}  # fmt: skip
    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**options)) if family == "llama" else Qwen3ForCausalLM(Qwen3Config(**options))
    for parameter in model.parameters():
        parameter.data.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.09)
    model.save_pretrained(folder)


def test_quantised_weights_are_for_folders_that_the_kernels_can_run(tmp_path, context):
    with pytest.raises(ModelLoadError, match="quantised already"):
        load_target(str(write_model(tmp_path / "model.gguf")), kernels=context, kind=Kind.EIGHT)
    save_tiny(tmp_path / "model", "llama")
    with pytest.raises(ModelLoadError, match="not in use"):
        build_engine(
            Config(model=str(tmp_path / "model"), target_quant="w8a8", cpu_kernels="off", drafter="none"), SILENT
        )
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "gemma4_text"}))
    with pytest.raises(ModelLoadError, match="gemma4_text"):
        load_target(str(tmp_path / "model"), kernels=context, kind=Kind.EIGHT)
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"intermediate_size": INNER + 32}))
    with pytest.raises(ModelLoadError, match=r"gate_proj.*expected"):
        load_target(str(tmp_path / "model"), kernels=context, kind=Kind.EIGHT)


@pytest.mark.parametrize("quant", ["int8", "nf4"])
def test_bitsandbytes_drafts_run_on_torch(quant):
    """The kernels would not have heeded the setting."""
    assert open_kernels(Config(draft_quant=quant), SILENT) is None


def test_a_draft_of_fewer_bits(tmp_path, context):
    target = load_target(str(write_model(tmp_path / "model.gguf")), kernels=context).target
    save_drafter(tiny_drafter(load_target(str(tmp_path / "model.gguf"), dtype="float32").target), tmp_path / "drafter")
    taps, hidden = torch.randn(9, 2 * HIDDEN, generator=torch.Generator().manual_seed(1)), []
    for kind in (Kind.EIGHT, Kind.FOUR_M):
        drafter = load_drafter(tmp_path / "drafter", target, kind)
        kv = drafter.make_store(64)
        drafter.append_context(taps, list(range(9)), list(range(9)), kv)
        hidden.append(drafter.draft_hidden([(Extent(0, 48), 9, 3)], kv, drafter.gamma).clone())
    similar = torch.nn.functional.cosine_similarity(*hidden, dim=-1)
    assert 0.9 < similar.min() < 0.9999


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("slots", [4, 2])
def test_a_drafter_drafts_the_same(tmp_path, context, slots, window):
    path = write_model(tmp_path / "model.gguf", KIND.Q8_0)
    plain = load_target(str(path), dtype="float32", device="cpu").target
    native = load_target(str(path), kernels=context).target
    save_drafter(tiny_drafter(plain, draft_vocab=40, context_window=window), tmp_path / "drafter", torch.float32)
    ids = [int(i) for i in np.random.default_rng(2).integers(0, VOCAB, 21)]
    hidden, walked = [], []
    for target in (plain, native):
        drafter = load_drafter(tmp_path / "drafter", target, Kind.EIGHT)
        assert isinstance(drafter, NativeDrafter) == (target is native)
        store, kv = target.make_store(64), drafter.make_store(64)
        assert (drafter.ring > 0) == (target is native and window > 0)
        extent = Extent(16, 48, 0)
        taps = target.forward([Rows(extent, 0, ids)], store).taps.clone()
        taps[: 20 - window if window else 0] = 1e3  # not looked at
        drafter.append_context(taps[:20], list(range(20)), extent.context_slots(range(20), drafter.ring), kv)
        hidden.append(drafter.draft_hidden([(extent, 20, ids[20])], kv, slots).clone())
        walked.append(drafter.base_logits(hidden[-1]).clone())
    assert torch.nn.functional.cosine_similarity(hidden[0], hidden[1], dim=-1).min() > 0.99
    assert torch.nn.functional.cosine_similarity(walked[0], walked[1], dim=-1).min() > 0.99


@pytest.mark.parametrize(
    ("head", "rank", "w1_of_drafts"),
    [("vanilla", 32, False), ("vanilla", 32, True), ("none", 0, False), ("vanilla", 8, False), ("gated", 32, True)],
)
@pytest.mark.parametrize("slots", [1, 3])
def test_the_walk_in_one_call_is_the_walk_slot_by_slot(tmp_path, context, monkeypatch, head, rank, w1_of_drafts, slots):
    path = write_model(tmp_path / "model.gguf", KIND.Q8_0)
    torch_target = load_target(str(path), dtype="float32", device="cpu").target
    made = tiny_drafter(torch_target, draft_vocab=40, head=head, rank=rank, w1_of_drafts=w1_of_drafts)
    save_drafter(made, tmp_path / "drafter", torch.float32)
    drafter = load_drafter(tmp_path / "drafter", load_target(str(path), kernels=context).target)
    streams = [View(anchor, t) for anchor, t in ((5, 0.0), (9, 1.0), (33, 0.7), (60, 0.0), (2, 1.5))]
    streams += [
        View(anchor, 0.8, way="coupled", **cuts) for anchor, cuts in ((11, {}), (12, {"top_p": 0.8, "top_k": 9}))
    ]
    store = drafter.make_store(64 * 64)
    one_call = draft(drafter, store, streams, Calibration(), AcceptanceHistory(drafter.gamma), slots)
    native_q = [[b.q.probabilities(k).clone() for k in range(slots)] if b.q else None for b in one_call]
    assert (drafter._walk is not None) == (head != "gated" and rank != 8)
    monkeypatch.setattr(drafter, "_walk", None)
    by_slot = draft(drafter, store, streams, Calibration(), AcceptanceHistory(drafter.gamma), slots)
    assert [b.tokens for b in one_call] == [b.tokens for b in by_slot]
    for fast, slow, q in zip(one_call, by_slot, native_q, strict=True):
        assert fast.confidence == pytest.approx(slow.confidence, abs=2e-3)
        assert list(fast.indices) == list(slow.indices)
        for k, row in enumerate(q or ()):
            torch.testing.assert_close(row, slow.q.probabilities(k), atol=1e-6, rtol=1e-3)


def test_a_quantised_checkpoint_is_run_as_it_is(tmp_path, context):
    """Its blocks are the kernels' weights, exactly; torch dequantises them."""
    path = write_model(tmp_path / "model.gguf", KIND.Q8_0)
    plain = load_target(str(path), dtype="float32", device="cpu").target
    native = load_target(str(path), kernels=context).target
    save_drafter(tiny_drafter(plain, draft_vocab=40, rank=32), tmp_path / "whole", torch.float32)
    kept = "layers.0.mlp.up_proj.weight"
    quantise_checkpoint(tmp_path / "whole", tmp_path / "small", Source.Q4_0, Source.Q8_0, keep=(kept,))
    written = json.loads((tmp_path / "small" / "config.json").read_text())["weight_blocks"]
    assert written["fc.weight"] == written["markov_head.markov_w2.weight"] == "Q8_0"
    assert written["layers.0.self_attn.q_proj.weight"] == "Q4_0"
    assert kept not in written
    whole, small = (load_drafter(tmp_path / name, plain) for name in ("whole", "small"))
    packed = load_drafter(tmp_path / "small", native)
    assert np.array_equal(packed._fc.rows(range(HIDDEN)), small.fc.weight.numpy())
    taps, drafters = torch.randn(9, 2 * HIDDEN, generator=torch.Generator().manual_seed(1)), (whole, small, packed)
    hidden = []
    for drafter in drafters:
        kv = drafter.make_store(64)
        drafter.append_context(taps, list(range(9)), list(range(9)), kv)
        hidden.append(drafter.draft_hidden([(Extent(0, 48), 9, 3)], kv, 4).clone())
    to_whole, to_packed = (torch.nn.functional.cosine_similarity(hidden[1], h, dim=-1).min() for h in hidden[::2])
    assert 0.9 < to_whole < to_packed
    assert to_packed > 0.99


def test_acceptance_by_the_kernels_is_acceptance_by_torch(tmp_path, context):
    """Rounds of all kinds of streams, the same uniforms: accepted drafts and bonus tokens are the same."""
    path = write_model(tmp_path / "model.gguf", KIND.Q8_0)
    torch_target = load_target(str(path), dtype="float32", device="cpu").target
    save_drafter(tiny_drafter(torch_target, draft_vocab=40, head="vanilla", rank=32), tmp_path / "d", torch.float32)
    target = load_target(str(path), kernels=context).target
    drafter = load_drafter(tmp_path / "d", target)
    store, kv = target.make_store(64), drafter.make_store(64 * 16)
    seen = set()
    for position in range(40):
        streams = [View(9, 1.0, position), View(7, 0.0, position), View(5, 1.3, position), View(3, 1.0, position)]
        streams += [View(4, 1.2, position, way="coupled"), View(2, 0.7, position, way="coupled", top_p=0.8, top_k=20)]
        blocks = draft(drafter, kv, streams, Calibration(), AcceptanceHistory(drafter.gamma), 3)
        by_torch_too = [
            replace(b, q=Dense(torch.stack([b.q.probabilities(k) for k in range(3)]))) if b.q else b for b in blocks
        ]
        lengths = [3, 2, 1, 0, 3, 2]
        batch = [Rows(Extent(0, 64), 3, [b.tokens[0]] * (1 + n)) for b, n in zip(blocks, lengths, strict=True)]
        output = target.forward(batch, store)
        plain = TargetOutput(output.rows.clone(), output.taps)
        by_torch = accept(plain, streams, by_torch_too, lengths, drafter.draft_ids)
        assert accept(output, streams, blocks, lengths, drafter.draft_ids) == by_torch
        seen |= {(r, outcome.accepted) for r, outcome in enumerate(by_torch)}
    assert {(0, 0), (0, 1), (2, 0), (2, 1), (4, 0), (4, 1), (5, 0)} <= seen  # both ways of ending a round


class View:
    """As much of a stream as drafting and acceptance look at."""

    adjustment = None

    def __init__(self, anchor, temperature=0.0, position=3, way="rejection", **cuts):
        self.anchor, self.position, self.round_key = anchor, position, anchor
        self.extent = Extent(64 * anchor, 64)  # everybody has slots of their own
        self.sampling = SamplingParams(max_tokens=1, temperature=temperature, **cuts)
        self.acceptance = acceptance_of(self.sampling, way)
        self.noise = NoiseCache(2**63 - anchor, VOCAB)


def engine_on(threads, folder, schedule):
    """A tiny target and its drafter, both on the kernels, with so many threads."""
    target = load_target(str(folder / "model.gguf"), kernels=Context(threads, best_isa())).target
    drafter = load_drafter(folder / "drafter", target)
    models = Models(
        target=target,
        target_kv=target.make_store(4096),
        drafter=drafter,
        drafter_kv=drafter.make_store(4096),
        calibration=Calibration(),
        history=AcceptanceHistory(drafter.gamma),
        capacity=FLAT,
        controller=Controller(drafter.gamma, FLAT),
    )
    models.controller.costs.learn = lambda *_: None  # the machine of an invented curve does not change
    return tiny_engine(EagerRounds(models, schedule), slots=4096, max_num_seqs=16)


def test_a_seed_gives_the_same_text_however_it_is_computed(tmp_path, monkeypatch):
    """Plain, drafted, alone, among 16 of all ways, on one thread and on more: a coupled text is the target's and the
    seed's alone. And nobody takes it to torch: none of its noise is made there.
    """
    write_model(tmp_path / "model.gguf", KIND.Q8_0)
    torch_target = load_target(str(tmp_path / "model.gguf"), dtype="float32", device="cpu").target
    save_drafter(tiny_drafter(torch_target, draft_vocab=40, rank=32), tmp_path / "drafter", torch.float32)
    monkeypatch.setattr(NoiseCache, "at", lambda *_: pytest.fail("noise drawn by torch"))
    ways = [{"temperature": 0.7, "top_p": 0.8, "top_k": 20}, {"temperature": 1.0}, {"temperature": 1.3, "min_p": 0.02}]
    asked = [
        request(f"{seed}", (5, 6, 40 + seed) * (1 + 7 * seed), verification="coupled", seed=seed, ignore_eos=True,
                max_tokens=24, **ways[seed % 3])
        for seed in range(6)
    ]  # fmt: skip

    def texts(engine, requests, streams):
        found = {r.request_id: [] for r in requests}
        accepted = 0
        with LocalEngine(engine) as local:
            for event, _ in local.run(requests, streams):
                if isinstance(event, TokensEvent):
                    found[event.request_id] += event.token_ids
                else:
                    accepted += event.usage.accepted
        return {name: ids for name, ids in found.items() if name.isdigit()}, accepted

    plainly = [msgspec.structs.replace(one, mode="plain") for one in asked]
    plain, _ = texts(engine_on(2, tmp_path, Fixed(GAMMA)), plainly, 1)
    assert len({tuple(ids) for ids in plain.values()}) == len(plain)
    drafted, accepted = texts(engine_on(2, tmp_path, Fixed(GAMMA)), asked, 1)
    assert drafted == plain
    assert accepted > 10  # of a drafter that learnt nothing
    company = [request(f"x{i}", (9, 9 + i), temperature=0.9 * (i % 2), seed=i, max_tokens=20 + i) for i in range(10)]
    for threads, schedule in ((1, Adaptive()), (3, Fixed(GAMMA))):
        among, _ = texts(engine_on(threads, tmp_path, schedule), company[:5] + asked + company[5:], 16)
        assert among == plain


@pytest.mark.parametrize("way", ["truncated", "missing tensor", "wrong shape"])
def test_a_broken_file_is_said(tmp_path, context, way):
    path = tmp_path / "model.gguf"
    if way == "wrong shape":
        write_model(path, change=lambda name, data: data[:-1] if name == "blk.1.ffn_up.weight" else data)
    else:
        write_model(path)
    if way == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if way == "missing tensor":
        path.write_bytes(path.read_bytes().replace(b"blk.2.ffn_down.weight", b"blk.2.ffn_dawn.weight"))
    with pytest.raises(ModelLoadError, match=r"model\.gguf"):
        load_target(str(path), kernels=context)


def test_what_the_kernels_do_not_know_runs_on_torch(tmp_path, context, caplog):
    path = write_model(tmp_path / "model.gguf", size=48)
    loaded = load_target(str(path), kernels=context)
    assert not isinstance(loaded.target, NativeTarget)
    assert "runs on torch" in caplog.text
    assert "heads of 48" in caplog.text


def test_a_split_model_is_the_whole_one(tmp_path, context, caplog):
    path = write_model(tmp_path / "model.gguf")
    whole, ids = load_target(str(path), kernels=context), [3, 1, 4, 1, 5]
    shards = split(path, 3)
    for shard in shards:
        loaded = load_target(str(shard), kernels=context)
        assert isinstance(loaded.target, NativeTarget)
        assert loaded.name == "model"
        assert torch.equal(logits_and_taps(loaded.target, ids)[0], logits_and_taps(whole.target, ids)[0])
    with pytest.raises(ModelLoadError, match="--merge"):
        load_target(str(shards[0]), device="cpu")
    half = split(write_model(tmp_path / "half.gguf", size=48), 2)
    with pytest.raises(ModelLoadError, match=r"CPU kernels do not know .*--merge"):
        load_target(str(half[0]), kernels=context)
    assert not caplog.records  # nothing promised that is then refused


def test_kernels_that_the_machine_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr("dspark_stream.engine.build.supported_isas", lambda: ["portable"])
    with pytest.raises(ConfigError, match="avx512"):
        build_engine(Config(model="smollm2-135m", cpu_kernels="avx512"), SILENT)


# --- the shipped model ---------------------------------------------------------------------------------------


def run(local, prompts, mode, streams, tokens):
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_ids=ids,
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0),
            mode=mode,
        )
        for i, ids in enumerate(prompts)
    ]
    texts = [[] for _ in prompts]
    for event, _ in local.run(requests, streams):
        if isinstance(event, TokensEvent):
            texts[int(event.request_id)] += event.token_ids
        else:
            assert isinstance(event, FinishedEvent)
            assert event.reason in ("stop", "length")
    return texts


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("one_in", "tokens"), [(12, 12), pytest.param(1, 24, marks=pytest.mark.slow)])
def test_greedy_text_is_the_same_alone_in_company_plain_and_speculated(one_in, tokens):
    """Token for token, on evaluation prompts of every kind: no row knows which others are in its batch."""
    engine, codec = build_engine(
        Config(model="smollm2-135m", max_num_seqs=16, kv_memory=256 << 20, max_model_len=1024), SILENT
    )
    assert isinstance(engine._models.target, NativeTarget)
    prompts = [
        tuple(codec.encode_chat([(m.role, m.content) for m in p.messages]))
        for path in sorted(shared("data/eval").glob("*.jsonl"))
        for p in read_prompts(path)
    ]
    prompts = [p for p in prompts if len(p) < 900][::one_in]
    with LocalEngine(engine) as local:
        alone = run(local, prompts, "plain", 1, tokens)
        assert run(local, prompts, "plain", 16, tokens) == alone
        assert run(local, prompts[::4], "dspark", 1, tokens) == alone[::4]
        assert run(local, prompts[2::4], "dspark", 16, tokens) == alone[2::4]
        engine.use_schedule("fixed:7")  # the adaptive one may draft for nobody
        assert run(local, prompts, "dspark", 16, tokens) == alone
        assert run(local, prompts[1::4], "dspark", 3, tokens) == alone[1::4]
    assert len(prompts) * one_in > 150
