"""Anchors, labels, masks: what a training block is made of, and that it is what the engine drafts from."""

import pytest
import torch

from dspark_stream.models.cache import Extent
from dspark_stream.models.torch.store import KVStore
from dspark_stream.training.answers import Answer
from dspark_stream.training.blocks import (
    IGNORE,
    BlockAttend,
    block_attention,
    make_batch,
    sample_anchors,
    visible_context,
)
from dspark_stream.training.features import compute_features
from tiny import tiny_drafter, tiny_target

MASK = 0
LONG = Answer((5, 6, 7, 8, 9), tuple(range(10, 40)))
SHORT = Answer((5, 6), (20, 21, 22))


def features_of(target, *answers):
    return compute_features(target, answers)


def test_anchors_are_followed_by_answer_tokens():
    answer = Answer((1, 2, 3), (4, 5, 6, 7))  # position 2 is the prompt's last; 6 has no successor
    seen = set()
    for seed in range(50):
        anchors = sample_anchors(answer, 2, torch.Generator().manual_seed(seed)).tolist()
        assert len(anchors) == 2
        assert anchors == sorted(set(anchors))
        seen |= set(anchors)
    assert seen == {2, 3, 4, 5}
    everything = sample_anchors(answer, 99, torch.Generator().manual_seed(0))
    assert everything.tolist() == [2, 3, 4, 5]


def test_anchors_are_a_function_of_the_seed():
    draws = [sample_anchors(LONG, 5, torch.Generator().manual_seed(7)).tolist() for _ in range(2)]
    assert draws[0] == draws[1]


def test_labels_by_hand():
    """Slot k of an anchor at p: fed x_{p+k-1}, asked for x_{p+k}; past the end there is nothing to ask for."""
    target = tiny_target()
    target.set_taps((-1, 1))
    answers = [Answer((1, 2, 3), (4, 5, 6, 7)), SHORT]
    features = features_of(target, *answers)
    anchors = [torch.tensor([2, 5]), torch.tensor([2])]
    batch = make_batch(answers, features, anchors, gamma=3, mask_id=MASK)
    assert batch.block_ids.view(-1, 3).tolist() == [[3, MASK, MASK], [6, MASK, MASK], [20, MASK, MASK]]
    assert batch.block_positions.view(-1, 3).tolist() == [[2, 3, 4], [5, 6, 7], [2, 3, 4]]
    assert batch.previous.tolist() == [[3, 4, 5], [6, 6, 6], [20, 21, 21]]
    assert batch.labels.tolist() == [[4, 5, 6], [7, IGNORE, IGNORE], [21, 22, IGNORE]]
    assert batch.context_positions.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert torch.equal(batch.taps, torch.cat([features[0].taps[:5], features[1].taps[:2]]))
    # row j of `final` predicts answer token j: 4, 5, 6 are tokens 0 … 2, 7 is 3; 21 and 22 are 1 and 2
    assert torch.equal(batch.target_final[0], features[0].final[:3])
    assert torch.equal(batch.target_final[1, 0], features[0].final[3])
    assert torch.equal(batch.target_lse[2, :2], features[1].lse[1:])


def test_target_distribution_is_the_targets_own():
    target = tiny_target()
    target.set_taps((-1, 1))
    (features,) = features_of(target, LONG)
    logits = target.model(input_ids=torch.tensor([LONG.ids]), attend=_causal(len(LONG))).logits[0, 4:-1]
    p = torch.exp(target.logits(features.final) - features.lse.unsqueeze(1))
    assert torch.allclose(p, logits.softmax(-1), atol=1e-5)


def _causal(n):
    from dspark_stream.training.features import SelfAttend

    return SelfAttend([n])


def test_context_mask_by_hand():
    seen = visible_context(torch.tensor([1, 3]), 3, gamma=2)
    assert seen.int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]]


def test_block_attention_is_one_masked_softmax():
    torch.manual_seed(0)
    gamma, anchors, length, heads_q, heads_k, d = 3, torch.tensor([2, 5, 9]), 9, 4, 2, 8
    rows = gamma * len(anchors)
    q, k, v = torch.randn(rows, heads_q, d), torch.randn(rows, heads_k, d), torch.randn(rows, heads_k, d)
    ck, cv = torch.randn(length, heads_k, d), torch.randn(length, heads_k, d)
    seen = visible_context(anchors, length, gamma)
    bias = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf).repeat(heads_q // heads_k, 1)
    got = block_attention(q, (ck, cv), (k, v), bias, gamma=gamma, scale=0.3)
    block = torch.arange(rows) // gamma
    mask = torch.cat((seen, block.unsqueeze(1) == block), -1)
    keys, values = (torch.cat(x).repeat_interleave(2, 1).transpose(0, 1) for x in ((ck, k), (cv, v)))
    want = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=mask, scale=0.3)
    assert torch.allclose(got, want.transpose(0, 1), atol=1e-5)


@pytest.mark.parametrize("head", ["vanilla", "none"])
def test_training_blocks_are_what_the_engine_drafts_from(head):
    """Off by one anywhere (context 0 … p-1, block at p … p+γ-1) and these differ; no text test would notice."""
    target = tiny_target()
    drafter = tiny_drafter(target, head=head)
    answers = [LONG, SHORT, LONG]
    features = features_of(target, *answers)
    anchors = [torch.tensor([5, 11, 33]), torch.tensor([2, 3]), torch.tensor([7])]
    batch = make_batch(answers, features, anchors, gamma=drafter.gamma, mask_id=drafter.config.mask_token_id)
    trained = drafter.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(drafter, batch))
    row = 0
    for answer, feature, own in zip(answers, features, anchors, strict=True):
        for p in own.tolist():
            store = KVStore(drafter.kv_shapes, 64, torch.float32, target.device)
            drafter.append_context(feature.taps[:p], list(range(p)), list(range(p)), store)
            drafted = drafter.draft_hidden([(Extent(0, 64), p, answer.ids[p])], store)[0]
            assert torch.allclose(trained[row : row + drafter.gamma], drafted, atol=1e-4)
            row += drafter.gamma


def test_a_block_sees_no_later_token_and_no_other_block():
    """Change the answer from position p on: the block at p may not change (its anchor token aside)."""
    target = tiny_target()
    drafter = tiny_drafter(target)
    changed = Answer(LONG.prompt_ids, LONG.answer_ids[:6] + tuple(reversed(LONG.answer_ids[6:])))
    p = 5 + 5  # the last position that both have, and whose features both have
    hidden = []
    for answer, anchors in ((LONG, [p, 20]), (changed, [p, 25])):
        batch = make_batch(
            [answer], features_of(target, answer), [torch.tensor(anchors)], gamma=drafter.gamma, mask_id=MASK
        )
        hidden.append(drafter.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(drafter, batch)))
    assert torch.allclose(hidden[0][: drafter.gamma], hidden[1][: drafter.gamma], atol=1e-5)
    assert not torch.allclose(hidden[0][drafter.gamma :], hidden[1][drafter.gamma :], atol=1e-2)
