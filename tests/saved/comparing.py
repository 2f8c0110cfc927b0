"""Results as plain data that a file holds, and comparing them with those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import paraboloid as pb

EXACT = (bool, int, str, type(None))
Tolerances = Mapping[torch.dtype | type[float], float]


def tolerances(name: str, double: float = 1e-9, single: float = 1e-5) -> Tolerances:
    """Of the largest entry, for a case of this name: numbers come back up to the rounding of other processors."""
    return {torch.float64: double, torch.float32: single, float: single if "float32" in name else double}


def plain(value: Any) -> Any:
    """Dicts, lists, tensors, numbers and strings, which torch.load takes without running code."""
    if isinstance(value, pb.Kron):
        return {"left": value.left, "right": value.right}
    if isinstance(value, pb.operators.Estimate):
        return [float(value), float(value.standard_error)]
    if isinstance(value, pb.operators.TensorEstimate):
        return [plain(value.as_subclass(Tensor)), value.standard_error]
    if isinstance(value, pb.posteriors.Prediction):
        return {"mean": value.mean, "model": value.model_variance, "noise": value.noise_variance}
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def check_close(found: Any, expected: Any, within: Tolerances, at: str = "") -> None:
    """AssertionError where plain data differ, with the place; what is in `found` alone is passed over."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            check_close(found[key], value, within, f"{at}[{key!r}]")
    elif isinstance(expected, list):
        assert len(found) == len(expected), f"{at} has {len(found)} entries; expected {len(expected)}."
        for i, value in enumerate(expected):
            check_close(found[i], value, within, f"{at}[{i}]")
    elif isinstance(expected, EXACT) or (isinstance(expected, Tensor) and not expected.is_floating_point()):
        same = torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected
        assert same, f"{at} is {found}; expected {expected}."
    else:
        tolerance = within[expected.dtype if isinstance(expected, Tensor) else float]
        found, expected = (
            t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64) for t in (found, expected)
        )
        finite = expected[expected.isfinite()].abs()
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance * float(finite.max() if finite.numel() else 1),
            equal_nan=True, msg=lambda message: f"{at}: {message}",
        )  # fmt: skip
