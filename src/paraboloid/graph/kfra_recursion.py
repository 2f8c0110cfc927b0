"""KFRA: Kronecker factors by a recursion over the layers of a sequential network, averaged over the batch.

The curvature of the loss as reduced, summed over the samples, is carried from the output down:

    M_f = a sum_n H_n,        below a layer: M = mean_n J_n^T M J_n        (a mean of products taken as their product)

and a layer's gradient factor is read off M at its output.  For one sample, and wherever J_n is the same for all of
them, it is that of KFLR.  Source: Botev, Ritter & Barber 2017, arXiv:1706.03662.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from paraboloid.engine.per_sample import Part
from paraboloid.engine.recorder import Call
from paraboloid.engine.tape import Tape
from paraboloid.graph.averaged_curvature import (
    Blocks,
    Curvature,
    Root,
    blocks_of,
    channel_groups,
    pass_kernel,
    pass_linear,
    pass_matrix,
    pass_pointwise,
    pass_selection,
    pass_spatial,
    pass_view,
)
from paraboloid.graph.nodes import VIEWS, Graph, pointwise
from paraboloid.graph.single_use import Recorded, single_uses
from paraboloid.graph.weight_diagonal import coefficients, elements
from paraboloid.layers.convolutions import per_axis
from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import Loss
from paraboloid.passes.memory import SECOND_DERIVATIVES
from paraboloid.passes.torch_internals import maxima, operation, output_count, shape_of
from paraboloid.reductions.kronecker_factors import EXACT_VECTOR, Factors, input_factor, scale_factors

CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
PRODUCTS = {
    F.linear: 0,
    torch.matmul: 0,
    Tensor.matmul: 0,
    Tensor.__matmul__: 0,
    torch.mm: 0,
    Tensor.mm: 0,
    torch.addmm: 1,
}
# The same linear map for every sample, whatever the input.
SHARED = {
    "Mean", "Sum", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "ReflectionPad1D",
    "ReflectionPad2D", "ReflectionPad3D", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "PixelShuffle",
    "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleLinear1D", "UpsampleBilinear2D", "Flip",
    "Roll", "Expand", "Cumsum",
}  # fmt: skip
SELECTIONS = {"MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"}


def kfra(tape: Tape, loss: Loss, f: Tensor, y: Tensor, memory: int | None) -> dict[str, Kron]:
    """The factors of every parameter, for the loss as reduced.

    Raises NotImplementedError for networks that are not a chain, for other layers, and for parameters that several
    calls use or that enter through other tensors.
    """
    recorded = Recorded(tape, tape.plan(f), loss, f, y, memory)
    parts, others = single_uses(recorded)
    if others:
        raise NotImplementedError(
            f"'kfra': the parameters {others} are used several times, or through other tensors or operations without a "
            "rule; expected one layer for each. Use 'kflr'."
        )
    with torch.no_grad():
        return _Descent(recorded, parts).factors()


class _Descent:
    """The walk from the output to the lowest layer, with the curvature M at the current edge."""

    def __init__(self, recorded: Recorded, parts: dict[int, dict[str, Part]]):
        self.recorded, self.parts = recorded, parts
        self.f, self.N = recorded.f, len(recorded.f)
        self.graph = Graph(self.f, [c.edge for c in recorded.calls])
        self.largest = math.isqrt(SECOND_DERIVATIVES.count(self.f.element_size(), recorded.max_memory))
        for call, layout in zip(recorded.calls, recorded.plan.layouts, strict=True):
            if layout is not None and (layout.axis, layout.sizes[0]) != (0, 1):
                raise NotImplementedError(
                    f"'kfra': {recorded.tape.where(call)} has its samples along axis {layout.axis} of "
                    f"{tuple(call.shape)}; expected axis 0."
                )

    def factors(self) -> dict[str, Kron]:
        found: dict[str, Kron] = {}
        edge = get_gradient_edge(self.f)
        self.last = self._channels_last(edge)
        M = self._top()
        while True:
            node: Any = edge.node
            i = self.graph.calls.get((node, edge.output_nr))
            if i is not None:
                found |= {name: self._kron(M, part, edge) for name, part in self.parts.get(i, {}).items()}
            if not self.graph.under[node]:
                break
            M, edge = self._through_call(M, edge, i) or self._through_node(M, edge)
        parameters = self.recorded.tape.parameters
        return {name: found[name] if name in found else _zero(p) for name, p in parameters.items()}

    def _top(self) -> Curvature:
        """a sum_n H_n from the loss's root."""
        recorded, f = self.recorded, self.f
        a = 1 / recorded.loss.normalizer(f, recorded.y)
        groups = self._groups(get_gradient_edge(f))
        K = f.new_zeros(groups.shape[0], groups.shape[1], groups.shape[1])
        for s in recorded.loss.hessian_root(f.detach(), recorded.y):
            part = s.to(f.dtype).flatten(1)[:, groups].transpose(0, 1) if f.dim() > 1 else s.view(1, -1, 1)
            K.baddbmm_(part.mT, part, alpha=a)
        return Blocks(groups, K)

    # --- the matrix's form -------------------------------------------------------------------------------------------

    def _fits(self, edge: GradientEdge) -> bool:
        """Whether the whole matrix is taken at an edge; where there are no positions, nothing else is possible."""
        return shape_of(edge).numel() // self.N <= self.largest or len(self._channels(edge)) == 1

    def _channels(self, edge: GradientEdge) -> Tensor:
        """[T, C]: the channels at each position."""
        shape = shape_of(edge)
        if len(shape) < 3 and shape[0] == self.N:
            return torch.arange(shape.numel() // self.N, device=self.f.device).unsqueeze(0)
        return channel_groups(shape, self.N, self.last or len(shape) < 3, self.f.device)

    def _groups(self, edge: GradientEdge) -> Tensor:
        """The groups of elements whose couplings are kept at an edge: all of them, or the channels at each position."""
        if self._fits(edge):
            return torch.arange(shape_of(edge).numel() // self.N, device=self.f.device).unsqueeze(0)
        return self._channels(edge)

    def _channels_last(self, edge: GradientEdge) -> bool:
        """Whether the next layer below has its channels on the last axis (a product), not on axis 1."""
        node: Any = edge.node
        while True:
            i = self.graph.calls.get((node, edge.output_nr))
            if i is not None and (op := self.recorded.calls[i].op) in CONVOLUTIONS | TRANSPOSED | set(PRODUCTS):
                return op in PRODUCTS
            if operation(node) in SELECTIONS or "Pool" in operation(node) or len(self.graph.active[node]) != 1:
                return False
            edge = GradientEdge(*node.next_functions[self.graph.active[node][0]])
            node = edge.node

    # --- one layer down ----------------------------------------------------------------------------------------------

    def _through_call(self, M: Curvature, edge: GradientEdge, i: int | None) -> tuple[Curvature, GradientEdge] | None:
        """Through a convolution or a product with a weight matrix, to its input."""
        call = None if i is None else self.recorded.calls[i]
        if call is None or call.op not in CONVOLUTIONS | TRANSPOSED | set(PRODUCTS):
            return None
        at = PRODUCTS.get(call.op, 0)
        x = call.args[at] if len(call.args) > at else call.kwargs["input"]
        below = get_gradient_edge(x)
        if isinstance(M, Root) or M.whole:
            M = pass_linear(M, edge, below, self.N, self._fits(below))
        elif call.op in CONVOLUTIONS and torch.equal(M.index, self._channels(edge)):
            M = self._through_convolution(M, call, below)
        elif call.op is F.linear and torch.equal(M.index, self._channels(edge)):
            weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
            M = pass_matrix(M, weight.to(M.K.dtype), channel_groups(x.shape, self.N, True, x.device))
        else:
            raise self._needs_whole(edge.node)
        self.last = self._channels_last(below) if self.graph.reach.get(below.node) else False
        return M, below

    def _through_convolution(self, M: Blocks, call: Call, below: GradientEdge) -> Blocks:
        x, weight, stride, padding, dilation, groups = _arguments(*call.args, **call.kwargs)
        p, kernel = len(weight), weight.shape[2:]
        dense = weight.new_zeros(p, x.shape[1], math.prod(kernel))
        for g in range(groups):
            rows = slice(g * p // groups, (g + 1) * p // groups)
            columns = slice(g * weight.shape[1], (g + 1) * weight.shape[1])
            dense[rows, columns] = weight[rows].flatten(2)
        places = _places(x.shape[2:], call.shape[2:], kernel, stride, padding, dilation, x.device)
        return pass_kernel(M, dense.to(M.K.dtype), places, channel_groups(x.shape, self.N, False, x.device))

    def _through_node(self, M: Curvature, edge: GradientEdge) -> tuple[Curvature, GradientEdge]:
        node: Any = edge.node
        name, active = operation(node), self.graph.active[node]
        if len(active) != 1:
            raise NotImplementedError(
                f"'kfra' needs a chain of layers; found a branch: the graph node {node.name()} has {len(active)} inputs"
                " that lead to layers. Use 'kflr' or 'kfac'."
            )
        below = GradientEdge(*node.next_functions[active[0]])
        if name in VIEWS:
            return pass_view(M, node, self.N), below
        if name not in SHARED and name not in SELECTIONS and not pointwise(node, active):
            raise NotImplementedError(
                "'kfra' knows linear, convolution, activation and pooling layers; found the graph node "
                f"{node.name()}. Use 'kflr' or 'kfac'."
            )
        if name in SHARED and (isinstance(M, Root) or M.whole):
            return pass_linear(M, edge, below, self.N, self._fits(below)), below
        if isinstance(M, Root):
            M = blocks_of(M, self._groups(edge))
        if name in SHARED:
            if not torch.equal(M.index, self._channels(edge)):
                raise self._needs_whole(node)
            return pass_spatial(M, edge, below, self.N, self._channels(below)), below
        if name in SELECTIONS:
            shape = shape_of(below)
            plane = shape[2:].numel()
            chosen = maxima(node).flatten(2) + plane * torch.arange(shape[1], device=self.f.device).unsqueeze(1)
            groups = self._groups(below) if M.whole else self._channels(below)
            return pass_selection(M, chosen.flatten(1), shape.numel() // self.N, groups), below
        ones = torch.ones(shape_of(edge), dtype=self.f.dtype, device=self.f.device)
        derivative = node(ones, *[None] * (output_count(node) - 1))
        derivative = derivative[active[0]] if isinstance(derivative, tuple) else derivative
        return pass_pointwise(M, derivative.reshape(self.N, -1).to(M.K.dtype)), below

    def _needs_whole(self, node: Any) -> NotImplementedError:
        return NotImplementedError(
            f"'kfra': {node.name()} can be passed with the whole curvature matrix only, which exceeds "
            f"{self.largest} x {self.largest}; raise max_memory."
        )

    # --- factors -----------------------------------------------------------------------------------------------------

    def _kron(self, M: Curvature, part: Part, edge: GradientEdge) -> Kron:
        assert part.use is not None
        ones = torch.ones(shape_of(edge), dtype=self.f.dtype, device=self.f.device)
        if part.use.right is None:
            return Kron(self._vector_block(M, part, ones), ones.new_ones(1, 1))
        o, at, scale = elements(part, ones.shape, ones)
        left = _within(M, at[0], scale[0], ones.numel() // self.N).to(o.left.dtype)
        sums = {"gradient": left}, {"input": input_factor(o, "expand", self.recorded.max_memory)}
        rows, columns = reversed(sums) if o.flip else sums
        positions = (
            (o.right() >= 0).sum().double() if o.lookup and o.right else torch.tensor(float(self.N * at.shape[2]))
        )
        return scale_factors(Factors(rows, columns, positions.cpu().double(), o.left.shape[2]), 1.0)

    def _vector_block(self, M: Curvature, part: Part, ones: Tensor) -> Tensor:
        """S^T (M * mean_n c_n c_n^T) S for z_i = c_n,i theta_j(i), S[i, j(i)] = 1: a bias, a scale."""
        c = coefficients(part, ones)
        names = torch.arange(1, part.root.numel() + 1, dtype=c.dtype, device=c.device)
        with torch.enable_grad():
            g = torch.zeros_like(ones).requires_grad_()
            o = part.outer(g[None], None)
            (named,) = torch.autograd.grad((o.left.sum((0, 1, 2, 3)) * names).sum(), g)
        owner = torch.where(c == 0, 0, named / c).round().long().reshape(self.N, -1)[0] - 1
        c = c.reshape(self.N, -1)
        M = blocks_of(M, torch.arange(c.shape[1], device=c.device).unsqueeze(0)) if isinstance(M, Root) else M
        K, owner = pass_pointwise(M, c).K, owner[M.index].clamp(min=0)  # [T C C], [T C]
        size = part.root.numel()
        if size > EXACT_VECTOR:
            same = owner.unsqueeze(2) == owner.unsqueeze(1)
            return K.new_zeros(size).index_add_(0, owner.unsqueeze(2).expand_as(K)[same], K[same])
        rows = K.new_zeros(len(K), size, K.shape[2]).scatter_add_(1, owner.unsqueeze(2).expand_as(K), K)
        where = owner.unsqueeze(1).expand(-1, size, -1)
        return K.new_zeros(len(K), size, size).scatter_add_(2, where, rows).sum(0)


def _within(M: Curvature, at: Tensor, scale: Tensor, size: int) -> Tensor:
    """sum_t of M's entries between the elements at[g, t, :], [G, p, p]."""
    if isinstance(M, Root):
        X = M.X[:, at] * scale  # [r G T p]
        return torch.einsum("rgtp,rgtq->gpq", X, X)
    group, place = (torch.full((size,), -1, device=at.device) for _ in range(2))
    group[M.index] = torch.arange(len(M.index), device=at.device).unsqueeze(1).expand_as(M.index)
    place[M.index] = torch.arange(M.index.shape[1], device=at.device).expand_as(M.index)
    G, T, p = at.shape
    left = M.K.new_zeros(G, p, p)
    for t in range(T):
        for g in range(G):
            rows, s = at[g, t], scale[g, t].to(M.K.dtype)
            same = (group[rows].unsqueeze(1) == group[rows]) & (group[rows] >= 0)
            left[g] += M.K[group[rows].unsqueeze(1), place[rows].unsqueeze(1), place[rows]] * same * torch.outer(s, s)
    return left


def _zero(p: Tensor) -> Kron:
    """The factors of a parameter without influence on the output."""
    rows, columns = (len(p), p[0].numel()) if p.dim() > 1 else (p.numel(), 1)
    right = p.new_ones(1, 1) if p.dim() < 2 else p.new_zeros(columns, columns)
    return Kron(p.new_zeros(rows, rows), right)


def _arguments(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return input, weight, stride, padding, dilation, groups


def _places(size, out, kernel, stride, padding, dilation, device) -> Tensor:
    """[k, T_out]: the flat input position that output position t sees through kernel element k; -1 for padding."""
    axes = len(kernel)
    stride, dilation = per_axis(stride, axes), per_axis(dilation, axes)
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
    padding = per_axis(0 if padding == "valid" else padding, axes)
    flat = torch.zeros((), dtype=torch.int64, device=device)
    inside = torch.ones((), dtype=torch.bool, device=device)
    for axis in range(axes):
        k = torch.arange(kernel[axis], device=device).view(-1, *[1] * (2 * axes - 1 - axis))
        t = torch.arange(out[axis], device=device).view(-1, *[1] * (axes - 1 - axis))
        s = t * stride[axis] + k * dilation[axis] - padding[axis]
        inside = inside & (s >= 0) & (s < size[axis])
        flat = flat * size[axis] + s
    return torch.where(inside, flat, -1).reshape(math.prod(kernel), -1)
