"""Two records of `uncertainty`: likelihood, calibration and what is known of inputs unlike the data."""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.comparison.row import Row, standard_error
from paraboloid.report.numbers import count, percent, seconds, short
from paraboloid.report.section import Panel

Record = dict[str, Any]
SCORES = (("nll", "negative log-likelihood", "lower"), ("ece", "calibration error", "lower"),
          ("rmse", "root mean squared error", "lower"))  # fmt: skip


def settings(record: Record) -> dict[str, str]:
    """What was fitted on what."""
    found, posterior = record["results"], record["results"]["posterior"]
    return {
        "problem": found["problem"], "method": found["method"], "parameters": count(posterior["parameters"]),
        "samples of the fit": count(posterior["samples"]), "prior precision": _listed(posterior["prior_precision"]),
        "seed": str(record["seed"]),
    }  # fmt: skip


def rows(a: Record, b: Record) -> list[Row]:
    """Scores on test data of the network and of the posterior, and areas under curves for unlike inputs."""
    results, found = [r["results"] for r in (a, b)], []
    for which, name in (("network", "network"), ("matched", "posterior")):
        scores = [r[which] for r in results]
        for key, words, better in SCORES:
            if all(isinstance(s.get(key), float | int) for s in scores):
                found.append(Row("scores", f"{words} of the {name}", [s[key] for s in scores], better=better))
        if all(s.get("accuracy") is not None for s in scores):
            errors = [standard_error(s["accuracy"], s["count"]) for s in scores]
            found.append(Row("scores", f"accuracy of the {name}", [s["accuracy"] for s in scores], errors, "higher",
                             lambda v: percent(v, 3)))  # fmt: skip
    areas = [{row["name"]: row["area"] for row in r["unseen"]} for r in results]
    found += [Row("unseen", f"area under the curve for {name}", [areas[0][name], areas[1][name]], better="higher")
              for name in areas[0] if name in areas[1]]  # fmt: skip
    posteriors = [r["posterior"] for r in results]
    found.append(Row("posterior", "weights that the data determines", [p["effective_dimension"] for p in posteriors]))
    found.append(Row("posterior", "time of the fit", [p["seconds"] for p in posteriors], better="lower",
                     show=seconds))  # fmt: skip
    return found


def panels(a: Record, b: Record) -> dict[str, list[Panel]]:
    """No figures: a few numbers are best read as numbers."""
    return {}


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_listed(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_listed, value))
    return short(value) if isinstance(value, float | int) else str(value)
