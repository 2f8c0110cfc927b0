"""Two records of `inspect` or `noise`: rows with errors, and their curves over each other."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paraboloid.jobs.comparison.figures import COLORS, NAMED, curves
from paraboloid.jobs.comparison.row import Row, standard_error
from paraboloid.report.axes import batch_sizes, log_axis, measured, plain_axis
from paraboloid.report.numbers import count, percent, short
from paraboloid.report.section import Panel
from paraboloid.report.theme import MUTED, inline_svg

Record = dict[str, Any]


def settings(record: Record) -> dict[str, str]:
    """What was measured on, as text."""
    problem, training = record["problem"], record["training"]
    found = {
        "problem": problem["name"], "parameters": count(problem["parameters"]),
        "measured samples": count(problem["measured_size"]), "data type": problem["dtype"],
        "optimizer": training["optimizer"], "learning rate": short(training["lr"]),
        "batch size": count(training["batch_size"]), "weight decay": short(training["weight_decay"]),
        "steps": count(training["steps"]), "seed": str(problem["seed"]),
    }  # fmt: skip
    if "bias" in record:
        found |= {"curvature": record["curvature"]["operator"], "directions": record["bias"]["directions"]}
    return found


def rows(a: Record, b: Record) -> list[Row]:
    """The figures that the pages lead with."""
    found = [*_training(a, b), *_noise(a, b)]
    return found + [*_curvature(a, b), *_bias(a, b)] if "bias" in a and "bias" in b else found


def _training(a: Record, b: Record) -> list[Row]:
    last = [(r["training"]["curve"] or [{}])[-1] for r in (a, b)]
    sizes = [r["problem"]["test_size"] for r in (a, b)]
    accuracies = [point.get("test_accuracy") for point in last]
    errors = [standard_error(share, size) for share, size in zip(accuracies, sizes, strict=True)]
    found = [
        Row("training", f"{which} loss", [point.get(key) for point in last], better="lower")
        for which, key in (("training", "train_loss"), ("test", "test_loss"))
    ]
    if None not in accuracies:
        found.append(Row("training", "test accuracy", accuracies, errors, "higher", lambda v: percent(v, 3)))
    return found


def _noise(a: Record, b: Record) -> list[Row]:
    totals = [r["noise"]["checkpoints"][-1]["total"] for r in (a, b)]
    return [
        Row("noise", name, [total[key] for total in totals])
        for name, key in (
            ("noise to signal of a batch, at the end", "noise_to_signal"),
            ("critical batch size, at the end", "noise_scale"),
            ("average variance, at the end", "average_variance"),
        )
    ]


def _curvature(a: Record, b: Record) -> list[Row]:
    found = [r["curvature"] for r in (a, b)]
    traces = [c["trace"] for c in found]
    exact = [t["standard_error"] if t["standard_error"] is not None else 0.0 for t in traces]
    return [
        Row("curvature", "largest eigenvalue", [c["eigenvalues"][0]["value"] for c in found]),
        Row("curvature", "trace", [t["value"] for t in traces], exact),
    ]


def _bias(a: Record, b: Record) -> list[Row]:
    shared = _shared_size(a, b)
    if shared is None:
        return []
    chosen = [next(row for row in r["bias"]["table"] if row["batch_size"] == shared) for r in (a, b)]
    found = []
    for which, name in (("same", "the same batch"), ("other", "another batch")):
        ratios = [row["ratios"][0]["curvature"][which] for row in chosen]
        found.append(_measured(f"curvature on {name} of {count(shared)} over that on all data", ratios))
    for which, name in (("same", "its own step length"), ("other", "that of another batch")):
        steps = [row["decrease"][which]["delivered"] for row in chosen]
        found.append(_measured(f"decrease that a Newton step with {name} delivers", steps, "higher"))
    return found


def _measured(name: str, pair: list[dict[str, Any]], better: str | None = None) -> Row:
    return Row("bias", name, [p["value"] for p in pair], [p["standard_error"] for p in pair], better)


def _shared_size(a: Record, b: Record) -> int | None:
    """The batch size measured in both that is nearest to the one A was trained with."""
    sizes = [{row["batch_size"] for row in r["bias"]["table"]} for r in (a, b)]
    wanted = a["training"]["batch_size"] or min(sizes[0])
    return min(sizes[0] & sizes[1], key=lambda m: max(m / wanted, wanted / m), default=None)


def panels(a: Record, b: Record) -> dict[str, list[Panel]]:
    """Section -> figures."""
    found = {"training": [_losses(a, b)], "noise": [_ratios(a, b)]}
    if "bias" in a and "bias" in b:
        found |= {"curvature": [_spectra(a, b)], "bias": [_biases(a, b)]}
    return found


def _losses(a: Record, b: Record) -> Panel:
    def lines(key: str) -> list[tuple[list[float], list[float | None]]]:
        taken = [r["training"]["curve"] for r in (a, b)]
        return [([p["epoch"] for p in curve], [p.get(key) for p in curve]) for curve in taken]

    what = "Mean training and test loss over the epochs"
    return Panel(
        curves("losses", what, [("Training loss", lines("train_loss")), ("Test loss", lines("test_loss"))], "epoch"),
        what + ".",
    )


def _ratios(a: Record, b: Record) -> Panel:
    def lines(key: str) -> list[tuple[list[float], list[float | None]]]:
        taken = [r["noise"]["checkpoints"] for r in (a, b)]
        return [([p["epoch"] for p in points], [p["total"][key] for p in points]) for points in taken]

    what = "Noise to signal of a batch, and the batch size at which they are equal"
    titled = [("Noise to signal", lines("noise_to_signal")), ("Critical batch size", lines("noise_scale"))]
    return Panel(curves("noise", what, titled, "epoch"), what + "; left out where it cannot be told.")


def _spectra(a: Record, b: Record) -> Panel:
    values = [[item["value"] for item in r["curvature"]["eigenvalues"]] for r in (a, b)]
    lines = [(list(map(float, range(1, len(v) + 1))), v) for v in values]
    what = "The largest eigenvalues"
    return Panel(curves("spectra", what, [("Largest eigenvalues", lines)], "index"), what + " of the curvature.")


def _biases(a: Record, b: Record) -> Panel:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        sizes = sorted({row["batch_size"] for r in (a, b) for row in r["bias"]["table"]})
        for r, color, name in zip((a, b), COLORS, NAMED, strict=True):
            table = r["bias"]["table"]
            for which, style in (("same", "-"), ("other", "--")):
                ratios = [row["ratios"][0]["curvature"][which] for row in table]
                label = f"{name}, {which} batch"
                measured(axes, [row["batch_size"] for row in table], [p["value"] for p in ratios],
                         [p["standard_error"] for p in ratios], color=color, linestyle=style, marker="o",
                         label=label)  # fmt: skip
        axes.axhline(1, color=MUTED, linewidth=1)
        batch_sizes(axes, sizes)
        log_axis(axes.yaxis, [row["ratios"][0]["curvature"]["same"]["value"] for row in a["bias"]["table"]])
        plain_axis(axes.yaxis)
        axes.set_ylabel("curvature / that on all data")
        axes.legend()

    what = "Curvature along the top direction over that on all data, by batch size"
    return Panel(inline_svg("biases", what, (5.6, 3.4), draw), what + "; bars are one standard error.")
