"""Tokens to text as they come: UTF-8 safe, linear in the length, stop strings found across rounds."""

from __future__ import annotations

from collections import deque

from tokenizers import Tokenizer as RawTokenizer
from tokenizers.decoders import DecodeStream

from dspark_stream.types import Piece


class StopStrings:
    """Finds the first stop string in a growing text and says how much of the end could still become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self._longest = max((len(s) for s in stop), default=0)
        self._tail = ""  # text not yet safe to release

    def feed(self, text: str) -> tuple[int, bool]:
        """Add text; returns how many characters of (held back + new) may be released, and whether to stop.

        On a stop the count ends just before the stop string, and the rest is never to be released.
        """
        self._tail += text
        found = min((i for s in self.stop if (i := self._tail.find(s)) >= 0), default=-1)
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
    """One stream's text. Without a tokenizer there is no text and no stop string, only tokens."""

    def __init__(self, tokenizer: RawTokenizer | None, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True) if tokenizer else None
        self._undecoded: list[int] = []  # tokens since the last whole character
        self._stop = StopStrings(stop)
        self._held: deque[Piece] = deque()  # decoded, not yet safe to release
        self._last_drafted = False

    def push(self, token: int, drafted: bool) -> tuple[list[Piece], bool]:
        """Add a token; returns the pieces now safe to send, and whether a stop string was completed."""
        if self._tokenizer is None or self._decoder is None:
            return [], False
        self._last_drafted = drafted
        text = self._decoder.step(self._tokenizer, token)
        if text is None:
            self._undecoded.append(token)
            return [], False
        self._undecoded.clear()
        return self._release(Piece(text, drafted))

    def finish(self) -> list[Piece]:
        """What was held back and did not become a stop string; half a character ends as U+FFFD."""
        if self._undecoded and self._tokenizer is not None:
            text = self._tokenizer.decode(self._undecoded, skip_special_tokens=True)
            self._undecoded.clear()
            pieces, stopped = self._release(Piece(text, self._last_drafted))
            if stopped:
                return pieces
        else:
            pieces = []
        pieces += self._held
        self._held.clear()
        return pieces

    def _release(self, piece: Piece) -> tuple[list[Piece], bool]:
        if piece.text:
            self._held.append(piece)
        count, stopped = self._stop.feed(piece.text)
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
