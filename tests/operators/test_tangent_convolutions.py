"""Convolutions with a derivative of their own: J v and J^T u are torch's, for less."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from paraboloid.losses import CrossEntropy
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.tangent_convolutions import TangentConvolutions
from paraboloid.problems.networks import resnet50

CASES = {
    "plain": (nn.Conv2d(3, 4, 3, padding=1), (2, 3, 6, 5)),
    "strided": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), bias=False), (2, 3, 7, 5)),
    "dilated groups": (nn.Conv2d(4, 6, 3, dilation=2, groups=2), (3, 4, 8, 8)),
    "1x1": (nn.Conv2d(3, 4, 1), (2, 3, 4, 5)),
    "1x1 strided": (nn.Conv2d(3, 4, 1, stride=(2, 3), bias=False), (2, 3, 5, 7)),
    "1x1 padded": (nn.Conv2d(3, 4, 1, padding=1), (2, 3, 4, 5)),
    "same": (nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 4, 5)),
    "reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 4, 5)),
    "1d": (nn.Conv1d(3, 4, 3), (2, 3, 9)),
    "3d": (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
}


def graph(model, x, own):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if own:
        with TangentConvolutions():
            f = model(x)
    else:
        f = model(x)
    return OutputGraph(f, torch.zeros(len(f), dtype=torch.long), CrossEntropy(), parameters)


@pytest.mark.parametrize("frozen", ["", "weight", "bias"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_torch(name, frozen):
    layer, shape = CASES[name]
    torch.manual_seed(0)
    layer = layer.double()
    model = nn.Sequential(nn.Conv1d(shape[1], shape[1], 1) if len(shape) == 3 else nn.Identity(), layer, nn.Tanh())
    model.append(nn.Flatten()).double()
    inputs = torch.randn(shape, dtype=torch.float64)
    scale = nn.Parameter(torch.rand(shape[1:], dtype=torch.float64))
    whole = nn.Module()
    whole.scale, whole.rest = scale, model
    whole.forward = lambda x: model(x * scale)
    for key, p in layer.named_parameters():
        p.requires_grad_(key != frozen)
    one, two = graph(whole, inputs, False), graph(whole, inputs, True)
    for p in layer.parameters():
        p.requires_grad_(True)
    v, u = [torch.randn_like(p) for p in one.parameters], torch.randn_like(one.f)
    torch.testing.assert_close(two.f, one.f)
    torch.testing.assert_close(two.push(v), one.push(v), rtol=1e-10, atol=1e-12)
    for a, b in zip(two.pull(u), one.pull(u), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_product_with_j_takes_two_convolutions_for_each():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()), torch.randn(2, 3, 9, 9)
    counts = {}
    with FlopCounterMode(display=False) as counter:
        model(x)
    forward = counter.get_total_flops()
    for own in (False, True):
        g = graph(model, x, own)
        v = [torch.randn_like(p) for p in g.parameters]
        g.prepare()
        with FlopCounterMode(display=False) as counter:
            g.push(v)
        counts[own] = counter.get_total_flops() / forward
    assert counts[True] < 2 < counts[False]


def test_resnet50():
    model = resnet50()
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == 53
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 1000)
