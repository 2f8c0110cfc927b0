"""Variances and lengths of the kernels' prior, and the noise, where the evidence is largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.tomography.dense_evidence import GramEvidence
from paraboloid.tomography.kernel_prior import KernelPrior

WEIGHTS = ("both", "optimum", "trained")
LENGTHS = (0.1, 20.0)  # limits of a length, in pixels
LEAST = 1e-12  # of a kernel's variance, over what it was at first
NOISE = (1e-4, 1e4)  # limits of the noise's variance, over what it was at first
STEPS = 30
RATE = 0.2  # of the logarithm of a length, with a sampled evidence
RENEWED = 5  # steps after which the preconditioner is made again
TINY = 1e-30


@dataclass(frozen=True)
class Objective:
    """What is maximised over the prior and the noise, S = A J Sigma J^T A^T + s2 I, times -1/2:

    optimum  r . S^-1 r + log det S, the evidence of the linear model.  r . S^-1 r is the least ||r - A J w||^2 / s2 +
             w . Sigma^-1 w: both terms at the optimum of the linear model
    trained  ||y - A x(w*)||^2 / s2 + w* . Sigma^-1 w* + log det S, both at the trained weights w*
    both     r . S^-1 r + w* . Sigma^-1 w* + log det S: the evidence, and a hyperprior under which the prior is not far
             narrower than the trained weights
    """

    weights: str
    trained: Sequence[Tensor]  # w*
    misfit: float  # ||y - A x(w*)||^2

    @property
    def at_optimum(self) -> bool:
        return self.weights != "trained"

    def square(self, prior: KernelPrior) -> Tensor:
        """w* . Sigma^-1 w* of each block where the objective has it, [B]."""
        if self.weights == "optimum":
            return torch.zeros(len(prior.blocks), dtype=torch.float64)
        return prior.square(self.trained)

    def dense(self, evidence: GramEvidence, prior: KernelPrior, s2: Tensor) -> Tensor:
        """The objective, 0-dimensional."""
        if self.at_optimum:
            return evidence.value(prior, s2) - self.square(prior).sum() / 2
        volume = evidence.terms(prior, s2, fit=False)
        return -(self.misfit / s2 + self.square(prior).sum() + volume) / 2


def ascend(
    evidence: Any, objective: Objective, prior: KernelPrior, noise_variance: float, learn_noise: bool, steps: int
) -> tuple[KernelPrior, float]:
    """The prior and the noise variance at a maximum of the objective, from where they are."""
    if steps == 0:
        return prior, noise_variance
    climb = _dense if isinstance(evidence, GramEvidence) else _sampled
    return climb(evidence, objective, prior, noise_variance, learn_noise, steps)


def _limited(prior: KernelPrior, first: KernelPrior) -> KernelPrior:
    low, high = (math.log(length) for length in LENGTHS)
    return replace(
        prior,
        log_variance=prior.log_variance.maximum(first.log_variance + math.log(LEAST)),
        log_length=prior.log_length.clamp(low, high),
    )


def _within(log_noise: Tensor, first: float) -> Tensor:
    return log_noise.clamp(*(math.log(first * limit) for limit in NOISE))


def _dense(
    evidence: Any, objective: Objective, first: KernelPrior, s2: float, learn: bool, steps: int
) -> tuple[KernelPrior, float]:
    """L-BFGS on the logarithms."""
    start = torch.tensor(math.log(s2), dtype=torch.float64)
    free = [t.clone().requires_grad_() for t in (first.log_variance, first.log_length, start)]
    variance, length, noise = free
    optimizer = torch.optim.LBFGS(
        free if learn else free[:2], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        prior = _limited(replace(first, log_variance=variance, log_length=length), first)
        loss = -objective.dense(evidence, prior, _within(noise, s2).exp())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
    found = replace(first, log_variance=variance.detach(), log_length=length.detach())
    return _limited(found, first), float(_within(noise.detach(), s2).exp())


def _sampled(
    evidence: Any, objective: Objective, first: KernelPrior, s2: float, learn: bool, steps: int
) -> tuple[KernelPrior, float]:
    """Variances by steps that the objective never falls by, but for the probes; lengths along their gradient.

    With S = sum_c c M_c + s2 I and a = S^-1 r: v_b <- v_b sqrt((a . S_b a + w* . Sigma_b^-1 w*) / tr(S^-1 S_b)), where
    S_b is the block's part of S, and likewise the noise's.  Source: Zhou, Hu, Zhou and Lange 2019, "MM algorithms for
    variance components models", arXiv:1509.07426, with one more term that falls with v.
    """
    prior, preconditioner, start = first, None, s2
    for step in range(steps):
        if step % RENEWED == 0:
            preconditioner = evidence.operator(prior, s2).preconditioner(evidence.seed)
        fits, traces = evidence.parts(prior, s2, preconditioner, objective.at_optimum)
        if not objective.at_optimum:
            fits[-1] = objective.misfit / s2**2
        moved = _moved(prior, objective, fits[:-1], traces[:-1])
        if learn:
            s2 *= float((fits[-1] / traces[-1].clamp(min=TINY)).clamp(0.1, 10).sqrt())
            s2 = min(max(s2, NOISE[0] * start), NOISE[1] * start)
        prior = _limited(moved, first)
    return prior, s2


def _moved(prior: KernelPrior, objective: Objective, fits: Tensor, traces: Tensor) -> KernelPrior:
    """One step of variances and lengths, from a . M_c a and tr(S^-1 M_c) of every coefficient c."""
    with torch.enable_grad():
        length = prior.log_length.clone().requires_grad_()
        free = replace(prior, log_length=length)
        c, square = free.coefficients(), objective.square(free)
        value = (c * (fits - traces)).sum() - square.sum()
        (up,) = torch.autograd.grad(value, length, retain_graph=True)
        sizes = [torch.autograd.grad((c * t).sum(), length, retain_graph=True)[0].abs() for t in (fits, traces.abs())]
    c, square = c.detach(), square.detach()
    ends = torch.tensor([len(block.classes()[0]) for block in prior.blocks]).cumsum(0)[:-1].tolist()
    fit, trace = (torch.stack([t.sum() for t in (c * parts).tensor_split(ends)]) for parts in (fits, traces))
    change = ((fit + square).clamp(min=TINY) / trace.clamp(min=TINY)).log().clamp(-4, 4) / 2
    scale = (sizes[0] + sizes[1]).clamp(min=TINY)
    return replace(
        prior, log_variance=prior.log_variance + change, log_length=prior.log_length + RATE * (up / scale).clamp(-1, 1)
    )
