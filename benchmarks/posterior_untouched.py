"""python -m benchmarks.posterior_untouched: the untouched path on built-in problems and scikit-learn's regressions.

`paraboloid uncertainty` as it comes, over seeds: what the matched predictions add to the network's negative
log-likelihood and calibration error on test samples, with standard errors, and how well confidence tells unlike inputs.
For regressions the share of test targets inside 50% and 90% intervals, 70% of a set to train a network of 30 units,
stopped early and trained long.  Nothing is set by hand.  Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.records import Record, Row
from paraboloid import problems
from paraboloid.jobs.uncertainty import scores
from paraboloid.jobs.uncertainty.job import uncertainty

PROBLEMS = {  # whether trained in full
    "digits-tanh": True, "random-features": True, "digits-mlp": True, "digits-cnn": True, "digits-autoencoder": False,
    "sequence-transformer": False, "curves-autoencoder": False, "shapes-cnn": False,
}  # fmt: skip
STRUCTURES = ("kron", "diag", "full")
EPOCHS = {"early": 60, "long": 600}


def untouched(name: str, seed: int, method: str) -> Row:
    """What `paraboloid uncertainty` measured."""
    found = uncertainty(problems.load(name, seed=seed), method, seed=seed, quick=not PROBLEMS[name])["results"]
    row: Row = {f"{who} {k}": found[who][k] for who in ("network", "matched") for k in ("nll", "ece")}
    for other in found["unseen"]:
        row |= {f"area {other['name']}": other["area"], f"network area {other['name']}": other["network_area"]}
    return row


def sets() -> dict[str, Callable[[int], tuple[Any, Any]]]:
    from sklearn import datasets

    return {
        "diabetes": lambda seed: datasets.load_diabetes(return_X_y=True),
        "friedman1": lambda seed: datasets.make_friedman1(400, noise=1.0, random_state=seed),
        "friedman2": lambda seed: datasets.make_friedman2(400, noise=100.0, random_state=seed),
        "friedman3": lambda seed: datasets.make_friedman3(400, noise=0.1, random_state=seed),
        "linear": lambda seed: datasets.make_regression(400, 10, noise=30.0, random_state=seed),
    }


def regression(name: str, seed: int, length: str) -> list[Row]:
    """Coverage of test targets by each structure's intervals."""
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in sets()[name](seed))
    y = y.view(-1, 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    cut = int(0.7 * len(x))
    train, test = order[:cut], order[cut:]
    x, y = (standardised(t, train) for t in (x, y))
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 30), nn.Tanh(), nn.Linear(30, 1))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(EPOCHS[length]):
        for i in train[torch.randperm(cut)].split(32):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[i]), y[i]).backward()
            optimizer.step()
    optimizer.zero_grad()
    rows = []
    for structure in STRUCTURES:
        posterior: Any = pb.laplace(model, nn.MSELoss(), (x[train], y[train]), structure).tune_prior()
        p = posterior.predict(x[test])
        covered = {r["level"]: r["covered"] for r in scores.of_gaussians(p.mean, p.variance, y[test])["coverage"]}
        rows.append({"method": structure, "50%": covered[0.5], "90%": covered[0.9]})
    return rows


def standardised(t: Tensor, train: Tensor) -> Tensor:
    return (t - t[train].mean(0)) / t[train].std(0)


def spread(values: list[float]) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.4f}" if len(values) > 1 else ""
    return f"{mean(values):.4f}{error}"


def covered(rows: list[Row]) -> str:
    return " / ".join(f"{100 * mean(r[k] for r in rows):.0f}" for k in ("50%", "90%")) if rows else ""


def tables(rows: list[Row]) -> list[str]:
    kinds = ("nll", "ece")
    lines = [
        "### Classes and binary targets",
        "",
        "What matched predictions add to the network's (less is better).",
        "",
    ]
    columns = ["method", "seeds", "network's nll", "added", "network's ece", "added", "noise, network's", "matched"]
    lines += ["| | " + " | ".join(columns) + " |", "|---" * 9 + "|"]
    here = [r for r in rows if r["part"] == "problem"]
    for name, method in dict.fromkeys((r["name"], r["method"]) for r in here):
        mine = [r for r in here if (r["name"], r["method"]) == (name, method)]
        cells = [name, method, str(len(mine))]
        for k in kinds:
            cells += [f"{mean(r[f'network {k}'] for r in mine):.3f}",
                      spread([r[f"matched {k}"] - r[f"network {k}"] for r in mine])]  # fmt: skip
        noise = next((k for k in mine[0] if k.startswith("area")), None)
        cells += ["", ""] if noise is None else [f"{mean(r[k] for r in mine):.3f}" for k in (f"network {noise}", noise)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "### Regressions", "", "Share of test targets inside the intervals, the mean over splits.", ""]
    lines += [
        "| set, training | splits | " + " | ".join(f"{s}: 50% / 90%" for s in STRUCTURES) + " |",
        "|---" * 5 + "|",
    ]
    here = [r for r in rows if r["part"] == "regression"]
    for name in dict.fromkeys(r["name"] for r in here):
        mine = {s: [r for r in here if r["name"] == name and r["method"] == s] for s in STRUCTURES}
        cells = [
            " / ".join(f"{100 * mean(r[k] for r in found):.0f}" for k in ("50%", "90%")) for found in mine.values()
        ]
        lines.append(f"| {name} | {len(mine['kron'])} | " + " | ".join(cells) + " |")
    means = [covered([r for r in here if r["method"] == s]) for s in STRUCTURES]
    return [*lines, "| all | | " + " | ".join(means) + " |", ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=["kron", "last-layer"])
    parser.add_argument("--sets", nargs="*", default=list(sets()))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.out, "posterior-untouched", tables)

    for seed in range(options.seeds):
        for name in options.sets:
            for length in EPOCHS:
                place: Row = {"part": "regression", "name": f"{name}, {length}", "seed": seed}
                if not record.holds(**place):
                    record.add(regression(name, seed, length), **place)
    for name in options.problems:
        for seed in range(options.seeds):
            for method in options.methods:
                place = {"part": "problem", "name": name, "seed": seed, "method": method}
                if not record.holds(**place):
                    record.add([untouched(name, seed, method)], **place)


if __name__ == "__main__":
    main()
