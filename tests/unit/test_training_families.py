"""Training goes on with a drafter of another family than its target, and with one that sees a window of the context."""

from __future__ import annotations

import pytest
import torch

from dspark_stream.console import SILENT
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import load_drafter, save_drafter
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.loading import LoadedTarget, load_target
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.training import pipeline
from dspark_stream.training.answers import Answer, Split
from dspark_stream.training.blocks import BlockAttend, make_batch, visible_context
from dspark_stream.training.features import compute_features
from dspark_stream.training.plan import TrainPlan, shaped
from dspark_stream.training.validate import WalkAttend, _context, _draft, walk
from tiny_families import SCALINGS, VOCAB, config_of, randomise, save

GAMMA, WINDOW = 3, 6
ANSWERS = [Answer((5, 6, 7), tuple((i * j) % 37 + 2 for j in range(20))) for i in range(1, 9)]


@pytest.fixture
def target(tmp_path):
    save(tmp_path / "target", "qwen2", SCALINGS["yarn"])
    return load_target(str(tmp_path / "target"), dtype="float32", device="cpu").target


def start_from(target, folder, family, window):
    """A drafter's folder, and the plan that goes on with it."""
    config = DrafterConfig(
        backbone=backbone_config(config_of(family, SCALINGS["linear"]), 2),
        num_layers=2,
        block_size=GAMMA,
        mask_token_id=0,
        target_layer_ids=(-1, 0),
        markov_rank=8,
        w1_of_drafts=True,
        context_window=window,
    )
    target.set_taps(config.target_layer_ids)
    drafter = Drafter(config, target, torch.arange(0, VOCAB, 2))
    randomise(drafter)
    save_drafter(drafter, folder, torch.float32)
    return shaped(TrainPlan(answers="-", init=str(folder), steps=25, batch=6, anchors=20, lr=5e-3))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("window", [0, WINDOW])
def test_it_learns_and_drafts_as_it_was_taught(target, tmp_path, family, window):
    plan = start_from(target, tmp_path / "start", family, window)
    loaded = LoadedTarget(target, None, "tiny", "")
    split = Split(ANSWERS[2:], ANSWERS[:2])
    trainer = pipeline.new_trainer(plan, loaded, split, tmp_path / "run", SILENT)
    drafter = trainer.drafter
    assert (drafter.config.family, drafter.context_window, drafter.gamma) == (family, window, GAMMA)
    losses = [trainer.train_step().total.item() for _ in range(25)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert set(walk(drafter, split.held_out, trainer.features.get([0, 1]))) == {""}
    save_drafter(drafter, tmp_path / "end", torch.float32)
    again = load_drafter(tmp_path / "end", target)
    assert (again.config.family, again.context_window, again.config.w1_of_drafts) == (family, window, True)

    features = compute_features(target, ANSWERS[:1])
    anchors = torch.tensor([4, 19])
    batch = make_batch(ANSWERS[:1], features, [anchors], gamma=GAMMA, mask_id=0)
    store = again.make_store(64)
    again.append_context(features[0].taps[:19], list(range(19)), list(range(19)), store)
    drafted = again.draft_hidden([(Extent(0, 64), 19, ANSWERS[0].ids[19])], store)[0]
    with torch.no_grad():
        taught = again.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(again, batch))
        assert torch.allclose(taught[-GAMMA:], drafted, atol=1e-3)
        attend = WalkAttend([_context(again, features[0])], GAMMA, again.context_window)
        attend.streams = [(0, 19)]
        walked = _draft(again, attend, [ANSWERS[0].ids[19]])
        base = again.base_logits(drafted[0])
        head = again.markov_head
        first = (base + head.bias(head.embed(torch.tensor(ANSWERS[0].ids[19])))).argmax()
        assert int(walked[0, 0]) == int(again.to_target_ids(first))
        if window:  # and is another without it
            again.context_window = 0
            other = again.block_hidden(batch.block_ids, batch.block_positions, BlockAttend(again, batch))
            assert torch.allclose(other[:GAMMA], taught[:GAMMA], atol=1e-4)
            assert not torch.allclose(other[-GAMMA:], taught[-GAMMA:], atol=1e-2)


def test_the_context_of_a_window():
    seen = visible_context(torch.tensor([1, 3]), 4, gamma=2, window=2)
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
