"""Tokenizer and chat template, from a model folder, a hub name or a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tokenizers import Encoding
from tokenizers import Tokenizer as RawTokenizer

from dspark_stream.errors import InvalidRequestError, ModelLoadError
from dspark_stream.models.control import ControlTokens
from dspark_stream.models.template import MARK, ChatTemplate, as_one
from dspark_stream.models.vocabulary import BYTE_TOKEN, read_vocabulary
from dspark_stream.types import Message

CHARS_A_TOKEN = 6
"""More than texts have, mostly: of a longer one first so much is looked at."""
CUT_TOKENS = 64
"""By so many tokens the cut of a text may change what comes before it: byte-pair merges look ahead only so far."""
KNOWN_ENDS = (
    "</s>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<|end|>",
)


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
        vocab = raw.get_vocab()
        self.longest_name = max(map(len, map(str.encode, vocab)), default=1)
        """Of what tokens are called, in bytes."""
        self._table: list[bytes] = [b""] * (max(vocab.values(), default=-1) + 1)
        for text, token in vocab.items():
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


def _bytes_by_character() -> dict[str, bytes]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    pairs = [(chr(b), b) for b in printable] + [(chr(256 + i), b) for i, b in enumerate(others)]
    return {c: bytes([b]) for c, b in pairs}


BYTE_OF = _bytes_by_character()
_AS_LATIN = {ord(c): b[0] for c, b in BYTE_OF.items()}


def _byte_level(text: str) -> bytes:
    """GPT-2's way of writing bytes: printable ones as themselves, the others from U+0100 on."""
    try:
        return text.translate(_AS_LATIN).encode("latin-1")
    except UnicodeEncodeError:  # something besides, which then stands for itself
        return b"".join(BYTE_OF.get(c) or c.encode() for c in text)


def _sentence_piece(text: str) -> bytes:
    byte = BYTE_TOKEN.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace("▁", " ").encode()


class TextCodec:
    """Text in, tokens out, for one model. Implements the engine's `Tokenizer` protocol; safe to call from threads."""

    def __init__(
        self,
        raw: RawTokenizer,
        chat_template: str | None,
        special: Mapping[str, str | None],
        bos: int | None = None,
        *,
        chat_bos: bool = True,
    ) -> None:
        self.raw = raw
        self.special = special
        """`bos_token`, `eos_token` and the like, as chat templates ask for them."""
        self._bos = bos
        """What a prompt begins with whose text does not; None: nothing."""
        self._chat_bos = bos if chat_bos else None
        """The same of a conversation, whose template may write it itself."""
        self._template = ChatTemplate(chat_template, special) if chat_template else None
        self._control = ControlTokens(raw, self._marks())
        self.allow_control_tokens = False
        """Whether the name of a control token in what somebody says is that token; else it is plain text."""
        self.token_bytes = TokenBytes(raw)
        # a special token's own name can be typed as text, too
        self.max_token_bytes = max(self.token_bytes.longest_name, self.token_bytes.longest())

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Tokens of plain text; nothing is added, and special tokens in the text are read as such.

        ``most``: of a text that has more tokens the first ``most + 1`` are enough. Such a text is not read to its end,
        however long it is; one that has no more always is.
        """
        return _ids(self._encoding, text, most)

    def _encoding(self, text: str) -> Encoding:
        return _batch(self.raw, text)

    def encode_prompt(self, text: str, most: int | None = None) -> list[int]:
        """Tokens of a text to go on with, no template applied: the BOS token first where the model wants one, and
        special tokens in the text read as such. ``most`` as in `encode`."""
        return _with_bos(self._bos, self.encode(text, most))

    def encode_chat(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """Tokens of a conversation under the chat template, ready for the assistant to answer.

        Without a template: roles and contents in plain words. ``most`` as in `encode`.

        Raises:
            InvalidRequestError: the template refuses these messages (``param`` is ``input``).
        """
        ids = self.encode(self._chat_text(messages), most)
        # As text, the name of a token is no shorter: what is too long already stays so.
        fits = most is None or len(ids) <= most
        if fits and not self.allow_control_tokens and self._control.typed_in(messages):
            ids = self._control.encode(
                messages, self._chat_text, lambda raw, text: _ids(partial(_batch, raw), text, most)
            )
        return _with_bos(self._chat_bos, ids)

    def encode_open_turn(self, history: Sequence[Message], opening: str = "") -> list[int]:
        """Tokens of a conversation up to a next turn of the user that begins with ``opening``, for a model to go on.

        Raises:
            InvalidRequestError: the template refuses these messages, or does not show what the user says.
        """
        before, found, _ = self._chat_text([*history, ("user", MARK)]).rpartition(MARK)
        if not found:
            raise InvalidRequestError("the model's chat template does not show the user's turn", param="input")
        return _with_bos(self._chat_bos, self.encode(before + opening))

    def turn_end(self) -> int | None:
        """The token that the chat template closes an assistant's turn with; None: it uses none."""
        added = self.raw.get_added_tokens_decoder()
        for rest in self._template.after_answer() if self._template else ():
            first = self.encode(rest.lstrip())[:1]
            if first and first[0] in added:
                return first[0]
        return None

    def known_end(self) -> int | None:
        """A special token that is called what models call the end of a text."""
        added = self.raw.get_added_tokens_decoder()
        ids = {token.content: i for i, token in added.items() if token.special}
        return next((ids[name] for name in KNOWN_ENDS if name in ids), None)

    def name_of(self, token: int) -> str:
        """How the vocabulary writes a token."""
        return str(self.raw.id_to_token(token))

    def _chat_text(self, messages: Sequence[Message]) -> str:
        if self._template is None:
            return "".join(f"{role}: {as_one(said)}\n" for role, said in messages) + "assistant:"
        return self._template.render(messages)

    def _marks(self) -> str:
        """What the template writes between two turns, and before the answer."""
        if self._template is None:
            return ""
        said: list[Message] = [("user", MARK), ("assistant", MARK), ("user", MARK)]
        try:
            return "".join(self._template.render(said).split(MARK)[1:])
        except InvalidRequestError:
            return ""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        return str(self.raw.decode(list(ids), skip_special_tokens=True))


