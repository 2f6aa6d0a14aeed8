"""Drafters of another family than their target, and drafters that see a window of the context: the same drafts on
torch, which keeps all positions, and on the kernels, which keep the latest in a ring.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark_kernels.cpu import Context, Kind, best_isa
from dspark_kernels.cpu import build as building
from dspark_stream.decoding.schedule import Fixed
from dspark_stream.engine.captured.runner import CapturedRounds
from dspark_stream.engine.context import Backlog, hand_over
from dspark_stream.engine.local import LocalEngine
from dspark_stream.models.cache import ExtentAllocator
from dspark_stream.models.checkpoint import load_drafter, save_drafter
from dspark_stream.models.drafter_config import DrafterConfig
from dspark_stream.models.loading import load_target
from dspark_stream.models.native.drafter import NativeDrafter
from dspark_stream.models.protocols import Draw
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.types import SamplingParams, TokensEvent
from tiny import request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target
from tiny_families import HIDDEN, SCALINGS, VOCAB, config_of, randomise, save

pytestmark = pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler: apt-get install g++")

WINDOW, GAMMA, LENGTH, DRAFT_VOCAB = 24, 4, 230, 40
POSITIONS = (3, WINDOW - 1, WINDOW, WINDOW + 1, 63, 64, 66, 130, LENGTH)
"""Of anchors: below the window, at it, where a ring of 64 comes round, and after it has done so three times."""
GREEDY = Draw(SamplingParams(max_tokens=1, temperature=0.0))
SAMPLED = Draw(SamplingParams(max_tokens=1, temperature=1.0), uniforms=(0.1, 0.5, 0.7, 0.9))
ROUNDED = 0.08
"""As in tests/unit/test_families.py; of few rows, of which one may be worse."""
PAIRS = [("qwen2", "qwen3"), ("llama", "qwen2"), ("qwen3", "gemma3_text"), ("gemma3_text", "llama"), ("llama", "llama")]


@pytest.fixture(scope="module")
def kernels():
    return Context(2, best_isa())


@pytest.fixture(scope="module")
def pair(tmp_path_factory, kernels):
    """The same target and drafter on torch and on the kernels."""

    def make(target_family, family, window):
        at = tmp_path_factory.mktemp("pair")
        save(at / "target", target_family, SCALINGS["plain"])
        plain = load_target(str(at / "target"), dtype="float32", device="cpu").target
        config = DrafterConfig(
            backbone=backbone_config(config_of(family, SCALINGS["yarn"]), 2),
            num_layers=2,
            block_size=GAMMA,
            mask_token_id=0,
            target_layer_ids=(-1, 0),
            markov_rank=32,
            w1_of_drafts=True,
            context_window=window,
        )
        ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(4))[:DRAFT_VOCAB].sort().values
        drafter = Drafter(config, plain, ids)
        randomise(drafter, seed=1)
        save_drafter(drafter.eval(), at / "drafter", torch.float32)
        native = load_target(str(at / "target"), kernels=kernels, kind=Kind.EIGHT).target
        return load_drafter(at / "drafter", plain), load_drafter(at / "drafter", native, Kind.EIGHT)

    return make


def off(got, want):
    return float((got - want).norm() / want.norm())


def taps_of(length=LENGTH, seed=2):
    return torch.randn(length, 2 * HIDDEN, generator=torch.Generator().manual_seed(seed))


class Streams:
    """Two streams' context in a store, handed over in pieces of all lengths as a backlog has them."""

    def __init__(self, drafter, taps=None):
        self.drafter, self.taps = drafter, (taps_of(), taps_of(seed=3)) if taps is None else taps
        ring = drafter.ring
        slots = ExtentAllocator(1024, ring, 4)
        slots.allocate(40)  # so that nobody's slots begin at 0
        self.extents = [slots.allocate(LENGTH + GAMMA) for _ in self.taps]
        self.store = drafter.make_store(4 * ring or 1024)
        self.at = [0 for _ in self.taps]

    def go_to(self, position):
        """Hand over what is before a position, by pieces."""
        lengths = np.random.default_rng(position).integers(1, 50, LENGTH)
        for r, (taps, extent) in enumerate(zip(self.taps, self.extents, strict=True)):
            for length in lengths:
                start, end = self.at[r], min(position, self.at[r] + int(length))
                backlog = Backlog()
                if end > start:
                    backlog.add(taps, start, end - start, start)
                    hand_over([(extent, backlog)], self.drafter, self.store)
                self.at[r] = max(end, start)

    def anchors(self, position):
        return [(extent, position, 5 + r) for r, extent in enumerate(self.extents)]

    def hidden(self, position, slots=GAMMA):
        self.go_to(position)
        return self.drafter.draft_hidden(self.anchors(position), self.store, slots).clone()

    def draft(self, position, draw=GREEDY, slots=GAMMA):
        self.go_to(position)
        return self.drafter.draft(self.anchors(position), self.store, slots, [draw] * len(self.taps)).tokens


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize(("target", "family"), PAIRS)
def test_the_same_drafts_on_torch_and_on_the_kernels(pair, target, family, window):
    on_torch, native = pair(target, family, window)
    assert isinstance(native, NativeDrafter)
    assert native.ring == (64 if window else 0)
    assert on_torch.config.w1_of_drafts
    assert native.config.w1_of_drafts
    a, b = Streams(on_torch), Streams(native)
    same = []
    for position in POSITIONS:
        for slots in (GAMMA, 2):
            assert off(b.hidden(position, slots), a.hidden(position, slots)) < ROUNDED
        for draw in (GREEDY, SAMPLED):
            same += (np.array(a.draft(position, draw)) == np.array(b.draft(position, draw))).ravel().tolist()
    assert np.mean(same) > 0.8  # the others are ties under rounding, and what comes after one
    if window:  # and what is compared is not the same without it
        on_torch.context_window = 0
        assert off(a.hidden(LENGTH), b.hidden(LENGTH)) > 3 * ROUNDED


