"""The round that GPUs capture, run eagerly: the same tokens as the engine's own round, and nobody else's cache touched.

With a GPU (`make test-gpu`) the same tests run captured.
"""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dspark_stream.config import Config
from dspark_stream.console import SILENT
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.schedule import Adaptive, EarlyStop, Fixed, Lagged, Threshold
from dspark_stream.engine.build import build_engine
from dspark_stream.engine.captured import graphs
from dspark_stream.engine.captured.graphs import RoundLadder, Size, row_ladder, seat_ladder
from dspark_stream.engine.captured.round import RoundModels, run_round
from dspark_stream.engine.captured.runner import MOST_SEATS, CapturedRounds, _Flight
from dspark_stream.engine.captured.state import RoundState, Seat
from dspark_stream.engine.eager import EagerRounds
from dspark_stream.engine.local import LocalEngine
from dspark_stream.engine.rounds import Models, Rounds
from dspark_stream.errors import ConfigError
from dspark_stream.load.acceptance import Past
from dspark_stream.load.controller import SHARE
from dspark_stream.load.costs import Company, Shape
from dspark_stream.models.torch.head_weights import head_weights
from dspark_stream.models.torch.target import Target
from dspark_stream.types import EngineEvent, FinishedEvent, GenerationRequest, SamplingParams, TokensEvent
from recorded import run_cases
from shared_data import shared
from tiny import FLAT, request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = ["qwen3-vanilla", "qwen3-gated", "gemma4-vanilla"]


@pytest.fixture(autouse=True)
def timed_once(monkeypatch):
    """What rounds take on a CPU decides nothing here."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graphs, "TIMED", 1)


def rounds_of(
    head: str = "vanilla", schedule=None, draft_vocab: int | None = None, drafter: bool = True, **options
) -> EagerRounds:
    with torch.device(DEVICE):
        target = tiny_target()
        drafts = tiny_drafter(target, head=head, draft_vocab=draft_vocab) if drafter else None
    return tiny_rounds(target, drafts, schedule=schedule, **options)


def captured(eager: EagerRounds, seats: int = 8) -> CapturedRounds:
    rounds = CapturedRounds(eager.models, eager.schedule, seats=seats, longest=300, candidates=48)
    rounds.models.controller.costs.learn = lambda *_: None  # what rounds take on a CPU decides nothing here
    return rounds


def run(rounds: Rounds, requests: list[GenerationRequest], streams: int = 8) -> dict[str, list]:
    """Token ids and rounds of every request."""
    engine = tiny_engine(rounds)
    got: dict[str, list] = {r.request_id: [] for r in requests}
    with LocalEngine(engine) as local:
        for event, _ in local.run(requests, streams=streams):
            if isinstance(event, TokensEvent):
                got[event.request_id] += event.token_ids
            elif isinstance(event, FinishedEvent):
                got[event.request_id].append(event.reason)
    return got


def mixed_requests(n: int = 9) -> list[GenerationRequest]:
    """Greedy, rejection and coupled, plain and drafted, truncated and not, of different lengths."""
    requests = []
    for i in range(n):
        options = {"temperature": 0.0} if i % 3 == 0 else {"temperature": 0.9, "seed": i}
        if i % 4 == 3:
            options |= {"top_k": 12, "top_p": 0.9}
        requests.append(
            request(
                f"r{i}",
                prompt=tuple(range(2, 5 + i)),
                max_tokens=10 + 5 * (i % 4),
                ignore_eos=i % 2 == 0,
                verification="coupled" if i % 3 == 2 else "rejection",
                mode="plain" if i % 5 == 4 else "dspark",
                **options,
            )
        )
    return requests


class OfWholeBlocks(Fixed):
    """Drafts whole blocks however many tokens it verifies, as captured rounds do."""

    looks_up = False

    def slots(self, gamma):
        return gamma if self.length else 0


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
@pytest.mark.parametrize("length", [0, 2, 4])
def test_the_engines_tokens(head, length):
    """Guards against a round that differs from the engine's in anything: every head, all ways to accept, joining and
    leaving streams, results read one round late."""
    requests = mixed_requests()
    expected = run(rounds_of(head, OfWholeBlocks(length)), requests, streams=5)
    got = run(captured(rounds_of(head, Fixed(length))), requests, streams=5)
    assert got == expected


def test_a_reduced_draft_vocabulary():
    """Guards against draft vocabulary indices taken for target ids."""
    requests = mixed_requests()
    assert run(captured(rounds_of("vanilla", Fixed(4), 29)), requests) == run(
        rounds_of("vanilla", Fixed(4), 29), requests
    )


def test_the_engines_promises():
    """Guards against a calibration that the captured round applies otherwise: each way to accept has its own."""
    calibration = Calibration(
        greedy=[2.0, 0.5], rejection=[0.7] * 4, greedy_bias=[-0.5, 0.25, 1.0], coupled_bias=[-1.0] * 4
    )
    requests = [msgspec.structs.replace(r, record_rounds=True) for r in mixed_requests(3)]
    promised = []
    for way in (lambda eager: eager, captured):
        eager = rounds_of(schedule=Fixed(4))
        tried = way(EagerRounds(replace(eager.models, calibration=calibration), eager.schedule))
        rounds: dict[str, list[float]] = {}
        with LocalEngine(tiny_engine(tried)) as local:
            for event, _ in local.run(requests, streams=3):
                if isinstance(event, TokensEvent) and event.round is not None:
                    rounds.setdefault(event.request_id, []).extend(event.round.survival)
        promised.append(rounds)
    assert set(promised[0]) == {"r0", "r1", "r2"}
    for name, survivals in promised[0].items():
        assert len(survivals) >= 8
        assert promised[1][name] == pytest.approx(survivals, abs=1e-5)


def test_without_a_drafter():
    """Plain mode uses the same machinery."""
    requests = mixed_requests()
    plain = rounds_of(drafter=False, looks_up=False)  # which captured rounds do not do
    assert run(captured(rounds_of(drafter=False)), requests) == run(plain, requests)


@pytest.mark.parametrize("schedule", [Adaptive(), EarlyStop(), Lagged(), Threshold(0.3)])
def test_text_does_not_depend_on_the_schedule(schedule):
    """Greedy and coupled text is the target's own, whatever budgets are chosen; with measured sizes, too."""
    requests = [r for r in mixed_requests(12) if r.sampling.temperature == 0.0 or r.verification == "coupled"]
    expected = run(rounds_of(schedule=Fixed(0)), requests)
    rounds = captured(rounds_of(schedule=schedule), seats=3)
    rounds.ladder.warm()
    assert set(rounds.ladder.round_ms) == set(rounds.ladder.sizes())
    assert run(rounds, requests, streams=3) == expected


