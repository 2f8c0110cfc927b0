"""The page of the study: tables over angles and noise, maps of the phantom, the learning curve of angles."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure

from paraboloid.jobs.studies.tomography.choices import RULES
from paraboloid.jobs.studies.tomography.reading import cells, gains
from paraboloid.report.numbers import fixed, percent
from paraboloid.report.section import Panel, Section, Table
from paraboloid.report.theme import FULL, OTHER, SAME, SERIES, inline_svg

MAPS = (("true", "true image"), ("mean", "reconstruction"), ("error", "absolute error"), ("std", "standard deviation"))
LOOK = {"posterior": OTHER, "equidistant": FULL, "random": SAME}


def sections(results: dict[str, Any]) -> list[Section]:
    """Maps, characters, angles."""
    return [
        Section("maps", "Where to trust a picture", [], [_maps(row) for row in results["maps"]]),
        Section("cells", "Characters: angles and noise", [], _cells(results)),
        Section("choices", "Which angle would help most", [], [_choices(results["choices"])]),
    ]


def _maps(row: dict[str, Any]) -> Panel:
    top = max(max(line) for line in row["maps"]["true"])
    wide = max(_high(row["maps"][key]) for key in ("error", "std"))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 4)
        for axis, (key, title) in zip(axes, MAPS, strict=True):
            shown = key in ("true", "mean")
            look, most = ("gray", top) if shown else ("magma", wide)
            drawn = axis.imshow(row["maps"][key], cmap=look, vmin=0, vmax=most, interpolation="nearest")
            axis.set_title(title)
            axis.set_axis_off()
            if key in ("mean", "std"):
                figure.colorbar(drawn, ax=axis, shrink=0.7)

    found = row["posterior"]
    name = "maps-" + row["case"].replace(" ", "-")
    title = f"The phantom, {row['case']}: {row['angles']} angles, {percent(row['noise'])} noise"
    values = [
        ("posterior mean", f"{fixed(found['psnr'], None, 1)} dB"),
        ("network's image", f"{fixed(row['network'], None, 1)} dB"),
        ("total variation", f"{fixed(row['tv'], None, 1)} dB"),
        ("log density per pixel", fixed(found["density"], None)),
        ("the same in 4 x 4 patches", fixed(found["patches 4"], None)),
        ("of the best one variance", fixed(row["isotropic"], None)),
        ("of the noise's variance alone", fixed(row["carried"], None)),
        ("of Monte Carlo dropout", fixed(row["dropout"]["density"], None)),
        ("50 % intervals cover", percent(found["inside"]["50"])),
        ("90 % intervals cover", percent(found["inside"]["90"])),
        ("correlation of error and std", fixed(found["correlation"], None)),
        ("noise variance, learned over true", fixed(row["noise_variance"] / row["true_noise_variance"], None)),
    ]
    table = Table("This picture", ["", "value"], values)
    return Panel(inline_svg(name, title, (10.5, 2.9), draw), f"{title}. Error and standard deviation share one scale; "
                 "the largest hundredth of a map may lie above it.",
                 [table], wide=True)  # fmt: skip


def _high(image: list[list[float]]) -> float:
    """The value that a hundredth of the pixels exceed."""
    values = sorted(value for line in image for value in line)
    return values[math.ceil(0.99 * len(values)) - 1]


def _cells(results: dict[str, Any]) -> list[Panel]:
    table = cells(results)
    levels = list(dict.fromkeys(c["noise"] for c in table))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, len(levels), squeeze=False, sharex=True)
        for j, level in enumerate(levels):
            mine = [c for c in table if c["noise"] == level]
            at = [c["angles"] for c in mine]
            for key, label, color in (("posterior", "posterior mean", OTHER), ("network", "network", SERIES[2]),
                                      ("tv", "total variation", FULL)):  # fmt: skip
                grid[0][j].plot(at, [c[key] for c in mine], marker="o", color=color, label=label)
            for key, label, color in (("density", "posterior", OTHER), ("best isotropic", "best one variance", FULL)):
                grid[1][j].plot(at, [c[key] for c in mine], marker="o", color=color, label=label)
            low = min(c["best isotropic"] for c in table)
            dropout = [c["dropout"] for c in mine]
            grid[1][j].plot(
                at, [max(d, low - 1) for d in dropout], marker="s", linestyle=":", color=SAME, label="dropout"
            )
            grid[0][j].set_title(f"{percent(level)} noise")
            grid[1][j].set_xlabel("angles")
        grid[0][0].set_ylabel("PSNR, dB")
        grid[1][0].set_ylabel("log density per pixel")
        grid[0][0].legend(fontsize=8)
        grid[1][0].legend(fontsize=8)

    title = "Reconstructions of characters, and the density of the true image"
    images = table[0]["images"]
    names = [f"{c['angles']}, {percent(c['noise'])}" for c in table]

    def columns(keys: tuple[str, ...], write: Any) -> list[list[str]]:
        return [[name, *(write(c[key]) for key in keys)] for name, c in zip(names, table, strict=True)]

    rows = columns(("posterior", "network", "tv"), lambda v: fixed(v, None, 1))
    dense = columns(("density", "patches", "best isotropic", "isotropic", "dropout"), lambda v: fixed(v, None))
    sure = columns(("50", "90"), percent)
    for line, c in zip(sure, table, strict=True):
        line += [fixed(c["correlation"], None), fixed(c["noise ratio"], None)]
    caption = f"{title}; means over {_many(images, 'image')}. Values of dropout below the axis are drawn at its foot."
    return [Panel(inline_svg("cells", title, (10.0, 5.6), draw), caption, [
        Table("PSNR in dB", ["angles, noise", "posterior mean", "network", "total variation"], rows),
        Table("Log density of the true image, nats per pixel", ["angles, noise", "posterior", "in 4 x 4 patches",
              "best one variance", "one variance of the other images", "MC dropout"], dense),
        Table("How sure", ["angles, noise", "50 % cover", "90 % cover", "correlation", "noise, learned / true"], sure),
    ], wide=True)]  # fmt: skip


def _choices(rows: list[dict[str, Any]]) -> Panel:
    by_rule, at = gains(rows), rows[0]["angles"]

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for rule in RULES:
            axis.plot(at, by_rule[rule], marker="o", color=LOOK[rule], label=rule)
        axis.set(xlabel="angles", ylabel="PSNR of the posterior mean, dB")
        axis.legend()

    title = "What more angles bring, by how they are chosen"
    table = Table("PSNR in dB", ["angles", *RULES], [
        [str(n), *(fixed(by_rule[rule][i], None, 1) for rule in RULES)] for i, n in enumerate(at)])  # fmt: skip
    caption = (
        f"{title}; means over {_many(len(rows), 'character')}. Chosen by the posterior: one after another, each the "
        "angle of largest expected gain in information given those before."
    )
    return Panel(inline_svg("choices", title, (7.0, 3.6), draw), caption, [table])


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
