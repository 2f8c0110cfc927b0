"""The page of the study: a section for each part, a figure and a table in each."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from paraboloid.jobs.studies.debiasing import reading
from paraboloid.jobs.studies.debiasing.reading import Rows, at_iteration, cell, distinct, where
from paraboloid.report.axes import batch_sizes, fixed_ticks, log_axis, measured, plain_axis
from paraboloid.report.numbers import count, fixed, number, percent, power_of_ten, short
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, MUTED, OTHER, SAME, SERIES, inline_svg

RULES = {"single": (SAME, "o"), "debiased": (OTHER, "s"), "folds": (SERIES[2], "^"), "double": (FULL, "D")}
KINDS = {
    "single": ("Kronecker", SAME, "o"), "single_exact": ("exact", SERIES[4], "v"),
    "debiased": ("Kronecker, debiased", OTHER, "s"), "debiased_exact": ("exact, debiased", SERIES[2], "^"),
}  # fmt: skip


def sections(results: dict[str, Any]) -> list[Section]:
    """All sections, in the order of the findings."""
    made = {
        "table": ("Curvature and slope", _table), "training": ("Along training", _training),
        "grid": ("Width and depth", _grid), "factors": ("Kronecker factors", _factors),
        "steps": ("Steps", _steps), "posteriors": ("Posteriors", _posteriors),
    }  # fmt: skip
    return [
        Section(part, title, getattr(reading, part)(results), draw(results[part]))
        for part, (title, draw) in made.items()
    ]


def _table(part: dict[str, Any]) -> list[Panel]:
    moments = {0: "at initialisation", 1: "trained"}

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        for moment, words in moments.items():
            rows, line = where(part["rows"], moment=moment), "-" if moment else ":"
            for ax, of, title in ((axes[0], "top", "Top curvature"), (axes[1], "sum", f"Sum of the top {part['k']}")):
                for which, color, label in (("same", SAME, "same batch"), ("other", OTHER, "another batch")):
                    _against(ax, rows, "batch_size", [row[which][of] for row in rows], color, f"{label}, {words}", line)
                ax.axhline(1, color=MUTED, linewidth=1)
                ax.set(title=title, ylabel="/ that on all data" if of == "top" else "")
            _against(
                axes[2], rows, "batch_size", [row["gradient"] for row in rows], SERIES[3] if moment else FULL, words
            )
            sizes = [row["batch_size"] for row in rows]
            axes[2].plot(sizes, [row["gradient"]["formula"] for row in rows], color=MUTED, linestyle=":", zorder=3)
        axes[2].set(title="‖g_B‖² / ‖g‖²", yscale="log")
        log_axis(axes[2].yaxis, [row["gradient"]["value"] for row in part["rows"]])
        for ax in axes:
            _sizes(ax, part["rows"])
        _from_zero(axes[:2])
        axes[0].legend()
        axes[2].legend()

    columns = [
        "", "batch", "top, same", f"top {part['k']}, same", f"top {part['k']}, other", "‖g_B‖² / ‖g‖²", "formula",
    ]  # fmt: skip
    rows = [
        [moments[int(row["moment"])], count(row["batch_size"]), cell(row["same"]["top"]), cell(row["same"]["sum"]),
         cell(row["other"]["sum"]), cell(row["gradient"]), fixed(row["gradient"]["formula"], None)]
        for row in part["rows"]
    ]  # fmt: skip
    what = f"{part['problem']}: curvature along a batch's top eigenvectors over that on all data, by batch size"
    caption = (
        f"{what}, and the squared norm of its gradient (dotted: 1 + (1 − m/N) S / (m ‖g‖²)). Means of "
        f"{count(part['repeats'])} repeats; bars are one standard error."
    )
    table = Table("Ratios of sums over the repeats, ± one standard error", columns, rows)
    return [Panel(inline_svg("table", what, (10.5, 3.6), draw), caption, [table], wide=True)]


def _training(part: dict[str, Any]) -> list[Panel]:
    names = distinct(part["rows"], "problem")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False)
        for column, name in zip(axes.T, names, strict=True):
            mine = where(part["rows"], problem=name)
            for i, moment in enumerate(distinct(mine, "moment")):
                rows, label = where(mine, moment=moment), f"after {percent(moment)} of the training"
                for ax, which in zip(column, ("same", "other"), strict=True):
                    _against(ax, rows, "batch_size", [row[which]["top"] for row in rows], SERIES[i], label)
            for ax in column:
                ax.axhline(1, color=MUTED, linewidth=1)
                _sizes(ax, mine, "" if ax is column[0] else "batch size")
            column[0].set_title(name)
        for ax, words in zip(axes[:, 0], ("same batch / all data", "another / all data"), strict=True):
            ax.set_ylabel(words)
        _from_zero(axes[:, 0])
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=5)

    columns = ["", "training", "batch", "top, same", "top, other", f"top {part['k']}, same", f"top {part['k']}, other"]
    rows = [
        [row["problem"], percent(row["moment"]), count(row["batch_size"])]
        + [cell(row[which][of]) for of in ("top", "sum") for which in ("same", "other")]
        for row in part["rows"]
    ]
    what = "Top curvature on the batch that chose the direction, and on another, over that on all data"
    caption = f"{what}: {count(part['repeats'])} repeats; bars are one standard error."
    table = Table(f"All {len(rows)} rows", columns, rows, folded=True)
    return [Panel(inline_svg("training", what, (10.5, 5.6), draw), caption, [table], wide=True)]


def _grid(part: dict[str, Any]) -> list[Panel]:
    sizes = distinct(part["rows"], "batch_size")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
        for ax, m in zip(axes, sizes, strict=True):
            mine = where(part["rows"], batch_size=m)
            for i, depth in enumerate(distinct(mine, "depth")):
                rows = where(mine, depth=depth)
                label = f"{depth} convolutions"
                _against(
                    ax, rows, "parameters", [row["same"]["top"] for row in rows], SERIES[i], f"{label}, same batch"
                )
                _against(
                    ax, rows, "parameters", [row["other"]["top"] for row in rows], SERIES[i], f"{label}, another", ":"
                )
            ax.axhline(1, color=MUTED, linewidth=1)
            log_axis(ax.xaxis, [row["parameters"] for row in mine])
            ax.set(title=f"batches of {count(m)}", xlabel="parameters")
        _from_zero(axes[:1])
        axes[0].set_ylabel("top curvature / that on all data")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)

    columns = ["width × depth", "parameters", "loss", "batch", "top, same", "top, other"]
    rows = [
        [f"{short(row['width'])} × {row['depth']}", count(row["parameters"]), number(row["train_loss"]),
         count(row["batch_size"]), cell(row["same"]["top"]), cell(row["other"]["top"])]
        for row in part["rows"]
    ]  # fmt: skip
    what = "The bias of shapes-cnn's top curvature by number of parameters"
    caption = (
        f"{what}. Width multiplies 3c3d's channels; each network is measured when its training loss on "
        f"{count(part['samples'])} images first falls to {short(part['loss'])}, or at the end of the training. "
        f"{count(part['repeats'])} repeats; bars are one standard error."
    )
    return [Panel(inline_svg("grid", what, (7.4, 3.8), draw), caption, [Table("The networks", columns, rows)])]


def _factors(part: dict[str, Any]) -> list[Panel]:
    names = distinct(part["rows"], "problem")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for ax, name in zip(axes, names, strict=True):
            for kind, line in (("kronecker", "-"), ("exact", ":")):
                rows = where(part["rows"], problem=name, eigenvalue=kind)
                for which, color, label in (("same", SAME, "same batch"), ("other", OTHER, "another batch")):
                    _against(ax, rows, "batch_size", [r[which]["top"] for r in rows], color, f"{label}, {kind}", line)
            ax.axhline(1, color=MUTED, linewidth=1)
            _sizes(ax, part["rows"])
            ax.set_title(name)
        _from_zero(axes[:1])
        axes[0].set_ylabel("largest eigenvalue / all data")
        axes[0].legend()

    columns = [
        "", "batch", "eigenvalues", "top, same", "top, other", f"top {part['k']}, same", f"top {part['k']}, other",
    ]  # fmt: skip
    rows = [
        [row["problem"], count(row["batch_size"]), row["eigenvalue"]]
        + [cell(row[which][of]) for of in ("top", "sum") for which in ("same", "other")]
        for row in part["rows"]
    ]
    what = "Eigenvalues along a batch's Kronecker eigenvectors, over those of all data"
    caption = (
        f"{what}: KFAC's (Kronecker) and EKFAC's (exact), the largest. {count(part['repeats'])} "
        "repeats; bars are one standard error."
    )
    table = Table(f"Over all data: all {len(rows)} rows", columns, rows, folded=True)
    return [Panel(inline_svg("factors", what, (10.5, 3.6), draw), caption, [table], wide=True)]


def _steps(part: dict[str, Any]) -> list[Panel]:
    last = max(row["moment"] for row in part["rows"])
    shown = where(part["rows"], moment=last)
    names = distinct(shown, "problem")
    sizes = distinct(shown, "batch_size")
    iterations = part["iterations"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(names), len(sizes), sharex=True, squeeze=False)
        for line, name in zip(axes, names, strict=True):
            for ax, m in zip(line, sizes, strict=True):
                (row,) = where(shown, problem=name, batch_size=m)
                for rule, (color, marker) in RULES.items():
                    values = row["decrease"][rule]
                    measured(ax, iterations, values["mean"], values["standard_error"], color=color, marker=marker,
                             markersize=3.5, elinewidth=1, linewidth=1.3, label=part["rules"][rule])  # fmt: skip
                ax.axhline(0, color=MUTED, linewidth=1)
                ax.set_title(f"{name}, m = {count(m)}")
                plain_axis(ax.yaxis)
                fixed_ticks(ax.xaxis, [1, *range(5, iterations[-1] + 1, 5)])
            line[0].set_ylabel("decrease of the loss")
        for ax in axes[-1]:
            ax.set_xlabel("iteration")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2)

    at = reading.place(iterations)
    columns = ["", "training", "m", *part["rules"], "debiased − single", "debiased − double", "folds − double"]
    rows = [
        [row["problem"], percent(row["moment"]), count(row["batch_size"])]
        + [at_iteration(row["decrease"][rule], at) for rule in part["rules"]]
        + [
            at_iteration(row[key], at)
            for key in ("debiased_minus_single", "debiased_minus_double", "folds_minus_double")
        ]
        for row in part["rows"]
    ]
    what = "By how much conjugate-gradient steps of mini-batches lower the loss on all data"
    caption = (
        f"{what}, trained; above 0 is better. Damping {short(part['damping'])}; {count(part['repeats'])} repeats, "
        "bars are one standard error."
    )
    note = "; ".join(f"{rule}: {words}" for rule, words in part["rules"].items()) + ". Differences are paired."
    table = Table(
        f"Decrease at iteration {iterations[at]} in units of {power_of_ten(-3)}, ± one standard error",
        columns,
        rows,
        note,
    )
    return [Panel(inline_svg("steps", what, (10.5, 0.9 + 2.5 * len(names)), draw), caption, [table], wide=True)]


def _posteriors(part: dict[str, Any]) -> list[Panel]:
    names = distinct(part["rows"], "problem")
    priors = distinct(part["rows"], "prior_precision")

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(names), len(priors), sharex=True, squeeze=False)
        for line, name in zip(axes, names, strict=True):
            for ax, prior in zip(line, priors, strict=True):
                rows = where(part["rows"], problem=name, prior_precision=prior)
                for kind, (label, color, _) in KINDS.items():
                    _against(ax, rows, "batch_size", [row[kind] for row in rows], color, label)
                ax.axhline(rows[0]["full"], color=FULL, linewidth=3, alpha=0.3, label="all data")
                ax.axhline(rows[0]["map"], color=MUTED, linewidth=1, linestyle=":", label="no posterior")
                ax.set_title(f"{name}, prior {short(prior)}")
                plain_axis(ax.yaxis)
                _sizes(ax, rows, "m" if name == names[-1] else "")
            line[0].set_ylabel("test NLL")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=6)

    columns = [
        "", "prior", "m", *(label for label, _, _ in KINDS.values()), "all data", "no posterior", "debiased − plain",
    ]  # fmt: skip
    rows = [
        [row["problem"], short(row["prior_precision"]), count(row["batch_size"])]
        + [cell(row[kind], 3) for kind in KINDS]
        + [fixed(row["full"], None, 3), fixed(row["map"], None, 3), cell(row["debiased_minus_single"], 3)]
        for row in part["rows"]
    ]
    what = "Test negative log-likelihood of Laplace posteriors fitted on 2m samples that stand for all data"
    caption = f"{what}; lower is better. {count(part['repeats'])} repeats; bars are one standard error."
    note = "Debiased: eigenvectors from m samples and eigenvalues from the other m, in both roles."
    table = Table("Test NLL, ± one standard error", columns, rows, note)
    return [Panel(inline_svg("posteriors", what, (10.5, 0.9 + 2.6 * len(names)), draw), caption, [table], wide=True)]


def _against(
    ax: Axes, rows: Rows, x: str, entries: list[dict[str, Any]], color: str, label: str, line: str = "-"
) -> None:
    values, errors = ([entry[key] for entry in entries] for key in ("value", "standard_error"))
    measured(ax, [row[x] for row in rows], values, errors, color=color, linestyle=line, marker="o", markersize=3.5,
             label=label)  # fmt: skip


def _from_zero(axes: Any) -> None:
    """Axes that start at 0, after everything is drawn: setting one end freezes the other."""
    for ax in axes:
        ax.set_ylim(0, max(1.1, ax.get_ylim()[1]))


def _sizes(ax: Axes, rows: Rows, label: str = "batch size") -> None:
    batch_sizes(ax, sorted({row["batch_size"] for row in rows}), label)
