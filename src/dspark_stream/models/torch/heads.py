"""The sequential heads: what makes a parallel block of drafts depend on its own earlier tokens.

Each adds to slot k's base logits a bias that depends on the token before it (paper, section on semi-autoregressive
heads). Symbols: R streams, r rank, H hidden size, V target vocabulary, Vd draft
vocabulary. Attribute names are the checkpoint's tensor names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_stream.models.drafter_config import DrafterConfig


class MarkovHead(nn.Module):
    """bias = W2·W1[x_{k-1}] (``vanilla``).

    Args:
        vocab: V.
        draft_vocab: Vd.
        rank: r.
        w1_ids: the draft vocabulary [Vd], ascending, where W1 has rows for it alone: other tokens' are zeros. None: V
        rows.
    """

    def __init__(self, vocab: int, draft_vocab: int, rank: int, w1_ids: Tensor | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab if w1_ids is None else len(w1_ids), rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab, bias=False)
        rows = None
        if w1_ids is not None:
            rows = torch.full((vocab,), -1, dtype=torch.long)
            rows[w1_ids.cpu()] = torch.arange(len(w1_ids))
            rows = rows.to(w1_ids.device)
        self.register_buffer("w1_rows", rows, persistent=False)
        self.w1_rows: Tensor | None

    def initial_state(self, streams: int) -> Tensor | None:
        """State before slot 1; only the RNN has one."""
        return None

    def embed(self, tokens: Tensor) -> Tensor:
        """W1 of target token ids [...] → [..., r]."""
        if self.w1_rows is None:
            e: Tensor = self.markov_w1(tokens)
            return e
        rows = self.w1_rows[tokens]
        known: Tensor = self.markov_w1(rows.clamp(min=0))
        return known * (rows >= 0).unsqueeze(-1).to(known.dtype)

    def whole_w1(self) -> Tensor:
        """W1 with a row for every token [V, r], for kernels that index it by target ids."""
        weight = self.markov_w1.weight.detach()
        return weight if self.w1_rows is None else self.embed(torch.arange(len(self.w1_rows), device=weight.device))

    def step(self, e: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Features of one slot from e = W1[x_{k-1}] [..., r] and h_k [..., H]: ([..., r], next state)."""
        return e, state

    def bias(self, features: Tensor) -> Tensor:
        """W2 of features [..., r] → [..., Vd]."""
        b: Tensor = self.markov_w2(features)
        return b


class GatedMarkovHead(MarkovHead):
    """bias = W2·(σ(G·[h_k; e]) ⊙ e)."""

    def __init__(self, vocab: int, draft_vocab: int, rank: int, hidden: int, w1_ids: Tensor | None = None) -> None:
        super().__init__(vocab, draft_vocab, rank, w1_ids)
        self.gate_proj = nn.Linear(hidden + rank, rank)

    def step(self, e: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `MarkovHead.step`."""
        return torch.sigmoid(self.gate_proj(torch.cat((hidden, e), -1))) * e, state


class RNNHead(MarkovHead):
    """z = [s; e; h_k] → gate, candidate, output; s ← σ(g)⊙s + (1-σ(g))⊙tanh(c); bias = W2·tanh(o)."""

    def __init__(self, vocab: int, draft_vocab: int, rank: int, hidden: int, w1_ids: Tensor | None = None) -> None:
        super().__init__(vocab, draft_vocab, rank, w1_ids)
        self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def initial_state(self, streams: int) -> Tensor | None:
        """s = 0, [R, r]."""
        return self.markov_w1.weight.new_zeros(streams, self.rank)

    def step(self, e: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `MarkovHead.step`."""
        assert state is not None
        gate, candidate, output = self.joint_proj(torch.cat((state, e, hidden), -1)).chunk(3, -1)
        keep = torch.sigmoid(gate)
        return torch.tanh(output), keep * state + (1 - keep) * torch.tanh(candidate)


def make_head(
    config: DrafterConfig, vocab: int, draft_vocab: int, hidden: int, draft_ids: Tensor | None
) -> MarkovHead | None:
    """The head that a config names; None where it has none."""
    rank, ids = config.markov_rank, draft_ids if config.w1_of_drafts else None
    if not rank:
        return None
    match config.markov_head_type:
        case "vanilla":
            return MarkovHead(vocab, draft_vocab, rank, ids)
        case "gated":
            return GatedMarkovHead(vocab, draft_vocab, rank, hidden, ids)
        case "rnn":
            return RNNHead(vocab, draft_vocab, rank, hidden, ids)


def make_confidence_head(config: DrafterConfig, hidden: int) -> ConfidenceHead | None:
    """The head that a config names; None where it has none."""
    if not config.enable_confidence_head:
        return None
    return ConfidenceHead(
        hidden, config.markov_rank if config.confidence_head_with_markov else 0, config.confidence_bias
    )


class ConfidenceHead(nn.Module):
    """Logit of c_k = P(x_k accepted | x_1 … x_{k-1} accepted), from [h_k; W1[x_{k-1}]] or from h_k alone."""

    def __init__(self, hidden: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden + rank, 1, bias=bias)
        self.with_markov = rank > 0

    def forward(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        """h [..., H] and e [..., r] → logits [...]."""
        z = torch.cat((hidden, e), -1) if self.with_markov and e is not None else hidden
        logit: Tensor = self.proj(z).squeeze(-1)
        return logit
