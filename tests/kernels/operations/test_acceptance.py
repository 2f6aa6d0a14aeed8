"""Acceptance: the reference against the engine's own (decoding/accept.py), the kernels against the reference."""

from __future__ import annotations

import pytest
import torch

from dspark_kernels.acceptance import reference
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION, Drafts
from dspark_stream.decoding.accept import accept as engine_accept
from dspark_stream.decoding.draft import Block
from dspark_stream.decoding.noise import RoundUniforms
from dspark_stream.models.torch.distributions import Dense
from dspark_stream.models.torch.target import TargetOutput
from kernel_cases import GAMMA, Case, make, sampling_of


def by_the_engine(case: Case) -> list[tuple[int, int]]:
    """What decoding/accept.py makes of the streams that have rows."""
    views, vocab = case.views(), case.logits.shape[1]
    live = [r for r, length in enumerate(case.length.tolist()) if length >= 0]
    blocks, rows = [], []
    for r in live:
        length = int(case.length[r])
        q = torch.zeros(GAMMA, vocab).scatter_(1, case.drafts.candidates[r].long(), case.drafts.q[r])
        tokens = case.drafts.tokens[r].tolist()
        uniforms = RoundUniforms(views[r].round_key, views[r].position, GAMMA)
        blocks.append(Block(tokens=tokens, indices=tokens, q=Dense(q), uniforms=uniforms))
        rows += range(int(case.first[r]), int(case.first[r]) + length + 1)
    outcomes = engine_accept(
        TargetOutput(case.logits[rows], torch.empty(0)),
        [views[r] for r in live],
        blocks,
        [int(case.length[r]) for r in live],
        None,
    )
    return [(o.accepted, o.bonus) for o in outcomes]


def outcomes(got: reference.Accepted) -> list[tuple[int, int]]:
    return list(zip(got.accepted.tolist(), got.bonus.tolist(), strict=True))


ALL = [GREEDY, REJECTION, COUPLED] * 3
LENGTHS = [0, 0, 0, 4, 4, 4, 2, 3, 1]


@pytest.mark.parametrize(
    ("vocab", "near"), [(7, 0.0), (7, 0.9), (1003, 0.0), (1003, 0.9), (1003, 1.0), (4097, 0.9), (9000, 0.9)]
)
def test_all_three_ways_together(load, device, vocab, near):
    """Guards against a stream judged by another's rows, keys or temperature; odd vocabularies and several chunks."""
    case = make(LENGTHS, sampling_of(ALL), vocab, min(vocab, 33), near=near)
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    assert outcomes(got) == by_the_engine(case)


ALL_CUTS = {"top_k": [20] * 9, "top_p": [0.8] * 9, "min_p": [0.05] * 9}


@pytest.mark.parametrize(
    ("cut", "dtype"),
    [
        ({"top_k": [1] * 9}, torch.float32),
        ({"top_k": [5, 0, 40] * 3}, torch.float32),
        ({"top_p": [0.5, 0.9, 1e-6] * 3}, torch.float32),
        ({"min_p": [0.02, 0.3, 1.0] * 3}, torch.float32),
        (ALL_CUTS, torch.float32),
        (ALL_CUTS, torch.float16),
    ],
    ids=["one", "k", "p", "min", "all", "all 16"],
)
def test_truncation(load, device, cut, dtype):
    """Guards against tokens that the request ruled out, and cuts in another order than the engine's."""
    case = make(LENGTHS, sampling_of(ALL, **cut), 1003, 33, seed=2)
    case.logits = case.logits.to(dtype)
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    assert outcomes(got) == by_the_engine(case)


@pytest.mark.parametrize("mode", [GREEDY, REJECTION, COUPLED])
def test_many_rounds_agree(load, device, mode):
    """20 streams with 16-bit logits, as models give them: the same outcome as the engine's for each."""
    lengths = [r % 5 for r in range(20)]
    case = make(lengths, sampling_of([mode] * 20, temperature=[1.0] * 20), 521, 64, seed=mode, near=0.7)
    case.logits = case.logits.half()
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    expected = by_the_engine(case)
    assert outcomes(got) == expected
    assert 0 < sum(a for a, _ in expected) < sum(lengths)


@pytest.mark.parametrize(
    ("streams", "vocab", "candidates", "cut"),
    [(24, 12, 12, {}), (24, 400, 300, {}), (9, 400, 129, {"top_k": 10}), (9, 90, 60, {"top_p": 0.6})],
    ids=["small", "many candidates", "k", "p"],
)
def test_blocks_that_end_inside(load, device, streams, vocab, candidates, cut):
    """Guards against shares left out of what longer prefixes give or of the rest that the bonus token is from, cuts
    left out of either, and candidates beyond those that are looked at together: rounds that end between none and all.
    """
    lengths = [2 + r % 3 for r in range(streams)]
    cuts = {name: [value] * streams for name, value in cut.items()}
    sampling = sampling_of([REJECTION] * streams, temperature=[1.0] * streams, **cuts)
    case = make(lengths, sampling, vocab, candidates, seed=7, near=0.75)
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    assert outcomes(got) == by_the_engine(case)
    inside = sum(0 < a < length for (a, _), length in zip(outcomes(got), lengths, strict=True))
    assert inside >= streams // 6


