"""The engine with tiny real models: what it commits, how streams end, and that everything is given back."""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections import Counter
from functools import partial

import pytest
import torch
from msgspec.structs import replace

from dspark_stream.decoding.schedule import Adaptive, Fixed
from dspark_stream.engine import worker
from dspark_stream.engine.local import LocalEngine
from dspark_stream.errors import ContextLengthError, DrainingError, EngineFailedError, InvalidRequestError
from dspark_stream.load.costs import CapacityCurve
from dspark_stream.models.cache import Extent
from dspark_stream.models.protocols import Rows
from dspark_stream.models.torch import target as torch_target
from dspark_stream.types import FinishedEvent, TokensEvent
from tiny import GAMMA, letters, request, tiny_drafter, tiny_engine, tiny_rounds, tiny_target

HEADS = ["vanilla", "gated", "rnn", "none"]


def collect(engine, requests, streams=8):
    ids = {r.request_id: [] for r in requests}
    ends = {}
    with LocalEngine(engine) as local:
        for event, _ in local.run(requests, streams):
            if isinstance(event, TokensEvent):
                ids[event.request_id] += event.token_ids
            else:
                ends[event.request_id] = event
    return ids, ends


def engine_with(head="vanilla", schedule=None, seed=1, **options):
    target = tiny_target()
    drafter = tiny_drafter(target, seed, head, options.pop("draft_vocab", None), **options.pop("drafter", {}))
    return tiny_engine(tiny_rounds(target, drafter, schedule=schedule, **options))


def greedy_by_transformers(prompt, count):
    """The library's own forward over the whole text for every token: no cache, no ragged batch, no code of ours."""
    target = tiny_target()
    model = target.model
    model.set_attn_implementation("eager")
    ids = list(prompt)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in target.eos_token_ids:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("schedule", [Fixed(GAMMA), Fixed(1), Adaptive()])
def test_greedy_is_the_librarys_own_text(head, schedule):
    """Guards against wrong positions, masks and cache rows, whatever head and schedule."""
    prompts = [(5, 6, 7, 8), (9,), tuple(range(2, 40))]
    requests = [request(str(i), p, max_tokens=20) for i, p in enumerate(prompts)]
    ids, ends = collect(engine_with(head, schedule), requests)
    for i, prompt in enumerate(prompts):
        assert ids[str(i)] == greedy_by_transformers(prompt, 20)
        assert ends[str(i)].usage.output_tokens == len(ids[str(i)])


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01}]
)
@pytest.mark.parametrize("draft_vocab", [None, 20])
def test_coupled_text_is_a_function_of_target_and_seed(options, draft_vocab):
    """The same seed gives the same ids in plain mode, with speculation, alone and in company, under any schedule."""

    def ask(name, seed, mode):
        how = {"mode": mode, "verification": "coupled", "seed": seed, "max_tokens": 18, "ignore_eos": True} | options
        return request(name, (5, 6, seed), **how)

    plain, _ = collect(engine_with(), [ask(str(s), s, "plain") for s in range(3)], streams=1)
    for schedule in (Adaptive(), Fixed(GAMMA), Fixed(2)):
        for head in ("vanilla", "rnn"):
            make = partial(engine_with, head, schedule, draft_vocab=draft_vocab)
            alone, _ = collect(make(), [ask(str(s), s, "dspark") for s in range(3)], streams=1)
            crowd = [ask(str(s), s, "dspark") for s in range(3)] + [request("x", (9, 9), mode="plain")]
            company, _ = collect(make(), crowd)
            assert alone == plain
            assert {k: v for k, v in company.items() if k != "x"} == plain


