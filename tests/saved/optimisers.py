"""Optimisers to save in the middle of a run, and the steps that they go on with once they are loaded again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from saved import settings
from torch import Tensor

import paraboloid as pb

BEFORE, AFTER = 4, 3  # steps before the state is taken, and after
KFAC = {"lr": 0.05, "damping": 0.02, "factor_interval": 2, "inverse_interval": 3, "seed": 3, "kl_clip": None}
Options = dict[str, Any]


def with_options(kind: str, **fixed: Any) -> Callable[[settings.Setting, Options], Any]:
    def make(s: settings.Setting, options: Options) -> Any:
        return getattr(pb.optim, kind)(s.model, s.loss_fn, **fixed | options)

    return make


def in_groups(s: settings.Setting, options: Options) -> Any:
    """Two groups with options of their own."""
    groups = [{"params": list(s.model[0].parameters()), "lr": 0.02, "damping": 0.1},
              {"params": list(s.model[2].parameters()), "weight_decay": 0.1}]  # fmt: skip
    return pb.optim.KFAC(s.model, s.loss_fn, **KFAC | {"params": groups, "nesterov": True} | options)


def kfac(**options: Any) -> Callable[[settings.Setting, Options], Any]:
    return with_options("KFAC", **KFAC | options)


def ekfac(**options: Any) -> Callable[[settings.Setting, Options], Any]:
    return with_options("EKFAC", **KFAC | options)


def preconditioned(curvature: str, **options: Any) -> Callable[[settings.Setting, Options], Any]:
    fixed = {"curvature": curvature, "lr": 0.05, "damping": 0.05, "momentum": 0.5, "seed": 3}
    return with_options("Preconditioned", **fixed | options)


CURVATURES = ("diag_ggn", "diag_ggn_mc", "diag_hessian", "second_moment", "variance", "kfac", "kflr", "kfac_empirical",
              "kfra")  # fmt: skip
# name -> setting, how it is made
CASES: dict[str, tuple[str, Callable[[settings.Setting, Options], Any]]] = {
    "KFAC": ("classes", kfac()),
    "KFAC, exact inverses": ("regression", kfac(split=None, fisher="exact", weight_decay=0.01)),
    "KFAC, halves": ("classes", kfac(measure_on="half", momentum=0.0)),
    "KFAC, adapted": ("classes", kfac(adapt_damping=True, damping_interval=2, reject=True, momentum=0.5)),
    "KFAC, quadratic": ("classes", kfac(step_size="quadratic", factor_interval=1, lr=1.0)),
    "KFAC, grafted": ("classes", kfac(graft="adam", kl_clip=1e-3, decoupled=True, weight_decay=0.1)),
    "KFAC of images": ("images", kfac(samples=2)),
    "KFAC of words": ("words", kfac(sharing="reduce")),
    "KFAC, weight norm": ("normed", kfac()),
    "KFAC, groups": ("classes", in_groups),
    "KFAC, float32": ("classes", kfac()),
    "EKFAC": ("classes", ekfac()),
    "EKFAC of images": ("images", ekfac(fisher="exact")),
    "EKFAC, weight norm": ("normed", ekfac(fisher="empirical")),
    "EKFAC, halves": ("classes", ekfac(measure_on="half")),
    **{f"Preconditioned, {c}": ("classes", preconditioned(c)) for c in CURVATURES},
    "Preconditioned, averaged": ("images", preconditioned("diag_ggn_mc", decay=0.9, weight_decay=0.01)),
    "Preconditioned, weight norm": ("normed", preconditioned("kfac", decay=0.5)),
    "KBFGS": ("classes", with_options("KBFGS")),
    "KBFGS, not warm": ("classes", with_options("KBFGS", lr=0.1, decay=0.5)),
    "KBFGS of images": ("images", with_options("KBFGS", lr=0.1, damping=1.0)),
    "KBFGSL": ("classes", with_options("KBFGSL", memory=2)),
    "KBFGSL, memory left": ("classes", with_options("KBFGSL", lr=0.1)),
    "HessianFree": ("classes", with_options("HessianFree", judge=False, max_iterations=5)),
    "HessianFree, Hessian": ("classes", with_options("HessianFree", judge=False, curvature="hessian", max_iterations=5,
                                                     preconditioner="second_moment", warm_start=0.9)),
    "HessianFree, debiased": ("classes", with_options("HessianFree", judge=False, debias=True, max_iterations=5)),
    "HessianFree, Fisher": ("dropout", with_options("HessianFree", judge=False, curvature="fisher", max_iterations=5, seed=3)),
}  # fmt: skip


def setting_of(name: str) -> settings.Setting:
    s = settings.load(CASES[name][0], torch.float32 if "float32" in name else settings.F64)
    s.model.train("Fisher" in name)  # whose network drops units
    return s


def begin(name: str) -> tuple[settings.Setting, Any]:
    """An optimiser before its first step."""
    s = setting_of(name)
    opt = CASES[name][1](s, {})
    if isinstance(opt, pb.optim.KBFGS) and "not warm" not in name:
        opt.warm_start(s.batches())
    return s, opt


def resumed(name: str, state: dict[str, Any], parameters: dict[str, Tensor]) -> tuple[settings.Setting, Any]:
    """The same optimiser made anew at the saved state and parameters, with another seed where the state has a
    generator in use."""
    s = setting_of(name)
    s.model.load_state_dict(parameters)
    opt = CASES[name][1](s, {} if name.startswith(("KBFGS", "HessianFree")) else {"seed": 77})
    opt.load_state_dict(state)
    return s, opt


def steps(s: settings.Setting, opt: Any, first: int, count: int) -> Tensor:
    """The model's parameters after each of `count` steps, [count, D]; the batches in turn, from step `first` on."""
    batches, found = s.batches(len(s.x) // 2), []
    for t in range(first, first + count):
        x, y = batches[t % 2]
        step(s, opt, x, y)
        found.append(torch.cat([p.detach().flatten() for p in s.model.parameters()]))
    return torch.stack(found)


def step(s: settings.Setting, opt: Any, x: Tensor, y: Tensor) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = s.loss_fn(s.model(x), y)
        loss.backward()
        return loss

    if isinstance(opt, pb.optim.HessianFree):
        opt.step((x, y))
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "KBFGS was not warmed up")
        opt.step(closure)
