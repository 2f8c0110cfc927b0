"""Gradient clusters: the samples that stand for each, and those that stand apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from paraboloid.report.numbers import count, number
from paraboloid.report.section import Panel, Table
from paraboloid.report.theme import inline_svg

GAP = 1  # pixels between images


def panels(found: dict[str, Any] | None) -> list[Panel]:
    """One panel with the images of each cluster; none where the inputs are not images of one size."""
    if found is None or not found["clusters"]:
        return []
    images = [sample["image"] for cluster in found["clusters"] for sample in _samples(cluster)]
    if any(image is None for image in images) or len({np.shape(image) for image in images}) > 1:
        return []
    what = "Clusters of the samples by their gradients: the nearest to each centre, and the farthest from it"
    ratio = number(found["variance_ratio"], 2)
    caption = (
        f"{what}. A batch of {count(found['batch_size'])} with one sample from each has {ratio} times the variance of "
        "as many drawn at random."
    )
    rows = len(found["clusters"])
    figure = inline_svg("clusters", what, (7.4, 0.7 + 0.62 * rows), lambda figure: _draw(figure, found["clusters"]))
    return [Panel(figure, caption, [_table(found)])]


def _samples(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [*cluster["prototypes"], *cluster["outliers"]]


def _table(found: dict[str, Any]) -> Table:
    rows = [
        [str(i + 1), count(cluster["size"]), number(cluster["spread"]), _targets(cluster["prototypes"]),
         _targets(cluster["outliers"])]
        for i, cluster in enumerate(found["clusters"])
    ]  # fmt: skip
    return Table(
        "Gradient clusters", ["cluster", "samples", "spread", "labels, nearest", "farthest"], rows,
        note="Spread: mean squared distance of the gradients to the centre. Far samples are hard, odd or mislabelled.",
    )  # fmt: skip


def _targets(samples: list[dict[str, Any]]) -> str:
    return " ".join("·" if s["target"] is None else f"{s['target']:g}" for s in samples)


def _draw(figure: Figure, found: list[dict[str, Any]]) -> None:
    """All images as one mosaic in each of two halves; a row for each cluster."""
    for axis, (key, title) in zip(
        figure.subplots(1, 2), (("prototypes", "Nearest to the centre"), ("outliers", "Farthest")), strict=True
    ):
        rows = [[np.asarray(sample["image"], dtype=float) for sample in cluster[key]] for cluster in found]
        height, width = np.shape(found[0]["prototypes"][0]["image"])[:2]  # a cluster has a prototype, not an outlier
        most = max(1, *(len(row) for row in rows))
        shape = (len(rows) * (height + GAP), most * (width + GAP))
        coloured = any(image.ndim == 3 for row in rows for image in row)
        mosaic = np.full((*shape, 4), 0.0)
        for r, row in enumerate(rows):
            for c, image in enumerate(row):
                place = (slice(r * (height + GAP), r * (height + GAP) + height),
                         slice(c * (width + GAP), c * (width + GAP) + width))  # fmt: skip
                mosaic[(*place, slice(0, 3))] = (image if coloured else image[..., None]) / 255
                mosaic[(*place, 3)] = 1
        axis.imshow(mosaic, interpolation="nearest", aspect="equal")
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([(r + 0.5) * (height + GAP) for r in range(len(rows))], [str(r + 1) for r in range(len(rows))])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
