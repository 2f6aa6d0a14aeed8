"""GGUF vocabularies as `tokenizers` objects: byte-level BPE ("gpt2"), SentencePiece with scores ("llama") and Gemma 4's
mixture of both ("gemma4").

The library's own converter does not know which pre-tokenizer a file was made with, and a wrong one splits digits
differently without any error. Everything here is checked, since a vocabulary may be damaged like any other data.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Container
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from dspark_stream.errors import ModelLoadError

log = logging.getLogger(__name__)

GPT2_SPLIT = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2 paper's published pattern
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN35_SPLIT = QWEN2_SPLIT.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
# words of o200k: capitals and then small letters, at least one of either; marks and letters without case are both
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O_SPLIT = _WORDS % (_SHORT, _SHORT) + r"|\p{N}{1,3}" + _REST
TEKKEN_SPLIT = _WORDS % ("", "") + r"|\p{N}" + _REST
DEEPSEEK_CODER_SPLITS = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
DEEPSEEK3_SPLITS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
UNNAMED_SPLITS = (r"[\p{P}$+<=>^~|]+", GPT2_SPLIT, r"\p{N}+", "[0-9]{3}")
"""What llama.cpp does with files that do not name a pre-tokenizer."""


class Cut(NamedTuple):
    """How text is cut into the pieces that merging stays within."""

    patterns: tuple[str, ...]
    """One after the other, each on what the ones before left."""
    whole: bool = False
    """A piece that is a token is taken as it is, whatever the merges say."""
    bos: bool = False
    """Files that do not say whether prompts begin with the BOS token mean that they do."""
    digits: bool = False
    """Each digit is a piece of its own."""


_GPT2, _QWEN2 = Cut((GPT2_SPLIT,)), Cut((QWEN2_SPLIT,))
_LLAMA3, _LLAMA3_PLAIN = Cut((LLAMA3_SPLIT,), whole=True, bos=True), Cut((LLAMA3_SPLIT,))
_GPT4O, _DIGITS = Cut((GPT4O_SPLIT,)), Cut((GPT2_SPLIT,), digits=True)
CUTS = {
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "gigachat", "mellum", "exaone4", "trillion"), _GPT2),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "kormo"), _QWEN2),
    "qwen35": Cut((QWEN35_SPLIT,)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3_PLAIN),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), _GPT4O),
    "tekken": Cut((TEKKEN_SPLIT,), whole=True, bos=True),
    "deepseek-coder": Cut(DEEPSEEK_CODER_SPLITS),
    "deepseek-v3": Cut(DEEPSEEK3_SPLITS),
    "default": Cut(UNNAMED_SPLITS),
}
"""`tokenizer.ggml.pre` of byte-level BPE vocabularies → how text is cut before merging."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type; 0: not said
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
NONE_AS_ID = 2**32 - 1
"""-1, which is how SentencePiece says that there is no such token, in the format's unsigned numbers."""
PREFIX = "tokenizer.ggml."


class Vocabulary(NamedTuple):
    """What a file says of its tokens."""

    raw: RawTokenizer
    special: dict[str, str | None]
    """Texts of `bos_token`, `eos_token` and `unk_token`, as chat templates ask for them."""
    bos: int | None
    """The token that prompts begin with, where they should."""