def test_a_drafter_that_is_the_target_is_always_believed():
    """Accepted length shows what text cannot: with p_d = p_t everything that is sent is accepted.

    The drafter's bias table is rigged so that it copies a target whose next token depends on the last one only.
    """
    target = tiny_target()
    drafter = tiny_drafter(target, draft_vocab=None)
    table = torch.randn(target.vocab_size, target.vocab_size, generator=torch.Generator().manual_seed(3)) * 3
    target.lm_head = OneTokenHead(target, table)
    drafter.base_logits = lambda hidden: torch.zeros(*hidden.shape[:2], target.vocab_size)
    drafter.markov_head.embed = lambda tokens: tokens
    drafter.markov_head.step = lambda e, hidden, state: (e, state)
    drafter.markov_head.bias = lambda tokens: table[tokens]
    drafter.confidence_head = None
    for verification in ("rejection", "coupled"):
        engine = tiny_engine(tiny_rounds(target, drafter, schedule=Fixed(GAMMA)))
        requests = [
            request(str(s), (5, 6), temperature=t, seed=s, verification=verification, ignore_eos=True, max_tokens=40)
            for s, t in enumerate((0.0, 0.7, 1.0))
        ]
        _, ends = collect(engine, requests)
        for end in ends.values():
            assert end.usage.accepted == end.usage.scheduled > 0


class OneTokenHead(torch.nn.Module):
    """Logits that depend on the row's own token alone: found from the embedding that taps saw."""

    def __init__(self, target, table):
        super().__init__()
        self.target, self.table = target, table

    def forward(self, hidden):
        embedded = self.target._taps[-1].flatten(0, -2)
        weights = self.target.embed_tokens.weight
        tokens = torch.cdist(embedded, weights).argmin(-1)
        return self.table[tokens[-len(hidden) :]] if len(hidden) < len(tokens) else self.table[tokens]


def test_prompts_in_chunks_equal_prompts_at_once(monkeypatch):
    """Guards against a chunk border that loses positions, features or the first token."""
    prompt = tuple(random.Random(1).choices(range(2, 48), k=90))

    def drafts():
        asked = request("a", prompt, record_rounds=True, ignore_eos=True)
        engine = engine_with(schedule=Fixed(GAMMA))
        monkeypatch.setattr(engine, "_chunk", lambda *_: chunk)
        with LocalEngine(engine) as local:
            return [e.round.draft_tokens for e, _ in local.run([asked]) if isinstance(e, TokensEvent) and e.round]

    chunk = 512
    whole = drafts()
    chunk = 7
    assert drafts() == whole  # what is drafted shows lost features; the text would not


def test_a_joining_prompt_does_not_stop_the_others():
    """Guards against a long prefill that stalls streams: rounds of the running stream go on between its chunks."""
    curve = CapacityCurve(tokens=[1, 16], verify_ms=[1.0, 60.0], streams=[1], draft_ms=[0.1], gamma=GAMMA)
    engine = engine_with(schedule=Fixed(0), capacity=curve)
    steps: queue.SimpleQueue = queue.SimpleQueue()
    order: list[str] = []
    started = threading.Event()

    def sink(events):
        order.extend(("end " if isinstance(e, FinishedEvent) else "") + e.request_id for e in events)
        started.set()
        if any(isinstance(e, FinishedEvent) and e.request_id == "late" for e in events):
            steps.put(None)

    engine.start(sink)
    engine.submit(request("running", (5, 6), max_tokens=200, ignore_eos=True))
    assert started.wait(5)
    engine.submit(request("late", tuple(range(2, 48)) * 4, max_tokens=1))
    steps.get(timeout=20)
    engine.close(0.0)
    before = order[: order.index("late")]
    assert before.count("running") >= 184 // 16 - 1


