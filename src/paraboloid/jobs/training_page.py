"""The page of `paraboloid train`: curves, what the optimiser says of itself by layer, time, and what to try next."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from paraboloid.report import render_study
from paraboloid.report.axes import gaps, log_axis, whole_axis
from paraboloid.report.numbers import count, number, percent, short
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import SERIES, TEST, TRAIN, inline_svg

LAYERS = 8  # shown by a line each
MANY = 0.05  # of the steps: so many shortened ones are not an accident
FALLS = 0.05  # a share by which the loss still falls in the last quarter
ABOUT = (
    "Losses are means over the whole sets in evaluation mode. Steps that overshoot, or after which the loss rises, are "
    "found by the optimiser itself: see diagnostics() of the optimisers."
)


def page(record: dict[str, Any]) -> str:
    """The HTML page of a training run's record, with what `Run.write_page` adds to it."""
    s = record["settings"]
    title = f"{s['problem']}, trained with {s['optimizer']}"
    whole = {**record, "findings": findings(record), "full": True}
    sections = [_curves(record), *_optimiser(record), _time(record)]
    return render_study(title, ABOUT, whole, sections)


# --- what the numbers say ---------------------------------------------------------------------------------------------


def findings(record: dict[str, Any]) -> list[str]:
    """How far it came, then what to try next, each with the figures that it follows from."""
    first, last = record["metrics"][0], record["metrics"][-1]
    told = f"the training loss went from {number(first['train_loss'])} to {number(last['train_loss'])}"
    if last["test_accuracy"] is not None:
        told += f", the test accuracy to {percent(last['test_accuracy'], 3)}"
    epochs = f"{count(last['epoch'])} epoch{'s' * (last['epoch'] != 1)}"
    return [f"In {epochs} ({count(last['step'])} steps) {told}.", *advice(record)]


def advice(record: dict[str, Any]) -> list[str]:
    """What the next setting to try would be, and why."""
    if len(record["metrics"]) < 2:
        return ["Nothing was trained: give --epochs."]
    lr = record["lr"]
    found = [*_of_steps(record, lr), *_of_curves(record["metrics"], lr)]
    then, last = record["metrics"][_quarter(record["metrics"])], record["metrics"][-1]
    nothing = f"Since epoch {count(then['epoch'])} the training loss moved by less than {percent(FALLS)}, from "
    nothing += (
        f"{number(then['train_loss'])} to {number(last['train_loss'])}: try --lr {short(lr / 3)} for what is left."
    )
    return found or [nothing]


def _of_steps(record: dict[str, Any], lr: float) -> list[str]:
    last = record["metrics"][-1]
    told, steps = last.get("diagnostics") or {}, max(1, last["step"])
    trust, found = told.get("trust"), []
    bad = sum(trust[k] for k in ("overshot", "rose", "taken_back")) if trust else told.get("rejected", 0)
    if told.get("skipped"):
        found.append(f"{count(told['skipped'])} of {count(steps)} steps were skipped for NaN or infinite gradients: "
                     f"try --lr {short(lr / 10)}, and look for such values in the data.")  # fmt: skip
    if bad > MANY * steps:
        why = f" The last time: {trust['why']}." if trust else ""
        found.append(f"{count(bad)} of {count(steps)} steps went wrong and were shortened or taken back: try --lr "
                     f"{short(lr / 3)}, or a damping three times as high.{why}")  # fmt: skip
    elif trust and bad == 0 and trust["rate"] == 1 and _falls(record["metrics"]):
        found.append(
            f"No step was shortened or taken back, and the loss still falls: --lr {short(3 * lr)} may be faster."
        )
    return found


def _of_curves(metrics: list[dict[str, Any]], lr: float) -> list[str]:
    last, best = metrics[-1], min(metrics, key=lambda m: m["test_loss"])
    if last["train_loss"] > metrics[0]["train_loss"]:
        return [f"The training loss rose in all: try --lr {short(lr / 10)}."]
    if best["test_loss"] < (1 - FALLS) * last["test_loss"]:
        lowest = f"The test loss was lowest, {number(best['test_loss'])}, after epoch {count(best['epoch'])}, and is "
        return [lowest + f"{number(last['test_loss'])} now: stop there, or try --weight-decay."]
    if _falls(metrics):
        then = metrics[_quarter(metrics)]
        fell = f"The training loss still fell from {number(then['train_loss'])} to {number(last['train_loss'])} since "
        again = f"give the same command with --resume --epochs {count(2 * last['epoch'])}."
        return [fell + f"epoch {count(then['epoch'])}: {again}"]
    return []


