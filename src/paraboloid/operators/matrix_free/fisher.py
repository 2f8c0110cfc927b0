"""The Fisher information with sampled labels, and the empirical Fisher."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.operand import check_count
from paraboloid.losses import Loss, LossFunction, Opaque
from paraboloid.operators.matrix_free.jacobian_form import JacobianForm
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.partition import Blocks

STRIDE = 0x9E3779B97F4A7C15  # apart from the seed itself, which masks of dropout are drawn from


class FisherGraph(OutputGraph):
    """The output of one batch with vectors s_v in output space: H_n = sum_v s_v[n] s_v[n]^T, of rank one for each v."""

    def __init__(self, *graph: Any, vectors: list[Tensor]):
        super().__init__(*graph)
        self.vectors = vectors

    def hessian(self, u: Tensor) -> Tensor:
        result = torch.zeros_like(u)
        sample = u.dim() - self.f.dim()
        for s in self.vectors:
            along = (s * u).flatten(sample + 1).sum(-1) if self.f.dim() > 1 else s * u
            result += s * along.view(along.shape + (1,) * (self.f.dim() - 1))
        return result

    def root(self) -> Iterator[Tensor]:
        return iter(self.vectors)

    def root_columns(self) -> int:
        return len(self.vectors)


def sampled(f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int, *, samples: int, seed: int):
    """The graph of a batch with the output gradients at drawn labels, the same for the same seed and index."""
    if isinstance(loss, Opaque):
        raise NotImplementedError(
            "the loss is a plain callable, which does not say how to draw labels from the model's predictive "
            "distribution; expected a torch loss module that paraboloid knows, or a pb.Loss with a `sample_targets` "
            "method. pb.GGN and pb.EmpiricalFisher need no drawn labels."
        )
    generator = torch.Generator(f.device).manual_seed((seed + (index + 1) * STRIDE) % 2**63)
    vectors = list(loss.sampled_gradients(f.detach(), y, samples, generator))
    return FisherGraph(f, y, loss, parameters, index, vectors=vectors)


def observed(f: Tensor, y: Any, loss: Loss, parameters: list[Tensor], index: int):
    """The graph of a batch with the output gradients at its own targets, times the root of what their squares lack."""
    if isinstance(loss, Opaque):
        g, factor = loss.sample_gradients(f, y)
    else:
        g, factor = loss.gradient(f.detach(), y), 1.0
    return FisherGraph(f, y, loss, parameters, index, vectors=[factor**0.5 * g])


class Fisher(JacobianForm):
    """The Fisher information, its expectation over labels replaced by a mean over `samples` drawn ones.

        F = a sum_n 1/S sum_s g_ns g_ns^T

    with g_ns the gradient of the unreduced loss of sample n at label s, drawn from the distribution that the output
    stands for, and a the reduction's factor.  The labels are drawn once and follow `seed`: repeated products are those
    of one matrix, of rank N S at most.  Its mean over seeds is the GGN (for a learned variance the Fisher information).

    Arguments, `blocks` and cost are those of `pb.GGN`.  Where graphs are not kept the labels are drawn again on each
    pass, so the samples must come in the same order; RuntimeError is raised if they do not.  NotImplementedError for a
    loss that cannot draw labels.  Source: Martens 2020, arXiv:1412.1193, section 9.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        *,
        samples: int = 1,
        blocks: Blocks = "all",
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
    ):
        graph = partial(sampled, samples=check_count("samples", samples), seed=seed)
        self._record(
            graph, model, loss_fn, data, blocks, output=output, seed=seed, max_memory=max_memory, ordered=True
        )  # fmt: skip


class EmpiricalFisher(JacobianForm):
    """The uncentred second moment of the gradients: a sum_n g_n g_n^T, with g_n that of the unreduced loss of sample n.

    a is the reduction's factor.  It is neither the Fisher information nor the GGN, for it takes the targets of the data
    (Kunstner, Balles and Hennig 2019, arXiv:1905.12558).  Arguments, `blocks` and cost are those of `pb.GGN`.

    A plain callable is a loss here if it is a sum or a mean over samples; ValueError if it is neither.
    """

    graph = staticmethod(observed)
