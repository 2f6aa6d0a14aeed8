"""The model that is served where none is named, with the drafter shipped for it, for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_kernels.cpu import build as building
from dspark_stream.config import DEFAULT_MODEL, Config, default_cache_dir
from dspark_stream.console import SILENT
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.local import LocalEngine
from dspark_stream.measure.evaluate import read_prompts
from dspark_stream.models.fetch import find_model
from dspark_stream.models.names import MODELS
from dspark_stream.types import GenerationRequest, RecommendedSampling, SamplingParams, TokensEvent

MODEL = MODELS[DEFAULT_MODEL]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(building.compiler() is None, reason="no C++ compiler: apt-get install g++"),
    pytest.mark.skipif(
        find_model(MODEL, default_cache_dir()) is None,
        reason=f"{MODEL.file_name} is not in the cache: python -m dspark_stream.models.fetch {DEFAULT_MODEL}",
    ),
]
PROMPTS = Path(__file__).parents[2] / "bench" / "prompts"
TOKENS = 48
COMPANY = 16


@pytest.fixture(scope="module")
def engine():
    """The engine, and the tokens of three prompts of code and three of mathematics."""
    built, codec = build_engine(Config(max_num_seqs=COMPANY, max_model_len=1024), SILENT)
    assert codec is not None
    asked = [p for name in ("code", "math") for p in read_prompts(PROMPTS / f"{name}.jsonl", 3)]
    with LocalEngine(built) as local:
        yield built, local, [tuple(codec.encode_chat([(m.role, m.content) for m in p.messages])) for p in asked]


def written(engine, mode, *, count=6, streams=1, schedule="fixed:7", verification="coupled", **sampling):
    """What each of ``count`` requests wrote, prompts over and over in turn, and their accepted length."""
    built, local, prompts = engine
    built.use_schedule(schedule)
    requests = [
        GenerationRequest(
            request_id=str(i),
            prompt_ids=prompts[i % len(prompts)],
            sampling=SamplingParams(max_tokens=TOKENS, seed=11 + i % len(prompts), **sampling),
            mode=mode,
            verification=verification,
        )
        for i in range(count)
    ]
    ids = [[] for _ in requests]
    rounds = accepted = 0
    for event, _ in local.run(requests, streams):
        if isinstance(event, TokensEvent):
            ids[int(event.request_id)] += event.token_ids
        else:
            assert event.reason in ("stop", "length")
            rounds, accepted = rounds + event.usage.rounds, accepted + event.usage.accepted
    return ids, 1 + accepted / rounds


def test_greedy_text_is_the_models_own_alone_and_in_company(engine, record_property):
    """No row of a pass knows its neighbours, so not one token may part; and the drafts are worth something: a wrong
    position, tap or feature shows nowhere else."""
    plain, one = written(engine, "plain", temperature=0.0)
    assert one == 1.0
    assert any(len(ids) == TOKENS for ids in plain)
    drafted, length = written(engine, "dspark", temperature=0.0)
    record_property("accepted_length", length)
    print(f"accepted length {length:.2f}")
    assert drafted == plain
    assert length > 2.5
    for mode, schedule in (("plain", "none"), ("dspark", "fixed:7"), ("dspark", "adaptive")):
        among, _ = written(engine, mode, count=COMPANY, streams=COMPANY, schedule=schedule, temperature=0.0)
        assert among == [plain[i % len(plain)] for i in range(COMPANY)], (mode, schedule)


def test_a_seed_gives_the_same_text_at_the_recommended_sampling(engine, record_property):
    """Coupled verification: drafted for or not, alone or among 16."""
    said = engine[0].info.sampling
    sampling = {"temperature": said.temperature, "top_p": said.top_p, "top_k": said.top_k}
    plain, _ = written(engine, "plain", **sampling)
    greedy, _ = written(engine, "plain", temperature=0.0)
    assert plain != greedy  # it does sample
    drafted, length = written(engine, "dspark", **sampling)
    record_property("accepted_length", length)
    print(f"accepted length {length:.2f}")
    assert drafted == plain
    assert length > 1.5
    among, _ = written(engine, "dspark", count=COMPANY, streams=COMPANY, schedule="adaptive", **sampling)
    assert among == [plain[i % len(plain)] for i in range(COMPANY)]


def test_it_is_served_under_its_name_with_its_makers_sampling(engine):
    info = engine[0].info
    assert (info.model, info.drafter) == ("qwen2.5-coder-0.5b", "qwen2.5-coder-0.5b-instruct")
    assert info.sampling == RecommendedSampling(temperature=0.7, top_p=0.8, top_k=20)
