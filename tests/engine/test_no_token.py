"""Weights that are no numbers: a stream that comes upon them ends, with all that it wrote before; the others go on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dspark_kernels.cpu import Context, Kind, best_isa
from dspark_kernels.cpu.build import compiler
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.schedule import Fixed
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine import worker
from dspark_stream.engine.captured.runner import CapturedRounds
from dspark_stream.engine.eager import EagerRounds
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.rounds import Models, Rounds
from dspark_stream.load.controller import Controller
from dspark_stream.models.checkpoint import load_drafter, save_drafter
from dspark_stream.models.loading import load_target
from dspark_stream.types import FinishedEvent, TokensEvent
from tiny import FLAT, GAMMA, request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target

LENGTH = 20
WAYS = {
    "greedy": {},
    "edited": {"presence_penalty": 0.5, "min_tokens": 3},
    "coupled": {"temperature": 1.2, "verification": "coupled"},
    "drawn": {"temperature": 1.2},
    "cut": {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
}


def damage_drafter(drafter, part: str) -> None:
    for name, weight in drafter.named_parameters():
        if part in name:
            weight.data.fill_(torch.nan)
            return
    raise AssertionError(part)


@pytest.fixture(params=["torch", "captured", "kernels"])
def make(request, tmp_path):
    """Rounds on every runner: with one token whose embedding is NaN, with one whose score always is, with a part of the
    drafter that is."""
    runner = request.param
    if runner == "kernels" and compiler() is None:
        pytest.skip("no C++ compiler: apt-get install g++")

    def on_kernels(made, drafter, lookup) -> Rounds:
        made.model.save_pretrained(tmp_path / "model")
        save_drafter(drafter, tmp_path / "drafter", torch.float32)
        target = load_target(str(tmp_path / "model"), kernels=Context(2, best_isa()), kind=Kind.EIGHT).target
        own = load_drafter(tmp_path / "drafter", target)
        models = Models(
            target=target,
            target_kv=target.make_store(2048),
            drafter=own,
            drafter_kv=own.make_store(2048),
            calibration=Calibration(),
            history=AcceptanceHistory(own.gamma),
            capacity=FLAT,
            controller=Controller(own.gamma, FLAT),
        )
        models.controller.costs.learn = lambda *_: None
        return EagerRounds(models, Fixed(GAMMA), looks_up=lookup)

    def rounds(
        token: int | None = None, part: str | None = None, lookup: bool = True, scored: int | None = None
    ) -> Rounds:
        made = tiny_target(hidden_size=128, intermediate_size=160)
        for weight in made.model.parameters():
            weight.mul_(0.5 if weight.ndim > 1 else 1.0)
        drafter = tiny_drafter(made, draft_vocab=40, rank=32)
        if token is not None:
            made.embed_tokens.weight.data[token] = torch.nan
        if scored is not None:
            made.lm_head.weight.data[scored] = torch.nan
        if part is not None:
            damage_drafter(drafter, part)
        if runner == "kernels":
            return on_kernels(made, drafter, lookup)
        eager = tiny_rounds(made, drafter, schedule=Fixed(GAMMA), looks_up=lookup)
        if runner == "captured":
            return CapturedRounds(eager.models, eager.schedule, seats=12, longest=300, candidates=48)
        return eager

    return rounds


def asked(mode: str):
    return [
        request(f"{way}{i}", (5 + i, 6, 7 + i), mode=mode, max_tokens=LENGTH, ignore_eos=True, seed=i, **fields)
        for way, fields in WAYS.items()
        for i in range(2)
    ]


def run(rounds, requests):
    ids: dict[str, list[int]] = {r.request_id: [] for r in requests}
    ends: dict[str, FinishedEvent] = {}
    with LocalEngine(tiny_engine(rounds, max_num_seqs=12)) as local:
        for event, _ in local.run(requests, 12):
            if isinstance(event, TokensEvent):
                ids[event.request_id] += event.token_ids
            else:
                assert event.request_id not in ends
                ends[event.request_id] = event
    return ids, ends


@pytest.mark.parametrize("mode", ["plain", "dspark"])
def test_a_stream_ends_at_the_token_that_it_cannot_go_on_from(make, mode):
    """Guards against token 0 for a row of NaN, and against a stream that takes others with it. What was written stays,
    and whoever is done with that token has ended well."""
    healthy, _ = run(make(), asked(mode))
    seen = Counter(t for ids in healthy.values() for t in set(ids[:-1]))
    prompts = {t for r in asked(mode) for t in r.prompt_ids}
    token = min((t for t in seen if t not in prompts), key=lambda t: abs(seen[t] - len(healthy) // 2))
    assert 0 < seen[token] < len(healthy)
    ids, ends = run(make(token), asked(mode))
    failed = 0
    for name, own in ids.items():
        stops = token in own[:-1] or (own[-1:] == [token] and len(own) < LENGTH)
        if mode == "plain" or not name.startswith(("drawn", "cut")):  # what is drafted is drawn otherwise
            want = healthy[name]
            at = want.index(token) + 1 if token in want else LENGTH
            assert own == want[:at]
            stops = at < LENGTH
        if stops:
            failed += 1
            assert own.index(token) == len(own) - 1
            assert (ends[name].reason, ends[name].error.code) == ("failed", "no_token")
            assert f"after {len(own)} of its own" in ends[name].error.message
            assert ends[name].usage.output_tokens == len(own)
        else:
            assert (ends[name].reason, len(own)) == ("length", LENGTH)
    assert 0 < failed < len(ids)


def test_a_prompt_that_gives_no_token_ends_alone(make):
    """Guards against an answer made up from a prompt that the model cannot read."""
    sent = [request(f"{w}{p}", (5, p, 6), max_tokens=6, ignore_eos=True, **f) for w, f in WAYS.items() for p in (9, 13)]
    ids, ends = run(make(13), sent)
    assert {n: e.reason for n, e in ends.items()} == {n: "failed" if n.endswith("13") else "length" for n in ids}
    assert not any(own for name, own in ids.items() if name.endswith("13"))


def test_a_row_with_one_score_that_is_no_number_has_no_token(make):
    """Guards against an answer by one runner where another one says that the model is broken."""
    ids, ends = run(make(scored=41), asked("dspark"))
    assert not any(ids.values())
    assert {end.error.code for end in ends.values()} == {"no_token"}


@pytest.mark.parametrize("part", ["norm.weight", "confidence_head", "markov_w2"])
def test_a_drafter_that_is_damaged_costs_nobody_an_answer(make, part):
    """Guards against streams that fail, or tokens that come of drafts which are no numbers."""
    want, _ = run(make(), asked("plain"))
    rounds = make(part=part, lookup=False)
    ids, ends = run(rounds, asked("dspark"))
    assert {e.reason for e in ends.values()} == {"length"}
    for name, own in ids.items():
        if not name.startswith(("drawn", "cut")) or not isinstance(
            rounds, CapturedRounds
        ):  # nothing drafted, nothing drawn otherwise
            assert own == want[name], name


def test_an_engine_without_any_token_says_that_it_has_failed(monkeypatch):
    """Guards against a service that goes on and fails everybody, one by one."""
    monkeypatch.setattr(worker, "LOOK_AGAIN_S", 0.01)
    target = tiny_target()
    target.lm_head.weight.data.fill_(np.nan)
    engine = tiny_engine(tiny_rounds(target))
    ends = []
    engine.start(lambda events: ends.extend(e for e in events if isinstance(e, FinishedEvent)))
    engine.submit(request("a"))
    engine._thread.join(10)
    assert [e.error.code for e in ends] == ["no_token"]
    assert "request of its own" in engine.snapshot().failure
