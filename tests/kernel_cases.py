"""Streams, drafts and heads for the tests of operations: random, seeded, shaped like a round's."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dspark_kernels.noise.reference import signed
from dspark_kernels.sequential_head.reference import HeadWeights, Prepared, prepare
from dspark_kernels.streams import COUPLED, GREEDY, REJECTION, Drafts, Sampling
from dspark_stream.decoding.noise import NoiseCache
from dspark_stream.types import Acceptance, SamplingParams

GAMMA = 4
MODES: dict[int, Acceptance] = {GREEDY: "greedy", REJECTION: "rejection", COUPLED: "coupled"}


@dataclass
class View:
    """A stream as decoding/ reads it."""

    sampling: SamplingParams
    acceptance: Acceptance
    position: int
    round_key: int
    vocab: int
    extent: None = None
    anchor: int = 0
    adjustment: None = None
    noise: NoiseCache = field(init=False)

    def __post_init__(self) -> None:
        self.noise = NoiseCache(self.sampling.seed, self.vocab)


@dataclass
class Case:
    logits: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    drafts: Drafts
    sampling: Sampling

    def to(self, device: torch.device) -> Case:
        return Case(
            self.logits.to(device),
            self.first.to(device),
            self.length.to(device),
            Drafts(*(x.to(device) for x in self.drafts)),
            Sampling(*(x.to(device) for x in self.sampling)),
        )

    def views(self) -> list[View]:
        s = self.sampling
        return [
            View(
                SamplingParams(
                    max_tokens=1,
                    temperature=0.0 if mode == GREEDY else s.temperature[r].item(),
                    top_k=int(s.top_k[r]),
                    top_p=s.top_p[r].item(),
                    min_p=s.min_p[r].item(),
                    seed=int(s.seed[r]),
                ),
                MODES[mode],
                int(s.position[r]),
                int(s.round_key[r]) % 2**64,
                self.logits.shape[1],
            )
            for r, mode in enumerate(s.mode.tolist())
        ]


def sampling_of(modes: list[int], **columns) -> Sampling:
    n = len(modes)
    fill = {
        "temperature": [0.7 + 0.1 * r for r in range(n)],
        "top_k": [0] * n,
        "top_p": [1.0] * n,
        "min_p": [0.0] * n,
        "seed": [11 + r for r in range(n)],
        "round_key": [signed((0x9E3779B97F4A7C15 * (r + 1)) % 2**64) for r in range(n)],
        "position": [3 + 7 * r for r in range(n)],
    } | columns
    kinds = {"temperature": torch.float32, "top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    return Sampling(
        torch.tensor(modes, dtype=torch.int32),
        *(torch.tensor(fill[f], dtype=kinds.get(f, torch.int64)) for f in Sampling._fields[1:]),
    )


def make(lengths: list[int], sampling: Sampling, vocab: int, candidates: int, seed: int = 0, near: float = 1.0) -> Case:
    """Random logits and drafts; ``near`` 1 draws q from the target's own logits, so that most drafts stand."""
    torch.manual_seed(seed)
    streams = len(lengths)
    first, rows = [], 0
    for length in lengths:
        first.append(rows)
        rows += length + 1
    logits = torch.randn(rows + 3, vocab) * 2.5  # padding rows behind
    c = torch.stack([torch.randperm(vocab)[:candidates].sort().values for _ in range(streams * GAMMA)]).view(
        streams, GAMMA, candidates
    )
    base = torch.randn(streams, GAMMA, vocab) * 2.5
    for r, length in enumerate(lengths):
        for k in range(max(0, length)):
            base[r, k] += near * (logits[first[r] + k] - base[r, k])
    best = base.argmax(-1, keepdim=True)
    c[..., :1] = torch.where((c == best).any(-1, keepdim=True), c[..., :1], best)
    c = c.sort(-1).values
    q = (base.gather(2, c) / sampling.temperature[:, None, None]).softmax(-1)
    at = torch.multinomial(q.flatten(0, 1), 1).view(streams, GAMMA, 1)
    greedy = (sampling.mode == GREEDY)[:, None, None]
    at = torch.where(greedy, q.argmax(-1, keepdim=True), at)
    tokens, q_x = c.gather(2, at).squeeze(2).int(), q.gather(2, at).squeeze(2)
    return Case(
        logits,
        torch.tensor(first, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        Drafts(tokens, c.int(), q, q_x),
        sampling,
    )


HEADS = ["none", "vanilla", "gated", "rnn"]


def weights_on(weights: HeadWeights, device: torch.device) -> HeadWeights:
    return HeadWeights(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in weights))


def prepared_on(prepared: Prepared, device: torch.device) -> Prepared:
    return Prepared(*(None if x is None else x.to(device) for x in prepared))


def sampling_on(sampling: Sampling, device: torch.device) -> Sampling:
    return Sampling(*(x.to(device) for x in sampling))


def random_case(kind: str, streams: int, gamma: int, vocab: int, rank: int, candidates: int, dtype: torch.dtype):
    """Weights, prepared slots and anchors as a drafter would have them."""
    torch.manual_seed(HEADS.index(kind) + 10 * streams + vocab)
    h = 24
    inner = {"gated": (rank, rank), "rnn": (3 * rank, 2 * rank)}.get(kind)
    none = kind == "none"
    weights = HeadWeights(
        kind,
        None if none else (torch.randn(vocab, rank) * 0.5).to(dtype),
        None if none else (torch.randn(vocab, rank) * 0.5).to(dtype),
        None if inner is None else (torch.randn(*inner) * 0.2).to(dtype),
        None if inner is None else (torch.randn(inner[0], h) * 0.2).to(dtype),
        None if inner is None else (torch.randn(inner[0]) * 0.2).to(dtype),
        torch.randn(h).to(dtype),
        None if none else torch.randn(rank).to(dtype),
        torch.randn(1).to(dtype),
        torch.zeros(()),
        None,
    )
    if not none:
        weights = weights._replace(longest_row=weights.w2.float().norm(dim=1).max())
    base, hidden = (torch.randn(streams, gamma, vocab) * 3).to(dtype), torch.randn(streams, gamma, h).to(dtype)
    anchor = torch.randint(vocab, (streams,), dtype=torch.int32)
    return weights, base, prepare(base, hidden, weights, candidates), anchor