def _ids(encoding: Callable[[str], Encoding], text: str, most: int | None) -> list[int]:
    size = len(text) if most is None else CHARS_A_TOKEN * (most + 1)
    while size < len(text):
        found = encoding(text[:size])
        if most is not None and len(found) > most + CUT_TOKENS:
            found.truncate(most + 1)
            return list(found.ids)
        size *= 4
    found = encoding(text)
    if most is not None:
        found.truncate(most + 1)
    return list(found.ids)


def _batch(raw: RawTokenizer, text: str) -> Encoding:
    # the call for batches lets other threads go on meanwhile; the one for single texts keeps them all waiting
    return raw.encode_batch_fast([text], add_special_tokens=False)[0]


def _with_bos(bos: int | None, ids: list[int]) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


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
    except Exception as error:  # the Rust library raises bare ones for a broken tokenizer.json
        raise ModelLoadError(f"no usable tokenizer at {name_or_path}: {error}", param="model") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelLoadError(f"{name_or_path}: only tokenizers with a tokenizer.json are supported", param="model")
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    raw = tokenizer.backend_tokenizer
    if raw.pre_tokenizer is None and (resize := getattr(raw.model, "_resize_cache", None)):
        resize(0)  # a text is one word here: it would remember ten thousand of them
    bos = tokenizer.bos_token_id if raw.encode("").ids == [tokenizer.bos_token_id] else None
    # a template writes the BOS token itself, as far as the model wants one
    return TextCodec(raw, template, special, bos, chat_bos=not template)


def codec_from_gguf(fields: dict[str, Any]) -> TextCodec:
    """Tokenizer of a GGUF file's `tokenizer.*` fields.

    Raises:
        ModelLoadError: a vocabulary of a kind that is not known, or a damaged one, or a template that does not parse.
    """
    template = fields.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelLoadError("this GGUF file's tokenizer.chat_template is no text", param="model")
    vocabulary = read_vocabulary(fields)
    return TextCodec(vocabulary.raw, template, vocabulary.special, vocabulary.bos)
