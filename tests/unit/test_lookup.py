"""Drafts that are looked up: what is found, what it is worth, and that it changes no token's law."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dspark_kernels.cpu import Context, best_isa
from dspark_kernels.cpu.build import compiler
from dspark_stream.decoding.accept import certain
from dspark_stream.decoding.lookup import COMPARED, LEAST, LONGEST, Lookup
from dspark_stream.decoding.repeats import HOPE, Repeats, confidence
from dspark_stream.decoding.schedule import Adaptive, Fixed
from dspark_stream.engine.local import LocalEngine
from dspark_stream.models.native.distributions import NativeDistributions
from dspark_stream.models.torch.distributions import Dense
from dspark_stream.types import SamplingParams, TokensEvent
from tiny import request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target


def lookup_of(*tokens: int) -> Lookup:
    lookup = Lookup()
    lookup.extend(tokens)
    return lookup


# --- what is found ---------------------------------------------------------------------------------------------


def test_what_followed_the_longest_suffix_is_found():
    found = lookup_of(9, 1, 2, 3, 50, 8, 7, 1, 2, 3, 60, 61, 7, 1, 2, 3).find(LONGEST)
    assert (found.tokens, found.matched) == ([60, 61, 7, 1, 2, 3], 4)


def test_of_equally_long_suffixes_the_latest_counts():
    assert lookup_of(1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3).find(2).tokens == [5, 8]


def test_nothing_is_found_where_nothing_repeats():
    assert lookup_of(*range(50)).find(LONGEST) is None
    assert lookup_of(*[1, 2] * 2, 7, 1, 2).find(LONGEST) is None, f"{LEAST} tokens have to be the same"
    assert lookup_of().find(LONGEST) is None


def test_no_more_is_proposed_than_is_wanted_or_stands_there():
    text = list(range(40))
    assert len(lookup_of(*text, *text[:4]).find(LONGEST).tokens) == LONGEST
    assert len(lookup_of(*text, *text[:4]).find(2).tokens) == 2
    assert lookup_of(*text, *text[:-1]).find(LONGEST).tokens == [39, *range(LONGEST - 1)]
    assert lookup_of(5, 5, 5, 5).find(LONGEST).tokens == [5]


def test_a_long_match_is_not_compared_without_end():
    text = list(range(COMPARED + 10))
    assert lookup_of(*text, 99, *text).find(1).matched == COMPARED


def test_it_does_not_matter_how_tokens_came():
    text = [1, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3]
    at_once, one_by_one = lookup_of(*text), Lookup()
    for token in text:
        one_by_one.extend([token])
    assert at_once.find(LONGEST) == one_by_one.find(LONGEST)


# --- what it is worth --------------------------------------------------------------------------------------------


def test_promises_are_what_came_of_such_matches_by_their_length():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3]
    short, own, pool = lookup_of(*text).find(4), Repeats(), Repeats()
    assert confidence(own, pool, short) == [HOPE] * 4
    for _ in range(50):  # three tokens are the same: never right; longer ones: never seen
        for repeats in (own, pool):
            repeats.learn(short, [99])
    sure = confidence(own, pool, short)
    assert sure[0] < 0.1
    assert sure[1:] == [HOPE] * 3
    for _ in range(50):
        for repeats in (own, pool):
            repeats.learn(short, [4, 5, 6, 99])
    sure = confidence(own, pool, short)
    assert sure[0] > 0.6
    assert sure[1] == sure[2] > 0.6


def test_a_new_stream_is_judged_as_others_were():
    found, pool = lookup_of(1, 2, 3, 4, 1, 2, 3).find(1), Repeats()
    for _ in range(60):
        pool.learn(found, [4])
    assert confidence(Repeats(), pool, found)[0] > 0.8


# --- that it changes no token's law -------------------------------------------------------------------------------


class Scripted:
    def __init__(self, accept: list[float], bonus: float) -> None:
        self.accept, self.bonus = accept, bonus


def distributions(kernels, p: torch.Tensor):
    sampling = [SamplingParams(max_tokens=9, temperature=1.0)] * len(p)
    if kernels is None:
        return Dense(p.clone())
    return NativeDistributions.of(kernels, p.log().contiguous(), sampling)


@pytest.fixture(params=["torch", "kernels"])
def kernels(request):
    if request.param == "torch":
        return None
    if compiler() is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    return Context(1, best_isa())  # rows this short are done before a second thread has woken


CELLS = 400


@pytest.mark.parametrize("tokens", list(product(range(3), repeat=2)))
def test_what_is_known_beforehand_is_judged_by_the_targets_law(tokens, kernels):
    """By enumeration over the cells of all uniforms: x_1, x_2 and x_3 come as the target would draw them."""
    vocab = 3
    p = torch.softmax(torch.randn(3, vocab, generator=torch.Generator().manual_seed(4)) * 1.5, -1)
    own, law = distributions(kernels, p), dict.fromkeys(product(range(vocab), repeat=2), 0.0)
    third = [0.0] * vocab
    for stands in product([True, False], repeat=2):
        weight, accept = 1.0, []
        for k, stood in enumerate(stands):
            share = float(p[k, tokens[k]])
            weight *= share if stood else 1 - share
            accept.append(share / 2 if stood else (1 + share) / 2)
        for bonus in (i / CELLS + 0.5 / CELLS for i in range(CELLS)):
            accepted, token = certain(own, 0, list(tokens), Scripted(accept, bonus))
            assert accepted == (0 if not stands[0] else 1 if not stands[1] else 2)
            committed = [*tokens[:accepted], token]
            if accepted == 2:
                third[token] += 1 / CELLS
            if accepted:
                law[tuple(committed[:2])] += weight / CELLS
            else:  # x_2 is the target's own in the next round
                for second in range(vocab):
                    law[token, second] += weight / CELLS * float(p[1, second])
    for (first, second), probability in law.items():
        assert probability == pytest.approx(float(p[0, first] * p[1, second]), abs=4e-3)
    assert third == pytest.approx(p[2].tolist(), abs=4e-3)


def test_what_cannot_be_never_stands():
    p = torch.tensor([[0.0, 0.5, 0.5]])
    for accept in (0.0, 0.5):
        accepted, token = certain(Dense(p), 0, [0], Scripted([accept], 0.3))
        assert accepted == 0
        assert token in (1, 2)
    assert certain(Dense(torch.tensor([[torch.nan] * 3, [1.0, 0, 0]])), 0, [1], Scripted([0.0], 0.3))[0] == 0


# --- in the engine -----------------------------------------------------------------------------------------------

REPEATING = tuple([5, 6, 7, 8, 9, 10, 11, 12] * 4)
LOOPING = {"frequency_penalty": -2.0}
"""What makes a tiny model of random weights say the same again."""


def answers(lookup: bool, asked, *, drafter: bool = True, schedule=None):
    target = tiny_target()
    made = tiny_rounds(target, tiny_drafter(target) if drafter else None, schedule=schedule, looks_up=lookup)
    texts, rounds = {}, []
    with LocalEngine(tiny_engine(made)) as engine:
        for event, _ in engine.run(asked, streams=len(asked)):
            if isinstance(event, TokensEvent):
                texts[event.request_id] = texts.get(event.request_id, ()) + tuple(event.token_ids)
                rounds += [event.round] if event.round else []
    return texts, rounds


@pytest.mark.parametrize("drafter", [True, False])
@pytest.mark.parametrize("how", [{}, LOOPING, {**LOOPING, "temperature": 0.3, "verification": "coupled"}])
def test_looked_up_drafts_leave_the_text_as_it_is(drafter, how):
    asked = [
        request(name, REPEATING[: 20 + i], max_tokens=200, record_rounds=True, ignore_eos=True, seed=i, **how)
        for i, name in enumerate("abc")
    ]
    with_it, rounds = answers(True, asked, drafter=drafter)
    without, plain = answers(False, asked, drafter=drafter)
    assert with_it == without
    looked_up = [r for r in rounds if r.source == "lookup"]
    assert any(r.accepted for r in looked_up), "a tiny model repeats itself"
    assert all(len(r.confidence) == len(r.draft_tokens) for r in looked_up)
    assert not any(r.source == "lookup" for r in plain)


def test_rejection_goes_on_with_looked_up_drafts():
    asked = [
        request(name, REPEATING, max_tokens=60, record_rounds=True, ignore_eos=True, temperature=0.6, seed=i, **LOOPING)
        for i, name in enumerate("ab")
    ]
    texts, rounds = answers(True, asked, drafter=False)  # without looks, which go by time
    assert [len(text) for text in texts.values()] == [60, 60]
    assert sum(1 + r.accepted for r in rounds) >= 2 * 59
    assert any(r.source == "lookup" and r.scheduled for r in rounds)


def test_an_answer_never_goes_past_its_last_token():
    for most in (1, 2, 3, 7):
        texts, rounds = answers(
            True, [request("a", REPEATING, max_tokens=most, record_rounds=True, ignore_eos=True)], drafter=False
        )
        assert len(texts["a"]) == most
        assert all(r.start + len(r.draft_tokens) < len(REPEATING) + most - 1 for r in rounds)


def test_the_papers_schedules_and_plain_streams_look_nothing_up():
    for schedule, mode in ((Fixed(3), "dspark"), (Adaptive(), "plain")):
        asked = [request("a", REPEATING, max_tokens=40, record_rounds=True, ignore_eos=True, mode=mode)]
        _, rounds = answers(True, asked, schedule=schedule)
        assert rounds
        assert not any(r.source == "lookup" for r in rounds)
