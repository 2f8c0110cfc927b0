"""Where a recorded network bends: the nodes of the autograd graph between calls that have a second derivative.

Given the gradient g of the loss at its outputs, one node of the graph adds to the Hessian, besides the generalised
Gauss-Newton matrix, the second derivative of g . node(inputs).  It is zero for (piecewise) linear nodes: ReLU, max
pooling, convolutions, views, sums; a diagonal for smooth elementwise activations; and a full matrix for products of two
activations, softmax, normalisation.

What a node is follows from its name and from which of its inputs are *active*, that is lead to recorded calls.  A node
of unknown name is probed: autograd's derivative of `node(g)`, taken along a random direction, is zero or it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from paraboloid.passes.modes import rounding
from paraboloid.passes.torch_internals import operation, output_count, shape_of, trained_statistics

# Elementwise with one active input, each output entry depending on the input entry at its place.
PIECEWISE = {
    "Relu", "LeakyRelu", "Threshold", "Hardtanh", "Hardsigmoid", "Abs", "Clamp", "ClampMin", "ClampMax",
    "Softshrink", "Hardshrink", "RreluWithNoise", "MaskedFill", "Neg", "NativeDropout",
}  # fmt: skip
SMOOTH = {
    "Sigmoid", "Tanh", "Gelu", "Silu", "Softplus", "Elu", "Celu", "Mish", "Hardswish", "LogSigmoid", "Exp", "Expm1",
    "Exp2", "Log", "Log1P", "Log2", "Log10", "Sin", "Cos", "Tan", "Atan", "Asin", "Acos", "Sinh", "Cosh", "Asinh",
    "Erf", "Sqrt", "Rsqrt", "Reciprocal", "Pow", "Logit",
}  # fmt: skip
# Every output entry is one input entry, or nothing.
VIEWS = {
    "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Unsqueeze", "Squeeze", "T", "Transpose",
    "Permute", "Select", "Slice", "ConstantPadNd",
}  # fmt: skip
# Linear, or piecewise linear, in all inputs together.
SUMS = {
    "Add", "Sub", "Where", "Sum", "Mean", "Cat", "Stack", "Expand", "Repeat", "Index", "IndexSelect", "Gather",
    "Split", "SplitWithSizes", "UnsafeSplit", "Unbind", "Roll", "Flip", "Cumsum", "Tril", "Triu", "Unfold",
    "Im2Col", "Col2Im", "PixelShuffle", "PixelUnshuffle", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D",
    "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D",
    "AdaptiveAvgPool3D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
    "Max", "Min", "Amax", "Amin", "Maximum", "Minimum", "UpsampleNearest1D", "UpsampleNearest2D",
    "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D", "UpsampleTrilinear3D", "Diagonal",
}  # fmt: skip
# Linear in each input: fine while one of the factors is inactive.  Addmm and its like add their first input.
PRODUCTS = {
    "Mul", "Mm", "Bmm", "Mv", "Dot", "Convolution", "PreluKernel", "CudnnConvolution",
}  # fmt: skip
ADDED_PRODUCTS = {
    "Addmm", "Addbmm", "Baddbmm", "Addmv",
}  # fmt: skip

HOOKS = "Function BackwardHookFunction"  # the identity that a module's full backward hooks put around it


def kind_of(node: Any, active: Sequence[int]) -> str:
    """ "linear", "smooth" (a diagonal second derivative), or "unknown", by name; see the module."""
    name = operation(node)
    if name == HOOKS:
        return "linear"
    if name in PIECEWISE or name in VIEWS or name in SUMS:
        return "linear"
    if name in PRODUCTS and len(active) == 1:
        return "linear"
    if name in ADDED_PRODUCTS and sum(i > 0 for i in active) <= 1:
        return "linear"
    if name == "Div" and len(active) == 1:
        return "linear" if active[0] == 0 else "smooth" if _same_size(node, active[0]) else "unknown"
    if name in SMOOTH and len(active) == 1 and _same_size(node, active[0]):
        return "smooth"
    if name in ("NativeBatchNorm", "CudnnBatchNorm") and tuple(active) == (0,) and not trained_statistics(node):
        return "linear"
    return "unknown"


def pointwise(node: Any, active: Sequence[int]) -> bool:
    """Whether each output entry depends on at most one entry of the one active input, and none is used twice."""
    name = operation(node)
    if len(active) != 1:
        return False
    if name in VIEWS:
        return True
    elementwise = name in PIECEWISE or name in SMOOTH or name in ("Add", "Sub", "Mul", "Div", "Where")
    batch_norm = name in ("NativeBatchNorm", "CudnnBatchNorm") and not trained_statistics(node)
    return (elementwise or batch_norm) and _same_size(node, active[0])


def _same_size(node: Any, i: int) -> bool:
    child, nr = node.next_functions[i]
    return shape_of(GradientEdge(child, nr)).numel() == shape_of(GradientEdge(node, 0)).numel()


def outputs(node: Any) -> list[GradientEdge]:
    return [GradientEdge(node, i) for i in range(output_count(node))]


def inputs(node: Any, active: Sequence[int]) -> list[GradientEdge]:
    return [GradientEdge(*node.next_functions[i]) for i in active]


@dataclass
class Bend:
    """A smooth elementwise node: `below` is its input's edge, d the diagonal second derivative of g . node(input)."""

    node: Any
    below: GradientEdge
    d: Tensor


