"""The deep image prior: a network that is trained on one sinogram, and stopped before it learns the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import MSE, Loss, Observed
from paraboloid.passes.modes import in_own_arithmetic
from paraboloid.passes.random_state import seeded
from paraboloid.tomography.measurement import as_projector
from paraboloid.tomography.projector import Projector
from paraboloid.tomography.sinograms import as_numbers, as_sinogram, check_noise_variance, noise_variance_of
from paraboloid.tomography.training import Training
from paraboloid.tomography.u_net import LEAST, UNet
from paraboloid.tomography.variation import SHARE, scale_of, total_variation

ITERATIONS, SMALL, LARGE = 600, 40**2, 128**2  # of training, for images of so many pixels; and up to how many they grow
HEADROOM = 1.2  # the upper bound of the image, over the largest value of a reconstruction by total variation


@dataclass(eq=False)
class Reconstruction:
    """What `deep_image_prior` found.

    image           [H, W], or [slices, H, W]; model(input)[0]
    model           the trained network; input [1, channels, H, W]
    noise_variance  of the sinogram's entries, given or estimated
    misfit          mean (A image - y)^2 before each iteration
    stopped         why the training ended: "discrepancy", "iterations"
    bounds          what the image's values were kept between; infinite ones for a model of one's own, unless given
    """

    image: Tensor
    model: nn.Module
    input: Tensor
    A: Projector
    sinogram: Tensor
    noise_variance: float
    misfit: list[float]
    stopped: str
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def loss(self) -> Loss:
        """The squared error of the measured image, summed."""
        return Observed(MSE("sum"), self.A)


@in_own_arithmetic
def deep_image_prior(
    A: Any,
    y: Any,
    noise_variance: float | None = None,
    seed: int = 0,
    *,
    bounds: tuple[float, float] | None = None,
    tv: float = SHARE,
    iterations: int | None = None,
    lr: float = 1e-2,
    stop: str | None = "discrepancy",
    model: nn.Module | None = None,
    input: Any = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reconstruction:
    """Reconstruct an image from its sinogram by a small U-Net f that is trained on it alone:

        ||A f(z) - y||^2 / (2 noise_variance) + tv TV(f(z)) / scale,

    with the reconstruction by total variation as its input z, Adam with a cosine of learning rates from `lr`.

    A               `ParallelBeam`, `FanBeam`, or any object with ``@`` and ``.T`` (see `as_projector`)
    y               line integrals [angles, detectors], or [slices, angles, detectors]: all slices by one network
    noise_variance  of y's entries; by default estimated from y, see `noise_variance_of`; `linearised` learns it
    bounds          (low, high) of the image's values; by default 0 and 1.2 times the largest value of the
                    reconstruction by total variation; infinite ones for none
    iterations      None: 600 for images of up to 40 x 40 pixels, and in proportion to the pixels beyond, which a
                    network takes longer to learn, up to the 6,144 of 128 x 128
    stop            "discrepancy": at the first iterate whose mean squared misfit is at most the noise variance
                    (Morozov's principle), or after `iterations`; None: after `iterations`
    model, input    a network of your own, [1, ...] to [1, H, W], which is trained in place, and what it takes
    checkpoint      a file that is written on the way; a call that finds it goes on from there, and ends as the
                    uninterrupted one does, bit for bit

    Raises ValueError for a sinogram that is not finite or does not fit A, an A.T that is no adjoint, and a checkpoint
    of another problem.  Sources: Ulyanov, Vedaldi and Lempitsky 2018, arXiv:1711.10925; Baguer, Leuschner and Schmidt
    2020, arXiv:2003.04989, for tomography with total variation; the input as in arXiv:2203.00479.
    """
    y = as_sinogram(y)
    A = as_projector(A, y)
    _check_options(noise_variance, bounds, tv, lr, stop, model, checkpoint, progress)
    if iterations is not None:
        check_count("iterations", iterations)
    if len(A.takes) != 2:
        raise ValueError(f"A takes volumes of shape {A.takes}; expected images [H, W]: the network is two-dimensional. "
                         "Reconstruct slices, or use total_variation.")  # fmt: skip
    check_seed(seed)
    if not bool((A.T @ y > 0).any()):
        raise ValueError(f"the sinogram lies between {float(y.min()):.3g} and {float(y.max()):.3g}, and no pixel is "
                         "seen by rays with a positive sum; expected line integrals of an image that is not 0: look at "
                         "their sign, and whether -log was taken.")  # fmt: skip
    s2 = noise_variance_of(y) if noise_variance is None else float(noise_variance)
    if not math.isfinite(float(y.square().sum() / (2 * s2))):
        raise ValueError(f"noise_variance is {s2:.3g}, so small that the misfit over it overflows in {y.dtype}; "
                         "expected one of the scale of y's noise, or None to estimate it.")  # fmt: skip
    scale = scale_of(A, y)
    lead = tuple(y.shape[: y.dim() - len(A.gives)])
    z = _input(A, y, input, SHARE * s2 / scale)
    if model is None:
        if min(A.takes) < LEAST:
            raise ValueError(f"images have {' x '.join(map(str, A.takes))} pixels; expected at least {LEAST} along "
                             "each side for the U-Net. Give a model of your own.")  # fmt: skip
        with seeded(seed):
            seen = z if input is None else total_variation(A, y, SHARE * s2 / scale)
            limits = bounds or (0.0, HEADROOM * float(seen.max()))
            model = UNet(z.shape[1], lead, limits, scale, float(z.mean())).to(z)
    _check_output(model, z, (*lead, *A.takes))
    iterations = iterations_for(A) if iterations is None else iterations
    training = Training(A, y, s2, tv / scale, iterations, lr, model, z)
    if checkpoint is not None:
        training.resume(Path(checkpoint))
    stopped = training.run(s2 if stop == "discrepancy" else -math.inf, checkpoint, progress)
    with torch.no_grad():
        image = model(z)[0].detach()
    kept = model.bounds if isinstance(model, UNet) else bounds or (-math.inf, math.inf)
    return Reconstruction(image, model, z, A, y, s2, training.misfit, stopped, kept)


def iterations_for(A: Projector) -> int:
    """Of training, by default."""
    return max(ITERATIONS, ITERATIONS * min(math.prod(A.takes), LARGE) // SMALL)


def _input(A: Projector, y: Tensor, given: Any, weight: float) -> Tensor:
    """[1, channels, H, W]."""
    if given is not None:
        z = as_numbers("input", given, "[1, channels, H, W]").to(y)
        if z.dim() != 4 or len(z) != 1 or not bool(z.isfinite().all()):
            raise ValueError(f"input has shape {list(z.shape)}; expected finite numbers [1, channels, H, W].")
        return z
    return total_variation(A, y, weight).reshape(1, -1, *A.takes)


def _check_options(
    noise_variance: Any, bounds: Any, tv: Any, lr: Any, stop: Any, model: Any, checkpoint: Any, progress: Any
) -> None:
    check_noise_variance(noise_variance)
    if bounds is not None and not (isinstance(bounds, Sequence) and len(bounds) == 2
                                   and all(_is_real(b) for b in bounds) and bounds[0] < bounds[1]):  # fmt: skip
        raise ValueError(f"bounds is {bounds!r}; expected (low, high) with low < high.")
    if not _is_real(tv) or not 0 <= tv < math.inf:
        raise ValueError(f"tv is {tv!r}; expected a number of at least 0.")
    if not _is_real(lr) or not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr!r}; expected a positive number.")
    check_choice("stop", stop, ("discrepancy", None))
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; expected an nn.Module, or None for a small U-Net.")
    if checkpoint is not None and not isinstance(checkpoint, str | Path):
        raise ValueError(f"checkpoint is a {type(checkpoint).__name__}; expected the name of a file, or None.")
    if progress is not None and not callable(progress):
        raise ValueError(
            f"progress is a {type(progress).__name__}; expected a function of the iteration and their number."
        )


def check_seed(seed: Any) -> None:
    """ValueError unless torch's generators can start from it."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed!r}; expected an integer of 64 bits.")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_output(model: nn.Module, z: Tensor, shape: tuple[int, ...]) -> None:
    if any(t.is_inference() for t in model.state_dict(keep_vars=True).values()):
        raise ValueError(f"the model {type(model).__name__} was made under torch.inference_mode, whose tensors cannot "
                         "be trained; expected one made outside.")  # fmt: skip
    weights = [p for p in model.parameters() if p.requires_grad]
    if any(p.dtype != z.dtype for p in weights):
        raise ValueError(f"the model has weights of {', '.join(sorted({str(p.dtype) for p in weights}))}; expected the "
                         f"sinogram's {z.dtype}.")  # fmt: skip
    try:
        with torch.no_grad():
            found = tuple(model(z).shape)
    except Exception as e:
        raise ValueError(f"the model {type(model).__name__} raises {type(e).__name__} ({str(e)[:200]}) for its input "
                         f"{list(z.shape)}; expected {[1, *shape]} from it.") from e  # fmt: skip
    if found != (1, *shape):
        raise ValueError(f"the model gives {list(found)} for an input {list(z.shape)}; expected {[1, *shape]}: one "
                         "image of A's shape (for each sinogram).")  # fmt: skip
    if not weights:
        raise ValueError(f"the model {type(model).__name__} has no parameters that require gradients; expected some, "
                         "to be trained.")  # fmt: skip
