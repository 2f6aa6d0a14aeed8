"""Tokenizer and chat template, from a model folder, a hub name or a GGUF file.

The GGUF vocabulary is turned into a `tokenizers` object here: the library's own converter does not know which
pre-tokenizer a file was made with, and a wrong one splits digits differently without any error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from dspark_stream.errors import InvalidRequestError, ModelLoadError

GPT2_SPLIT = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2 paper's published pattern
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

DIGITS_THEN_BYTES = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


def _split_then_bytes(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


PRE_TOKENIZERS = {
    "smollm": DIGITS_THEN_BYTES,
    "gpt-2": _split_then_bytes(GPT2_SPLIT),
    "default": _split_then_bytes(GPT2_SPLIT),
    "qwen2": _split_then_bytes(QWEN2_SPLIT),
    "llama-bpe": _split_then_bytes(LLAMA3_SPLIT),
}
"""`tokenizer.ggml.pre` of byte-level BPE vocabularies → how text is cut before merging."""

TOKEN_CONTROL, TOKEN_USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class TokenBytes:
    """The bytes that each token stands for, without its neighbours; special tokens stand for none.

    Exact for the decoders of the supported families: byte-level BPE (Llama 3, Qwen, SmolLM) and SentencePiece with byte
    fallback (Llama 2, Gemma). Of other decoders each token's own text is taken.
    """

    def __init__(self, raw: RawTokenizer) -> None:
        state = raw.decoder.__getstate__().decode() if raw.decoder else ""
        self.strips_first_space = '"Strip"' in state or '"Metaspace"' in state
        added = raw.get_added_tokens_decoder()
        plain = _byte_level if '"ByteLevel"' in state else _sentence_piece if "▁" in state else None
        self._table: list[bytes] = [b""] * (max(raw.get_vocab().values(), default=-1) + 1)
        for text, token in raw.get_vocab().items():
            if token in added:
                self._table[token] = b"" if added[token].special else text.encode()
            else:
                self._table[token] = plain(text) if plain else raw.decode([token]).encode()

    def __getitem__(self, token: int) -> bytes:
        """Bytes of a token; of an id that the vocabulary does not have, none."""
        return self._table[token] if token < len(self._table) else b""

    def longest(self) -> int:
        """The most bytes that one token stands for."""
        return max(map(len, self._table), default=1)


def _byte_level(text: str) -> bytes:
    """GPT-2's way of writing bytes: printable ones as themselves, the others from U+0100 on."""
    return b"".join(BYTE_OF[c] if c in BYTE_OF else c.encode() for c in text)


def _bytes_by_character() -> dict[str, bytes]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    pairs = [(chr(b), b) for b in printable] + [(chr(256 + i), b) for i, b in enumerate(others)]
    return {c: bytes([b]) for c, b in pairs}


BYTE_OF = _bytes_by_character()


def _sentence_piece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


class TextCodec:
    """Text in, tokens out, for one model. Implements the engine's `Tokenizer` protocol; safe to call from threads."""

    def __init__(self, raw: RawTokenizer, chat_template: str | None, special: dict[str, str | None]) -> None:
        self.raw = raw
        self.special = special
        """`bos_token` and `eos_token`, as chat templates ask for them."""
        self._template: jinja2.Template | None = None
        if chat_template:
            env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
            env.globals["raise_exception"] = _template_error
            env.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
            env.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
            try:
                self._template = env.from_string(chat_template)
            except jinja2.TemplateError as error:
                raise ModelLoadError(f"the model's chat template does not parse: {error}", param="model") from error
        self.token_bytes = TokenBytes(raw)
        # a special token's own name can be typed as text, too
        names = max((len(t.encode()) for t in raw.get_vocab()), default=1)
        self.max_token_bytes = max(names, self.token_bytes.longest())

    def encode(self, text: str) -> list[int]:
        """Tokens of plain text; nothing is added, and special tokens in the text are read as such."""
        return list(self.raw.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Tokens of (role, content) pairs under the chat template, ready for the assistant to answer.

        Without a template: roles and contents in plain words.

        Raises:
            InvalidRequestError: the template refuses these messages (``param`` is ``input``).
        """
        return self.encode(self._chat_text(messages))

    def encode_open_turn(self, history: Sequence[tuple[str, str]], opening: str = "") -> list[int]:
        """Tokens of a conversation up to a next turn of the user that begins with ``opening``, for a model to go on.

        Raises:
            InvalidRequestError: the template refuses these messages, or does not show what the user says.
        """
        mark = "\u2045turn\u2046"
        before, found, _ = self._chat_text([*history, ("user", mark)]).rpartition(mark)
        if not found:
            raise InvalidRequestError("the model's chat template does not show the user's turn", param="input")
        return self.encode(before + opening)

    def _chat_text(self, messages: Sequence[tuple[str, str]]) -> str:
        turns = [{"role": role, "content": content} for role, content in messages]
        if self._template is None:
            return "".join(f"{t['role']}: {t['content']}\n" for t in turns) + "assistant:"
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=True, tools=None, documents=None, **self.special
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise InvalidRequestError(f"the model's chat template refuses this: {error}", param="input") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self.raw.decode(list(ids), skip_special_tokens=True))


def _template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


def codec_from_hub(name_or_path: str) -> TextCodec | None:
    """Tokenizer of a folder or hub name; None where the folder has none."""
    from transformers import AutoTokenizer

    path = Path(name_or_path)
    if path.is_dir() and not any(
        (path / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    ):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(f"no usable tokenizer at {name_or_path}: {error}", param="model") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(f"{name_or_path}: only tokenizers with a tokenizer.json are supported", param="model")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return TextCodec(tokenizer.backend_tokenizer, template, special)


def codec_from_gguf(fields: dict[str, Any]) -> TextCodec:
    """Tokenizer of a GGUF file's `tokenizer.*` fields.

    Raises:
        ModelLoadError: a vocabulary that is not byte-level BPE, or a pre-tokenizer that is not known.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ModelLoadError(
            f"tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported from GGUF; known: gpt2 with "
            f"{', '.join(PRE_TOKENIZERS)}",
            param="model",
        )
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if not fields.get(name):
            raise ModelLoadError(f"this GGUF file has no {name}", param="model")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
    raw = RawTokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    raw.decoder = decoders.ByteLevel()
    types: list[int] = fields.get("tokenizer.ggml.token_type", [])
    raw.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, k in zip(tokens, types, strict=False)
            if k == TOKEN_CONTROL
        ]
    )
    raw.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False) if k == TOKEN_USER_DEFINED]
    )
    special = {
        name: tokens[fields[key]] if key in fields else None
        for name, key in (("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id"))
    }
    return TextCodec(raw, fields.get("tokenizer.chat_template"), special)
