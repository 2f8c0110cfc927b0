"""The training curve: losses on a logarithmic axis, and the accuracy where there is one."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from paraboloid.report.axes import gaps, log_axis, plain_axis
from paraboloid.report.numbers import count, number, percent, short
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import TEST, TRAIN, inline_svg


def section(record: dict[str, Any]) -> Section:
    """The section "Training"; of a model taken as given it holds its words only."""
    training = record["training"]
    panels = [_panel(training)] if training["steps"] else []
    return Section("training", "Training", training["reading"], panels)


def _panel(training: dict[str, Any]) -> Panel:
    curve = training["curve"]
    accurate = any(point.get("test_accuracy") is not None for point in curve)
    tested = any(point.get("test_loss") is not None for point in curve)

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2 if accurate else 1, squeeze=False)[0]
        epochs = [point["epoch"] for point in curve]
        losses = [point["train_loss"] for point in curve] + [point.get("test_loss") for point in curve]
        axes[0].plot(epochs, gaps([point["train_loss"] for point in curve]), color=TRAIN, label="training")
        if tested:
            axes[0].plot(epochs, gaps([point.get("test_loss") for point in curve]), color=TEST, label="test")
        log_axis(axes[0].yaxis, losses)
        axes[0].set(title="Loss", xlabel="epoch", ylabel="mean loss")
        axes[0].legend()
        if accurate:
            axes[1].plot(epochs, gaps([point.get("test_accuracy") for point in curve]), color=TEST, label="test")
            axes[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
            axes[1].set(title="Accuracy", xlabel="epoch", ylabel="correct on the test set")
        for axis in axes:
            plain_axis(axis.xaxis)
            axis.margins(x=0.02)

    what = "Training and test loss" + (", and test accuracy," if accurate else "") + " over the epochs"
    shown = _rows(curve)
    columns = ["epoch", "step", "training loss"] + ["test loss"] * tested + ["test accuracy"] * accurate
    rows = [
        [short(p["epoch"]), count(p["step"]), number(p["train_loss"])]
        + [number(p.get("test_loss"))] * tested
        + [percent(p.get("test_accuracy"), 3)] * accurate
        for p in shown
    ]
    size = (7.4, 3.1) if accurate else (5.6, 3.1)
    return Panel(
        inline_svg("training", what, size, draw),
        f"{what}. Evaluated with the model in evaluation mode on the whole sets.",
        [Table("The curve at some epochs", columns, rows, note=_settings(training))],
    )


def _rows(curve: list[dict[str, Any]], most: int = 8) -> list[dict[str, Any]]:
    """First and last point of the curve and some between, denser at the start, where it moves."""
    last = len(curve) - 1
    picks = {round(last * (i / (most - 1)) ** 2) for i in range(most)}
    return [curve[i] for i in sorted(picks)]


def _settings(training: dict[str, Any]) -> str:
    parts = [training["optimizer"], f"learning rate {short(training['lr'])}"]
    if training.get("momentum"):
        parts.append(f"momentum {short(training['momentum'])}")
    parts.append(f"batches of {count(training['batch_size'])}")
    parts.append(f"weight decay {short(training['weight_decay'])}" if training["weight_decay"] else "no weight decay")
    return ", ".join(parts) + "."
