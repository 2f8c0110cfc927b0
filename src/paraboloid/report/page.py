"""The page: a record in, one self-contained HTML document out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from paraboloid.report import numbers, reading
from paraboloid.report.record import Record, check, plain
from paraboloid.report.section import Section, Table
from paraboloid.report.sections import bias, curvature, noise, training

SECTIONS = {"training": training, "noise": noise, "curvature": curvature, "bias": bias}


def render(record: Record) -> str:
    """The HTML page of a record: styles, script and figures inline, nothing fetched from anywhere.

    The same record gives the same page, byte for byte.
    """
    check(record)
    record = plain(record)
    whole = record["bias" if "bias" in record else "noise"]
    return (
        _environment()
        .get_template("page.html")
        .render(
            record=record,
            finding=whole["reading"][0],
            advice=whole["reading"][1] if len(whole["reading"]) > 1 else "",
            figures=_key_numbers(record) if "bias" in record else noise.key_numbers(record),
            layers=_layer_table(record["problem"]),
            sections=[module.section(record) for name, module in SECTIONS.items() if name in record],
            count=numbers.count,
            number=numbers.number,
            percent=numbers.percent,
            seconds=numbers.seconds,
        )
    )


def render_study(title: str, about: str, record: dict[str, Any], sections: Sequence[Section]) -> str:
    """The HTML page of a study's record (`paraboloid.studies`): its findings first, then its sections."""
    return (
        _environment()
        .get_template("study.html")
        .render(title=title, about=about, record=plain(record), sections=sections, seconds=numbers.seconds)
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("paraboloid.report"),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _key_numbers(record: Record) -> list[tuple[str, str, str]]:
    """The few numbers under the headline: (label, value, unit or remark)."""
    problem, section = record["problem"], record["bias"]
    row = reading.reference_row(section)
    size = numbers.count(row["batch_size"])
    enough = reading.sufficient_batch(section)
    last = record["noise"]["checkpoints"][-1]["total"]
    told = reading.largest_verdict(section) in ("over", "under")
    trusted = numbers.count(enough) if enough else "none" if told else numbers.UNDEFINED
    about = f"bias below {numbers.percent(section['tolerance'])}" if enough or told else "cannot be told"
    top, trace = record["curvature"]["eigenvalues"][0]["value"], record["curvature"]["trace"]["value"]
    found = [
        (f"same batch of {size}", *_times(reading.top_ratio(row))),
        (f"another batch of {size}", *_times(reading.top_ratio(row, "other"))),
        ("batch size to trust", trusted, about),
        ("critical batch size", numbers.number(last["noise_scale"]), noise.critical(last)),
        ("largest eigenvalue", numbers.number(top), f"trace {numbers.number(trace)}"),
    ]
    curve = record["training"]["curve"]
    if curve and curve[-1].get("test_accuracy") is not None:
        accuracy = numbers.percent(curve[-1]["test_accuracy"], 3)
        return [*found, ("test accuracy", accuracy, f"{numbers.count(problem['parameters'])} parameters")]
    return [*found, ("parameters", numbers.count(problem["parameters"]), f"{len(problem['layers'])} layers")]


def _times(ratio: tuple[float | None, float | None]) -> tuple[str, str]:
    """A ratio as a factor, and what it is a factor of with its error."""
    value, error = ratio
    factor = f"{numbers.number(value)}×" if value is not None else numbers.UNDEFINED
    return factor, "true curvature" + (f", ± {numbers.number(error, 2)}" if error is not None else "")


def _layer_table(problem: dict[str, Any]) -> Table:
    rows = [
        [
            layer["name"],
            layer["kind"],
            ", ".join("×".join(map(str, item["shape"])) or "scalar" for item in layer["tensors"]),
            numbers.count(layer["parameters"]),
        ]
        for layer in problem["layers"]
    ]
    return Table("Layers with trainable parameters", ["layer", "kind", "shapes", "parameters"], rows)
