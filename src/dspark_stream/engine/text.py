"""Tokens to text as they come: UTF-8 safe, linear in the length, stop strings found across rounds."""

from __future__ import annotations

import codecs
from collections import deque

from dspark_stream.models.tokenizer import TokenBytes
from dspark_stream.types import Piece


class StopStrings:
    """Finds the first stop string in a growing text and says how much of the end could still become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self._longest = max((len(s) for s in stop), default=0)
        self._tail = ""  # text not yet safe to release

    def feed(self, text: str, counts: bool = True) -> tuple[int, bool]:
        """Add text; returns how many characters of (held back + new) may be released, and whether to stop.

        On a stop the count ends just before the stop string, and the rest is never to be released. A stop string that
        ends within text that does not ``count`` is none.
        """
        held = len(self._tail)
        self._tail += text
        found = -1
        if counts:
            ends = ((s, max(0, held - len(s) + 1)) for s in self.stop)  # what ended before did not count
            found = min((i for s, start in ends if (i := self._tail.find(s, start)) >= 0), default=-1)
        if found >= 0:
            self._tail = ""
            return found, True
        keep = 0
        for n in range(min(self._longest - 1, len(self._tail)), 0, -1):
            if any(s.startswith(self._tail[-n:]) for s in self.stop):
                keep = n
                break
        release = len(self._tail) - keep
        self._tail = self._tail[release:]
        return release, False


class TextStream:
    """One stream's text. Without a tokenizer there is no text and no stop string, only tokens.

    Tokens become bytes and bytes become characters as soon as they are whole; what can no longer become a character
    is U+FFFD at once. The `tokenizers` library's own decode stream was turned down: it raises for byte tokens that
    are no UTF-8, and decodes again everything since its last character for each token that brings none.
    """

    def __init__(self, token_bytes: TokenBytes | None, stop: tuple[str, ...]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True
        self._stop = StopStrings(stop)
        self._held: deque[Piece] = deque()  # decoded, not yet safe to release
        self._last_drafted = False

    def push(self, token: int, drafted: bool, may_stop: bool = True) -> tuple[list[Piece], bool]:
        """Add a token; returns the pieces now safe to send, and whether a stop string was completed: none is by a token
        at which the text ``may`` not ``stop`` yet."""
        if self._token_bytes is None:
            return [], False
        self._last_drafted = drafted
        return self._release(self._utf8.decode(self._token_bytes[token]), drafted, may_stop)

    def finish(self) -> list[Piece]:
        """What was held back and did not become a stop string; half a character ends as U+FFFD."""
        pieces, stopped = self._release(self._utf8.decode(b"", True), self._last_drafted)
        if not stopped:
            pieces += self._held
        self._held.clear()
        return pieces

    def _release(self, text: str, drafted: bool, may_stop: bool = True) -> tuple[list[Piece], bool]:
        if not text:
            return [], False
        if self._at_start:
            self._at_start = False
            if self._token_bytes is not None and self._token_bytes.strips_first_space:
                text = text.removeprefix(" ")
        if text:
            self._held.append(Piece(text, drafted))
        count, stopped = self._stop.feed(text, may_stop)
        out: list[Piece] = []
        while count and self._held:
            head = self._held.popleft()
            if len(head.text) > count:
                self._held.appendleft(Piece(head.text[count:], head.drafted))
                head = Piece(head.text[:count], head.drafted)
            count -= len(head.text)
            out.append(head)
        if stopped:
            self._held.clear()
        return out, stopped
