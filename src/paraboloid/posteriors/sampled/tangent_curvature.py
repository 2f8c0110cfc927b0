"""sum_n J_n^T H_n J_n as posterior samples need it: with cheap J v of large networks, and the same on every pass."""

from __future__ import annotations

from typing import Any

from paraboloid.data.batches import Data, Output
from paraboloid.losses import Loss
from paraboloid.operators.matrix_free.jacobian_form import GGN
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.tangent_convolutions import convolutions_for
from paraboloid.passes import trees


class TangentCurvature(GGN):
    """The GGN of a loss over graphs that are differentiated by J^T, then J.

    ordered: every pass must see the samples in the order of the first one.
    """

    def __init__(
        self, model: Any, loss: Loss, data: Data, *, ordered: bool = False,
        output: Output | None = None, max_memory: int | None = None,
    ):  # fmt: skip
        self._record(
            OutputGraph, model, loss, data, "all", output=output, max_memory=max_memory,
            ordered=ordered, inside=convolutions_for(trees.parameters(model).values()),
        )  # fmt: skip
        self.root.after(10**9)  # made now or never: what a product rounds to must not depend on those before
        self.starts = [0]  # of kept graphs, the number of each one's first sample, and of them all
        for graph in self.replay.kept or []:
            self.starts.append(self.starts[-1] + len(graph.f))
        with self.replay.graphs() as graphs:
            self.target = tuple(next(iter(graphs)).y.shape[1:])  # of a sample