def test_a_short_prompt_does_not_wait_for_long_ones_and_they_all_end():
    """Guards against prompts that are read strictly in order: who asks five words waits for everybody's pages."""
    engine = engine_with(schedule=Fixed(0))
    engine._chunk = lambda *_: 16
    passes: list[list[tuple[str, int]]] = []
    real = engine._models.target.forward

    def forward(batch, store, rows):
        passes.append([(len(r.token_ids), r.start) for r in batch])
        return real(batch, store, rows)

    engine._models.target.forward = forward
    long = [request(f"long{i}", tuple(range(2, 48)) * 5, max_tokens=1) for i in range(3)]
    short = request("short", (5, 6, 7, 8, 9), max_tokens=1)
    firsts = []
    with LocalEngine(engine) as local:
        firsts += [e.request_id for e, _ in local.run([*long, short], 4) if isinstance(e, FinishedEvent)]
    assert firsts == ["short", "long0", "long1", "long2"]
    tokens = [sum(count for count, _ in rows) for rows in passes]
    assert max(tokens) == 16
    assert sum(tokens) == 3 * 230 + 5
    reading = next(i for i, rows in enumerate(passes) if (5, 0) in rows)
    assert sorted(passes[reading]) == [(5, 0), (11, 16 * reading)]  # beside it the oldest goes on


def test_places_go_to_whoever_has_the_fewest():
    """Guards against one client's line that everybody else stands behind."""
    engine = tiny_engine(tiny_rounds(), max_num_seqs=2)
    asked = [
        *(replace(request(f"a{i}", max_tokens=4, ignore_eos=True), client="a") for i in range(5)),
        *(replace(request(f"b{i}", max_tokens=4, ignore_eos=True), client="b") for i in range(2)),
    ]
    order = []
    engine.hold("nobody")
    with LocalEngine(engine) as local:
        engine._admit, admit = lambda: None, engine._admit
        for one in asked:
            engine.submit(one)
        engine._inbox.put(lambda: setattr(engine, "_admit", admit))
        while len(order) < len(asked):
            order += [e.request_id for e in local._next_step()[1] if isinstance(e, FinishedEvent)]
    assert order == ["a0", "b0", "a1", "b1", "a2", "a3", "a4"]


def test_stop_token_and_max_tokens_inside_a_round():
    """Guards against tokens committed after a stop: greedy text up to and with the stop token, not one more."""
    free, _ = collect(engine_with(schedule=Fixed(GAMMA)), [request("a", ignore_eos=True, max_tokens=40)])
    text = free["a"]
    for cut in range(1, 24):
        ids, ends = collect(engine_with(schedule=Fixed(GAMMA)), [request("a", ignore_eos=True, max_tokens=cut)])
        assert ids["a"] == text[:cut]
        assert ends["a"].reason == "length"
    for token in set(text[:20]):
        asked = request("a", ignore_eos=True, max_tokens=40, stop_token_ids=(token,))
        ids, ends = collect(engine_with(schedule=Fixed(GAMMA)), [asked])
        assert ids["a"] == text[: text.index(token) + 1]
        assert ends["a"].reason == "stop"


def test_stop_strings_across_rounds():
    """Guards against a stop string that is missed, sent, or cut short because a round ended inside it."""

    def text_of(stop, name="a"):
        target = tiny_target()
        engine = tiny_engine(tiny_rounds(target, tiny_drafter(target), schedule=Fixed(GAMMA)), text=letters())
        text, reason = "", None
        with LocalEngine(engine) as local:
            for event, _ in local.run([request(name, ignore_eos=True, max_tokens=40, stop=stop)]):
                if isinstance(event, TokensEvent):
                    assert event.text == "".join(p.text for p in event.pieces)
                    text += event.text
                else:
                    reason = event.reason
        return text, reason

    whole, _ = text_of(())
    assert len(whole) == 40
    for start in range(0, 30, 3):
        stop = whole[start : start + 3]
        assert text_of((stop, "zz")) == (whole[: whole.index(stop)], "stop")
    assert text_of((whole[-1] + "never",)) == (whole, "length")


