"""Whether a kernel is positive definite where that can be seen cheaply: on a random block of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import LinAlgError

LOOKED_AT = 200  # inputs of the block


def check_definite(K: Any, noise: Tensor | float, generator: torch.Generator, count: int = LOOKED_AT) -> None:
    """LinAlgError where a random block of K + noise is not positive definite, for solvers that would find a solution
    all the same.  K with blocks, without the noise; noise a number or [N]."""
    I = torch.randperm(K.shape[0], generator=generator, device=generator.device)[:count].to(K.device)
    block = K.block(I, I)
    block.diagonal().add_(noise[I] if isinstance(noise, Tensor) and noise.dim() else noise)
    if torch.linalg.cholesky_ex(block).info:
        least = float(torch.linalg.eigvalsh(block.double())[0])
        raise LinAlgError(f"a block of {len(I)} rows of K + noise has the eigenvalue {least:.4g}; expected a positive "
                          "definite matrix. Raise noise_variance, or use float64.")  # fmt: skip
