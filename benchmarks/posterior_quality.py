"""python -m benchmarks.posterior_quality: how good confident predictions are on digits, against what else there is.

400 digits to train on or 1,437, 300 or 260 to test; negative log-likelihood and calibration error (15 bins) of the test
images and of harder ones made of them, and the area under the curve by which one minus the largest probability tells
unlike inputs from test digits.  Means over seeds of split, network and noise, with standard errors.  Nothing is set by
hand.  Peers that are not installed (laplace-torch, ivon-opt, vbll) are left out.  Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.null_space import null_space
from benchmarks.quality_data import ALL, BLURS, FEW, NOISES, SHIFTS, TURNS, Pair, network, split, trained, unlike
from benchmarks.quality_peers import Fitted, Method, Predict, Task, methods, temperature
from benchmarks.records import Record, Row
from paraboloid.jobs.uncertainty.scores import area, of_classes

NETWORK, AREAS = "the network", ("noise", "letters", "turned 30°", "turned 90°", "shifted 2", "noisy 0.3", "blurred 2")
CURVES = {
    "turned": [f"turned {v}°" for v in TURNS], "shifted": [f"shifted {v}" for v in SHIFTS],
    "noisy": [f"noisy {v}" for v in NOISES], "blurred": [f"blurred {v}" for v in BLURS],
}  # fmt: skip


def posterior(structure: str, weights: str, match: str | None = "auto", **options: Any) -> Method:
    """Fitted, tuned and matched as it comes."""

    def fit(task: Task) -> Fitted:
        start = time.process_time()
        found: Any = pb.laplace(task.model, nn.CrossEntropyLoss(), task.train, structure, weights, **options)
        fitted = time.process_time()
        found.tune_prior(match=match)
        return Fitted(found.predict, {"fit": fitted - start, "tune": time.process_time() - fitted})

    return fit


CHEAP: dict[str, Method] = {
    "kron": posterior("kron", "all"), "ekfac": posterior("ekfac", "all"),
    "kron, last layer": posterior("kron", "last_layer"), "diag": posterior("diag", "all"),
    "temperature scaling": temperature,
}  # fmt: skip
DEAR: dict[str, Method] = {
    "functional": posterior("functional", "all"),
    "kron, early": posterior("kron", "all", "early"),
    "kron, exponent": posterior("kron", "all", "exponent"),
    "kron, plain": posterior("kron", "all", None),
    "kron, last layer, plain": posterior("kron", "last_layer", None),
    "null space": null_space,
    **methods(),
}
SHORT = ("null space",)  # tested on fewer kinds of inputs: a prediction takes long


@torch.no_grad()
def quality(predict: Predict, test: Pair, others: dict[str, Tensor]) -> Row:
    """nll, ece and accuracy of the test digits, and each kind of unlike inputs' area, nll and ece."""
    p = predict(test[0])
    scores = of_classes(p, test[1])
    found: Row = {k: scores[k] for k in ("nll", "ece", "accuracy")}
    for name, x in others.items():
        q = predict(x)
        found[name] = {"area": area(-p.amax(1), -q.amax(1))}
        if name not in ("noise", "letters"):
            found[name] |= {k: v for k, v in of_classes(q, test[1]).items() if k in ("nll", "ece")}
    return found


def measure(net: str, size: int, seed: int, wanted: dict[str, Method], note: Callable[[Row], None]) -> None:
    """Train the network, and note a row of each method."""
    train, test, held_out = split(net, size, seed)
    others = unlike(test[0], seed)
    torch.manual_seed(seed)
    start = time.process_time()
    model = trained(network(net, seed), train)
    spent = time.process_time() - start
    place = {"net": net, "size": size, "seed": seed, "training": spent}
    task = Task(net, seed, model, train, held_out)
    for name, method in wanted.items():
        torch.manual_seed(seed)
        try:
            fitted = method(task)
            chosen = {k: x for k, x in others.items() if name not in SHORT or k in AREAS}
            note({**place, "method": name, "seconds": fitted.seconds, **quality(fitted.predict, test, chosen)})
        except Exception as error:  # a peer's own limits: the row says which
            note({**place, "method": name, "error": f"{type(error).__name__}: {error}"[:200]})


