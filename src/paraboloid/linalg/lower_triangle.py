"""Products with a symmetric matrix by its lower triangle: half as much is read as of a whole matrix."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from scipy.linalg import blas
from threadpoolctl import ThreadpoolController
from torch import Tensor

ONE_AT_A_TIME = threading.Lock()  # how many threads BLAS takes belongs to the process
KERNELS = {torch.float32: blas.ssymv, torch.float64: blas.dsymv}  # type: ignore[reportAttributeAccessIssue]


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is such a product: on the CPU, float32 or float64."""
    return device.type == "cpu" and dtype in KERNELS


def product(A: Tensor, v: Tensor) -> Tensor:
    """A @ v for contiguous A [N, N] by its lower triangle (what lies above is not looked at) and v [N], on one thread.

    Memory limits such a product, and each entry is read once for both of its places.
    """
    with ONE_AT_A_TIME, _threads().limit(limits=1, user_api="blas"):
        out = KERNELS[A.dtype](
            1.0, A.numpy().T, v.detach().contiguous().numpy(), lower=0
        )  # columns first, so transposed
    return torch.from_numpy(out)


@cache
def _threads() -> Any:
    return ThreadpoolController()
