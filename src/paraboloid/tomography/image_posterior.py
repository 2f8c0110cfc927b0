"""What a reconstruction does not know: the posterior of the network's linearisation, as images."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.linalg.probes import Seed, generator_of, normal
from paraboloid.passes.memory import DENSE
from paraboloid.passes.modes import in_own_arithmetic
from paraboloid.tomography.dense_evidence import DenseEvidence
from paraboloid.tomography.evidence_ascent import STEPS, WEIGHTS, Objective, ascend
from paraboloid.tomography.image_jacobian import ImageJacobian, linear_residual
from paraboloid.tomography.kernel_prior import KernelPrior
from paraboloid.tomography.reconstruction import Reconstruction, check_seed
from paraboloid.tomography.sampled_evidence import SampledEvidence
from paraboloid.tomography.sinograms import as_numbers

LARGEST = 8  # a dense evidence takes this part of what a dense matrix may
STEP = {"damped": 0.75, "linearised": 1.0, "network": 0.0}  # from the network's image to the linear model's mean
FLOOR = 1e-3  # standard deviation that a density adds, over the image's largest value


class ImagePosterior:
    """The posterior of the image under the linear model x(w) = x(w*) + J (w - w*), w ~ N(0, Sigma), y ~ N(A x, s2 I).

    mean            [H, W], [slices, H, W] for a stack; see `linearised`
    optimum         the linear model's posterior mean as it is
    undecided       [H, W]: how far the mean may be off for not taking the whole step, see `linearised`
    std             of each pixel: exact where the dense matrices fit, else that of `samples` draws
    samples         [samples, *mean.shape], draws made once
    noise_variance  s2, learned or given
    prior           `KernelPrior`: variance and length of each block of convolutions
    """

    def __init__(self, fit: Reconstruction, J: ImageJacobian, evidence: Any, prior: KernelPrior, s2: float, count: int,
                 seed: int, mean: str):  # fmt: skip
        self.fit, self.J, self.evidence, self.prior, self.noise_variance = fit, J, evidence, prior, s2
        self.count, self.seed = count, seed
        self._solution = evidence.at(prior, s2)
        self.optimum = self._optimum()
        share, step = STEP[mean], self.optimum.clamp(*fit.bounds) - fit.image
        self.mean = fit.image + share * step if share else fit.image
        self.undecided = math.sqrt(share * (1 - share)) * step

    @property
    def exact(self) -> bool:
        """Whether every matrix is formed; else solutions are by conjugate gradients."""
        return isinstance(self.evidence, DenseEvidence)

    def _optimum(self) -> Tensor:
        """x(w*) - J w* + K A^T (A K A^T + s2 I)^-1 r: the image at the posterior mean of the weights."""
        found = self._solution.gain(self.evidence.residual.reshape(1, -1))[0]
        found = found - self._solution.push([w.unsqueeze(0) for w in self.J.weights])[0]
        return self.fit.image + found.view_as(self.fit.image).to(self.fit.image)

    # --- what is asked for ------------------------------------------------------------------------------------------

    @cached_property
    @in_own_arithmetic
    def covariance(self) -> Tensor:
        """Of all pixels, [n, n]: exact, or that of `samples`."""
        if not self.exact:
            deviations = (self.samples - self.mean).flatten(1)
            return deviations.T @ deviations / len(deviations)
        undecided = self.undecided.flatten()
        return self._solution.covariance().to(self.fit.image) + torch.outer(undecided, undecided)

    @in_own_arithmetic
    def root(self) -> Tensor:
        """F [R, n] with F^T F the covariance: R = n, or the number of samples."""
        if not self.exact:
            return (self.samples - self.mean).flatten(1) / len(self.samples) ** 0.5
        values, vectors = torch.linalg.eigh(self.covariance.double())
        return (values.clamp(min=0).sqrt() * vectors).T

    @cached_property
    def samples(self) -> Tensor:
        return self.sample(self.count, self.seed)

    @property
    def std(self) -> Tensor:
        if self.exact:
            return self.covariance.diagonal().clamp(min=0).sqrt().view_as(self.mean)
        return (self.samples - self.mean).square().mean(0).sqrt()

    @in_own_arithmetic
    def sample(self, k: int, seed: Seed = 0) -> Tensor:
        """k images drawn from the posterior, [k, *mean.shape], by Matheron's rule:

        mean + x_0 - K A^T (A K A^T + s2 I)^-1 (A x_0 + e) + z undecided,
        x_0 = J w_0,  w_0 ~ N(0, Sigma),  e ~ N(0, s2 I),  z ~ N(0, 1).

        Source: arXiv:2203.00479, section 4, without the last term.
        """
        check_count("k", k)
        like = self.fit.image
        generator = generator_of(seed, like.device)
        weights = self.prior.draws(self.J.weights, k, generator)
        drawn = self._solution.push(weights)
        seen = self._solution.measured(weights, drawn)
        noisy = seen + math.sqrt(self.noise_variance) * normal(tuple(seen.shape), seen, generator)
        deviations = (drawn - self._solution.gain(noisy)).view(k, *like.shape).to(like)
        z = normal((k, *[1] * like.dim()), like, generator)
        return self.mean + deviations + z * self.undecided

    @in_own_arithmetic
    def log_likelihood(self, image: Any, patch: int = 1) -> float:
        """log p(image | y) of another image, such as the truth, per pixel: mean over `patch` x `patch` patches.

        patch=1: pixels by themselves; else the joint density of each patch's pixels (smaller ones at the border).  The
        covariance has (0.001 max |mean|)^2 added to its diagonal; where it comes from samples, that of a patch of d
        pixels has d / (samples + d) of its correlations taken off, so that it can be inverted.
        """
        image = as_numbers("image", image, str(list(self.mean.shape))).to(self.mean)
        if image.shape != self.mean.shape or not bool(image.isfinite().all()):
            raise ValueError(f"the image has shape {list(image.shape)}; expected finite numbers of shape "
                             f"{list(self.mean.shape)}.")  # fmt: skip
        side = min(self.mean.shape[-2:])
        check_count("patch", patch, most=side)
        error = (image - self.mean).double()
        floor = (FLOOR * float(self.mean.abs().max())) ** 2
        if patch == 1:
            variance = self.std.double().square() + floor
            return float(-(variance.log() + error.square() / variance + math.log(2 * math.pi)).mean() / 2)
        places = torch.arange(error.numel()).view_as(error)
        total = 0.0
        for rows in places.split(patch, -2):
            for piece in rows.split(patch, -1):
                for at in piece.reshape(-1, piece.shape[-2] * piece.shape[-1]):
                    covariance = self._among(at) + floor * torch.eye(len(at), dtype=torch.float64)
                    total += float(_log_density(error.flatten()[at], covariance))
        return total / error.numel()

    def _among(self, pixels: Tensor) -> Tensor:
        if self.exact:
            return self.covariance[pixels][:, pixels].double()
        deviations = (self.samples - self.mean).flatten(1)[:, pixels].double()
        found = deviations.T @ deviations / len(deviations)
        kept = len(deviations) / (len(deviations) + len(pixels))
        return kept * found + (1 - kept) * found.diagonal().diag()

    @in_own_arithmetic
    def log_evidence(self) -> Any:
        """log p(y) of the linear model: a float, or an `Estimate` with its standard error where it is sampled."""
        return self._solution.log_evidence()


@in_own_arithmetic
def linearised(
    fit: Reconstruction,
    prior: str = "per_block",
    samples: int = 64,
    seed: int = 0,
    *,
    mean: str = "damped",
    weights: str = "both",
    evidence: str = "auto",
    learn_noise: bool = True,
    steps: int = STEPS,
    probes: int = 8,
    max_memory: int | None = None,
) -> ImagePosterior:
    """The posterior of a reconstruction: where to trust it, and by how much it may be off.

    The network is linearised at its trained weights w*, in the kernels of its convolutions (biases and normalisation
    stay), under the prior of `KernelPrior`.  Variances, lengths and the noise variance s2 minimise

        ||y - A x(w)||^2 / s2 + w . Sigma^-1 w + log det(A J Sigma J^T A^T + s2 I).

    Sources: arXiv:2203.00479, equation 11, with w the trained weights; arXiv:2206.08900, the linear model's optimum.

    prior        "per_block": a variance and a length for each block of convolutions; "shared": for all of one size
    samples      images drawn for `samples`, and for `std` where it is not exact
    mean         "linearised": the linear model's posterior mean, one Gauss-Newton step from the network's image with
                 the prior found, put between the fit's bounds; "network": none.  "damped": three quarters of that step,
                 which also keeps some of the total variation that the network was trained with and the linear model
                 knows nothing of: mean and covariance of a mixture of the two, of weights 3/4 and 1/4, whose
                 covariance is the linear model's and 3/16 step step^T
    weights      where the first two terms are taken: "optimum" of the linear model, which makes it -2 times its log
                 evidence and constants; "trained"; "both": at the optimum, and w* . Sigma^-1 w* once more, a hyperprior
                 that keeps the prior as wide as the trained weights ask for.  From few angles the optimum alone is
                 far too sure; the trained weights alone take their own misfit for noise
    evidence     "exact": with every matrix formed (images of up to some 45 x 45); "sampled": by conjugate gradients
                 with `probes` random signs; "auto": exact where it fits, and beyond that the evidence alone by matrices
                 of the measurements, exactly, where these fit (some 4,000), with sampled images
    learn_noise  False keeps the fit's noise variance
    steps        of the evidence's ascent

    Raises ValueError for an unknown option, a network without convolutions, and evidence="exact" where it does not fit.
    """
    check_choice("mean", mean, tuple(STEP))
    check_choice("weights", weights, WEIGHTS)
    check_choice("evidence", evidence, ("auto", "exact", "sampled"))
    check_count("samples", samples)
    check_count("probes", probes)
    if not isinstance(fit, Reconstruction):
        raise ValueError(f"fit is a {type(fit).__name__}; expected what deep_image_prior returns.")
    check_seed(seed)
    check_choice("learn_noise", learn_noise, (True, False))
    if max_memory is not None and not (isinstance(max_memory, int | float) and max_memory >= 0):
        raise ValueError(f"max_memory is {max_memory!r}; expected a number of bytes, or None.")
    first = KernelPrior.of(fit.model, prior)
    J, automatic = ImageJacobian(fit, first.names, max_memory), evidence == "auto"
    if automatic:
        evidence = "exact" if _dense_bytes(J, first) <= DENSE.of() / LARGEST else "sampled"
    if evidence == "sampled":  # conjugate gradients do not converge on a float32 Jacobian's products
        J = ImageJacobian(fit, first.names, max_memory, torch.float64)
    if evidence == "exact":
        _check_memory(J, first)
        found: Any = DenseEvidence(fit, J, first)
    else:
        at_weights = J.push([w.unsqueeze(0) for w in J.weights])[0]
        found = SampledEvidence(J, fit.A, linear_residual(fit, at_weights), probes, seed)
    misfit = float((fit.sinogram - fit.A @ fit.image).double().square().sum())
    objective, steps = Objective(weights, J.weights, misfit), check_count("steps", steps, least=0)
    climbed = found.formed(first) if automatic and evidence == "sampled" and steps else None
    learned, s2 = ascend(climbed or found, objective, first, fit.noise_variance, learn_noise, steps)
    return ImagePosterior(fit, J, found, learned, s2, samples, seed, mean)


def _dense_bytes(J: ImageJacobian, prior: KernelPrior) -> int:
    weights = sum(w.numel() for w in J.weights)
    return 8 * (J.pixels**2 * len(prior.coefficients()) + J.pixels * weights)


def _check_memory(J: ImageJacobian, prior: KernelPrior) -> None:
    need = _dense_bytes(J, prior)
    if need > DENSE.of():
        raise ValueError(f"evidence='exact' over {J.pixels} pixels would take {need / 2**30:.1f} GiB; expected at most "
                         f"{DENSE.of() / 2**30:.0f}. Use evidence='sampled'.")  # fmt: skip


def _log_density(error: Tensor, covariance: Tensor) -> Tensor:
    L = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(L, error.unsqueeze(1), upper=False)
    return -(half.square().sum() + 2 * L.diagonal().log().sum() + len(error) * math.log(2 * math.pi)) / 2
