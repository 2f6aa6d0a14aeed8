"""Whether the engine does its work. One that has failed for good is noticed here, and everybody is told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from dspark_stream.engine.boundary import Engine
from dspark_stream.errors import EngineFailedError

log = logging.getLogger(__name__)

LOOK_PERIOD_S = 0.25
STUCK_AFTER_S = 30.0
"""An engine that has not come round its loop for this long makes no progress; it may yet."""
LOST_AFTER_S = 300.0
"""And for this long it has failed. Counted in looks of ours: a machine that slept makes nobody late."""


class Vitals:
    """Looks at the engine while `watch` runs, and whenever a probe asks. Used from the loop only.

    Args:
        engine: started before `watch` is.
        on_failure: called once, when the engine does no more work.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[EngineFailedError], None]) -> None:
        self.failed = asyncio.Event()
        self.error: EngineFailedError | None = None
        """Set once the engine has failed."""
        self._engine = engine
        self._on_failure = on_failure
        self._watching = False
        self._stuck_s = 0.0

    def status(self) -> str:
        """What is wrong with the engine; empty for nothing."""
        self._look()
        if self.error is not None:
            return "engine failed"
        if not self._watching:
            return "engine stopped"
        return "engine stuck" if self._engine.snapshot().last_step_age_s > STUCK_AFTER_S else ""

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        self._watching = True
        try:
            while not self._look():
                await asyncio.sleep(LOOK_PERIOD_S)
                stuck = self._engine.snapshot().last_step_age_s > STUCK_AFTER_S
                self._stuck_s = self._stuck_s + LOOK_PERIOD_S if stuck else 0.0
        except Exception:
            # Nobody would look any more: an engine that cannot say how it is, is not one to keep.
            log.exception("looking at the engine failed")
            self._fail("the engine does not say how it is")
        finally:
            self._watching = False

    def look_back(self) -> None:
        """Once more, after the engine was told to close and `watch` has ended: has it failed on the way?"""
        failure = self._engine.snapshot().failure
        if failure and self.error is None:
            self._fail(failure)

    def _look(self) -> bool:
        """Whether the engine has failed."""
        if self.error is not None or not self._watching:
            return self.error is not None
        engine = self._engine.snapshot()
        if engine.failure:
            self._fail(engine.failure)
        elif not engine.alive:
            self._fail("the engine has ended without a word")
        elif self._stuck_s > LOST_AFTER_S:
            self._fail(f"the engine has been in one step for more than {LOST_AFTER_S:g} s")
        return self.error is not None

    def _fail(self, reason: str) -> None:
        log.error("the engine has failed: %s", reason)
        self.error = EngineFailedError(reason)
        self.failed.set()
        self._on_failure(self.error)
