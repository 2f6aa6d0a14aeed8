"""A drafter's heads as the kernels take them (kernels/dspark_kernels/sequential_head)."""

from __future__ import annotations

import torch

from dspark_kernels.sequential_head import HeadWeights
from dspark_kernels.sequential_head.reference import HeadKind
from dspark_stream.models.torch.drafter import Drafter
from dspark_stream.models.torch.heads import GatedMarkovHead, RNNHead


def head_weights(drafter: Drafter) -> HeadWeights:
    """The sequential and the confidence head's tensors, split into what multiplies h_k and what multiplies the rest.

    Where parts of one matrix have to be contiguous they are copied: make it once, after everything is loaded.
    """
    head, confidence = drafter.markov_head, drafter.confidence_head
    device = drafter.target.device
    kind: HeadKind = "none" if head is None else "vanilla"
    w1 = w2 = inner = inner_hidden = inner_bias = None
    longest = torch.zeros((), device=device)
    if head is not None:
        w1, w2 = head.whole_w1().detach(), head.markov_w2.weight.detach()
        longest = w2.float().norm(dim=1).max()
    if isinstance(head, GatedMarkovHead):
        kind = "gated"
        weight, inner_bias = head.gate_proj.weight.detach(), head.gate_proj.bias.detach()
        hidden = weight.shape[1] - head.rank
        inner_hidden, inner = weight[:, :hidden].contiguous(), weight[:, hidden:].contiguous()
    elif isinstance(head, RNNHead):
        kind = "rnn"
        weight, inner_bias = head.joint_proj.weight.detach(), head.joint_proj.bias.detach()
        inner, inner_hidden = weight[:, : 2 * head.rank].contiguous(), weight[:, 2 * head.rank :].contiguous()
    c_hidden = c_e = c_bias = None
    if confidence is not None:
        weight = confidence.proj.weight.detach().squeeze(0)
        hidden = drafter.target.hidden_size
        c_hidden, c_bias = weight[:hidden].contiguous(), confidence.proj.bias
        c_e = weight[hidden:].contiguous() if confidence.with_markov else None
    return HeadWeights(
        kind=kind,
        w1=w1,
        w2=w2,
        inner=inner,
        inner_hidden=inner_hidden,
        inner_bias=inner_bias,
        confidence_hidden=c_hidden,
        confidence_e=c_e,
        confidence_bias=None if c_bias is None else c_bias.detach(),
        longest_row=longest,
        draft_ids=drafter.draft_ids,
    )
