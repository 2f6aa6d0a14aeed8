"""A new drafter, and what it starts from.

Short runs need a good start, so what the target knows is taken over where shapes allow:

- the drafter's layers are the target's last ones;
- their input norm is the context features' norm;
- `fc` starts as the identity on the last tap. With the default taps those layers read exactly that in the target.

So before the first step the context keys and values of the first drafter layer are the target's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dspark_stream.errors import ConfigError
from dspark_stream.models.torch.drafter import Drafter, backbone_config
from dspark_stream.models.torch.target import Target
from dspark_stream.training.answers import Answer

PLAIN_NORMS = ("llama", "qwen3")
"""Families whose norm is weight ⊙ x/rms(x), so that a norm's weight can be moved into the projections after it."""
LARGEST_RATIO = 8.0


def default_taps(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """Spread evenly from layer 1 to layer L-3, as the released drafters have them; fewer where L is small."""
    first, last = min(1, num_layers - 2), max(num_layers - 3, min(1, num_layers - 2))
    count = max(1, min(count, last - first + 1))
    if count == 1:
        return (last,)
    return tuple(sorted({round(first + i * (last - first) / (count - 1)) for i in range(count)}))


def pick_mask_token(
    answers: Sequence[Answer], vocab_size: int, special_ids: Sequence[int], stop_ids: Sequence[int]
) -> int:
    """A token that no text contains: a special one that the data never uses, else any id that it never uses.

    Raises:
        ConfigError: every id occurs.
    """
    used = Counter(t for a in answers for t in a.ids)
    for candidates in (sorted(special_ids), range(vocab_size - 1, -1, -1)):
        for token in candidates:
            if token not in used and token not in stop_ids:
                return token
    raise ConfigError("every token of the vocabulary is used: name one with --mask-token-id", param="mask_token_id")


@torch.no_grad()
def start_from_target(drafter: Drafter, target: Target, seed: int, layers_too: bool = True) -> None:
    """Initialise a new drafter (float32) in place; without ``layers_too`` its layers' matrices and `fc` are noise."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in drafter.named_parameters():
        if parameter.ndim == 2 and not name.startswith("markov_head.markov_w"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        elif "bias" in name:
            parameter.zero_()
    copied = layers_too and _copy_layers(drafter, target)
    _copy_matching(drafter.norm, target.decoder.norm)
    h = target.hidden_size
    if copied:
        drafter.fc.weight.zero_()
        drafter.fc.weight[:, -h:] = torch.eye(h)  # the last tap
        first: Any = drafter.layers[0].input_layernorm
        _copy_matching(drafter.hidden_norm, first)
        if drafter.config.family in PLAIN_NORMS:
            for layer in list(drafter.layers)[1:]:
                _same_input_norm(layer, first.weight)
    if drafter.markov_head is not None:
        _start_head(drafter.markov_head, target)
    if drafter.confidence_head is not None:
        drafter.confidence_head.proj.weight.zero_()


@torch.no_grad()
def deepened(drafter: Drafter, count: int) -> Drafter:
    """``drafter`` with ``count`` more layers on top: copies of its last that add nothing to what they are given yet.

    Their two output projections are zero, so it drafts exactly as before; everything else of a copy is already of use
    to them (block expansion, as of LLaMA Pro, arXiv 2401.02415). For the families of `plan.CAN_DEEPEN`.
    """
    if not count:
        return drafter
    old, tensors = drafter.config, dict(drafter.state_dict())
    total = old.num_layers + count
    for i in range(old.num_layers, total):
        for name, tensor in drafter.layers[-1].state_dict().items():
            silent = name in ("self_attn.o_proj.weight", "mlp.down_proj.weight")
            tensors[f"layers.{i}.{name}"] = torch.zeros_like(tensor) if silent else tensor
    config = replace(old, backbone=backbone_config(old.backbone, total), num_layers=total)
    deeper = Drafter(config, drafter.target, drafter.draft_ids).to(drafter.target.device, drafter.fc.weight.dtype)
    deeper.load_state_dict(tensors)
    return deeper


def _copy_matching(to: nn.Module, source: nn.Module) -> bool:
    """Copy a module's tensors if all of them match in shape; whether they did."""
    own, theirs = to.state_dict(), source.state_dict()
    if own.keys() != theirs.keys() or any(own[n].shape != theirs[n].shape for n in own):
        return False
    to.load_state_dict({name: t.detach().float() for name, t in theirs.items()})
    return True


def _copy_layers(drafter: Drafter, target: Target) -> bool:
    """Start the drafter's layers from the target's last ones; whether all of them matched."""
    count = len(drafter.layers)
    sources = list(target.decoder.layers)[-count:]
    if len(sources) < count:
        return False
    matched = [_copy_matching(layer, source) for layer, source in zip(drafter.layers, sources, strict=True)]
    return all(matched)


def _same_input_norm(layer: Any, norm: Tensor) -> None:
    """Give a layer another input norm weight and make up for it in the projections: the function stays the same.

    Context features pass one shared norm only; so every layer's projections must expect that one.
    """
    ratio = (layer.input_layernorm.weight / norm).nan_to_num(1.0).clamp(-LARGEST_RATIO, LARGEST_RATIO)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer.self_attn, name).weight.mul_(ratio)
    layer.input_layernorm.weight.copy_(norm)


def _start_head(head: Any, target: Target) -> None:
    """W1 = the embedding's principal components, at unit scale; W2 = 0: at first the head says nothing."""
    embedding: Any = target.embed_tokens
    centred: Tensor = embedding.weight.detach().float()
    centred = centred - centred.mean(0)
    vectors = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(-1)[:, : head.rank]
    w1 = centred @ vectors
    head.markov_w1.weight.zero_()
    head.markov_w1.weight[:, : w1.shape[1]] = w1 / w1.std().clamp(min=1e-6)
    head.markov_w2.weight.zero_()
