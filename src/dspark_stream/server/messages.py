"""From what clients write as messages to (role, what is said).

Fields that say nothing here (``reasoning_content``, ``cache_control``, ids, names, annotations, empty lists of calls)
are read past, as other services do: histories come from many places. What would be lost is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspark_stream.errors import InvalidRequestError
from dspark_stream.server.refusals import NO_TOOLS, shorten, unsupported
from dspark_stream.types import Message, Text

ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
MAX_MESSAGES = 2048
"""As many as OpenAI takes, counted by their parts: each costs time on the loop, whatever is in it."""
TEXT_PARTS = ("text", "input_text", "output_text")
UNSAID = ("reasoning", "thinking", "redacted_thinking")
"""Parts and items of an earlier answer that chat templates leave out again."""
_BY_ID = "an item cannot be named by its id; send it, or go on with `previous_response_id`"


def input_messages(value: str | list[dict[str, Any]] | None, *, required: bool = True) -> tuple[Message, ...]:
    """Messages of ``input``; ``required``: something must be said in them.

    Raises:
        InvalidRequestError: ``param`` is the path of the field.
    """
    items: list[dict[str, Any]] = [{"role": "user", "content": value}] if isinstance(value, str) else value or []
    if value is None and required:
        raise _missing("input")
    _not_too_many(items, "input")
    messages: list[Message] = []
    for index, item in enumerate(items):
        path = "input" if isinstance(value, str) else f"input[{index}]"
        kind = item.get("type")
        if kind in UNSAID:
            continue
        if kind == "item_reference":
            raise unsupported(f"{path}.type", _BY_ID)
        if kind not in (None, "message"):
            calls = isinstance(kind, str) and ("call" in kind or "tool" in kind)
            reason = f"only messages are read, and {_shown(kind)} is none"
            raise unsupported(f"{path}.type", f"{reason}: {NO_TOOLS}" if calls else reason)
        messages.append((_role(item, path), _said(item, path)))
    return _not_empty(messages, "input") if required else tuple(messages)


def chat_messages(value: Sequence[dict[str, Any]]) -> tuple[Message, ...]:
    """Messages of ``messages``; raises as `input_messages`."""
    _not_too_many(value, "messages")
    messages: list[Message] = []
    for index, item in enumerate(value):
        path = f"messages[{index}]"
        role = _role(item, path)
        for name in ("tool_calls", "function_call"):
            if item.get(name) not in (None, [], {}):
                raise unsupported(f"{path}.{name}", NO_TOOLS)
        if item.get("audio") is not None:
            raise unsupported(f"{path}.audio", "the model reads and writes text only")
        refusal = item.get("refusal")
        if item.get("content") is None and isinstance(refusal, str):
            messages.append((role, refusal))
        else:
            messages.append((role, _said(item, path)))
    return _not_empty(messages, "messages")


def _not_too_many(messages: Sequence[dict[str, Any]], param: str) -> None:
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(f"`{param}` has {len(messages)} messages; at most {MAX_MESSAGES}", param=param)
    contents = [message.get("content") for message in messages]
    parts = sum(max(1, len(content)) if isinstance(content, list) else 1 for content in contents)
    if parts > MAX_MESSAGES:
        raise InvalidRequestError(f"`{param}` has {parts} parts of messages; at most {MAX_MESSAGES}", param=param)


def _role(item: dict[str, Any], path: str) -> str:
    role = item.get("role")
    if role is None:
        raise _missing(f"{path}.role")
    if role in ("tool", "function"):
        raise unsupported(f"{path}.role", NO_TOOLS)
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(
            f"`{path}.role`: {_shown(role)} is no role; known are {', '.join(ROLES)}", param=f"{path}.role"
        )
    return ROLES[role]


def _said(item: dict[str, Any], path: str) -> Text:
    path = path if path == "input" else f"{path}.content"
    content = item.get("content")
    if content is None:
        raise _missing(path)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _expected("str | array", content, path)
    texts = []
    for index, part in enumerate(content):
        text = _part(part, f"{path}[{index}]")
        if text is not None:
            texts.append(text)
    return texts[0] if len(texts) == 1 else tuple(texts) or ""


def _part(part: Any, path: str) -> str | None:
    """Text of a part; None for what a model is not shown again."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise _expected("str | object", part, path)
    kind = part.get("type")
    if kind in UNSAID:
        return None
    name = "refusal" if kind == "refusal" else "text"
    if kind not in (None, "refusal", *TEXT_PARTS):
        raise InvalidRequestError(
            f"`{path}.type`: {_shown(kind)} is not supported: the model reads only text ({', '.join(TEXT_PARTS)})",
            param=f"{path}.type",
            code="unsupported_value",
        )
    text = part.get(name)
    if text is None:
        raise _missing(f"{path}.{name}")
    if not isinstance(text, str):
        raise _expected("str", text, f"{path}.{name}")
    return text


def _not_empty(messages: list[Message], param: str) -> tuple[Message, ...]:
    if not any(any(said) for _, said in messages):
        raise InvalidRequestError(f"`{param}` is empty; it needs some text", param=param, code="empty_input")
    return tuple(messages)


def _missing(param: str) -> InvalidRequestError:
    return InvalidRequestError(f"`{param}` is required", param=param, code="missing_required_field")


_KINDS = {str: "str", bool: "bool", int: "int", float: "float", list: "array", dict: "object"}


def _expected(kinds: str, value: object, param: str) -> InvalidRequestError:
    got = _KINDS.get(type(value), "null")
    return InvalidRequestError(f"`{param}`: Expected `{kinds}`, got `{got}`", param=param, code="invalid_type")


def _shown(value: object) -> str:
    if not isinstance(value, str):
        return f"`{_KINDS.get(type(value), 'null')}`"
    return repr(shorten(value, 100))
