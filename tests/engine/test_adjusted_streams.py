"""Streams with penalties, biases and least tokens: text that is plain decoding's, whoever runs the rounds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from dspark_kernels.cpu import Context, Kind, best_isa
from dspark_kernels.cpu.build import compiler
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.draft import acceptance_of, draft
from dspark_stream.decoding.schedule import Adaptive, Fixed
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.captured.runner import CapturedRounds
from dspark_stream.engine.eager import EagerRounds
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.rounds import Models
from dspark_stream.load.controller import Controller
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import load_drafter, save_drafter
from dspark_stream.models.loading import load_target
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.types import FinishedEvent, SamplingParams, TokensEvent
from tiny import FLAT, GAMMA, letters, request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target

ALL = {
    "frequency_penalty": 0.9,
    "presence_penalty": 0.5,
    "repetition_penalty": 1.3,
    "logit_bias": ((4, 2.5), (9, -100.0)),
    "min_tokens": 12,
}
EACH = [{name: value} for name, value in ALL.items()]
PROMPT = (5, 6, 7, 8, 5)


@pytest.fixture(scope="module")
def native_rounds(tmp_path_factory):
    """A tiny target and drafter on the CPU's kernels."""
    if compiler() is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    path = tmp_path_factory.mktemp("native")
    made = tiny_target(hidden_size=128, intermediate_size=160)
    for weight in made.model.parameters():  # or no penalty would outweigh a logit
        weight.mul_(0.5 if weight.ndim > 1 else 1.0)
    made.model.save_pretrained(path / "model")
    save_drafter(tiny_drafter(made, draft_vocab=40, rank=32), path / "drafter", torch.float32)
    context = Context(2, best_isa())

    def make(schedule) -> EagerRounds:
        target = load_target(str(path / "model"), kernels=context, kind=Kind.EIGHT).target
        assert isinstance(target, NativeTarget)
        drafter = load_drafter(path / "drafter", target)
        models = Models(
            target=target,
            target_kv=target.make_store(2048),
            drafter=drafter,
            drafter_kv=drafter.make_store(2048),
            calibration=Calibration(),
            history=AcceptanceHistory(drafter.gamma),
            capacity=FLAT,
            controller=Controller(drafter.gamma, FLAT),
        )
        models.controller.costs.learn = lambda *_: None
        return EagerRounds(models, schedule)

    return make


def on_torch(schedule) -> EagerRounds:
    target = tiny_target()
    return tiny_rounds(target, tiny_drafter(target, draft_vocab=40), schedule=schedule)


def captured(schedule) -> CapturedRounds:
    return CapturedRounds(on_torch(schedule).models, schedule, seats=8, longest=300, candidates=48)


@pytest.fixture(params=["torch", "captured", "kernels"])
def make(request):
    """Rounds on every runner, by schedule."""
    if request.param == "kernels":
        return request.getfixturevalue("native_rounds")
    return {"torch": on_torch, "captured": captured}[request.param]


def run(models, requests, streams=8):
    """Token ids and usage of every request."""
    ids = {r.request_id: [] for r in requests}
    usage = {}
    with LocalEngine(tiny_engine(models)) as local:
        for event, _ in local.run(requests, streams):
            if isinstance(event, TokensEvent):
                ids[event.request_id] += event.token_ids
            else:
                assert event.reason in ("stop", "length")
                usage[event.request_id] = event.usage
    return ids, usage


def asked(mode, **fields):
    """Streams of both exact kinds: all fields, each of them alone, none."""
    coupled = {"temperature": 1.2, "verification": "coupled"}
    ways = [*((some, {}) for some in (ALL, *EACH, {})), (ALL, coupled), (ALL | {"top_p": 0.9, "top_k": 9}, coupled)]
    return [
        request(str(i), PROMPT, max_tokens=18, mode=mode, **some, **way, **fields) for i, (some, way) in enumerate(ways)
    ]


def test_text_is_plain_decodings(make):
    """Plain and drafted, alone and among others that are adjusted otherwise or not at all: token for token."""
    plain, _ = run(make(Fixed(0)), asked("plain"), streams=1)
    assert len({tuple(text) for text in plain.values()}) >= 6  # fields matter here
    alone, usage = run(make(Fixed(GAMMA)), asked("dspark"), streams=1)
    assert alone == plain
    assert sum(u.accepted for u in usage.values()) > 0
    crowd = [*asked("dspark"), request("other", (9, 3), max_tokens=30, ignore_eos=True)]
    plain |= run(make(Fixed(0)), crowd[-1:])[0]
    assert run(make(Adaptive()), crowd)[0] == plain


