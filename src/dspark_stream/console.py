"""Text on a terminal. A leaf."""

from __future__ import annotations

from typing import TextIO

_SHOWN = {"\n", "\t"}


def printable(text: str) -> str:
    """Drop control characters: what a model writes must not steer the reader's terminal."""
    return "".join(c for c in text if (c >= " " and not "\x7f" <= c <= "\x9f") or c in _SHOWN)


def paint(text: str, code: str, stream: TextIO) -> str:
    """Colour ``text`` where ``stream`` is a terminal; ``code`` is an SGR code: 2 dims, 4 underlines."""
    return f"\x1b[{code}m{text}\x1b[0m" if text and stream.isatty() else text
