"""Inner products of all pulled-back vectors of one batch with all of another: the blocks of a tangent kernel.

    K[v, n, u, m] = sum_d J[v, n, d] W[d] J'[u, m, d]        over the elements d of all parameters, W >= 0

An outer product is formed only where that takes fewer multiplications.  With a W that is the same for all outputs of a
layer, as one number for each parameter or for each input is,

    K[v, n, u, m] = sum_{t, s} (left_nvt . left'_mus) (right_nt . W right'_ms),

and with any other the second factor is one for each output p, still without the V^2 pairs of vectors.
Source: Novak, Sohl-Dickstein and Schoenholz 2022, arXiv:2206.08720, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from paraboloid.passes.memory import PIECES, ROWS
from paraboloid.reductions.contractions import layers
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.products import OnePosition, Products, Vector

COLUMNS = 4096  # elements whose rows are taken together in the type of K
APART = 8  # what a multiplication outside a product of matrices counts as


def add_inner_products(
    K: Tensor, a: Mapping[str, Outer], b: Mapping[str, Outer], W: Mapping[str, Tensor], memory: int | None = None
) -> None:
    """Add them to K [V N U M], in its type, for the forms `a` and `b` of two batches by parameter."""
    pairs = layers(a)
    for name, bias in pairs if pairs == layers(b) else [(name, None) for name in a]:
        w, shift = W[name].to(K.dtype), None if bias is None else W[bias].to(K.dtype).flatten()
        left, right = a[name], b[name]
        if isinstance(left, Products) and isinstance(right, Products):
            blocks = _by_block(left, w)
            same = torch.equal(blocks, blocks[:, :1].expand_as(blocks))
            costs = _costs(left, right, not same)
            form = min(costs, key=lambda form: costs[form])
            if form == "outputs":
                _output_by_output(K, left, right, blocks, shift)
                continue
            if form == "sides":
                one = None if shift is None or (shift != shift[0]).any() else shift[0]
                _side_by_side(K, left, right, blocks[:, 0], one, memory)
                shift = None if one is not None else shift
            else:
                _row_by_row(K, left, right, w.flatten(), memory)
        elif isinstance(left, Vector) and isinstance(right, Vector):
            _of_vectors(K, left, right, w.flatten())
        else:
            _row_by_row(K, left, right, w.flatten(), memory)
        if bias is not None and shift is not None:
            _of_vectors(K, a[bias], b[bias], shift)


def multiplications(uses: Mapping[str, Outer], varied: bool) -> float:
    """How many each pair of samples takes, about; `varied`: with weights that differ from output to output."""
    return sum(min(_costs(o, o, varied).values()) for o in uses.values())


def _costs(a: Outer, b: Outer, varied: bool) -> dict[str, float]:
    """Multiplications for a pair of samples, by form."""
    V, U, found = len(a.left), len(b.left), {"rows": float(len(a.left) * len(b.left) * a.shape.numel())}
    if type(a) in (Products, OnePosition) and type(b) in (Products, OnePosition):
        (G, p, q), positions = a.block, a.left.shape[3] * b.left.shape[3]
        if varied:
            found["outputs"] = float(G * positions * p * (q + U * (V + APART)))
        else:
            found["sides"] = float(G * positions * (q + V * U * (p + APART)))
    return found


def _by_block(o: Products, w: Tensor) -> Tensor:
    """Weights of the parameter's shape as [G p q]."""
    G, p, q = o.block
    return w.reshape(G, q, p).mT if o.flip else w.reshape(G, p, q)


def _side_by_side(K: Tensor, a: Products, b: Products, w: Tensor, shift: Tensor | None, memory: int | None) -> None:
    """W the same for all outputs, [G q]; `shift` that of the bias."""
    (V, N, G, T, _), (U, M, _, S, _) = a.left.shape, b.left.shape
    step = PIECES.count(T * U * M * S * K.element_size(), memory, K.device)
    for g in range(G):
        other, left = b.inputs()[:, g].to(K.dtype).flatten(0, 1), b.left[:, :, g].to(K.dtype).flatten(0, 2)
        for n in (slice(start, start + step) for start in range(0, N, step)):
            inputs = (a.inputs(n)[:, g].to(K.dtype) * w[g]).flatten(0, 1)
            inner = inputs @ other.T if shift is None else torch.addmm(shift, inputs, other.T)
            inner = inner.view(-1, T, 1, M, S)
            for v in range(V):
                found = (a.left[v, n, g].to(K.dtype).flatten(0, 1) @ left.T).view(-1, T, U, M, S)
                K[v, n] += found.mul_(inner).sum((1, 4)) if T * S > 1 else found.mul_(inner)[:, 0, ..., 0]


def _output_by_output(K: Tensor, a: Products, b: Products, w: Tensor, shift: Tensor | None) -> None:
    """Any W, [G p q]; `shift` [p] that of the bias."""
    (_, N, G, T, p), (U, M, _, S, _), q = a.left.shape, b.left.shape, w.shape[2]
    step = PIECES.count(max(U * M * S, q) * K.element_size(), device=K.device)
    for g in range(G):
        inputs, other = a.inputs()[:, g].to(K.dtype), b.inputs()[:, g].to(K.dtype).flatten(0, 1)  # [M S q]
        left, right = a.left[:, :, g].to(K.dtype), b.left[:, :, g].to(K.dtype).flatten(1, 2)  # [V N T p], [U M S p]
        for some in (slice(start, start + step) for start in range(0, p, step)):
            mine, its, weights = left[..., some].contiguous(), right[..., some].contiguous(), w[g, some]
            added = None if shift is None else shift[some]
            for n in range(N):
                for t in range(T):
                    factor = (weights * inputs[n, t]).T
                    inner = other @ factor if added is None else torch.addmm(added, other, factor)  # [M S p]
                    found = ((its * inner).flatten(0, 1) @ mine[:, n, t].T).T  # [V, U M S]
                    K[:, n] += found.reshape(-1, U, M, S).sum(3)


def _of_vectors(K: Tensor, a: Outer, b: Outer, w: Tensor) -> None:
    U, M = b.left.shape[:2]
    other = b.left.to(K.dtype).view(U * M, -1).T
    for v in range(len(a.left)):
        K[v] += ((a.left[v].to(K.dtype).view(-1, len(w)) * w) @ other).view(-1, U, M)


def _row_by_row(K: Tensor, a: Outer, b: Outer, w: Tensor, memory: int | None) -> None:
    """With all outer products formed, some of them at a time."""
    for m, its in b.pieces(memory, ROWS):
        right = its.reshape(-1, len(w))
        for n, mine in a.pieces(memory, ROWS):
            left = mine.reshape(-1, len(w))
            found = K.new_zeros(len(left), len(right))
            for at in (slice(start, start + COLUMNS) for start in range(0, len(w), COLUMNS)):
                found.addmm_(left[:, at].to(K.dtype) * w[at], right[:, at].to(K.dtype).T)
            K[:, n, :, m] += found.view(len(mine), -1, *its.shape[:2])