SCHEDULES = ["fixed:3", "threshold:0.4", "adaptive", "none", "early-stop", "fixed:0", "lagged", "fixed:3"]


def test_every_schedule_in_turn():
    """Guards against a schedule that is changed while the engine runs and followed by half: rule, sizes, table."""
    requests = [r for r in mixed_requests(12) if r.sampling.temperature == 0.0 or r.verification == "coupled"]
    expected = run(rounds_of(schedule=Fixed(0)), requests)
    rounds = captured(rounds_of(schedule=Fixed(2)), seats=3)
    rounds.ladder.warm()
    engine = tiny_engine(rounds)
    with LocalEngine(engine) as local:
        for schedule in SCHEDULES:
            engine.use_schedule(schedule)
            got: dict[str, list] = {r.request_id: [] for r in requests}
            drafted = 0
            for event, _ in local.run(requests, streams=3):
                if isinstance(event, TokensEvent):
                    got[event.request_id] += event.token_ids
                else:
                    got[event.request_id].append(event.reason)
                    drafted += event.usage.drafted
            assert got == expected
            if schedule in ("none", "fixed:0"):
                assert not drafted
            elif schedule.startswith(("fixed", "threshold")):  # the others may find that it does not pay here
                assert drafted


def test_a_stream_that_sat_out_has_its_context():
    """Guards against drafts from holes: rounds that do not draft give the drafter their features all the same."""
    requests = [request(f"c{i}", prompt=(3 + i, 9, 4), max_tokens=40, ignore_eos=True) for i in range(3)]
    stores, texts = [], []
    for idle in (0, 2):
        rounds = captured(rounds_of(schedule=Fixed(4)), seats=4)
        choose, count = rounds.sizing.choose, [0]

        def sometimes(streams, slowest_ms, choose=choose, count=count, idle=idle):
            count[0] += 1
            size = choose(streams, slowest_ms)
            return Size(size.seats, size.seats, False, context=True) if idle and count[0] % 3 else size

        rounds.sizing.choose = sometimes
        got = run(rounds, requests)
        stores.append([t.clone() for t in (*rounds.models.drafter_kv.keys, *rounds.models.drafter_kv.values)])
        texts.append(got)
        learnt = rounds.models.controller.acceptance
        assert learnt.worth(Past(rounds.models.gamma, "greedy")) != learnt.worth(Past(rounds.models.gamma, "coupled"))
    assert texts[0] == texts[1]
    first = next(iter(rounds_of().models.drafter_kv.keys))
    for a, b in zip(*stores, strict=True):
        assert a.shape[1:] == first.shape[1:]
        for slot in (0, 48, 96):  # extents of 3 + 40 + 5 slots, in whole grains
            torch.testing.assert_close(a[slot : slot + 41], b[slot : slot + 41], atol=1e-5, rtol=1e-4)
            assert a[slot : slot + 41].abs().sum() > 0


