"""python -m benchmarks.scaling: does the cost grow linearly with the samples N and the vectors V?

Times quantities on 3c3d for growing batches, and exact roots with growing numbers of columns on an MLP with growing
numbers of classes; fits time = c N^e by least squares in logarithms and prints the exponents e (1 is linear).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from torch import nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import machine, seconds

BATCHES = [16, 32, 64, 128, 256]
CLASSES = [6, 11, 21, 41]
QUANTITIES = ["sample_grads", "square_norms", "variance", "diag_ggn_mc", "kfac"]
ROOTS = ["diag_ggn", "kflr"]


def exponent(sizes: list[int], times: list[float]) -> float:
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    return statistics.linear_regression(x, y).slope


def median_times(runs: list, rounds: int) -> list[float]:
    """Interleaved, so that a slow moment of the machine falls on all sizes alike."""
    for run in runs:
        seconds(run)
        seconds(run)
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def over_samples(rounds: int) -> list[dict]:
    rows = []
    loss_fn = nn.CrossEntropyLoss()
    batches = [nets.make("3c3d", n) for n in BATCHES]

    def gradient(model, x, y):
        return lambda: torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))

    def quantity(name, model, x, y):
        return lambda: pb.statistics(model, loss_fn, (x, y), name)

    for name in ["gradient", *QUANTITIES]:
        runs = [gradient(*b) if name == "gradient" else quantity(name, *b) for b in batches]
        times = median_times(runs, rounds)
        rows.append({"quantity": name, "N": BATCHES, "seconds": times, "exponent": exponent(BATCHES, times)})
    return rows


def over_vectors(rounds: int) -> list[dict]:
    rows = []
    loss_fn = nn.CrossEntropyLoss()
    for name in ROOTS:
        runs = []
        for classes in CLASSES:
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 300), nn.ReLU(), nn.Linear(300, classes)
            )
            x, y = torch.rand(128, 784), torch.randint(classes, (128,))
            runs.append(lambda m=model, x=x, y=y, name=name: pb.statistics(m, loss_fn, (x, y), name))
        times = median_times(runs, rounds)
        columns = [c - 1 for c in CLASSES]
        rows.append({"quantity": name, "V": columns, "seconds": times, "exponent": exponent(columns, times)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = over_samples(args.rounds) + over_vectors(args.rounds)
    lines = ["| | sizes | milliseconds | exponent |", "|---|---|---|---|"]
    for row in rows:
        axis = "N" if "N" in row else "V"
        times = " ".join(f"{1e3 * t:.0f}" for t in row["seconds"])
        lines.append(
            f"| {row['quantity']} | {axis} = {' '.join(map(str, row[axis]))} | {times} | {row['exponent']:.2f} |"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["Time against the number of samples (3c3d) and of vectors (MLP), one thread.", "", *lines]) + "\n"
    (args.out / "scaling.md").write_text(text)
    (args.out / "scaling.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
