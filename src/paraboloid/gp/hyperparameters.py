"""Hyperparameters by the evidence: exactly on a subset, or on all data with pathwise probes and warm starts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from paraboloid.gp.conditioning import condition
from paraboloid.gp.inputs import inputs_of, numbers, targets_of
from paraboloid.gp.kernel import Kernel
from paraboloid.gp.other_libraries import kernel_of
from paraboloid.gp.starting import in_units_of
from paraboloid.linalg.operand import LinAlgError, check_choice, check_count
from paraboloid.linalg.probes import generator_of

LEAST_NOISE = 1e-6  # times the targets' mean square
TILE = 512  # inputs on each side of a piece whose derivative is taken at a time


@dataclass(frozen=True, eq=False)
class Hyperparameters:
    """kernel, noise_variance   as found, to be given to `condition`
    trace                    along the way: the log evidence per sample (method="evidence"), or the norm of its gradient
    """

    kernel: Kernel
    noise_variance: float
    trace: list[float]


def fit_hyperparameters(
    kernel: Any,
    x: Any,
    y: Any,
    noise_variance: float = 0.1,
    method: str = "evidence",
    subset: int = 1000,
    steps: int | None = None,
    *,
    lr: float = 0.1,
    samples: int = 16,
    solver: str = "auto",
    tol: float = 1e-2,
    rows: int | None = None,
    seed: int = 0,
) -> Hyperparameters:
    """The kernel's hyperparameters and the noise variance that maximise log N(y; 0, K + noise).

    Lengthscales start from where they are, variances from there times y.(K + noise)^-1 y / N, the best common factor:
    targets may have any unit.  Warns where the kernel relates no two inputs, or calls all alike.

    "evidence"  on `subset` random samples, exactly, by L-BFGS with at most `steps` (100) iterations, in float64
    "pathwise"  on all data, `steps` (30) steps of Adam at the rate `lr` on the logarithms, with the gradient

        1/2 v.dA v - 1/2 mean_s w_s.dA w_s,   A v = y,   A w_s = f_s(x) + e_s ~ N(0, A)

    by `samples` draws whose random numbers stay the same, so that each step's solutions start the next step's solver,
    which goes on to a residual of `tol`.  rows: of A that each gradient is taken over, drawn anew; all by default.
    Without samples in N^2 memory: tiles of A are differentiated one at a time.

    y [N] or [N, C].  Sources: Rasmussen and Williams 2006, section 5.4; Lin et al. 2024, arXiv:2405.18457.
    """
    check_choice("method", method, ("evidence", "pathwise"))
    kernel, x = kernel_of(kernel), inputs_of(x)
    x, y = targets_of(y, x)
    names = list(kernel.hyperparameters())
    if not names:
        raise ValueError(f"{kernel} names no hyperparameters that could be fitted; expected a kernel of pb.gp, or one "
                         "of GPyTorch or scikit-learn that has such a form (GPRegressor: optimize=False).")  # fmt: skip
    if numbers("noise_variance", noise_variance).numel() != 1 or not noise_variance > 0:
        raise ValueError(f"noise_variance is {noise_variance}; expected a positive number to start from.")
    if not bool(y.square().sum() > 0):
        raise ValueError("y is 0 everywhere; expected targets that vary.")
    check_count("subset", subset, least=2)
    order = torch.randperm(len(x), generator=generator_of(seed, torch.device("cpu")))[:subset].to(x.device)
    few, targets = x[order].double(), y[order].double()
    kernel, noise_variance = in_units_of(targets, few, kernel, float(noise_variance))
    if method == "evidence":
        return _by_evidence(kernel, few, targets, noise_variance, 100 if steps is None else steps)
    check_count("samples", samples)
    settings = {"samples": samples, "solver": solver, "tol": tol, "seed": seed}
    return _by_paths(kernel, x, y, noise_variance, 30 if steps is None else steps, lr, rows, settings)


def log_evidence(kernel: Kernel, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """log N(y; 0, K + noise), summed over outputs; can be differentiated with respect to hyperparameters and noise."""
    A = kernel(x) + noise * torch.eye(len(x), dtype=x.dtype, device=x.device)
    L = torch.linalg.cholesky(A)
    y = y.view(len(y), -1)
    fit = torch.linalg.solve_triangular(L, y, upper=False).square().sum()
    return -0.5 * fit - y.shape[1] * (L.diagonal().log().sum() + 0.5 * len(y) * math.log(2 * math.pi))


def _by_evidence(kernel: Kernel, x: Tensor, y: Tensor, noise: float, steps: int) -> Hyperparameters:
    start, least, trace = _Logarithms(kernel, noise), LEAST_NOISE * float(y.square().mean()), list[float]()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        logs = torch.from_numpy(flat).to(x.device).requires_grad_()
        found, variance = start.at(logs)
        try:
            value = log_evidence(found, x, y, variance + least) / len(x)
        except torch.linalg.LinAlgError:  # type: ignore[reportPrivateImportUsage]
            return 1e10, np.zeros_like(flat)
        (gradient,) = torch.autograd.grad(-value, logs)
        trace.append(float(value.detach()))
        return -trace[-1], gradient.cpu().numpy()

    bounds = [(v - 12, v + 12) for v in start.flat.tolist()]
    found = optimize.minimize(
        loss, start.flat.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps}
    )
    if not trace:
        raise LinAlgError(f"K + noise of {kernel} has no Cholesky factor at the start, with a noise of {noise:.3g}; "
                          "expected a positive definite matrix. Raise noise_variance.")  # fmt: skip
    best, variance = start.at(torch.from_numpy(found.x))
    return Hyperparameters(best, float(variance) + least, trace)


def _by_paths(
    kernel: Kernel,
    x: Tensor,
    y: Tensor,
    noise: float,
    steps: int,
    lr: float,
    rows: int | None,
    settings: dict[str, Any],
) -> Hyperparameters:
    start = _Logarithms(kernel, noise)
    logs = start.flat.clone().requires_grad_()
    adam, trace = torch.optim.Adam([logs], lr=lr, maximize=True), list[float]()
    generator, warm = generator_of(settings["seed"], torch.device("cpu")), None
    least = LEAST_NOISE * float(y.square().mean())
    for _ in range(steps):
        with torch.no_grad():
            now, variance = start.at(logs)
        gp = condition(now, x, y, float(variance) + least, start=warm, **settings)
        warm = gp.solved.solution.x
        chosen = torch.arange(len(x), device="cpu")
        if rows is not None and rows < len(x):
            chosen = torch.randperm(len(x), generator=generator, device="cpu")[:rows]
        (gradient,) = torch.autograd.grad(_surrogate(start, logs, x, gp, chosen.to(x.device)), logs)
        logs.grad = gradient
        adam.step()
        trace.append(float(gradient.norm()))
    with torch.no_grad():
        best, variance = start.at(logs)
    return Hyperparameters(best, float(variance) + least, trace)


def _surrogate(start: _Logarithms, logs: Tensor, x: Tensor, gp: Any, chosen: Tensor) -> Tensor:
    """A number whose derivative is the estimate of the evidence's, per sample: tiles are differentiated one by one."""
    v, w, N = gp.weights, gp.sample_weights, len(x)
    gradient = torch.zeros_like(logs)
    for mine in chosen.split(TILE):
        for others in torch.arange(N, device=x.device).split(8 * TILE):
            found, _ = start.at(logs)
            with torch.no_grad():  # the weight of each entry of dA
                G = v[mine] @ v[others].T - w[mine] @ w[others].T * (gp.outputs / max(1, w.shape[1]))
            (g,) = torch.autograd.grad((found(x[mine], x[others]) * G).sum(), logs)
            gradient += g
    _, variance = start.at(logs)
    diagonal = v[chosen].square().sum() - w[chosen].square().sum() * (gp.outputs / max(1, w.shape[1]))
    total = (logs * gradient.detach()).sum() + variance * diagonal.to(variance)
    return total / (2 * len(chosen))


class _Logarithms:
    """A kernel's hyperparameters and the noise variance as one vector of logarithms."""

    def __init__(self, kernel: Kernel, noise: float):
        self.kernel, self.values = kernel, kernel.hyperparameters()
        parts = [v.detach().cpu().double().reshape(-1) for v in self.values.values()]
        self.flat = torch.cat([*parts, torch.tensor([noise], dtype=torch.float64)]).log()

    def at(self, logs: Tensor) -> tuple[Kernel, Tensor]:
        """The kernel and the noise variance there."""
        values, i, found = logs.exp(), 0, {}
        for name, old in self.values.items():
            found[name] = values[i : i + old.numel()].view(old.shape)
            i += old.numel()
        return self.kernel.replaced(found), values[-1]