def test_a_row_of_nan_refuses_its_draft(load, device):
    """Guards against a NaN that counts as certainty: nothing stands from that row on."""
    case = make([4] * 5, sampling_of([REJECTION] * 5, temperature=[1.0] * 5), 40, 40, near=1.0)
    for r in range(5):
        case.logits[5 * r + r] = torch.nan
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    assert outcomes(got) == by_the_engine(case)
    assert all(accepted <= r for r, accepted in enumerate(got.accepted.tolist()))
    assert [bonus < 0 for bonus in got.bonus.tolist()] == [a == r for r, a in enumerate(got.accepted.tolist())]


@pytest.mark.parametrize("mode", [GREEDY, REJECTION, COUPLED])
@pytest.mark.parametrize(
    ("value", "where"),
    [(torch.nan, slice(None)), (-torch.inf, slice(None)), (torch.nan, slice(500, 501))],
    ids=["NaN", "ruled out", "one NaN"],
)
@pytest.mark.parametrize("cuts", [{}, {"top_k": [20] * 3}, {"top_p": [0.9] * 3, "min_p": [0.01] * 3}], ids=str)
def test_a_row_without_a_token(load, device, mode, value, where, cuts):
    """Guards against a token made up where everything is ruled out or a score is no number: it would be a text that
    nobody wrote."""
    case = make([0, 2, 2], sampling_of([mode] * 3, temperature=[1.0] * 3, **cuts), 1003, 33, near=1.0)
    case.logits[0, where] = case.logits[1, where] = value
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    assert outcomes(got)[:2] == [(0, -1), (0, -1)]
    assert outcomes(got)[2] == by_the_engine(case)[2]
    assert got.bonus[2] >= 0


def test_streams_without_rows(load, device):
    """Guards against padding that is judged: rows of nobody give -1 and 0, and nobody's outcome changes."""
    case = make([-1, 3, -1, 2, 4, -1], sampling_of([1, 1, 0, 2, 0, 2]), 301, 20)
    on_device = case.to(device)
    got = outcomes(
        load("acceptance").accept(
            on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
        )
    )
    assert [got[r] for r in (0, 2, 5)] == [(-1, 0)] * 3
    assert [got[r] for r in (1, 3, 4)] == by_the_engine(case)


@pytest.mark.parametrize("stand", ["none", "all"])
def test_empty_and_full_acceptance(load, device, stand):
    """Guards against off-by-one at both ends: the bonus comes from row 0, or from the row after the last draft."""
    case = make([4, 4, 4], sampling_of([GREEDY, REJECTION, COUPLED]), 1003, 33, near=1.0)
    one_hot = torch.full_like(case.logits, -30.0)
    tokens = case.drafts.tokens.flatten().tolist()
    for row in range(15):
        r, k = divmod(row, 5)
        wanted = tokens[r * 4 + k] if k < 4 and stand == "all" else 1000
        one_hot[row, wanted] = 30.0
    case.logits = one_hot
    assert 1000 not in tokens
    on_device = case.to(device)
    got = outcomes(
        load("acceptance").accept(
            on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
        )
    )
    assert got == [(4 if stand == "all" else 0, 1000)] * 3


def test_zero_residual_draws_from_the_target(load, device):
    """Guards against a draw from nothing where q = p and rounding rejected all the same."""
    case = make([2, 2], sampling_of([REJECTION] * 2, temperature=[1.0, 1.0]), 40, 40)
    case.logits = torch.full_like(case.logits, -1e4)
    case.logits[:, [3, 11, 12, 38]] = 2.0  # quarters: exact in every implementation
    rows = torch.tensor([[0, 1, 0, 1], [3, 4, 3, 4]])
    p = case.logits[rows].softmax(-1)
    everything = torch.arange(40, dtype=torch.int32).expand(2, 4, 40).contiguous()
    case.drafts = Drafts(case.drafts.tokens, everything, p, torch.full((2, 4), 1e9))
    on_device = case.to(device)
    got = load("acceptance").accept(
        on_device.logits, on_device.first, on_device.length, on_device.drafts, on_device.sampling
    )
    u = [RoundUniforms(v.round_key, v.position, GAMMA).bonus for v in case.views()]
    cdf = p[:, 0].double().cumsum(-1)
    expected = torch.searchsorted(cdf, torch.tensor(u).double().unsqueeze(1) * cdf[:, -1:], right=True).squeeze(1)
    assert outcomes(got) == [(0, int(t)) for t in expected]


def test_equal_logits_give_the_lowest_token(load, device):
    """Guards against ties broken by which part of the vocabulary was scanned first."""
    logits = torch.zeros(2, 9001)
    logits[0, [4096, 17, 8000]] = 1.0
    case = Case(
        logits,
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([0, 0], dtype=torch.int32),
        Drafts(
            torch.zeros(2, 1, dtype=torch.int32),
            torch.zeros(2, 1, 1, dtype=torch.int32),
            torch.ones(2, 1, 1),
            torch.ones(2, 1),
        ),
        sampling_of([GREEDY, GREEDY]),
    ).to(device)
    got = load("acceptance").accept(case.logits, case.first, case.length, case.drafts, case.sampling)
    assert outcomes(got) == [(0, 17), (0, 0)]
