"""Sampling, noise, survival: the small exact parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_kernels.drawing.reference import distributions, race, residual, sample, truncate
from dspark_stream.decoding.accept import matched
from dspark_stream.decoding.noise import NoiseCache, RoundUniforms, token_exponentials
from dspark_stream.decoding.survival import AcceptanceHistory, prefix_survival
from dspark_stream.types import SamplingParams


def params(**options) -> SamplingParams:
    return SamplingParams(max_tokens=1, **options)


P = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, 2),
        ({"top_k": 99}, 5),
        ({"top_p": 0.5}, 1),
        ({"top_p": 0.51}, 2),
        ({"top_p": 1.0}, 5),
        ({"min_p": 0.29}, 3),
        ({"top_k": 3, "top_p": 0.8}, 2),
        ({"top_p": 0.9, "min_p": 0.4}, 2),
    ],
)
def test_truncation_keeps_the_stated_tokens(options, kept):
    """0.5+0.25 of top-3's 0.9 is 0.833 ≥ 0.8: top-p counts what top-k has left."""
    got = truncate(P, params(**options))
    assert int((got > 0).sum()) == kept
    assert float(got.sum()) == pytest.approx(1.0)
    assert torch.allclose(got[:kept] / got[0], P[:kept] / P[0])


def test_nucleus_over_a_wide_flat_vocabulary_needs_more_than_its_first_guess():
    got = truncate(torch.full((5000,), 1 / 5000.0), params(top_p=0.5))
    assert int((got > 0).sum()) == 5000  # equal probabilities are kept or dropped together


def test_temperature_and_rows_are_independent():
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    got = distributions(logits, [params(temperature=0.5), params(temperature=2.0, top_k=1)])
    assert torch.allclose(got[0], torch.softmax(logits[0] * 2, -1))
    assert got[1].tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(got[:1], distributions(logits[:1], [params(temperature=0.5)]))


def test_sample_never_returns_a_token_of_probability_zero():
    weights = torch.tensor([[0.0, 0.3, 0.0, 0.2, 0.0]]).expand(4, 5)
    u = torch.tensor([0.0, 0.599, 0.601, 1 - 2**-53], dtype=torch.float64)
    assert sample(weights, u).tolist() == [1, 1, 3, 3]


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_noise_is_a_function_of_seed_and_position(seed, position):
    """Guards against hidden state: made again in any order, in a batch or alone, it is the same."""
    cache = NoiseCache(seed, 7)
    later = cache.at(position + 2, 2)
    assert torch.equal(NoiseCache(seed, 7).at(position, 4)[2:], later)
    assert torch.equal(later[1], token_exponentials(seed, position + 3, 7))
    assert (later > 0).all()
    a, b = RoundUniforms(seed, position, 7), RoundUniforms(seed, position, 0)
    assert a.bonus == b.bonus  # plain decoding draws the same bonus
    assert len(a.draft) == len(a.accept) == 7
    assert RoundUniforms(seed, position + 1, 7).draft != a.draft


def test_purposes_do_not_share_bits():
    u = RoundUniforms(3, 5, 3)
    e = token_exponentials(3, 5, 7)
    assert not set(u.draft) & set((1 - torch.exp(-e)).tolist())


def test_match_and_residual():
    assert matched([4, 5, 6], [4, 5, 9, 1]) == (2, 9)
    assert matched([], [3]) == (0, 3)
    assert matched([1], [1, 2]) == (1, 2)
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    q = torch.tensor([0.7, 0.1, 0.2, 0.0])
    assert torch.allclose(residual(p, 1.0, q, None), torch.tensor([0.0, 0.2, 0.0, 0.0]))
    assert torch.allclose(residual(p, 0.5, q, None), torch.tensor([0.0, 0.05, 0.0, 0.0]))
    widened = residual(p, 1.0, torch.tensor([0.6, 0.4]), torch.tensor([0, 3]))
    assert torch.allclose(widened, torch.tensor([0.0, 0.3, 0.2, 0.0]))
    assert torch.equal(residual(p, 1.0, p, None), p)


def test_race_follows_the_noise():
    p = torch.tensor([[0.5, 0.5, 0.0]])
    assert int(race(p, torch.tensor([[2.0, 1.0, 0.001]], dtype=torch.float64))[0]) == 1


def test_survival_and_history():
    assert prefix_survival([0.5, 0.5, 1.0]) == [0.5, 0.25, 0.25]
    history = AcceptanceHistory(3)
    history.record(scheduled=3, accepted=1)
    assert history.confidence() == [3 / 5, 2 / 5, 2 / 4]
    for _ in range(500):
        history.record(scheduled=1, accepted=0)
    assert history.confidence()[0] < 0.02
    for _ in range(2000):
        history.record(scheduled=0, accepted=0)
    assert history.confidence()[0] == pytest.approx(0.5, abs=0.01)  # given up, and tried again
