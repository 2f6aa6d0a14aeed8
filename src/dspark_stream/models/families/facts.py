"""What a family's file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Family:
    """Facts of one family of decoders, in the words of the papers and of `transformers`' configs."""

    name: str
    """`model_type` of its text models."""
    title: str
    """For people."""
    wrappers: tuple[str, ...] = ()
    """`model_type` of configs that wrap such a text model."""
    gguf: str | None = None
    """`general.architecture` of its GGUF files; None: they are not read."""
    layers: str
    """Where `transformers` has its layers: a module below transformers.models, and what their names begin with."""
    drafter: str
    """`architectures` of its DSpark drafters."""
    native: bool = True
    """Whether the CPU's kernels run it."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections."""
    qk_norm: bool = False
    """RMS norms of each query and key head, before the rotary embedding."""
    sandwich: bool = False
    """Norms of what attention and MLP add, too."""
    norm_offset: float = 0.0
    """Added to the norms' weights of a checkpoint folder; GGUF files have it in."""
    gelu: bool = False
    """GELU by tanh in the MLP, else SiLU."""
    scaled_embedding: bool = False
    """Embeddings times √H."""
    interleaved: bool = False
    """GGUF files have query and key rows with the halves of a head interleaved."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """What the library takes where a config does not say: text models inside of wrappers leave out a lot."""
    default_head_size: int | None = None
    """Where a config does not say; None: H / heads."""
    windows: int = 0
    """Of so many layers in a row all but the last see a window only, with rotary embeddings of a base of their own."""
    end_tokens: tuple[str, ...] = ()
    """What ends a turn of its chat templates, beside the model's own end of text."""