def _quarter(metrics: list[dict[str, Any]]) -> int:
    return max(0, len(metrics) - 1 - max(1, len(metrics) // 4))


def _falls(metrics: list[dict[str, Any]]) -> bool:
    return metrics[-1]["train_loss"] < (1 - FALLS) * metrics[_quarter(metrics)]["train_loss"]


# --- sections ---------------------------------------------------------------------------------------------------------


def _curves(record: dict[str, Any]) -> Section:
    metrics = record["metrics"]
    accurate = metrics[-1]["test_accuracy"] is not None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2 if accurate else 1, squeeze=False)[0]
        epochs = [m["epoch"] for m in metrics]
        for key, color, label in (("train_loss", TRAIN, "training"), ("test_loss", TEST, "test")):
            axes[0].plot(epochs, gaps([m[key] for m in metrics]), color=color, label=label, marker="o")
        log_axis(axes[0].yaxis, [m[key] for m in metrics for key in ("train_loss", "test_loss")])
        axes[0].set(title="Loss", xlabel="epoch", ylabel="mean loss")
        axes[0].legend()
        if accurate:
            for key, color in (("train_accuracy", TRAIN), ("test_accuracy", TEST)):
                axes[1].plot(epochs, gaps([None if m[key] is None else 100 * m[key] for m in metrics]), color=color,
                             marker="o")  # fmt: skip
            axes[1].set(title="Accuracy", xlabel="epoch", ylabel="correct, %")
        for axis in axes:
            whole_axis(axis.xaxis)

    shown = metrics[:: max(1, len(metrics) // 8)]
    accuracy = [percent(m["test_accuracy"], 3) if accurate else "–" for m in shown]
    rows = [[count(m["epoch"]), count(m["step"]), number(m["train_loss"]), number(m["test_loss"]), each]
            for m, each in zip(shown, accuracy, strict=True)]  # fmt: skip
    what = "Losses of the training and test set" + ", and accuracies," * accurate + " after every epoch"
    table = Table("The curve", ["epoch", "step", "training loss", "test loss", "test accuracy"], rows)
    svg = inline_svg("curves", what, (7.4 if accurate else 5.6, 3.1), draw)
    return Section("training", "Training", [], [Panel(svg, what + ".", [table])])


def _optimiser(record: dict[str, Any]) -> list[Section]:
    """Steps that went wrong, damping, and the layers' curvature and trust ratios; nothing for torch's optimisers."""
    told = [(m["epoch"], m["diagnostics"]) for m in record["metrics"] if m.get("diagnostics")]
    if not told:
        return []
    panels, last = [], told[-1][1]
    events = {k: [d["trust"][k] if d.get("trust") else d.get(k, 0) for _, d in told]
              for k in (("overshot", "rose", "taken_back") if last.get("trust") else ("rejected",))}  # fmt: skip
    rates = [d["trust"]["rate"] if d.get("trust") else d.get("rate") for _, d in told]

    def steps(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for i, (name, values) in enumerate([*events.items(), ("skipped", [d["skipped"] for _, d in told])]):
            left.plot([e for e, _ in told], values, color=SERIES[i], label=name.replace("_", " "), marker="o")
        left.set(title="Steps that went wrong", xlabel="epoch", ylabel="so far", ylim=(0, None))
        left.legend()
        right.plot([e for e, _ in told], gaps(rates), color=SERIES[0], marker="o", label="rate of the steps")
        dampings = [d.get("damping") for _, d in told]
        dampings = [v[0] if isinstance(v, list) else v for v in dampings]
        if any(v is not None for v in dampings):
            right.plot([e for e, _ in told], gaps(dampings), color=SERIES[1], marker="o", label="damping")
        right.set(title="Trust", xlabel="epoch", ylim=(0, None))
        right.legend()
        for axis in (left, right):
            whole_axis(axis.xaxis)

    rows = [[k.replace("_", " "), count(v[-1])] for k, v in events.items()] + [["skipped", count(last["skipped"])]]
    why = f"The last one: {last['trust']['why']}." if last.get("trust") else ""
    what = "Steps that were shortened, taken back or skipped, and how far steps are trusted"
    panels.append(Panel(inline_svg("steps", what, (7.4, 3.1), steps), what + ".",
                        [Table("Steps", ["", "in all"], rows, note=why)]))  # fmt: skip
    return [Section("optimiser", "Optimiser", [], panels + _layers(told))]


def _layers(told: list[tuple[int, dict[str, Any]]]) -> list[Panel]:
    last, keys = told[-1][1].get("layers") or {}, ("curvature", "trust_ratio")
    names = sorted((n for n in last if last[n].get("curvature")), key=lambda n: -abs(last[n]["curvature"]))[:LAYERS]
    if not names:
        return []
    shown = [k for k in keys if any(last[n].get(k) is not None for n in names)]

    def draw(figure: Figure) -> None:
        for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            lines = {n: [_positive((d.get("layers") or {}).get(n, {}).get(key)) for _, d in told] for n in names}
            for i, (name, values) in enumerate(lines.items()):
                axes.plot([e for e, _ in told], gaps(values), color=SERIES[i % len(SERIES)], marker="o", label=name)
            log_axis(axes.yaxis, [v for values in lines.values() for v in values])
            axes.set(title=key.replace("_", " ").capitalize(), xlabel="epoch")
            whole_axis(axes.xaxis)
        figure.axes[-1].legend(fontsize=7)

    rows = [[n, last[n]["structure"], number(last[n].get("curvature")), number(last[n].get("damping")),
             number(last[n].get("trust_ratio"))] for n in names]  # fmt: skip
    columns = ["parameter", "structure", "curvature", "damping", "trust ratio"]
    what = "Curvature of the layers (the mean eigenvalue of each block), and the step's length over the parameter's"
    table = Table("At the end; those with the highest curvature", columns, rows)
    return [Panel(inline_svg("layers", what, (10.5, 3.6), draw), what + ".", [table], wide=True)]


def _positive(value: Any) -> float | None:
    return value if isinstance(value, float) and math.isfinite(value) and value > 0 else None


def _time(record: dict[str, Any]) -> Section:
    timed = [(epoch, 1e3 * seconds) for epoch, seconds in record["step_seconds"]]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([e for e, _ in timed], [t for _, t in timed], color=SERIES[0], marker="o")
        axes.set(xlabel="epoch", ylabel="ms per step", ylim=(0, None))
        whole_axis(axes.xaxis)

    if not timed:
        return Section("time", "Time", ["No step was timed."])
    mean = sum(t for _, t in timed) / len(timed)
    words = [f"A step took {number(mean)} ms on average, {number(timed[0][1])} ms in the first epoch."]
    svg = inline_svg("time", "Milliseconds per step in every epoch", (5.6, 2.6), draw)
    return Section("time", "Time", words, [Panel(svg, "Milliseconds per step, evaluations left out.")])
