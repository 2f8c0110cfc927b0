"""The optimisers that are compared, each with a grid of nine settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from paraboloid import optim
from paraboloid.jobs.studies.comparing.method import Method, Setting, grid, pairs

PEERS = "pytorch_optimizer"  # the package that SOAP and Shampoo come from


def _muon(model: nn.Module, loss_fn: Any, setting: Setting) -> Any:
    """Muon for weight matrices, AdamW for everything else."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    muon = torch.optim.Muon(matrices, lr=setting["lr"], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Both(muon, torch.optim.AdamW(others, lr=setting["other"], weight_decay=0.0)) if others else muon


class Both:
    """Two optimisers of one model's parameters, as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


def _of_torch(kind: str, **fixed: Any) -> Callable[[nn.Module, Any, Setting], Any]:
    return lambda model, loss_fn, setting: getattr(torch.optim, kind)(model.parameters(), **fixed, **setting)


def _of_peers(kind: str, **fixed: Any) -> Callable[[nn.Module, Any, Setting], Any]:
    def make(model: nn.Module, loss_fn: Any, setting: Setting) -> Any:
        import pytorch_optimizer  # pyright: ignore[reportMissingImports]

        return getattr(pytorch_optimizer, kind)(model.parameters(), **fixed, **setting)

    return make


def _ours(kind: str, **fixed: Any) -> Callable[[nn.Module, Any, Setting], Any]:
    return lambda model, loss_fn, setting: getattr(optim, kind)(model, loss_fn, **fixed, **setting)


NEWTON = pairs("damping", (1.0, 0.3), (0.3, 0.3), (0.3, 3.0), (1.0, 1.0), (0.1, 1.0), (3.0, 1.0), (1.0, 0.1),
               (0.1, 10.0), (3.0, 3.0))  # fmt: skip
FISHER = pairs("damping", (0.1, 1.0), (0.1, 10.0), (0.3, 3.0), (0.3, 1.0), (1.0, 10.0), (0.1, 0.3), (0.03, 0.3),
               (0.03, 0.1), (0.1, 3.0))  # fmt: skip
CLIPPED = pairs("damping", (0.1, 0.1), (0.1, 0.03), (0.1, 1.0), (0.3, 0.1), (0.3, 1.0), (0.03, 0.1), (0.1, 0.01),
                (1.0, 1.0), (0.03, 0.03))  # fmt: skip
AS_ADAM = pairs("damping", (1e-2, 0.1), (3e-3, 0.1), (1e-2, 0.01), (3e-3, 1.0), (1e-2, 1.0), (3e-2, 0.1), (1e-3, 0.1),
                (3e-3, 0.01), (3e-2, 1.0))  # fmt: skip
AS_LONG = pairs("damping", (1.0, 0.3), (0.3, 0.3), (3.0, 0.3), (1.0, 3.0), (1.0, 1.0), (0.3, 3.0), (3.0, 3.0),
                (0.1, 0.3), (1.0, 0.1))  # fmt: skip
DIAGONAL = grid(0.3, 0.1, 1.0, 0.03, decay=(0.95, 0.5, 0.99))
STEPS = pairs("damping", (1.0, 1.0), (1.0, 0.1), (1.0, 10.0), (1.0, 0.01), (0.5, 1.0), (0.5, 0.1), (0.5, 10.0),
              (1.0, 100.0), (0.5, 0.01))  # fmt: skip
RATES = (1e-2, 3e-3, 3e-2, 1e-3)
POLAR = grid(*RATES, momentum=(0.95, 0.9, 0.8))
OFTEN: dict[str, Any] = {"factor_interval": 10, "inverse_interval": 20}
GRAFTED: dict[str, Any] = {"graft": "adam", "kl_clip": None, **OFTEN}
FREE: dict[str, Any] = {"max_iterations": 20, "warm_start": 0.9}

METHODS: dict[str, Method] = {
    "Adam": Method("first order", _of_torch("Adam"), grid(*RATES, eps=(1e-8, 1e-4, 1e-2))),
    "SGD-m": Method("first order", _of_torch("SGD", momentum=0.9),
                    grid(1e-2, 3e-2, 3e-3, 1e-3, 1e-1, 3e-1, 2e-2, 5e-3, 5e-2)),
    "AdamW": Method("first order", _of_torch("AdamW"), grid(*RATES, weight_decay=(1e-2, 1e-3, 1e-1))),
    "Muon": Method("peers", _muon, tuple({"lr": lr, "other": other} for other in (3e-3, 1e-2, 1e-3)
                                         for lr in (1e-2, 3e-2, 3e-3))),
    "SOAP": Method("peers", _of_peers("SOAP", weight_decay=0.0, precondition_frequency=10),
                   grid(*RATES, betas=((0.95, 0.95), (0.9, 0.99), (0.9, 0.9))), needs=PEERS),
    "Shampoo": Method("peers", _of_peers("ScalableShampoo", preconditioning_compute_steps=10,
                                         start_preconditioning_step=5, weight_decay=0.0),
                      grid(*RATES, betas=((0.9, 0.999), (0.9, 0.99), (0.9, 0.9))), needs=PEERS),
    "Polar": Method("ours", _ours("Polar"), POLAR),
    "KFAC": Method("ours", _ours("KFAC", kl_clip=None, **OFTEN), FISHER),
    "KFAC, clipped": Method("ours", _ours("KFAC"), CLIPPED),
    "KFAC, grafted": Method("ours", _ours("KFAC", **GRAFTED), AS_ADAM),
    "KFAC, KL factors": Method("ours", _ours("KFAC", factors="kl", **OFTEN), CLIPPED),
    "EKFAC": Method("ours", _ours("EKFAC", kl_clip=None, **OFTEN), FISHER),
    "EKFAC, clipped": Method("ours", _ours("EKFAC"), CLIPPED),
    "EKFAC, grafted": Method("ours", _ours("EKFAC", **GRAFTED), AS_ADAM),
    "EKFAC, KL factors": Method("ours", _ours("EKFAC", factors="kl", **OFTEN), CLIPPED),
    "K-BFGS": Method("ours", _ours("KBFGS", graft=None), NEWTON, calls="closure"),
    "K-BFGS(L)": Method("ours", _ours("KBFGSL", graft=None), NEWTON, calls="closure"),
    "K-BFGS, Adam's length": Method("ours", _ours("KBFGS", graft="adam"), AS_LONG, calls="closure"),
    "K-BFGS(L), Adam's length": Method("ours", _ours("KBFGSL", graft="adam"), AS_LONG, calls="closure"),
    "Diagonal, Adam's length": Method("ours", _ours("Preconditioned"), DIAGONAL),
    "Gauss-Newton": Method("ours", _ours("HessianFree", **FREE), STEPS, calls="batch", batches=5),
    "Gauss-Newton by layer": Method("ours", _ours("HessianFree", blocks="layer", **FREE), STEPS, calls="batch",
                                    batches=5),
}  # fmt: skip