def test_a_bound_on_chunk_gaps_is_heard():
    """Guards against a bound that a captured round does not know of: what takes longer is not drafted."""
    rounds = captured(rounds_of(schedule=Fixed(4)), seats=4)
    rounds.ladder.round_ms = {s: 5.0 if s.drafting else 1.0 for s in rounds.ladder.sizes()}
    requests = [
        request(f"g{i}", prompt=(3 + i, 9, 4), max_tokens=30, ignore_eos=True, max_chunk_gap_ms=gap)
        for i, gap in enumerate([0.0, 2.0])
    ]
    engine = tiny_engine(rounds)
    for these, drafts in ((requests[:1], True), (requests, False)):
        with_drafts = 0
        with LocalEngine(tiny_engine(rounds) if drafts else engine) as local:
            for event, _ in local.run(these, streams=2):
                with_drafts += isinstance(event, FinishedEvent) and event.usage.drafted
        assert (with_drafts > 0) == drafts


def test_prompts_do_not_go_by_captured_rounds():
    """Guards against chunks of prompts that are cut, or let grow, by how long graphs take."""
    rounds = CapturedRounds(rounds_of().models, Adaptive(), seats=4, longest=300, candidates=48)
    costs, company = rounds.models.controller.costs, Company(2, 0.0)
    before = rounds.prompt_ms([16, 64], 100)
    for _ in range(50):
        costs.learn(Shape(company, 0, 4, 2), 100.0)
    assert costs.pace > 5.0
    assert rounds.prompt_ms([16, 64], 100) == before == list(FLAT.pass_ms([16, 64], Company(1, 100)))


def test_a_round_that_was_not_timed_teaches_no_costs():
    """Guards against a look that never comes while prompts do, and against times that are made up."""
    rounds = CapturedRounds(rounds_of().models, Adaptive(), seats=4, longest=300, candidates=48)
    controller = rounds.models.controller
    costs, shape = controller.costs, Shape(Company(2, 0.0), 0, 4, 2)
    for ms in (3.0, 2.5):
        controller.learn([], shape, ms)
    pace, saved = costs.pace, controller._may_lose_ms
    size = Size(2, 10, True)
    rounds._learn(_Flight([None, None], size, None, None, None, 0.0), [], None)
    assert costs.pace == pytest.approx(pace)
    assert not any(costs._by_size)
    assert costs._last is None
    assert controller._may_lose_ms == pytest.approx(saved + SHARE * costs.ms(rounds.sizing.shape(2, size)))


def test_rounds_beside_a_prompt_or_a_pause_teach_no_times():
    """Guards against a prompt's pass, or a pause, that is taken for what a round costs: it falls between the round
    under way and the one that is started next."""
    rounds = captured(rounds_of(schedule=Fixed(4)))
    timed: list[bool] = []
    decode, rest, rested = rounds.decode, rounds.rest, []

    def paused(streams, slowest_ms):
        if len(timed) == 5:
            rest()
        return decode(streams, slowest_ms)

    rounds._learn = lambda flight, learnt, ms: timed.append(ms is not None)
    rounds.decode, rounds.rest = paused, lambda: rested.append(len(timed))
    run(rounds, [request(max_tokens=60, ignore_eos=True)])
    assert timed[:9] == [False, True, True, True, True, False, False, True, True]
    assert rested.count(0) >= 2  # before the request came, and by its prompt


def test_cancelled_and_held_streams_lose_nothing():
    """Guards against a round in flight whose results are dropped, doubled or given to another stream."""
    names = [f"c{i}" for i in range(4)]
    requests = [request(n, prompt=(3 + i, 9, 4), max_tokens=60, ignore_eos=True) for i, n in enumerate(names)]
    expected = run(rounds_of(schedule=Fixed(4)), requests)
    engine = tiny_engine(captured(rounds_of(schedule=Fixed(4))))
    got: dict[str, list[int]] = {n: [] for n in names}
    seen = 0
    with LocalEngine(engine) as local:
        for event, _ in local.run(requests, streams=4):
            if isinstance(event, TokensEvent):
                got[event.request_id] += event.token_ids
                seen += 1
                if seen == 6:
                    engine.hold("c0")
                    engine.cancel("c1")
                elif seen == 14:
                    engine.release("c0")
            elif event.request_id != "c1":
                got[event.request_id].append(event.reason)
    for name in ("c0", "c2", "c3"):
        assert got[name] == expected[name]
    assert got["c1"] == expected["c1"][: len(got["c1"])]


