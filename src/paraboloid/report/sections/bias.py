"""The bias of the mini-batch quadratic: curvature, slope and step on the same batch, another batch and all data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paraboloid.report.axes import batch_sizes, fixed_ticks, gaps, measured, plain_axis
from paraboloid.report.numbers import count, fixed, percent, power_of_ten, with_error
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, MUTED, OTHER, SAME, SERIES, inline_svg

# All data first: the truth is the broad pale line that the measurements are drawn over.
_WHICH: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("full", "all data", {"color": FULL, "linewidth": 5, "alpha": 0.28}),
    ("same", "same batch", {"color": SAME, "marker": "o"}),
    ("other", "another batch", {"color": OTHER, "marker": "s"}),
)
_STEPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("promised", "promised by the batch", {"color": SERIES[4], "marker": "^"}),
    ("delivered", "delivered on all data", {"color": FULL, "marker": "D"}),
)
_QUANTITIES = ("curvature", "slope")


def section(record: dict[str, Any]) -> Section:
    """The section "Bias of the mini-batch quadratic"."""
    bias = record["bias"]
    panels = [_ratios(bias), _directions(bias), _decrease(bias)]
    return Section("bias", "Bias of the mini-batch quadratic", bias["reading"], panels)


def _ratios(bias: dict[str, Any]) -> Panel:
    rows = bias["table"]
    sums = [ratio["directions"] for ratio in rows[0]["ratios"]]

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, len(sums), sharex=True, sharey="row", squeeze=False)
        for i, k in enumerate(sums):
            where = "top direction" if k == 1 else f"sum over the top {k}"
            _reference(top[i], bias["tolerance"])
            for which, label, style in _WHICH[1:]:
                _points(top[i], rows, [row["ratios"][i]["curvature"][which] for row in rows], label, style)
            predicted = gaps([row["ratios"][i]["predicted"]["same"] for row in rows])
            sizes = [row["batch_size"] for row in rows]
            top[i].plot(sizes, predicted, color=SAME, linestyle=(0, (2, 2)), label="same batch, predicted")
            for which, label, style in _WHICH:
                _points(bottom[i], rows, [row["ratios"][i]["slope_sum"][which] for row in rows], label, style)
            top[i].set(title=f"Curvature, {where}", xlabel="")
            bottom[i].axhline(0, color=MUTED, linewidth=1)
            bottom[i].set(title=f"Slope, {where}")
        top[0].set_ylabel("curvature / that on all data")
        top[0].set_ylim(0, _highest_ratio(rows))
        bottom[0].set_ylabel("slope (loss per unit)")
        for axis in (top[0], bottom[0]):
            plain_axis(axis.yaxis)
        _legend(figure, top[0], bottom[0])

    what = (
        "Curvature and slope along a batch's own top directions, measured on that batch, on another one and on all data"
    )
    caption = (
        f"{what}, by batch size; bars are one standard error over {count(bias['repeats'])} pairs of batches. The band "
        f"is ± {percent(bias['tolerance'])}; dotted, what Gaussian samples with the spectrum of all data would give. "
        "Directions are turned downhill on their own batch."
    )
    return Panel(
        inline_svg("ratios", what, (7.4, 5.8), draw),
        caption,
        [_curvature_table(bias, sums), _predicted_table(bias, sums), _slope_table(bias)],
    )


def _curvature_table(bias: dict[str, Any], sums: list[int]) -> Table:
    columns = [f"{'top' if k == 1 else f'top {k}'}, {which}" for k in sums for which in ("same", "other")]
    rows = [
        [_fixed(ratio["curvature"][which]) for ratio in row["ratios"] for which in ("same", "other")]
        for row in bias["table"]
    ]
    note = "Ratios of sums over the repeats, ± one standard error."
    return Table("Curvature on the batch / on all data", ["batch", *columns], _named(bias, rows), note)


def _predicted_table(bias: dict[str, Any], sums: list[int]) -> Table:
    columns = [f"{'top' if k == 1 else f'top {k}'}, {which}" for k in sums for which in ("same", "other")]
    rows = [
        [fixed(ratio["predicted"][which], None) for ratio in row["ratios"] for which in ("same", "other")]
        for row in bias["table"]
    ]
    note = "For Gaussian samples; too low where few samples carry the curvature."
    return Table("The same, predicted from the spectrum of all data", ["batch", *columns], _named(bias, rows), note)


def _slope_table(bias: dict[str, Any]) -> Table:
    entries = [[row["ratios"][0]["slope_sum"][which] for which in ("same", "other", "full")] for row in bias["table"]]
    caption, cells = _in_units("Slope along the top direction", entries)
    return Table(caption, ["batch", "same batch", "another batch", "all data"], _named(bias, cells))


def _directions(bias: dict[str, Any]) -> Panel:
    rows, k = bias["table"], bias["k"]
    ranks = np.arange(1, k + 1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, len(rows), sharex=True, sharey="row", squeeze=False)
        for column, row in zip(axes.T, rows, strict=True):
            for axis, quantity in zip(column, _QUANTITIES, strict=True):
                for which, label, style in _WHICH:
                    _band(axis, ranks, row[quantity][which], label, style)
            column[0].set_title(f"batches of {count(row['batch_size'])}")
            column[1].set_xlabel("direction")
            fixed_ticks(column[1].xaxis, [1, *range(5, k + 1, 5)] if k >= 5 else [int(rank) for rank in ranks])
        for axis, quantity in zip(axes[:, 0], _QUANTITIES, strict=True):
            axis.set_ylabel(quantity)
            plain_axis(axis.yaxis)
        axes[0, 0].set_ylim(bottom=0)
        _legend(figure, axes[0, 0])

    what = (
        f"Curvature and slope along the top {k} directions of a batch, measured on that batch, on another batch and on "
        "all data"
    )
    columns = [f"{quantity}, {label}" for quantity in _QUANTITIES for _, label, _ in _WHICH]
    cells = [
        [count(row["batch_size"]), str(rank + 1)]
        + [_entry(row[quantity][which], rank) for quantity in _QUANTITIES for which, _, _ in _WHICH]
        for row in rows
        for rank in range(k)
    ]
    table = Table(
        f"All {len(cells)} rows: mean over repeats ± one standard error",
        ["batch", "direction", *columns],
        cells,
        folded=True,
    )
    caption = f"{what}. Means over {count(bias['repeats'])} repeats; bands are one standard error."
    size = (2.0 + 2.1 * len(rows), 4.8)
    return Panel(inline_svg("directions", what, size, draw), caption, [_overlap_table(bias), table], wide=True)


def _overlap_table(bias: dict[str, Any]) -> Table:
    k = bias["k"]
    caption = f"Overlap of a batch's top {k} directions with those of all data"
    note = "1 for the same space; a random space has k over the number of parameters."
    return Table(caption, ["batch", "overlap"], _named(bias, [[_fixed(row["overlap"])] for row in bias["table"]]), note)


def _decrease(bias: dict[str, Any]) -> Panel:
    rows = bias["table"]
    titles = {"same": "Length from the same batch", "other": "Length from another batch"}

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (which, title) in zip(axes, titles.items(), strict=True):
            axis.axhline(0, color=MUTED, linewidth=1)
            for key, label, style in _STEPS:
                _points(axis, rows, [row["decrease"][which][key] for row in rows], label, style)
            axis.set_title(title)
        axes[0].set_ylabel("decrease of the loss")
        plain_axis(axes[0].yaxis)
        _legend(figure, axes[0])

    what = (
        "The decrease of the loss that a Newton step along the top direction promises, and what the quadratic of all "
        "data delivers"
    )
    entries = [
        [*(row["decrease"][which][key] for which in titles for key, _, _ in _STEPS), row["second_batch_gain"]]
        for row in rows
    ]
    title, cells = _in_units("Decrease of the loss", entries)
    columns = [Markup(f"{which}:<br>{key}") for which in titles for key, _, _ in _STEPS]
    columns.append(Markup("delivered:<br>other − same"))
    table = Table(title, ["batch", *columns], _named(bias, cells))
    caption = (
        f"{what}; bars are one standard error. Left, slope and curvature are those of the batch that found the "
        "direction; right, those of a second batch."
    )
    return Panel(inline_svg("decrease", what, (7.4, 3.4), draw), caption, [table, _step_table(bias)])


def _step_table(bias: dict[str, Any]) -> Table:
    wanted = ("same", "other", "full")
    entries = [
        [{"value": s["mean"][0], "standard_error": s["standard_error"][0]} for s in map(row["step"].get, wanted)]
        for row in bias["table"]
    ]
    caption, cells = _in_units("Length of that Newton step", entries)
    return Table(caption, ["batch", "same batch", "another batch", "all data"], _named(bias, cells))


def _named(bias: dict[str, Any], rows: list[list[str]]) -> list[list[str]]:
    """Each row of cells with its batch size before it."""
    return [[count(row["batch_size"]), *cells] for row, cells in zip(bias["table"], rows, strict=True)]


def _fixed(entry: dict[str, Any], exponent: int = 0, decimals: int = 2) -> str:
    """`value ± standard error` with so many decimals, in units of 10^exponent."""
    value, error, unit = entry["value"], entry["standard_error"], 10.0**exponent
    return fixed(value if value is None else value / unit, error if error is None else error / unit, decimals)


def _in_units(title: str, entries: list[list[dict[str, Any]]]) -> tuple[str, list[list[str]]]:
    """The title, and the entries as cells: three digits in the largest, in units of a power of ten where it is tiny."""
    values = [abs(entry["value"]) for line in entries for entry in line if entry["value"] is not None]
    size = math.floor(math.log10(max(values))) if any(values) else 0
    exponent = 3 * math.floor(size / 3) if size < -1 or size > 3 else 0
    cells = [[_fixed(entry, exponent, max(0, 2 - (size - exponent))) for entry in line] for line in entries]
    return title + (f", in units of {power_of_ten(exponent)}" if exponent else ""), cells


def _entry(values: dict[str, Any], rank: int) -> str:
    return with_error(values["mean"][rank], values["standard_error"][rank])


def _points(axis: Axes, rows: list[dict[str, Any]], entries: list[dict[str, Any]], label: str, style: Any) -> None:
    """Values with their error bars against the batch sizes."""
    sizes = [row["batch_size"] for row in rows]
    values, errors = ([entry[key] for entry in entries] for key in ("value", "standard_error"))
    measured(axis, sizes, values, errors, label=label, **style)
    batch_sizes(axis, sizes)


def _band(axis: Axes, ranks: np.ndarray, values: dict[str, Any], label: str, style: dict[str, Any]) -> None:
    """Means over the repeats against the rank of the direction, in a band of one standard error."""
    mean, error = np.array(gaps(values["mean"])), np.nan_to_num(np.array(gaps(values["standard_error"])))
    if "marker" in style:
        axis.fill_between(ranks, mean - error, mean + error, color=style["color"], alpha=0.16, linewidth=0)
    axis.plot(ranks, mean, label=label, **{"markersize": 3.2, "linewidth": 1.5, **style})


def _highest_ratio(rows: list[dict[str, Any]]) -> float:
    """The end of the ratios' axis, which starts at 0: above every mean."""
    found = [
        ratio["curvature"][which]["value"] for row in rows for ratio in row["ratios"] for which in ("same", "other")
    ]
    return max(1.5, 1.25 * max((value for value in found if value is not None), default=1.0))


def _reference(axis: Axes, tolerance: float) -> None:
    """A line at 1, and the band that the reading calls unbiased enough."""
    axis.axhline(1, color=FULL, linewidth=1.2, linestyle=(0, (4, 3)), label="_")
    axis.axhspan(1 - tolerance, 1 + tolerance, color=MUTED, alpha=0.12, linewidth=0)


def _legend(figure: Figure, *axes: Axes) -> None:
    """What the axes show, each label once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=len(found))