def network_alone(task: Task) -> Fitted:
    return Fitted(lambda x: task.model(x).softmax(1))


def cell(rows: list[Row], value: Callable[[Row], float]) -> str:
    values = [value(row) for row in rows]
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def tables(rows: list[Row]) -> list[str]:
    """Of each network and number of digits: scores and areas, likelihoods of harder digits, and seconds."""
    lines = []
    for net, size in dict.fromkeys((row["net"], row["size"]) for row in rows):
        here = [row for row in rows if (row["net"], row["size"]) == (net, size)]
        by = {name: [r for r in here if r["method"] == name and "error" not in r] for name in order(here)}
        by = {name: found for name, found in by.items() if found}
        failed = {row["method"]: row["error"] for row in here if "error" in row}
        lines += [f"### {net}, {size} digits", "", "Areas (AUROC) in the columns of unlike inputs.", ""]
        lines += header(["seeds", "nll", "ece", *AREAS])
        for name, found in by.items():
            scores = [cell(found, lambda r, k=k: r[k]) for k in ("nll", "ece")]
            areas = [f"{mean(r[k]['area'] for r in found):.3f}" for k in AREAS]
            lines.append(f"| {name} | {len(found)} | " + " | ".join([*scores, *areas]) + " |")
        lines += [f"| {name} | {error} |" for name, error in failed.items() if name not in by]
        lines += ["", "Negative log-likelihood of digits that are harder step by step.", ""]
        lines += header([v for values in CURVES.values() for v in values])
        for name, found in by.items():
            harder = [likelihood(found, k) for values in CURVES.values() for k in values]
            lines.append(f"| {name} | " + " | ".join(harder) + " |")
        lines += ["", "Seconds of one processor: training the network, fitting, tuning.", "", *header(["fit", "tune"])]
        lines.append(f"| training | {mean(r['training'] for r in here):.2f} | |")
        for name, found in by.items():
            if found[0]["seconds"]:
                spent = [f"{mean(r['seconds'].get(k, 0) for r in found):.2f}" for k in ("fit", "tune")]
                lines.append(f"| {name} | " + " | ".join(spent) + " |")
        lines.append("")
    return lines


def likelihood(rows: list[Row], key: str) -> str:
    return f"{mean(r[key]['nll'] for r in rows):.2f}" if key in rows[0] else ""


def order(rows: list[Row]) -> list[str]:
    known = [NETWORK, *CHEAP, *DEAR]
    return sorted(
        dict.fromkeys(row["method"] for row in rows),
        key=lambda name: known.index(name) if name in known else len(known),
    )


def header(columns: list[str]) -> list[str]:
    return ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    nets = ["digits-mlp", "digits-cnn", "digits-batchnorm", "digits-resnet8"]
    parser.add_argument("--nets", nargs="+", default=nets)
    parser.add_argument("--sizes", nargs="+", type=int, default=[FEW, ALL])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cheap-seeds", type=int, default=10, help="of the network and the cheap posteriors")
    parser.add_argument("--first", type=int, default=0, help="seed that is measured first")
    parser.add_argument("--only", nargs="+", help="methods; all of them without")
    parser.add_argument("--again", nargs="+", default=[], help="methods that are measured again")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.out, "posterior-quality", tables)
    record.rows = [row for row in record.rows if row["method"] not in options.again]

    for seed in range(options.first, max(options.seeds, options.cheap_seeds)):
        for size in options.sizes:
            for net in options.nets:
                wanted = {NETWORK: network_alone, **CHEAP} if seed < options.cheap_seeds else {}
                wanted |= DEAR if seed < options.seeds else {}
                done = {r["method"] for r in record.rows if (r["net"], r["size"], r["seed"]) == (net, size, seed)}
                wanted = {k: m for k, m in wanted.items() if k not in done and k in (options.only or wanted)}
                if wanted:
                    measure(net, size, seed, wanted, lambda row: record.add([row]))
    record.add([])


if __name__ == "__main__":
    main()
