"""Linear layers over quantised weights: the reference against the float layer, the kernel against the reference."""

from __future__ import annotations

import pytest
import torch

from dspark_kernels.weight_only import WeightOnlyLinear
from dspark_kernels.weight_only.reference import GROUP, Quantised, dequantise, linear, quantise
from dspark_stream.models.torch.quant import quantise_linears
from tiny import tiny_drafter, tiny_target


@pytest.mark.parametrize(("bits", "step"), [(8, 1 / 127), (4, 2 / 15)])
def test_rounding(bits, step):
    """Guards against swapped halves or groups: every weight within half a step of its own group's range."""
    torch.manual_seed(0)
    weight = torch.randn(37, 5 * GROUP) * torch.logspace(-3, 1, 37).unsqueeze(1)
    error = (dequantise(quantise(weight, bits)) - weight).abs().unflatten(1, (-1, GROUP))
    largest = weight.unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True)
    assert (error <= 0.52 * step * largest + 1e-4 * largest).all()


def test_weights_of_one_value_survive():
    """Guards against a division by nothing: all equal, all zero."""
    for value in (0.0, -0.75):
        for bits in (8, 4):
            weight = torch.full((3, GROUP), value)
            torch.testing.assert_close(dequantise(quantise(weight, bits)), weight, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("sizes", [(1, 33, 2), (3, 70, 9), (8, 64, 3), (16, 31, 1), (17, 40, 4)])
def test_products(load, device, dtypes, bits, sizes):
    """Rows from 1 to past a tile, odd outputs, one group and several shares."""
    rows, n, groups = sizes
    torch.manual_seed(1)
    weight = quantise(torch.randn(n, groups * GROUP), bits)
    for dtype in dtypes:
        x = torch.randn(rows, groups * GROUP).to(dtype)
        on_device = Quantised(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in weight))
        got = load("weight_only").linear(x.to(device), on_device)
        expected = (x.double() @ dequantise(weight).double().T).float()
        limit = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype] * expected.abs().max().item()
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu().float(), expected, atol=limit, rtol=1e-2)


def test_layers_are_replaced_and_keep_their_bias(implementation):
    """Guards against a drafter that is quantised where it must not be: heads and embeddings stay."""
    torch.manual_seed(2)
    layer = torch.nn.Linear(128, 24)
    replaced = WeightOnlyLinear(layer, 8)
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(replaced(x), layer(x), atol=3e-2, rtol=3e-2)
    drafter = tiny_drafter(tiny_target(hidden_size=64, intermediate_size=128))
    assert quantise_linears(drafter, "w4a16") == 8  # fc, four projections of attention, three of the MLP
    assert type(drafter.markov_head.markov_w2) is torch.nn.Linear
    assert linear(torch.zeros(1, 128), quantise(layer.weight.detach(), 4)).shape == (1, 24)


@pytest.mark.parametrize("draft_vocab", [None, 29])
def test_a_drafters_own_head(draft_vocab):
    """Guards against a target whose logits change with its drafter's precision."""
    torch.manual_seed(3)
    target = tiny_target(hidden_size=64)
    drafter = tiny_drafter(target, draft_vocab=draft_vocab)
    hidden = torch.randn(2, 4, 64)
    before, own = drafter.base_logits(hidden), target.logits(hidden)
    drafter.quantise_head()
    after = drafter.base_logits(hidden)
    torch.testing.assert_close(after, before, atol=0.05 * before.abs().max().item(), rtol=0.0)
    assert not torch.equal(after, before)
    assert torch.equal(target.logits(hidden), own)
