"""python -m benchmarks.noise: what a pass of gradient clustering costs, against an epoch of plain gradients."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import Table, compare, write
from paraboloid import problems
from paraboloid.data.batches import take


def digits_cnn() -> tuple[nn.Module, TensorDataset]:
    problem = problems.load("digits-cnn")
    assert isinstance(problem.train, TensorDataset)
    return problem.model, problem.train


def net_3c3d(samples: int = 512) -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    return nets.net_3c3d(), TensorDataset(torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,)))


NETS = {"digits-cnn": (digits_cnn, 256), "3c3d": (net_3c3d, 128)}
LOSS = nn.CrossEntropyLoss()


def epoch(model: nn.Module, data: TensorDataset, size: int) -> None:
    """The gradient of every batch in turn."""
    parameters, device = list(model.parameters()), torch.device("cpu")
    for indices in torch.randperm(len(data)).split(size):
        x, y = take(data, indices, device)
        torch.autograd.grad(LOSS(model(x), y), parameters)


def table(name: str, clusters: list[int], budget: float) -> Table:
    build, size = NETS[name]
    model, data = build()
    rows = {}
    for K in clusters:
        for update in ("singular", "mean"):
            fitted = pb.noise.GradientClustering(model, LOSS, K, update=update)
            rows[f"{K} clusters, {update} update"] = {
                "one pass": lambda fitted=fitted: fitted.fit(data, batch_size=size, passes=1)
            }
    title = f"{name}, {len(data)} samples in batches of {size}"
    result = compare(title, lambda: epoch(model, data, size), rows, budget)
    result.reference = "one epoch of plain gradients"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--clusters", nargs="+", type=int, default=[10, 128])
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write([table(name, options.clusters, options.budget) for name in options.nets], options.out, "noise")


if __name__ == "__main__":
    main()