def test_nothing_follows_a_streams_end():
    """Guards against the round in flight when a stream stops at a stop token: its results belong to nobody."""
    requests = [
        request(f"s{i}", prompt=(3 + i, 9, 4), max_tokens=60, stop_token_ids=tuple(range(0, 48, 3))) for i in range(5)
    ]
    engine = tiny_engine(captured(rounds_of(schedule=Fixed(4))))
    events: list[EngineEvent] = []
    engine.start(events.extend)
    for r in requests:
        engine.submit(r)
    engine.close(60.0)
    for r in requests:
        mine = [e for e in events if e.request_id == r.request_id]
        assert [isinstance(e, FinishedEvent) for e in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].reason == "stop"
        assert mine[-1].usage.output_tokens == sum(len(e.token_ids) for e in mine[:-1])


def watched_round(*args) -> None:
    """A round that fails where it reads a value on the host."""
    with NoHostReads():
        run_round(*args)


@pytest.mark.parametrize("pair", PAIRS)
def test_every_recorded_round(pair, tmp_path):
    """The reference implementation's recordings: anchors, all drafts, accepted counts and bonus tokens."""
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
    engine, _ = build_engine(config, SILENT)
    engine._rounds = CapturedRounds(
        engine._models, Fixed(7), seats=4, longest=256, candidates=320, replace=watched_round
    )
    for case, (ids, rounds) in zip(cases, run_cases(engine, cases), strict=True):
        assert ids[: len(case["output"])] == case["output"]
        for got, recorded in zip(rounds, case["rounds"], strict=False):
            assert {name: getattr(got, name) for name in recorded} == recorded
        assert len(rounds) >= len(case["rounds"])


# --- what a captured round may not do ----------------------------------------------------------------------------


def seat(slot: int, **options) -> Seat:
    fields = {
        "anchor": 5,
        "position": 6,
        "limit": 40,
        "drafts": True,
        "acceptance": "greedy",
        "sampling": SamplingParams(max_tokens=8, temperature=0.0),
        "round_key": 2**64 - 3,
        "temperatures": [],
    } | options
    return Seat(slot=slot, **fields)


def ready(seats: int = 4) -> tuple[RoundModels, RoundState, Models]:
    """Models with random caches, so that a stray write shows."""
    models = rounds_of().models
    for store in (models.target_kv, models.drafter_kv):
        for tensor in (*store.keys, *store.values):
            tensor.copy_(torch.randn_like(tensor))
    parts = RoundModels(
        models.target, models.target_kv, models.drafter, models.drafter_kv, head_weights(models.drafter), 48, 300
    )
    return parts, RoundState(seats, 4, seats * 5, models.target.device), models


def contents(models: Models) -> list[torch.Tensor]:
    stores = (models.target_kv, models.drafter_kv)
    return [t.clone() for store in stores for t in (*store.keys, *store.values)]


@pytest.mark.parametrize("size", [(4, 20, True), (4, 4, False), (4, 4, False, True), (2, 3, True)])
def test_rows_of_nobody_change_no_cache(size):
    """Guards against padding that writes into stream 0's extent: only the slot that is nobody's may change."""
    parts, state, models = ready()
    before = contents(models)
    run_round(parts, state, *size)
    for old, new in zip(before, contents(models), strict=True):
        assert torch.equal(old[:-1], new[:-1])
    assert (state.outcome[: size[0], 0] == -1).all()
    assert not state.position.any()


def test_a_round_writes_to_its_own_streams_rows_alone():
    """Two streams among four seats, one of them at its limit: keys and values at p … p+ℓ of the other, nothing else."""
    parts, state, models = ready()
    state.bind([seat(0), seat(64, position=40), seat(128, acceptance="coupled")])
    before = contents(models)
    run_round(parts, state, 4, 20, True)
    allowed = torch.zeros(len(before[0]), dtype=torch.bool)
    for slot in (0, 128):
        allowed[slot + 6 : slot + 6 + 5] = True
    allowed[-1] = True
    for old, new in zip(before, contents(models), strict=True):
        changed = (old != new).flatten(1).any(1)
        assert changed.any()
        assert not (changed & ~allowed).any()
    assert state.outcome[:4, 0].tolist()[1] == -1
    assert state.position[1] == 40


