"""Losslessness by enumeration: every branch of one round, its exact probability, and the law of what it commits.

The real `draft`, `admit` and `accept` run on a tiny vocabulary with scripted uniforms. Each random choice is a
partition of [0, 1) whose borders the test computes on its own from p_t and p_d; the code is run just inside both
ends of every cell, so a threshold that is off by more than EDGE of it changes the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

import dspark_stream.decoding.accept as accept_module
import dspark_stream.decoding.draft as draft_module
from dspark_kernels.cpu import Context, best_isa
from dspark_kernels.cpu.build import compiler
from dspark_kernels.drawing.reference import race
from dspark_stream.decoding.accept import accept
from dspark_stream.decoding.calibration import Calibration
from dspark_stream.decoding.draft import draft
from dspark_stream.decoding.noise import NoiseCache
from dspark_stream.decoding.schedule import Adaptive, Candidate, EarlyStop, Fixed, Lagged, RoundCost, Threshold, admit
from dspark_stream.decoding.survival import AcceptanceHistory
from dspark_stream.engine.stream import round_key
from dspark_stream.models.adjustment import Adjustment
from dspark_stream.models.cache import Extent
from dspark_stream.models.native.distributions import NativeDistributions
from dspark_stream.models.native.target import NativeOutput
from dspark_stream.models.torch.target import TargetOutput
from dspark_stream.models.torch.walk import walk
from dspark_stream.types import GenerationRequest, SamplingParams

EDGE = 1e-5
SHIFT = 1.5
"""Added to every logit, which no distribution notices: a repetition penalty goes by their sign."""
ROUNDING = 1e-6
"""Of probabilities near 1 in single precision, and of a few operations on them."""


@dataclass
class FakeStream:
    sampling: SamplingParams
    verification: str
    position: int = 0
    anchor: int = 0
    extent: Extent = field(default_factory=lambda: Extent(0, 16))
    noise: NoiseCache = field(default=None)
    adjustment: Adjustment | None = None
    round_key: int = 0

    @property
    def acceptance(self) -> str:
        return draft_module.acceptance_of(self.sampling, self.verification)


@dataclass
class Asked:
    """What logits are changed by; worked out here once more, from whole prefixes and in double precision."""

    sampling: SamplingParams
    prompt: tuple[int, ...]
    stops: tuple[int, ...]

    def adjustment(self, vocab: int) -> Adjustment:
        return Adjustment(self.sampling, self.stops, self.prompt, vocab)

    def __call__(self, p: torch.Tensor, prefix: Sequence[int], ids: Sequence[int] | None = None) -> torch.Tensor:
        """Probabilities after ``prefix`` of what were ``p`` of the tokens ``ids``."""
        s, scores = self.sampling, p.double().log() + SHIFT
        for i, token in enumerate(range(len(p)) if ids is None else ids):
            scores[i] += dict(s.logit_bias).get(token, 0.0)
            if token in (*self.prompt, *prefix):
                scores[i] *= s.repetition_penalty if scores[i] < 0 else 1 / s.repetition_penalty
            if times := list(prefix).count(token):
                scores[i] -= s.frequency_penalty * times + s.presence_penalty
            if token in self.stops and len(prefix) < s.min_tokens:
                scores[i] = -math.inf
        return torch.softmax(scores, -1)


class TableDrafter:
    """p_d(x_k | x_{k-1}) and c_k(x_{k-1}) from tables; slot by slot like the real one."""

    def __init__(self, p_d: torch.Tensor, confidence: torch.Tensor, draft_ids: torch.Tensor | None = None) -> None:
        self.p_d, self.c, self.draft_ids = p_d, confidence, draft_ids  # [γ, V, Vd], [γ, V]
        self.gamma = p_d.shape[0]
        self._slot = -1
        self.markov_head = SimpleNamespace(
            initial_state=lambda streams: None, embed=lambda t: t, step=self._step, bias=self._bias
        )
        self.confidence_head = self._confidence

    def base_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((*hidden.shape[:2], self.p_d.shape[2]), SHIFT)

    def draft(self, anchors, store, slots, draws):
        hidden = torch.arange(slots).view(1, slots, 1).expand(len(anchors), slots, 1).float()
        return walk(self, hidden, [token for _, _, token in anchors], draws)

    def _confidence(self, hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        self._slot = int(hidden[0, 0])
        return torch.logit(self.c[self._slot][previous].double())

    def _step(self, previous: torch.Tensor, hidden: torch.Tensor, state: None) -> tuple[torch.Tensor, None]:
        return previous, None

    def _bias(self, previous: torch.Tensor) -> torch.Tensor:
        return self.p_d[self._slot][previous].log()


@dataclass
class ScriptedUniforms:
    draft: list[float]
    accept: list[float]
    bonus: float


def searched(sps, *, early_stop: bool = True):
    """Lengths by Algorithm 1 over rounds a second as a function of B."""
    return lambda streams, survivals: admit(survivals, lambda b: 1.0 / sps(b), early_stop=early_stop)


def scheduled(schedule, sps, earlier=()):
    """Lengths by a schedule; ``earlier``: survivals that every stream had two rounds ago."""

    def choose(streams, survivals):
        first = len(streams)
        cost = RoundCost(first, [1.0 / sps(b) for b in range(first, first + sum(map(len, survivals)) + 1)])
        these = [
            Candidate(row, stream.acceptance != "rejection", earlier)
            for stream, row in zip(streams, survivals, strict=True)
        ]
        return schedule.lengths(these, cost, PRICE)

    return choose


def run_round(drafter, p_t, streams, script, choose, *, monkeypatch, kernels=None):
    """One real round; ``p_t(stream, prefix)`` is the target's table. Returns blocks, lengths and outcomes.

    ``kernels``: what judges and draws where torch does not.
    """
    made = iter(script)
    for module in (draft_module, accept_module):
        monkeypatch.setattr(module, "RoundUniforms", lambda seed, start, gamma: next(made))
    gamma = drafter.gamma
    blocks = draft(drafter, None, streams, Calibration(), AcceptanceHistory(gamma))
    lengths = choose(streams, [b.survival for b in blocks])
    rows = [
        p_t(r, tuple(block.tokens[:j])).log() + SHIFT
        for r, (block, length) in enumerate(zip(blocks, lengths, strict=True))
        for j in range(length + 1)
    ]
    output = TargetOutput(torch.stack(rows), torch.empty(0))
    if kernels is not None:  # their drafts are judged by one call
        output = NativeOutput(kernels, output.rows, [], torch.empty(0))
        for stream, block in zip(streams, blocks, strict=True):
            if block.q is not None:
                q = torch.stack([block.q.probabilities(k) for k in range(gamma)])
                block.q = NativeDistributions.of(kernels, q.log(), [stream.sampling] * gamma)
    outcomes = accept(output, streams, blocks, lengths, drafter.draft_ids)
    return blocks, lengths, outcomes


def cells(weights: list[float]):
    """(index, lo, hi) of a partition of [0, 1)."""
    total, low = sum(weights), 0.0
    for i, w in enumerate(weights):
        if w > 0:
            yield i, low / total, (low + w) / total
        low += w


def ends(lo: float, hi: float):
    inset = min((hi - lo) / 2, max(EDGE * (hi - lo), ROUNDING))
    return (lo + inset, hi - inset)


def joint(p_t, tokens: tuple[int, ...]) -> float:
    """The target's own probability of a sequence."""
    return math.prod(float(p_t(0, tokens[:i])[t]) for i, t in enumerate(tokens))


