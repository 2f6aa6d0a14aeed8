"""What the terminal says of answers, settings and conversations. Pure: no socket, and nothing heavy to import."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dspark_stream.console import printable, sgr, tint

HELP = """\
/plain            the next answers one token a pass
/dspark           the next answers with speculation
/set NAME VALUE   a sampling value as the API has it (temperature, top_p, seed, …); null for the service's own
/set              all of them
/system TEXT      the system message from now on; none without a text
/model            what is served
/new              forget the conversation
/save FILE        the conversation as .md or .json; /save! FILE replaces what is there
/stats            figures of the session so far
/help             this
/quit             leave (so does Ctrl-D); Ctrl-C stops an answer"""

Turns = Sequence[Mapping[str, str]]
SAVED_AS = (".md", ".json")
SETTINGS = {
    "temperature": "1",
    "top_p": "1",
    "top_k": "off",
    "min_p": "off",
    "max_output_tokens": "the service's own",
    "min_tokens": "0",
    "seed": "any",
    "stop": "none",
    "frequency_penalty": "0",
    "presence_penalty": "0",
    "repetition_penalty": "1",
}
"""What holds where nothing is said; `/set` alone shows these names, and takes every other one of the API too."""


@dataclass
class Figures:
    """Sums over the answers of one mode."""

    answers: int = 0
    tokens: int = 0
    guessed: int = 0
    """Of the tokens: drafted ahead and accepted."""
    timed_tokens: int = 0
    decode_ms: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0

    def add(self, *, tokens: int, rounds: int, drafted: int, accepted: int, decode_ms: float) -> None:
        """Add an answer."""
        self.answers += 1
        self.tokens += tokens
        # What a stop cut off the last round was its own token first, then accepted ones.
        self.guessed += max(accepted - max(0, rounds + accepted - tokens), 0)
        # The first token comes out of the prompt's own pass, before decoding time begins.
        self.timed_tokens += max(tokens - 1, 0)
        self.decode_ms += decode_ms
        self.rounds += rounds
        self.drafted += drafted
        self.accepted += accepted

    def words(self, why_none: str = "") -> str:
        """What was measured; ``why_none`` says why nothing was drafted, where that needs saying."""
        tokens = f"{self.tokens} token{'' if self.tokens == 1 else 's'}"
        if self.drafted and self.tokens:
            parts = [f"{round(100 * self.guessed / self.tokens)} % of {tokens} guessed ahead"]
            parts.append(f"{1 + self.accepted / self.rounds:.2f} tokens a round")
        else:
            parts = [f"{tokens}, {why_none}" if why_none and self.rounds else tokens]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:.1f} tokens a second")
        return ", ".join(parts)

    @property
    def tokens_per_s(self) -> float | None:
        """While decoding; None where nothing was timed."""
        return 1000 * self.timed_tokens / self.decode_ms if self.decode_ms > 0 and self.timed_tokens else None


def stats(totals: Mapping[str, Figures]) -> str:
    """The figures of a session, by mode; and of both modes against each other, where both were asked."""
    if not totals:
        return "no answers yet"
    lines = [f"{mode}: {f.answers} answer{'' if f.answers == 1 else 's'}, {f.words()}" for mode, f in totals.items()]
    speeds = [totals[mode].tokens_per_s if mode in totals else None for mode in ("dspark", "plain")]
    if speeds[0] and speeds[1]:
        lines.append(f"over these answers dspark was {speeds[0] / speeds[1]:.2f} × as fast as plain")
    return "\n".join(lines)


def why_none(mode: str, gamma: int, schedule: str) -> str:
    """Why an answer had no drafts."""
    if mode == "plain":
        return "one a pass"
    if schedule in ("none", "fixed:0"):
        return "nothing guessed ahead since drafting is switched off (serve --schedule)"
    if not gamma:
        return "nothing guessed ahead since there is no drafter (serve --drafter)"
    return "nothing drafted since it did not seem to pay (--schedule fixed:3 drafts all the same)"


def tinted(pieces: Iterable[tuple[str, bool]]) -> str:
    """Text of one round as a terminal shows it: what the drafter proposed is tinted, the target's own is plain."""
    runs = [(printable("".join(text for text, _ in run)), drafted) for drafted, run in groupby(pieces, lambda p: p[1])]
    return "".join(sgr(text, tint()) if drafted else text for text, drafted in runs)


def settings(chosen: Mapping[str, Any], recommended: Mapping[str, Any]) -> str:
    """A line for each sampling value: what was chosen, else what the model's makers recommend, else the default."""
    names = [*SETTINGS, *(name for name in chosen if name not in SETTINGS)]
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {_setting(name, chosen, recommended)}" for name in names)


def _setting(name: str, chosen: Mapping[str, Any], recommended: Mapping[str, Any]) -> str:
    if name in chosen:
        return json.dumps(chosen[name], ensure_ascii=False)
    if recommended.get(name) is not None:
        return f"{recommended[name]} (recommended for the model)"
    return f"{SETTINGS[name]} (default)"


def served(hello: Mapping[str, Any]) -> str:
    """What a service serves, from its greeting."""
    drafter = f"drafter {hello['drafter']} (γ = {hello['gamma']})" if hello["drafter"] else "no drafter"
    return (
        f"{hello['model']}, {drafter}, schedule {hello['schedule']}, {hello['limits']['max_model_len']} tokens of "
        f"context, dspark-stream {hello['version']}"
    )


def conversation(turns: Turns, suffix: str, *, model: str, chosen: Mapping[str, Any]) -> str:
    """A conversation as Markdown, or as JSON with the messages as the API takes them."""
    if suffix == ".json":
        return json.dumps({"model": model, "settings": chosen, "messages": turns}, ensure_ascii=False, indent=2) + "\n"
    parts = [f"# A conversation with {model}"]
    for turn in turns:
        parts += [f"## {turn['role'].capitalize()}", turn["content"].strip("\n")]
    return "\n\n".join(parts) + "\n"
