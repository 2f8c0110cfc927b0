"""python -m benchmarks.cuda: what everything costs on a CUDA device, in gradients, with BackPACK where it is installed.

The statistics of `benchmarks.statistics`, curvature operators, and Laplace posteriors (a fit in gradients over the same
batches, a prediction in forward passes), with the peak of the device's memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import Table, compare, machine, seconds, write
from benchmarks.peers import backpack
from benchmarks.statistics import QUANTITIES, SETTLED
from paraboloid.problems import networks

STATISTICS = {
    "mlp": [128, 1024],
    "3c3d": [128, 1024],
    "allcnnc": [32, 128],
    "transformer": [256],
    "cifar resnet18": [128],
}
OPERATORS = {"3c3d": 128, "cifar resnet18": 128}
TOO_MANY_PULLS = {"allcnnc": {"diag_hessian"}, "transformer": {"diag_hessian"}, "cifar resnet18": {"diag_hessian"}}
LOSS, DAMPING, BATCHES = nn.CrossEntropyLoss(), 1e-3, 4


def make(net: str, batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor, Callable[[], object]]:
    """(model in evaluation, inputs, targets, its gradient) on the device."""
    if net == "cifar resnet18":  # 3x32x32, 10 classes
        torch.manual_seed(0)
        model, x, y = networks.resnet18(10), torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
    else:
        model, x, y = nets.make(net, batch)
    model, x, y = model.cuda().eval(), x.cuda(), y.cuda()
    return model, x, y, lambda: torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))


def statistics(net: str, batch: int, budget: float) -> Table:
    model, x, y, gradient = make(net, batch)
    for _ in range(SETTLED):
        pb.statistics(model, LOSS, (x, y), ["grad"])
    theirs = backpack(model, x, y)
    rows: dict[str, dict[str, Callable[[], object]]] = {}
    for name, wanted in QUANTITIES.items():
        if name not in TOO_MANY_PULLS.get(net, ()):
            rows[name] = {"paraboloid": lambda wanted=wanted: pb.statistics(model, LOSS, (x, y), wanted)}
            rows[name] |= {"BackPACK": theirs[name]} if name in theirs else {}
    return compare(f"{net}, batch {batch}", gradient, rows, budget)


def operators(net: str, batch: int, budget: float) -> Table:
    model, x, y, gradient = make(net, batch)
    G, H = pb.GGN(model, LOSS, (x, y)), pb.Hessian(model, LOSS, (x, y))
    v = torch.randn(G.shape[0], device="cuda")
    rows: dict[str, Callable[[], object]] = {
        "GGN @ v": lambda: G @ v, "Hessian @ v": lambda: H @ v,
        "KFAC": lambda: pb.KFAC(model, LOSS, (x, y)),
        "KFAC, with its inverse": lambda: pb.KFAC(model, LOSS, (x, y)).inverse(DAMPING),
        "EKFAC, with its inverse": lambda: pb.EKFAC(model, LOSS, (x, y)).inverse(DAMPING),
    }  # fmt: skip
    return compare(
        f"{net}, batch {batch}: operators", gradient, {k: {"paraboloid": r} for k, r in rows.items()}, budget
    )


def posteriors(net: str, batch: int) -> dict[str, Any]:
    """Seconds and multiples, and GiB of the device."""
    model, x, y, gradient = make(net, batch)
    data, found = [(x, y)] * BATCHES, {}
    epoch, forward = BATCHES * min(seconds(gradient) for _ in range(5)), 0.0
    with torch.no_grad():
        forward = min(seconds(lambda: model(x)) for _ in range(5))
    for structure, weights in (("diag", "all"), ("kron", "all"), ("kron", "last_layer")):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        made = []
        fits = [seconds(lambda: made.append(pb.laplace(model, LOSS, data, structure, weights))) for _ in range(3)]  # noqa: B023
        times = [seconds(lambda: made[-1].predict(x)) for _ in range(3)]  # noqa: B023
        found[f"{structure}, {weights}"] = {
            "fit, epochs": min(fits) / epoch, "predict, forwards": min(times) / forward, "fit, s": min(fits),
            "peak GiB": (torch.cuda.max_memory_allocated() - held) / 2**30,
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "benchmarks.cuda needs a CUDA device; torch.cuda.is_available() is False.\n")
    tables = [operators(net, batch, args.budget) for net, batch in OPERATORS.items()]
    tables += [statistics(net, batch, args.budget) for net, batches in STATISTICS.items() for batch in batches]
    write(tables, args.out, "cuda")
    fitted = {f"{net}, batch {batch}": posteriors(net, batch) for net, batch in OPERATORS.items()}
    (args.out / "cuda-posteriors.json").write_text(json.dumps({"machine": machine(), **fitted}, indent=1) + "\n")
    print(json.dumps(fitted, indent=1))


if __name__ == "__main__":
    main()
