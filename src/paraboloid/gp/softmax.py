"""Classification of several classes together: Laplace's method behind a softmax."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.gp.inputs import inputs_of
from paraboloid.gp.kernel import Kernel
from paraboloid.gp.prior import PriorFunctions
from paraboloid.linalg.conjugate_gradients import cg
from paraboloid.linalg.operand import LinAlgError
from paraboloid.linalg.probes import generator_of

TOL, SOLVED = 1e-5, 1e-7  # of a Newton step, relative to the function; of its linear system
CARRIED = 1e-3  # of the functions, that rounding may take without a word
HALVED = 30  # times that a step which does not climb is made shorter
FACTOR = 2000  # numbers in a system up to which it is factorised: exact, and no slower where the kernel is large
COLUMNS = 2**22  # numbers in right-hand sides of exact variances at a time


class Curvature:
    """I + R^T K R for W = R R^T, W_n = diag(p_n) - p_n p_n^T the softmax's Hessian at each input.

    Vectors are [N C] or [N C, S].  R_n = diag(s) (I - s s^T) with s = p_n^1/2, as I - s s^T is a projection.
    """

    def __init__(self, gram: Gram, f: Tensor):
        self.gram, self.s = gram, torch.softmax(f, 1).sqrt().unsqueeze(2)  # [N, C, 1]
        self.shape = (f.numel(), f.numel())
        self.dtype, self.device = f.dtype, f.device

    def root(self, v: Tensor) -> Tensor:
        """R v, [N, C, S]."""
        return self.s * (v - self.s * (self.s * v).sum(1, keepdim=True))

    def transposed(self, v: Tensor) -> Tensor:
        """R^T v, [N, C, S]."""
        v = self.s * v
        return v - self.s * (self.s * v).sum(1, keepdim=True)

    def kernel(self, v: Tensor) -> Tensor:
        """K v for every class, [N, C, S]."""
        return (self.gram @ v.reshape(len(v), -1)).reshape(v.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        at = v.reshape(*self.s.shape[:2], -1)
        return (at + self.transposed(self.kernel(self.root(at)))).reshape(v.shape)

    def solve(self, b: Tensor, tol: float) -> Tensor:
        """R (I + R^T K R)^-1 b, [N, C, S]: by a factor for up to 2000 numbers, else by conjugate gradients to `tol`."""
        columns = b.reshape(self.shape[0], -1)
        try:
            found = torch.cholesky_solve(columns, self.factor) if len(columns) <= FACTOR else cg(self, columns, tol)
        except LinAlgError as e:
            N, C = self.s.shape[:2]
            raise LinAlgError(f"I + R^T K R of {N} inputs and {C} classes: {e} Expected a positive semi-definite "
                              f"kernel that {self.dtype} carries: lower its outputscale, or take another "
                              "one.") from None  # fmt: skip
        return self.root(found.reshape(b.shape))

    @cached_property
    def factor(self) -> Tensor:
        """The Cholesky factor of I + R^T K R, [N C, N C]: its entries are K_nm (R_n^T R_m)_cd."""
        s, one = self.s.squeeze(2), torch.eye(self.s.shape[1], dtype=self.dtype, device=self.device)
        R = s.unsqueeze(2) * (one - s.unsqueeze(2) * s.unsqueeze(1))  # [N, C, C]
        A = torch.einsum("nec,med->ncmd", R, R) * self.gram.dense()[:, None, :, None]
        A = A.reshape(self.shape)
        A.diagonal().add_(1)
        L, failed = torch.linalg.cholesky_ex(A)
        if failed:
            raise LinAlgError(f"it has the eigenvalue {float(torch.linalg.eigvalsh(A.double())[0]):.4g}.")
        return L


@dataclass(eq=False)
class SoftmaxClassifier:
    """What `classify(likelihood="softmax")` returns: latent functions f_c ~ GP(0, kernel), p(c | f) = softmax(f)_c.

    classes  the labels, sorted
    weights  K^-1 f at the mode, [N, C]: mean(x) = k(x, X) weights; in exact arithmetic t - softmax(f) with one-hot
             labels t, whose digits are lost where a probability rounds to 1
    """

    kernel: Kernel
    x: Tensor
    classes: Tensor
    weights: Tensor
    curvature: Curvature
    prior: PriorFunctions | None
    sample_weights: Tensor | None  # [N, C, samples]

    def mean(self, x: Any) -> Tensor:
        """The latent functions' mean, [M, C]."""
        return self.curvature.gram.cross(inputs_of(x, self.x), self.weights)

    def sample(self, x: Any) -> Tensor:
        """Latent functions drawn from Laplace's approximation, [samples, M, C]; see `GaussianProcess.sample`.

        f = mean + f_0 - k(x, X) R (I + R^T K R)^-1 (R^T f_0(X) + z), f_0 from the prior, z standard normal.
        """
        x = inputs_of(x, self.x)
        if self.prior is None or self.sample_weights is None:
            raise ValueError("there are no samples; classify with samples=64.")
        C = len(self.classes)
        drawn = self.prior(x).view(-1, C, len(x)).permute(2, 1, 0)  # [M, C, samples]
        moved = self.curvature.gram.cross(x, self.sample_weights.flatten(1)).view(len(x), C, -1)
        return (self.mean(x).unsqueeze(2) + drawn - moved).permute(2, 0, 1)

    def variance(self, x: Any) -> Tensor:
        """Of each latent function, [M, C]: exact, by a solve for each input and class."""
        x = inputs_of(x, self.x)
        C, found = len(self.classes), []
        one = torch.eye(C, dtype=x.dtype, device=x.device)
        for part in x.split(max(1, COLUMNS // (len(self.x) * C * C))):
            k = self.curvature.gram.cross_matrix(part).T  # [N, M]
            b = torch.einsum("nm,cd->ncmd", k, one).flatten(2)  # a column for each input and class
            explained = (b * self.curvature.solve(self.curvature.transposed(b), SOLVED)).sum((0, 1))
            found.append(self.kernel.diagonal(part).unsqueeze(1) - explained.view(len(part), C))
        return torch.cat(found).clamp(min=0)

    def probabilities(self, x: Any) -> Tensor:
        """[M, C]: the mean of the samples' softmax; without samples that of mean_c / (1 + pi variance_c / 8)^1/2."""
        if self.prior is not None:
            return torch.softmax(self.sample(x), 2).mean(0)
        return torch.softmax(self.mean(x) / (1 + math.pi / 8 * self.variance(x)).sqrt(), 1)

    def predict(self, x: Any) -> Tensor:
        """The most probable labels, [M]."""
        return self.classes[self.probabilities(x).argmax(1)]


def softmax_classifier(
    kernel: Kernel, x: Tensor, classes: Tensor, t: Tensor, max_newton: int, samples: int, seed: int,
    features: int, max_memory: int | None,
) -> SoftmaxClassifier:  # fmt: skip
    """The mode for one-hot labels t [N, C] by Newton's method, and functions drawn around it.

    With a = K^-1 f and b = W f + t - p a step goes to a = b - R (I + R^T K R)^-1 R^T K b, shortened where the log
    posterior would fall.  Source: Rasmussen and Williams 2006, section 3.5.
    """
    gram = Gram(kernel, x, torch.zeros((), dtype=x.dtype, device=x.device), max_memory)
    f, a = torch.zeros_like(t), torch.zeros_like(t)
    value = _log_posterior(f, a, t)
    for _ in range(max_newton):
        H, p = Curvature(gram, f), torch.softmax(f, 1)
        b = (p * f - p * (p * f).sum(1, keepdim=True) + t - p).unsqueeze(2)
        to = (b - H.solve(H.transposed(H.kernel(b)), SOLVED)).squeeze(2)
        a, f, value, moved = _climbed(gram, f, a, to, t, value)
        if moved <= TOL:
            break
    else:
        warnings.warn(f"Newton's method moved the latent functions by {moved:.2g} of themselves in step {max_newton}; "
                      f"expected {TOL}: raise max_newton.", stacklevel=3)  # fmt: skip
    if (lost := float((gram @ a - f).norm() / f.norm())) > CARRIED:
        warnings.warn(f"the latent functions are sure to {lost:.2g} of themselves in {x.dtype}; expected {CARRIED}: "
                      "give x in float64, or lower the kernel's outputscale.", stacklevel=3)  # fmt: skip
    H = Curvature(gram, f)
    if not samples:
        return SoftmaxClassifier(kernel, x, classes, a, H, None, None)
    C, generator = t.shape[1], generator_of(seed, x.device)
    prior = PriorFunctions(kernel, samples * C, features, x, generator)
    at = prior(x).view(samples, C, len(x)).permute(2, 1, 0)  # [N, C, samples]
    z = torch.randn(at.shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    return SoftmaxClassifier(kernel, x, classes, a, H, prior, H.solve(H.transposed(at) + z, 1e-4))


def _climbed(
    gram: Gram, f: Tensor, a: Tensor, to: Tensor, t: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor, float]:
    """a, f and the log posterior after the longest of the steps 1, 1/2, 1/4, ... that raises it, and how far f went."""
    change, step = to - a, 1.0
    along = gram @ change
    for _ in range(HALVED):
        there, at = a + step * change, f + step * along
        found = _log_posterior(at, there, t)
        if bool(found >= value - 1e-12 * value.abs()):
            break
        step /= 2
    return there, at, found, float(step * along.norm() / at.norm())


def _log_posterior(f: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """log p(t | f) - f.K^-1 f / 2 and a constant."""
    return (t * torch.log_softmax(f, 1)).sum() - (a * f).sum() / 2
