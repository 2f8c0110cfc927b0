"""KFRA: Kronecker factors by a recursion over the layers of a sequential network, averaged over the batch.

The curvature of the unreduced loss, summed over the samples, is carried from the output down:

    M_f = sum_n H_n,        below a layer: M = mean_n J_n^T M J_n        (a mean of products taken as their product)

and a layer's gradient factor is read off M at its output.  For one sample, and wherever J_n is the same for all of
them, it is that of KFLR.  Source: Botev, Ritter & Barber 2017, arXiv:1706.03662.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from paraboloid.engine.per_sample import Part, swapped
from paraboloid.engine.recorder import Call
from paraboloid.engine.sample_independence import Layout, Owned
from paraboloid.engine.tape import Tape
from paraboloid.graph.averaged_curvature import (
    Blocks,
    Curvature,
    Root,
    blocks_of,
    channel_groups,
    in_each_sample,
    lookup,
    pass_linear,
    pass_pointwise,
    pass_rows,
    pass_selection,
    pass_spatial,
    pass_view,
    same_for_all,
)
from paraboloid.graph.nodes import VIEWS, Graph, pointwise
from paraboloid.graph.single_use import Recorded, single_uses
from paraboloid.layers import RULES, Use
from paraboloid.losses import Loss
from paraboloid.passes.memory import SECOND_DERIVATIVES
from paraboloid.passes.torch_internals import maxima, operation, output_count, shape_of
from paraboloid.reductions.kronecker_factors import (
    DEFAULT,
    EXACT_VECTOR,
    Factors,
    Kept,
    add_factors,
    input_factor,
    longer,
)
from paraboloid.reductions.outer import zero
from paraboloid.reductions.products import Products

SELECTIONS = {"MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"}


def kfra(
    tape: Tape, loss: Loss, f: Tensor, y: Tensor, memory: int | None, kept: Kept = DEFAULT
) -> dict[str, Factors]:  # fmt: skip
    """The factors of every parameter, of the unreduced loss: the gradients' as a sum over the samples.

    Raises NotImplementedError for networks that are not a chain, for other layers, and for parameters that several
    calls use or that enter through other tensors.
    """
    recorded = Recorded(tape, tape.plan(f), loss, f, y, memory)
    if recorded.plan.apart:
        raise NotImplementedError("'kfra': the samples see each other (nodes of a graph); expected separate ones. Use "
                                  "'kflr' or 'kfac'.")  # fmt: skip
    parts, others = single_uses(recorded)
    if any(isinstance(layout, Owned) for layout in recorded.plan.layouts):
        raise NotImplementedError("'kfra': the samples lie along no axis of some layers; expected axis 0. Use 'kflr'.")
    if others:
        raise NotImplementedError(
            f"'kfra': the parameters {others} are used several times, or through other tensors or operations without a "
            "rule; expected one layer for each. Use 'kflr'."
        )
    with torch.no_grad():
        return _Descent(recorded, parts, kept).factors()


class _Descent:
    """The walk from the output to the lowest layer, with the curvature M at the current edge."""

    def __init__(self, recorded: Recorded, parts: dict[int, dict[str, Part]], kept: Kept):
        self.recorded, self.parts, self.kept = recorded, parts, kept
        self.f, self.N = recorded.f, len(recorded.f)
        self.graph = Graph(self.f, [c.edge for c in recorded.calls])
        self.largest = math.isqrt(SECOND_DERIVATIVES.count(self.f.element_size(), recorded.max_memory))
        for call, layout in zip(recorded.calls, recorded.plan.layouts, strict=True):
            if isinstance(layout, Layout) and (layout.axis, layout.sizes[0]) != (0, 1):
                raise NotImplementedError(
                    f"'kfra': {recorded.tape.where(call)} has its samples along axis {layout.axis} of "
                    f"{tuple(call.shape)}; expected axis 0."
                )

    def factors(self) -> dict[str, Factors]:
        found: dict[str, Factors] = {}
        edge = get_gradient_edge(self.f)
        self.last = self._channels_last(edge)
        M = self._top()
        while True:
            node: Any = edge.node
            i = self.graph.calls.get((node, edge.output_nr))
            if i is not None:
                found |= {name: self._factors(M, part, edge) for name, part in self.parts.get(i, {}).items()}
            if not self.graph.under[node]:
                break
            M, edge = self._through_call(M, edge, i) or self._through_node(M, edge)
        parameters = self.recorded.tape.parameters
        zeros = {name: zero(p, 1, self.N) for name, p in parameters.items() if name not in found}
        return {k: found[k] if k in found else add_factors(None, zeros[k], self.kept) for k in parameters}

    def _top(self) -> Curvature:
        """sum_n H_n from the loss's root."""
        recorded, f = self.recorded, self.f
        groups = self._groups(get_gradient_edge(f))
        K = f.new_zeros(groups.shape[0], groups.shape[1], groups.shape[1])
        for s in recorded.loss.hessian_root(f.detach(), recorded.y):
            part = s.to(f.dtype).flatten(1)[:, groups].transpose(0, 1) if f.dim() > 1 else s.view(1, -1, 1)
            K.baddbmm_(part.mT, part)
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
            if i is not None and (use := self.recorded.calls[i].product()) is not None:
                return use.q_axes is None
            if operation(node) in SELECTIONS or "Pool" in operation(node) or len(self.graph.active[node]) != 1:
                return False
            edge = GradientEdge(*node.next_functions[self.graph.active[node][0]])
            node = edge.node

    # --- one layer down ----------------------------------------------------------------------------------------------

    def _through_call(self, M: Curvature, edge: GradientEdge, i: int | None) -> tuple[Curvature, GradientEdge] | None:
        """Through a product of a weight and rows of an input, to that input."""
        call = None if i is None else self.recorded.calls[i]
        use = None if call is None else call.product()
        below = None if call is None else call.input_edge(use)
        if call is None or use is None or below is None or not same_for_all(edge, below, self.f):
            return None
        if isinstance(M, Root) or M.whole:
            passed = pass_linear(M, edge, below, self.N, self._fits(below))
        else:
            passed = self._through_rows(M, call, use)
        if passed is None:
            raise self._needs_whole(edge.node)
        self.last = self._channels_last(below) if self.graph.reach.get(below.node) else False
        return passed, below

    def _through_rows(self, M: Blocks, call: Call, use: Use) -> Blocks | None:
        """Through the rows of the first sample, if the rows of z are M's groups; None if not."""
        assert use.input is not None
        x, N, G = use.input, self.N, use.groups
        at, scale = (t[0].unflatten(0, (N, -1))[0] for t in use.elements(call.shape, M.K))  # [b G T p]
        rows = at.transpose(1, 2).flatten(2).flatten(0, 1) - 1
        if not torch.equal(rows, M.index):
            return None
        flat = torch.arange(1, x.numel() + 1, device=x.device).view(x.shape)
        uses = RULES[call.op](*swapped(call.args, {id(x): flat}), **swapped(call.kwargs, {id(x): flat}))
        (rows_of,) = (u.right for u in uses if u.right is not None)
        right = rows_of(slice(None)).unflatten(0, (N, -1))[0]  # [b G *q-axes *T-axes]
        right = right.mT.unsqueeze(3) if use.q_axes is None else right.flatten(2 + use.q_axes).unsqueeze(-2)
        right = right.reshape(*right.shape[:3], -1, right.shape[-1])  # [b G q/k k T]
        weight = use.weight.detach().to(M.K.dtype) * scale.flatten()[0]
        weight = weight.reshape(G, use.q, -1).mT if use.flip else weight.reshape(G, -1, use.q)
        each = weight.unflatten(2, right.shape[2:4]).unbind(3)
        below = channel_groups(x.shape, N, use.q_axes is None, x.device)
        seen = right.permute(3, 0, 4, 1, 2).flatten(3).flatten(1, 2) - 1
        return pass_rows(M, torch.stack([torch.block_diag(*W) for W in each]), seen, below, x.numel() // N)

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
        selects = name in SELECTIONS
        shared = not selects and not pointwise(node, active)
        if shared and not same_for_all(edge, below, self.f):
            raise NotImplementedError(
                "'kfra' knows linear, convolution, activation and pooling layers; found the graph node "
                f"{node.name()}. Use 'kflr' or 'kfac'."
            )
        if shared and (isinstance(M, Root) or M.whole):
            return pass_linear(M, edge, below, self.N, self._fits(below)), below
        if isinstance(M, Root):
            M = blocks_of(M, self._groups(edge))
        if shared:
            if not torch.equal(M.index, self._channels(edge)):
                raise self._needs_whole(node)
            return pass_spatial(M, edge, below, self.N, self._channels(below)), below
        if selects:
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

    def _factors(self, M: Curvature, part: Part, edge: GradientEdge) -> Factors:
        assert part.use is not None
        if part.elements is None:
            raise NotImplementedError(f"'kfra': {edge.node.name()} adds rows of a table; use 'kflr'.")
        at, scale = part.elements()
        size = shape_of(edge).numel() // self.N
        at = in_each_sample(at, size, edge.node)
        if part.use.right is None:
            return Factors({}, {}, torch.tensor(0.0), 1, self._vector_block(M, at, scale, size).unsqueeze(0))
        o = part.outer(scale.new_zeros(()).expand(1, *shape_of(edge)))
        assert isinstance(o, Products)
        left = _within(M, at, scale, size).to(o.left.dtype)
        left = left.diagonal(dim1=1, dim2=2).clone() if left.shape[1] > self.kept.max_factor else left
        sums = {"gradient": left}, {"input": input_factor(o, self.kept, self.recorded.max_memory)}
        rows, columns = reversed(sums) if o.flip else sums
        positions = torch.tensor(o.positions, dtype=torch.float64)
        why = longer(self.kept, left.shape[1], o.q)
        return Factors(rows, columns, positions, o.left.shape[2], diagonal=why)

    def _vector_block(self, M: Curvature, at: Tensor, scale: Tensor, size: int) -> Tensor:
        """S^T (M * mean_n c_n c_n^T) S for z_i = c_n,i theta_j(i), S[i, j(i)] = 1: a bias, a scale; at [1 T p]."""
        p, at, scale = at.shape[-1], at.flatten(), scale.flatten(1)
        inside, owner = at >= 0, torch.full((size,), -1, device=at.device)
        owner[at[inside]] = torch.arange(p, device=at.device).repeat(len(at) // p)[inside]
        if (owner >= 0).sum() != inside.sum():
            raise NotImplementedError(f"'kfra': several of {p} weights reach one output; expected one. Use 'kflr'.")
        c = scale.new_zeros(self.N, size)
        c[:, at[inside]] = scale[:, inside]
        M = blocks_of(M, torch.arange(size, device=c.device).unsqueeze(0)) if isinstance(M, Root) else M
        K, owner = pass_pointwise(M, c).K, owner[M.index].clamp(min=0)  # [T C C], [T C]
        if p > min(EXACT_VECTOR, self.kept.max_factor):
            same = owner.unsqueeze(2) == owner.unsqueeze(1)
            return K.new_zeros(p).index_add_(0, owner.unsqueeze(2).expand_as(K)[same], K[same])
        rows = K.new_zeros(len(K), p, K.shape[2]).scatter_add_(1, owner.unsqueeze(2).expand_as(K), K)
        where = owner.unsqueeze(1).expand(-1, p, -1)
        return K.new_zeros(len(K), p, p).scatter_add_(2, where, rows).sum(0)


def _within(M: Curvature, at: Tensor, scale: Tensor, size: int) -> Tensor:
    """sum_t of M's entries between the elements at[g, t, :] (-1: none), times mean_n scale scale^T, [G, p, p]."""
    G, T, p = at.shape
    if isinstance(M, Blocks):
        group, place = lookup(M.index, size)
    left = scale.new_zeros(G, p, p)
    for g, t in itertools.product(range(G), range(T)):
        rows, s = at[g, t].clamp(min=0), scale[:, g, t]
        if isinstance(M, Root):
            K = M.X[:, rows].T @ M.X[:, rows]
        else:
            same = (group[rows].unsqueeze(1) == group[rows]) & (group[rows] >= 0)
            K = M.K[group[rows].unsqueeze(1), place[rows].unsqueeze(1), place[rows]] * same
        left[g] += K * (s.T @ s / len(s))
    return left
