"""python -m benchmarks.posterior_tuning: what `tune_prior()` takes, in parts of the training of the network itself.

Processor time in one process, medians of three, each structure over all weights and the last layer as it comes; beside
laplace-torch's `optimize_prior_precision()` where that is installed.  400 digits (100 epochs), and other built-in
problems on all of their training data, trained as `paraboloid train` does.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import paraboloid as pb
from benchmarks.peers import installed
from benchmarks.quality_data import network, split, trained
from paraboloid import problems
from paraboloid.data.batches import take

STRUCTURES = ("kron", "ekfac", "diag", "lowrank", "functional", "full")
PEERS = ("kron", "diag", "full")
DIGITS = ("digits-mlp", "digits-cnn")
OTHERS = ("digits-tanh", "random-features")
MOST, TIMES = 4000, 3  # weights of a full matrix; repetitions
Row = dict[str, Any]


def prepared(name: str) -> tuple[nn.Module, Any, Any, float]:
    """The trained model, its loss, the data, and the processor seconds of the training."""
    if name in DIGITS:
        data, _, _ = split(name, 400, 0)
        torch.manual_seed(0)
        start = time.process_time()
        model = trained(network(name, 0), data)
        return model, nn.CrossEntropyLoss(), data, time.process_time() - start
    problem = problems.load(name)
    start = time.process_time()
    problems.train(problem, 0)
    spent = time.process_time() - start
    x, y = take(problem.train, torch.arange(len(problem.train)), torch.device("cpu"))
    return problem.model, problem.loss_fn, (x, y), spent


def ours(model: nn.Module, loss: Any, data: Any, structure: str, weights: str) -> tuple[float, float]:
    start = time.process_time()
    posterior: Any = pb.laplace(model, loss, data, structure, weights)
    fitted = time.process_time()
    posterior.tune_prior()
    return fitted - start, time.process_time() - fitted


def peers(model: nn.Module, loss: Any, data: Any, structure: str, weights: str) -> tuple[float, float]:
    from laplace import Laplace
    from laplace.curvature.curvlinops import CurvlinopsGGN

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 50)
    start = time.process_time()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        posterior = Laplace(copy.deepcopy(model), "classification", weights, structure, backend=CurvlinopsGGN)
        posterior.fit(loader)
        fitted = time.process_time()
        posterior.optimize_prior_precision()
    return fitted - start, time.process_time() - fitted


def measured(name: str) -> list[Row]:
    model, loss, data, training = prepared(name)
    size, rows = sum(p.numel() for p in model.parameters()), []

    def add(who: str, f: Callable[..., tuple[float, float]], structure: str, weights: str) -> None:
        found = [f(model, loss, data, structure, weights) for _ in range(TIMES)]
        fit, tune = (median(part) for part in zip(*found, strict=True))
        row = {"problem": name, "training": training, "who": who, "structure": structure, "weights": weights}
        rows.append({**row, "fit": fit, "tune": tune})

    for weights in ("all", "last_layer"):
        for structure in STRUCTURES:
            if structure != "full" or weights == "last_layer" or size <= MOST:
                add("paraboloid", ours, structure, weights)
        for structure in PEERS if installed("laplace") and isinstance(loss, nn.CrossEntropyLoss) else ():
            if weights == "last_layer" or (structure == "kron" and name != "digits-cnn"):
                add("laplace-torch", peers, structure, weights)
    return rows


def table(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row["problem"] for row in rows))
    trainings = {row["problem"]: row["training"] for row in rows}
    heads = [f"{name} ({trainings[name]:.1f} s)" for name in names]
    lines = ["| who | structure | weights | " + " | ".join(heads) + " |", "|---" * (3 + len(names)) + "|"]
    for key in dict.fromkeys((row["who"], row["structure"], row["weights"]) for row in rows):
        cells = []
        for name in names:
            found = [r for r in rows if (r["problem"], r["who"], r["structure"], r["weights"]) == (name, *key)]
            cells.append(f"{found[0]['tune'] / found[0]['training']:.2f}" if found else "")
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=[*DIGITS, *OTHERS])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = options.out / "posterior-tuning.json"
    rows = json.loads(record.read_text()) if record.exists() else []
    for name in options.problems:
        rows = [row for row in rows if row["problem"] != name] + measured(name)
        record.write_text(json.dumps(rows, indent=1) + "\n")
    rows.sort(key=lambda row: (row["who"] != "paraboloid", row["weights"]))
    text = [
        "Seconds of tuning over those of training, which stand at the problem; all on one thread.",
        "",
        *table(rows),
    ]
    (options.out / "posterior-tuning.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
