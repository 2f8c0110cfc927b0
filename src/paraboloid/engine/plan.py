"""What pulls from one output need, what it is remembered by, and the checks of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.engine.per_sample import Part
from paraboloid.engine.recorder import CONTAINERS, Call, tensors
from paraboloid.engine.sample_independence import Layouts, vanishing
from paraboloid.layers.normalization import uses_batch_statistics
from paraboloid.passes.modes import largest_entry, rounding
from paraboloid.reductions.outer import Outer


class Reach(NamedTuple):
    """What some path from the output reaches: recorded calls; parameters not through a call's weights; and at all."""

    calls: list[Call]
    missed: set[str]
    found: set[str]


@dataclass
class Plan:
    """What a pull from output f needs, worked out once per recorded graph.

    apart: rows of the calls belong to several samples, so each sample is pulled back by itself, through all rows.
    """

    calls: list[Call]
    layouts: Layouts
    parts: list[list[Part] | None]  # per call; None: nothing flows back to it
    missed: set[str]
    apart: bool = False


def signature_of(f: Tensor, calls: Sequence[Call], candidates: Sequence[Call], mixed: bool) -> int:
    """What a recorded sequence of calls and shapes is remembered by."""
    seen: list[Any] = [f.shape, f.dtype, mixed]
    for call in (*calls, *candidates) if candidates else calls:
        seen += (call.op, call.shape)
        for part in (*call.args, *call.kwargs.values()) if call.kwargs else call.args:
            if isinstance(part, Tensor):
                seen.append(part.shape)
            elif isinstance(part, CONTAINERS) and part:
                seen += [t.shape for t in tensors(part)]
    return hash(tuple(seen))


def refuse_batch_statistics(calls: Sequence[Call], layouts: Layouts, where: Callable[[Call], str]) -> None:
    """Raise ValueError for batch norm in training mode."""
    for call, layout in zip(calls, layouts, strict=True):
        if call.op is F.batch_norm and layout is not None and uses_batch_statistics(call.args, call.kwargs):
            raise ValueError(
                f"{where(call)} ran in training mode on an input {tuple(call.args[0].shape)}: its batch "
                "statistics mix the samples, so there are no per-sample gradients. Call model.eval() first, or "
                "replace it by GroupNorm; the gradient and Kronecker factors alone are possible as it is."
            )


@torch.no_grad()
def check_totals(
    f: Tensor, plan: Plan, parameters: Mapping[str, Tensor], outers: Mapping[str, list[Outer]],
    names: Sequence[Collection[str]], gs: Sequence[Tensor | None], truth: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """The recorded calls must add up to autograd's own gradient: catches a wrong rule and a random fallback.

    `outers` come from the gradients `gs` at the calls, whose weights are computed from the parameters in `names`.
    """
    size = dict.fromkeys(parameters, 0.0)  # of what is summed: where it cancels, only rounding errors are left
    dtypes = {f.dtype}
    for called, g in zip(names, gs, strict=True):
        if g is not None:
            dtypes.add(g.dtype)
            length = torch.linalg.vector_norm(g, 1).item()
            for name in called:
                size[name] += length
    least = max([rounding(dtype, f.device) for dtype in dtypes])
    for (name, p), g in zip(parameters.items(), truth, strict=True):
        if name in plan.missed or g is None:
            continue
        total = torch.zeros_like(p)
        for o in outers[name]:
            total = total + o.total()[0]
        eps = least if g.dtype in dtypes else max(least, rounding(g.dtype, f.device))
        error, scale = largest_entry(total - g).item(), largest_entry(g).item()
        if not math.isfinite(scale):
            raise ValueError(f"the gradient of an output with respect to the parameter {name!r} holds NaN or infinity; "
                             "expected finite ones. Check the inputs and the parameters.")  # fmt: skip
        if not error <= eps**0.6 * scale + eps**0.9 * size[name] + vanishing(g.dtype):
            raise RuntimeError(
                f"parameter {name!r}: the recorded calls add up to a gradient that differs from autograd's by "
                f"{error:.3g} (largest entry {scale:.3g}): a layer's rule is wrong, or a call is random. Please "
                "report it; until then freeze this parameter with requires_grad_(False)."
            )
