"""An optimiser in a comparison, with its grid of settings."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Setting = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """family  "first order", "peers" or "ours"
    make    the optimiser, from (model, loss_fn, setting)
    grid    of settings, the likeliest first, so that a part of it covers as much as the same part of another
    calls   how a step is made: "plain" (loss.backward(); step()), "closure" (twice on a batch) or "batch" (step(batch))
    batches how many ordinary batches one of its own has
    needs   a package that it is in
    """

    family: str
    make: Callable[[nn.Module, Any, Setting], Any]
    grid: tuple[Setting, ...]
    calls: str = "plain"
    batches: int = 1
    needs: str | None = None


def missing(name: str, method: Method) -> str | None:
    """Why a method cannot be run here, as a sentence; None where it can."""
    package = method.needs
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{name} was left out: it is in {package}, which is not installed (pip install --no-deps {package})."


def grid(*rates: float, most: int = 9, **others: tuple[Any, ...]) -> tuple[Setting, ...]:
    """Each learning rate with the first of the others, then all of them with the second, and so on."""
    (name, values), *_ = others.items() or [("lr", (None,))]
    found = [{"lr": lr} if value is None else {"lr": lr, name: value} for value in values for lr in rates]
    return tuple(found[:most])


def pairs(name: str, *each: tuple[float, float]) -> tuple[Setting, ...]:
    """(learning rate, value of another option) in the order given."""
    return tuple({"lr": lr, name: value} for lr, value in each)
