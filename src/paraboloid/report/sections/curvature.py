"""Curvature at the end of training: top eigenvalues and where they lie, the trace by layer, the spectral density."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from paraboloid.report.axes import fixed_ticks, log_axis, plain_axis
from paraboloid.report.numbers import UNDEFINED, count, number, percent, with_error
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.sections.layers import colours, left_out, shown
from paraboloid.report.theme import INK, MUTED, RULE, SERIES, inline_svg

# A single eigenvalue in a decade shows as a few per decade (its peak is narrow); what is far below one is noise.
_LEAST_PER_DECADE = 0.1
_LEAST_OF_PEAK = 1e-6  # on a linear axis


def section(record: dict[str, Any]) -> Section:
    """The section "Curvature"."""
    panels = [_eigenvalues(record), _layers(record)]
    if record["curvature"]["density"] is not None:
        panels.append(_density(record))
    return Section("curvature", "Curvature", record["curvature"]["reading"], panels)


def _eigenvalues(record: dict[str, Any]) -> Panel:
    curvature, layers = record["curvature"], record["problem"]["layers"]
    items, trace = curvature["eigenvalues"], curvature["trace"]["value"]
    values = [item["value"] for item in items]
    ranks = list(range(1, len(values) + 1))

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
        top.vlines(ranks, 0, values, color=SERIES[0], linewidth=2.2)
        top.plot(ranks, values, "o", color=SERIES[0], markersize=6)
        top.set(title="Eigenvalue", ylabel="curvature (loss per unit²)")
        top.set_ylim(min(0.0, 1.08 * min(values)), 1.08 * max(values) if max(values) > 0 else 1.0)
        plain_axis(top.yaxis)
        base = np.zeros(len(values))
        for name in shown(layers):
            share = np.array([100 * item["layers"][name] for item in items])
            bottom.bar(ranks, share, 0.62, bottom=base, color=colours(layers)[name], label=name)
            base += share
        if left_out(layers):
            bottom.bar(ranks, np.clip(100 - base, 0, None), 0.62, bottom=base, color=RULE, label="other layers")
        bottom.set(title="Where its eigenvector lies", xlabel="rank", ylabel="% of squared norm", ylim=(0, 100))
        bottom.legend(loc="upper left", bbox_to_anchor=(1.0, 1.04))
        fixed_ticks(bottom.xaxis, ranks)

    what = (
        f"The {len(values)} largest eigenvalues of the {curvature['operator']}, and the share of each eigenvector's "
        "squared norm in each layer"
    )
    rows = []
    for rank, item in zip(ranks, items, strict=True):
        name = max(item["layers"], key=item["layers"].__getitem__)
        where = f"{name} ({percent(item['layers'][name])})"
        rows.append([str(rank), number(item["value"]), _share(item["value"], trace), where])
    table = Table("Top eigenvalues", ["rank", "eigenvalue", "of trace", "mostly in"], rows)
    return Panel(inline_svg("eigenvalues", what, (7.4, 5.0), draw), f"{what}.{left_out(layers)}", [table])


def _layers(record: dict[str, Any]) -> Panel:
    curvature, layers = record["curvature"], record["problem"]["layers"]
    blocks = {block["name"]: block for block in curvature["layers"]}
    names, colour = shown(layers), colours(layers)
    halves = {
        "trace": ("Trace of the diagonal block", "sum of curvatures"),
        "mean_diagonal": ("Mean of its diagonal", "curvature per parameter"),
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (key, (title, unit)) in zip(axes, halves.items(), strict=True):
            values = [blocks[name][key] or 0.0 for name in names]
            errors = [blocks[name]["standard_error"] or 0.0 for name in names] if key == "trace" else []
            bars = axis.barh(
                names, values, 0.62, color=[colour[name] for name in names],
                xerr=errors if any(errors) else None, error_kw={"ecolor": INK, "elinewidth": 1.2},
            )  # fmt: skip
            axis.bar_label(bars, [number(value) for value in values], padding=4, color=MUTED, fontsize=9)
            axis.set(title=title, xlabel=unit)
            axis.grid(False)
            axis.grid(True, axis="x")
            axis.margins(x=0.24)
            axis.locator_params(axis="x", nbins=4)
            axis.tick_params(axis="y", colors=INK)
            plain_axis(axis.xaxis)
        axes[0].invert_yaxis()

    what = f"Trace and mean diagonal of the {curvature['operator']}'s diagonal block of each layer"
    height = 1.5 + 0.36 * len(names)
    return Panel(inline_svg("layers", what, (7.4, height), draw), f"{what}.{left_out(layers)}", [_layer_table(record)])


def _layer_table(record: dict[str, Any]) -> Table:
    trace, size = record["curvature"]["trace"], record["problem"]["parameters"]
    parameters = {layer["name"]: layer["parameters"] for layer in record["problem"]["layers"]}
    rows = [
        [
            block["name"],
            count(parameters[block["name"]]),
            with_error(block["trace"], block["standard_error"]),
            _share(block["trace"], trace["value"]),
            number(block["mean_diagonal"]),
        ]
        for block in record["curvature"]["layers"]
    ]
    total = [
        Markup("<b>all</b>"),
        count(size),
        with_error(trace["value"], trace["standard_error"]),
        _share(trace["value"], trace["value"]),
        number(None if trace["value"] is None else trace["value"] / size),
    ]
    columns = ["layer", "parameters", "trace", "of trace", "mean diagonal"]
    return Table("Diagonal by layer", columns, [*rows, total], note=trace["method"])


def _density(record: dict[str, Any]) -> Panel:
    curvature = record["curvature"]
    density, values = curvature["density"], [item["value"] for item in curvature["eigenvalues"]]
    grid = np.array(density["grid"], float)
    counts = np.array(density["density"], float) * record["problem"]["parameters"]
    log = density["scale"] == "log"
    peak = float(counts.max())
    least = _LEAST_PER_DECADE if log else max(_LEAST_OF_PEAK * peak, 1e-12)

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        axis.fill_between(grid, least, np.maximum(counts, least), color=SERIES[0], alpha=0.16, linewidth=0)
        axis.plot(grid, np.maximum(counts, least), color=SERIES[0])
        log_axis(axis.yaxis, [least, peak])
        if log:
            log_axis(axis.xaxis, [float(grid[0]), float(grid[-1])])
        else:
            plain_axis(axis.xaxis)
        axis.set(xlim=(grid[0], grid[-1]), ylim=(least, 3 * peak))
        ticks = {"color": SERIES[1], "markersize": 9, "markeredgewidth": 1.5}
        label = f"{len(values)} largest eigenvalues"
        axis.plot(values, np.full(len(values), least * 1.8), "|", label=label, **ticks)
        unit = "decade" if log else "unit"
        axis.set(xlabel=f"eigenvalue{' (log scale)' * log}", ylabel=f"eigenvalues per {unit} (log scale)")
        axis.legend(loc="upper right")

    what = f"Spectral density of the {curvature['operator']}"
    caption = (
        f"{what}, by stochastic Lanczos quadrature ({count(density['samples'])} random vectors, "
        f"{count(density['steps'])} steps each), smoothed. "
    )
    if log:
        floor = number(density["floor"] * values[0], 1)
        caption += f"Eigenvalues below {floor}, zero ones included, count as that: the peak at the left. "
    caption += "Ticks at the bottom: the largest eigenvalues."
    return Panel(inline_svg("density", what, (7.4, 3.5), draw), caption, [_spectrum_table(record, values)])


def _spectrum_table(record: dict[str, Any], values: list[float]) -> Table:
    trace = record["curvature"]["trace"]
    outside = None if trace["value"] is None else trace["value"] - sum(values)
    rows = [
        ["eigenvalues", count(record["problem"]["parameters"])],
        ["trace", with_error(trace["value"], trace["standard_error"])],
        ["largest", number(values[0])],
        [f"largest / no. {len(values)}", number(values[0] / values[-1] if values[-1] > 0 else None)],
        [
            "trace / largest",
            number(trace["value"] / values[0] if values[0] > 0 and trace["value"] is not None else None),
        ],
        [f"trace outside the top {len(values)}", _share(outside, trace["value"])],
    ]
    return Table("The spectrum in numbers", ["quantity", "value"], rows)


def _share(part: float | None, whole: float | None) -> str:
    return percent(part / whole) if whole and part is not None else UNDEFINED
