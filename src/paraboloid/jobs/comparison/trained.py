"""Two records of `train`: where they ended, how fast, and when one reached what the other ended with."""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.comparison.figures import curves
from paraboloid.jobs.comparison.row import Row
from paraboloid.report.numbers import count, number, percent, seconds
from paraboloid.report.section import Panel

Record = dict[str, Any]


def settings(record: Record) -> dict[str, str]:
    """The options that the run was given, and its size."""
    given = {k.replace("_", " "): "default" if v is None else str(v) for k, v in record["settings"].items()}
    return {**given, "parameters": count(record["parameters"]), "steps in an epoch": count(record["steps_per_epoch"])}


def rows(a: Record, b: Record) -> list[Row]:
    """Losses, accuracies and seconds."""
    last, losses = [r["metrics"][-1] for r in (a, b)], {"train_loss": "training loss", "test_loss": "test loss"}
    found = [Row("training", name, [m[key] for m in last], better="lower") for key, name in losses.items()]
    lowest = [min((m["test_loss"] for m in r["metrics"] if m["test_loss"] is not None), default=None) for r in (a, b)]
    found.append(Row("training", "lowest test loss", lowest, better="lower"))
    if all(m["test_accuracy"] is not None for m in last):
        accuracies = [m["test_accuracy"] for m in last]
        found.append(Row("training", "test accuracy", accuracies, better="higher", show=lambda v: percent(v, 3)))
    found.append(Row("training", "epochs", [m["epoch"] for m in last], show=count))
    spent = [_spent(r) for r in (a, b)]
    if all(s is not None for s in spent):
        found.append(Row("time", "time of the steps", [s[-1] if s else None for s in spent], better="lower",
                         show=seconds))  # fmt: skip
        found.append(Row("time", "a step, in ms", [_mean_step(r) for r in (a, b)], better="lower"))
    return found


def reached(a: Record, b: Record) -> str | None:
    """When the run that ended with the lower training loss reached the other's, in epochs and seconds."""
    ends = [r["metrics"][-1]["train_loss"] for r in (a, b)]
    if None in ends or ends[0] == ends[1]:
        return None
    first = int(ends[1] < ends[0])  # the one that ended lower
    fast, name, other = (a, b)[first], "AB"[first], "BA"[first]
    point = next(m for m in fast["metrics"] if m["train_loss"] is not None and m["train_loss"] <= ends[1 - first])
    end = (a, b)[1 - first]["metrics"][-1]
    told = f"{name} reached the training loss that {other} ended with, {number(ends[1 - first])}, after "
    told += f"{count(point['epoch'])} epoch{'s' * (point['epoch'] != 1)}, {other} after {count(end['epoch'])}"
    spent = [_spent(r) for r in (fast, (a, b)[1 - first])]
    if spent[0] and spent[1]:
        mine, its = spent[0][fast["metrics"].index(point)], spent[1][-1]
        told += f"; in seconds of steps, {number(mine)} against {number(its)}"
    return told + "."


def panels(a: Record, b: Record) -> dict[str, list[Panel]]:
    """Section -> figures."""

    def over(x: list[list[float]], key: str) -> list[tuple[list[float], list[float | None]]]:
        return [(each, [m[key] for m in r["metrics"]]) for each, r in zip(x, (a, b), strict=True)]

    epochs = [[float(m["epoch"]) for m in r["metrics"]] for r in (a, b)]
    titled = [("Training loss", over(epochs, "train_loss")), ("Test loss", over(epochs, "test_loss"))]
    what = "Mean training and test loss over the epochs"
    found = {"training": [Panel(curves("losses", what, titled, "epoch"), what + ".")]}
    spent = [_spent(r) for r in (a, b)]
    if spent[0] and spent[1]:
        timed = [("Training loss", over([spent[0], spent[1]], "train_loss"))]
        what = "Training loss over the seconds that steps took"
        found["time"] = [Panel(curves("seconds", what, timed, "seconds"), what + ", evaluations left out.")]
    return found


def _spent(record: Record) -> list[float] | None:
    """Seconds of steps until each point of the metrics; None where the record does not say."""
    times = dict(record.get("step_seconds") or [])
    if not times or any(m["epoch"] and m["epoch"] not in times for m in record["metrics"]):
        return None
    total, found = 0.0, []
    for m in record["metrics"]:
        total += times.get(m["epoch"], 0.0) * record["steps_per_epoch"] * (m["epoch"] > 0)
        found.append(total)
    return found


def _mean_step(record: Record) -> float:
    times = [s for _, s in record["step_seconds"]]
    return 1e3 * sum(times) / len(times)
