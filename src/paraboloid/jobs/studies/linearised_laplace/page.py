"""The page of the study: the claims, the ways to choose a prior, and rescaled weights."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paraboloid.jobs.studies.claims import claims_table
from paraboloid.jobs.studies.linearised_laplace import em, growth
from paraboloid.jobs.studies.linearised_laplace.measurements import WAYS
from paraboloid.jobs.studies.linearised_laplace.reading import average, claims
from paraboloid.report.axes import log_axis
from paraboloid.report.numbers import fixed, number
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, SERIES, inline_svg

MEASURES = (("nll", "negative log-likelihood"), ("ece", "calibration error"), ("auroc", "noise told, AUROC"))


def sections(results: dict[str, Any]) -> list[Section]:
    """Claims, priors, structures, rescaling."""
    table = claims_table("Claims, and what was measured here", claims(results), "claim")
    rows = results["evidence"]
    overview = Panel(_overview(rows), "Means over networks, moments and seeds.", [table], wide=True)
    priors = Panel(_likelihoods(rows), _CAPTION, _tables(rows), wide=True)
    found = [Section("claims", "Claims", [], [overview]), Section("priors", "Ways to choose a prior", [], [priors])]
    if results["rescaling"]:
        found.append(Section("rescaling", "Rescaled weights", [], [_rescaling(results["rescaling"])]))
    return [*found, em.section(results["em"], results["evidence"][0]["hidden"]), growth.section(results["growth"])]


_CAPTION = "Negative log-likelihood of test digits under each way to choose the prior, by structure and moment."


def _overview(rows: list[dict[str, Any]]) -> Any:
    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(MEASURES))
        for axis, (key, label) in zip(axes, MEASURES, strict=True):
            values = [average(rows, key, way=way) or 0.0 for way in WAYS]
            axis.barh(list(WAYS), values, 0.6, color=SERIES[0])
            axis.axvline(average(rows, key, structure="network") or 0.0, color=FULL, linewidth=1)
            axis.set(title=label)
            axis.invert_yaxis()
            if axis is not axes[0]:
                axis.set_yticklabels([])

    return inline_svg("overview", "Likelihood, calibration and noise; the line is the network itself", (9.5, 2.6), draw)


def _likelihoods(rows: list[dict[str, Any]]) -> Any:
    moments = sorted({row["epochs"] for row in rows})
    structures = [s for s in dict.fromkeys(row["structure"] for row in rows) if s != "network"]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(structures), sharey=True, squeeze=False)[0]
        for axis, structure in zip(axes, structures, strict=True):
            for i, way in enumerate(WAYS):
                values = [average(rows, "nll", structure=structure, way=way, epochs=e) for e in moments]
                axis.plot(moments, values, "o-", color=SERIES[i % len(SERIES)], label=way)
            axis.plot(moments, [average(rows, "nll", structure="network", epochs=e) for e in moments], "--", color=FULL,
                      label="the network")  # fmt: skip
            axis.set(title=structure, xlabel="epochs")
            log_axis(axis.xaxis, moments)
        axes[0].legend(fontsize=7)
        axes[0].set_ylabel("negative log-likelihood")

    return inline_svg("likelihoods", _CAPTION, (3.0 * len(structures) + 0.6, 3.2), draw)


def _tables(rows: list[dict[str, Any]]) -> list[Table]:
    found = []
    for epochs in sorted({row["epochs"] for row in rows}):
        here = [row for row in rows if row["epochs"] == epochs]
        cells = []
        for structure, way in dict.fromkeys((row["structure"], row["way"]) for row in here):
            where = {"structure": structure, "way": way}
            mine = [row for row in here if (row["structure"], row["way"]) == (structure, way)]
            gamma = average(mine, "effective_dimension") if structure != "network" else None
            values = [fixed(average(here, key, **where), None, 3) for key, _ in MEASURES]
            cells.append([f"{structure}{', ' * bool(way)}{way}", *values, number(gamma)])
        columns = ["", *(label for _, label in MEASURES), "weights determined"]
        found.append(Table(f"After {epochs} epochs", columns, cells))
    return found


def _rescaling(rows: list[dict[str, Any]]) -> Panel:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        names = [f"{row['way']}, × {row['factor']:g}" for row in rows]
        axis.barh(names, [max(row["change"], 1e-16) for row in rows], 0.6, color=SERIES[0])
        log_axis(axis.xaxis, [1e-16, 1.0])
        axis.set(xlabel="largest change of a probability")
        axis.invert_yaxis()

    what = "Change of predictions when weights in front of a LayerNorm are rescaled, which leaves the network as it was"
    table = Table("Rescaling", ["prior", "factor", "largest change"],
                  [[row["way"], f"{row['factor']:g}", number(row["change"])] for row in rows])  # fmt: skip
    return Panel(inline_svg("rescaling", what, (7.4, 1.0 + 0.4 * len(rows)), draw), f"{what}.", [table])
