"""python -m benchmarks.posterior_threshold: where matched confidence begins to be lowered: what it costs, what it buys.

"early" lowers beyond the 99th percentile of the training data's variances, with one halving for a step; so do its rows
of rarer quantiles, with steps as long.  "auto", the default, lowers one step beyond the 99th percentile, twice as fast.
The same posteriors: what predictions add to the network's negative log-likelihood and calibration error on test
samples, and how well confidence tells unlike inputs.  Goes on where it was stopped.
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
POSTERIORS = ("kron", "last-layer")


def thresholds(name: str, seed: int) -> list[Row]:
    """One row for each posterior and threshold."""
    problem = problems.load(name, seed=seed)
    problems.train(problem, seed)
    device = torch.device("cpu")
    data = Chunks(problem.train, BATCH, device, chosen(len(problem.train), FITTED, seed))
    x, y = take(problem.test, chosen(len(problem.test), TESTED, seed), device)
    with torch.no_grad():
        own = call(problem.model, x).softmax(1)
    network, others = scores.of_classes(own, y), unseen(x, seed)
    rows: list[Row] = []
    for method in POSTERIORS:
        posterior: Any = METHODS[method](problem, data, own.shape[1], seed)
        variances = [shared(posterior.unweighted.functional(z, diagonal=True)[1], "categorical") for z, _ in data]
        variances = torch.cat([v.flatten() for v in variances]).double()
        matched = posterior.confidence
        variance = shared(posterior.unweighted.functional(x, diagonal=True)[1], "categorical").flatten()
        further = {q: (variances.quantile(q) / variances.quantile(QUANTILES[0])).item() for q in QUANTILES}
        rules = {f"early, {q}": Confidence(matched.usual * by, matched.rare * by) for q, by in further.items()}
        for rule, confidence in {**rules, "auto": matched}.items():
            posterior.confidence = confidence
            p = posterior.predict(x)
            beyond = confidence.factor(variance) < 1
            found = scores.of_classes(p, y)
            rows.append({
                "method": method, "rule": rule, "network nll": network["nll"],
                "accuracy": (own.argmax(1) == y).double().mean().item(),
                "confidence": own.amax(1).double().mean().item(), "beyond": beyond.double().mean().item(),
                "wrong beyond": int((own.argmax(1) != y)[beyond].sum()),
                **{f"added {k}": found[k] - network[k] for k in ("nll", "ece")},
                "areas": {k: scores.area(-p.amax(1), -posterior.predict(z).amax(1)) for k, z in others.items()},
            })  # fmt: skip
    return rows


def tables(rows: list[Row]) -> list[str]:
    lines: list[str] = []
    for name, method in dict.fromkeys((r["name"], r["method"]) for r in rows):
        here = [r for r in rows if (r["name"], r["method"]) == (name, method)]
        first = [r for r in here if r["rule"] == here[0]["rule"]]
        kinds = list(first[0]["areas"])
        about = (
            f"{len(first)} seeds. The network's accuracy {mean(r['accuracy'] for r in first):.3f}, confidence "
            f"{mean(r['confidence'] for r in first):.3f}, negative log-likelihood "
            f"{mean(r['network nll'] for r in first):.4f}. Beyond the first threshold are "
            f"{100 * mean(r['beyond'] for r in first):.1f}% of the test samples, "
            f"{sum(r['wrong beyond'] for r in first)} of them classified wrongly."
        )
        lines += [
            f"### {name}, {method}", "", about, "",
            "| lowered from | beyond | added nll | added ece | " + " | ".join(kinds) + " |",
            "|---" * (4 + len(kinds)) + "|",
        ]  # fmt: skip
        for rule in dict.fromkeys(r["rule"] for r in here):
            mine = [r for r in here if r["rule"] == rule]
            areas = [f"{mean(r['areas'][k] for r in mine):.3f}" for k in kinds]
            added = [spread([r[f"added {k}"] for r in mine]) for k in ("nll", "ece")]
            share = f"{100 * mean(r['beyond'] for r in mine):.2f}%"
            lines.append(f"| {rule} | {share} | " + " | ".join([*added, *areas]) + " |")
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
