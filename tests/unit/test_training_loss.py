"""The loss by hand, its hand-made gradient against autograd, and the accepted length by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from dspark_stream.training.loss import DistributionLoss, Head, Slots, block_loss, slot_weights
from dspark_stream.training.validate import Walked


def test_slot_weights_by_hand():
    weights = slot_weights(7)
    assert weights[0] == 1
    assert weights[4] == pytest.approx(math.exp(-1))  # decay 4.0 for γ = 7
    assert slot_weights(14)[8] == pytest.approx(math.exp(-1))  # and in proportion for others


def test_loss_by_hand():
    """One slot, vocabulary of three of which two can be drafted.

    p_t = (0.5, 0.3, 0.2), p_d = (0.8, 0.2): L1 = 0.3 + 0.1 + 0.2 = 0.6, so a draft is accepted with 0.7; CE for
    label 0 is -log 0.8; confidence ½ costs log 2 whatever it should have been.
    """
    p_t = torch.tensor([0.5, 0.3, 0.2])
    head = Head(torch.eye(3)[:2], None)
    slots = Slots(p_t.log().unsqueeze(0), torch.zeros(1), torch.tensor([0]), torch.ones(1))
    z = torch.tensor([[0.8, 0.2, 1.0]]).log()  # the third hidden channel meets no draft token
    parts = block_loss(z, None, None, lambda: torch.zeros(1), head, slots)
    assert parts.l1 == pytest.approx(0.6, abs=1e-6)
    assert parts.ce == pytest.approx(-math.log(0.8), abs=1e-6)
    assert parts.confidence == pytest.approx(math.log(2), abs=1e-6)
    assert float(parts.total) == pytest.approx(0.1 * parts.ce + 0.9 * 0.6 + math.log(2), abs=1e-6)
    # the confidence that costs least is the probability of acceptance, 0.7
    cost = {c: block_loss(z, None, None, lambda c=c: torch.tensor([c]).logit(), head, slots).confidence
            for c in (0.6, 0.7, 0.8)}  # fmt: skip
    assert min(cost, key=cost.get) == 0.7


def test_a_label_outside_the_draft_vocabulary_has_no_cross_entropy():
    head = Head(torch.eye(3)[:2], None)
    slots = Slots(torch.zeros(1, 3), torch.full((1,), math.log(3)), torch.tensor([-1]), torch.ones(1))
    parts = block_loss(torch.zeros(1, 3), None, None, None, head, slots)
    assert parts.ce == 0
    assert parts.l1 == pytest.approx(2 / 3, abs=1e-6)  # |½-⅓| twice and ⅓ outside


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("chunk", "cached"), [(2**27, 2**27), (64, 2**27), (400, 60), (400, 1)])
def test_gradient_is_autograds(softcap, chunk, cached, monkeypatch):
    monkeypatch.setitem(DistributionLoss.forward.__globals__["CHUNK_ELEMENTS"], "cpu", chunk)
    monkeypatch.setitem(DistributionLoss.forward.__globals__["CACHED_ELEMENTS"], "cpu", cached)
    torch.manual_seed(0)
    n, h, r, vd, v = 37, 8, 4, 20, 30
    weight = torch.randn(v, h)
    hidden, features, w2 = (torch.randn(*s, requires_grad=True) for s in ((n, h), (n, r), (vd, r)))
    final, labels, weights = torch.randn(n, h), torch.randint(-1, vd, (n,)), torch.rand(n)

    def capped(x):
        return x if softcap is None else torch.tanh(x / softcap) * softcap

    target = capped(final @ weight.T)
    slots = Slots(final, target.logsumexp(-1), labels, weights)
    total, l1, ce = DistributionLoss.apply(hidden, features, w2, Head(weight[:vd], softcap), slots)
    z = capped(hidden @ weight[:vd].T) + features @ w2.T
    p_d = F.pad(z.softmax(-1), (0, v - vd))
    want_l1 = (p_d - target.softmax(-1)).abs().sum(-1)
    want_ce = F.cross_entropy(z, labels, ignore_index=-1, reduction="none")
    assert torch.allclose(l1, want_l1, atol=1e-5)
    assert torch.allclose(ce, want_ce, atol=1e-5)
    want = (weights * (0.1 * want_ce + 0.9 * want_l1)).sum()
    assert torch.allclose(total, want, atol=1e-4)
    inputs = (hidden, features, w2)
    pairs = zip(torch.autograd.grad(2 * total, inputs), torch.autograd.grad(2 * want, inputs), strict=True)
    for got, expected in pairs:
        assert torch.allclose(got, expected, atol=1e-5)


def test_accepted_length_and_positions_by_hand():
    walked = Walked([0, 2, 1, 3])
    assert walked.accepted_length == 1 + 6 / 4
    assert walked.by_position(3) == [3 / 4, 2 / 3, 1 / 2]
    assert Walked().accepted_length == 0
