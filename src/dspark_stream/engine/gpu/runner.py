"""The engine's streams on captured rounds: seats, the size of the next round, and results one round late.

While the host reads round n, round n+1 is already running: nothing on the device waits for the host, as long as the
same streams go on. A stream that turns out to have ended in round n took part in n+1 for nothing; its extent reaches a
block past its last token, so that it harmed nobody (`Stream.slots_needed`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from dspark_kernels.admission import BUDGET, EARLY_STOP, FIXED
from dspark_kernels.sequential_head import HeadWeights
from dspark_stream.engine.gpu.graphs import RoundLadder, Size, row_ladder
from dspark_stream.engine.gpu.round import RoundModels, run_round
from dspark_stream.engine.gpu.state import ALL_THAT_FITS, RoundState, Seat
from dspark_stream.engine.stream import Phase, Stream
from dspark_stream.errors import ConfigError
from dspark_stream.models.walk import head_weights
from dspark_stream.spec.calibration import logit
from dspark_stream.spec.draft import acceptance_of
from dspark_stream.spec.schedule import Adaptive, EarlyStop, Fixed, Lagged
from dspark_stream.spec.survival import prefix_survival
from dspark_stream.types import RoundRecord

if TYPE_CHECKING:
    from dspark_stream.engine.step import Committed, Models

MOST_SEATS = 128
"""Streams of one captured round: admission ranks all their drafts in one program."""
CANDIDATES = 128
"""Tokens a slot that the sequential head scores."""


class _Flight(NamedTuple):
    """A round that was started and not yet read."""

    streams: list[Stream]
    size: Size
    outcome: torch.Tensor
    survival: torch.Tensor
    done: torch.cuda.Event | None
    begun: float


class GraphRounds:
    """`engine.step.decode_round` over captured rounds; made once, after the models.

    Args:
        models: the engine's; their target must be a library model (not the CPU kernels).
        seats: most streams that decode at once.
        longest: most positions that a stream can hold, a block beyond its end included.
        candidates: tokens a slot that the sequential head scores.
        replace: another round in place of `run_round`, see `RoundLadder`.

    Raises:
        ConfigError: more seats than a captured round takes, or a schedule that it does not know.
    """

    def __init__(
        self,
        models: Models,
        *,
        seats: int,
        longest: int,
        candidates: int = CANDIDATES,
        replace: Callable[[RoundModels, RoundState, int, int, bool], None] = run_round,
    ) -> None:
        if seats > MOST_SEATS:
            raise ConfigError(
                f"max_num_seqs {seats}: a captured round takes at most {MOST_SEATS} streams; give fewer, or "
                "--cuda-graphs off",
                param="max_num_seqs",
            )
        if not isinstance(models.schedule, Fixed | Adaptive | EarlyStop | Lagged):
            raise ConfigError(
                f"captured rounds do not know the schedule {type(models.schedule).__name__}: choose adaptive, "
                "early-stop, lagged, fixed:N, or --cuda-graphs off",
                param="schedule",
            )
        self._models = models
        gamma = models.gamma
        device = models.target.device
        head: HeadWeights | None = head_weights(models.drafter) if models.drafter else None
        parts = RoundModels(
            models.target, models.target_kv, models.drafter, models.drafter_kv, head, candidates, longest
        )
        self.state = RoundState(seats, gamma, seats * (gamma + 1), device)
        fixed = models.schedule.length if isinstance(models.schedule, Fixed) else None
        self.ladder = RoundLadder(parts, self.state, fixed=fixed, replace=replace)
        self._early_stop = isinstance(models.schedule, EarlyStop)
        rule = [FIXED, fixed] if fixed is not None else [EARLY_STOP if self._early_stop else BUDGET, ALL_THAT_FITS]
        self.state.rule.copy_(torch.tensor(rule, dtype=torch.int32))
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
        self._survival: dict[Stream, list[float]] = {}
        """Prefix survivals of a round that has been read: at least two rounds old when the next size is chosen."""
        self._read_at = 0.0

    def decode_round(self, streams: Sequence[Stream]) -> list[Committed]:
        """Results of one round; while the same streams go on, the next one is already running."""
        wanted = list(streams)
        if wanted != self._seated:
            if self._flights:  # of the company before: what it committed stands
                committed = self._read(self._flights.pop(0))
                if committed:
                    return committed
            self._seat(wanted)
        if not self._flights:
            self._start()
        self._start()
        return self._read(self._flights.pop(0))

    def _seat(self, streams: list[Stream]) -> None:
        self._seated = streams
        self._survival = {s: a for s, a in self._survival.items() if s in streams}
        self.state.bind([self.seat_of(s) for s in streams])
        if self._early_stop and self.ladder.round_ms:
            self.state.sps.copy_(self._sps(len(streams)))

    def seat_of(self, stream: Stream) -> Seat:
        """What a stream brings to its seat."""
        acceptance = acceptance_of(stream)
        scaling = self._models.calibration.scaling(acceptance, self.state.gamma)
        return Seat(
            anchor=stream.anchor,
            position=stream.position,
            limit=len(stream.request.prompt_ids) - 1 + stream.sampling.max_tokens,
            slot=stream.extent.slot,
            drafts=stream.drafts,
            acceptance=acceptance,
            sampling=stream.sampling,
            round_key=stream.round_key,
            temperatures=scaling.temperatures,
            biases=scaling.biases,
        )

    # --- the size of a round ---------------------------------------------------------------------------------

    def _size(self) -> Size:
        """Fixed, or the number of rows that promised most by survivals that are two rounds old: never by live ones,
        since x_k must not decide about its own admission (design: the scheduler).
        """
        seats = self.ladder.fit_seats(len(self._seated))
        drafting = [s for s in self._seated if s.drafts]
        gamma = self._models.gamma
        if not drafting:
            return Size(seats, seats, False)
        if isinstance(self._models.schedule, Fixed):
            return Size(seats, seats * (1 + min(self._models.schedule.length, gamma)), True)
        if self._early_stop or not self.ladder.round_ms:
            return Size(seats, seats * (gamma + 1), True)
        past = prefix_survival(self._models.history.confidence())
        promised = sorted((a for s in drafting for a in self._survival.get(s, past)), reverse=True)
        streams = len(self._seated)

        def tokens_a_second(rows: int) -> float:
            return (streams + sum(promised[: rows - streams])) / self.ladder.round_ms[Size(seats, rows, True)]

        fitting = [rows for rows in row_ladder(seats, gamma) if rows >= streams]
        return Size(seats, max(fitting, key=tokens_a_second), True)

    def _sps(self, streams: int) -> torch.Tensor:
        """SPS(B) as captured rounds have it: a staircase of the measured sizes."""
        seats = self.ladder.fit_seats(streams)
        steps = sorted((s.rows, ms) for s, ms in self.ladder.round_ms.items() if s.seats == seats and s.drafting)
        table = [1000.0 / next((ms for rows, ms in steps if rows >= b), steps[-1][1]) for b in range(steps[-1][0] + 1)]
        out = torch.full((len(self.state.sps),), table[-1])
        out[: len(table)] = torch.tensor(table)
        return out

    # --- rounds ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        size = self._size()
        drafter = self._models.drafter
        if size.drafting and drafter is not None and drafter.confidence_head is None:
            self.state.history.copy_(torch.tensor([logit(c) for c in self._models.history.confidence()]))
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
        from dspark_stream.engine.step import Committed

        if flight.done is not None:
            flight.done.synchronize()
        now = time.perf_counter()
        round_ms = (now - max(flight.begun, self._read_at)) * 1e3
        self._read_at = now
        outcomes, survivals = flight.outcome.tolist(), flight.survival.tolist()
        batch_tokens = sum(length + 1 for _, _, length, *_ in outcomes[: len(flight.streams)])
        committed = []
        for stream, row, survival in zip(flight.streams, outcomes, survivals, strict=False):
            accepted, bonus, length, *tokens = row
            if accepted < 0 or stream.phase is not Phase.DECODE:
                continue  # it had ended when the round ran, or has since
            drafted = tokens if stream.drafts and flight.size.drafting else []
            promised = survival if drafted else []
            before = [1.0, *promised]
            record = RoundRecord(
                start=stream.position,
                anchor=stream.anchor,
                draft_tokens=drafted,
                scheduled=length,
                accepted=accepted,
                bonus=bonus,
                confidence=[a / b if b > 0 else 0.0 for a, b in zip(promised, before, strict=False)],
                survival=promised,
                t_draft_ms=0.0,  # one graph: its parts are not timed apart
                t_verify_ms=round_ms,
                batch_tokens=batch_tokens,
                streams=len(flight.streams),
            )
            stream.count_round(len(drafted), length, accepted)
            if drafted:
                self._models.history.record(length, accepted)
                self._survival[stream] = survival
            event, reason = stream.commit([*drafted[:accepted], bonus], accepted, record)
            committed.append(Committed(stream, event, reason, record))
        return committed
