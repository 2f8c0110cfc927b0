"""What a method's best setting did, over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from paraboloid.jobs.studies.claims import Claim, inside


@dataclass(frozen=True)
class Summary:
    """A method with its best setting, over seeds; losses None where a run failed.

    curve       mean over seeds at each point: epoch, seconds, train, test
    final, test mean losses at the end, with the standard error of the first; accuracy: on the test set
    to_adam     seconds until the training loss is Adam's at its end, over Adam's seconds; None: never
    epochs      until then
    """

    name: str
    family: str
    setting: dict[str, Any]
    curve: list[dict[str, float | None]]
    final: float | None
    error: float | None
    test: float | None
    accuracy: float | None
    seconds: float
    epochs: float | None = None
    to_adam: float | None = None


def winners(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of the best setting, one for each seed."""
    best = min(row["grid"], key=lambda run: math.inf if run["final"] is None else run["final"])
    return [best, *row.get("winner", [])]


def summaries(problem: dict[str, Any]) -> dict[str, Summary]:
    found = {row["name"]: _summary(row) for row in problem["methods"]}
    if (adam := found.get("Adam")) is not None and adam.final is not None:
        for name, s in found.items():
            at = _reached(s.curve, adam.final)
            if at is not None:
                found[name] = replace(s, epochs=at[0], to_adam=at[1] / adam.seconds)
    return found


def _summary(row: dict[str, Any]) -> Summary:
    runs = winners(row)
    curve = [
        {key: mean([run["curve"][i][key] if i < len(run["curve"]) else None for run in runs])
         for key in ("epoch", "seconds", "train", "test")}
        for i in range(max(len(run["curve"]) for run in runs))
    ]  # fmt: skip
    finals = [run["final"] for run in runs]
    return Summary(row["name"], row["family"], runs[0]["setting"], curve, mean(finals), error(finals),
                   mean([run["test"] for run in runs]), mean([run["accuracy"] for run in runs]),
                   sum(run["seconds"] for run in runs) / len(runs))  # fmt: skip


def mean(values: list[float | None]) -> float | None:
    """None where one is."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def error(values: list[float | None]) -> float | None:
    """The standard error of the mean."""
    m = mean(values)
    if m is None or len(values) < 2:
        return None
    return (sum((v - m) ** 2 for v in values if v is not None) / (len(values) - 1) / len(values)) ** 0.5


def _reached(curve: list[dict[str, float | None]], goal: float) -> tuple[float, float] | None:
    """Epoch and seconds at which the training loss falls to the goal, by linear interpolation between points."""
    before: Any = None
    for point in curve:
        value = point["train"]
        if value is None:
            return None
        if value <= goal:
            share = 1.0 if before is None else (before["train"] - goal) / max(before["train"] - value, 1e-12)
            first: Any = before or point
            return tuple(first[k] + share * (point[k] - first[k]) for k in ("epoch", "seconds"))  # pyright: ignore
        before = point
    return None


def best(found: dict[str, Summary], names: Any) -> Summary | None:
    known = [found[name] for name in names if name in found and found[name].final is not None]
    return min(known, key=lambda s: s.final or 0.0) if known else None


def fastest(found: dict[str, Summary], family: str) -> Summary | None:
    known = [s for s in found.values() if s.family == family and s.to_adam is not None]
    return min(known, key=lambda s: s.to_adam or 0.0) if known else None


def judged(results: dict[str, Any], claims: Callable[[dict[str, Any]], Iterable[Claim]]) -> tuple[str, list[str]]:
    """How many of a study's claims were seen on its problems ("3 of 5"), and each as a sentence, those that were not
    seen as plainly as the others."""
    words, sentences, verdicts = {True: "Seen", False: "Not seen", None: "Not run"}, [], []
    for problem in results["problems"]:
        for claim, seen, measured in claims(problem):
            verdicts.append(seen)
            sentences.append(f"{words[seen]} on {problem['name']}: {inside(claim)} ({measured}).")
    return f"{verdicts.count(True)} of {len(verdicts) - verdicts.count(None)}", sentences
