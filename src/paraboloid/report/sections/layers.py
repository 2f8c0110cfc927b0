"""Which layers a figure shows, and in which colours: the same on the whole page."""

from __future__ import annotations

from typing import Any

from paraboloid.report.theme import SERIES


def shown(layers: list[dict[str, Any]]) -> list[str]:
    """Names of the layers in the model's order; of more than there are colours, those with the most parameters."""
    largest = sorted(layers, key=lambda layer: -layer["parameters"])[: len(SERIES)]
    names = {layer["name"] for layer in largest}
    return [layer["name"] for layer in layers if layer["name"] in names]


def colours(layers: list[dict[str, Any]]) -> dict[str, str]:
    """The colour of each layer shown."""
    return dict(zip(shown(layers), SERIES, strict=False))


def left_out(layers: list[dict[str, Any]]) -> str:
    """A sentence about the layers a figure leaves out; empty where it shows all."""
    if len(layers) <= len(SERIES):
        return ""
    return f" The {len(SERIES)} largest of {len(layers)} layers are shown; the tables and the record hold all."
