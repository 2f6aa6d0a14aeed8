"""Real files of other families, where the cache folder has them: the kernels write what torch writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_kernels.cpu import Context, best_isa
from dspark_kernels.cpu import build as building
from dspark_stream.config import default_cache_dir
from dspark_stream.models.cache import Extent
from dspark_stream.models.fetch import find_model
from dspark_stream.models.loading import load_target
from dspark_stream.models.names import MODELS
from dspark_stream.models.native.target import NativeTarget
from dspark_stream.models.protocols import Rows
from ggufs import changed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler: apt-get install g++"),
]
PERPLEXITY = Path(__file__).parents[2] / "bench" / "perplexity.txt"
TOKENS = 30
TIE = 0.25
"""Nats by which torch may prefer the token that it writes to the one that the kernels write. Their activations are
rounded to 8 bits, which moves logits by a few tenths; a wrong position, norm or weight moves them by many. Texts begin
as the model knows them: without its first token Gemma's logits of a line's end change by half their size under any such
rounding, torch's too.
"""


def file_of(name):
    path = find_model(MODELS[name], default_cache_dir())
    if path is None:
        pytest.skip(f"{name} is not here: python -m dspark_stream.models.fetch {name}")
    return path


@pytest.fixture(scope="module", params=["qwen2.5-coder-0.5b", "gemma3-270m"])
def both(request):
    """A file on the kernels and on torch in float32, and its tokens."""
    path = file_of(request.param)
    native = load_target(str(path), kernels=Context(2, best_isa()))
    assert isinstance(native.target, NativeTarget)
    plain = load_target(str(path), dtype="float32", device="cpu")
    return native.target, plain.target, plain.codec


def logits(target, ids):
    return target.forward([Rows(Extent(0, 1024), 0, ids)], target.make_store(1024)).logits(range(len(ids))).clone()


def greedy(target, prompt):
    store, out, new = target.make_store(1024), [], prompt
    for _ in range(TOKENS):
        start = 0 if not out else len(prompt) + len(out) - 1
        new = target.forward([Rows(Extent(0, 1024), start, new)], store, [len(new) - 1]).best([0])
        out += new
    return out


@pytest.mark.parametrize(
    "text", ["def fibonacci(n):\n    ", "The capital of France is", "Once upon a time there was a little girl who"]
)
def test_greedy_text_is_torchs_up_to_near_ties(both, text, record_property):
    native, plain, codec = both
    prompt = codec.encode_prompt(text)
    own, want = greedy(native, prompt), greedy(plain, prompt)
    print(repr(codec.decode(own)))
    if own == want:
        return
    at = next(i for i in range(TOKENS) if own[i] != want[i])
    row = logits(plain, [*prompt, *want[:at]])[-1]
    margin = float(row[want[at]] - row[own[at]])
    record_property("parted", f"token {at}, {margin:.3f} nats")
    print("parted", at, margin)
    assert margin < TIE


def test_perplexity_is_torchs(both, record_property):
    native, plain, codec = both
    ids = codec.encode_prompt(PERPLEXITY.read_text())[:600]
    found = [
        float(torch.nn.functional.cross_entropy(logits(target, ids)[:-1].float(), torch.tensor(ids[1:])).exp())
        for target in (native, plain)
    ]
    record_property("perplexity", str(found))
    print("perplexity", found, len(ids))
    assert found[0] == pytest.approx(found[1], rel=0.02)


LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
FACTORS = np.repeat([4.0, 8.0], 16).astype(np.float32)


@pytest.mark.parametrize(
    ("fields", "tensors"), [(LINEAR, {}), ({}, {"rope_freqs.weight": FACTORS})], ids=["linear", "rope_freqs"]
)
def test_scaling_of_a_file_is_heeded_on_both_runners(tmp_path, fields, tensors):
    """The shipped model with scaling that it was not made for writes another text, the same one everywhere."""
    path = file_of("smollm2-135m")
    kernels = Context(2, best_isa())
    with_scaling = changed(path, tmp_path / "a.gguf", fields, tensors)
    native, plain = load_target(str(with_scaling), kernels=kernels), load_target(str(with_scaling), dtype="float32")
    prompt = native.codec.encode_chat([("user", "List the first ten prime numbers.")])
    own = logits(native.target, prompt)
    without = logits(load_target(str(path), kernels=kernels).target, prompt)
    want = logits(plain.target, prompt)
    off, wrong = ((x - want).norm() / want.norm() for x in (own, without))
    assert off < 0.1
    assert wrong > 3 * off