def read_vocabulary(fields: dict[str, Any]) -> Vocabulary:
    """The tokenizer that `tokenizer.ggml.*` describes.

    Raises:
        ModelLoadError: of a kind that is not known, or damaged; the message names the field.
    """
    kind = fields.get(PREFIX + "model")
    if kind not in ("gpt2", "llama", "gemma4"):
        raise ModelLoadError(
            f"tokenizer {kind!r} (tokenizer.ggml.model) is not supported from GGUF; known: gpt2, llama, gemma4",
            param="model",
        )
    tokens = _tokens(fields)
    types = _list(fields, "token_type", int, len(tokens)) or [NORMAL] * len(tokens)
    for i, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if not 0 <= type_ <= BYTE:
            raise _bad("token_type", f"token {i} has the unknown type {type_}")
        if type_ == BYTE and not BYTE_TOKEN.fullmatch(token):
            raise _bad("tokens", f"token {i} is {token!r}, which should name a byte")
    scored = kind == "llama"

    def token_id(name: str, text: str, place: int) -> int | None:
        value = fields.get(PREFIX + name)
        if value is None:  # SentencePiece's own places, which its files need not name
            return place if scored and tokens[place : place + 1] == [text] else None
        return None if value == NONE_AS_ID else _checked_id(name, value, len(tokens))

    unk, bos, eos = (
        token_id("unknown_token_id", "<unk>", 0),
        token_id("bos_token_id", "<s>", 1),
        token_id("eos_token_id", "</s>", 2),
    )
    if kind == "gpt2":
        # ids that only fill the matrix up stand for no text
        vocab = {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}
        raw, adds_bos = _byte_level(fields, vocab)
    else:
        pieces = _scored_merges(fields, tokens, types) if scored else _written_merges(fields, set(tokens))
        prefixed = scored and _flag(fields, "add_space_prefix", True)
        raw, adds_bos = _sentence_pieces(tokens, pieces, None if unk is None else tokens[unk], prefixed), True
        if kind == "gemma4":  # its runs of newlines are tokens that no merges lead to
            types = [
                USER_DEFINED if k == NORMAL and not t.strip("\n") else k for t, k in zip(tokens, types, strict=True)
            ]
    own = [
        (t, k in (CONTROL, UNKNOWN))
        for t, k in zip(tokens, types, strict=True)
        if k in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, special in own if special])
    raw.add_tokens([AddedToken(t, normalized=False) for t, special in own if not special])
    special = {
        f"{name}_token": None if i is None else tokens[i] for name, i in (("bos", bos), ("eos", eos), ("unk", unk))
    }
    return Vocabulary(raw, special, bos if _flag(fields, "add_bos_token", adds_bos) else None)


