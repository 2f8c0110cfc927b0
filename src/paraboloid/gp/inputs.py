"""Inputs and targets as every room of Gaussian processes takes them: checked, of one dtype, on one device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def inputs_of(x: Any, like: Tensor | None = None, name: str = "x") -> Tensor:
    """x as [N, d] of a floating-point type (that of `like`); a vector [N] is N inputs of one dimension.

    Raises ValueError for another shape, for no inputs, NaN or infinity, another device or another d than `like` has.
    """
    x = (x if isinstance(x, Tensor) else torch.as_tensor(x)).detach()  # as_tensor moves to a default device
    if x.is_complex() or x.dim() not in (1, 2) or not x.numel():
        raise ValueError(f"{name} has shape {tuple(x.shape)} and dtype {x.dtype}; expected real inputs [N, d], N and d "
                         "at least 1.")  # fmt: skip
    x = x.unsqueeze(1) if x.dim() == 1 else x
    if like is not None:
        if x.device != like.device:
            raise ValueError(f"{name} is on {x.device} and the data on {like.device}; expected one device.")
        if x.shape[1] != like.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} dimensions; expected {like.shape[1]}, as the data has.")
        x = x.to(like.dtype)
    elif not x.is_floating_point() or x.dtype.itemsize < 4:
        x = x.to(torch.get_default_dtype() if x.is_floating_point() else torch.float64)
    _check_finite(name, x)
    return x


def targets_of(y: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x and y [N] or [N, C] in the wider of their types; raises ValueError for other shapes, NaN, or another device."""
    y = (y if isinstance(y, Tensor) else torch.as_tensor(y)).detach()
    if y.is_complex() or y.dim() not in (1, 2) or len(y) != len(x) or not y.numel():
        raise ValueError(f"y has shape {tuple(y.shape)} and dtype {y.dtype}; expected real targets [{len(x)}] or "
                         f"[{len(x)}, C]: one for each of the {len(x)} inputs.")  # fmt: skip
    if y.device != x.device:
        raise ValueError(f"x is on {x.device} and y on {y.device}; expected one device.")
    dtype = torch.promote_types(x.dtype, y.dtype) if y.is_floating_point() else x.dtype
    x, y = x.to(dtype), y.to(dtype)
    _check_finite("y", y)
    return x, y


def noise_of(noise_variance: Any, x: Tensor) -> Tensor:
    """A number, or one for each input [N]; ValueError unless finite and not negative."""
    exactly = None if isinstance(noise_variance, Tensor) else torch.float64  # a float32 0.1 would be another number
    noise = torch.as_tensor(noise_variance, dtype=exactly, device=x.device).detach().to(x)
    if noise.numel() == 1:
        noise = noise.reshape(())
    if noise.dim() > 1 or (noise.dim() == 1 and len(noise) != len(x)):
        raise ValueError(f"noise_variance has shape {tuple(noise.shape)}; expected a number, or [{len(x)}].")
    least = float(noise.min())
    if not (math.isfinite(float(noise.sum())) and least >= 0):
        raise ValueError(f"noise_variance is {least if noise.dim() == 0 else noise.tolist()}; expected variances of at "
                         "least 0.")  # fmt: skip
    return noise


def _check_finite(name: str, t: Tensor) -> None:
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        bad = ~finite if t.dim() == 1 else ~finite.all(1)
        raise ValueError(f"{name} holds NaN or infinity in {int(bad.sum())} of {len(t)} rows, first in row "
                         f"{int(bad.nonzero()[0])}; expected finite numbers: leave these rows out.")  # fmt: skip