class Law(dict[tuple[int, ...], float]):
    """The probability of every sequence, and how many drafts stand on average."""

    accepted = 0.0


def law_of_round(drafter, raw, choose, *, monkeypatch, company=(), kernels=None, asked=None):
    """Exact law of the first γ+1 tokens: the round's commits, continued by the target where they are shorter.

    ``raw``: the target's table; ``asked`` changes what the first stream makes of it and of the drafter's.
    """

    def p_t(stream, prefix):
        return raw(stream, prefix) if asked is None or stream else asked(raw(stream, prefix), prefix)

    def p_d(k, tokens):
        q = drafter.p_d[k][tokens[k - 1] if k else 0]
        return (q if asked is None else asked(q, tokens[:k], ids)).tolist()

    def mine():
        adjustment = None if asked is None else asked.adjustment(vocab)
        return FakeStream(sampling, "rejection", adjustment=adjustment)

    gamma, vocab = drafter.gamma, raw(0, ()).shape[0]
    ids = list(range(vocab)) if drafter.draft_ids is None else drafter.draft_ids.tolist()
    sampling = SamplingParams(max_tokens=9, temperature=1.0)
    law = Law()
    drawn = sum(verification == "rejection" for verification in company)

    def others():
        """The streams beside the first; what they draw is always the same, and their confidences follow from it."""
        return [FakeStream(sampling, verification, noise=NoiseCache(3, vocab)) for verification in company]

    def visit(k: int, tokens: list[int], us: list[tuple[float, float]], weight: float) -> None:
        if k < gamma:
            for i, lo, hi in cells(p_d(k, tokens)):
                visit(k + 1, [*tokens, ids[i]], [*us, (lo, hi)], weight * (hi - lo))
            return
        # which ℓ the schedule picks depends on the drafts alone, so ask it once with any acceptance
        streams = [mine(), *others()]
        mid = [(lo + hi) / 2 for lo, hi in us]
        other = ScriptedUniforms([0.35] * gamma, [0.6] * gamma, 0.4)
        first = ScriptedUniforms(mid, [0.5] * gamma, 0.5)
        scripts = [first, *[other] * drawn]
        blocks, lengths, _ = run_round(drafter, raw, streams, scripts, choose, monkeypatch=monkeypatch)
        assert blocks[0].tokens == tokens
        judge(lengths[0], tokens, us, weight)

    def judge(length, tokens, us, weight) -> None:
        """Every prefix that can stand, the longest first; borders as in the paper, Algorithm 2."""
        share, refused = [1.0], []
        for k, x in enumerate(tokens[:length]):
            share.append(min(1.0, share[k] * p_t(0, tuple(tokens[:k])).tolist()[x] / widened(k, tokens)[x]))
        for k in range(length, -1, -1):
            p = p_t(0, tuple(tokens[:k])).tolist()
            rest, stands = p, share[k]
            if k < length:
                rest = [max(share[k] * pi - qi, 0.0) for pi, qi in zip(p, widened(k, tokens), strict=True)]
                stands = sum(rest) / (sum(rest) + (1.0 - share[k])) if k and sum(rest) else float(k == 0)
            mine = [(0.0, stands)] if k else []
            if stands > 0:
                finish(length, k, tokens, us, [*mine, *refused], rest, weight * stands)
            if stands >= 1.0:
                return
            refused.insert(0, (stands, 1.0))
            weight *= 1.0 - stands

    def widened(k: int, tokens: list[int]) -> list[float]:
        q = [0.0] * vocab
        for i, v in enumerate(p_d(k, tokens)):
            q[ids[i]] = v
        return q

    def finish(length, stand, tokens, us, accepts, weights, weight) -> None:
        for token, lo, hi in cells(weights):
            share = weight * (hi - lo)
            intervals = [*us, *accepts, (lo, hi)]
            for corner in (0, 1):  # just inside the lower, then the upper end of every interval at once
                at = [ends(*i)[corner] for i in intervals]
                judged = [*[0.5] * max(0, stand - 1), *at[gamma:-1]]  # whether less stands is not asked
                first = ScriptedUniforms(at[:gamma], [*judged, *[0.5] * (gamma - len(judged))], at[-1])
                other = ScriptedUniforms([0.35] * gamma, [0.6] * gamma, 0.4)
                streams = [mine(), *others()]
                blocks, lengths, outcomes = run_round(
                    drafter,
                    raw,
                    streams,
                    [first, *[other] * drawn],
                    choose,
                    monkeypatch=monkeypatch,
                    kernels=kernels,
                )
                assert blocks[0].tokens == tokens
                assert lengths[0] == length
                accepted, bonus = outcomes[0]
                assert (accepted, bonus) == (stand, token)
                commit((*tokens[:accepted], bonus), share / 2)
                law.accepted += accepted * share / 2

    def commit(tokens: tuple[int, ...], weight: float) -> None:
        for rest in itertools.product(range(vocab), repeat=gamma + 1 - len(tokens)):
            whole = tokens + rest
            p = math.prod(float(p_t(0, whole[:i])[whole[i]]) for i in range(len(tokens), gamma + 1))
            law[whole] = law.get(whole, 0.0) + weight * p

    visit(0, [], [], 1.0)
    return law


