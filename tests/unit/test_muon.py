"""Muon: orthogonal updates of AdamW's size, in whatever precision the machine multiplies fastest."""

import copy

import pytest
import torch

from dspark_stream.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_updates_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linalg.svdvals(orthogonal((u * torch.linspace(0.05, 1, len(s))) @ v, torch.float32))
    assert 0.5 < values.min() <= values.max() < 1.3


def test_the_singular_vectors_stay():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(12, 20), full_matrices=False)
    update = (u * torch.linspace(0.4, 1, 12)) @ v
    turned = u.T @ orthogonal(update, torch.float32) @ v.T
    assert torch.allclose(turned, turned.diag().diag(), atol=1e-4)
    assert turned.diag().min() > 0


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_in_bfloat16_it_is_what_torch_has(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([ours], lr=0.1, precision=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for i in range(4):
        if i == 2:  # what earlier versions saved can be gone on with
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_without_bfloat16_products_are_in_float32(monkeypatch):
    """Where no hardware multiplies bfloat16, torch's own takes a minute over matrices of a small drafter."""
    seen = []
    monkeypatch.setattr("dspark_stream.training.muon.orthogonal", lambda update, dtype: seen.append(dtype) or update)
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    for has in (False, True):
        monkeypatch.setattr("dspark_stream.models.loading.cpu_has_bfloat16", lambda has=has: has)
        parameter.grad = torch.randn(4, 4)
        Muon([parameter], lr=0.1).step()
    assert seen == [torch.float32, torch.bfloat16]


def test_a_matrix_without_a_gradient_stays():
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    Muon([parameter], lr=0.1).step()
    assert torch.equal(parameter, torch.ones(3, 3))
