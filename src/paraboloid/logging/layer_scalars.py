"""A few numbers for each layer and quantity, as a logger takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kronecker import Kron
from paraboloid.linalg.operand import check_choice
from paraboloid.noise import moments
from paraboloid.noise.noise_scale import parts
from paraboloid.passes.parameter_layers import layers_of
from paraboloid.quantities.result import TOTALS, Statistics

PER = ("parameter", "layer", "model")


def scalars(stats: Statistics, *, per: str = "layer") -> dict[str, float]:
    """`quantity/layer/number` -> value, for the quantities in `stats` and the loss.

    per: "parameter", "layer" (the parameters of one module together) or "model" (all of them); the numbers of the whole
    model are always there, as `quantity/number`.

    mean, norm       of a value's entries: average and Euclidean norm.  Of a Kronecker block: of its diagonal and of the
                     whole block, never formed
    mean, max        of ||g_n||^2 over the samples ("square_norms")
    noise_to_signal  where "variance" and "grad" are both there: how often the gradient's noise in one sample outweighs
                     what the samples have in common; a batch of B averages it down to 1/B.  It is the `noise_scale` of
                     `pb.noise.measures`, and NaN where that is None: these samples do not tell the gradient from its
                     noise

    With `all_reduce`, numbers of per-sample quantities are those of this rank.
    """
    check_choice("per", per, PER)
    found: dict[str, Tensor] = {"loss": stats.loss}
    for name in stats:
        for group, members in _groups(stats[name], per).items():
            values = [stats[name][k] for k in members]
            for number, value in _numbers(name, values).items():
                found["/".join(part for part in (name, group, number) if part)] = value
    if "variance" in stats and "grad" in stats:
        N, mean, squares = moments.of(stats)
        for group, members in _groups(mean, per).items():
            noise, _, signal = parts([mean[k] for k in members], [squares[k] for k in members], N)
            ratio = torch.where(signal > 0, noise / signal, torch.nan)
            found["/".join(part for part in ("noise_to_signal", group) if part)] = ratio
    return dict(zip(found, torch.stack([v.double() for v in found.values()]).tolist(), strict=True))


def _groups(values: dict[str, Any], per: str) -> dict[str, list[str]]:
    """Names of the parameters behind each group of numbers; "" is the whole model."""
    groups: dict[str, list[str]] = {}
    if per == "layer":
        groups = layers_of(values)
        groups.pop(" + ".join(values), None)  # a model that is one layer itself
    elif per == "parameter":
        groups = {name: [name] for name in values}
    return groups | {"": list(values)}


def _numbers(name: str, values: list[Any]) -> dict[str, Tensor]:
    if name in TOTALS:
        whole = torch.stack([v.double() for v in values]).sum(0)
        if name == "square_norms":
            return {"mean": whole.mean(), "max": whole.max()}
        values = [whole]
    count, total, squares = zip(*map(_moments, values), strict=True)
    return {"mean": torch.stack(total).sum() / sum(count), "norm": torch.stack(squares).sum().sqrt()}


def _moments(value: Any) -> tuple[int, Tensor, Tensor]:
    """Number of entries, their sum, sum of squares; of a Kronecker block: its dimension, trace, squared norm."""
    if not isinstance(value, Kron):
        value = value.double()
        return value.numel(), value.sum(), value.square().sum()
    value = value.to(torch.float64)
    return value.size, value.trace(), value.frobenius_norm().square()
