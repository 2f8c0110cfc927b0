"""python -m benchmarks.posterior_threshold: what a rarer threshold of matched confidence costs, and what it buys.

Confidence is lowered beyond the 99th percentile of the training data's variances.  The same posteriors, with the
threshold moved to rarer quantiles and the steps as long as before: what predictions then add to the network's negative
log-likelihood on test samples, and how well confidence tells unlike inputs.  The network's own accuracy and confidence
say why lowering costs anything.  Goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.posterior_untouched import spread
from benchmarks.records import Record, Row
from paraboloid import problems
from paraboloid.data.batches import Chunks, call, take
from paraboloid.jobs.uncertainty import scores
from paraboloid.jobs.uncertainty.job import BATCH, FITTED, TESTED, chosen
from paraboloid.jobs.uncertainty.methods import METHODS
from paraboloid.jobs.uncertainty.unseen import unseen
from paraboloid.posteriors.prediction.confidence import Confidence, shared

PROBLEMS = ("digits-tanh", "digits-mlp", "digits-cnn")
QUANTILES = (0.99, 0.995, 0.999, 1.0)


def thresholds(name: str, seed: int) -> list[Row]:
    """One row for each quantile."""
    problem = problems.load(name, seed=seed)
    problems.train(problem, seed)
    device = torch.device("cpu")
    data = Chunks(problem.train, BATCH, device, chosen(len(problem.train), FITTED, seed))
    x, y = take(problem.test, chosen(len(problem.test), TESTED, seed), device)
    with torch.no_grad():
        own = call(problem.model, x).softmax(1)
    posterior: Any = METHODS["kron"](problem, data, own.shape[1], seed)
    found = [shared(posterior.unweighted.functional(inputs, diagonal=True)[1], "categorical") for inputs, _ in data]
    variances = torch.cat([v.flatten() for v in found]).double()
    matched, network = posterior.confidence, scores.of_classes(own, y)
    beyond = posterior.novelty(x) > 0
    row: Row = {
        "accuracy": (own.argmax(1) == y).double().mean().item(), "confidence": own.amax(1).double().mean().item(),
        "network nll": network["nll"], "beyond": beyond.double().mean().item(),
        "wrong beyond": int((own.argmax(1) != y)[beyond].sum()),
    }  # fmt: skip
    rows = []
    for q in QUANTILES:
        further = (variances.quantile(q) / variances.quantile(QUANTILES[0])).item()
        posterior.confidence = Confidence(matched.usual * further, matched.rare * further)
        p = posterior.predict(x)
        areas = {k: scores.area(-p.amax(1), -posterior.predict(z).amax(1)) for k, z in unseen(x, seed).items()}
        rows.append({"quantile": q, **row, "added": scores.of_classes(p, y)["nll"] - network["nll"], "areas": areas})
    return rows


def tables(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    for name in dict.fromkeys(r["name"] for r in rows):
        here = [r for r in rows if r["name"] == name]
        first = [r for r in here if r["quantile"] == QUANTILES[0]]
        kinds = list(first[0]["areas"])
        about = (
            f"{len(first)} seeds. The network's accuracy {mean(r['accuracy'] for r in first):.3f}, confidence "
            f"{mean(r['confidence'] for r in first):.3f}, negative log-likelihood "
            f"{mean(r['network nll'] for r in first):.4f}. Beyond the first threshold are "
            f"{100 * mean(r['beyond'] for r in first):.1f}% of the test samples, "
            f"{sum(r['wrong beyond'] for r in first)} of them classified wrongly."
        )
        lines += [
            f"### {name}", "", about, "",
            "| quantile | added nll | " + " | ".join(kinds) + " |", "|---" * (2 + len(kinds)) + "|",
        ]  # fmt: skip
        for q in QUANTILES:
            mine = [r for r in here if r["quantile"] == q]
            areas = [f"{mean(r['areas'][k] for r in mine):.3f}" for k in kinds]
            lines.append(f"| {q} | {spread([r['added'] for r in mine])} | " + " | ".join(areas) + " |")
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.out, "posterior-threshold", tables)
    for name in options.problems:
        for seed in range(options.seeds):
            if not record.holds(name=name, seed=seed):
                record.add(thresholds(name, seed), name=name, seed=seed)


if __name__ == "__main__":
    main()
