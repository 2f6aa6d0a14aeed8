"""All operations of a round together: one implementation throughout, against the other."""

from __future__ import annotations

import pytest
import torch

from dspark_kernels import acceptance, admission, ragged_attention, sequential_head, weight_only
from dspark_stream.engine.captured.round import RoundModels, run_round
from dspark_stream.engine.captured.state import RoundState, Seat
from dspark_stream.models.torch.head_weights import head_weights
from dspark_stream.models.torch.quant import quantise_linears
from dspark_stream.models.torch.target import Target
from dspark_stream.types import SamplingParams
from tiny import tiny_drafter, tiny_rounds, tiny_target

OPERATIONS = (acceptance, admission, ragged_attention, sequential_head, weight_only)


def rounds_of(head: str, quant: str, device: torch.device) -> tuple[list, list[torch.Tensor]]:
    """Outcomes of two drafted rounds and a plain one between, of three streams among four seats; the caches after."""
    target = Target(tiny_target(hidden_size=64).model.to(device))
    drafter = tiny_drafter(target, head=head).to(device)
    quantise_linears(drafter, quant)
    models = tiny_rounds(target, drafter, slots=256).models
    torch.manual_seed(7)
    for store in (models.target_kv, models.drafter_kv):
        for tensor in (*store.keys, *store.values):
            tensor.copy_(torch.randn(tensor.shape))
    state = RoundState(4, 4, 20, device)
    greedy = SamplingParams(max_tokens=30, temperature=0.0)
    drawn = SamplingParams(max_tokens=30, temperature=0.8, seed=5, top_k=20)
    shared = {"limit": 60, "drafts": True, "round_key": 2**63 + 11, "temperatures": [1.5]}
    state.bind(
        [
            Seat(anchor=3, position=9, slot=0, acceptance="greedy", sampling=greedy, **shared),
            Seat(anchor=8, position=30, slot=80, acceptance="rejection", sampling=drawn, **shared),
            Seat(anchor=1, position=17, slot=160, acceptance="coupled", sampling=drawn, **shared),
        ]
    )
    parts = RoundModels(target, models.target_kv, drafter, models.drafter_kv, head_weights(drafter), 24, 100)
    outcomes = []
    for size in ((4, 20, True), (4, 4, False), (4, 12, True)):
        run_round(parts, state, *size)
        outcomes.append((state.outcome.tolist(), state.position.tolist(), state.anchor.tolist()))
    stores = (models.target_kv, models.drafter_kv)
    return outcomes, [t[:-1].cpu() for store in stores for t in (*store.keys, *store.values)]


@pytest.mark.parametrize(("head", "quant"), [("vanilla", "none"), ("rnn", "w4a16"), ("none", "none")])
def test_rounds_by_either_implementation(implementation, device, monkeypatch, head, quant):
    """Guards against operations that fit their own tests and not each other: strides, integer kinds, padding rows."""
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "uses_triton", lambda _: False)
    expected, caches = rounds_of(head, quant, torch.device("cpu"))
    for operation in OPERATIONS:
        monkeypatch.setattr(operation, "uses_triton", lambda _: implementation == "triton")
    got, other = rounds_of(head, quant, device)
    assert got == expected
    for a, b in zip(caches, other, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert sum(row[0] >= 0 for outcome, _, _ in expected for row in outcome) == 9
