"""The Jacobian of a reconstructed image in the weights of the network's convolutions: products, and all of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.posteriors.prediction.jacobian import pull_outputs, recorded
from paraboloid.tomography.kernel_prior import Block
from paraboloid.tomography.reconstruction import Reconstruction


class ImageJacobian:
    """J [n, D] of the n pixels of a fit's image in the D chosen weights, known by products.

    push  J v for v [K, *shape] of each weight: [K, n]
    pull  J^T u for u [K, n]: [K, *shape] of each weight

    dtype is that of the products, by default the fit's.
    """

    def __init__(
        self, fit: Reconstruction, names: Sequence[str], max_memory: int | None = None, dtype: torch.dtype | None = None
    ):
        dtype = fit.input.dtype if dtype is None else dtype
        self.model, self.names = copy.deepcopy(fit.model).to(dtype), list(names)
        for name, p in self.model.named_parameters():
            p.requires_grad_(name in self.names)
        self.input, self.max_memory = fit.input.to(dtype), max_memory
        batch = (self.input, fit.sinogram.to(dtype).unsqueeze(0))
        self.replay = Replay(self.model, fit.loss, batch, OutputGraph, max_memory=max_memory)
        self.order = [list(self.replay.parameters).index(name) for name in self.names]
        self.weights = [self.replay.parameters[name].detach() for name in self.names]
        self.pixels = fit.image.numel()

    def push(self, v: Sequence[Tensor]) -> Tensor:
        with self.replay.graphs() as graphs:
            (graph,) = graphs
            self.replay.certify(graph)
            V = [v[self.names.index(name)] for name in self.replay.parameters]
            found = self.replay.together(graph, V, lambda v: [graph.push(v)])
            rows = found[0] if found else torch.stack([graph.push([t[k] for t in V]) for k in range(len(V[0]))])
            return rows.detach().reshape(-1, self.pixels)

    def pull(self, u: Tensor) -> list[Tensor]:
        with self.replay.graphs() as graphs:
            (graph,) = graphs
            self.replay.certify(graph)
            U = u.reshape(len(u), *graph.f.shape)
            found = self.replay.together(graph, [U], lambda u: graph.pull(u[0]))
            if not found:
                found = [torch.stack(rows) for rows in zip(*(graph.pull(one) for one in U), strict=True)]
            return [found[i] for i in self.order]

    def grams(self, blocks: Sequence[Block]) -> Tensor:
        """J S_br J^T for every block and distance, [R in all, n, n]: J Sigma J^T = sum_br c_br J S_br J^T.

        Each kernel's coordinates are rotated to those that are even or odd under the reflections of its axes, which all
        S_br leave apart: half of the products vanish.
        """
        found = []
        with recorded(self.model, self.names, self.input, None) as (tape, f):
            J = pull_outputs(tape, f)
        with torch.no_grad():
            for block in blocks:
                _, pairs = block.classes()
                q = _reflections(block.size)
                basis = torch.kron(q, q)
                rotated = basis.T @ pairs @ basis  # [R, k^2, k^2]
                total = f.new_zeros(len(pairs), self.pixels, self.pixels)
                for name in block.parameters:
                    (rows,) = J.uses[name].rows(None)
                    turned = rows.reshape(self.pixels, -1, block.size**2) @ basis.to(rows)
                    _add_grams(total, turned.permute(2, 0, 1).contiguous(), rotated.to(rows))
                found.append(total)
        return torch.cat(found)


def _add_grams(total: Tensor, rows: Tensor, weights: Tensor) -> None:
    """total[r] += sum_ab weights[r, a, b] rows[a] rows[b]^T, for symmetric weights that are mostly zero."""
    for a in range(len(rows)):
        for b in range(a, len(rows)):
            among = (weights[:, a, b].abs() > 1e-6).nonzero()[:, 0].tolist()
            if not among:
                continue
            product = rows[a] @ rows[b].T
            for r in among:
                total[r].add_(product, alpha=float(weights[r, a, b]))
                if a != b:
                    total[r].add_(product.T, alpha=float(weights[r, a, b]))


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
