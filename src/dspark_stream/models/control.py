"""Control tokens in what people say: their names stay text, and only the chat template writes the tokens themselves."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, models
from tokenizers import Tokenizer as RawTokenizer

from dspark_stream.errors import InvalidRequestError
from dspark_stream.types import Message, Text

Run = Callable[[RawTokenizer, str], list[int]]
Span = tuple[int, int]


class ControlTokens:
    """Finds control tokens' names in texts, and tokenises conversations in which people typed some.

    A token is told from its name by renaming it: a second tokenizer around the same model knows each control token by a
    name that nobody can type, and reads the usual names as any other text. A prompt is still tokenised in one call, so
    nothing else about it changes.
    """

    def __init__(self, raw: RawTokenizer, marks: str = "") -> None:
        """``marks`` is what the template writes around turns: tokens in it count, whatever the file calls them."""
        added = sorted(raw.get_added_tokens_decoder().items())
        self._control = {
            i: token for i, token in added if token.special or (token.content.strip() and token.content in marks)
        }
        # A model that knows no text leaves the added tokens alone, with their places, just as the real one finds them.
        # Nor is a text kept: it is one word to it, and it would remember ten thousand of them.
        self._finder, self._found = _tokenizer(models.BPE(cache_capacity=0), raw.normalizer, None, added)
        names = {i: f"\u2045{secrets.randbits(64)}.{i}\u2046" for i in self._control}
        self._names = names
        renamed = [
            (i, AddedToken(names[i], special=True, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip))
            if i in names
            else (i, token)
            for i, token in added
        ]
        self._reader, self._read = _tokenizer(raw.model, raw.normalizer, raw.pre_tokenizer, renamed)

    def typed_in(self, messages: Sequence[Message]) -> bool:
        """Whether a message holds a control token's name, or several together do."""
        return bool(self._control) and bool(self._spans("".join(text for _, said in messages for text in _parts(said))))

    def encode(self, messages: Sequence[Message], render: Callable[[Sequence[Message]], str], run: Run) -> list[int]:
        """Tokens of a rendered conversation, every control token of the template's and none of the messages'.

        Raises:
            InvalidRequestError: the template refuses these messages, or they hold every private character there is.
        """
        taken = {*"".join(text for _, said in messages for text in _parts(said))}
        free = (chr(c) for c in range(0xF0000, 0x10FFFE) if chr(c) not in taken)
        sign_of: dict[str, str] = {}  # one character each, so that templates can cut and trim texts as they like

        def hide(name: str) -> str:
            if name not in sign_of:
                sign = next(free, None)
                if sign is None:
                    raise InvalidRequestError("these messages hold every private character of Unicode", param="input")
                sign_of[name] = sign
            return sign_of[name]

        hidden = [
            (role, [self._replace(text, lambda name, _: hide(name)) for text in _parts(said)])
            for role, said in messages
        ]
        if self._spans("".join(text for _, texts in hidden for text in texts)):
            # A name that only begins in one text and ends in another: something must stand between all of them.
            hidden = [(role, [hide("") + text for text in texts]) for role, texts in hidden]
        text = render([(role, texts[0] if len(texts) == 1 else tuple(texts)) for role, texts in hidden])
        text = self._replace(text, lambda _, i: self._names[i])
        text = text.translate({ord(sign): name for name, sign in sign_of.items()})
        return [self._read.get(i, i) for i in run(self._reader, text)]

    def _replace(self, text: str, by: Callable[[str, int], str]) -> str:
        """The text with other words for each control token, which ``by`` says of its name and its id."""
        out, at = [], 0
        for (start, end), i in self._spans(text):
            out += [text[at:start], by(text[start:end], i)]
            at = end
        return "".join([*out, text[at:]])

    def _spans(self, text: str) -> list[tuple[Span, int]]:
        """Where control tokens are in a text, in order."""
        found = self._finder.encode_batch([text], add_special_tokens=False)[0]
        pairs = zip(found.offsets, (self._found[i] for i in found.ids), strict=True)
        return [(span, i) for span, i in pairs if i in self._control]


def _tokenizer(
    model: models.Model, normalizer: Any, pre_tokenizer: Any, added: Sequence[tuple[int, AddedToken]]
) -> tuple[RawTokenizer, dict[int, int]]:
    """A tokenizer around a model, which it shares, with added tokens; and its own ids of these → the given ones."""
    tokenizer = RawTokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_tokens([token for _, token in added])
    own = {tokenizer.token_to_id(token.content): i for i, token in added}
    return tokenizer, {new: i for new, i in own.items() if new is not None}


def _parts(said: Text) -> tuple[str, ...]:
    return (said,) if isinstance(said, str) else said
