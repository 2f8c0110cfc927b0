"""How good a reconstruction and its uncertainty are, against the true image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

INSIDE = {"50": 0.6744897501960817, "90": 1.6448536269514722}  # standard deviations on each side of an interval


def psnr(x: Tensor, truth: Tensor) -> float:
    """10 log10(range^2 / mean squared error), in dB."""
    spread = truth.max() - truth.min()
    return float(10 * torch.log10(spread.square() / (x - truth).square().mean()))


def density(error: Tensor, std: Tensor, floor: float) -> float:
    """Mean log density per pixel of independent Gaussians, floor added to the standard deviation's square."""
    variance = std.double().square() + floor
    return float(-(variance.log() + error.double().square() / variance + math.log(2 * math.pi)).mean() / 2)


def of(mean: Tensor, std: Tensor, truth: Tensor, floor: float) -> dict[str, Any]:
    """PSNR, log density, coverage of central intervals, and correlation of error and standard deviation."""
    error, wide = (truth - mean).abs(), (std.square() + floor).sqrt()
    pair = torch.stack([error.flatten(), std.flatten()]).double()
    correlation = float(torch.corrcoef(pair)[0, 1]) if bool((pair.std(1) > 0).all()) else 0.0
    inside = {name: float((error <= z * wide).double().mean()) for name, z in INSIDE.items()}
    mse, spread = float(error.square().mean()), float(std.square().mean().sqrt())
    return {"psnr": psnr(mean, truth), "density": density(error, std, floor), "inside": inside,
            "correlation": correlation, "mse": mse, "std": spread}  # fmt: skip


def isotropic(mse: float, others: Sequence[float]) -> float:
    """Log density per pixel of one variance for all pixels: the mean squared error of the other images.

    Without others it is the image's own, the best that one variance can be.
    """
    variance = sum(others) / len(others) if others else mse
    return -(math.log(2 * math.pi * variance) + mse / variance) / 2
