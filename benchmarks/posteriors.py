"""python -m benchmarks.posteriors: fit and predict Laplace posteriors, against plain gradients and forward passes.

Fitting is counted in epochs of plain gradients over the same batches, and predicting 1000 points in forward passes of
the same points.  Peak memory of fit and prediction is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.harness import Table, compare, write
from benchmarks.peers import installed, laplace_torch
from paraboloid import problems

NETS = ("digits-mlp", "digits-cnn")
BATCH, POINTS = 64, 1000  # the batches with which these problems are trained
KINDS: dict[str, dict[str, Any]] = {
    "diag": {"structure": "diag"},
    "kron": {"structure": "kron"},
    "kron, last layer": {"structure": "kron", "weights": "last_layer"},
    "lowrank 10": {"structure": "lowrank", "rank": 10},
    "functional, 200 samples": {"structure": "functional", "subset": 200},
}
PACKAGES = {"laplace-torch, curvlinops": "curvlinops", "laplace-torch, BackPACK": "backpack"}  # and their backends
Batches = list[tuple[Tensor, Tensor]]
LOSS = nn.CrossEntropyLoss()


def make(net: str) -> tuple[nn.Module, Batches, Tensor]:
    """An untrained network, its training data in batches, and 1000 points."""
    torch.manual_seed(0)
    problem = problems.load(net)
    x, y = problem.train.tensors  # type: ignore[attr-defined]
    return problem.model.eval(), list(zip(x.split(BATCH), y.split(BATCH), strict=True)), x[:POINTS]


def fitted(package: str, model: nn.Module, data: Batches, kind: str) -> Any:
    if package == "paraboloid":
        return pb.laplace(model, LOSS, data, **KINDS[kind])
    return laplace_torch(model, data, kind, PACKAGES[package])


def predicted(package: str, posterior: Any, x: Tensor) -> Tensor:
    """Class probabilities by the probit approximation."""
    return posterior.predict(x, "probit") if package == "paraboloid" else posterior(x, link_approx="probit")


def epoch(model: nn.Module, data: Batches) -> None:
    parameters = list(model.parameters())
    for x, y in data:
        torch.autograd.grad(LOSS(model(x), y), parameters)


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def tables(net: str, packages: list[str], budget: float) -> list[Table]:
    model, data, x = make(net)
    fits: dict[str, dict[str, Callable[[], object]]] = {}
    predictions: dict[str, dict[str, Callable[[], object]]] = {}
    for kind in KINDS:
        fits[kind], predictions[kind] = {}, {}
        for package in packages:
            fits[kind][package] = lambda p=package, k=kind: fitted(p, model, data, k)
            predictions[kind][package] = prediction(package, model, data, kind, x)
    fitting = compare(f"{net}: fit", lambda: epoch(model, data), fits, budget)
    fitting.reference = "one epoch of plain gradients"
    predicting = compare(f"{net}: predict {POINTS} points", lambda: forward(model, x), predictions, budget)
    predicting.reference = f"one forward pass of {POINTS} points"
    return [fitting, predicting]


def prediction(package: str, model: nn.Module, data: Batches, kind: str, x: Tensor) -> Callable[[], Tensor]:
    """Predict with a posterior that the first call fits, so that a package's refusal is met where it is reported."""
    made: list[Any] = []

    def run() -> Tensor:
        if not made:
            made.append(fitted(package, model, data, kind))
        return predicted(package, made[0], x)

    return run


def measure(package: str, net: str, kind: str) -> float:
    """MB that a fit and a prediction add to this process's peak."""
    torch.set_num_threads(1)
    installed("laplace")  # imported before, so that its code does not count
    model, data, x = make(net)
    epoch(model, data)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    predicted(package, fitted(package, model, data, kind), x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024


def elsewhere(package: str, net: str, kind: str) -> float | None:
    """The same in a fresh process; None where the package does not offer it, or fails."""
    command = [sys.executable, "-m", "benchmarks.posteriors", "--one", package, net, kind]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return None
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def write_memory(nets: list[str], packages: list[str], folder: Path) -> None:
    record = {n: {k: {p: elsewhere(p, n, k) for p in packages} for k in KINDS} for n in nets}
    (folder / "posteriors-memory.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    everyone = ["paraboloid", *(PACKAGES if installed("laplace") else [])]
    parser.add_argument("--packages", nargs="+", default=everyone, choices=["paraboloid", *PACKAGES])
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=3, metavar=("PACKAGE", "NET", "KIND"), help="peak memory in this process")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.one:
        print(measure(*options.one))
        return
    torch.set_num_threads(options.threads)
    if options.memory:  # alone: a process starts with the peak of the one that started it
        write_memory(options.nets, options.packages, options.out)
        return
    write([t for net in options.nets for t in tables(net, options.packages, options.budget)], options.out, "posteriors")


if __name__ == "__main__":
    main()