class Graph:
    """The graph from an output to the recorded calls, each node with the calls it leads to, as bits of an integer."""

    def __init__(self, f: Tensor, edges: Sequence[GradientEdge]):
        self.calls = {(edge.node, edge.output_nr): i for i, edge in enumerate(edges)}
        own: dict[Any, int] = {}
        for i, edge in enumerate(edges):
            own[edge.node] = own.get(edge.node, 0) | 1 << i
        self.reach: dict[Any, int] = {}  # calls at a node or below it
        self.under: dict[Any, int] = {}  # calls below it
        self.active: dict[Any, list[int]] = {}
        self.others: list[str] = []  # the names of nodes that bend otherwise than as a diagonal, once `bends` was asked
        stack = [(f.grad_fn, False)]
        while stack:
            node, ready = stack.pop()
            if node is None or node in self.reach:
                continue
            children = [n for n, _ in node.next_functions]
            if not ready:
                stack.append((node, True))
                stack += [(n, False) for n in children if n is not None and n not in self.reach]
                continue
            self.active[node] = [i for i, n in enumerate(children) if n is not None and self.reach[n]]
            under = 0
            for i in self.active[node]:
                under |= self.reach[children[i]]
            self.under[node], self.reach[node] = under, under | own.get(node, 0)

    def bends(self, f: Tensor, gradient: Tensor, probe_all: bool = False) -> tuple[list[Bend], int]:
        """The smooth elementwise nodes, and the calls (as bits) that lie below a node which bends in another way.

        gradient: of the loss in the output, from which every node gets its g.  With `probe_all` what the names say is
        probed too, and a RuntimeError says which name is wrong.
        """
        kinds = {n: kind_of(n, self.active[n]) for n in self.active if self.under[n]}
        wanted = [n for n, kind in kinds.items() if probe_all or kind != "linear"]
        edges = [e for n in wanted for e in outputs(n)]
        if not edges:
            return [], 0
        found = iter(torch.autograd.grad(f, edges, gradient.to(f.dtype), retain_graph=True, allow_unused=True))
        smooth, full, self.others = [], 0, []
        for node in wanted:
            gs = [next(found) for _ in range(output_count(node))]
            kind, below = kinds[node], inputs(node, self.active[node])
            if all(g is None for g in gs):
                continue
            if kind == "unknown" or probe_all:
                shape = _probe(node, gs, self.active[node], below)
                if shape not in EXPECTED[kind]:
                    raise RuntimeError(
                        f"the graph node {node.name()} has a {shape} second derivative; expected it to be {kind}. "
                        "Please report it with your version of torch."
                    )
                kind = {"zero": "linear", "diagonal": "smooth"}.get(shape, kind)
            if kind == "smooth":
                smooth.append(Bend(node, below[0], _along(node, gs, self.active[node], below, None)[0]))
            elif kind == "unknown":
                full |= self.under[node]
                self.others.append(node.name())
        return smooth, full

    def descend(self, edge: GradientEdge, d: Tensor) -> Iterator[tuple[int | None, Tensor, GradientEdge]]:
        """(call, diagonal there, edge there) for every call that a diagonal matrix at `edge` reaches as a diagonal.

        Pulling diag(d) back through a pointwise node leaves it diagonal.  Ends before the first other node; the last
        thing yielded is (None, d, edge) where that is.
        """
        node: Any = edge.node
        nr = edge.output_nr
        while True:
            if (i := self.calls.get((node, nr))) is not None:
                yield i, d, GradientEdge(node, nr)
            active = self.active[node]
            if not self.under[node] or not pointwise(node, active):
                yield None, d, GradientEdge(node, nr)
                return
            with torch.no_grad():
                rest = [None] * (output_count(node) - 1)
                pulled, factor = (_first(node(t, *rest), active[0]) for t in (d, torch.ones_like(d)))
                d = pulled * factor
            node, nr = node.next_functions[active[0]]


def _first(result: Any, i: int) -> Tensor:
    return result[i] if isinstance(result, tuple) else result


def _along(
    node: Any, gs: list, active: Sequence[int], below: list[GradientEdge], r: list[Tensor] | None
) -> list[Tensor]:
    """The second derivative of g . node(inputs) times r (ones if None), for each active input."""
    with torch.enable_grad():
        pulled = node(*gs)
        pulled = list(pulled) if isinstance(pulled, tuple) else [pulled]
        outs = [pulled[i] for i in active]
        r = [torch.ones_like(o) for o in outs] if r is None else r
        pairs = [(o, v) for o, v in zip(outs, r, strict=True) if o is not None and o.requires_grad]
        if not pairs:
            return [torch.zeros(shape_of(e), dtype=o.dtype, device=o.device) for e, o in zip(below, outs, strict=True)]
        found = torch.autograd.grad(
            [o for o, _ in pairs], below, [v for _, v in pairs], retain_graph=True, allow_unused=True
        )
    return [torch.zeros_like(v) if t is None else t.detach() for t, v in zip(found, r, strict=True)]


EXPECTED = {
    "linear": {"zero", "unanswered"},
    "smooth": {"zero", "diagonal", "unanswered"},
    "unknown": {"zero", "diagonal", "full", "unanswered"},
}


def _probe(node: Any, gs: list, active: Sequence[int], below: list[GradientEdge]) -> str:
    """What the second derivative of a node does to a random direction: "zero", "diagonal" or "full".

    "unanswered" where the node cannot be applied on its own or has no second derivative.
    """
    first = next(g for g in gs if g is not None)
    generator = torch.Generator().manual_seed(0)
    r = [torch.randn(shape_of(e), generator=generator).to(first) for e in below]
    try:
        found = _along(node, gs, active, below, r)
        if not any(t.any() for t in found):
            return "zero"
        if len(below) > 1:
            return "full"
        d = _along(node, gs, active, below, None)[0]
    except (RuntimeError, TypeError):  # a Python function's node is not callable
        return "unanswered"
    error = (found[0] - d * r[0]).abs().max()
    return "diagonal" if error <= rounding(d.dtype, d.device) ** 0.6 * found[0].abs().max() else "full"
