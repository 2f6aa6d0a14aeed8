"""The target: a `transformers` causal language model driven as one ragged batch of streams.

T rows of all streams together, V vocabulary, H hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dspark_kernels.drawing.reference import distributions, greatest, race
from dspark_kernels.linear import PackedLinear, pack_linears
from dspark_kernels.ragged_attention import Segment
from dspark_stream.models.cache import KVShape
from dspark_stream.models.protocols import AdjustedBlock, Race, Rows, Store
from dspark_stream.models.taps import checked_taps
from dspark_stream.models.torch.attention import Attend, ProbeAttend, StoreAttend, int_tensor
from dspark_stream.models.torch.distributions import Dense
from dspark_stream.models.torch.edits import edit_block
from dspark_stream.models.torch.store import KVStore
from dspark_stream.types import SamplingParams


class TargetOutput(NamedTuple):
    """See `Verified`: ``rows`` are logits [n, V] of the rows asked for, ``taps`` [T, taps·H]."""

    rows: Tensor
    taps: Tensor

    def adjusted(self, blocks: Sequence[AdjustedBlock]) -> TargetOutput:
        """See `Verified.adjusted`; in single precision, which penalties need."""
        rows = self.rows.float()
        for first, drafts, adjustment in blocks:
            edit_block(rows[first : first + len(drafts) + 1], drafts, adjustment.edits())
        return self._replace(rows=rows)

    def best(self, rows: Sequence[int]) -> list[int]:
        """See `Verified.best`."""
        found: list[int] = greatest(self.logits(rows)).tolist()
        return found

    def logits(self, rows: Sequence[int]) -> Tensor:
        """See `Verified.logits`; all rows, as nearly always, without a copy."""
        return self.rows if len(rows) == len(self.rows) else self.rows[list(rows)]

    def distributions(self, rows: Sequence[int], sampling: Sequence[SamplingParams]) -> Dense:
        """See `Verified.distributions`."""
        return Dense(distributions(self.logits(rows), sampling))

    def raced(self, rows: Sequence[int], sampling: Sequence[SamplingParams], races: Sequence[Race]) -> list[int]:
        """See `Verified.raced`."""
        p = distributions(self.logits(rows), sampling)
        noise = torch.cat([own.noise.at(own.position, 1) for own in races])
        tokens: list[int] = race(p, noise.to(p.device)).tolist()
        return tokens


class Target:
    """A `transformers` causal language model with hidden-state taps. See `Target` in protocols.py.

    Args:
        model: any `transformers` model for causal language modelling whose attention was set to ours
            (`attention.ATTENTION_NAME`), in evaluation mode.
        tap_layers: `target_layer_ids`: i taps the output of layer i, -1 the embedding output
            (models/taps.py). The last layer cannot be tapped: libraries return it after the final norm.
        eos_token_ids: the model's own stop tokens.
    """

    def __init__(self, model: Any, *, tap_layers: tuple[int, ...] = (), eos_token_ids: tuple[int, ...] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config.get_text_config()
        self.family, self.runner = str(self.config.model_type), ""
        self.decoder: Any = model.get_decoder()
        self.embed_tokens: Any = self.decoder.embed_tokens
        self.lm_head: Any = model.get_output_embeddings()
        self.eos_token_ids = eos_token_ids
        self.dtype: torch.dtype = next(self.decoder.parameters()).dtype
        self.device: torch.device = next(self.decoder.parameters()).device
        self.vocab_size: int = self.config.vocab_size
        self.hidden_size: int = self.config.hidden_size
        self.num_layers: int = self.config.num_hidden_layers
        self.max_positions: int = getattr(self.config, "max_position_embeddings", 0) or 2**20
        self.softcap: float | None = getattr(self.config, "final_logit_softcapping", None)
        self._taps: dict[int, Tensor] = {}
        self.tap_layers: tuple[int, ...] = ()
        self.set_taps(tap_layers)
        self.kv_shapes = self._probe()

    def set_taps(self, tap_layers: tuple[int, ...]) -> None:
        """Choose the taps (once; a drafter names them).

        Raises:
            ModelLoadError: a layer that this target does not have, or its last one.
        """
        checked_taps(tap_layers, self.num_layers)
        for layer in set(tap_layers) - set(self.tap_layers):
            source = self.embed_tokens if layer < 0 else self.decoder.layers[layer]
            source.register_forward_hook(lambda _m, _a, out, layer=layer: self._taps.__setitem__(layer, out))
        self.tap_layers = tap_layers

    @torch.inference_mode()
    def _probe(self) -> list[KVShape]:
        """One token through the model tells every layer's cache shape, whatever the family."""
        probe = ProbeAttend()
        self._hidden(int_tensor([0], self.device), int_tensor([0], self.device), probe)
        self._taps.clear()
        return [probe.shapes[layer] for layer in range(self.num_layers)]

    def _hidden(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        out = self.decoder(
            input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, attend=attend
        )
        hidden: Tensor = out.last_hidden_state.squeeze(0)
        return hidden

    def taps_of_pass(self) -> Tensor:
        """Tapped hidden states of the pass just made, concatenated in `tap_layers` order: [T, taps·H]."""
        taps = [self._taps[layer].flatten(0, -2) for layer in self.tap_layers]
        self._taps.clear()
        return torch.cat(taps, -1) if taps else torch.empty(0, device=self.device)

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values in a store."""
        return self.dtype

    def make_store(self, slots: int) -> KVStore:
        """Room for this target's keys and values of that many token slots."""
        return KVStore(self.kv_shapes, slots, self.kv_dtype, self.device)

    def head_rows(self, ids: Tensor) -> Tensor:
        """The LM head's rows of some tokens, [n, H]."""
        rows: Tensor = self.lm_head.weight.detach()[ids]
        return rows

    def pack(self) -> None:
        """Lay the weights out for this machine's matrix units. Inference only, once; drafters are built before."""
        pack_linears(self.decoder)
        if type(self.lm_head) is nn.Linear:  # a copy where it is tied: the embedding stays as it is
            self.lm_head = PackedLinear(self.lm_head)

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head over final hidden states [..., H] → [..., V], soft cap included."""
        return self.capped(self.lm_head(hidden))

    def capped(self, logits: Tensor) -> Tensor:
        """The family's soft cap, where it has one."""
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @torch.inference_mode()
    def forward(
        self, batch: list[Rows], store: Store, logit_rows: list[int] | None = None, *, greedy: bool = False
    ) -> TargetOutput:
        """One ragged pass. Rows' keys and values are written to their streams' slots.

        Args:
            batch: every stream's rows; each stream's earlier positions must be in ``store``.
            store: this target's keys and values.
            logit_rows: indices into the concatenated rows for which logits are wanted; None for all of them.
            greedy: the argmax of the logits will do; here they are there all the same.
        """
        assert isinstance(store, KVStore)
        ids, positions, slots, segments = flatten_rows(batch)
        attend = StoreAttend(store, int_tensor(slots, self.device), segments, causal=True)
        hidden = self._hidden(int_tensor(ids, self.device), int_tensor(positions, self.device), attend)
        if logit_rows is not None:
            hidden = hidden[int_tensor(logit_rows, self.device)]
        logits = self.logits(hidden) if len(hidden) else hidden.new_empty(0, self.vocab_size)
        return TargetOutput(logits, self.taps_of_pass())

    @torch.inference_mode()
    def forward_with(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """A pass with attention of the caller's own (training): final hidden [T, H] and taps [T, taps·H]."""
        hidden = self._hidden(token_ids, positions, attend)
        return hidden, self.taps_of_pass()


def flatten_rows(batch: list[Rows]) -> tuple[list[int], list[int], list[int], list[Segment]]:
    """Token ids, positions and store slots of all rows, and each stream's `Segment`."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    segments: list[Segment] = []
    for extent, start, token_ids in batch:
        n = len(token_ids)
        segments.append(Segment(len(ids), n, extent.slot, start))
        ids += token_ids
        positions += range(start, start + n)
        slots += range(extent.slot + start, extent.slot + start + n)
    return ids, positions, slots, segments
