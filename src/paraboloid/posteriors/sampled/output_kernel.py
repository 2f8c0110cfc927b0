"""What the prior alone says of all outputs of the data: their covariance, by the sides of outer products."""

from __future__ import annotations

import warnings
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor

from paraboloid.operators.vectors import split
from paraboloid.passes.memory import RECORDINGS
from paraboloid.posteriors.prediction.jacobian import pull_outputs
from paraboloid.posteriors.sampled.tangent_system import TangentSystem
from paraboloid.quantities.recording import record
from paraboloid.reductions.inner_products import add_inner_products, multiplications
from paraboloid.reductions.outer import Outer


class OutputKernel:
    """K = J S Lambda^-1 S J^T, [Q, Q] in float64, for the Q = N C elements of the outputs of all graphs, sample by
    sample.

    A row of J has as many numbers as there are weights; none is formed where a layer's inputs and gradients take fewer
    multiplications (`reductions.inner_products`), so wide layers cost what their inputs and outputs do.
    """

    def __init__(self, system: TangentSystem, forms: list[dict[str, Outer]]):
        self.system, self.forms = system, forms
        self.graphs = system.replay.kept or []
        self.sizes = [graph.f.numel() for graph in self.graphs]
        self.known: tuple[Tensor, Tensor] | None = None  # precisions over the first one, and K under these

    def at(self, precision: Tensor) -> Tensor:
        """K under Lambda = diag(precision); not to be changed where all precisions are one.

        Formed for precisions whose first is one, so that a run that goes on finds the same numbers.
        """
        relative = precision.double() / precision[0].double()
        if self.known is None or not torch.equal(self.known[0], relative):
            self.known = None
            self.known = relative, self._formed(relative)
        return self.known[1] / precision[0].double()

    @torch.no_grad()
    def _formed(self, precision: Tensor) -> Tensor:
        weights = 1 / precision
        if self.system.scale is not None:
            weights *= self.system.scale.double().square()
        W = dict(zip(self.forms[0], split(weights, self.system.parameters), strict=True))
        starts, Q = [0, *accumulate(self.sizes)], sum(self.sizes)
        found = torch.zeros(Q, Q, dtype=torch.float64, device=precision.device)
        for i, a in enumerate(self.forms):
            rows = slice(starts[i], starts[i + 1])
            for j in range(i, len(self.forms)):
                columns = slice(starts[j], starts[j + 1])
                block = found[rows, columns].unflatten(0, (len(self.graphs[i].f), -1))
                block = block.unflatten(2, (len(self.graphs[j].f), -1)).permute(1, 0, 3, 2)  # [C N C' M]
                add_inner_products(block, a, self.forms[j], W, self.system.replay.max_memory)
                if i < j:
                    found[columns, rows] = found[rows, columns].T
        return found

    def multiplications(self, varied: bool) -> float:
        """That forming K takes; `varied`: with a scale or a precision for each weight."""
        N = sum(len(graph.f) for graph in self.graphs)
        return N**2 / 2 * multiplications(self.forms[0], varied)

    @torch.no_grad()
    def pushed(self, w: Tensor) -> Tensor:
        """J S w, [Q], for w [D]."""
        with self.system.replay.graphs() as graphs:
            return torch.cat([self.system.pushed(graph, w.unsqueeze(0)).flatten() for graph in graphs])

    @torch.no_grad()
    def pulled(self, u: Tensor) -> Tensor:
        """S J^T u, [D], for u [Q]."""
        found = self.system.like.new_zeros(self.system.size)
        with self.system.replay.graphs() as graphs:
            for graph, part in zip(graphs, u.to(found).split(self.sizes), strict=True):
                start = 0
                for t in graph.pull(part.view(graph.f.shape)):
                    found[start : start + t.numel()] += t.flatten()
                    start += t.numel()
        return self.system.deviations(found)


def output_kernel(system: TangentSystem, most: int) -> OutputKernel | None:
    """Of at most so many outputs; None where they are more, where what was recorded of their rows would not fit into
    `max_memory` beside the kept graphs, where an operation has no rule, or where a rule needs the graph of its pass."""
    replay, found = system.replay, list[dict[str, Outer]]()
    assert replay.kept is not None
    if sum(graph.f.numel() for graph in replay.kept) > most:
        return None
    room = RECORDINGS.of(replay.max_memory, least=0) - 2 * replay.size  # the kept graphs, and what is recorded
    with warnings.catch_warnings(), suppress(ValueError, NotImplementedError, RuntimeError, Warning):
        warnings.simplefilter("error")  # a warned-of fallback is exact, but slower than the graph
        with replay.recorded(lambda: record(replay.model)) as tapes:
            for tape, f, _ in tapes:
                room -= f[0].numel() * sum(call.shape.numel() for call in tape.calls) * f.element_size()
                if room < 0:
                    return None
                found.append(pull_outputs(tape, f).uses)
        return OutputKernel(system, found) if all(o.lasting for uses in found for o in uses.values()) else None
    return None


def contracted(K: Tensor, roots: list[Tensor]) -> Tensor:
    """L^T K L, [R, R], for the blocks L_n [n C V] of each graph."""
    for _ in range(2):
        parts = K.split([L.shape[0] * L.shape[1] for L in roots])
        K = torch.cat([
            (L.mT.to(K) @ part.reshape(len(L), -1, K.shape[1])).flatten(0, 1)
            for L, part in zip(roots, parts, strict=True)
        ]).T.contiguous()  # fmt: skip
    return K