def end_ids(fields: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that a file says end an answer, or a turn, or a message.

    Raises:
        ModelLoadError: one that the vocabulary does not have.
    """
    count = len(fields.get(PREFIX + "tokens") or ())
    names = [f"{name}_token_id" for name in ("eos", "eot", "eom")]
    said = [(name, fields.get(PREFIX + name)) for name in names]
    ids = [_checked_id(name, i, count) for name, i in said if i is not None and i != NONE_AS_ID]
    return tuple(dict.fromkeys(ids))


# --- reading with care --------------------------------------------------------------------------------------------


def _bad(name: str, what: str) -> ModelLoadError:
    return ModelLoadError(f"this GGUF file's {PREFIX}{name} cannot be used: {what}", param="model")


def _list(fields: dict[str, Any], name: str, kind: type, count: int | None = None) -> list[Any]:
    """A list of one kind of element, of as many as there are tokens where ``count`` says; empty if there is none."""
    values = fields.get(PREFIX + name)
    if values is None:
        return []
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise _bad(name, f"it should be a list of {kind.__name__}")
    if count is not None and len(values) != count:
        raise _bad(name, f"it has {len(values)} entries for {count} tokens")
    return values


def _flag(fields: dict[str, Any], name: str, default: bool) -> bool:
    value = fields.get(PREFIX + name, default)
    if not isinstance(value, bool):
        raise _bad(name, f"{value!r} is neither true nor false")
    return value


def _checked_id(name: str, value: Any, count: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise _bad(name, f"{value!r} is no token of {count}")
    return value


def _tokens(fields: dict[str, Any]) -> list[str]:
    """All tokens' texts, each once. The kinds that SentencePiece writes with its own sign for a space and that are
    looked for in the text itself get the space."""
    tokens: list[str] = list(_list(fields, "tokens", str))
    if not tokens:
        raise ModelLoadError(f"this GGUF file has no {PREFIX}tokens", param="model")
    if fields[PREFIX + "model"] != "gpt2":
        types = fields.get(PREFIX + "token_type")
        for i, kind in enumerate(types if isinstance(types, list) else ()):
            if kind == USER_DEFINED and i < len(tokens):
                tokens[i] = tokens[i].replace("▁", " ")
    place: dict[str, int] = {}
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    for i, token in enumerate(tokens):
        if token in place:
            raise _bad("tokens", f"{place[token]} and {i} are both {token!r}")
        place[token] = i
    return tokens


def _written_merges(fields: dict[str, Any], known: Container[str]) -> list[tuple[str, str]]:
    merges: list[str] = _list(fields, "merges", str)
    if not merges:
        raise ModelLoadError(f"this GGUF file has no {PREFIX}merges", param="model")
    pairs = []
    for i, merge in enumerate(merges):
        at = merge.find(" ", 1)
        if at < 0:
            raise _bad("merges", f"merge {i} ({merge!r}) has no space")
        left, right = merge[:at], merge[at + 1 :]
        if not (left in known and right in known and left + right in known):
            missing = next(text for text in (left, right, left + right) if text not in known)
            raise _bad("merges", f"merge {i} ({merge!r}) names {missing!r}, which is no token")
        pairs.append((left, right))
    return pairs


def _scored_merges(fields: dict[str, Any], tokens: list[str], types: list[int]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours give the token of the highest score: every cut of a token into two
    others is a merge, ranked by the token's score. Control tokens, bytes and what text is searched for take no part."""
    scores: list[float] = _list(fields, "scores", float, len(tokens))
    if not scores:
        raise ModelLoadError(f"this GGUF file has no {PREFIX}scores", param="model")
    if not all(map(math.isfinite, scores)):
        raise _bad("scores", "some are no numbers")
    mergeable = [i for i, kind in enumerate(types) if kind in (0, NORMAL, UNUSED)]
    known = {tokens[i] for i in mergeable}
    return [
        (token[:at], token[at:])
        for token in (tokens[i] for i in sorted(mergeable, key=lambda i: -scores[i]))
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]


# --- building -----------------------------------------------------------------------------------------------------


def _byte_level(fields: dict[str, Any], vocab: dict[str, int]) -> tuple[RawTokenizer, bool]:
    """A byte-level BPE vocabulary, and whether its prompts begin with the BOS token if the file does not say."""
    pre = fields.get(PREFIX + "pre", "default")
    if not isinstance(pre, str) or pre not in CUTS:
        raise ModelLoadError(
            f"pre-tokenizer {pre!r} (tokenizer.ggml.pre) is not supported from GGUF; known: {', '.join(CUTS)}",
            param="model",
        )
    if pre == "default":
        log.warning(
            "this GGUF file does not name its pre-tokenizer (tokenizer.ggml.pre): its texts may be worse for it"
        )
    cut = CUTS[pre]
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=_written_merges(fields, vocab), ignore_merges=cut.whole))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *([pre_tokenizers.Digits(individual_digits=True)] if cut.digits else []),
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    return raw, cut.bos


def _sentence_pieces(
    tokens: list[str], merges: list[tuple[str, str]], unknown: str | None, prefixed: bool
) -> RawTokenizer:
    """SentencePiece's way: spaces are ``▁``, text that no token has is written in bytes."""
    if unknown is None and sum(map(bool, map(BYTE_TOKEN.fullmatch, tokens))) < 256:
        raise _bad("tokens", "neither 256 bytes nor an unknown token: it could not write every text")
    vocab = {token: i for i, token in enumerate(tokens)}
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True, cache_capacity=0)
    raw = RawTokenizer(bpe)  # a text is one word here, and no cache of them would ever be read
    spaces = normalizers.Replace(" ", "▁")
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return raw
