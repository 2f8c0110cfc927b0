"""What deviations of the weights do to the outputs of the linearised model: J d, never the Jacobian."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Inputs, Output
from paraboloid.data.cutting import Cuts
from paraboloid.operators.matrix_free.batching import Batching
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.replay import Footprint, differentiated_twice
from paraboloid.operators.matrix_free.second_order_passes import Autocast
from paraboloid.operators.matrix_free.tangent_convolutions import convolutions_for
from paraboloid.operators.vectors import split
from paraboloid.passes import trees
from paraboloid.passes.memory import JACOBIANS
from paraboloid.passes.random_state import seeded
from paraboloid.passes.wrappers import innermost
from paraboloid.posteriors.weights import only

PROBE = 8  # samples of the first chunk, which tells what a sample takes


def tangent_outputs(
    model: nn.Module, names: list[str], inputs: Inputs, output: Output | None, rows: Tensor, max_memory: int | None,
    cuts: Cuts | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(f [n, *shape], J d [K, n, *shape]) of each chunk of inputs, for the K deviations d of a [K, D] tensor.

    The Jacobian is that of the parameters `names`, in their order.  About one gradient for each deviation.
    """
    model = innermost(model)
    start, size, flops, batching = 0, 0, 0, None
    cut = (Cuts() if cuts is None else cuts).of(model, inputs, output)
    N = cut.samples
    if N == 0:  # of one sample of zeros, none
        one = trees.mapped(lambda t: t.new_zeros(1, *t.shape[1:]), inputs)
        for f, found in tangent_outputs(model, names, one, output, rows, max_memory):
            yield f[:0], found[:, :0]
        return
    with only(model, names):
        parameters: list[Any] = list(trees.parameters(model).values())
        autocast, inside = Autocast(parameters[0].device), convolutions_for(parameters)
        limit = JACOBIANS.of(max_memory, parameters[0].device)
        while start < N:
            step = max(1, limit // size) if size else min(PROBE, N)
            piece = cut.take(inputs, slice(start, start + step)) if cut.possible else inputs
            with differentiated_twice(model, autocast, inside), seeded(0, parameters[0].device):
                with Footprint(parameters) as footprint:
                    f = batch_data.call(model, piece, output)
                    flops = footprint.flops
                    footprint.counts = False
                    without_loss: Any = None
                    f = f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
                    graph = OutputGraph(f, None, without_loss, parameters)
                    graph.prepare()
                    graph.check_cut()  # a backward pass that cannot be differentiated: the rows of J then
                size = max(size, footprint.bytes_kept() // len(f), 1)
                if batching is None:
                    batching = Batching(parameters[0], flops, footprint.bytes_kept(), limit)
                found = _pushed(graph, rows, batching)
            yield graph.f.detach(), found
            start += len(f)
            del graph, f, found


def _pushed(graph: OutputGraph, rows: Tensor, batching: Batching) -> Tensor:
    together = batching.together(split(rows, graph.parameters), lambda v: [graph.push(v)])
    if together is not None:
        return together[0].detach()
    return torch.stack([graph.push(split(row, graph.parameters)).detach() for row in rows])
