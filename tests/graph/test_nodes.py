"""Every node of the graph against the dense second derivative of what it computes."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from paraboloid.graph import nodes
from paraboloid.graph.nodes import Graph


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x.square()


def constant(*shape):
    return torch.linspace(0.1, 2, shape[0] * shape[-1]).double().view(*shape)


LINEAR = {
    "relu": F.relu, "relu6": F.relu6, "leaky": F.leaky_relu, "hardtanh": F.hardtanh, "hardsigmoid": F.hardsigmoid,
    "softshrink": F.softshrink, "hardshrink": F.hardshrink, "threshold": lambda z: F.threshold(z, 0.4, 0.0), "abs": torch.abs,
    "clamp": lambda z: z.clamp(0.3, 0.5), "in place": lambda z: F.relu_(z * 2), "prelu": lambda z: F.prelu(z, torch.tensor([0.2]).double()),
    "dropout": lambda z: F.dropout(z, 0.5), "mean": lambda z: z.mean(1), "flip": lambda z: z.flip(1), "cat": lambda z: torch.cat([z, 2 * z], 1),
    "product": lambda z: z @ constant(6, 3), "einsum": lambda z: torch.einsum("ni,ij->nj", z, constant(6, 3)), "slice": lambda z: z[:, 1:4],
    "gather": lambda z: z[:, [0, 0, 2]], "where": lambda z: torch.where(z > 0.4, z, 2 * z), "masked": lambda z: z.masked_fill(z > 0.4, 0),
    "max": lambda z: z.max(1)[0], "amax": lambda z: z.amax(1), "maximum": lambda z: torch.maximum(z, 1 - z), "sort": lambda z: z.sort(1)[0],
    "topk": lambda z: z.topk(2, 1)[0], "max pool": lambda z: F.max_pool1d(z.unsqueeze(1), 3, 2), "average pool": lambda z: F.avg_pool1d(z.unsqueeze(1), 3, 2),
    "max pool 2d": lambda z: F.max_pool2d(z.view(4, 1, 2, 3), 2), "adaptive": lambda z: F.adaptive_avg_pool2d(z.view(4, 1, 2, 3), (2, 2)),
    "zero padding": lambda z: F.pad(z, (1, 2)), "circular padding": lambda z: F.pad(z.unsqueeze(1), (1, 1), mode="circular"),
    "reflection": lambda z: F.pad(z.unsqueeze(1), (1, 1), mode="reflect"), "replication": lambda z: F.pad(z.unsqueeze(1), (1, 1), mode="replicate"),
    "convolution": lambda z: F.conv1d(z.unsqueeze(1), constant(2, 1, 3)), "batch norm": lambda z: F.batch_norm(z, constant(1, 6)[0], constant(1, 6)[0]),
    "upsample": lambda z: F.interpolate(z.view(4, 1, 2, 3), scale_factor=2, mode="bilinear"), "shuffle": lambda z: F.pixel_shuffle(z[:, :4].reshape(4, 4, 1, 1), 2),
    "unfold": lambda z: F.unfold(z.view(4, 1, 2, 3), 2), "views": lambda z: z.view(4, 2, 3).transpose(1, 2).reshape(4, 6), "cumsum": lambda z: z.cumsum(1),
    "unbind": lambda z: z.unbind(1)[1] + z.split(2, 1)[1].sum(1), "division": lambda z: z / constant(4, 6), "lerp": lambda z: torch.lerp(z, 2 * z, 0.3),
    "a linear function": lambda z: z.expand(3, 4, 6).sum(0), "cast": lambda z: z.float().double(),
}  # fmt: skip
SMOOTH = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "gelu tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu,
    "softplus": F.softplus, "elu": lambda z: F.elu(z - 0.5), "celu": lambda z: F.celu(z - 0.5), "selu": lambda z: F.selu(z - 0.5), "mish": F.mish, "hardswish": F.hardswish, "logsigmoid": F.logsigmoid,
    "tanhshrink": F.tanhshrink, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "sin": torch.sin, "cos": torch.cos,
    "erf": torch.erf, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "inverse": lambda z: 1 / z, "cube": lambda z: z**3,
    "power": lambda z: 2**z, "powers": lambda z: z ** constant(4, 6), "logit": torch.logit, "in place": lambda z: (z * 2).sigmoid_(),
    "checkpointed": lambda z: checkpoint(torch.tanh, z, use_reentrant=False),
}  # fmt: skip
FULL = {
    "softmax": lambda z: z.softmax(1), "log_softmax": lambda z: z.log_softmax(1), "logsumexp": lambda z: z.logsumexp(1),
    "layer norm": lambda z: F.layer_norm(z, (6,)), "group norm": lambda z: F.group_norm(z, 2), "batch statistics": lambda z: F.batch_norm(z, None, None, training=True),
    "square": lambda z: z * z, "swish": lambda z: z * torch.sigmoid(z), "gate": F.glu, "normalised": F.normalize, "std": lambda z: z.std(1), "norm": lambda z: z.norm(dim=1),
    "prod": lambda z: z.prod(1), "softsign": F.softsign, "ratio": lambda z: z / z.sum(1, keepdim=True), "bilinear": lambda z: z @ z.T,
    "attention": lambda z: F.scaled_dot_product_attention(z.view(4, 1, 2, 3), z.view(4, 1, 2, 3), z.view(4, 1, 2, 3)), "custom": Cube.apply,
}  # fmt: skip


def recorded(function):
    """(output, input, a gradient at the output), with the input computed as a call's output would be."""
    torch.manual_seed(0)
    weight = torch.randn(6, 5).double().requires_grad_()
    z = 0.8 * F.linear(torch.randn(4, 5).double(), weight).sigmoid() + 0.1
    z = z.clone()
    with sdpa_kernel(SDPBackend.MATH):
        f = function(z).reshape(1, -1)
    return f, z, torch.randn_like(f)


