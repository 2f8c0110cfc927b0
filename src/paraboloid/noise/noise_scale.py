"""Measures of gradient noise that practitioners use, from one pull of a batch or of several."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.losses import Loss, LossFunction
from paraboloid.noise.moments import Moments, moments
from paraboloid.passes.parameter_layers import layers_of


@dataclass(frozen=True)
class Noise:
    """Noise of single-sample gradients g_n over N samples; g is their mean, D parameters. All unbiased but `snr`.

    variance       1/D sum_j 1/(N-1) sum_n (g_nj - g_j)^2
    signal         1/D (||g||^2 - sum of variances / N): the squared mean gradient without the noise's part; where it is
                   not positive, N samples do not tell the gradient from its noise
    snr            mean over coordinates of g_j^2 / variance_j (GSNR, Liu et al. 2020, arXiv:2001.07384); where neither
                   is anything, 0.  Noise alone gives 1 / N
    noise_scale    variance / signal: the batch size at which noise and signal are equal, "critical batch size"
                   (McCandlish et al. 2018, arXiv:1812.06162); None where the signal is not positive
    diversity      sum_n ||g_n||^2 / ||sum_n g_n||^2 (Yin et al. 2018, arXiv:1706.05699); N times it bounds the batch
                   size that speeds up SGD; None where the mean gradient is zero
    """

    samples: int
    variance: float
    signal: float
    snr: float
    noise_scale: float | None
    diversity: float | None


@dataclass(frozen=True)
class Measures:
    """`total` over all parameters, and `layers`: name of a module -> Noise of its own parameters."""

    total: Noise
    layers: dict[str, Noise]

    def to_json(self) -> dict[str, Any]:
        """Plain data for strict JSON: undefined and infinite numbers are None."""
        return {"total": plain(self.total), "layers": {name: plain(n) for name, n in self.layers.items()}}


def plain(measures: Any) -> dict[str, Any]:
    """A dataclass of numbers as a dict for strict JSON: undefined and infinite ones are None."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(measures).items()}


def measures(
    model: nn.Module, loss_fn: LossFunction, data: Data, *, output: Output | None = None, max_memory: int | None = None
) -> Measures:
    """Variance, signal, gradient signal-to-noise ratio, noise scale and diversity, by layer and in all; exact.

    `data` is a batch or an iterable of batches, each of which takes one forward pass and one pull.  Gradients are those
    of the unreduced loss.  Raises ValueError for fewer than two samples.
    """
    return measured(moments(model, Loss.from_torch(loss_fn), batch_data.batches(data), output, max_memory))


def measured(found: Moments) -> Measures:
    """The measures that follow from the moments."""
    N, mean, squares = found
    if N < 2:
        raise ValueError(f"the data holds {N} sample; expected at least 2, of which there is a variance.")
    layers = {layer: _noise(names, mean, squares, N) for layer, names in layers_of(mean).items()}
    return Measures(_noise(mean, mean, squares, N), layers)


def parts(mean: Iterable[Tensor], squares: Iterable[Tensor], N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the variances, ||g||^2 and its unbiased value ||g||^2 - noise / N, over tensors of `Moments`."""
    noise = torch.stack([s.sum() for s in squares]).sum() / (N - 1)
    square = torch.stack([g.square().sum() for g in mean]).sum()
    return noise, square, square - noise / N


def _noise(names: Iterable[str], mean: dict[str, Tensor], squares: dict[str, Tensor], N: int) -> Noise:
    names = list(names)
    D = sum(mean[k].numel() for k in names)
    noise, square, signal = torch.stack(parts([mean[k] for k in names], [squares[k] for k in names], N)).tolist()
    snr = 0.0
    for k in names:
        ratio = mean[k].square() / squares[k] * (N - 1)
        snr += float(torch.where(mean[k] == 0, 0.0, ratio).sum())
    each = noise * (N - 1) / N + square  # mean ||g_n||^2
    return Noise(
        N, noise / D, signal / D, snr / D if math.isfinite(snr) else math.inf,
        noise / signal if signal > 0 else None, each / (N * square) if square > 0 else None,
    )  # fmt: skip
