"""The walk over candidates: the reference against the engine's (models/torch/walk.py), the kernel against it."""

from __future__ import annotations

import pytest
import torch

from dspark_kernels.sequential_head import reference
from dspark_kernels.sequential_head.reference import prepare
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION, Sampling
from dspark_stream.decoding.calibration import Calibration, logit
from dspark_stream.decoding.draft import draft
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.models.torch.head_weights import head_weights
from kernel_cases import HEADS, Case, prepared_on, random_case, sampling_of, sampling_on, weights_on
from tiny import tiny_drafter, tiny_target

ALL = [GREEDY, REJECTION, COUPLED] * 2


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("draft_vocab", [None, 29])
@torch.inference_mode()
def test_with_every_token_a_candidate_it_is_the_engines_walk(load, device, head, draft_vocab):
    """Guards against another token, another q or another confidence than the engine's: all three ways to draw."""
    drafter = tiny_drafter(tiny_target(), head=head, draft_vocab=draft_vocab)
    sampling = sampling_of(ALL, top_k=[0, 0, 0, 0, 7, 7], top_p=[1.0, 1.0, 1.0, 1.0, 0.9, 0.9])
    torch.manual_seed(4)
    hidden = torch.randn(6, drafter.gamma, 32)
    anchor = torch.tensor([3, 9, 40, 7, 7, 1])
    case = Case(torch.empty(0, 48), anchor, anchor, None, sampling)
    views = case.views()
    for view, token in zip(views, anchor.tolist(), strict=True):
        view.anchor = token
    drafter.draft_hidden = lambda *_: hidden
    blocks = draft(drafter, drafter.make_store(16), views, Calibration(), AcceptanceHistory(drafter.gamma))

    weights = head_weights(drafter)
    prepared = prepare(drafter.base_logits(hidden), hidden, weights, drafter.draft_vocab_size)
    got = load("sequential_head").walk(
        prepared_on(prepared, device),
        anchor.int().to(device),
        weights_on(weights, device),
        sampling_on(sampling, device),
    )
    assert got.drafts.tokens.tolist() == [b.tokens for b in blocks]
    assert got.proved.all()
    confidence = torch.tensor([[logit(c) for c in b.confidence] for b in blocks])
    torch.testing.assert_close(got.confidence.cpu(), confidence, atol=1e-3, rtol=1e-4)
    for r, block in enumerate(blocks):
        if block.q is not None:
            rows = range(len(block.tokens))
            q = torch.stack([block.q.probabilities(k) for k in rows])
            torch.testing.assert_close(got.drafts.q[r].cpu(), q, atol=1e-6, rtol=1e-4)
            q_x = torch.tensor([block.q.probability(k, block.indices[k]) for k in rows])
            torch.testing.assert_close(got.drafts.q_x[r].cpu(), q_x, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize(
    ("streams", "gamma", "vocab", "rank", "candidates"),
    [(1, 7, 1003, 24, 64), (9, 3, 61, 16, 33), (2, 2, 1003, 24, 600)],
)
def test_pruned_walks(load, device, dtypes, kind, streams, gamma, vocab, rank, candidates):
    """One stream and many, odd vocabularies, ranks that are no power of two, 16-bit weights: the reference's walk."""
    modes = ([REJECTION, COUPLED, GREEDY] * 3)[:streams]
    sampling = sampling_of(modes, top_k=[0, 5, 0, 20, 0, 0, 0, 3, 0][:streams], min_p=[0.0, 0.1, 0.0] * 3)
    sampling = Sampling(*(x[:streams] for x in sampling))
    for dtype in dtypes:
        weights, _, prepared, anchor = random_case(kind, streams, gamma, vocab, rank, candidates, dtype)
        expected = reference.walk(prepared, anchor, weights, sampling)
        got = load("sequential_head").walk(
            prepared_on(prepared, device), anchor.to(device), weights_on(weights, device), sampling_on(sampling, device)
        )
        assert got.drafts.tokens.tolist() == expected.drafts.tokens.tolist()
        torch.testing.assert_close(got.confidence.cpu(), expected.confidence, atol=2e-4, rtol=2e-4)
        drawn = sampling.mode == REJECTION
        torch.testing.assert_close(got.drafts.q.cpu()[drawn], expected.drafts.q[drawn], atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(got.drafts.q_x.cpu()[drawn], expected.drafts.q_x[drawn], atol=2e-5, rtol=2e-4)


def test_what_is_proved_is_the_full_walks_token(load, device):
    """Guards against a bound that proves too much: where every earlier token agrees and a slot is proved, so is it."""
    proved = differ = 0
    for seed in range(6):
        weights, base, prepared, anchor = random_case("vanilla", 8 + seed, 5, 400, 16, 24, torch.float32)
        scale = 0.6 if seed % 2 else 2.0
        weights = weights._replace(w2=weights.w2 * scale, longest_row=weights.longest_row * scale)
        sampling = sampling_of([GREEDY] * len(anchor))
        got = load("sequential_head").walk(
            prepared_on(prepared, device), anchor.to(device), weights_on(weights, device), sampling_on(sampling, device)
        )
        tokens = got.drafts.tokens.cpu().long()
        before = torch.cat((anchor.long().unsqueeze(1), tokens[:, :-1]), 1)
        full = (base + weights.w1[before] @ weights.w2.T).argmax(-1)
        same, certain = full == tokens, got.proved.cpu()
        assert bool(same[certain].all())
        proved += int(certain.sum())
        differ += int((~same).sum())
    assert proved > 20
    assert differ > 0  # or the bound was never needed


def test_equal_scores_give_the_lowest_token(load, device):
    """Guards against ties that go to another token than the target's own argmax would take."""
    weights, base, _, anchor = random_case("none", 2, 3, 50, 16, 16, torch.float32)
    base[:] = 0.0
    base[:, :, [9, 4, 30]] = 2.0
    prepared = prepare(base, torch.zeros(2, 3, 24), weights, 50)
    sampling = sampling_of([GREEDY, GREEDY])
    got = load("sequential_head").walk(
        prepared_on(prepared, device), anchor.to(device), weights_on(weights, device), sampling_on(sampling, device)
    )
    assert got.drafts.tokens.tolist() == [[4] * 3] * 2
