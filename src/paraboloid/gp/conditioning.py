"""From a kernel and data to a Gaussian process: the public door."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.gram import Gram
from paraboloid.gp.inputs import inputs_of, noise_of, targets_of
from paraboloid.gp.kernel import Kernel
from paraboloid.gp.prior import PriorFunctions
from paraboloid.gp.process import GaussianProcess
from paraboloid.gp.solvers import SOLVERS, Settings, Solved, solve
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.linalg.probes import generator_of
from paraboloid.linalg.row_blocks import columns_like


def condition(
    kernel: Kernel,
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
    max_memory: int | None = None,
) -> GaussianProcess:
    """The Gaussian process f ~ GP(0, kernel) given y_n = f(x_n) + e_n, e_n ~ N(0, noise_variance).

    Solves (K + noise) a = b for b = y, and for `samples` draws b = f_s(x) + e_s of prior functions with noise: what the
    mean and pathwise samples at any input are made of.

    x [N, d] (or [N]), y [N] or [N, C]; noise_variance a number or [N]
    solver      "cholesky" exact, N^3; "cg" conjugate gradients with a Nystrom preconditioner; "block" exact solves on
                random blocks; "sdd" stochastic dual descent; "sgd" stochastic gradient descent; "auto" chooses, and
                says so in `reason`.  All but the first keep memory linear in N
    samples     how many functions to draw; 0 for the mean alone
    steps       of the solver at most; None: until the relative residual is `tol` (1e-4, 3e-4 for sdd; sgd: an error of
                the function of 5e-3)
    step_size   of sdd and sgd; None: a safe one from power iterations.  One that diverges is halved, with a warning
    batch_size  rows of a step of sdd, sgd or block
    rank        of the preconditioners of cg and of sgd (0: the paper's form of it)
    features    random features of each prior function
    max_memory  bytes in which tiles of K may be kept from product to product

    Raises ValueError for shapes, types and numbers that do not fit together; `torch.linalg.LinAlgError` where K + noise
    is not positive definite.  Sources: arXiv:2306.11589, 2310.20581, 2505.13723; samples: Wilson et al. 2020.
    """
    check_choice("solver", solver, SOLVERS)
    if not isinstance(kernel, Kernel):
        raise ValueError(f"kernel is a {type(kernel).__name__}; expected one of pb.gp's kernels.")
    x, y = targets_of(y, inputs_of(x))
    noise = noise_of(noise_variance, x)
    check_count("samples", samples, least=0)
    check_count("features", features, least=2)
    settings = Settings(solver, steps, tol, step_size, batch_size, rank, seed)
    generator = generator_of(seed, x.device)
    outputs = 1 if y.dim() == 1 else y.shape[1]
    prior = PriorFunctions(kernel, samples * outputs, features, x, generator) if samples else None
    shape = samples * outputs, len(x)
    draws = torch.randn(shape, generator=generator, device=generator.device, dtype=x.dtype).to(x.device)
    return conditioned(kernel, x, y, noise, samples, settings, prior, draws, Gram(kernel, x, noise, max_memory))


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
    outputs = 1 if y.dim() == 1 else y.shape[1]
    values = x.new_empty(outputs + len(draws), len(x))
    values[:outputs] = y.view(len(y), -1).T
    if prior is not None:
        values[outputs:] = prior(x)
    shifts = torch.zeros_like(values)
    shifts[outputs:] = draws * noise.sqrt()
    generator = generator_of(settings.seed + 1, x.device)

    def root() -> Tensor:
        return kernel.features(100, x.shape[1], generator, x)(x).flatten(1)

    solved: Solved = solve(gram, columns_like(values.T), shifts.T, root, settings, start)
    for note in solved.notes:
        warnings.warn(f"solver {solved.solver!r}: {note}.", stacklevel=3)
    return GaussianProcess(kernel, x, y, noise, samples, settings, gram, prior, draws, solved)
