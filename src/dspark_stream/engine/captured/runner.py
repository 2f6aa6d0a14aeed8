"""The engine's streams on captured rounds: seats, the size of the next round, and results one round late.

While the host reads round n, round n+1 is already running: nothing on the device waits for the host, as long as the
same streams go on. A stream that turns out to have ended in round n took part in n+1 for nothing; its extent reaches a
block past its last token, so that it harmed nobody (`Stream.slots_needed`).

Where a stream's logits are adjusted (penalties, biases), rounds are run one by one and operation by operation: what the
next one needs to know of this one's tokens is on the host.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace as replaced
from math import inf
from typing import NamedTuple

import numpy as np
import torch

from dspark_kernels.admission import BUDGET, EARLY_STOP, FIXED, THRESHOLD
from dspark_stream.decoding.accept import Outcome
from dspark_stream.decoding.calibration import logit
from dspark_stream.decoding.draft import Block
from dspark_stream.decoding.schedule import Adaptive, EarlyStop, Fixed, Lagged, Schedule, Threshold
from dspark_stream.engine.captured.graphs import Round, RoundLadder, Size
from dspark_stream.engine.captured.round import RoundModels, run_round
from dspark_stream.engine.captured.sizing import CapturedCurve, Sizing
from dspark_stream.engine.captured.state import ALL_THAT_FITS, RoundState, Seat
from dspark_stream.engine.context import Context
from dspark_stream.engine.prompts import prefill
from dspark_stream.engine.rounds import Committed, Judged, Models, RoundCounters, Timings, settle
from dspark_stream.engine.stream import Phase, Stream
from dspark_stream.errors import ConfigError
from dspark_stream.load.controller import Controller, Learnt
from dspark_stream.load.costs import Company
from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.models.torch.head_weights import head_weights
from dspark_stream.models.torch.store import KVStore
from dspark_stream.models.torch.target import Target

MOST_SEATS = 128
"""Streams of one captured round: admission ranks all their drafts in one program."""
CANDIDATES = 1024
"""Tokens a slot that the sequential head scores. Too few cost acceptance: a Markov head's bias lifts tokens from far
below the best base logits (docs/gpu.md, a round)."""


def rule_of(schedule: Schedule) -> list[int]:
    """The admission rule of a schedule and its number (kernels/dspark_kernels/admission).

    Raises:
        ConfigError: there is none.
    """
    match schedule:
        case Fixed(length):
            return [FIXED, length]
        case Threshold(least):
            return [THRESHOLD, int(np.float32(least).view(np.int32))]
        case EarlyStop():
            return [EARLY_STOP, 0]
        case Adaptive() | Lagged():
            return [BUDGET, ALL_THAT_FITS]
    raise ConfigError(
        f"captured rounds do not know the schedule {type(schedule).__name__}: choose another, or --cuda-graphs off",
        param="schedule",
    )


def _on_torch(models: Models, candidates: int, longest: int) -> RoundModels:
    """What rounds are captured of.

    Raises:
        ConfigError: models that cannot be captured.
    """
    target, drafter = models.target, models.drafter
    stores = (models.target_kv, models.drafter_kv)
    if (
        not isinstance(target, Target)
        or not isinstance(drafter, Drafter | None)
        or not isinstance(stores[0], KVStore)
        or not isinstance(stores[1], KVStore | None)
    ):
        raise ConfigError(
            "cuda_graphs: rounds of models on the CPU kernels cannot be captured: --cuda-graphs off",
            param="cuda_graphs",
        )
    head = head_weights(drafter) if drafter is not None else None
    return RoundModels(target, stores[0], drafter, stores[1], head, candidates, longest)


class _Flight(NamedTuple):
    """A round that was started and not yet read."""

    streams: list[Stream]
    size: Size
    outcome: torch.Tensor
    survival: torch.Tensor
    done: torch.cuda.Event | None
    begun: float
    """When it was started; before the previous one was read, if it followed that at once."""


class CapturedRounds:
    """`rounds.Rounds` that were captured; made once, after the models.

    Args:
        models: the engine's; their target must be a library model (not the CPU kernels).
        schedule: what the first ones go by.
        seats: most streams that decode at once.
        longest: most positions that a stream can hold, a block beyond its end included.
        candidates: tokens a slot that the sequential head scores.
        replace: another round in place of `run_round`, see `RoundLadder`.

    Raises:
        ConfigError: more seats than a captured round takes, a schedule that it does not know, or a model that cannot
            be captured.
    """

    looks_up = False

    def __init__(
        self,
        models: Models,
        schedule: Schedule,
        *,
        seats: int,
        longest: int,
        candidates: int = CANDIDATES,
        replace: Round = run_round,
    ) -> None:
        if seats > MOST_SEATS:
            raise ConfigError(
                f"max_num_seqs {seats}: a captured round takes at most {MOST_SEATS} streams; give fewer, or "
                "--cuda-graphs off",
                param="max_num_seqs",
            )
        self.schedule = schedule
        self.context = Context(models.drafter, models.drafter_kv, waits=False)
        gamma = models.gamma
        device = models.target.device
        parts = _on_torch(models, candidates, longest)
        self.state = RoundState(seats, gamma, seats * (gamma + 1), device)
        self.ladder = RoundLadder(parts, self.state, replace=replace)
        curve = CapturedCurve.over(self.ladder, models.capacity)
        self.models = replaced(models, controller=Controller(gamma, curve))
        self.sizing = Sizing(self.ladder, schedule, self.models.controller, gamma)
        pinned = device.type == "cuda"
        width = self.state.outcome.shape[1]
        self._hosts = [
            (
                torch.empty(seats, width, dtype=torch.int32, pin_memory=pinned),
                torch.empty(seats, gamma, pin_memory=pinned),
            )
            for _ in range(2)
        ]
        self._turn = 0
        self._seated: list[Stream] = []
        self._flights: list[_Flight] = []
        self._read_at, self._disturbed = 0.0, 0
        self._follow(schedule)

    def decode(self, streams: Sequence[Stream], slowest_ms: float = inf) -> list[Committed]:
        """Results of one round; while the same streams go on, the next one is already running.

        ``slowest_ms``: of the round that is started.
        """
        wanted = list(streams)
        if wanted != self._seated or self.schedule != self.sizing.schedule:
            if self._flights:  # of the company before: what it committed stands
                committed = self._read(self._flights.pop(0))
                if committed:
                    return committed
            if self.schedule != self.sizing.schedule:
                self._follow(self.schedule)
            self._seat(wanted)
        if not self._flights:
            self._start(slowest_ms)
        if not self.state.adjustments:  # the next round's need what this one commits
            self._start(slowest_ms)
        return self._read(self._flights.pop(0))

    def prefill(self, shares: Sequence[tuple[Stream, int]], company: Sequence[Stream]) -> list[Committed]:
        """See `prompts.prefill`."""
        self.rest()
        return prefill(self.models, self.context, shares, company)

    def prompt_ms(self, tokens: Sequence[int], position: int) -> list[float]:
        """See `rounds.Rounds`. Captured rounds say nothing of them."""
        return list(self.models.capacity.pass_ms(tokens, Company(1, position)))

    def rest(self) -> None:
        """See `rounds.Rounds`. Rounds that are under way, and the next one, tell no times."""
        self._disturbed = 1 + len(self._flights)
        self.models.controller.costs.rest()

    def forget(self) -> None:
        """Something failed: nobody is seated, and what is under way is read by nobody."""
        self._flights.clear()
        self._seated = []

    def counters(self) -> RoundCounters:
        """See `rounds.Rounds`."""
        return RoundCounters(self.models.controller.looks, self.models.controller.costs.pace)

    def _follow(self, schedule: Schedule) -> None:
        """Go by ``schedule``, and time the sizes that it needs and the one before did not, if sizes are timed at all.

        Raises:
            ConfigError: rounds do not know it.
        """
        self.state.rule.copy_(torch.tensor(rule_of(schedule), dtype=torch.int32))
        self.ladder.fixed = schedule.length if isinstance(schedule, Fixed) else None
        self.sizing.follow(schedule)
        if self.ladder.round_ms:
            self.ladder.warm()
        self.rest()
        self.models.controller.costs.look_again()

    def _seat(self, streams: list[Stream]) -> None:
        self._seated = streams
        self.state.bind([self.seat_of(s) for s in streams])
        if (table := self.sizing.steps_a_second(len(streams))) is not None:
            self.state.sps[: len(table)].copy_(torch.tensor(table))
            self.state.sps[len(table) :] = table[-1]

    def seat_of(self, stream: Stream) -> Seat:
        """What a stream brings to its seat."""
        scaling = self.models.calibration.scaling(stream.acceptance, self.state.gamma)
        return Seat(
            anchor=stream.anchor,
            position=stream.position,
            limit=len(stream.request.prompt_ids) - 1 + stream.sampling.max_tokens,
            slot=stream.extent.slot,
            drafts=stream.drafts,
            acceptance=stream.acceptance,
            sampling=stream.sampling,
            round_key=stream.round_key,
            temperatures=scaling.temperatures,
            biases=scaling.biases,
        )

    # --- rounds ------------------------------------------------------------------------------------------------

    def _start(self, slowest_ms: float) -> None:
        adjustments = [s.adjustment for s in self._seated]
        self.state.adjustments = adjustments if any(adjustments) else []
        size = self.sizing.choose(self._seated, slowest_ms)
        drafter = self.models.drafter
        if size.drafting and drafter is not None and not drafter.has_confidence:
            self.state.history.copy_(torch.tensor([logit(c) for c in self.models.history.confidence()]))
        begun = time.perf_counter()
        self.ladder.run(size)
        outcome, survival = self._hosts[self._turn]
        self._turn = 1 - self._turn
        outcome.copy_(self.state.outcome, non_blocking=True)
        survival.copy_(self.state.survival, non_blocking=True)
        done = None
        if self.state.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        self._flights.append(_Flight(self._seated, size, outcome, survival, done, begun))

    def _read(self, flight: _Flight) -> list[Committed]:
        """Wait for a round and commit what it did for the streams that still go on."""
        if flight.done is not None:
            flight.done.synchronize()
        now = time.perf_counter()
        round_ms = (now - max(flight.begun, self._read_at)) * 1e3
        timed = flight.begun < self._read_at and not self._disturbed  # it followed another one at once
        self._read_at, self._disturbed = now, max(0, self._disturbed - 1)
        outcomes, survivals = flight.outcome.tolist(), flight.survival.tolist()
        batch_tokens = sum(length + 1 for _, _, length, *_ in outcomes[: len(flight.streams)])
        judged: list[Judged] = []
        learnt: list[Learnt] = []
        for stream, row, survival in zip(flight.streams, outcomes, survivals, strict=False):
            accepted, bonus, length, *tokens = row
            if accepted < 0 or stream.phase is not Phase.DECODE:
                continue  # it had ended when the round ran, or has since
            block = Block()
            if stream.drafts and flight.size.drafting:
                confidence = [a / b if b > 0 else 0.0 for a, b in zip(survival, [1.0, *survival], strict=False)]
                block = Block(tokens, confidence, survival)
            judged.append(Judged(stream, block, length, Outcome(accepted, bonus)))
            learnt.append((stream.past, block.survival, length, accepted))
        self._learn(flight, learnt, round_ms if timed else None)
        timings = Timings(0.0, round_ms)  # one graph: its parts are not timed apart
        history, streams = self.models.history, len(flight.streams)
        return settle(judged, history, timings, batch_tokens=batch_tokens, streams=streams)

    def _learn(self, flight: _Flight, learnt: Sequence[Learnt], round_ms: float | None) -> None:
        """A round that was not timed counts as what it should have taken, and is nobody's neighbour."""
        controller, shape = self.models.controller, self.sizing.shape(len(flight.streams), flight.size)
        if round_ms is not None:
            controller.learn(learnt, shape, round_ms)
            return
        controller.costs.rest()
        controller.learn(learnt, shape, controller.costs.pace * controller.costs.ms(shape))
        controller.costs.rest()