def test_every_bad_request_is_refused_before_it_is_queued():
    engine = engine_with()
    engine.start(lambda events: None)
    bad = {
        "prompt_ids": [request(prompt=()), request(prompt=(48,)), request(prompt=(-1,))],
        "max_tokens": [request(max_tokens=0), request(max_tokens=10_000)],
        "temperature": [
            request(temperature=-0.1),
            request(temperature=float("nan")),
            request(temperature=2.1),
        ],
        "top_p": [request(top_p=0.0), request(top_p=1.1), request(top_p=float("nan"))],
        "top_k": [request(top_k=-1)],
        "min_p": [request(min_p=-0.1), request(min_p=2.0)],
        "seed": [request(seed=-1), request(seed=2**63)],
        "stop": [request(stop=("",)), request(stop=("x",))],
        "frequency_penalty": [request(frequency_penalty=x) for x in (-2.1, 2.1, float("nan"))],
        "presence_penalty": [request(presence_penalty=x) for x in (-2.1, 2.1, float("nan"))],
        "repetition_penalty": [request(repetition_penalty=x) for x in (0.0, -1.0, 2.1, float("nan"))],
        "min_tokens": [request(min_tokens=-1), request(min_tokens=25)],
        "logit_bias": [
            *(request(logit_bias=((3, x),)) for x in (-101.0, 100.5, float("nan"))),
            *(
                request(logit_bias=tokens)
                for tokens in (((48, 1.0),), ((-1, 1.0),), ((3, 1.0), (3, 1.0)), ((4, 1.0), (3, 1.0)))
            ),
            request(logit_bias=tuple((t, 1.0) for t in range(1025))),
        ],
    }
    for param, requests in bad.items():
        for r in requests:
            with pytest.raises(InvalidRequestError) as caught:
                engine.submit(r)
            assert caught.value.param == param
    with pytest.raises(ContextLengthError):
        engine.submit(request(prompt=(5,) * 250, max_tokens=20))
    engine.submit(request("twice", max_tokens=200, ignore_eos=True))
    with pytest.raises(InvalidRequestError):
        engine.submit(request("twice"))
    engine.close(0.0)
    with pytest.raises(DrainingError):
        engine.submit(request("late"))


def test_a_failing_step_fails_its_streams_and_the_engine_goes_on():
    """Guards against a thread that dies, or a stream without a terminal event, when a pass raises."""
    engine = engine_with()
    target = engine._models.target
    real, broken = target.forward, iter([True])

    def forward(*args, **kwargs):
        if next(broken, False):
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    target.forward = forward
    with LocalEngine(engine) as local:
        [(first, _)] = list(local.run([request("a")]))
        assert first.reason == "failed"
        assert first.error.code == "internal_error"
        assert "out of memory" not in first.error.message
        events = [e for e, _ in local.run([request("b", max_tokens=3, ignore_eos=True)])]
        assert events[-1].reason == "length"
    assert engine.snapshot().kv_tokens_used == 0


