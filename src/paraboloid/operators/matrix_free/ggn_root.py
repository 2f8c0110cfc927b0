"""A square root of the GGN, one row for each sample and column of the loss's root: worth its memory where weights are
used at many positions, so that a row is cheaper to multiply with than the model is to run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from paraboloid.losses import NoTargets
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.quantities.curvature import SqrtGGN
from paraboloid.quantities.quantity import Quantity
from paraboloid.quantities.recording import record


class Root:
    """S [R, D] with S^T S = sum_n J_n^T H_n J_n, made when so many products were asked for that it pays.

    A row costs D multiplications in a product, the model's forward pass `replay.flops`.  Making S takes a backward pass
    for each of the loss's root columns, as many products by the graph would: so long the graph is used.  A model that
    the engine has no rule for, or whose samples are not separate, has no root here.
    """

    def __init__(self, replay: Replay):
        self.replay, self.asked, self.rows = replay, 0, None
        self.columns = self._columns()

    def _columns(self) -> int:
        """Products after which S is made; 0 if it never is."""
        replay = self.replay
        if not replay.kept or replay.loss.reduction == "whole":
            return 0
        try:
            counts = [graph.root_columns() for graph in replay.kept]
        except NotImplementedError:  # a plain callable may couple the samples
            return 0
        rows = sum(count * len(graph.f) for count, graph in zip(counts, replay.kept, strict=True))
        parameters = list(replay.parameters.values())
        size = sum(p.numel() for p in parameters)
        memory = rows * size * max(p.element_size() for p in parameters)
        cheap = 2 * rows * size <= replay.flops and memory <= replay.max_memory - replay.size
        return max(counts) if cheap else 0

    def after(self, products: int) -> Tensor | None:
        """S, or None while the graph is to be used for these products too."""
        self.asked += products
        self.replay.check_unchanged()
        if self.rows is None and 0 < self.columns <= self.asked:
            self.rows = self._make()
            if self.rows is None:
                self.columns = 0
        return self.rows

    def _make(self) -> Tensor | None:
        rows: list[Tensor] = []

        def take(found: list[Tensor]) -> None:
            rows.append(torch.cat([t.reshape(t.shape[0] * t.shape[1], -1) for t in found], 1))

        return torch.cat(rows) if of_roots(self.replay, SqrtGGN(), self.columns, take) else None


def of_roots(replay: Replay, quantity: Quantity, most: int, take: Callable[[list[Tensor]], Any]) -> bool:
    """Hand a quantity of the roots of H_n, one tensor for each parameter, to `take`, batch by batch: unscaled.

    By the engine, from a pass of its own with one backward pass for each column of the root.  False, and what was taken
    is to be thrown away, where the engine declines (samples that are not separate, operations without a rule) or the
    root has more than `most` columns.
    """
    parameters: list[Tensor] = list(replay.parameters.values())
    with warnings.catch_warnings(), suppress(ValueError, NotImplementedError, RuntimeError, Warning):
        warnings.simplefilter("error")  # a warned-of fallback is exact, but slower than the graph
        with replay.recorded(lambda: record(replay.model)) as tapes:
            for index, (tape, f, y) in enumerate(tapes):
                with suppress(NoTargets):  # a batch without targets has no curvature
                    replay.loss.normalizer(f, y)
                    if replay.order is not None and replay.kept is not None:
                        graph: Any = replay.kept[index]  # whose labels were drawn at the first pass
                    else:
                        graph = replay.graph(f, y, replay.loss, parameters, index)
                    if graph.root_columns() > most:
                        return False
                    take(list(tape.of_vectors(f, graph.root(), quantity, replay.max_memory).values()))
        return True
    return False
