"""What bench/drafter_*.py make of figures: by hand."""

import sys
from pathlib import Path

import pytest
import torch

from dspark_stream.decoding.draft import Block
from dspark_stream.decoding.noise import RoundUniforms
from dspark_stream.models.torch.distributions import Dense

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    for name in ("common", "drafter_shapes", "drafter_growth", "judging"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_accepted_length_of_fewer_drafts_than_were_verified():
    from drafter_shapes import length_of

    # of four rounds two accept the first draft, one of them the second as well: 1 + 2/4 + 1/4
    assert length_of([0.5, 0.5]) == pytest.approx(1.75)
    assert length_of([0.5, 0.5][:1]) == pytest.approx(1.5)
    assert length_of([]) == 1


def test_a_round_judged_both_ways():
    from judging import Watch, row

    watch = Watch(2)
    p, q = Dense(torch.tensor([[1 / 3, 2 / 3]] * 3)), Dense(torch.tensor([[2 / 3, 1 / 3]] * 2))
    for tokens in ([0, 1], [1, 0]):  # ratios ½ and 2, then 2 and ½
        block = Block(tokens=tokens, indices=tokens, q=q, uniforms=RoundUniforms(1, 0, 2))
        watch(p, 0, None, block, 2, None)
        watch(p, 0, None, block, 1, None)  # a part of a block does not count
    assert watch.by_token == [pytest.approx([0.5, 0.5]), pytest.approx([1.0, 0.5])]
    assert watch.by_block == [pytest.approx([0.5, 1.0]), pytest.approx([1.0, 0.5])]
    figures = row("x", watch)
    assert (figures["rounds"], figures["by_token"], figures["by_block"]) == (2, 2.25, 2.5)


def test_the_trend_and_how_sure_it_is():
    from drafter_growth import trend

    assert trend([0, 1, 2, 3], [1, 3, 5, 7]) == pytest.approx((1, 2, 0))
    _, b, error = trend([0, 1, 2], [0, 3, 0])  # left over 1, 4 and 1: √(6 / (3 - 2) / 2)
    assert (b, error) == pytest.approx((0, 3**0.5))


def test_rows_of_runs_that_went_on_from_one_another_add_up(tmp_path):
    from drafter_growth import last_rows

    log = tmp_path / "log.csv"
    log.write_text("kind,step,block_rows\ntrain,1,100\nheld_out,1,100\ntrain,2,250\n")
    assert last_rows(log) == 250
