"""What is measured: checked at the door, and the noise that it shows by itself."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraboloid.tomography.projector import native

BINOMIAL = (1.0, -4.0, 6.0, -4.0, 1.0)  # fourth differences: what is smooth leaves nothing
NORMAL_MEDIAN = 0.6744897501960817  # of the absolute value of a standard normal number


def as_numbers(name: str, value: Any, axes: str) -> Tensor:
    """A tensor of real numbers, at least one; raises ValueError for anything else."""
    try:
        found = (value if isinstance(value, Tensor) else torch.as_tensor(native(np.asarray(value)))).detach()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"the {name} is a {type(value).__name__} that is no array of numbers "
                         f"({str(e).splitlines()[0]}); expected real numbers, {axes}.") from None  # fmt: skip
    if found.is_complex() or found.numel() == 0 or found.is_meta or found.layout != torch.strided:
        layout = "" if found.layout == torch.strided else f" and layout {found.layout}"
        raise ValueError(f"the {name} has shape {tuple(found.shape)} and dtype {found.dtype}{layout} on "
                         f"{found.device}; expected real numbers, {axes}.")  # fmt: skip
    if found.is_inference():  # autograd refuses to save it
        with torch.inference_mode(False):
            return found.clone()
    return found


def as_sinogram(y: Any) -> Tensor:
    """y as a floating-point tensor; raises ValueError for an empty one, NaN, infinity and complex numbers."""
    found = as_numbers("sinogram", y, "[angles, detectors]")
    if not found.is_floating_point():
        found = found.to(torch.get_default_dtype())
    if bad := int((~found.isfinite()).sum()):
        at = tuple((~found.isfinite()).nonzero()[0].tolist())
        raise ValueError(f"the sinogram holds {bad} numbers that are not finite, the first, {found[at].item()}, at "
                         f"{list(at)}; expected line integrals. Mask or interpolate dead detectors first.")  # fmt: skip
    if found.dtype.itemsize >= 4 and not math.isfinite(float(found.square().sum())):
        raise ValueError(f"the sinogram reaches {float(found.abs().max()):.3g}, whose squares overflow in "
                         f"{found.dtype}; expected numbers of moderate size: divide them by their scale.")  # fmt: skip
    return found


def check_noise_variance(noise_variance: Any) -> None:
    """ValueError unless it is a positive number, or None for an estimate."""
    if noise_variance is None:
        return
    number = (
        noise_variance.item() if isinstance(noise_variance, Tensor) and noise_variance.numel() == 1 else noise_variance
    )
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 < float(number) < math.inf:
        raise ValueError(f"noise_variance is {noise_variance!r}; expected a positive number, or None to estimate it.")


def noise_variance_of(y: Tensor) -> float:
    """The variance of the noise in a sinogram [..., detectors], from fourth differences along the detectors:

    (median |d| / 0.6745)^2 of d = (y_{k-2} - 4 y_{k-1} + 6 y_k - 4 y_{k+1} + y_{k+2}) / sqrt(70).

    Right within a few per cent where the image is smooth on the scale of three detectors; too large otherwise (two to
    three times, for thin strokes of 28 pixels).  Source: Donoho and Johnstone 1994, of the median.
    """
    if y.shape[-1] < len(BINOMIAL):
        raise ValueError(f"the sinogram has {y.shape[-1]} detectors; expected at least {len(BINOMIAL)} to tell its "
                         "noise. Give noise_variance.")  # fmt: skip
    kernel = y.new_tensor(BINOMIAL)
    d = torch.nn.functional.conv1d(y.reshape(-1, 1, y.shape[-1]), (kernel / kernel.norm()).view(1, 1, -1))
    sigma = float(d.abs().median()) / NORMAL_MEDIAN
    floor = torch.finfo(y.dtype).eps * float(y.abs().max())
    return max(sigma, floor, torch.finfo(y.dtype).tiny ** 0.5) ** 2
