"""A curvature matrix at one place of a sequential network, averaged over the batch, and how it passes a layer.

With J_n the Jacobian of a layer for sample n, the matrix below the layer is mean_n J_n^T M J_n.  It is kept in one of
three forms:

whole    M [D, D], D the elements of a sample there: `Blocks` with a single group of all elements
blocks   only the couplings within groups of elements: the channels at each spatial position, [T, C, C].  What couples
         different positions is dropped, at each layer again: the approximation for images whose whole matrix does not
         fit into memory
root     X [r, D] with M = X^T X, where a wide layer is entered from a narrow one
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from paraboloid.passes.modes import rounding
from paraboloid.passes.torch_internals import operation, shape_of

SAME = {"ToCopy", "Clone", "Alias", "Detach"}  # nodes that rename nothing


@dataclass
class Blocks:
    """K [T, C, C] over the elements index [T, C] of a sample, flat positions; all other entries are zero."""

    index: Tensor
    K: Tensor

    @property
    def whole(self) -> bool:
        return len(self.index) == 1


@dataclass
class Root:
    X: Tensor


Curvature = Blocks | Root


def channel_groups(shape: torch.Size, N: int, last: bool, device: torch.device) -> Tensor:
    """The elements of a sample by position, [T, C]: channels are the last axis, or axis 1."""
    size = shape.numel() // N
    channels = shape[-1] if last else shape[1]
    flat = torch.arange(size, device=device)
    return flat.view(-1, channels) if last else flat.view(channels, -1).T


def blocks_of(root: Root, groups: Tensor) -> Blocks:
    """The couplings within groups [T, C] of the matrix X^T X, exactly."""
    X = root.X[:, groups].transpose(0, 1)  # [T r C]
    return Blocks(groups, X.mT @ X)


def in_each_sample(at: Tensor, size: int, node: Any) -> Tensor:
    """Flat positions [N ..] (-1: none) among samples of `size` elements, as positions in a sample; the same for all."""
    N = len(at)
    inside = torch.where(at < 0, -1, at - size * torch.arange(N, device=at.device).view(-1, *[1] * (at.dim() - 1)))
    if (inside != inside[0]).any() or (inside[0] >= size).any() or (inside < -1).any():
        raise NotImplementedError(
            f"'kfra': the graph node {node.name()} moves the samples away from axis 0; kfra needs them there."
        )
    return inside[0]


def pass_view(M: Curvature, node: Any, N: int) -> Curvature:
    """Through a node whose output elements are input elements, or nothing: they are only renamed."""
    if operation(node) in SAME:
        return M
    out, below = shape_of(GradientEdge(node, 0)), shape_of(GradientEdge(*node.next_functions[0]))
    size = out.numel() // N
    device = (M.X if isinstance(M, Root) else M.K).device
    flat = torch.arange(1, out.numel() + 1, dtype=torch.float64, device=device)  # in which any position is exact
    where = in_each_sample(node(flat.view(out)).view(N, -1).long() - 1, size, node)  # of input elements in the output
    kept = where >= 0
    if isinstance(M, Root):
        X = M.X.new_zeros(len(M.X), below.numel() // N)
        X[:, kept] = M.X[:, where[kept]]
        return Root(X)
    back = torch.full((size,), -1, device=where.device)
    back[where[kept]] = kept.nonzero().flatten()
    index = back[M.index]
    if M.whole:
        keep = (index[0] >= 0).nonzero().flatten()
        return Blocks(index[:, keep], M.K[:, keep][:, :, keep])
    kept = (index >= 0).all(1)
    return Blocks(index[kept], M.K[kept])


def pass_pointwise(M: Blocks, factors: Tensor) -> Blocks:
    """Through z_i = phi_n,i(x_i): M times the second moments of the derivatives, factors [N, D], entry by entry."""
    b = factors[:, M.index].transpose(0, 1)  # [T N C]
    return Blocks(M.index, M.K * (b.mT @ b) / len(factors))


def pass_selection(M: Blocks, chosen: Tensor, size: int, groups: Tensor | None) -> Blocks:
    """Through max pooling: output element i of sample n is the input element chosen[n, i].

    The result is the whole matrix [size, size], or the couplings within `groups`.
    """
    if groups is None:
        groups = torch.arange(size, device=chosen.device).unsqueeze(0)
    T, C = groups.shape
    group, place = lookup(groups, size)
    K = M.K.new_zeros(T, C, C)
    for at in chosen:
        at = at[M.index]  # [t c]
        same = group[at].unsqueeze(2) == group[at].unsqueeze(1)
        t, i, j = same.nonzero(as_tuple=True)
        K.index_put_((group[at[t, i]], place[at[t, i]], place[at[t, j]]), M.K[t, i, j], accumulate=True)
    return Blocks(groups, K / len(chosen))


def lookup(groups: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Each element's group and its place there; -1 where it is in none."""
    group, place = (torch.full((size,), -1, device=groups.device) for _ in range(2))
    T, C = groups.shape
    group[groups] = torch.arange(T, device=groups.device).unsqueeze(1).expand(T, C)
    place[groups] = torch.arange(C, device=groups.device).expand(T, C)
    return group, place


