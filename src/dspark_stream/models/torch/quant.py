"""int8 and nf4 weights as bitsandbytes rounds them; 8- and 4-bit weights on kernels of our own, for GPUs.

On a CPU nf4 weights are unpacked once, and torch multiplies.

Only the decoder layers' matrices (and the drafter's `fc`) are quantised. Embedding, LM head, norms and the small heads
stay as they are: the LM head is shared between target and drafter, and a packed one cannot be shared.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

from dspark_kernels.weight_only import GROUP, WeightOnlyLinear
from dspark_stream.errors import ModelLoadError

Quant = Literal["none", "int8", "nf4", "w8a8", "w4a8", "w8a16", "w4a16"]

WEIGHT_ONLY_BITS: dict[str, int] = {"w8a16": 8, "w4a16": 4}
"""Of weights on our own kernel for GPUs, with activations as they are."""

NF4_BLOCK, NF4_ROWS = 64, 32
"""bitsandbytes packs nf4 in blocks of 64 inputs and multiplies 32 outputs at a time; other shapes stay as they are."""

KEEP = ("lm_head", "markov_head", "confidence_head", "embed_tokens")


def quantise_linears(module: nn.Module, quant: Quant) -> int:
    """Replace the `torch.nn.Linear` layers under ``module`` by quantised ones; returns how many.

    Raises:
        ModelLoadError: bitsandbytes is not there or does not work on this device, or kernels that only CPUs have.
    """
    if quant == "none":
        return 0
    if quant in WEIGHT_ONLY_BITS:
        return _weight_only(module, WEIGHT_ONLY_BITS[quant])
    if quant in ("w8a8", "w4a8"):
        raise ModelLoadError(f"{quant} needs the CPU's integer kernels, and this model does not run on them here")
    return _by_bitsandbytes(module, quant)


def _by_bitsandbytes(module: nn.Module, quant: Quant) -> int:
    """int8 or nf4 layers in place of plain ones; returns how many."""
    # it tells of optional kernels when imported, and of its fp16 cast at every single product
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes as bnb
    except (ImportError, OSError) as error:
        raise ModelLoadError(f"{quant} needs bitsandbytes, which does not load here: {error}") from error
    count = 0
    for parent, name, child in _plain_linears(module):
        if quant == "nf4" and (child.in_features % NF4_BLOCK or child.out_features % NF4_ROWS):
            continue
        weight = child.weight.detach()
        new: nn.Module
        if quant == "int8":
            new = bnb.nn.Linear8bitLt(
                child.in_features, child.out_features, bias=child.bias is not None, has_fp16_weights=False
            )
            new.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        elif weight.device.type == "cpu":
            new = _nf4_unpacked(child, bnb)
        else:
            new = bnb.nn.Linear4bit(
                child.in_features,
                child.out_features,
                bias=child.bias is not None,
                compute_dtype=weight.dtype,
                quant_type="nf4",
            )
            new.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        if child.bias is not None:
            new.bias = nn.Parameter(child.bias.detach(), requires_grad=False)
        setattr(parent, name, new.to(weight.device).eval())
        count += 1
    # quantisation happens on the first move to a device or the first call; do it now, where an error is readable
    with torch.inference_mode():
        for layer in module.modules():
            if isinstance(layer, bnb.nn.Linear8bitLt | bnb.nn.Linear4bit):
                like = layer.bias if layer.bias is not None else None
                dtype = like.dtype if like is not None else getattr(layer, "compute_dtype", None) or torch.float32
                layer(torch.zeros(1, layer.in_features, dtype=dtype, device=layer.weight.device))
    return count


def _nf4_unpacked(layer: nn.Linear, bnb: Any) -> nn.Linear:
    """On a CPU: a plain layer of the numbers that its nf4 weights stand for.

    bitsandbytes would unpack all of them for every pass, which takes seconds. So nf4 saves no memory there; it shows
    what it does to a draft. w4a8 is what is fast.
    """
    weight = layer.weight.detach()
    packed, state = bnb.functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
    new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    new.weight = nn.Parameter(bnb.functional.dequantize_4bit(packed, state).to(weight.dtype), requires_grad=False)
    return new


def _weight_only(module: nn.Module, bits: int) -> int:
    """Every linear layer whose inputs fill whole groups, on our own kernel; returns how many."""
    whole = [one for one in _plain_linears(module) if one[2].in_features % GROUP == 0]
    for parent, name, child in whole:
        setattr(parent, name, WeightOnlyLinear(child, bits))
    return len(whole)


def _plain_linears(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Linear layers that may be quantised: (parent, name in it, layer)."""
    return [
        (parent, name, child)
        for path, parent in module.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and not {*path.split("."), name} & {*KEEP}
    ]
