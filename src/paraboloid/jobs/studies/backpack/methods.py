"""The optimisers of BackPACK's second experiment with their grids, and the quantities of its first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from paraboloid.jobs.studies.comparing.method import Method, Setting, grid, pairs
from paraboloid.optim import Preconditioned

QUANTITIES = ("grad", "square_norms", "second_moment", "variance", "sample_grads", "diag_ggn_mc", "diag_ggn", "kfac",
              "kflr", "kfra")  # fmt: skip
MONTE_CARLO, EXACT = ("diag_ggn_mc", "kfac"), ("diag_ggn", "kflr")


def _preconditioned(curvature: str) -> Callable[[nn.Module, Any, Setting], Any]:
    return lambda model, loss_fn, setting: Preconditioned(model, loss_fn, curvature=curvature, **setting)


# Of the paper's grid, {1e-4, ..., 1} for the learning rate and {1e-4, ..., 10} for the damping.
GRID = pairs("damping", (0.1, 0.1), (0.01, 0.01), (0.1, 1.0), (0.01, 0.1), (1.0, 1.0), (0.01, 1e-3), (1.0, 10.0),
             (0.001, 0.01), (0.001, 1e-4))  # fmt: skip
METHODS: dict[str, Method] = {
    "SGD-m": Method("first order", lambda m, _, s: torch.optim.SGD(m.parameters(), momentum=0.9, **s),
                    grid(1e-2, 1e-1, 1e-3, 3e-2, 3e-3, 3e-1, 1e-4, 1.0, 3e-4)),
    "Adam": Method("first order", lambda m, _, s: torch.optim.Adam(m.parameters(), **s),
                   grid(1e-3, 1e-2, 3e-3, 1e-4, 3e-4, 3e-2, 1e-1, 3e-5, 1e-5)),
    "DiagGGN": Method("ours", _preconditioned("diag_ggn"), GRID),
    "DiagGGN, Monte Carlo": Method("ours", _preconditioned("diag_ggn_mc"), GRID),
    "KFAC": Method("ours", _preconditioned("kfac"), GRID),
    "KFLR": Method("ours", _preconditioned("kflr"), GRID),
    "KFRA": Method("ours", _preconditioned("kfra"), GRID),
}  # fmt: skip
CURVATURE = {"DiagGGN": "diag_ggn", "DiagGGN, Monte Carlo": "diag_ggn_mc", "KFAC": "kfac", "KFLR": "kflr",
             "KFRA": "kfra"}  # fmt: skip
DIAGONAL, KRONECKER = ("DiagGGN", "DiagGGN, Monte Carlo"), ("KFAC", "KFLR", "KFRA")