def same_for_all(out: GradientEdge, below: GradientEdge, f: Tensor) -> bool:
    """Whether the Jacobian between two edges is the same for every sample, as that of a linear layer is."""
    N, shape = len(f), shape_of(out)
    v = torch.randn(shape.numel() // N, generator=torch.Generator().manual_seed(0)).to(f).expand(N, -1).reshape(shape)
    (g,) = torch.autograd.grad([out], [below], [v], retain_graph=True)
    g = g.reshape(N, -1)
    return bool((g - g[0]).abs().max() <= rounding(g.dtype, g.device) ** 0.6 * g.abs().max())


def pull_rows(rows: Tensor, out: GradientEdge, below: GradientEdge, N: int) -> Tensor:
    """Rows [r, D_out] times the Jacobian of a layer that is the same linear map for every sample, [r, D_in].

    Every sample carries another row.
    """
    shape = shape_of(out)
    found = []
    for part in rows.split(N):
        v = rows.new_zeros(N, rows.shape[1])
        v[: len(part)] = part
        (g,) = torch.autograd.grad([out], [below], [v.view(shape)], retain_graph=True)
        found.append(g.reshape(N, -1)[: len(part)].to(rows.dtype))
    return torch.cat(found)


def pass_linear(M: Curvature, out: GradientEdge, below: GradientEdge, N: int, fits: bool) -> Curvature:
    """Through a layer that is the same linear map for every sample, for a whole matrix or a root.

    If the result does not fit as a whole matrix, it is a root.
    """
    if isinstance(M, Root):
        return Root(pull_rows(M.X, out, below, N))
    size = shape_of(out).numel() // N
    full = M.K.new_zeros(size, size)
    index = M.index[0]
    full[index.unsqueeze(1), index] = M.K[0]
    if fits:
        K = pull_rows(pull_rows(full, out, below, N).T, out, below, N)
        return Blocks(torch.arange(len(K), device=K.device).unsqueeze(0), ((K + K.T) / 2).unsqueeze(0))
    values, vectors = torch.linalg.eigh(full)
    keep = values > torch.finfo(values.dtype).eps * values.abs().max() * size
    return Root(pull_rows((vectors[:, keep] * values[keep].sqrt()).T, out, below, N))


def pass_rows(M: Blocks, weight: Tensor, seen: Tensor, below: Tensor, size: int) -> Blocks | None:
    """Through z[t] = sum_k W_k x[seen[k, t]], the positions t being M's groups; weight [k p q], seen [k T q], -1: none.

    K_in[s] = sum_k W_k^T K_out[t] W_k over the t that see group s of `below` through k.  None where they see another.
    """
    group, _ = lookup(below, size)
    K = M.K.new_zeros(len(below), *below.shape[1:] * 2)
    for W, at in zip(weight, seen, strict=True):
        inside = at[:, 0] >= 0
        where = group[at[inside, 0]]
        if not torch.equal(below[where], at[inside]):
            return None
        K.index_add_(0, where, W.T @ M.K[inside] @ W)
    return Blocks(below, K)


def pass_spatial(M: Blocks, out: GradientEdge, below: GradientEdge, N: int, groups: Tensor) -> Blocks:
    """Through a layer that mixes positions and treats all channels alike (average pooling, padding, upsampling)."""
    units = M.K.new_zeros(len(M.index) + 1, shape_of(out).numel() // N)
    units[:-1].scatter_(1, M.index[:, :1], 1.0)
    v = torch.randn(M.index.shape, generator=torch.Generator().manual_seed(0)).to(M.K)
    units[-1, M.index] = v
    *rows, mixed = pull_rows(units, out, below, N)
    P = torch.stack(rows)[:, groups[:, 0]] if groups.shape[1] == v.shape[1] else None  # [T_out T_in]
    if P is None or (mixed[groups] - P.T @ v).abs().max() > rounding(P.dtype, P.device) ** 0.6 * mixed.abs().max():
        raise NotImplementedError(
            f"the graph node {out.node.name()} mixes channels and positions; kfra passes it with the whole matrix "
            "only: raise max_memory."
        )
    K = P.square().T @ M.K.flatten(1)
    return Blocks(groups, K.view(len(groups), *M.K.shape[1:]))