@pytest.mark.parametrize(("target", "family"), PAIRS[:3])
def test_a_ring_is_a_store_of_all_positions(pair, monkeypatch, target, family):
    """To the bit: hidden states and drafts, after it has come round several times."""
    _, native = pair(target, family, WINDOW)
    ringed = Streams(native)
    found = [(ringed.hidden(p), ringed.draft(p), ringed.draft(p, SAMPLED), ringed.hidden(p, 1)) for p in POSITIONS]
    monkeypatch.setattr(NativeDrafter, "ring", 0)
    whole = Streams(native)
    assert ringed.store.arrays.ring == 64
    assert whole.store.arrays.ring == 0
    for position, (hidden, drafts, sampled, one) in zip(POSITIONS, found, strict=True):
        assert torch.equal(whole.hidden(position), hidden)
        assert whole.draft(position) == drafts
        assert whole.draft(position, SAMPLED) == sampled
        assert torch.equal(whole.hidden(position, 1), one)


@pytest.mark.parametrize("where", ["torch", "kernels"])
def test_a_window_is_what_it_says(pair, where):
    """The positions before the anchor that a block sees: none before them, and all of them."""
    drafter = pair("qwen2", "qwen3", WINDOW)[where == "kernels"]
    for position in (WINDOW + 1, 100, LENGTH):
        before = Streams(drafter).hidden(position)
        for changed, seen in ((position - WINDOW - 1, False), (position - WINDOW, True), (position - 1, True)):
            taps = (taps_of(), taps_of(seed=3))
            for own in taps:
                own[changed] *= -1
            same = [torch.equal(a, b) for a, b in zip(Streams(drafter, taps).hidden(position), before, strict=True)]
            assert same == [not seen] * 2


def test_a_long_piece_goes_round_the_ring_at_once(pair):
    """As a prompt does: of positions that share a slot the latest stays."""
    _, native = pair("llama", "qwen2", WINDOW)
    at_once, by_one = Streams(native), Streams(native)
    for r, extent in enumerate(at_once.extents):
        positions = list(range(LENGTH))
        native.append_context(at_once.taps[r], positions, extent.context_slots(positions, native.ring), at_once.store)
        at_once.at[r] = LENGTH
    assert torch.equal(at_once.hidden(LENGTH), by_one.hidden(LENGTH))


def test_drafters_of_all_families_are_read_back_as_they_are(pair, tmp_path):
    for target, family in PAIRS:
        drafter, native = pair(target, family, 0)
        assert (drafter.config.family, native.config.backbone.model_type) == (family, family)
        assert drafter.target.family == native.target.family == target
        save_drafter(drafter, tmp_path / family, torch.float32)
        again = load_drafter(tmp_path / family, drafter.target)
        assert all(torch.equal(a, again.state_dict()[name]) for name, a in drafter.state_dict().items())
        assert torch.equal(again.rope(torch.arange(50))[0], drafter.rope(torch.arange(50))[0])


def rounds_of(models, requests):
    """Tokens of all requests, and how many drafts each round accepted."""
    tokens, accepted = {}, []
    with LocalEngine(tiny_engine(models)) as local:
        for event, _ in local.run(requests, streams=4):
            if isinstance(event, TokensEvent):
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
                accepted += [] if event.round is None else [(event.request_id, event.round.accepted)]
    return tokens, sorted(accepted)


def test_captured_rounds_heed_it():
    """A sampled text depends on its drafts: with another window it is another."""
    requests = [
        request(f"r{i}", tuple(range(2, 9 + i)), max_tokens=40, temperature=0.9, seed=i, record_rounds=True)
        for i in range(4)
    ]
    found = []
    for window, captured in ((5, False), (5, True), (0, True)):
        target = tiny_target()
        rounds = tiny_rounds(target, tiny_drafter(target, context_window=window), schedule=Fixed(4))
        if captured:
            rounds = CapturedRounds(rounds.models, rounds.schedule, seats=4, longest=300, candidates=48)
        found.append(rounds_of(rounds, requests))
    assert len(found[0][1]) > 20
    assert found[1] == found[0]
    assert found[2] != found[1]
