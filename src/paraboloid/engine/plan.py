"""What pulls from one output need, and the check that the recorded calls add up to autograd's own gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from paraboloid.engine.per_sample import Part
from paraboloid.engine.recorder import Call
from paraboloid.engine.sample_independence import Layouts, vanishing
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


def check_totals(
    f: Tensor, plan: Plan, parameters: Mapping[str, Tensor], outers: Mapping[str, list[Outer]],
    names: Sequence[Collection[str]], gs: Sequence[Tensor | None], truth: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """The recorded calls must add up to autograd's own gradient: catches a wrong rule and a random fallback.

    `outers` come from the gradients `gs` at the calls, whose weights are computed from the parameters in `names`.
    """
    size = dict.fromkeys(parameters, 0.0)  # of what is summed: where it cancels, only rounding errors are left
    for called, g in zip(names, gs, strict=True):
        for name in called if g is not None else ():
            size[name] += float(torch.linalg.vector_norm(g, 1))
    for (name, p), g in zip(parameters.items(), truth, strict=True):
        if name in plan.missed or g is None:
            continue
        total = sum((o.total()[0] for o in outers[name]), torch.zeros_like(p))
        dtypes = {g.dtype, f.dtype, *(h.dtype for h in gs if h is not None)}
        eps = max(rounding(dtype, f.device) for dtype in dtypes)
        error, scale = float(largest_entry(total.sub_(g))), float(largest_entry(g))
        if not error <= eps**0.6 * scale + eps**0.9 * size[name] + vanishing(g.dtype):
            raise RuntimeError(
                f"parameter {name!r}: the recorded calls add up to a gradient that differs from autograd's by "
                f"{error:.3g} (largest entry {scale:.3g}): a layer's rule is wrong, or a call is random. Please "
                "report it; until then freeze this parameter with requires_grad_(False)."
            )
