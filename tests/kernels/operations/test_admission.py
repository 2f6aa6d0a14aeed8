"""Admission on the device: the references against decoding/schedule.py, the kernels against the references."""

from __future__ import annotations

import pytest
import torch

from dspark_kernels.admission.reference import BUDGET, EARLY_STOP, FIXED, THRESHOLD, Admitted, pack
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.survival import prefix_survival


def algorithm_1(survival: list[list[float]], sps) -> list[int]:
    """The paper's Algorithm 1 in its own words, on the host."""
    order = sorted((-a, j, r) for r, row in enumerate(survival) for j, a in enumerate(row, 1))
    lengths = [0] * len(survival)
    batch_tokens, expected = len(survival), float(len(survival))
    for negative, j, r in order:
        gained = expected - negative
        if gained * sps(batch_tokens + 1) <= expected * sps(batch_tokens):
            break
        batch_tokens, expected, lengths[r] = batch_tokens + 1, gained, j
    return lengths


def curve(kind: str, most: int) -> torch.Tensor:
    """SPS(B) of three machines: one without limits, a steep one, a staircase."""
    b = torch.arange(most + 1).float()
    ms = {"flat": 1 + b * 0, "steep": 1 + 0.2 * b, "stairs": 1 + torch.div(b, 8, rounding_mode="floor")}[kind]
    return 1000.0 / ms


def lengths(load, device, logits, temperature, drafting, active, rule, sps, rows) -> Admitted:
    got = load("admission").admit(
        logits.to(device),
        temperature.to(device),
        drafting.to(device),
        active.to(device),
        torch.tensor(rule, dtype=torch.int32, device=device),
        sps.to(device),
        rows,
    )
    return Admitted(*(x.cpu() for x in got))


@pytest.mark.parametrize("kind", ["flat", "steep", "stairs"])
@pytest.mark.parametrize(("streams", "gamma"), [(1, 7), (5, 7), (33, 3), (64, 7), (2, 1)])
def test_algorithm_1(load, device, kind, streams, gamma):
    """Guards against another admission than the engine's: early stop, calibration, plain streams and absent ones."""
    for seed in range(4):
        torch.manual_seed(seed)
        logits = torch.randn(streams, gamma) * 2
        temperature = 0.5 + torch.rand(streams, gamma)
        drafting, active = torch.rand(streams) < 0.8, torch.rand(streams) < 0.8
        sps = curve(kind, streams * (gamma + 1))
        got = lengths(load, device, logits, temperature, drafting, active, [EARLY_STOP, 0], sps, streams * (gamma + 1))
        live = [r for r in range(streams) if active[r]]
        survival = [
            prefix_survival(Calibration(greedy=temperature[r].tolist()).confidence(logits[r].tolist(), "greedy"))
            if drafting[r]
            else []
            for r in live
        ]
        expected = dict(zip(live, algorithm_1(survival, lambda b, sps=sps: sps[b].item()), strict=True))
        assert got.length.tolist() == [expected.get(r, -1) for r in range(streams)]
        for r, row in zip(live, survival, strict=True):
            torch.testing.assert_close(got.survival[r], torch.tensor(row or [0.0] * gamma), atol=1e-6, rtol=1e-5)
        assert got.first.tolist() == [int((got.length[:r] + 1).sum()) for r in range(streams)]


@pytest.mark.parametrize("budget", [0, 1, 9, 20, 1000])
def test_budget_takes_the_best_prefixes(load, device, budget):
    """The production variant: the n most likely prefixes and no other, never more rows than the pass has."""
    torch.manual_seed(1)
    logits, ones = torch.randn(6, 7) * 2, torch.ones(6, 7)
    active = torch.tensor([True, True, False, True, True, True])
    drafting = torch.tensor([True, True, True, True, False, True])
    sps, rows = curve("steep", 48), 30
    got = lengths(load, device, logits, ones, drafting, active, [BUDGET, budget], sps, rows)
    survival = torch.sigmoid(logits).cumprod(1)
    chosen = sorted((-survival[r, j].item(), j, r) for r in (0, 1, 3, 5) for j in range(7))[: min(budget, 25)]
    expected = [0] * 6
    for _, j, r in chosen:
        expected[r] = max(expected[r], j + 1)
    expected[2] = -1
    assert got.length.tolist() == expected


