"""Between a layer's products: the references against the library's own code, the kernels against the references."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from dspark_kernels import layer_parts, ragged_attention
from dspark_stream.models.cache import Extent
from dspark_stream.models.protocols import Rows
from dspark_stream.models.torch.fusing import fuse_layers
from dspark_stream.models.torch.layers import ATTENTION_NAME
from dspark_stream.models.torch.target import Target

LIMIT = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("sizes", [(1, 576), (7, 64), (2, 3, 100), (4, 1030)])
def test_rms_norm(load, device, dtypes, sizes):
    """Guards against padded entries that count, and rounding in another place than the library's."""
    torch.manual_seed(0)
    for dtype in dtypes:
        x = (torch.randn(*sizes) * 3).to(dtype)
        norm = LlamaRMSNorm(sizes[-1], eps=1e-5).to(dtype)
        norm.weight.data = torch.randn(sizes[-1]).to(dtype)
        got = load("layer_parts").rms_norm(x.to(device), norm.weight.detach().to(device), 1e-5)
        assert got.dtype == dtype
        torch.testing.assert_close(got.cpu(), norm(x).detach(), atol=LIMIT[dtype], rtol=LIMIT[dtype])
        residual = torch.randn(*sizes).to(dtype)
        args = x.to(device), residual.to(device), norm.weight.detach().to(device)
        total, got = load("layer_parts").add_rms_norm(*args, 1e-5)
        assert torch.equal(total.cpu(), residual + x)
        torch.testing.assert_close(got.cpu(), norm(residual + x).detach(), atol=LIMIT[dtype], rtol=LIMIT[dtype])


@pytest.mark.parametrize("sizes", [(1, 1536), (3, 5, 77)])
def test_silu_mul(load, device, dtypes, sizes):
    torch.manual_seed(1)
    for dtype in dtypes:
        gate, up = (torch.randn(*sizes) * 4).to(dtype), torch.randn(*sizes).to(dtype)
        got = load("layer_parts").silu_mul(gate.to(device), up.to(device))
        torch.testing.assert_close(got.cpu(), silu(gate) * up, atol=LIMIT[dtype], rtol=LIMIT[dtype])
        both = torch.cat((gate, up), -1).to(device).split(sizes[-1], -1)  # parts of wider rows, as one product leaves
        again = load("layer_parts").silu_mul(*both)
        torch.testing.assert_close(again, got, atol=LIMIT[dtype], rtol=LIMIT[dtype])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "heads", "d"), [(1, (9, 3), 64), (5, (4, 2), 80), (17, (2, 1), 6)])
def test_rotate(load, device, dtypes, rows, heads, d, normed):
    """Guards against halves that are swapped, another row's angle, a norm of the wrong head."""
    torch.manual_seed(2)
    for dtype in dtypes:
        q, k = torch.randn(rows, heads[0], d).to(dtype), torch.randn(rows, heads[1], d).to(dtype)
        angle = torch.rand(rows, d // 2).repeat(1, 2) * 6
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        norms = [torch.randn(d).to(dtype) for _ in range(2)] if normed else []
        expected = q, k
        if normed:
            both = [LlamaRMSNorm(d, eps=1e-6).to(dtype) for _ in range(2)]
            for module, weight in zip(both, norms, strict=True):
                module.weight.data = weight
            expected = tuple(module(x).detach() for module, x in zip(both, (q, k), strict=True))
        expected = apply_rotary_pos_emb(*(x.unsqueeze(0) for x in expected), cos.unsqueeze(0), sin.unsqueeze(0), 2)
        wide = torch.cat((q.flatten(1), k.flatten(1)), 1).to(device)  # parts of wider rows, as one product leaves
        q, k = (x.unflatten(1, (-1, d)) for x in wide.split([heads[0] * d, heads[1] * d], 1))
        args = [q, k, *(x.to(device) for x in (cos, sin, *norms))]
        got = load("layer_parts").rotate(*args, *([1e-6] if normed else []))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b.squeeze(0), atol=4 * LIMIT[dtype], rtol=4 * LIMIT[dtype])


def small(family: str, device: torch.device) -> Target:
    """A target of three layers; Qwen3's has norms on heads and a window in one layer."""
    torch.manual_seed(3)
    config_class, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[
        family
    ]
    own = {"head_dim": 24, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    config = config_class(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attn_implementation=ATTENTION_NAME,
        **(own if family == "qwen3" else {}),
    )
    return Target(model_class(config).to(device), tap_layers=(0, 1))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.inference_mode()
def test_a_model_whose_layers_are_fused(implementation, device, monkeypatch, family):
    """Guards against a layer that forgets its window, its scale or a norm: the library's logits and taps."""
    for operation in (layer_parts, ragged_attention):
        monkeypatch.setattr(operation, "uses_triton", lambda _: implementation == "triton")
    batch = [Rows(Extent(0, 32), 0, [3, 9, 27, 20, 1, 3, 40]), Rows(Extent(32, 32), 0, [5, 2])]
    outputs = []
    for fused in (False, True):
        target = small(family, device)
        assert not fused or fuse_layers(target.decoder) == 3 * (5 if family == "llama" else 7) + 1
        outputs.append(target.forward(batch, target.make_store(64)))
    plain, quick = outputs
    torch.testing.assert_close(quick.rows, plain.rows, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(quick.taps, plain.taps, atol=1e-4, rtol=1e-4)


def test_nothing_is_fused_that_is_not_known():
    assert fuse_layers(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))) == 0
