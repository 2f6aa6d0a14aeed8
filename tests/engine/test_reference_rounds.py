"""The recorded rounds of the reference implementation, reproduced through the whole engine and tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark_stream.config import Config
from dspark_stream.console import SILENT
from dspark_stream.engine.build import build_engine
from dspark_stream.models.cache import Extent
from dspark_stream.models.checkpoint import load_drafter
from dspark_stream.models.loading import load_target
from dspark_stream.models.protocols import Rows
from dspark_stream.models.torch.store import KVStore
from recorded import run_cases
from shared_data import shared

PAIRS = ["qwen3-vanilla", "qwen3-gated", "gemma4-vanilla"]


@pytest.mark.parametrize("pair", PAIRS)
def test_every_recorded_round(pair, tmp_path):
    """Anchors, draft tokens, accepted counts, bonus tokens and text; all four prompts as one batch."""
    folder = shared(f"fixtures/{pair}")
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    config = Config(
        model=str(folder / "target"),
        drafter=str(folder / "draft"),
        schedule="fixed:7",
        max_num_seqs=4,
        kv_memory=64 << 20,
        cache_dir=tmp_path,
    )
    engine, codec = build_engine(config, SILENT)
    assert codec is None
    for case, (ids, rounds) in zip(cases, run_cases(engine, cases), strict=True):
        assert ids[: len(case["output"])] == case["output"] == case["greedy"]
        for got, recorded in zip(rounds, case["rounds"], strict=False):
            assert {name: getattr(got, name) for name in recorded} == recorded
        assert len(rounds) >= len(case["rounds"])


@pytest.mark.parametrize("pair", PAIRS)
def test_recorded_tensors(pair):
    """Block hidden states, base and biased logits and confidence logits within 1e-4 of the recording."""
    folder: Path = shared(f"fixtures/{pair}")
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    recorded = load_file(folder / "rounds.safetensors")
    target = load_target(str(folder / "target")).target
    drafter = load_drafter(folder / "draft", target)
    extent = Extent(0, 256)
    target_kv = KVStore(target.kv_shapes, 256, target.dtype, target.device)
    drafter_kv = KVStore(drafter.kv_shapes, 256, target.dtype, target.device)

    @torch.inference_mode()
    def check(name: str, position: int, anchor: int, tokens: list[int]) -> None:
        hidden = drafter.draft_hidden([(extent, position, anchor)], drafter_kv)[0]
        base = drafter.base_logits(hidden)
        head, state = drafter.markov_head, drafter.markov_head.initial_state(1)
        logits, confidence = [], []
        for k, previous in enumerate([anchor, *tokens[:-1]]):
            e = head.embed(torch.tensor([previous]))
            features, state = head.step(e, hidden[k : k + 1], state)
            logits.append(base[k] + head.bias(features)[0])
            confidence.append(drafter.confidence_head(hidden[k : k + 1], e)[0])
        got = {
            "block_hidden": hidden,
            "base_logits": base,
            "draft_logits": torch.stack(logits),
            "confidence_logits": torch.stack(confidence),
        }
        for what, tensor in got.items():
            torch.testing.assert_close(tensor, recorded[f"{name}.{what}"], atol=1e-4, rtol=0)

    for i, case in enumerate(cases):
        n = len(case["prompt"])
        taps = target.forward([Rows(extent, 0, case["prompt"])], target_kv, [n - 1]).taps
        drafter.append_context(taps, list(range(n)), list(range(n)), drafter_kv)
        for j, r in enumerate(case["rounds"]):
            p, kept = r["start"], r["accepted"] + 1
            check(f"case{i}.round{j}", p, r["anchor"], r["draft_tokens"])
            taps = target.forward([Rows(extent, p, [r["anchor"], *r["draft_tokens"]])], target_kv).taps
            at = list(range(p, p + kept))
            drafter.append_context(taps[:kept], at, at, drafter_kv)
