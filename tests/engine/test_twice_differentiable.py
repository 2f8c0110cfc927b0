"""What is differentiated twice is never asked of group norm's fused kernel, and has the kernel's values."""

import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.engine.twice_differentiable import twice_differentiable

CE = nn.CrossEntropyLoss()


def names(f):
    """Of all nodes of the graph above f."""
    stack, seen = [f.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 2)], ids=str)
def test_group_norm_is_spelled_out(shape, affine):
    torch.manual_seed(0)
    layer, x = nn.GroupNorm(3, 6, affine=affine, eps=1e-3).double(), torch.randn(shape).double().requires_grad_()
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    want = layer(x)
    assert any("GroupNorm" in name for name in names(want))
    with twice_differentiable():
        found = layer(x)
        by_keyword = F.group_norm(x.transpose(-1, 0).contiguous().transpose(-1, 0), num_groups=3, eps=1e-3)
    assert not any("GroupNorm" in name for name in names(found))
    close(found.detach(), want.detach())
    close(by_keyword.detach(), F.group_norm(x, 3, eps=1e-3).detach())
    inputs = [x, *layer.parameters()]
    v = torch.randn(shape).double()
    for a, b in zip(torch.autograd.grad(found, inputs, v), torch.autograd.grad(want, inputs, v), strict=True):
        close(a, b)
    with twice_differentiable(), pytest.raises(RuntimeError, match="divisible by num_groups"):
        F.group_norm(x, 4)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.GroupNorm(1, 2), nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    ).double()


def test_second_order_products_ask_nothing_of_the_fused_kernel(monkeypatch):
    """Also where the layer's input needs no gradient, and comes in channels_last."""
    model, asked = net(), []
    x = torch.randn(5, 2, 4, 4).double().to(memory_format=torch.channels_last)
    y = torch.arange(5) % 3
    own = torch.autograd.grad

    def noted(outputs, *args, create_graph=False, **options):
        if create_graph:
            fs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            asked.extend(names(f) for f in fs if isinstance(f, torch.Tensor) and f.grad_fn is not None)
        return own(outputs, *args, create_graph=create_graph, **options)

    monkeypatch.setattr(torch.autograd, "grad", noted)
    v = torch.ones(sum(p.numel() for p in model.parameters())).double()
    H, G = pb.Hessian(model, CE, (x, y)), pb.GGN(model, CE, (x, y))
    products = [H @ v, G @ v]
    pb.statistics(model, CE, (x, y), ["diag_hessian"])
    pb.quadratic(model, CE, (x, y), curvature="hessian")(v)
    assert asked
    assert not any("GroupNorm" in name for found in asked for name in found)
    assert all(torch.isfinite(product).all() for product in products)
