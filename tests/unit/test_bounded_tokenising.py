"""Prompts that are too long, and long ones that are not: neither may stop anybody else."""

from __future__ import annotations

import random
import threading
import time

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as token_models

from dspark_stream.models.tokenizer import TextCodec


@pytest.mark.parametrize("most", [1, 50, 700])
def test_a_bound_finds_every_text_that_is_too_long_and_none_that_is_not(most):
    """Guards against a prompt that fits and is refused, and against one whose every megabyte is read first."""
    codec = bounded_codec()
    rng = random.Random(most)
    pieces = ["a", "ab", " ", "  ", "\n", "aaaaaaaa", "b" * 40, " " * 64, "é", "😀", "<|end|>"]
    for _ in range(200):
        text = "".join(rng.choice(pieces) * rng.randint(1, 30) for _ in range(rng.randint(0, 60)))
        whole = codec.encode(text)
        found = codec.encode(text, most)
        assert len(found) == min(len(whole), most + 1)
        if len(whole) <= most:
            assert found == whole


def test_a_text_that_is_too_long_is_not_read_to_its_end(monkeypatch):
    codec = bounded_codec()
    read = []
    real = codec._encoding
    monkeypatch.setattr(codec, "_encoding", lambda text: read.append(len(text)) or real(text))
    assert len(codec.encode_chat([("user", "ab " * 500_000)], 100)) == 101
    assert sum(read) < 10_000
    read.clear()
    fits = codec.encode(" " * 6400, 100)  # 64 a token: few tokens, and many characters
    assert len(fits) == 100
    assert read[-1] == 6400


def test_tokenising_lets_other_threads_go_on():
    """Guards against the call for single texts, which keeps every other thread waiting for as long as it takes."""
    codec = bounded_codec()
    text = "".join(random.Random(1).choices("ab \n", k=1_500_000))
    ticks = []
    over = threading.Event()

    def tick():
        while not over.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begun = time.perf_counter()
    codec._encoding(text)
    took = time.perf_counter() - begun
    over.set()
    thread.join()
    during = [t for t in ticks if begun < t < begun + took]
    longest = max(b - a for a, b in zip([begun, *during], [*during, begun + took], strict=True))
    assert longest < took / 2


def bounded_codec():
    merges = [("a", "b"), ("Ġ", "Ġ"), ("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")]
    merges += [("Ġ" * n, "Ġ" * n) for n in (2, 4, 8, 16, 32)]
    names = [*pre_tokenizers.ByteLevel.alphabet()]
    vocab = {name: i for i, name in enumerate(dict.fromkeys([*sorted(names), *(a + b for a, b in merges)]))}
    raw = RawTokenizer(token_models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|end|>"])
    return TextCodec(raw, None, {})