def test_ties_go_by_position_then_stream(load, device):
    """Guards against broken prefixes: equal survivals are admitted breadth first."""
    logits = torch.full((3, 4), 40.0)  # σ = 1 in float32: every survival is equal
    everyone = torch.ones(3, dtype=torch.bool)
    got = lengths(load, device, logits, torch.ones(3, 4), everyone, everyone, [BUDGET, 5], curve("flat", 15), 15)
    assert got.length.tolist() == [2, 2, 1]


@pytest.mark.parametrize("n", [0, 3, 9])
def test_fixed(load, device, n):
    logits = torch.randn(4, 7)
    active, drafting = torch.tensor([True, True, True, False]), torch.tensor([True, False, True, True])
    got = lengths(load, device, logits, torch.ones(4, 7), drafting, active, [FIXED, n], curve("flat", 32), 32)
    assert got.length.tolist() == [min(n, 7), 0, min(n, 7), -1]


@pytest.mark.parametrize("least", [0.0, 0.3, 0.85, 1.0])
def test_threshold(load, device, least):
    """Every draft token whose survival is at least the number, whose bits the rule holds; of too many the best."""
    torch.manual_seed(3)
    logits = torch.randn(6, 7) * 2
    logits[0] = 40.0  # σ = 1 in float32: survival is exactly 1
    active, drafting = torch.ones(6, dtype=torch.bool), torch.tensor([True, True, True, True, False, True])
    bits = int(torch.tensor(least).view(torch.int32))
    survival = torch.sigmoid(logits).cumprod(1)
    for rows in (48, 12):
        got = lengths(
            load, device, logits, torch.ones(6, 7), drafting, active, [THRESHOLD, bits], curve("flat", 48), rows
        )
        likely = sorted((-survival[r, j].item(), j, r) for r in (0, 1, 2, 3, 5) for j in range(7))
        likely = [one for one in likely if -one[0] >= least][: rows - 6]
        expected = [sum(r == stream for _, _, r in likely) for stream in range(6)]
        assert got.length.tolist() == expected


def test_no_rule_takes_more_rows_than_there_are(load, device):
    """Guards against reading past the pass's logits: a fixed length shares what room there is."""
    everyone = torch.ones(3, dtype=torch.bool)
    for rows, expected in ((24, 7), (11, 2), (3, 0)):
        got = lengths(
            load, device, torch.zeros(3, 7), torch.ones(3, 7), everyone, everyone, [FIXED, 9], curve("flat", 24), rows
        )
        assert got.length.tolist() == [expected] * 3


def test_rows(load, device):
    """Anchor, then drafts, stream after stream; rows of nobody are marked and harmless."""
    length = torch.tensor([2, -1, 0, 3], dtype=torch.int32)
    first = torch.tensor([0, 3, 3, 4], dtype=torch.int32)
    tokens = torch.arange(100, 112, dtype=torch.int32).view(4, 3)
    anchor = torch.tensor([7, 8, 9, 10], dtype=torch.int32)
    position, slot = torch.tensor([5, 0, 20, 1]), torch.tensor([0, 16, 32, 64])
    args = [x.to(device) for x in (tokens, anchor, position, slot)]
    admitted = Admitted(length.to(device), first.to(device), torch.empty(0))
    got = load("admission").pack(admitted, *args, 10)
    assert got.stream.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, -1, -1]
    assert got.offset.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 0]
    assert got.ids.tolist() == [7, 100, 101, 9, 10, 109, 110, 111, 0, 0]
    assert got.position.tolist() == [5, 6, 7, 20, 1, 2, 3, 4, 0, 0]
    assert got.slot.tolist() == [5, 6, 7, 52, 65, 66, 67, 68, -1, -1]
    expected = pack(Admitted(length, first, torch.empty(0)), tokens, anchor, position, slot, 10)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, expected, strict=True))
