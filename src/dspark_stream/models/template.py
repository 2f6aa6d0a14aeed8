"""Chat templates as model files carry them: Jinja in a sandbox, with what Hugging Face's templates expect of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dspark_stream.errors import InvalidRequestError, ModelLoadError
from dspark_stream.types import Message, Text

MARK = "\u2045mark\u2046"
"""A text that no template writes by itself: where it shows up, there the template put a message's content."""


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``: which tokens training learns from. Here only its body counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One template, with the special tokens' texts that it may ask for.

    Raises:
        ModelLoadError: it does not parse.
    """

    def __init__(self, source: str, special: Mapping[str, str | None]) -> None:
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        env.globals["raise_exception"] = _refuse
        env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        env.filters["tojson"] = _to_json
        try:
            self._template = env.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelLoadError(f"the model's chat template does not parse: {error}", param="model") from error
        # templates add these to texts: none is an empty one
        self._special = {name: text or "" for name, text in special.items()}
        self._in_parts: frozenset[str] = frozenset()
        """Roles whose texts the template reads only in a list of parts."""
        self._reads_parts: frozenset[str] = frozenset()
        """Roles whose parts the template puts together itself; for the others a line break does."""
        for role in ("user", "assistant", "system"):
            as_text = self._probe(role, MARK)
            self._in_parts |= {role}
            self._reads_parts |= {role}
            listed, several = self._probe(role, MARK), self._probe(role, (MARK, MARK))
            if MARK in as_text or MARK not in listed:
                self._in_parts -= {role}
            # some write a list down as if it were a text, and some show its first part alone
            if (
                MARK not in listed
                or (MARK in as_text and listed != as_text)
                or several.count(MARK) <= listed.count(MARK)
            ):
                self._reads_parts -= {role}

    def _probe(self, role: str, said: Text) -> str:
        """How the template shows what somebody says in this role: those that ask for a list of parts read nothing in a
        string, or fail at it (which counts as nothing, too)."""
        before: list[Message] = [("user", "a")] if role == "assistant" else []
        after: list[Message] = [("user", "a")] if role == "system" else []
        try:
            return self.render([*before, (role, said), *after])
        except InvalidRequestError:
            return ""

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Text of a conversation; with ``answer`` up to where the assistant begins to speak.

        Raises:
            InvalidRequestError: the template refuses these messages (``param`` is ``input``).
        """
        turns = [{"role": role, "content": self._content(role, said)} for role, said in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=answer, tools=None, documents=None, **self._special
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RuntimeError,
        ) as error:
            raise InvalidRequestError(f"the model's chat template refuses this: {error}", param="input") from error

    def _content(self, role: str, said: Text) -> str | list[dict[str, str]]:
        kind = role if role in ("assistant", "system") else "user"
        if not isinstance(said, str) and kind in self._reads_parts:
            return [{"type": "text", "text": text} for text in said]
        return [{"type": "text", "text": as_one(said)}] if kind in self._in_parts else as_one(said)

    def after_answer(self) -> list[str]:
        """What the template writes right behind an assistant's turn: before a next turn, and at the end."""
        found = []
        nexts: tuple[list[Message], ...] = ([("user", "a")], [])
        for then in nexts:
            try:
                _, shown, rest = self.render([("user", "a"), ("assistant", MARK), *then], answer=False).rpartition(MARK)
            except InvalidRequestError:
                continue
            if shown:
                found.append(rest)
        return found


def as_one(said: Text) -> str:
    """What is said as one text: parts on lines of their own."""
    return said if isinstance(said, str) else "\n".join(said)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
