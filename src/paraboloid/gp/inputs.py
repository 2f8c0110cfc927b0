"""Inputs and targets as every room of Gaussian processes takes them: checked, of one dtype, on one device."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraboloid.gp.kernel import Kernel


def inputs_of(x: Any, like: Tensor | None = None, name: str = "x") -> Tensor:
    """x as [N, d] of a floating-point type (that of `like`); a vector [N] is N inputs of one dimension.

    Raises ValueError for another shape, for no inputs, NaN or infinity, another device or another d than `like` has.
    """
    x = numbers(name, x)
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
    y = numbers("y", y)
    if y.is_complex() or y.dim() not in (1, 2) or len(y) != len(x) or not y.numel():
        raise ValueError(f"y has shape {tuple(y.shape)} and dtype {y.dtype}; expected real targets [{len(x)}] or "
                         f"[{len(x)}, C]: one for each of the {len(x)} inputs.")  # fmt: skip
    if y.device != x.device:
        raise ValueError(f"x is on {x.device} and y on {y.device}; expected one device.")
    dtype = torch.promote_types(x.dtype, y.dtype) if y.is_floating_point() else x.dtype
    x, y = x.to(dtype), y.to(dtype)
    _check_finite("y", y)
    if not math.isfinite(float(y.norm())):
        raise ValueError(f"y reaches {float(y.abs().max()):.3g}, whose square overflows in {dtype}; expected targets "
                         "of moderate size: divide them by their scale.")  # fmt: skip
    return x, y


def noise_of(noise_variance: Any, x: Tensor) -> Tensor:
    """A number, or one for each input [N]; ValueError unless finite and not negative."""
    if not isinstance(noise_variance, Tensor):  # a float32 0.1 would be another number
        noise_variance = np.asarray(noise_variance)
    noise_variance = numbers("noise_variance", noise_variance, x.device)
    if noise_variance.is_complex():
        raise ValueError(f"noise_variance is {noise_variance.tolist()}; expected variances of at least 0.")
    noise = noise_variance.detach().to(x)
    if noise.numel() == 1:
        noise = noise.reshape(())
    if noise.dim() > 1 or (noise.dim() == 1 and len(noise) != len(x)):
        raise ValueError(f"noise_variance has shape {tuple(noise.shape)}; expected a number, or [{len(x)}].")
    least = float(noise.min())
    if not (math.isfinite(float(noise.sum())) and least >= 0):
        raise ValueError(f"noise_variance is {least if noise.dim() == 0 else noise.tolist()}; expected variances of at "
                         "least 0.")  # fmt: skip
    return noise


def numbers(name: str, value: Any, device: torch.device | None = None) -> Tensor:
    """As a tensor without a graph, on the default device or on another one.

    Raises ValueError for what holds no numbers, or rows of different lengths.
    """
    if isinstance(value, Tensor):
        if value.is_meta:
            raise ValueError(f"{name} is on the device 'meta', which holds no numbers; expected a tensor with values.")
        return value.detach()
    try:
        if hasattr(value, "__array__"):  # data frames too; torch takes no reversed arrays, and warns of read-only ones
            value = np.array(value, order="C")
        return torch.as_tensor(value, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{name} is a {type(value).__name__} that is no array of numbers ({str(e).splitlines()[0]}); "
                         "expected a tensor or an array, rows of one length.") from None  # fmt: skip


def check_kernel(kernel: Kernel, x: Tensor) -> None:
    """ValueError where the kernel's dimensions are not the data's, scaled inputs leave the range of their type, or a
    variance k(x, x) is negative or not finite."""
    for part in kernel.points(x, x.mean(0)):
        if not bool(part.isfinite().all()):
            raise ValueError(f"the inputs reach {float(x.abs().max()):.3g}, whose squares in lengthscales of "
                             f"{kernel!r} overflow in {x.dtype}; expected inputs of moderate size: rescale "
                             "them.")  # fmt: skip
    variances = kernel.diagonal(x)
    bad = ~(variances >= 0) | variances.isinf()
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"the kernel {type(kernel).__name__} is {float(variances[first]):.4g} at input {first} with "
                         "itself; expected a positive semi-definite one, whose variances are at least 0.")  # fmt: skip


def _check_finite(name: str, t: Tensor) -> None:
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        bad = ~finite if t.dim() == 1 else ~finite.all(1)
        raise ValueError(f"{name} holds NaN or infinity in {int(bad.sum())} of {len(t)} rows, first in row "
                         f"{int(bad.nonzero()[0])}; expected finite numbers: leave these rows out.")  # fmt: skip