def random_tables(seed: int, vocab: int = 3, gamma: int = 2, draft_vocab: int | None = None):
    g = torch.Generator().manual_seed(seed)
    ids = None if draft_vocab is None else torch.randperm(vocab, generator=g)[:draft_vocab].sort().values
    p_d = torch.softmax(2 * torch.randn(gamma, vocab, draft_vocab or vocab, generator=g), -1)
    c = torch.rand(gamma, vocab, generator=g).clamp(0.02, 0.98)
    tables: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}

    def p_t(stream: int, prefix: tuple[int, ...]) -> torch.Tensor:
        key = (min(stream, 1), prefix)
        if key not in tables:
            tables[key] = torch.softmax(1.5 * torch.randn(vocab, generator=g), -1)
        return tables[key]

    return TableDrafter(p_d, c, ids), p_t


STAIRCASE = {1: 1.0, 2: 0.80, 3: 0.78, 4: 0.55, 5: 0.52, 6: 0.50}


PRICE = 0.9
SCHEDULES = {
    "adaptive": Adaptive(),
    "early-stop": EarlyStop(),
    "lagged": Lagged(),
    "threshold": Threshold(0.3),
    "fixed": Fixed(1),
    "none": Fixed(0),
}


@pytest.fixture(params=["torch", "kernels"])
def kernels(request):
    """What acceptance judges and draws with: the CPU kernels, or None for torch."""
    if request.param == "torch":
        return None
    if compiler() is None:
        pytest.skip("no C++ compiler: apt-get install g++")
    return Context(1, best_isa())  # rows this short are done before a second thread has woken


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("company", [(), ("rejection",), ("coupled",)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rejection_has_the_targets_law_under_every_schedule(seed, company, name, kernels, monkeypatch):
    """Guards against bias in draw, schedule, acceptance or residual: the joint law of γ+1 tokens is the target's.

    In mixed company the coupled stream's lengths may depend on all that is drafted, and its own drafts move the cost
    of the others'; the first stream's law must not notice.
    """
    drafter, p_t = random_tables(seed)
    drafter.c = torch.tensor([[0.8, 0.8, 0.8], [0.95, 0.1, 0.5]])  # x_1 decides what a second token promises
    cost = {1: 1.0, 2: 1.2, 3: 1.5, 4: 1.8, 5: 2.1, 6: 2.5}
    schedule, chosen = scheduled(SCHEDULES[name], lambda b: 1.0 / cost[b], earlier=(0.7, 0.4)), set()

    def choose(streams, survivals):
        lengths = schedule(streams, survivals)
        chosen.add(lengths[0])
        return lengths

    law = law_of_round(drafter, p_t, choose, monkeypatch=monkeypatch, company=company, kernels=kernels)
    assert company or len(chosen) > (name in ("adaptive", "early-stop", "threshold"))
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    for tokens, probability in law.items():
        assert probability == pytest.approx(joint(p_t, tokens), abs=2e-6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("company", [(), ("coupled",)])
@pytest.mark.parametrize("name", ["adaptive", "fixed"])
def test_longer_blocks_have_the_targets_law(name, company, seed, kernels, monkeypatch):
    """Guards against shares and residuals that only a third slot shows: whether x_2 stands depends on x_1's share.

    The adaptive block ends after one, two or three slots, and x_1 and x_2 decide where.
    """
    drafter, p_t = random_tables(seed, gamma=3)
    drafter.c = torch.tensor([[0.9, 0.9, 0.9], [0.95, 0.2, 0.9], [0.9, 0.9, 0.2]])
    cost = {b: 1.0 + 0.3 * (b - 1) for b in range(1, 9)}
    schedules = {"adaptive": Adaptive(), "fixed": Fixed(3)}
    schedule, chosen = scheduled(schedules[name], lambda b: 1.0 / cost[b], earlier=(0.7, 0.5, 0.3)), set()

    def choose(streams, survivals):
        lengths = schedule(streams, survivals)
        chosen.add(lengths[0])
        return lengths

    law = law_of_round(drafter, p_t, choose, monkeypatch=monkeypatch, company=company, kernels=kernels)
    assert chosen == ({1, 2, 3} if name == "adaptive" else {3})
    for tokens, probability in law.items():
        assert probability == pytest.approx(joint(p_t, tokens), abs=2e-6)


@pytest.mark.parametrize("gamma", [2, 3])
def test_tokens_that_cannot_be_are_lossless(gamma, kernels, monkeypatch):
    """Guards against zeros: drafts that the target rules out (w = 0, an earlier prefix may stand), and what is never
    drafted though the target has it.
    """
    drafter, p_t = random_tables(3, gamma=gamma)
    drafter.p_d[:, 1, 0], drafter.p_d[1, 2, 2] = 0.0, 0.0
    drafter.p_d /= drafter.p_d.sum(-1, keepdim=True)

    def some_ruled_out(stream, prefix):
        p = p_t(stream, prefix).clone()
        p[(1 + len(prefix) + sum(prefix)) % 3] = 0.0
        return p / p.sum()

    choose = scheduled(Fixed(gamma), lambda b: 1.0)
    law = law_of_round(drafter, some_ruled_out, choose, monkeypatch=monkeypatch, kernels=kernels)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    for tokens, probability in law.items():
        assert probability == pytest.approx(joint(some_ruled_out, tokens), abs=2e-6)


def test_a_block_is_judged_as_a_whole(kernels, monkeypatch):
    """The paper's example: 11/9 drafts of two stand on average, where token by token 10/9 would."""
    drafter = TableDrafter(torch.tensor([2 / 3, 1 / 3]).expand(2, 2, 2), torch.full((2, 2), 0.5))
    p = torch.tensor([1 / 3, 2 / 3])
    law = law_of_round(
        drafter, lambda r, prefix: p, scheduled(Fixed(2), lambda b: 1.0), monkeypatch=monkeypatch, kernels=kernels
    )
    assert law.accepted == pytest.approx(11 / 9, abs=1e-5)
    for tokens, probability in law.items():
        assert probability == pytest.approx(math.prod(float(p[t]) for t in tokens), abs=2e-6)


def test_the_global_search_is_refused_to_rejection_streams_for_a_reason(monkeypatch):
    """The counterexample in numbers of ours: were a rejection stream taken for an exact one, its text were biased."""

    def as_if_exact(streams, survivals):
        cost = RoundCost(1, [1.0, 1.0 / 0.5, 1.0 / 0.45])
        return Adaptive().lengths([Candidate(row, True) for row in survivals], cost, 1.0)

    p = torch.tensor([0.7, 0.3])
    drafter = TableDrafter(torch.full((2, 2, 2), 0.5), torch.tensor([[0.8, 0.8], [0.9, 1e-9]]))
    law = law_of_round(drafter, lambda r, prefix: p, as_if_exact, monkeypatch=monkeypatch)
    first_is_a = sum(probability for tokens, probability in law.items() if tokens[0] == 0)
    assert first_is_a == pytest.approx(0.85, abs=1e-6)


def test_two_streams_with_one_seed_do_not_decide_for_each_other():
    """Guards against uniforms shared between streams: through B's confidence, A's draft would admit itself.

    The client gives both the seed 1, they stand at the same position, and only their prompts differ. The curve admits
    A's x_1 (a_1 = 0.5) exactly when B's second draft (after 0.8) is worth it, which B's x_1 decides. P(first token
    of A) must be 0.70; with shared uniforms it is 0.85. A count over many pairs, since it is the keys that are tested.
    """
    p = torch.tensor([0.7, 0.3])
    drafter = TableDrafter(torch.full((2, 2, 2), 0.5), torch.tensor([[0.5, 0.8], [0.999, 1e-9]]))
    sps = {2: 1.0, 3: 0.72, 4: 0.58, 5: 0.52, 6: 0.44}.__getitem__
    sampling = SamplingParams(max_tokens=9, temperature=1.0, seed=1)

    def key(prompt: int) -> int:
        return round_key(GenerationRequest(request_id="x", prompt_ids=(prompt,), sampling=sampling))

    trials, first_is_a, shared = 3000, 0, 0
    for i in range(trials):
        streams = [FakeStream(sampling, "rejection", anchor=r, round_key=key(2 * i + r)) for r in range(2)]
        blocks = draft(drafter, None, streams, Calibration(), AcceptanceHistory(2))
        shared += blocks[0].tokens == blocks[1].tokens
        lengths = searched(sps)(streams, [b.survival for b in blocks])
        rows = p.log().expand(sum(lengths) + 2, 2)
        accepted, bonus = accept(TargetOutput(rows, torch.empty(0)), streams, blocks, lengths, None)[0]
        first_is_a += (blocks[0].tokens[0] if accepted else bonus) == 0
    assert shared / trials == pytest.approx(0.25, abs=0.04)
    assert first_is_a / trials == pytest.approx(0.70, abs=0.03)


@pytest.mark.parametrize("seed", range(2))
def test_a_reduced_draft_vocabulary_is_lossless(seed, kernels, monkeypatch):
    """Guards against a p_d that is not widened with zeros: tokens outside the draft vocabulary keep their mass."""
    drafter, p_t = random_tables(seed, vocab=4, draft_vocab=2)
    law = law_of_round(drafter, p_t, searched(STAIRCASE.__getitem__), monkeypatch=monkeypatch, kernels=kernels)
    for tokens, probability in law.items():
        assert probability == pytest.approx(joint(p_t, tokens), abs=2e-6)


@pytest.mark.parametrize(("early_stop", "expected"), [(True, 0.70), (False, 0.85)])
def test_the_papers_counterexample(early_stop, expected, monkeypatch):
    """Guards against a search that looks past a drop: it lets x_1 decide its own admission and biases the text."""
    p = torch.tensor([0.7, 0.3])
    drafter = TableDrafter(torch.full((2, 2, 2), 0.5), torch.tensor([[0.8, 0.8], [0.9, 1e-9]]))
    sps = {1: 1.0, 2: 0.5, 3: 0.45}.__getitem__
    choose = searched(sps, early_stop=early_stop)
    law = law_of_round(drafter, lambda r, prefix: p, choose, monkeypatch=monkeypatch)
    first_is_a = sum(probability for tokens, probability in law.items() if tokens[0] == 0)
    assert first_is_a == pytest.approx(expected, abs=1e-6)


ASKED = {
    "frequency": {"frequency_penalty": 1.5},
    "presence": {"presence_penalty": -1.2},
    "repetition": {"repetition_penalty": 1.8},
    "bias": {"logit_bias": ((0, -1.0), (2, 2.0))},
    "least": {"min_tokens": 2},
    "all": {
        "frequency_penalty": 0.7,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.4,
        "logit_bias": ((1, 0.5), (2, -0.8)),
        "min_tokens": 1,
    },
}


@pytest.mark.parametrize("company", [(), ("coupled",)])
@pytest.mark.parametrize("name", ["adaptive", "fixed"])
@pytest.mark.parametrize("fields", ASKED)
def test_adjusted_logits_have_the_law_of_plain_decoding(fields, name, company, kernels, monkeypatch):
    """Guards against rows and slots that are adjusted by another prefix than their own, on either side: the joint law
    of γ+1 tokens is that of one token after the other, each from logits that all before it have changed.

    The neighbour is not adjusted, and nothing is taken from or given to its rows.
    """
    drafter, p_t = random_tables(4)
    drafter.c = torch.tensor([[0.8, 0.8, 0.8], [0.95, 0.1, 0.5]])
    cost = {1: 1.0, 2: 1.2, 3: 1.5, 4: 1.8, 5: 2.1, 6: 2.5}
    schedule, chosen = scheduled({"fixed": Fixed(2)}.get(name, Adaptive()), lambda b: 1.0 / cost[b], (0.7, 0.4)), set()

    def choose(streams, survivals):
        lengths = schedule(streams, survivals)
        chosen.add(lengths[0])
        return lengths

    asked = Asked(SamplingParams(max_tokens=9, **ASKED[fields]), prompt=(1,), stops=(2,))
    law = law_of_round(drafter, p_t, choose, monkeypatch=monkeypatch, company=company, kernels=kernels, asked=asked)
    assert company or len(chosen) > (name == "adaptive")
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    for tokens, probability in law.items():
        assert probability == pytest.approx(joint(lambda r, prefix: asked(p_t(r, prefix), prefix), tokens), abs=2e-6)
        if fields == "least":
            assert probability == 0.0 or 2 not in tokens[:2]


def test_adjusted_drafts_of_a_reduced_vocabulary_are_lossless(kernels, monkeypatch):
    """Guards against biases, penalties and stop tokens that reach another token of the draft vocabulary."""
    drafter, p_t = random_tables(5, vocab=4, draft_vocab=2)
    asked = Asked(SamplingParams(max_tokens=9, **ASKED["all"]), prompt=(3, 0), stops=(2, 0))
    choose = searched(STAIRCASE.__getitem__)
    law = law_of_round(drafter, p_t, choose, monkeypatch=monkeypatch, kernels=kernels, asked=asked)
    for tokens, probability in law.items():
        assert probability == pytest.approx(joint(lambda r, prefix: asked(p_t(r, prefix), prefix), tokens), abs=2e-6)


@pytest.mark.parametrize("asked", [None, Asked(SamplingParams(max_tokens=9, **ASKED["all"]), prompt=(1,), stops=(2,))])
@pytest.mark.parametrize("early_stop", [True, False])
def test_coupled_verification_commits_what_plain_decoding_would(early_stop, asked, monkeypatch):
    """Guards against any influence of drafter or schedule on coupled text, for every noise of a finite set.

    Over all orders of three noise values at each of three positions, under a search that is *not* lossless for
    rejection, the round's tokens are the plain ones. That the plain ones follow p_t is the next test.
    """
    tables = list(itertools.permutations([0.2, 1.0, 3.0]))
    for seed, noises in itertools.product(range(3), itertools.product(tables, repeat=3)):
        if hash((seed, noises)) % 4:  # a fixed quarter of the 648 cases
            continue
        drafter, p_t = random_tables(seed)
        noise = SimpleNamespace(
            at=lambda first, n, noises=noises: torch.tensor(noises[first - 1 : first - 1 + n], dtype=torch.float64)
        )
        stream = FakeStream(SamplingParams(max_tokens=9, temperature=1.0), "coupled", noise=noise)
        stream.adjustment = asked and asked.adjustment(3)
        blocks, _, [(accepted, bonus)] = run_round(
            drafter,
            p_t,
            [stream],
            [],
            searched(STAIRCASE.__getitem__, early_stop=early_stop),
            monkeypatch=monkeypatch,
        )
        committed = [*blocks[0].tokens[:accepted], bonus]
        plain: list[int] = []
        while len(plain) < len(committed):
            e = torch.tensor([noises[len(plain)]], dtype=torch.float64)
            p = p_t(0, tuple(plain))
            p = p if asked is None else asked(p, plain)
            plain.append(int(race(p.unsqueeze(0), e)[0]))
        assert committed == plain


def test_the_race_draws_from_p():
    """Guards against a wrong race: over a fine grid of both exponentials, argmin E/p comes out as p."""
    n = 400
    e = -torch.log1p(-(torch.arange(n, dtype=torch.float64) + 0.5) / n)
    pairs = torch.cartesian_prod(e, e)
    p = torch.tensor([[0.2, 0.8]]).expand(len(pairs), 2)
    assert float((race(p, pairs) == 0).double().mean()) == pytest.approx(0.2, abs=2e-3)