def greedy_by_transformers(prompt, count, s, stops):
    """The library's own forward over the whole text for every token, adjusted by hand."""
    target = tiny_target()
    target.model.set_attn_implementation("eager")
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        with torch.inference_mode():
            scores = target.model(torch.tensor([ids])).logits[0, -1].tolist()
        answer = ids[len(prompt) :]
        for token, bias in s.logit_bias:
            scores[token] += bias
        for token in set(ids):
            scores[token] *= 1 / s.repetition_penalty if scores[token] > 0 else s.repetition_penalty
        for token in answer:
            scores[token] -= s.frequency_penalty
        for token in set(answer):
            scores[token] -= s.presence_penalty
        for token in stops if len(answer) < s.min_tokens else ():
            scores[token] = -torch.inf
        ids.append(max(range(len(scores)), key=scores.__getitem__))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("fields", [ALL, *EACH, ALL | {"min_tokens": 3, "repetition_penalty": 0.6}])
def test_greedy_is_the_librarys_text_adjusted_by_hand(fields):
    """Guards against an adjustment that is the same everywhere, and wrong everywhere."""
    sampling = SamplingParams(max_tokens=20, **fields)
    requests = [request("a", PROMPT, max_tokens=20, stop_token_ids=(11, 30), **fields)]
    ids, _ = run(on_torch(Fixed(GAMMA)), requests)
    assert ids["a"] == greedy_by_transformers(PROMPT, 20, sampling, {1, 11, 30})


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_nothing_stops_before_the_least_tokens(make, verification, ignore_eos):
    """Half of all tokens would stop the text, at once; the model's own do not come either where they are ignored."""
    stops = tuple(range(1, 41, 2))
    for seed in range(3):
        fields = {"stop_token_ids": stops, "min_tokens": 7, "max_tokens": 40, "ignore_eos": ignore_eos}
        asked = request("a", temperature=1.5, seed=seed, verification=verification, **fields)
        text = run(make(Fixed(GAMMA)), [asked])[0]["a"]
        assert len(text) > 7
        assert not set(text[:7]) & {1, *stops}
        assert text[-1] in stops or len(text) == 40


def test_stop_strings_wait_for_the_least_tokens():
    """A stop string counts where its last character comes after them, wherever it began."""

    def text_of(**fields):
        models = on_torch(Fixed(GAMMA))
        text = ""
        with LocalEngine(tiny_engine(models, text=letters())) as local:
            for event, _ in local.run([request("a", ignore_eos=True, max_tokens=40, **fields)]):
                if isinstance(event, FinishedEvent):
                    return text, event.reason
                text += event.text
        raise AssertionError

    whole, _ = text_of(min_tokens=20)
    for end in (5, 19, 20, 21, 22, 33):
        stop = whole[end - 3 : end]
        found = whole.find(stop, 18)  # its last character is the 21st at the earliest
        expected = (whole[:found], "stop") if found >= 0 else (whole, "length")
        assert text_of(min_tokens=20, stop=(stop, "never")) == expected


@dataclass
class View:
    """As much of a stream as drafting looks at."""

    anchor: int
    sampling: SamplingParams
    adjustment: Adjustment | None = None
    position = 3

    @property
    def acceptance(self):
        return acceptance_of(self.sampling, "rejection")

    @property
    def extent(self):
        return Extent(64 * self.anchor, 64)

    @property
    def round_key(self):
        return self.anchor


def views(adjusted):
    """Greedy and drawn, all but the first adjusted in ways of their own."""
    views = []
    for n, (anchor, temperature) in enumerate(((5, 0.0), (9, 1.0), (33, 0.7), (45, 0.0), (2, 1.5))):
        fields = ALL | {"min_tokens": n, "frequency_penalty": 2.0}
        views.append(View(anchor, SamplingParams(max_tokens=40, temperature=temperature, **fields)))
        if n and adjusted:
            adjustment = Adjustment(views[-1].sampling, (1, 2, 20, 21, 22), range(3, 3 + 9 * n), 48)
            adjustment.generated([30] * (n > 2))
            views[-1].adjustment = adjustment
    return views


def test_the_walk_in_one_call_is_the_walk_slot_by_slot(native_rounds, monkeypatch):
    """Edits within the kernel's walk are those of torch's, beside streams that have none."""
    drafter = native_rounds(Fixed(3)).models.drafter
    store = drafter.make_store(64 * 64)
    assert drafter._walk is not None

    def drafted(adjusted=True):
        blocks = draft(drafter, store, views(adjusted), Calibration(), AcceptanceHistory(drafter.gamma), 3)
        return [(b.tokens, list(b.indices), b.q and [b.q.probabilities(k).clone() for k in range(3)]) for b in blocks]

    without, one_call = drafted(adjusted=False), drafted()
    monkeypatch.setattr(drafter, "_walk", None)
    by_slot = drafted()
    for (tokens, indices, q), (tokens_too, indices_too, q_too) in zip(one_call, by_slot, strict=True):
        assert (tokens, indices) == (tokens_too, indices_too)
        for row, row_too in zip(q or (), q_too or (), strict=True):
            torch.testing.assert_close(row, row_too, atol=1e-6, rtol=1e-3)
    assert without[0][0] == one_call[0][0]
    assert sum(a[0] != b[0] for a, b in zip(without, one_call, strict=True)) >= 3
