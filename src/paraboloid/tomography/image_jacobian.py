"""The Jacobian of a reconstructed image in the weights of the network's convolutions: products, and all of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.posteriors.prediction.jacobian import pull_outputs, recorded
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
        self.fit, self.input, self.max_memory = fit, fit.input.to(dtype), max_memory
        parameters = dict(self.model.named_parameters())
        self.weights = [parameters[name].detach() for name in self.names]
        self.pixels = fit.image.numel()

    @cached_property
    def replay(self) -> Replay:
        """Of the products; made when one is asked for."""
        batch = (self.input, self.fit.sinogram.to(self.input.dtype).unsqueeze(0))
        return Replay(self.model, self.fit.loss, batch, OutputGraph, max_memory=self.max_memory)

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
            by_name = dict(zip(self.replay.parameters, found, strict=True))
            return [by_name[name] for name in self.names]

    def rows(self) -> list[Tensor]:
        """All of J, [n, kernels, k^2] of each weight."""
        with recorded(self.model, self.names, self.input, None) as (tape, f):
            J = pull_outputs(tape, f)
        found = []
        with torch.no_grad():
            for name, w in zip(self.names, self.weights, strict=True):
                (rows,) = J.uses[name].rows(None)
                found.append(rows.reshape(self.pixels, -1, w[0, 0].numel()))
        return found


def linear_residual(fit: Reconstruction, at_weights: Tensor) -> Tensor:
    """r = y - A x + A J w, of the sinogram's shape and J w's precision, from J w at the trained weights, [n]."""
    gone = (at_weights - fit.image.to(at_weights).flatten()).view_as(fit.image)
    return fit.sinogram.to(gone) + fit.A @ gone
