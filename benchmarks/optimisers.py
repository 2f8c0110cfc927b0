"""python -m benchmarks.optimisers: what a step costs, in multiples of an Adam step, and what state it keeps.

Every round takes one step of each optimiser on the same batch, gradient included, next to Adam's.  An optimiser that
renews its inverses every 100 steps does so once in 100 rounds, so what is reported is the mean over the rounds, with
the median step beside it, which hides the renewals.  Optimisers are first taken to where their intervals are regular.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import machine, seconds

SETTLED = 200  # steps that the optimisers believe to have taken: past the early renewals, and due for one


def autoencoder(sizes: list[int]) -> nn.Module:
    """ReLU between the layers, but a linear code and output."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i not in (len(sizes) // 2 - 1, len(sizes) - 2):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _codes(sizes: list[int], batch: int) -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    torch.manual_seed(0)
    x = torch.rand(batch, sizes[0])
    return autoencoder(sizes), x, x, nn.BCEWithLogitsLoss()


def _3c3d() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    return (*nets.make("3c3d", 64), nn.CrossEntropyLoss())


DIGITS, CURVES = [64, 48, 24, 8], [784, 400, 200, 100, 50, 25, 6]
PROBLEMS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor, nn.Module]]] = {
    "digits autoencoder, batch 100": lambda: _codes([*DIGITS, *DIGITS[-2::-1]], 100),
    "CURVES autoencoder, batch 1000": lambda: _codes([*CURVES, *CURVES[-2::-1]], 1000),
    "3c3d, batch 64": _3c3d,
}
OPTIMISERS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "Adam": lambda m, loss: torch.optim.Adam(m.parameters(), 1e-5),
    "KFAC": lambda m, loss: pb.optim.KFAC(m, loss, lr=1e-5, damping=1e-2),
    "EKFAC": lambda m, loss: pb.optim.EKFAC(m, loss, lr=1e-5, damping=1e-2),
    "KBFGS": lambda m, loss: pb.optim.KBFGS(m, loss, lr=1e-5),
    "KBFGSL": lambda m, loss: pb.optim.KBFGSL(m, loss, lr=1e-5),
    "diag_ggn_mc": lambda m, loss: pb.optim.Preconditioned(m, loss, lr=1e-5),
}


def stepper(model: nn.Module, loss_fn: nn.Module, opt: Any, x: Tensor, y: Tensor) -> Callable[[], object]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    def plain() -> None:
        closure()
        opt.step()

    return (lambda: opt.step(closure)) if isinstance(opt, pb.optim.KBFGS) else plain


def state_numbers(opt: Any) -> int:
    """Numbers kept between steps."""
    found = []

    def count(tree: Any) -> None:
        if isinstance(tree, Tensor):
            found.append(tree.numel())
        elif isinstance(tree, dict):
            for value in tree.values():
                count(value)
        elif isinstance(tree, list | tuple):
            for value in tree:
                count(value)

    count(opt.state_dict()["state"])
    count(opt.state_dict().get("paraboloid", {}))
    return sum(found)


def measure(title: str, rounds: int) -> dict[str, Any]:
    model, x, y, loss_fn = PROBLEMS[title]()
    runs, opts = {}, {}
    for name, make in OPTIMISERS.items():
        own = copy.deepcopy(model)
        opts[name] = make(own, loss_fn)
        if isinstance(opts[name], pb.optim.KBFGS):
            opts[name].warm_start([(x, y)])
        runs[name] = stepper(own, loss_fn, opts[name], x, y)
        for _ in range(3):
            runs[name]()
        if isinstance(opts[name], pb.optim.KFAC):
            opts[name].counters["steps"] = SETTLED
    for _ in range(100):  # a full memory of K-BFGS(L)
        runs["KBFGSL"]()
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(seconds(run))
    finally:
        gc.enable()
    adam, parameters = times["Adam"], sum(p.numel() for p in model.parameters())
    rows = {
        name: {"mean": statistics.fmean(values) / statistics.fmean(adam),
               "median": statistics.median(v / a for v, a in zip(values, adam, strict=True)),
               "state": state_numbers(opts[name]) / parameters}
        for name, values in times.items()
    }  # fmt: skip
    return {
        "title": title,
        "adam_ms": 1e3 * statistics.median(adam),
        "floors": floors(model, x, y, loss_fn, adam),
        "rows": rows,
    }


@torch.no_grad()
def floors(model: nn.Module, x: Tensor, y: Tensor, loss_fn: nn.Module, adam: list[float]) -> dict[str, float]:
    """What no implementation of the method saves, in Adam steps: each piece timed alone.

    gradient        forward and backward pass
    two products    left^-1 G right^-1 of every weight (KFAC; K-BFGS), four products (EKFAC)
    input factors   A of every layer (K-BFGS, each step)
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    matrices = [p.detach().flatten(1) for p in weights]
    sides = [(torch.randn(len(W), len(W)), torch.randn(W.shape[1], W.shape[1])) for W in matrices]
    with torch.enable_grad():
        gradient = [
            seconds(lambda: torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))) for _ in range(9)
        ]
    two = [seconds(lambda: [L @ W @ R for W, (L, R) in zip(matrices, sides, strict=True)]) for _ in range(9)]
    inputs: list[Tensor] = []
    handles = [
        m.register_forward_pre_hook(lambda m, args: inputs.append(rows(m, args[0])))
        for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]  # fmt: skip
    model(x)
    for handle in handles:
        handle.remove()
    A = [seconds(lambda: [a.T @ a for a in inputs]) for _ in range(5)]
    base, median = statistics.median(adam), statistics.median
    return {"gradient": median(gradient) / base, "two products": median(two) / base, "input factors": median(A) / base}


def rows(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs as [N T, q]; images unfolded."""
    if isinstance(module, nn.Conv2d):
        padding = module.padding if isinstance(module.padding, tuple) else tuple(k // 2 for k in module.kernel_size)
        return F.unfold(x, module.kernel_size, padding=padding, stride=module.stride).mT.flatten(0, 1)
    return x.flatten(0, -2)


def markdown(tables: list[dict[str, Any]]) -> str:
    lines = [", ".join(f"{k} {v}" for k, v in machine().items()), ""]
    for t in tables:
        lines += [
            f"### {t['title']}", "",
            f"Multiples of an Adam step ({t['adam_ms']:.2f} ms here), gradient included; state: numbers per parameter.",
            "", "| | mean | median step | state |", "|---|---|---|---|",
        ]  # fmt: skip
        lines += [f"| {n} | {r['mean']:.2f} | {r['median']:.2f} | {r['state']:.1f} |" for n, r in t["rows"].items()]
        lines += ["", "Alone: " + ", ".join(f"{k} {v:.2f}" for k, v in t["floors"].items()) + ".", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--rounds", type=int, default=100, help="a multiple of the 100 steps between renewals")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = []
    for title in args.problems:
        tables.append(measure(title, args.rounds))
        print(markdown(tables[-1:]), file=sys.stderr, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "optimisers.md").write_text(markdown(tables))
    (args.out / "optimisers.json").write_text(json.dumps({"machine": machine(), "tables": tables}, indent=1) + "\n")


if __name__ == "__main__":
    main()
