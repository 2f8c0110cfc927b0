"""How good predictions are: likelihood, calibration, coverage, and telling what was not seen apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

BINS = 15
LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[dict[str, Any]]:
    """Mean confidence and share of right predictions in bins of equal width, those that hold any."""
    place = (confidence * bins).ceil().clamp(1, bins) - 1
    found = []
    for b in range(bins):
        inside = place == b
        if (count := int(inside.sum())) > 0:
            found.append({
                "count": count, "confidence": confidence[inside].mean().item(),
                "accuracy": right[inside].double().mean().item(),
            })  # fmt: skip
    return found


def calibration_error(rows: list[dict[str, Any]]) -> float:
    """ECE = sum over bins of their share times |accuracy - confidence|.  Source: Naeini et al. 2015."""
    total = sum(row["count"] for row in rows)
    return sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total


def of_classes(p: Tensor, y: Tensor, ignored: int = -100) -> dict[str, Any]:
    """Of class probabilities [N, C, ...] and indices [N, ...]; ignored positions left out."""
    flat = p.movedim(1, -1).reshape(-1, p.shape[1]).double()
    kept = y.flatten() != ignored
    flat, y = flat[kept], y.flatten()[kept]
    confidence, chosen = flat.max(1)
    rows = reliability(confidence, chosen == y)
    chance = flat.gather(1, y.unsqueeze(1)).clamp(min=torch.finfo(torch.float32).tiny)
    return {
        "nll": -chance.log().mean().item(), "accuracy": (chosen == y).double().mean().item(),
        "ece": calibration_error(rows), "bins": rows, "count": len(y),
    }  # fmt: skip


def of_bernoullis(p: Tensor, y: Tensor) -> dict[str, Any]:
    """Of probabilities and targets in [0, 1] of one shape; a target of .3 is right to .3 of what is above one half."""
    p, y = p.flatten().double(), y.flatten().double()
    tiny = torch.finfo(torch.float32).tiny
    nll = -(y * p.clamp(min=tiny).log() + (1 - y) * (1 - p).clamp(min=tiny).log()).mean().item()
    confidence = torch.maximum(p, 1 - p)
    right = torch.where(p >= 0.5, y, 1 - y)
    rows = reliability(confidence, right)
    return {
        "nll": nll, "accuracy": right.mean().item(), "ece": calibration_error(rows), "bins": rows, "count": len(y)
    }  # fmt: skip


def of_gaussians(mean: Tensor, variance: Tensor, y: Tensor) -> dict[str, Any]:
    """Of normal predictions: negative log-likelihood of an element, and how many lie inside central intervals."""
    mean, variance, y = mean.flatten().double(), variance.flatten().double(), y.flatten().double()
    error = (y - mean).square()
    nll = ((2 * math.pi * variance).log() + error / variance).mean().item() / 2
    inside = torch.erf((error / variance).sqrt() / math.sqrt(2))  # the smallest central interval that holds y
    return {
        "nll": nll, "rmse": error.mean().sqrt().item(), "count": len(y),
        "coverage": [{"level": level, "covered": (inside <= level).double().mean().item()} for level in LEVELS],
    }  # fmt: skip


def area(usual: Tensor, unusual: Tensor) -> float:
    """P(score of an unusual input > score of a usual one), ties counting half: the area under the ROC curve."""
    usual, order = usual.double().flatten(), unusual.double().flatten()
    ordered = usual.sort().values
    below = torch.searchsorted(ordered, order, right=False)
    not_above = torch.searchsorted(ordered, order, right=True)
    return ((below + not_above).double().mean() / 2 / len(usual)).item()
