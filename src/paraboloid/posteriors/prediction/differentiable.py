"""The linearised outputs' moments as functions of the inputs, for gradients with respect to them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Inputs, Output
from paraboloid.engine.twice_differentiable import twice_differentiable
from paraboloid.graph.custom_functions import check_twice
from paraboloid.passes import trees
from paraboloid.passes.autograd_walks import nodes
from paraboloid.passes.random_state import isolated
from paraboloid.passes.tensor_hooks import unhooked
from paraboloid.passes.wrappers import innermost
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.weights import only


def moments(
    model: Any, names: Sequence[str], x: Inputs, output: Output | None, precision: Precision
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean f(x) [N, *shape] and covariance J Sigma J^T [N, K, K], through which gradients flow to the inputs.

    One backward pass for each of the N K outputs, each of which keeps its graph: for the few inputs that an optimiser
    of inputs looks at.  Raises RuntimeError for a custom function whose backward pass cannot be differentiated.
    """
    model = innermost(model)
    device = next(iter(trees.parameters(model).values())).device
    with ExitStack() as stack:
        for context in (only(model, names), isolated(model, device, 0), torch.inference_mode(False)):
            stack.enter_context(context)
        for context in (torch.enable_grad(), twice_differentiable()):
            stack.enter_context(context)
        parameters = trees.parameters(model)
        stack.enter_context(unhooked(parameters.values()))
        f = batch_data.call(model, x, output)
        check_twice(nodes(f), "predict(differentiable=True)")
        leaves = list(parameters.values())
        rows = torch.stack([_row(element, leaves) for element in f.flatten()])  # [N K, D]
        found = precision.apply(rows).view(len(f), -1, rows.shape[1])
        return f, found @ rows.view_as(found).mT


def _row(element: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    grads = torch.autograd.grad(element, leaves, create_graph=True, retain_graph=True, allow_unused=True)
    return torch.cat([
        torch.zeros(p.numel(), dtype=p.dtype, device=p.device) if g is None else g.flatten()
        for g, p in zip(grads, leaves, strict=True)
    ])  # fmt: skip
