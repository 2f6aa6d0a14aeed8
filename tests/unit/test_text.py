"""Tokens to text: UTF-8 across tokens, stop strings across rounds, origin of every piece."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dspark_stream.engine.text import StopStrings, TextStream
from dspark_stream.models.tokenizer import TokenBytes


def byte_tokenizer() -> Tokenizer:
    """One token a byte, as GPT-2 writes bytes: 256 tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in printable}
    names |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in names)}
    raw = Tokenizer(models.BPE(vocab={names[b]: b for b in range(256)}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    return raw


RAW = TokenBytes(byte_tokenizer())


def run(text: bytes, stop: tuple[str, ...] = ()) -> tuple[str, bool, list]:
    stream = TextStream(RAW, stop)
    pieces = []
    for i, byte in enumerate(text):
        new, stopped = stream.push(byte, i % 2 == 0)
        pieces += new
        if stopped:
            return "".join(p.text for p in pieces), True, pieces
    pieces += stream.finish()
    return "".join(p.text for p in pieces), False, pieces


@given(st.text())
def test_any_text_arrives_whole(text):
    """Guards against half characters and lost ends."""
    assert run(text.encode())[0] == text


def test_half_a_character_waits_and_ends_as_replacement():
    stream = TextStream(RAW, ())
    assert stream.push(0xC3, True) == ([], False)
    assert [p.text for p in stream.push(0xA9, False)[0]] == ["é"]
    stream.push(0xF0, True)
    assert [p.text for p in stream.finish()] == ["�"]


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 12),
)
def test_stop_strings_count_where_they_end(text, stop, least):
    """The first that ends behind the least tokens, of one byte each; the earliest to begin of those that end there."""
    stream, got = TextStream(RAW, tuple(stop)), ""
    for i, byte in enumerate(text.encode()):
        pieces, stopped = stream.push(byte, False, i >= least)
        got += "".join(p.text for p in pieces)
        if stopped:
            break
    else:
        got += "".join(p.text for p in stream.finish())
    ends = [end for end in range(least + 1, len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    begin = max((len(s) for s in stop if ends and text[: ends[0]].endswith(s)), default=0)
    assert got == (text[: ends[0] - begin] if ends else text)


@given(
    st.text(alphabet="ab", max_size=30),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_cut_exactly_before_the_first(text, stop):
    """Against the whole text at once: cut where the earliest-completed stop string begins, nothing lost otherwise."""
    got, stopped, _ = run(text.encode(), tuple(stop))
    for end in range(1, len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            assert stopped
            assert got == text[: min(found)]
            return
    assert not stopped
    assert got == text


def test_only_what_could_become_a_stop_string_is_held_back():
    stops = StopStrings(("END",))
    assert stops.feed("xE") == (1, False)
    assert stops.feed("N") == (0, False)
    assert stops.feed("x") == (3, False)
    assert stops.feed("yEND more") == (1, True)


def test_pieces_keep_their_origin():
    _, _, pieces = run(b"abc")
    assert [(p.text, p.drafted) for p in pieces] == [("a", True), ("b", False), ("c", True)]


@pytest.mark.parametrize("what", [b"x", b"\x80", "é".encode()])
def test_long_texts_stay_linear(what):
    """Guards against decoding anew what went before, also for bytes that never become a character."""
    n = 100_000
    assert run(what * n)[0] == what.decode(errors="replace") * n


@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_become_replacements_at_once(data):
    """Guards against text held for ever, or an error, because somewhere before it something was no UTF-8."""
    assert run(data)[0] == data.decode(errors="replace")


def test_special_tokens_say_nothing_and_cost_nothing():
    raw = byte_tokenizer()
    raw.add_special_tokens(["<|end|>"])
    stream = TextStream(TokenBytes(raw), ())
    assert all(stream.push(256, False) == ([], False) for _ in range(100_000))
    assert [p.text for p in stream.push(104, True)[0]] == ["h"]


def sentence_piece() -> Tokenizer:
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": 1 + b for b in range(256)} | {"▁the": 257, "▁": 258, "re": 259}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return raw


def test_byte_fallback_tokens_become_characters():
    """Guards against the error that the library's decode stream raises for bytes that are no UTF-8."""
    stream = TextStream(TokenBytes(sentence_piece()), ())
    tokens = [257, 259, 1 + 0xC3, 1 + 0xA9, 1 + 0x80, 258, 1 + 0xF0]
    text = "".join(p.text for t in tokens for p in stream.push(t, True)[0])
    assert text + "".join(p.text for p in stream.finish()) == " thereé� �"


def test_without_a_tokenizer_there_is_no_text():
    stream = TextStream(None, ("x",))
    assert stream.push(3, True) == ([], False)
    assert stream.finish() == []
