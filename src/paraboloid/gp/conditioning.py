"""From a kernel and data to a Gaussian process: the public door."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.gp.inducing import solve_inducing
from paraboloid.gp.inputs import check_kernel, inputs_of, noise_of, numbers, targets_of
from paraboloid.gp.kernel import Kernel
from paraboloid.gp.other_libraries import kernel_of
from paraboloid.gp.prior import PriorFunctions
from paraboloid.gp.process import GaussianProcess
from paraboloid.gp.sizes import check_fits
from paraboloid.gp.solvers import Settings, Solved, check_settings, solve
from paraboloid.linalg.operand import check_count
from paraboloid.linalg.probes import generator_of
from paraboloid.linalg.row_blocks import columns_like


def condition(
    kernel: Any,
    x: Any,
    y: Any,
    noise_variance: float | Tensor = 0.1,
    solver: str = "auto",
    samples: int = 64,
    seed: int = 0,
    *,
    steps: int | None = None,
    tol: float | None = None,
    step_size: float | None = None,
    batch_size: int | None = None,
    rank: int | None = None,
    features: int = 2048,
    start: Tensor | None = None,
    inducing: int | Any | None = None,
    max_memory: int | None = None,
) -> GaussianProcess:
    """The Gaussian process f ~ GP(0, kernel) given y_n = f(x_n) + e_n, e_n ~ N(0, noise_variance).

    Solves (K + noise) a = b for b = y, and for `samples` draws b = f_s(x) + e_s of prior functions with noise: what the
    mean and pathwise samples at any input are made of.

    kernel      of pb.gp, or one of GPyTorch or scikit-learn
    x [N, d] (or [N]), y [N] or [N, C]; noise_variance a number or [N]
    solver      "cholesky" exact, N^3; "cg" conjugate gradients with a Nystrom preconditioner; "block" exact solves on
                random blocks; "sdd" stochastic dual descent; "sgd" stochastic gradient descent; "auto" chooses, and
                says so in `reason`.  All but the first keep memory linear in N
    samples     how many functions to draw; 0 for the mean alone
    steps       of the solver at most; None: until the relative residual is `tol` (1e-4, 3e-4 for sdd; sgd: an error of
                the function of 1e-3)
    step_size   of sdd and sgd; None: a safe one from power iterations.  One that diverges is halved, with a warning
    batch_size  rows of a step of sdd, sgd or block
    rank        of the preconditioners of cg and of sgd (0: the paper's form of it)
    features    random features of each prior function
    start       where iterations start: the `solved.solution.x` of a process that is near, [N, outputs (1 + samples)]
    inducing    M, or inputs [M, d]: weights at these alone, N M^2 operations by one solver of their own
    max_memory  bytes in which tiles of K may be kept from product to product

    Raises ValueError for shapes, types and numbers that do not fit together; `torch.linalg.LinAlgError` where K + noise
    is not positive definite.  Sources: arXiv:2306.11589, 2310.20581, 2505.13723; samples: Wilson et al. 2020.
    """
    settings = Settings(solver, steps, tol, step_size, batch_size, rank, seed)
    check_settings(settings)
    kernel = kernel_of(kernel)
    x, y = targets_of(y, inputs_of(x))
    check_kernel(kernel, x)
    noise = noise_of(noise_variance, x)
    check_count("samples", samples, least=0)
    check_count("features", features, least=2)
    if max_memory is not None and not (isinstance(max_memory, int | float) and max_memory >= 0):
        raise ValueError(f"max_memory is {max_memory!r}; expected a number of bytes, or None.")
    generator = generator_of(seed, x.device)
    outputs = 1 if y.dim() == 1 else y.shape[1]
    if not isinstance(inducing, int | None):
        inducing = inputs_of(inducing, x, "inducing")
    few = len(inducing) if isinstance(inducing, Tensor) else inducing
    check_fits(x, samples * outputs, outputs, features, rank or 0, few)
    prior = PriorFunctions(kernel, samples * outputs, features, x, generator) if samples else None
    shape = samples * outputs, len(x)
    draws = torch.randn(shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    if start is not None:
        start = numbers("start", start)
        start = start if start.is_complex() else start.to(x)
        if start.is_complex() or start.shape != (len(x), outputs * (1 + samples)) or not bool(start.isfinite().all()):
            raise ValueError(f"start has shape {tuple(start.shape)}; expected {(len(x), outputs * (1 + samples))}, "
                             "finite: a column for each output and each sample of it.")  # fmt: skip
    if inducing is not None:
        if solver != "auto":
            raise ValueError(f"solver is {solver!r} and inducing is given; expected solver='auto': inducing inputs "
                             "have a solver of their own.")  # fmt: skip
        values, shifts = right_hand_sides(x, y, noise, prior, draws)
        gram, solved = solve_inducing(kernel, x, (values + shifts).T, noise, inducing, seed)
        return GaussianProcess(kernel, x, y, noise, samples, settings, gram, prior, draws, solved, append)
    return conditioned(kernel, x, y, noise, samples, settings, prior, draws, Gram(kernel, x, noise, max_memory), start)


def conditioned(
    kernel: Kernel,
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    samples: int,
    settings: Settings,
    prior: PriorFunctions | None,
    draws: Tensor,
    gram: Gram,
    start: Tensor | None = None,
) -> GaussianProcess:
    """The same from checked parts, with a start for the iteration."""
    values, shifts = right_hand_sides(x, y, noise, prior, draws)
    generator = generator_of(settings.seed + 1, x.device)

    def root() -> Tensor:
        return kernel.features(100, x.shape[1], generator, x)(x).flatten(1)

    solved: Solved = solve(gram, columns_like(values.T), shifts.T, root, settings, start)
    for note in solved.notes:
        warnings.warn(f"solver {solved.solver!r}: {note}.", stacklevel=3)
    return GaussianProcess(kernel, x, y, noise, samples, settings, gram, prior, draws, solved, append)


def append(gp: GaussianProcess, x: Any, y: Any, noise_variance: float | Tensor | None) -> GaussianProcess:
    """What `GaussianProcess.append` says."""
    if gp.solver == "inducing":
        raise ValueError("a process of inducing inputs takes no more data; condition again with all of it.")
    new = inputs_of(x, gp.x)
    _, y = targets_of(y, new)
    y = y.to(gp.y.dtype)
    if y.shape[1:] != gp.y.shape[1:]:
        raise ValueError(f"y has shape {tuple(y.shape)}; expected {(len(new), *gp.y.shape[1:])}: as many outputs as "
                         "before.")  # fmt: skip
    noise = _noise(gp, new, noise_variance)
    every, targets = torch.cat([gp.x, new]), torch.cat([gp.y, y])
    old, N = len(gp.x), len(every)
    generator = generator_of(gp.settings.seed + N, gp.x.device)
    shape = len(gp.noise_draws), len(new)
    fresh = torch.randn(shape, generator=generator, device=generator.device, dtype=gp.x.dtype).to(gp.x.device)
    start = gp.x.new_zeros(gp.solved.solution.x.shape[1], N)
    start[:, :old] = gp.solved.solution.x.T
    gram = Gram(gp.kernel, every, noise, gp.gram.max_memory, gp.gram.shift)
    gram.take_over(gp.gram)
    draws = torch.cat([gp.noise_draws, fresh], 1)
    return conditioned(gp.kernel, every, targets, noise, gp.samples, gp.settings, gp.prior, draws, gram, start.T)


def _noise(gp: GaussianProcess, new: Tensor, noise_variance: float | Tensor | None) -> Tensor:
    if noise_variance is None:
        if gp.noise_variance.dim():
            raise ValueError("noise_variance of the old data has one entry for each input; give that of the new data.")
        return gp.noise_variance
    more = noise_of(noise_variance, new)
    if gp.noise_variance.dim() == 0 and more.dim() == 0 and bool(more == gp.noise_variance):
        return more
    return torch.cat([gp.noise_variance.expand(len(gp.x)), more.expand(len(new))])


def right_hand_sides(
    x: Tensor, y: Tensor, noise: Tensor, prior: PriorFunctions | None, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Function values and noise that the systems are solved for, [outputs + samples outputs, N] each: y and 0, f_s(x)
    and noise^1/2 draws."""
    outputs = 1 if y.dim() == 1 else y.shape[1]
    values = x.new_empty(outputs + len(draws), len(x))
    values[:outputs] = y.view(len(y), -1).T
    if prior is not None:
        values[outputs:] = prior(x)
    shifts = torch.zeros_like(values)
    shifts[outputs:] = draws * noise.sqrt()
    return values, shifts