def test_warming_touches_no_cache():
    """Guards against captures and timings that run on whoever sits there."""
    parts, state, models = ready()
    state.bind([seat(0), seat(64)])
    before = contents(models)
    ladder = RoundLadder(parts, state)
    ladder.warm()
    for old, new in zip(before, contents(models), strict=True):
        assert torch.equal(old[:-1], new[:-1])
    assert min(ladder.round_ms.values()) > 0


def test_two_replays_draw_different_noise():
    """Guards against randomness that is baked into a capture: the same seat at another position draws anew."""
    parts, state, _ = ready()
    ladder = RoundLadder(parts, state)
    sampling = SamplingParams(max_tokens=8, temperature=5.0, seed=3)
    outcomes = set()
    for position in range(6, 12):
        state.bind([seat(0, position=position, acceptance="rejection", sampling=sampling)])
        ladder.run(Size(1, 5, True))  # on a GPU one capture, replayed
        outcomes.add(tuple(state.outcome[0].tolist()))
    assert len(outcomes) > 3


HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "equal", "unique", "lift_fresh")


class NoHostReads(TorchDispatchMode):
    """Fails on operations that read a tensor's value on the host, or bring a value from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in HOST_READS, f"{func} inside a round"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert not any(i is not None and i.dtype == torch.bool for i in indices), f"{func} by a mask inside a round"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_nothing_in_a_round_reads_a_value_on_the_host(head):
    """Guards against what cannot be captured: a GPU would have to stop and wait for the host."""
    models = rounds_of(head).models
    parts = RoundModels(
        models.target, models.target_kv, models.drafter, models.drafter_kv, head_weights(models.drafter), 16, 300
    )
    state = RoundState(4, 4, 20, models.target.device)
    state.bind([seat(0), seat(64, acceptance="rejection"), seat(128, acceptance="coupled")])
    with NoHostReads():
        for size in ((4, 20, True), (4, 4, False, True), (4, 4, False)):
            run_round(parts, state, *size)
    with pytest.raises(AssertionError, match="inside a round"), NoHostReads():
        _ = state.position[0].item()


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_every_tensor_of_a_round_is_on_the_models_device(head):
    """Guards against tensors made on the CPU inside a round: torch's device without memory refuses to mix them in."""
    nowhere = torch.device("meta")
    target = Target(tiny_target().model.to(nowhere))
    drafter = tiny_drafter(target, head=head).to(nowhere)
    models = tiny_rounds(target, drafter).models
    parts = RoundModels(target, models.target_kv, drafter, models.drafter_kv, head_weights(drafter), 16, 300)
    state = RoundState(4, 4, 20, nowhere)
    for size in ((4, 20, True), (4, 4, False)):
        run_round(parts, state, *size)
    with pytest.raises(RuntimeError, match="device"):
        _ = state.position + torch.arange(4)


def test_more_streams_than_a_captured_round_takes():
    with pytest.raises(ConfigError, match="max_num_seqs"):
        captured(rounds_of(), seats=MOST_SEATS + 1)


def test_a_schedule_that_is_not_known():
    """Guards against a schedule that is asked for and silently replaced by another."""
    with pytest.raises(ConfigError, match="schedule"):
        captured(rounds_of(schedule=object()), seats=2)


def test_what_cannot_be_captured_is_said_in_our_words(monkeypatch):
    parts, state, _ = ready()
    ladder = RoundLadder(parts, state)

    def refuse(size):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(ladder, "_record", refuse)
    with pytest.raises(ConfigError, match=r"4 streams and 20 rows cannot be captured .*stream is capturing") as caught:
        ladder._capture(Size(4, 20, True))
    assert caught.value.param == "cuda_graphs"


def test_ladders():
    assert seat_ladder(1) == [1]
    assert seat_ladder(24) == [1, 2, 4, 8, 16, 24]
    assert row_ladder(1, 7) == [1, 2, 3, 5, 8]
    assert row_ladder(8, 7) == [8, 12, 16, 24, 40, 64]
    parts, state, _ = ready()
    ladder = RoundLadder(parts, state)
    ladder.fixed = 2
    assert [s for s in ladder.sizes() if s.drafting] == [Size(4, 12, True), Size(2, 6, True), Size(1, 3, True)]
    assert ladder.sizes(2) == [Size(2, 6, True), Size(2, 2, False, True), Size(2, 2, False)]
    ladder.fixed = 0
    assert ladder.sizes() == [Size(4, 4, False), Size(2, 2, False), Size(1, 1, False)]
