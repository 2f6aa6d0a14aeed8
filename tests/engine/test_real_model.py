"""The shipped model and drafter, for real: speculation changes the speed, not the text."""

from __future__ import annotations

import json

import pytest
import torch

from dspark_stream.config import Config
from dspark_stream.console import SILENT
from dspark_stream.decoding.noise import token_exponentials
from dspark_stream.drafters import shipped_drafter
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import read_config
from dspark_stream.models.names import MODELS
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Rows
from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams, TokensEvent
from tiny import FLAT

QUESTIONS = (
    "A shop sells pens at 3 dollars each and pencils at 1 dollar each. What do 4 pens and 6 pencils cost?",
    "Write a Python function that reverses a list.",
    "Name three planets and say one thing about each.",
    "Write a short letter to a friend about a day at the sea. Use é, ü and 日本 once.",
)
TOKENS = {"auto": 16, "off": 10}
"""Torch takes four times as long for each; ten are more than a block, and several rounds."""
TIE = 0.25
"""Nats. Where two runs part, the two tokens' scores must be this close: bfloat16 logits around 16 are 0.06 to 0.12
apart, so a reduction in another order can turn round what lies within two such steps. A wrong position or a stale
cache row parts texts at margins of many nats."""


@pytest.fixture(scope="module", params=["auto", "off"], ids=["kernels", "torch"])
def engine(request):
    config = Config(
        model="smollm2-135m", max_num_seqs=8, kv_memory=256 << 20, max_model_len=512, cpu_kernels=request.param
    )
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "off":  # torch would take as long to be measured as for all that is asked of it here
            patch.setattr("dspark_stream.engine.build.load_or_measure", lambda *_, **__: FLAT)
        built, codec = build_engine(config, SILENT)
    assert codec is not None
    with LocalEngine(built) as local:
        yield built, codec, local, TOKENS[request.param]


def run(engine, mode, verification, temperature, streams, schedule="fixed:7"):
    """Ids and usage of every question, ``streams`` at once; adaptive may find that drafting does not pay."""
    built, codec, local, tokens = engine
    built.use_schedule(schedule)
    requests = [
        GenerationRequest(
            request_id=f"{i}",
            prompt_ids=tuple(codec.encode_chat([("user", q)])),
            sampling=SamplingParams(max_tokens=tokens, temperature=temperature, seed=i, ignore_eos=True),
            mode=mode,
            verification=verification,
        )
        for i, q in enumerate(QUESTIONS)
    ]
    ids = [[] for _ in QUESTIONS]
    text = ["" for _ in QUESTIONS]
    usage = [None for _ in QUESTIONS]
    for event, _ in local.run(requests, streams):
        i = int(event.request_id)
        if isinstance(event, TokensEvent):
            ids[i] += event.token_ids
            text[i] += event.text
        else:
            assert isinstance(event, FinishedEvent)
            assert event.reason == "length"
            usage[i] = event.usage
    for got, said in zip(ids, text, strict=True):
        assert said == codec.decode(got)
    return ids, usage


def margin(engine, i, prefix, a, b, temperature):
    """By how much the target prefers ``a`` to ``b`` (or the reverse) after ``prefix``, in nats of the race's score."""
    built, codec, *_ = engine
    target = built._models.target
    prompt = codec.encode_chat([("user", QUESTIONS[i])])
    ids = [*prompt, *prefix]
    store = target.make_store(len(ids))
    logits = target.forward([Rows(Extent(0, len(ids)), 0, ids)], store, [len(ids) - 1]).logits([0])[0].double()
    if temperature == 0:
        return abs(float(logits[a] - logits[b]))
    scores = torch.log_softmax(logits / temperature, -1) - token_exponentials(i, len(ids), len(logits)).log()
    return abs(float(scores[a] - scores[b]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_seed_gives_the_same_text_up_to_measured_ties(engine, temperature, record_property):
    """Plain, with speculation alone, and in company: the same ids, or parted at a tie, which is measured and named."""
    plain, _ = run(engine, "plain", "coupled", temperature, streams=1)
    ties = []
    ways = (("alone", 1, "fixed:7"), ("in company", 4, "fixed:7"), ("in company, adaptive", 4, "adaptive"))
    for how, streams, schedule in ways:
        ids, usage = run(engine, "dspark", "coupled", temperature, streams, schedule)
        assert sum(u.accepted for u in usage) > 0 or schedule == "adaptive"
        for i, (a, b) in enumerate(zip(plain, ids, strict=True)):
            at = next((t for t in range(len(a)) if a[t] != b[t]), None)
            if at is not None:
                gap = margin(engine, i, a[:at], a[at], b[at], temperature)
                ties.append(f"question {i} {how}: token {at} of {len(a)}, {gap:.3f} nats")
                assert gap <= TIE, ties[-1]
    record_property("ties", json.dumps(ties))
    print(f"temperature {temperature}: {len(ties)} of {3 * len(QUESTIONS)} runs part at a near-tie {ties}")
    # on our kernels no row knows its neighbours, so there is nothing to part at
    assert len(ties) <= (0 if isinstance(engine[0]._models.target, NativeTarget) else 3 * len(QUESTIONS) // 2)


def test_the_shipped_drafter_is_believed(engine):
    """Accepted length, the only figure that shows wrong positions, taps or features: well above none at all."""
    _, usage = run(engine, "dspark", "rejection", 0.0, streams=4)
    rounds, accepted = sum(u.rounds for u in usage), sum(u.accepted for u in usage)
    assert 1 + accepted / rounds > 1.35


def test_a_named_model_is_served_under_its_name(engine):
    info = engine[0].info
    assert (info.model, info.drafter) == ("smollm2-135m", "smollm2-135m-instruct")
    assert info.sampling == MODELS["smollm2-135m"].sampling


def test_the_shipped_drafter_is_small_and_says_what_it_is():
    folder = shipped_drafter("SmolLM2-135M-Instruct.Q4_1")
    assert folder is not None
    config = read_config(folder)
    assert config.family == "llama"
    assert sum(f.stat().st_size for f in folder.iterdir()) < 40_000_000
    assert (folder / "card.md").exists()
