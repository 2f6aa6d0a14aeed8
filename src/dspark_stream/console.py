"""Text for people on a terminal, and progress of long work: a moving bar there, a line now and then elsewhere. A leaf.

Progress goes to stderr, so that stdout stays for results::

    progress = Progress()
    with progress.stage("loading the target"):
        ...
    with progress.bar("profiling", total=len(sizes)) as bar:
        for size in sizes:
            ...
            bar.advance()
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TextIO, get_args

Colour = Literal["auto", "always", "never"]
COLOURS: tuple[Colour, ...] = get_args(Colour)
DIM = "2"
_UNDERLINE = "4"
_SHOWN = {"\n", "\t"}
_TERMINAL_EVERY_S = 0.1
_LOG_EVERY_S = 5.0
_STAGE_WORTH_A_TIME_S = 0.5


def printable(text: str) -> str:
    """Drop control characters: what a model writes must not steer the reader's terminal."""
    return "".join(c for c in text if (c >= " " and not "\x7f" <= c <= "\x9f") or c in _SHOWN)


def coloured(stream: TextIO, choice: Colour = "auto") -> bool:
    """Whether colours go to ``stream``. ``auto``: to a terminal, unless ``NO_COLOR`` is set or it knows none."""
    if choice != "auto":
        return choice == "always"
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, code: str, stream: TextIO, choice: Colour = "auto") -> str:
    """Colour ``text`` where `coloured` says so; ``code`` is an SGR code."""
    return sgr(text, code) if coloured(stream, choice) else text


def sgr(text: str, code: str) -> str:
    """Text under an SGR code, each line by itself: an open background fills the rest of a line on some terminals."""
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))


def tint() -> str:
    """The SGR code of a soft background, with letters that can be read on it whatever the terminal's own colours are.

    An underline where there are too few colours. ``COLORFGBG`` is how some terminals say that they are light.
    """
    if "256color" not in os.environ.get("TERM", "") and not os.environ.get("COLORTERM"):
        return _UNDERLINE
    light = os.environ.get("COLORFGBG", "").rpartition(";")[2] in ("7", "15")
    return "38;5;16;48;5;153" if light else "38;5;255;48;5;17"


class Progress:
    """Makes bars and stages on one stream. ``enabled=False`` shows nothing (for ``--json``, tests, tools)."""

    def __init__(self, stream: TextIO | None = None, *, enabled: bool = True) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._enabled = enabled
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print one line."""
        if self._enabled:
            with self._lock:
                self._stream.write(f"{text}\n")
                self._stream.flush()

    @contextmanager
    def stage(self, label: str) -> Iterator[None]:
        """Announce work whose length nobody knows, and say how long it took when it took a while."""
        self.say(f"{label} …")
        begun = time.monotonic()
        yield
        took_s = time.monotonic() - begun
        if took_s >= _STAGE_WORTH_A_TIME_S:
            self.say(f"{label}: done in {took_s:.1f} s")

    @contextmanager
    def bar(self, label: str, total: int | None, unit: str = "it", *, initial: int = 0) -> Iterator[Bar]:
        """Show work of a known length; ``unit`` "B" counts bytes, "s" seconds. Advance it from any one thread.

        ``initial``: how much was done before, which says nothing about the speed.
        """
        bar = Bar(self, label, total, unit, initial)
        try:
            yield bar
        finally:
            bar.finish()

    def _draw(self, meter: str, *, last: bool) -> None:
        if not self._enabled:
            return
        with self._lock:
            if self._terminal:
                self._stream.write("\r" + meter + "\x1b[K" + ("\n" if last else ""))
            else:
                self._stream.write(meter + "\n")
            self._stream.flush()


class Bar:
    """One bar; made by `Progress.bar`."""

    def __init__(self, owner: Progress, label: str, total: int | None, unit: str, initial: int = 0) -> None:
        self._owner = owner
        self._label = label
        self._total = total
        self._unit = unit
        self._initial = initial
        self._note = ""
        self._begun = time.monotonic()
        self._every_s = _TERMINAL_EVERY_S if owner._terminal else _LOG_EVERY_S
        self._drawn_at = self._begun
        self._drawn_done = -1
        self.done = initial
        if owner._enabled and owner._terminal:
            self._draw(last=False)

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Count ``amount`` more as done; ``note`` replaces the words after the bar."""
        self.reach(self.done + amount, note)

    def reach(self, done: int, note: str | None = None) -> None:
        """Set how much is done."""
        self.done = done
        if note is not None:
            self._note = note
        if time.monotonic() - self._drawn_at >= self._every_s:
            self._draw(last=False)

    def finish(self) -> None:
        """Draw the bar a last time, as it stands (a failure leaves it where it was)."""
        if self._owner._terminal or self._drawn_done != self.done:
            self._draw(last=True)

    def _draw(self, *, last: bool) -> None:
        if not self._owner._enabled or (self._total == 0 and not self.done):  # no work, no bar
            return
        from tqdm import tqdm

        self._drawn_at, self._drawn_done = time.monotonic(), self.done
        meter = tqdm.format_meter(
            n=self.done,
            total=self._total,
            initial=min(self._initial, self.done),
            elapsed=self._drawn_at - self._begun,
            ncols=100 if self._owner._terminal else None,
            prefix=self._label,
            ascii=None if self._owner._terminal else True,
            unit=self._unit,
            unit_scale=self._unit == "B",
            postfix=self._note or None,
            bar_format=_FORMATS[self._owner._terminal, self._unit == "s"],
        )
        self._owner._draw(meter, last=last)


_FORMATS = {
    (True, False): None,
    (True, True): "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]",
    (False, False): "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    (False, True): "{desc}: {percentage:3.0f}% [{elapsed}<{remaining}{postfix}]",
}
"""By whether it is a terminal, and whether the work is counted in seconds, which have no rate."""
SILENT = Progress(enabled=False)
"""Shows nothing."""
