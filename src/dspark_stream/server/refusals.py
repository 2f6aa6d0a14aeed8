"""Fields that other services know and this one cannot honour: their harmless values pass, anything else is refused with
the reason why *it* is; nothing is silently ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from dspark_stream.errors import InvalidRequestError

NO_TOOLS = "calls of tools are not read out of a model's text"
_NO_GRAMMAR = "answers are not held to a schema or a grammar"
_NO_PROBABILITIES = "the probabilities of tokens do not leave the engine"
_ONE_ANSWER = "a request has one answer; send it as often as you want answers, they are decoded together"
_TEXT_ONLY = "the model reads and writes text only"
_ONE_TEMPLATE = "prompts are made by the model's own chat template, as it is"
_NOT_STEERED = "how much a model reasons or says is not steered; `max_tokens` and the prompt are"
_OWN_SEARCH = "one token after the other is drawn; there is no search over answers"
_TOKENS_ARE_TEXT = "answers leave as text without special tokens, and token ids do not leave at all"
_NOTHING_STORED = "nothing but responses is stored here"


MAX_NAMES = 64
"""Of what is looked at one by one: more than any client has reason to send."""


def shorten(text: str, most: int = 300) -> str:
    """An error repeats what the client wrote, but not a megabyte of it."""
    return text if len(text) <= most else text[: most - 3] + "..."


class Rule(NamedTuple):
    """Which values of a field ask for nothing, and why others are refused."""

    harmless: Callable[[Any], bool]
    reason: str


def _one_of(*values: object) -> Callable[[Any], bool]:
    # ``True == 1`` in Python, but not to a client.
    return lambda value: any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values)


def _empty(value: Any) -> bool:
    return value in ([], {})


def _never(value: Any) -> bool:
    return False


def _plain_text(value: Any) -> bool:
    """``text`` that asks for nothing but text."""
    return (
        isinstance(value, dict)
        and len(value) <= MAX_NAMES
        and set(value) <= {"format", "verbosity"}
        and value.get("format") in (None, {"type": "text"})
        and value.get("verbosity") in (None, "medium")
    )


def _no_reasoning(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_NAMES and all(v in (None, "none") for v in value.values())


def _of_items_that_never_come(value: Any) -> bool:
    """``include`` of what would belong to items that no answer here has."""
    if isinstance(value, list) and len(value) > MAX_NAMES:
        raise InvalidRequestError(f"`include` has {len(value)} names; at most {MAX_NAMES}", param="include")
    return isinstance(value, list) and all(
        isinstance(name, str) and not name.startswith("message.output_text") for name in value
    )


_TOOLS = Rule(_empty, NO_TOOLS)
_GRAMMAR = Rule(_never, _NO_GRAMMAR)
_OFF = _one_of(False)

RULES: Mapping[str, Rule] = {
    # tools
    "tools": _TOOLS,
    "tool_choice": Rule(_one_of("auto", "none"), NO_TOOLS),
    "functions": _TOOLS,
    "function_call": Rule(_one_of("none", "auto"), NO_TOOLS),
    "web_search_options": Rule(_never, "there is no search of the web"),
    # the form of the answer
    "response_format": Rule(_one_of({"type": "text"}), _NO_GRAMMAR),
    "text": Rule(_plain_text, f"{_NO_GRAMMAR}, and {_NOT_STEERED}"),
    "structured_outputs": _GRAMMAR,
    "guided_json": _GRAMMAR,
    "guided_regex": _GRAMMAR,
    "guided_choice": _GRAMMAR,
    "guided_grammar": _GRAMMAR,
    "grammar": _GRAMMAR,
    "json_schema": _GRAMMAR,
    "modalities": Rule(_one_of(["text"]), _TEXT_ONLY),
    "audio": Rule(_never, _TEXT_ONLY),
    "image": Rule(_never, _TEXT_ONLY),
    "mm_processor_kwargs": Rule(_empty, _TEXT_ONLY),
    "verbosity": Rule(_one_of("medium"), _NOT_STEERED),
    "reasoning": Rule(_no_reasoning, _NOT_STEERED),
    "reasoning_effort": Rule(_one_of("none"), _NOT_STEERED),
    "thinking_token_budget": Rule(_never, _NOT_STEERED),
    "suffix": Rule(_one_of(""), "texts are gone on with, not filled in"),
    "echo": Rule(_OFF, "the prompt is not repeated in the answer"),
    "skip_special_tokens": Rule(_one_of(True), _TOKENS_ARE_TEXT),
    "spaces_between_special_tokens": Rule(lambda value: isinstance(value, bool), _TOKENS_ARE_TEXT),
    "include_stop_str_in_output": Rule(_OFF, "answers end before the stop string"),
    "return_token_ids": Rule(_OFF, _TOKENS_ARE_TEXT),
    "return_tokens_as_token_ids": Rule(_OFF, _TOKENS_ARE_TEXT),
    # how many, and which
    "n": Rule(_one_of(1), _ONE_ANSWER),
    "best_of": Rule(_one_of(1), _ONE_ANSWER),
    "use_beam_search": Rule(_OFF, _OWN_SEARCH),
    "length_penalty": Rule(_one_of(1), _OWN_SEARCH),
    "logprobs": Rule(_OFF, _NO_PROBABILITIES),
    "top_logprobs": Rule(_one_of(0), _NO_PROBABILITIES),
    "prompt_logprobs": Rule(_OFF, _NO_PROBABILITIES),
    "include": Rule(_of_items_that_never_come, _NO_PROBABILITIES),
    "bad_words": Rule(_empty, "whole words are not forbidden; `logit_bias` of -100 forbids tokens"),
    "allowed_token_ids": Rule(_empty, "tokens are not chosen from a list; `logit_bias` makes some likelier"),
    "typical_p": Rule(_one_of(1), "this way of sampling is not there; `min_p` is the nearest"),
    "repeat_penalty": Rule(_one_of(1), "it is called `repetition_penalty` here"),
    "prediction": Rule(_never, "answers are predicted by the drafter, not by the request"),
    # the prompt
    "add_generation_prompt": Rule(_one_of(True), _ONE_TEMPLATE),
    "continue_final_message": Rule(_OFF, f"{_ONE_TEMPLATE}; /v1/completions goes on with any text"),
    "add_special_tokens": Rule(lambda value: isinstance(value, bool), _ONE_TEMPLATE),
    "chat_template": Rule(_never, _ONE_TEMPLATE),
    "chat_template_kwargs": Rule(_empty, _ONE_TEMPLATE),
    "documents": Rule(_empty, "documents belong into a message"),
    "truncate_prompt_tokens": Rule(_never, "a prompt is taken whole or refused"),
    "truncation": Rule(_one_of("disabled"), "a conversation is taken whole or refused"),
    "context_management": Rule(_empty, "a conversation is taken whole or refused"),
    "prompt": Rule(_never, "prompts are not kept here"),
    "conversation": Rule(_never, f"{_NOTHING_STORED}; `previous_response_id` goes on with one"),
    # the service
    "access_programs": Rule(_never, "there are no programs of access"),
    "background": Rule(_OFF, "a response lives as long as its connection"),
    "background_options": Rule(_never, "a response lives as long as its connection"),
    "moderation": Rule(_never, "texts are not moderated"),
    "service_tier": Rule(_one_of("auto", "default"), "there is one tier for all"),
    "priority": Rule(_one_of(0), "all requests have the same priority"),
}
"""Null is harmless everywhere: it means that a field is not there."""


def refuse_unsupported(body: msgspec.Struct, *, but: tuple[str, ...] = ()) -> None:
    """Raise for the first field that asks for something this service does not do, ``but`` those that this body has."""
    for name in body.__struct_fields__:
        rule = RULES.get(name) if name not in but else None
        value = getattr(body, name) if rule is not None else None
        if rule is not None and value is not None and not rule.harmless(value):
            raise unsupported(name, rule.reason)


def unsupported(param: str, reason: str) -> InvalidRequestError:
    """The error for a field that is known and cannot be honoured."""
    return InvalidRequestError(f"`{param}` is not supported: {reason}", param=param, code="unsupported_value")
