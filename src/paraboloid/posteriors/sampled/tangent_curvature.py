"""sum_n J_n^T H_n J_n as posterior samples need it: with cheap J v of large networks, and the same on every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import Data, Output
from paraboloid.losses import Loss
from paraboloid.operators.matrix_free.jacobian_form import GGN
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.tangent_convolutions import convolutions_for
from paraboloid.passes import trees

ROUNDED = 1e-5  # of a mark and their median, below which two are the same: they are in the model's type


class TangentCurvature(GGN):
    """The GGN of a loss over graphs that are differentiated by J^T, then J.

    ordered: every pass must see the samples in the order of the first one.
    """

    def __init__(
        self, model: Any, loss: Loss, data: Data, *, ordered: bool = False,
        output: Output | None = None, max_memory: int | None = None,
    ):  # fmt: skip
        marks = self.marks = list[Tensor]()  # of each batch

        def marked(f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int) -> OutputGraph:
            if index == len(marks):
                marks.append(marks_of(loss, f, y))
            return OutputGraph(f, y, loss, parameters, index)

        self._record(
            marked, model, loss, data, "all", output=output, max_memory=max_memory,
            ordered=ordered, inside=convolutions_for(trees.parameters(model).values()),
        )  # fmt: skip
        self.root.after(10**9)  # made now or never: what a product rounds to must not depend on those before
        self.starts = [0]  # of kept graphs, the number of each one's first sample, and of them all
        for graph in self.replay.kept or []:
            self.starts.append(self.starts[-1] + len(graph.f))
        self.target: tuple[int, ...] = ()  # the shape of a sample's
        with self.replay.graphs() as graphs:
            for graph in graphs:  # those that are not kept have not all been made, and marked, yet
                self.target = tuple(graph.y.shape[1:])

    @property
    def order(self) -> Tensor:
        """The marks of all data points in the order of every pass that a process can repeat, [N]."""
        return torch.cat(self.marks)


@torch.no_grad()
def marks_of(loss: Loss, f: Tensor, y: Any) -> Tensor:
    """A number for each data point, [n] in float64, by which it is known again: its loss and a sum over its outputs."""
    f = f.detach()
    flat = f.reshape(len(f), -1).double()
    ramp = torch.linspace(1, 2, flat.shape[1], dtype=flat.dtype, device=flat.device)
    return (loss.sample_losses(f, y).double().reshape(len(f), -1).sum(1) + flat @ ramp).cpu()


def displaced(marks: Tensor, others: Tensor) -> int | None:
    """The first data point whose mark is another one; None where all are the same, up to rounding."""
    size = others.abs()
    off = (marks - others).abs() > ROUNDED * (size + size.median())
    return int(off.nonzero()[0]) if off.any() else None


def same_in_another_order(marks: Tensor, others: Tensor) -> bool:
    return displaced(marks.sort().values, others.sort().values) is None
