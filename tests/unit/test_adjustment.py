"""The state that logits are adjusted by: kept up as tokens are committed, over either vocabulary, on either runner."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from dspark_kernels.cpu import Context, EditedBlock, best_isa, best_tokens, edit_rows
from dspark_kernels.cpu.build import compiler
from dspark_kernels.edits import EDIT, Edits
from dspark_stream.engine.stream import Stream, adjustments_of, round_key
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.cache import Extent
from dspark_stream.models.torch.edits import edit_block
from dspark_stream.types import SamplingParams
from tiny import request

VOCAB = 48
ALL = {
    "frequency_penalty": 0.75,
    "presence_penalty": -0.5,
    "repetition_penalty": 1.5,
    "logit_bias": ((3, 2.0), (5, -100.0), (40, 1.0)),
    "min_tokens": 4,
}


def adjustment(prompt=(5, 6, 6), stops=(1, 2), **fields) -> Adjustment:
    return Adjustment(SamplingParams(max_tokens=20, **fields), stops, prompt, VOCAB)


def by_token(edits: Edits) -> dict[int, tuple[float, int]]:
    assert len(set(edits.entries["token"].tolist())) == len(edits.entries)
    return {token: (bias, times) for token, bias, times in edits.entries.tolist()}


def test_counts_are_of_what_was_committed():
    """Guards against drafts that were refused, and tokens behind a stop, in the counts."""
    asked = request(prompt=(5, 6, 6), max_tokens=20, stop_token_ids=(9,), **ALL)
    stream = Stream(asked, VOCAB, 4, frozenset({1, 9}), None, eos_ids=(1,))
    stream.admitted(Extent(0, 64))
    assert by_token(stream.adjustment.edits()) == {3: (2.0, -1), 5: (-100.0, 0), 40: (1.0, -1), 6: (0.0, 0)}
    assert stream.adjustment.edits().stops.tolist() == [1, 9]
    stream.commit([7, 7, 5], 2)  # a block of which two stood, and the bonus token
    assert stream.adjustment.edits().masked == 1
    _, reason = stream.commit([40, 7, 9, 8, 8], 4)
    assert reason == "stop"
    found = by_token(stream.adjustment.edits())
    counted = Counter([7, 7, 5, 40, 7, 9])
    assert {token: times for token, (_, times) in found.items() if times > 0} == counted
    assert stream.adjustment.edits().masked == 0


def test_streams_that_ask_for_nothing_have_none():
    plain = Stream(request(), VOCAB, 4, frozenset({1}), None, eos_ids=(1,))
    plain.admitted(Extent(0, 64))
    assert plain.adjustment is None
    least = Stream(request(min_tokens=2, max_tokens=9), VOCAB, 4, frozenset({1}), None, eos_ids=(1,))
    least.admitted(Extent(0, 64))
    least.commit([5], 0)
    assert least.adjustment.edits().masked == 1
    least.commit([5], 0)
    assert least.adjustment is None  # and costs nothing any more
    assert not adjustments_of(SamplingParams(max_tokens=3, temperature=0.3, stop_token_ids=(4,)))


@pytest.mark.parametrize("field", [*ALL, "stop_token_ids"])
def test_streams_that_differ_in_their_adjustments_draw_apart(field):
    """Guards against two streams of one batch that share uniforms and are not the same."""
    one = request(prompt=(5, 6), temperature=1.0, seed=1, **ALL)
    fields = ALL | {field: {"logit_bias": (), "min_tokens": 3, "stop_token_ids": (7,)}.get(field, 1.1)}
    assert round_key(one) != round_key(request(prompt=(5, 6), temperature=1.0, seed=1, **fields))
    assert round_key(one) == round_key(request("other", prompt=(5, 6), temperature=1.0, seed=1, **ALL))


def test_the_order_of_what_is_done():
    """Bias first: a repetition penalty goes by the sign of what it gives. Then what is taken, and what is ruled out."""
    edits = adjustment(prompt=(0, 1, 2), stops=(4,), **ALL | {"logit_bias": ((0, 3.0), (3, 1.0), (4, 9.0))}).edits()
    rows = torch.tensor([[-1.0, -1.0, 2.0, 0.5, 1.0]]).repeat(3, 1)
    edit_block(rows, [2, 2], edits)
    assert rows[0].tolist() == pytest.approx([2.0 / 1.5, -1.5, 2.0 / 1.5, 1.5, -torch.inf])
    assert rows[1, 2] == pytest.approx(2.0 / 1.5 - 0.75 + 0.5)
    assert rows[2, 2] == pytest.approx(2.0 / 1.5 - 2 * 0.75 + 0.5)
    assert torch.equal(rows[2, [0, 1, 3, 4]], rows[0, [0, 1, 3, 4]])


@pytest.mark.parametrize("vocab", [1, 17, VOCAB])
def test_the_draft_vocabulary_has_its_own_indices(vocab):
    rng = np.random.default_rng(vocab)
    ids = np.sort(rng.permutation(VOCAB)[:vocab])
    a = adjustment(**ALL)
    for round_ in range(30):
        of_target, of_drafts = a.edits(), a.draft_edits(ids)
        assert of_drafts[2:] == of_target[2:]
        assert ids[of_drafts.stops].tolist() == [t for t in of_target.stops if t in ids]
        found = by_token(of_target)
        assert {int(ids[i]): v for i, v in by_token(of_drafts).items()} == {t: v for t, v in found.items() if t in ids}
        a.generated(rng.integers(0, VOCAB, round_ % 5).tolist())
    assert a.draft_edits(None).entries.tolist() == a.edits().entries.tolist()


def test_stop_tokens_that_no_model_has_rule_out_nothing():
    assert adjustment(stops=(-1, 1, VOCAB, 2**40), min_tokens=3).edits().stops.tolist() == [1]
    assert not adjustment(stops=(VOCAB,), min_tokens=3).active


@pytest.fixture(scope="module")
def context():
    if compiler() is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    return Context(1, best_isa())  # rows this short are done before a second thread has woken


@pytest.mark.parametrize("streams", [1, 5])
def test_rows_are_edited_as_by_torch(context, streams):
    """Any lengths, repeated drafts, drafts with a bias or not; rows in between are others' and stay as they are."""
    rng = np.random.default_rng(streams)
    scores = 3 * rng.standard_normal((60, VOCAB), dtype=np.float32)
    want, blocks, first = torch.from_numpy(scores.copy()), [], 1
    for n in range(streams):
        a = adjustment(**(ALL if n % 2 == 0 else {"min_tokens": 2, "frequency_penalty": 2.0}))
        a.generated(rng.integers(0, VOCAB, 2 * n).tolist())
        drafts = rng.integers(0, 9, n + 2).tolist()
        blocks.append(EditedBlock(first, drafts, a.edits()))
        edit_block(want[first : first + len(drafts) + 1], drafts, a.edits())
        first += len(drafts) + 3
    before = scores.copy()
    edit_rows(context, scores, blocks)
    torch.testing.assert_close(torch.from_numpy(scores), want, atol=1e-6, rtol=1e-6)
    mine = {block.first + j for block in blocks for j in range(len(block.drafts) + 1)}
    changed = (scores != before).any(1)
    assert changed[sorted(mine)].all()
    assert not changed[[row for row in range(60) if row not in mine]].any()


