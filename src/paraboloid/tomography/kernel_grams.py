"""Gram matrices of a Jacobian's rows under the prior of kernels, one for each distance between their positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.tomography.kernel_prior import Block

ZERO = 1e-6  # of an entry of the rotated sums of pairs, which are of order 1


def packed_grams(rows: Sequence[Tensor], blocks: Sequence[Block]) -> Tensor:
    """B S_br B^T for every block b and distance r, their lower triangles [R in all, m (m + 1) / 2] of float64.

    rows   B's columns of each weight, [m, kernels, k^2], in the order of `blocks`

    Each kernel's coordinates are rotated to those that are even or odd under the reflections of its axes, which all
    S_br leave apart: most of the products vanish.
    """
    found, at = [], 0
    for block in blocks:
        q = _reflections(block.size)
        basis = torch.kron(q, q)
        mine = torch.cat([*rows[at : at + len(block.parameters)]], 1)
        at += len(block.parameters)
        turned = (mine @ basis.to(mine)).permute(2, 0, 1).contiguous()
        found.append(_weighted(turned, basis.T @ block.classes()[1] @ basis))
    return torch.cat(found)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_ab weights[r, a, b] rows[a] rows[b]^T for symmetric weights [R, k^2, k^2], packed."""
    i, j = torch.tril_indices(rows.shape[1], rows.shape[1], device=rows.device)
    total = torch.zeros(len(weights), len(i), dtype=torch.float64, device=rows.device)
    for a in range(len(rows)):
        for b in range(a, len(rows)):
            w = weights[:, a, b]
            if not bool((w.abs() > ZERO).any()):
                continue
            product = rows[a] @ rows[b].T
            packed = (product[i, j] if a == b else product[i, j] + product[j, i]).double()
            for r in (w.abs() > ZERO).nonzero()[:, 0].tolist():
                total[r].add_(packed, alpha=float(w[r]))
    return total


def unpacked(lower: Tensor) -> Tensor:
    """The symmetric matrix [m, m] of a lower triangle [m (m + 1) / 2]."""
    m = (math.isqrt(8 * len(lower) + 1) - 1) // 2
    i, j = torch.tril_indices(m, m, device=lower.device)
    found = lower.new_empty(m, m)
    found[i, j] = lower
    found[j, i] = lower
    return found


def _reflections(size: int) -> Tensor:
    """An orthogonal basis [k, k] of vectors that are even or odd when reversed, in columns."""
    eye = torch.eye(size, dtype=torch.float64)
    columns = []
    for i in range((size + 1) // 2):
        j = size - 1 - i
        if i == j:
            columns.append(eye[i])
        else:
            columns += [(eye[i] + eye[j]) / 2**0.5, (eye[i] - eye[j]) / 2**0.5]
    return torch.stack(columns, 1)