@pytest.mark.parametrize("fault", [ZeroDivisionError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["_admit", "_take_commands", "_hand_over"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_dies_leaves_nobody_waiting(monkeypatch, where, fault):
    """Guards against streams without an end, or with two, when something outside a step raises on the engine's thread,
    whatever it is: those that run, those that wait, and one that was submitted but not yet seen."""
    engine = tiny_engine(tiny_rounds(), max_num_seqs=1)
    ends: queue.SimpleQueue = queue.SimpleQueue()
    engine.start(lambda batch: [ends.put(e) for e in batch if isinstance(e, FinishedEvent)])
    real, broken = getattr(engine, where), iter([True])

    def fail(*args):
        if next(broken, False):
            engine.submit(request("unseen"))
            raise fault("secret prompt")
        real(*args)

    engine.hold("nobody")
    for name in ("runs", "waits"):
        engine.submit(request(name, max_tokens=200, ignore_eos=True))
    monkeypatch.setattr(engine, where, fail)
    last = {e.request_id: e for e in (ends.get(timeout=5) for _ in range(3))}
    engine._thread.join(5)
    assert set(last) == {"runs", "waits", "unseen"}
    assert {(e.reason, e.error.code) for e in last.values()} == {("failed", "engine_failed")}
    assert not any("secret" in e.error.message for e in last.values())
    assert ends.empty()
    snapshot = engine.snapshot()
    assert (snapshot.alive, snapshot.running, snapshot.waiting) == (False, 0, 0)
    assert "failed" in snapshot.failure
    with pytest.raises(EngineFailedError):
        engine.submit(request("b"))
    engine.close(0.0)


@pytest.mark.parametrize("fault", [KeyboardInterrupt, SystemExit])
def test_what_is_no_exception_in_a_step_ends_the_engine(fault):
    """Guards against streams that hang for ever behind a thread that has gone."""
    engine = engine_with()

    def forward(*args, **kwargs):
        raise fault

    engine._models.target.forward = forward
    with LocalEngine(engine) as local:
        [(end, _)] = list(local.run([request("a")]))
        assert (end.reason, end.error.code) == ("failed", "engine_failed")
        with pytest.raises(EngineFailedError):
            list(local.run([request("b")]))


POISON = 13


def poisoned(engine, is_poison):
    """Make the engine's passes fail where ``is_poison(rows)`` of any stream in them."""
    target = engine._models.target
    real, sizes = target.forward, []

    def forward(batch, *args, **kwargs):
        sizes.append(len(batch))
        if True in {is_poison(rows) for rows in batch}:  # of all: some tests remember what they saw
            raise RuntimeError("secret prompt")
        return real(batch, *args, **kwargs)

    target.forward = forward
    return sizes


@pytest.mark.parametrize("schedule", [Fixed(GAMMA), Fixed(0)])
@pytest.mark.parametrize("prompt_fails", [True, False])
def test_who_makes_a_pass_fail_ends_alone(schedule, prompt_fails):
    """Guards against one stream that takes its whole batch with it, in its prompt or in its answer; the others' text is
    what it is without it, token for token."""
    prompts = [(5, 6, 7, 8), (9,), (POISON, 3, 4), tuple(range(20, 40)), (POISON, 9), (41, 42)]
    asked = [request(str(i), p, max_tokens=20, ignore_eos=True) for i, p in enumerate(prompts)]
    good = [str(i) for i, p in enumerate(prompts) if POISON not in p]
    want, _ = collect(engine_with(schedule=schedule), [r for r in asked if r.request_id in good])
    engine = engine_with(schedule=schedule)
    owners: dict[int, bool] = {}

    def is_poison(rows):
        if rows.start == 0:
            owners[rows.extent.slot] = rows.token_ids[0] == POISON
        return owners[rows.extent.slot] and prompt_fails == (rows.start == 0)

    poisoned(engine, is_poison)
    ids, ends = collect(engine, asked)
    for name in ids:
        if name in good:
            assert (ids[name], ends[name].reason) == (want[name], "length")
        else:
            assert (ends[name].reason, ends[name].error.code) == ("failed", "internal_error")
            assert "secret" not in ends[name].error.message
    assert engine.snapshot().kv_tokens_used == 0


def test_one_who_poisons_again_and_again_ends_nobody_else(monkeypatch):
    """Guards against a service that one client ends, alone on it or not, by sending what it cannot answer."""
    monkeypatch.setattr(worker, "LOOK_AGAIN_S", 0.01)
    engine = engine_with()
    poisoned(engine, lambda rows: POISON in rows.token_ids and rows.start == 0)
    with LocalEngine(engine) as local:
        for i in range(20):
            [(end, _)] = local.run([request(str(i), (POISON,))])
            assert end.error.code == "internal_error"
        assert engine.snapshot().failure == ""
        company = [request(f"g{i}", (5, 6, i + 20), max_tokens=60, ignore_eos=True) for i in range(3)]
        crowd = [r for i in range(30) for r in (*company[i : i + 1], request(f"p{i}", (POISON,)))]
        ends = [e for e, _ in local.run(crowd, 8) if isinstance(e, FinishedEvent)]
    assert Counter(e.request_id[0] + e.reason for e in ends) == {"glength": 3, "pfailed": 30}


def test_few_passes_find_who_it_was():
    """Guards against a search that runs everybody alone: one of sixteen is found in halves."""
    engine = engine_with(schedule=Fixed(0))
    sizes = poisoned(engine, lambda rows: POISON in rows.token_ids and rows.start == 0)
    asked = [request(str(i), (POISON if i == 5 else 20 + i, 3), max_tokens=1) for i in range(16)]
    engine.info = replace(engine.info, max_num_seqs=16)
    engine.hold("nobody")
    for one in asked:
        engine.submit(one)
    ends: queue.SimpleQueue = queue.SimpleQueue()
    engine.start(lambda batch: [ends.put(e) for e in batch if isinstance(e, FinishedEvent)])
    reasons = {e.request_id: e.reason for e in (ends.get(timeout=10) for _ in asked)}
    engine.close(0.0)
    assert [name for name, reason in reasons.items() if reason == "failed"] == ["5"]
    own = worker.OWN_TOKENS * len(worker.OWN_WAYS)  # the engine's own requests: a pass a token
    assert sizes[0] == 16
    assert len(sizes) <= 1 + own + 2 * 4


def test_a_pass_that_failed_once_fails_nobody():
    """Guards against streams that end because of a fault that has gone; and features lost or handed over twice."""
    asked = [request(str(i), (5, 6, 7 + i), max_tokens=20, ignore_eos=True, record_rounds=True) for i in range(3)]

    def drafts(engine):
        got: dict[str, list] = {r.request_id: [] for r in asked}
        with LocalEngine(engine) as local:
            for event, _ in local.run(asked, 3):
                if isinstance(event, TokensEvent) and event.round:
                    got[event.request_id].append((event.round.start, event.round.draft_tokens))
        return got

    want = drafts(engine_with(schedule=Fixed(GAMMA)))
    for part in ("target", "drafter"):
        for at in (1, 2, 4):
            engine = engine_with(schedule=Fixed(GAMMA))
            model = getattr(engine._models, part)
            name = "forward" if part == "target" else "append_context"
            real, calls = getattr(model, name), iter(range(1000))

            def once(*args, real=real, calls=calls, at=at, **kwargs):
                if next(calls) == at:
                    raise MemoryError
                return real(*args, **kwargs)

            setattr(model, name, once)
            assert drafts(engine) == want, (part, at)


@pytest.mark.parametrize("asked_again", [True, False])
def test_an_engine_that_fails_at_everything_ends(monkeypatch, asked_again):
    """Guards against a service that looks well and fails every request: it ends in bounded time, whether or not anybody
    goes on asking, and every stream has one end."""
    monkeypatch.setattr(worker, "LOOK_AGAIN_S", 0.05)
    engine = engine_with()
    poisoned(engine, lambda rows: True)
    ends: Counter[str] = Counter()
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def sink(events):
        for event in events:
            if isinstance(event, FinishedEvent):
                ends[event.request_id] += 1
                ended.put(event.error.code)

    engine.start(sink)
    sent = 0
    deadline = time.monotonic() + 10
    while engine.snapshot().alive and time.monotonic() < deadline:
        if not sent or asked_again:
            with contextlib.suppress(EngineFailedError):
                engine.submit(request(str(sent)))
                sent += 1
        time.sleep(0.01)
    assert not engine.snapshot().alive
    assert "request of its own" in engine.snapshot().failure
    codes = {ended.get(timeout=5) for _ in range(sent)}
    assert codes <= {"internal_error", "engine_failed"}
    assert set(ends.values()) == {1}
    with pytest.raises(EngineFailedError):
        engine.submit(request("late"))


def test_an_engine_that_fails_at_drawing_alone_ends(monkeypatch):
    """Guards against a service that fails everybody who has a temperature, and looks well since greedy text goes."""
    monkeypatch.setattr(worker, "LOOK_AGAIN_S", 0.01)
    engine = engine_with()
    monkeypatch.setattr(torch_target, "distributions", lambda *_: 1 / 0)
    ended = queue.SimpleQueue()
    engine.start(lambda events: [ended.put(e) for e in events if isinstance(e, FinishedEvent)])
    engine.submit(request("a", ignore_eos=True))
    assert ended.get(timeout=10).reason == "length"
    engine.submit(request("b", temperature=1.0))
    assert ended.get(timeout=10).error.code == "internal_error"
    engine._thread.join(10)
    assert "request of its own" in engine.snapshot().failure


def test_an_engine_that_is_well_again_goes_on(monkeypatch):
    """Guards against doubts that are kept: failures long ago count for nothing."""
    monkeypatch.setattr(worker, "LOOK_AGAIN_S", 0.02)
    engine = engine_with()
    broken = threading.Event()
    poisoned(engine, lambda rows: broken.is_set())
    with LocalEngine(engine) as local:
        for i in range(5):
            broken.set()
            [*_, (end, _)] = local.run([request(f"a{i}", ignore_eos=True)])
            broken.clear()
            assert end.reason == "failed"
            deadline = time.monotonic() + 5
            while engine._doubts and time.monotonic() < deadline:
                time.sleep(0.005)
            [*_, (end, _)] = local.run([request(f"b{i}", ignore_eos=True)])
            assert end.reason == "length"


def test_a_full_engine_finds_out_whose_fault_it_was():
    """Guards against a search that needs room which the streams have: every slot is taken."""
    engine = tiny_engine(tiny_rounds(slots=64), slots=64)
    poisoned(engine, lambda rows: POISON in rows.token_ids and rows.start == 0)
    asked = [request(str(i), (POISON if i == 1 else 20 + i, 3), max_tokens=13, ignore_eos=True) for i in range(4)]
    for one in asked:
        engine.submit(one)
    ends: queue.SimpleQueue = queue.SimpleQueue()
    engine.start(lambda batch: [ends.put(e) for e in batch if isinstance(e, FinishedEvent)])
    reasons = {e.request_id: e.reason for e in (ends.get(timeout=10) for _ in asked)}
    engine.close(0.0)
    assert reasons == {"0": "length", "1": "failed", "2": "length", "3": "length"}


def test_a_stream_whose_end_was_interrupted_ends_once(monkeypatch):
    """Guards against an end that is lost, or said twice, when what ends a stream fails half way."""
    engine = engine_with()
    ends: queue.SimpleQueue = queue.SimpleQueue()
    engine.start(lambda batch: [ends.put(e) for e in batch if isinstance(e, FinishedEvent)])
    monkeypatch.setattr(engine._allocator, "free", lambda extent: 1 / 0)
    engine.submit(request("a", max_tokens=2, ignore_eos=True))
    assert ends.get(timeout=5).reason == "length"
    monkeypatch.undo()
    engine.submit(request("b", max_tokens=2, ignore_eos=True))
    assert ends.get(timeout=5).request_id == "b"
    engine.close(0.0)
    assert ends.empty()


def test_an_idle_engine_is_not_a_stuck_one():
    """Guards against a probe that calls a resting engine stuck: its age counts work, not waiting."""
    engine = engine_with()
    engine.start(lambda events: None)
    assert engine.snapshot().last_step_age_s == 0.0
    engine.hold("nobody")
    assert engine.snapshot().last_step_age_s < 1.0
    engine.close(0.0)


def test_hold_keeps_the_stream_and_release_goes_on():
    """Guards against a held stream that is stepped, dropped, or blocks the others; and against a spinning thread."""
    engine = engine_with(schedule=Fixed(0))
    events: queue.SimpleQueue = queue.SimpleQueue()
    engine.start(lambda batch: [events.put(e) for e in batch])
    engine.submit(request("a", max_tokens=200, ignore_eos=True))
    assert events.get(timeout=5).request_id == "a"
    engine.hold("a")
    engine.submit(request("b", max_tokens=5, ignore_eos=True))
    seen = []
    while not (seen and isinstance(seen[-1], FinishedEvent) and seen[-1].request_id == "b"):
        seen.append(events.get(timeout=5))
    with pytest.raises(queue.Empty):
        events.get(timeout=0.2)
    assert engine.snapshot().held == 1
    engine.release("a")
    engine.release("unknown")
    tokens = 0
    while not isinstance(event := events.get(timeout=5), FinishedEvent):
        tokens += len(event.token_ids)
    assert event.reason == "length"
    assert event.usage.output_tokens == 200
    engine.close(1.0)


def _keep_ends(ends, batch):
    ends.extend(event for event in batch if isinstance(event, FinishedEvent))


def test_close_lets_streams_finish_and_says_what_cut_the_rest():
    """Guards against an answer that a shutdown cut and that looks as if the model, or the client, had ended it."""
    for timeout_s, reason in ((5.0, "length"), (0.0, "failed")):
        engine = engine_with(schedule=Fixed(0))
        ends = []
        engine.start(partial(_keep_ends, ends))
        engine.submit(request("a", max_tokens=60, ignore_eos=True))
        engine.close(timeout_s)
        assert [e.reason for e in ends] == [reason]
        assert [e.error.code for e in ends if e.error] == (["server_shutdown"] if reason == "failed" else [])
        assert not engine.snapshot().alive


@pytest.mark.parametrize("seed", range(3))
def test_random_joins_cancels_holds_and_failures_end_at_the_baseline(seed):
    """Everything is given back every time, and every stream ends exactly once."""
    rng = random.Random(seed)
    target = tiny_target()
    engine = tiny_engine(tiny_rounds(target, tiny_drafter(target), slots=512), slots=512, max_num_seqs=4)
    ends: Counter[str] = Counter()
    after_end: list[str] = []
    ended = threading.Semaphore(0)
    real = target.forward

    def forward(*args, **kwargs):
        if rng.random() < 0.02:
            raise RuntimeError("injected")
        return real(*args, **kwargs)

    target.forward = forward

    def sink(events):
        for e in events:
            if ends[e.request_id]:
                after_end.append(e.request_id)
            if isinstance(e, FinishedEvent):
                ends[e.request_id] += 1
                ended.release()

    engine.start(sink)
    names = []
    for i in range(60):
        name = f"s{i}"
        engine.submit(
            request(
                name,
                tuple(rng.choices(range(2, 48), k=rng.randint(1, 60))),
                max_tokens=rng.randint(1, 40),
                temperature=rng.choice([0.0, 1.0]),
                mode=rng.choice(["dspark", "plain"]),
                verification=rng.choice(["rejection", "coupled"]),
                seed=i,
            )
        )
        names.append(name)
        for _ in range(rng.randint(0, 3)):
            rng.choice([engine.cancel, engine.hold, engine.release])(rng.choice(names))
    for name in names:
        engine.release(name)
    for _ in names:
        assert ended.acquire(timeout=30)
    snapshot = engine.snapshot()
    assert set(ends) == set(names)
    assert set(ends.values()) == {1}
    assert not after_end
    assert (snapshot.running, snapshot.waiting, snapshot.held, snapshot.kv_tokens_used) == (0, 0, 0, 0)
    allocator = engine._allocator
    assert allocator.allocate(allocator.total) == Extent(0, allocator.total)  # in one piece again
    engine.close(0.0)


def test_taps_are_the_librarys_hidden_states():
    """Trap: tap i is hidden_states[i+1], -1 the embedding output; wrong ones leave the text right."""
    target = tiny_target()
    target.set_taps((-1, 0, 1))
    models = tiny_rounds(target).models
    ids = [5, 9, 11, 3]
    taps = target.forward([Rows(Extent(0, 64), start=0, token_ids=ids)], models.target_kv).taps
    target.model.set_attn_implementation("eager")
    with torch.inference_mode():
        states = target.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    assert torch.allclose(taps, torch.cat(states[:3], -1)[0], atol=1e-5)
