"""Two tensors that must be equal: where they are not, which entry, by how much, and what it looks like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kronecker import Kron

RTOL = 1e-8  # of the largest entry, in float64


def check_equal(found: Tensor, expected: Tensor, what: str, by: str = "autograd", rtol: float = RTOL) -> None:
    """Raise AssertionError, beginning with `what`, unless all entries agree within rtol times the largest."""
    if found.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(found.shape)}; expected {list(expected.shape)} by {by}.")
    found, expected = found.detach().double(), expected.detach().double()
    if not expected.numel():
        return
    scale = float(expected.abs().max())
    off = (found - expected).abs()
    wrong = ~(off <= rtol * scale + 1e-12)  # of NaN too
    if not wrong.any():
        return
    at = tuple(int(i) for i in torch.unravel_index(off.nan_to_num(torch.inf).argmax(), off.shape))
    size = abs(float(expected[at]))
    relative = f", {float(off[at]) / size:.2%}" if size else ""
    raise AssertionError(
        f"{what}: entry {list(at)} is {float(found[at]):.8g}, expected {float(expected[at]):.8g} by {by}: off by "
        f"{float(off[at]):.3g}{relative}; {int(wrong.sum())} of {wrong.numel()} entries differ."
        f"{_likeness(found, expected)}"
    )


def check_trees(found: Any, expected: Any, what: str, by: str) -> None:
    """`check_equal` for the tensors of two results of one structure (dicts, tuples, Kronecker blocks)."""
    one, other = leaves(found), leaves(expected)
    if list(one) != list(other):
        raise AssertionError(f"{what} is made of the tensors {list(one)}; expected {list(other)} by {by}.")
    for path, t in one.items():
        check_equal(t, other[path], what + path, by)


def leaves(value: Any) -> dict[str, Tensor]:
    """The tensors of a result, by their paths."""
    if isinstance(value, Tensor):
        return {"": value}
    if isinstance(value, Kron):
        value = {"left": value.left, "right": value.right}
    elif isinstance(value, tuple | list):
        value = {f"[{i}]": v for i, v in enumerate(value)}
    elif is_dataclass(value):
        value = vars(value)
    children = value.items() if isinstance(value, Mapping) else ()
    return {
        (k if str(k)[:1] in ("", "[", ".") else f".{k}") + path: t for k, v in children for path, t in leaves(v).items()
    }


def _likeness(found: Tensor, expected: Tensor) -> str:
    """What a wrong tensor is in terms of the right one, if it is something simple."""

    def near(a: Tensor, b: Tensor) -> bool:
        return bool((a - b).abs().max() <= 1e-6 * b.abs().max())

    if not found.any():
        return " Everything found is zero."
    ratio = float((found * expected).sum() / expected.square().sum()) if expected.any() else 1.0
    if near(found, ratio * expected):
        return f" Everywhere {ratio:.6g} times the expected: a factor is missing, or there is one too many."
    if found.dim() > 1 and found.shape[-1] == found.shape[-2] and near(found.mT, expected):
        return " It is the transpose: `flip` says that a weight is stored as q x p."
    if found.dim() > 1 and near(found.sum(0), expected.sum(0)):
        return " The sums over the first axis agree: what belongs to one of its entries is counted in another."
    return ""
