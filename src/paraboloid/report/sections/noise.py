"""Gradient noise over training: average variance, normalised variance, and noise against signal, for each layer."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paraboloid.report.axes import fixed_ticks, gaps, log_axis, plain_axis
from paraboloid.report.numbers import count, number, short
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.sections import clusters
from paraboloid.report.sections.layers import colours, left_out, shown
from paraboloid.report.theme import INK, MUTED, inline_svg

LABELS = {"sg2b": "SG-2B", "svrg": "SVRG", "gc": "GC"}
_PANELS = (
    ("average_variance", "Average variance", "variance per parameter"),
    ("normalized_variance", "Normalised variance", "variance / second moment"),
    ("noise_to_signal", "Noise to signal", "noise / signal"),
)


def section(record: dict[str, Any]) -> Section:
    """The section "Gradient noise"."""
    noise, layers = record["noise"], record["problem"]["layers"]
    what = f"Gradient noise of mini-batches of {count(noise['batch_size'])} over training, for each layer"
    caption = (
        f"{what}: variance per parameter; variance over second moment (1 is pure noise); noise over signal, equal at "
        f"the dashed line.{left_out(layers)}"
    )
    figure = inline_svg("noise", what, (7.4, 7.0), lambda figure: _draw(figure, record))
    tables = [_by_layer(record), _over_time(noise)]
    if any("estimators" in point for point in noise["checkpoints"]):
        tables.append(_estimators(noise))
    panels = [Panel(figure, caption, tables), *clusters.panels(noise.get("clusters"))]
    return Section("noise", "Gradient noise", noise["reading"], panels)


def key_numbers(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The few numbers under the headline of a page of the noise alone: (label, value, unit or remark)."""
    noise = record["noise"]
    last = noise["checkpoints"][-1]["total"]
    size = count(noise["batch_size"])
    found = [
        (f"noise of a batch of {size}", number(last["noise_to_signal"]), "times the signal"),
        ("normalised variance", number(last["normalized_variance"], 2), "1 is pure noise"),
        ("critical batch size", number(last["noise_scale"]), critical(last)),
    ]
    if (clustered := noise.get("clusters")) is not None:
        found.append(("by gradient clusters", f"{number(clustered['variance_ratio'], 2)}×", "the variance"))
    return [
        *found,
        ("parameters", count(record["problem"]["parameters"]), f"{len(record['problem']['layers'])} layers"),
    ]


def critical(total: dict[str, Any]) -> str:
    """The remark under the critical batch size."""
    return "noise equals signal" if total["noise_scale"] is not None else "the signal is within its noise"


def _estimators(noise: dict[str, Any]) -> Table:
    """Average variances over that of SG-B, at each checkpoint."""
    points = [point for point in noise["checkpoints"] if "estimators" in point]
    names = list(points[0]["estimators"])
    rows = []
    for point in points:
        base = point["estimators"]["sgb"]["average_variance"]
        others = [point["estimators"][name]["average_variance"] for name in names if name != "sgb"]
        rows.append([short(point["epoch"]), number(base), *(f"{number(v / base, 2)}×" if base else "" for v in others)])
    draws = points[0]["estimators"]["sgb"]["draws"]
    columns = ["epoch", "SG-B", *(str(LABELS.get(n, n)) for n in names if n != "sgb")]
    return Table(
        "Estimators of the gradient", columns, rows,
        note=f"Average variance of SG-B, and that of others over it; {draws} draws each. SG-2B takes twice the batch, "
        "SVRG refers to the checkpoint before, GC draws from as many gradient clusters.",
    )  # fmt: skip


def _by_layer(record: dict[str, Any]) -> Table:
    last = record["noise"]["checkpoints"][-1]
    parameters = {layer["name"]: layer["parameters"] for layer in record["problem"]["layers"]}
    rows = [[row["name"], count(parameters[row["name"]]), *_cells(row)] for row in last["layers"]]
    total = [Markup("<b>all</b>"), count(record["problem"]["parameters"]), *_cells(last["total"])]
    return Table(
        f"Layers at epoch {short(last['epoch'])}, batches of {count(record['noise']['batch_size'])}",
        ["layer", "parameters", "average variance", "normalised", "noise / signal"],
        [*rows, total],
    )


def _over_time(noise: dict[str, Any]) -> Table:
    return Table(
        "All parameters over training",
        ["epoch", "average variance", "normalised", "noise / signal", "critical batch"],
        [
            [short(point["epoch"]), *_cells(point["total"]), number(point["total"]["noise_scale"])]
            for point in noise["checkpoints"]
        ],
        note=Markup(
            "Critical batch: tr&#8239;Σ / (‖g‖² − tr&#8239;Σ / N) samples, where noise and signal are equal; a dash "
            "where the gradient cannot be told from its noise."
        ),
    )


def _cells(row: dict[str, Any]) -> list[str]:
    return [number(row["average_variance"]), number(row["normalized_variance"], 2), number(row["noise_to_signal"])]


def _draw(figure: Figure, record: dict[str, Any]) -> None:
    checkpoints, layers = record["noise"]["checkpoints"], record["problem"]["layers"]
    names, colour = shown(layers), colours(layers)
    epochs = [point["epoch"] for point in checkpoints]
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (key, title, unit) in zip(axes, _PANELS, strict=True):
        series = {name: [_layer(point, name)[key] for point in checkpoints] for name in names}
        for name, values in series.items():
            axis.plot(epochs, gaps(values), "o-", color=colour[name], label=name)
        total = [point["total"][key] for point in checkpoints]
        axis.plot(epochs, gaps(total), "o--", color=INK, label="all parameters", linewidth=1.4, markersize=3.5)
        axis.set(title=title, ylabel=unit)
        _scale(axis, key, [value for values in (*series.values(), total) for value in values])
    _epochs(axes[-1], epochs)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4 if max(map(len, labels)) < 16 else 2)


def _scale(axis: Axes, key: str, values: list[float | None]) -> None:
    if key == "normalized_variance":
        axis.set_ylim(0, 1.03)
        plain_axis(axis.yaxis)
        return
    log_axis(axis.yaxis, values)
    if key == "noise_to_signal":
        axis.axhline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))


def _epochs(axis: Axes, epochs: list[float]) -> None:
    """Checkpoints lie closer at the start of training: a scale that is linear up to one epoch, logarithmic beyond."""
    if len(epochs) > 1 and epochs[-1] > 2:
        axis.set_xscale("symlog", linthresh=1, linscale=0.5)
        axis.set_xlim(-0.12, 1.08 * epochs[-1])
    fixed_ticks(axis.xaxis, epochs)
    axis.set_xlabel("epoch")


def _layer(point: dict[str, Any], name: str) -> dict[str, Any]:
    return next(layer for layer in point["layers"] if layer["name"] == name)