def test_the_best_are_the_first_of_the_greatest(context):
    scores = np.random.default_rng(1).integers(-9, 9, (7, 1003)).astype(np.float32)
    scores[2], scores[3, :1002], scores[4, 77] = -np.inf, -np.inf, np.nan
    want = scores.argmax(1).tolist()
    want[2] = want[4] = -1  # everything is ruled out; one score is no number
    assert best_tokens(context, scores, range(7)) == want
    assert best_tokens(context, scores, [5]) == [want[5]]
    assert best_tokens(context, scores, [6, 0, 6]) == [want[6], want[0], want[6]]
    for rows in ([7], [-1]):
        with pytest.raises(ValueError, match="not there"):
            best_tokens(context, scores, rows)


def test_edits_outside_are_refused(context):
    scores = np.zeros((3, VOCAB), dtype=np.float32)
    fine = adjustment(**ALL).edits()
    outside = np.array([(VOCAB, 1.0, 0)], dtype=EDIT)
    for block, said in (
        (EditedBlock(2, [3], fine), "rows"),
        (EditedBlock(-1, [3], fine), "rows"),
        (EditedBlock(0, [VOCAB], fine), "drafts"),
        (EditedBlock(0, [3], fine._replace(entries=outside)), "vocabulary"),
        (EditedBlock(0, [3], fine._replace(stops=np.array([-1], dtype=np.int32))), "vocabulary"),
        (EditedBlock(0, [3], fine._replace(stops=np.array([1]))), "another type"),
    ):
        with pytest.raises(ValueError, match=said):
            edit_rows(context, scores, [block])
    assert not scores.any()
