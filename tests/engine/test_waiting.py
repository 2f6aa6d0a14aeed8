"""Nobody is forgotten: streams of all kinds, cancelled, held and let go at random, in a memory too small for them all.

The engine is driven step by step, so that how long somebody waits is counted in steps and not by a machine's clock.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest

from dspark_stream.engine.stream import Phase
from dspark_stream.types import FinishedEvent, GenerationRequest, SamplingParams
from tiny import tiny_drafter, tiny_engine, tiny_rounds, tiny_target

SLOTS, SEATS, LONGEST = 160, 5, 120
STEPS = 700
HELD = 15
"""Steps for which a reader may be slow: the server's bound, in miniature."""
PATIENCE = 5 * LONGEST
"""Steps that a stream may wait for a place, with 14 streams at most about it: twice what was seen."""
STILL = 3 * SEATS
"""Steps without progress of a stream that has its slots and is not held: bounds on gaps make others take turns."""


@dataclass
class Watched:
    """One stream as its client sees it."""

    submitted: int
    progress: tuple[int, int] = (0, 0)
    since: int = 0
    """The step of its last progress, or from which on it could make any."""
    held_until: int = 0


class Crowd:
    """Submits, cancels, holds and lets go; looks after every step who has got how far."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        target = tiny_target()
        self.engine = tiny_engine(
            tiny_rounds(target, tiny_drafter(target), slots=SLOTS), slots=SLOTS, max_num_seqs=SEATS
        )
        self.watched: dict[str, Watched] = {}
        self.ends: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sent = self.step = 0

    def submit(self) -> None:
        chance, name = self.chance, str(self.sent)
        self.sent += 1
        big = chance.random() < 0.2
        prompt = chance.randint(20, 90) if big else chance.randint(1, 12)
        tokens = chance.randint(1, LONGEST - prompt if big else 12)
        sampling = SamplingParams(
            max_tokens=tokens,
            temperature=chance.choice((0.0, 1.0)),
            seed=self.sent,
            ignore_eos=chance.random() < 0.8,
            min_tokens=chance.choice((0, 0, 1)),
        )
        self.engine.submit(
            GenerationRequest(
                request_id=name,
                prompt_ids=tuple(chance.randrange(2, 48) for _ in range(prompt)),
                sampling=sampling,
                mode=chance.choice(("dspark", "plain")),
                verification=chance.choice(("rejection", "coupled")),
                max_chunk_gap_ms=chance.choice((0.0, 0.0, 0.0, 1.0, 500.0)),
                client=chance.choice(("flood", "flood", "flood", "a", "b", "")),
            )
        )
        self.watched[name] = Watched(self.step, since=self.step)

    def disturb(self) -> None:
        """What clients do at any time."""
        chance = self.chance
        for name, own in self.watched.items():
            if own.held_until and own.held_until <= self.step:
                self.engine.release(name)
                own.held_until = 0
            elif not own.held_until and chance.random() < 0.02:
                self.engine.hold(name)
                own.held_until = self.step + chance.randint(1, HELD)
            elif chance.random() < 0.01:
                self.engine.cancel(name)

    def advance(self) -> None:
        """A step of the engine, as its thread takes it, and a look at everybody."""
        engine = self.engine
        engine.cancel("nobody")  # something is in the inbox, or it would wait for it
        engine._take_commands()
        engine._admit()
        engine._step()
        self.step += 1
        for event in engine._events:
            if isinstance(event, FinishedEvent):
                self.ends[event.request_id] += 1
                self.reasons[event.reason] += 1
                self.watched.pop(event.request_id, None)
        engine._events.clear()
        for name, own in self.watched.items():
            self.look(own, engine._streams[name])

    def look(self, own: Watched, stream) -> None:
        waiting = stream.phase is Phase.WAITING
        progress = (stream.prefilled, stream.output_tokens)
        if waiting:
            assert self.step - own.submitted <= PATIENCE, "waits for a place"
        if waiting or stream.held or progress != own.progress:
            own.progress, own.since = progress, self.step
        assert self.step - own.since <= STILL, f"{stream.phase} stands still"


@pytest.mark.parametrize("seed", range(3))
def test_nobody_waits_while_others_go_on(seed):
    """Guards against streams that are never admitted, let go or given a turn again: they would hang in silence."""
    crowd = Crowd(seed)
    for _ in range(STEPS):
        if len(crowd.watched) < 14 and crowd.chance.random() < 0.6:
            crowd.submit()
        crowd.disturb()
        crowd.advance()
    for own in crowd.watched.values():
        own.held_until = min(own.held_until, crowd.step)
    for _ in range(20 * LONGEST):
        for name, own in crowd.watched.items():
            if own.held_until:
                crowd.engine.release(name)
                own.held_until = 0
        if not crowd.watched:
            break
        crowd.advance()
    assert not crowd.watched
    assert set(crowd.ends.values()) == {1}
    assert crowd.ends.total() == crowd.sent > STEPS / 10
    assert crowd.engine.snapshot().kv_tokens_used == 0
    assert {"length", "stop", "cancelled"} <= set(crowd.reasons)
    assert "failed" not in crowd.reasons
