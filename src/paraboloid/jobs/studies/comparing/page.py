"""Figures and tables of a comparison of optimisers."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from paraboloid.jobs.studies.comparing.summary import Summary
from paraboloid.report.axes import gaps, log_axis
from paraboloid.report.numbers import fixed, number, short
from paraboloid.report.section import Table
from paraboloid.report.theme import SERIES, inline_svg

STYLES = {"first order": ":", "peers": "--", "ours": "-"}
SHOWN = 4  # of a family's methods, in the figures
CAPTION = (f"mean over seeds: by epochs (left) and by seconds (right). The best {SHOWN} methods of each family; "
           "dotted: first order, dashed: other packages', solid: this package's.")  # fmt: skip


def curves(name: str, title: str, found: dict[str, Summary]) -> Markup:
    """Training and test loss of the best of each family."""
    return inline_svg(name, title, (10.5, 7.2), lambda figure: _curves(figure, _chosen(found)))


def _chosen(found: dict[str, Summary]) -> list[Summary]:
    chosen: list[Summary] = []
    for family in STYLES:
        mine = sorted((s for s in found.values() if s.family == family and s.final is not None),
                      key=lambda s: s.final or 0.0)  # fmt: skip
        chosen += mine[:SHOWN]
    return chosen


def _curves(figure: Figure, chosen: list[Summary]) -> None:
    grid = figure.subplots(2, 2, sharey="row")
    for row, key in zip(grid, ("train", "test"), strict=True):
        for ax, along in zip(row, ("epoch", "seconds"), strict=True):
            for i, s in enumerate(chosen):
                points = [p for p in s.curve if p["epoch"]]  # the start is the same for all, and far above
                ax.plot(gaps([p[along] for p in points]), gaps([p[key] for p in points]), label=s.name,
                        color=SERIES[i % len(SERIES)], linestyle=STYLES[s.family])  # fmt: skip
            if along == "seconds":
                log_axis(ax.xaxis, [p["seconds"] for s in chosen for p in s.curve if p["epoch"]])
        log_axis(row[0].yaxis, [p[key] for s in chosen for p in s.curve if p["epoch"]])
        row[0].set_ylabel(f"{'training' if key == 'train' else 'test'} loss")
    grid[1][0].set_xlabel("epoch")
    grid[1][1].set_xlabel("seconds")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def winners(found: dict[str, Summary]) -> Table:
    adam = found.get("Adam")
    rows = [
        [s.name, _setting(s.setting), fixed(s.final, s.error), fixed(s.test, None),
         number(s.seconds / adam.seconds, 2) if adam else number(s.seconds), short(s.epochs), number(s.to_adam, 2)]
        for s in sorted(found.values(), key=lambda s: float("inf") if s.final is None else s.final)
    ]  # fmt: skip
    return Table("The best setting of every method", ["method", "setting", "training loss", "test loss",
                 "seconds / Adam's", "epochs to Adam's last loss", "seconds to it / Adam's"], rows)  # fmt: skip


def grids(problem: dict[str, Any]) -> Table:
    rows = [
        [row["name"], _setting(run["setting"]), "failed" if run["failed"] else fixed(run["final"], None),
         number(run["seconds"])] for row in problem["methods"] for run in row["grid"]
    ]  # fmt: skip
    return Table("Every setting of every grid, first seed", ["method", "setting", "training loss", "seconds"], rows,
                 folded=True)  # fmt: skip


def _setting(setting: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v if isinstance(v, list | tuple) else short(v)}" for k, v in setting.items())