def second_derivative(f, z, g):
    (first,) = torch.autograd.grad(f, z, g, create_graph=True)
    if not first.requires_grad:
        return torch.zeros(z.numel(), z.numel()).double()
    rows = [torch.autograd.grad(e, z, retain_graph=True, allow_unused=True)[0] for e in first.flatten()]
    return torch.stack([torch.zeros_like(z).flatten() if r is None else r.flatten() for r in rows]).detach()


@pytest.mark.parametrize("probe_all", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_piecewise_linear_nodes_do_not_bend(name, probe_all):
    f, z, g = recorded(LINEAR[name])
    found, full = Graph(f, [get_gradient_edge(z)]).bends(f, g, probe_all)
    assert (found, full) == ([], 0)
    if name != "hardsigmoid":  # torch has no second derivative of it
        assert not second_derivative(f, z, g).any()


@pytest.mark.parametrize("probe_all", [False, True])
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_elementwise_nodes_bend_as_a_diagonal(name, probe_all):
    f, z, g = recorded(SMOOTH[name])
    graph = Graph(f, [get_gradient_edge(z)])
    (bend,), full = graph.bends(f, g, probe_all)
    assert full == 0
    ((i, d, _), *_) = list(graph.descend(bend.below, bend.d))
    assert i == 0
    torch.testing.assert_close(d.flatten().diag(), second_derivative(f, z, g), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("probe_all", [False, True])
@pytest.mark.parametrize("name", FULL)
def test_all_other_nodes_are_known_to_bend(name, probe_all):
    f, z, g = recorded(FULL[name])
    _, full = Graph(f, [get_gradient_edge(z)]).bends(f, g, probe_all)
    assert full == 1
    assert second_derivative(f, z, g).any()


def test_a_chain_of_pointwise_nodes_keeps_the_diagonal():
    scale, mask = constant(6, 4), constant(6, 4) > 0.7
    f, z, g = recorded(lambda z: torch.tanh(F.leaky_relu(z.T - 0.5) * scale).masked_fill(mask, 0))
    graph = Graph(f, [get_gradient_edge(z)])
    (bend,), _ = graph.bends(f, g)
    ((i, d, _), _) = list(graph.descend(bend.below, bend.d))
    assert i == 0
    torch.testing.assert_close(d.flatten().diag(), second_derivative(f, z, g), rtol=1e-10, atol=1e-12)


def test_what_repeats_or_mixes_entries_ends_the_chain():
    for function in (
        lambda z: torch.tanh(z.expand(2, 4, 6)),
        lambda z: torch.tanh(z @ constant(6, 6)),
        lambda z: torch.tanh(z[:, [0, 0]]),
    ):
        f, z, g = recorded(function)
        graph = Graph(f, [get_gradient_edge(z)])
        (bend,), _ = graph.bends(f, g)
        assert [i for i, _, _ in graph.descend(bend.below, bend.d)] == [None]


def test_a_name_that_lies_is_caught_by_the_probe(monkeypatch):
    f, z, g = recorded(torch.sigmoid)
    monkeypatch.setattr(nodes, "PIECEWISE", nodes.PIECEWISE | {"Sigmoid"})
    graph = Graph(f, [get_gradient_edge(z)])
    assert graph.bends(f, g) == ([], 0)
    with pytest.raises(
        RuntimeError, match=r"SigmoidBackward0 has a diagonal second derivative; expected it to be linear"
    ):
        graph.bends(f, g, probe_all=True)
