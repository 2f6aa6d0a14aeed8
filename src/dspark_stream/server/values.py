"""Checks of single values: in range and defaults filled in, or an error that names the field and its limit."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_stream.errors import InvalidRequestError
from dspark_stream.server.bodies import StreamOptions
from dspark_stream.server.refusals import unsupported
from dspark_stream.types import MAX_BIASES, MAX_SEED, RANGES, Range

UNLIMITED = -1
"""As a limit of tokens: all that there is room for."""
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 64
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


def either(value: Any, param: str, extra: Any) -> tuple[Any, str]:
    """A field that has two homes: at the top, as vLLM has it, or in ``dspark``."""
    return (value, param) if value is not None else (extra, f"dspark.{param}")


def ranged(value: float | None, param: str, allowed: Range, *, default: float) -> float:
    """A number of a range."""
    if value is None:
        return default
    if value not in allowed:
        raise InvalidRequestError(f"`{param}` must be {allowed}, but is {value}", param=param)
    return value


def number(value: int) -> str:
    """An integer as an error or a warning shows it."""
    return str(value) if abs(value) < 10**24 else "out of any range"


def max_tokens(value: int | None, param: str) -> int | None:
    """A limit of tokens, `UNLIMITED` or None; what there is no room for is cut later, and said."""
    if value is not None and value < 1 and value != UNLIMITED:
        raise InvalidRequestError(
            f"`{param}` must be at least 1, or -1 for as many as fit, but is {number(value)}", param=param
        )
    return value


def min_tokens(value: int | None, limit: int | None, limit_param: str) -> int:
    """A least number of tokens, not above the limit that the same request sets."""
    if value is None:
        return 0
    if value < 0 or (limit is not None and limit != UNLIMITED and value > limit):
        high = "" if limit is None or limit == UNLIMITED else f" and at most `{limit_param}`, {number(limit)}"
        raise InvalidRequestError(f"`min_tokens` must be at least 0{high}, but is {number(value)}", param="min_tokens")
    return value


def top_k(value: int | None, param: str, vocab_size: int, default: int) -> int:
    """A number of candidates; 0 and -1, which is vLLM's word for it, are off."""
    if value is None:
        return default
    if not -1 <= value <= vocab_size:
        raise InvalidRequestError(
            f"`{param}` must be from 0 (off) to {vocab_size}, but is {number(value)}", param=param
        )
    return max(value, 0)


def seed(value: int | None, param: str) -> tuple[int, bool]:
    """The engine's seed, and whether the request chose it: -1 means any, as in llama.cpp and vLLM.

    Every 64-bit number is taken, signed or not; the engine has 63 bits, and the sign's is left out.
    """
    if value is None or value == -1:
        # so few that a client can repeat it whose only numbers are JavaScript's
        return secrets.randbits(53), False
    if not -(2**63) <= value < 2**64:
        raise InvalidRequestError(f"`{param}` must be a 64-bit number, but is {number(value)}", param=param)
    return value & MAX_SEED, True


def stop(value: str | list[str] | None, param: str) -> tuple[str, ...]:
    """Stop strings."""
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else tuple(value)
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequestError(f"`{param}` has {len(strings)} strings; at most {MAX_STOP_STRINGS}", param=param)
    for index, text in enumerate(strings):
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            where = param if isinstance(value, str) else f"{param}[{index}]"
            raise InvalidRequestError(
                f"`{where}` must be 1 to {MAX_STOP_CHARS} characters long, but has {len(text)}", param=where
            )
    return strings


def token_ids(value: Sequence[Any] | None, param: str, vocab_size: int, *, most: int | None = None) -> tuple[int, ...]:
    """Ids of the vocabulary."""
    ids = tuple(value or ())
    if most is not None and len(ids) > most:
        raise InvalidRequestError(f"`{param}` has {len(ids)} ids; at most {most}", param=param)
    for index, token in enumerate(ids):
        if type(token) is not int or not 0 <= token < vocab_size:
            shown = number(token) if type(token) is int else "no integer"
            raise InvalidRequestError(
                f"`{param}[{index}]` must be a token id from 0 to {vocab_size - 1}, but is {shown}",
                param=f"{param}[{index}]",
            )
    return ids


def logit_bias(value: Mapping[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """(token id, bias) by ascending id, those of 0 left out."""
    if not value:
        return ()
    if len(value) > MAX_BIASES:
        raise InvalidRequestError(f"`logit_bias` has {len(value)} tokens; at most {MAX_BIASES}", param="logit_bias")
    biases = {}
    for key, bias in value.items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) < 12 else -1
        if not 0 <= token < vocab_size or token in biases:
            raise InvalidRequestError(
                f"`logit_bias`: {key[:40]!r} is not a token id from 0 to {vocab_size - 1}, each once",
                param="logit_bias",
            )
        biases[token] = ranged(bias, f"logit_bias.{key}", RANGES["logit_bias"], default=0.0)
    return tuple((token, bias) for token, bias in sorted(biases.items()) if bias)


def metadata(value: dict[str, str] | None) -> dict[str, str]:
    """Pairs that the answer repeats."""
    pairs = value or {}
    if len(pairs) > MAX_METADATA_PAIRS:
        raise InvalidRequestError(f"`metadata` has {len(pairs)} pairs; at most {MAX_METADATA_PAIRS}", param="metadata")
    for key, text in pairs.items():
        if len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE:
            raise InvalidRequestError(
                f"`metadata`: keys have at most {MAX_METADATA_KEY} characters and values {MAX_METADATA_VALUE}",
                param="metadata",
            )
    return pairs


def stream_options(value: StreamOptions | None, *, streams: bool) -> StreamOptions:
    """Options of a streamed answer."""
    if value is None:
        return StreamOptions()
    if not streams:
        raise InvalidRequestError("`stream_options` needs `stream: true`", param="stream_options")
    if value.include_obfuscation:
        raise unsupported("stream_options.include_obfuscation", "events are not padded")
    return value
