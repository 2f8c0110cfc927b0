"""The page of the study: the table of findings, the random features, the image problems."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paraboloid.jobs.studies.claims import claims_table
from paraboloid.jobs.studies.gradient_variance.reading import AVERAGE, NORMALISED, claims, mean, ratio
from paraboloid.report.axes import fixed_ticks, gaps
from paraboloid.report.numbers import count, fixed, number, percent
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, OTHER, SAME, SERIES, inline_svg

OVERVIEW = "Variance over that of SG-B, late in the training of random-feature models."
LOOK = {"sgb": ("SG-B", FULL), "sg2b": ("SG-2B", SERIES[2]), "svrg": ("SVRG", SAME), "gc": ("GC", OTHER)}


def sections(results: dict[str, Any]) -> list[Section]:
    """Findings, random features, images."""
    table = claims_table("The paper's findings, and what was measured here", claims(results))
    return [
        Section("findings", "Findings", [], [Panel(_overview(results), OVERVIEW, [table], wide=True)]),
        Section("features", "Random features", [], _features(results["features"])),
        Section("images", "Image classifiers", [], [_images(results["images"], name) for name in _names(results)]),
    ]  # fmt: skip


def _names(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["problem"] for row in results["images"]))


def _by_share(rows: list[dict[str, Any]], width: int, name: str) -> tuple[list[float], list[float | None]]:
    shares = sorted({r["duplicated"] for r in rows})
    return shares, [
        mean([ratio(r["points"], name) for r in rows if r["duplicated"] == s and r["width"] == width]) for s in shares
    ]


def _overview(results: dict[str, Any]) -> Any:
    rows = results["features"]
    widths = sorted({r["width"] for r in rows})

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for i, width in enumerate(widths):
            shares, values = _by_share(rows, width, "gc")
            ax.plot(shares, gaps(values), marker="o", color=SERIES[i % len(SERIES)], label=f"GC, width {count(width)}")
        shares, values = _by_share(rows, widths[-1], "svrg")
        ax.plot(shares, gaps(values), marker="s", linestyle=":", color=SAME, label=f"SVRG, width {count(widths[-1])}")
        ax.axhline(1, color=FULL, linewidth=1)
        ax.axhline(0.5, color=SERIES[2], linewidth=1, linestyle=":")
        ax.set(xlabel="share of duplicates", ylabel="variance / SG-B", ylim=(0, None))
        ax.legend()

    return inline_svg("overview", "Variance of clustering over that of plain sampling, by duplicates", (7.4, 3.6), draw)


def _features(rows: list[dict[str, Any]]) -> list[Panel]:
    widths, shares = sorted({r["width"] for r in rows}), sorted({r["duplicated"] for r in rows})

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(shares), len(widths), squeeze=False, sharex=True)
        for i, share in enumerate(shares):
            for j, width in enumerate(widths):
                row = next(r for r in rows if r["duplicated"] == share and r["width"] == width)
                _curves(grid[i][j], row["points"], AVERAGE)
                if i == 0:
                    grid[i][j].set_title(f"width {count(width)}")
                if j == 0:
                    grid[i][j].set_ylabel(f"{percent(share)} copies")
        for ax in grid[-1]:
            ax.set_xlabel("step")
        grid[0][0].legend(fontsize=7)

    cells = [
        [f"{count(w)}, {percent(s)}", *(fixed(mean([ratio(r["points"], name) for r in rows
         if r["width"] == w and r["duplicated"] == s]), None) for name in ("sg2b", "svrg", "gc"))]
        for w in widths for s in shares
    ]  # fmt: skip
    table = Table("Variance over that of SG-B, second half of the training, between renewals",
                  ["width, copies", "SG-2B", "SVRG", "GC"], cells)  # fmt: skip
    title = "Average variance along the training of random-feature models"
    svg = inline_svg("features", title, (10.5, 1.0 + 1.9 * len(shares)), draw)
    return [
        Panel(svg, f"{title}, batches of 10; by width (columns) and share of duplicates (rows).", [table], wide=True)
    ]


def _curves(ax: Any, points: list[dict[str, Any]], key: str) -> None:
    """Each estimator at the points between renewals; SVRG is exact at the others."""
    chosen = [p for p in points if p["between"]]
    for name, (label, color) in LOOK.items():
        ax.plot([p["step"] for p in chosen], gaps([p[name][key] for p in chosen]), marker="o", color=color, label=label)
    ax.set_yscale("log")


def _images(rows: list[dict[str, Any]], name: str) -> Panel:
    mine = [r for r in rows if r["problem"] == name]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(mine), squeeze=False, sharex="col")
        for j, row in enumerate(mine):
            _curves(grid[0][j], row["points"], AVERAGE)
            _curves(grid[1][j], row["points"], NORMALISED)
            grid[1][j].axhline(1, color=FULL, linewidth=0.8)
            grid[1][j].set_yscale("linear")
            grid[1][j].set_ylim(0, None)
            grid[0][j].set_title(row["variant"], fontsize=9)
            grid[1][j].set_xlabel("step")
            fixed_ticks(grid[1][j].xaxis, [row["points"][0]["step"], row["points"][-1]["step"]])
        grid[0][0].set_ylabel("average variance")
        grid[1][0].set_ylabel("normalised variance")
        grid[0][0].legend(fontsize=7)

    cells = [
        [r["variant"], *(fixed(ratio(r["points"], k), None) for k in ("sg2b", "svrg", "gc")),
         number(r["points"][-1]["sgb"][AVERAGE]), fixed(r["points"][-1]["sgb"][NORMALISED], None),
         number(r["curve"][-1]["test_loss"]), percent(r["curve"][-1]["test_accuracy"])]
        for r in mine
    ]  # fmt: skip
    columns = ["", "SG-2B / SG-B", "SVRG / SG-B", "GC / SG-B", "SG-B at the end", "normalised", "test loss", "accuracy"]
    svg = inline_svg(f"images-{name}", f"Variance along the training of {name}", (2.4 * len(mine) + 0.6, 4.4), draw)
    table = Table(f"{name}: ratios over the second half of the training, between renewals", columns, cells)
    return Panel(svg, f"{name}: average variance (above) and normalised variance (below) along the training.", [table],
                 wide=True)  # fmt: skip
