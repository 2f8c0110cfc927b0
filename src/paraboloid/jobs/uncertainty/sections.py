"""The page of the job, and its record on disk."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from paraboloid.report import render_study
from paraboloid.report.numbers import count, fixed, number, percent, seconds
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, INK, MUTED, OTHER, SAME, inline_svg

COLUMNS = 6  # of images in a row
FURTHEST = 2.0  # of a band beyond the data and the mean, in their range


def page(record: dict[str, Any]) -> str:
    """The HTML page of a record that `uncertainty` made."""
    results = record["results"]
    about = f"{results['what']} (--method {results['method']}), fitted to the trained network of: {results['title']}."
    return render_study(f"Uncertainty of {results['title']}", about, record, sections(results))


def sections(results: dict[str, Any]) -> list[Section]:
    """Calibration, what was not seen, the least sure inputs, what the data determined."""
    numeric = "coverage" in results["matched"]
    first = [_coverage(results)] if numeric else [_reliability(results)]
    if numeric and results["band"] is not None:
        first.insert(0, _band(results["band"]))
    found = [Section("calibration", "Calibration", [], first)]
    if results["unseen"]:
        found.append(Section("unseen", "What it has not seen", [], [_unseen(results, numeric)]))
    if any(row["image"] is not None for row in results["least_sure"]):
        found.append(Section("least-sure", "Least sure", [], [_least_sure(results["least_sure"], numeric)]))
    found.append(Section("weights", "What the data determined", [], [_weights(results)]))
    return found


def _scores(results: dict[str, Any], names: list[tuple[str, str]], what: tuple[str, str]) -> Table:
    rows = [[what[0], *(fixed(results["network"][k], None, 3) for k, _ in names)],
            [what[1], *(fixed(results["matched"][k], None, 3) for k, _ in names)]]  # fmt: skip
    return Table(f"On {count(results['matched']['count'])} test targets", ["", *(label for _, label in names)], rows)


def _reliability(results: dict[str, Any]) -> Panel:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for key, label, color, width in (
            ("network", "the network", SAME, 4),
            ("matched", "this posterior", OTHER, 1.5),
        ):
            rows = results[key]["bins"]
            total = results[key]["count"]
            axis.plot([r["confidence"] for r in rows], [r["accuracy"] for r in rows], color=color, label=label,
                      linewidth=width)  # fmt: skip
            axis.scatter([r["confidence"] for r in rows], [r["accuracy"] for r in rows],
                         [14 + 260 * r["count"] / total for r in rows], color=color)  # fmt: skip
        axis.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1.02), ylim=(0, 1.05))
        axis.legend(loc="upper left")

    what = "Reliability: how many of the predictions made with a confidence are right"
    names = [("nll", "negative log-likelihood"), ("ece", "calibration error"), ("accuracy", "accuracy")]
    table = _scores(results, names,
                    ("the network", "this posterior"))  # fmt: skip
    return Panel(
        inline_svg("reliability", what, (7.4, 4.4), draw), f"{what}; the area of a point is its share.", [table]
    )


def _coverage(results: dict[str, Any]) -> Panel:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for key, label, color in (("network", "the noise alone", SAME), ("matched", "this posterior", OTHER)):
            rows = results[key]["coverage"]
            axis.plot([r["level"] for r in rows], [r["covered"] for r in rows], "o-", color=color, label=label)
        axis.set(xlabel="interval", ylabel="share of targets inside", xlim=(0, 1), ylim=(0, 1.02))
        axis.legend(loc="upper left")

    what = "Coverage of central intervals on the test data"
    levels = [[percent(a["level"]), percent(b["covered"]), percent(a["covered"])]
              for a, b in zip(results["matched"]["coverage"], results["network"]["coverage"], strict=True)]  # fmt: skip
    tables = [Table("Coverage", ["interval", "noise alone", "this posterior"], levels),
              _scores(results, [("nll", "negative log-likelihood"), ("rmse", "root mean square error")],
                      ("the noise alone", "this posterior"))]  # fmt: skip
    return Panel(inline_svg("coverage", what, (7.4, 4.4), draw), f"{what}.", tables)


def _band(band: dict[str, Any]) -> Panel:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        x, mean = np.array(band["x"]), np.array(band["mean"])
        for key, label, color, alpha in (
            ("std", "with the noise", OTHER, 0.15),
            ("model_std", "the model", OTHER, 0.3),
        ):
            std = np.array(band[key])
            axis.fill_between(x, mean - 2 * std, mean + 2 * std, color=color, alpha=alpha, linewidth=0, label=label)
        axis.plot(x, mean, color=OTHER)
        axis.plot(band["seen_x"], band["seen_y"], ".", color=INK, markersize=3, label="training data")
        axis.set(xlabel="input", ylabel="output", ylim=shown)
        axis.legend()

    shown, cut = limits(band)
    what = "Prediction with a band of two standard deviations, on the training data and beyond it"
    return Panel(inline_svg("band", what, (7.4, 4.2), draw), f"{what}.{cut}")


def limits(band: dict[str, Any]) -> tuple[tuple[float, float] | None, str]:
    """Of the axis of outputs, where the band goes so far beyond everything else that it would hide it, and a remark."""
    lines = np.concatenate([band["seen_y"], band["mean"]])
    low, high = float(lines.min()), float(lines.max())
    most = 2 * max(band["std"])
    room = FURTHEST * (high - low)
    if most <= room:
        return None, ""
    return (low - room, high + room), f" The band is cut off: at its widest it is ± {number(most, 2)}."


def _unseen(results: dict[str, Any], numeric: bool) -> Panel:
    rows = results["unseen"]
    if numeric:
        cells = [[r["name"], fixed(r["area"], None), number(r["ratio"], 3)] for r in rows]
        tables = [
            Table(
                "Unlike inputs, by the model's variance", ["inputs", "told apart (AUROC)", "spread over test's"], cells
            )
        ]

        def draw(figure: Figure) -> None:
            axis = figure.subplots()
            axis.barh([r["name"] for r in rows], [r["area"] for r in rows], 0.6, color=OTHER)
            axis.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            axis.set(xlabel="AUROC", xlim=(0, 1))
            axis.invert_yaxis()
    else:
        columns: dict[str, list[str]] = {
            "inputs": [r["name"] for r in rows],
            "network": [fixed(r["network_area"], None, 3) for r in rows],
            "this posterior": [fixed(r["area"], None, 3) for r in rows],
        }
        novelty = any(r["novelty_area"] is not None for r in rows)
        if novelty:
            columns["novelty"] = [fixed(r["novelty_area"], None, 3) for r in rows]
        sure = [[r["name"], percent(r["network_confidence"]), percent(r["confidence"])] for r in rows]
        tables = [
            Table(
                "Told from test inputs (AUROC)", list(columns),
                [list(row) for row in zip(*columns.values(), strict=True)],
                note="By low confidence" + (", and by posterior.novelty." if novelty else "."),
            ),
            Table("Mean confidence", ["inputs", "network", "this posterior"], sure),
        ]  # fmt: skip

        def draw(figure: Figure) -> None:
            pairs = [("test inputs", results["network_histogram"], results["histogram"]),
                     *((r["name"], r["network_histogram"], r["histogram"]) for r in rows)]  # fmt: skip
            axes = figure.subplots(len(pairs), 1, sharex=True, squeeze=False)[:, 0]
            for axis, (name, own, ours) in zip(axes, pairs, strict=True):
                edges = np.linspace(0, 1, len(own) + 1)
                axis.stairs(own, edges, color=SAME, label="the network")
                axis.stairs(ours, edges, fill=True, color=OTHER, alpha=0.35, label="this posterior")
                axis.set_title(name)
                axis.set_yticks([])
                axis.set_ylim(0, None)
            axes[-1].set(xlabel="confidence", xlim=(0, 1))
            axes[0].legend(loc="upper left")

    what = "Confidence on test inputs and on inputs unlike the training data"
    if numeric:
        what = "How well the model's variance tells unlike inputs from test inputs"
    height = 1.2 + 0.4 * len(rows) if numeric else 1.0 + 1.1 * (1 + len(rows))
    return Panel(inline_svg("unseen", what, (7.4, height), draw), f"{what}.", tables)


def _least_sure(rows: list[dict[str, Any]], numeric: bool) -> Panel:
    shown = [row for row in rows if row["image"] is not None]

    def draw(figure: Figure) -> None:
        lines = -(-len(shown) // COLUMNS)
        axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, row in zip(axes, shown, strict=False):
            image = np.asarray(row["image"], dtype=float) / 255
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(_label(row, numeric), fontsize=8, fontweight="normal", loc="center")

    what = "The test inputs that the model is least sure of"
    note = "" if numeric else " Above each: target, prediction, confidence (the network's own)."
    height = 0.5 + 1.45 * -(-len(shown) // COLUMNS)
    return Panel(inline_svg("least-sure", what, (7.4, height), draw), f"{what}.{note}", wide=True)


def _label(row: dict[str, Any], numeric: bool) -> str:
    if numeric:
        return f"± {number(row['spread'], 2)}"
    sure = f"{percent(row['confidence'])} ({percent(row['network'])})"
    return sure if row["target"] is None else f"{row['target']}: {row['predicted']}, {sure}"


def _weights(results: dict[str, Any]) -> Panel:
    posterior = results["posterior"]
    layers = posterior["layers"]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        rows = layers or [{"name": "all", "determined": posterior["effective_dimension"],
                           "parameters": posterior["parameters"]}]  # fmt: skip
        values = [100 * r["determined"] / r["parameters"] for r in rows]
        bars = axis.barh([r["name"] for r in rows], values, 0.6, color=FULL)
        axis.bar_label(bars, [f"{number(v, 2)}%" for v in values], padding=4, color=MUTED, fontsize=9)
        axis.set(xlabel="% of the weights that the data determines")
        axis.margins(x=0.15)
        axis.invert_yaxis()

    cells = [[r["name"], count(r["parameters"]), number(r["determined"]), percent(r["determined"] / r["parameters"])]
             for r in layers]  # fmt: skip
    cells.append([Markup("<b>all</b>"), count(posterior["parameters"]), number(posterior["effective_dimension"]),
                  percent(posterior["effective_dimension"] / posterior["parameters"])])  # fmt: skip
    prior = posterior["prior_precision"]
    note = (
        f"Prior precision {number(prior) if isinstance(prior, float) else 'by parameter'}; fitted and tuned on "
        f"{count(posterior['samples'])} samples in {seconds(posterior['seconds'])}, after a training of "
        f"{seconds(results['training']['seconds'])}."
    )
    table = Table("Effective dimension", ["layer", "weights", "determined", "share"], cells, note=note)
    what = "How many weights of each layer the data determines rather than the prior"
    return Panel(inline_svg("weights", what, (7.4, 1.2 + 0.36 * max(1, len(layers))), draw), f"{what}.", [table])
