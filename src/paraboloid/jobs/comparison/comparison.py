"""The comparison of two reports: settings that differ, rows of figures, findings in words, one page."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from markupsafe import Markup

import paraboloid
from paraboloid.jobs.comparison import inspected, trained, uncertain
from paraboloid.jobs.comparison.reading import read
from paraboloid.jobs.comparison.row import Row
from paraboloid.report import plain, render_study
from paraboloid.report.section import Panel, Section, Table

KINDS: dict[str, ModuleType] = {
    "inspect": inspected, "noise": inspected, "train": trained, "uncertainty": uncertain
}  # fmt: skip
TITLES = {
    "training": "Training", "time": "Time", "noise": "Gradient noise", "curvature": "Curvature",
    "bias": "Bias of the mini-batch quadratic", "scores": "Scores on test data", "unseen": "Inputs unlike the data",
    "posterior": "The posterior",
}  # fmt: skip
ABOUT = (
    "Differences are called told where they exceed two standard errors of both values; where a report knows no error, "
    "as of a single run, values are put side by side and nothing is claimed about other seeds. Of accuracies the error "
    "is that of a share of independent test samples, which is wide where both were tested on the same ones."
)


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Two reports as one record of plain data: `settings` (those that differ), `rows`, `findings`.

    `a` and `b` are folders that `inspect`, `noise`, `train` or `uncertainty` wrote, or the JSON files in them; what two
    reports of `inspect` and `noise` share is compared. Raises ValueError where one is something else, or where they
    share nothing.
    """
    start = time.perf_counter()
    (made_a, record_a), (made_b, record_b) = read(a), read(b)
    kind = KINDS[made_a]
    if KINDS[made_b] is not kind:
        raise ValueError(f"{a} was made by `paraboloid {made_a}` and {b} by `paraboloid {made_b}`, which measure "
                         "nothing in common; expected two reports of one command.")  # fmt: skip
    rows = kind.rows(record_a, record_b)
    settings = [kind.settings(record_a), kind.settings(record_b)]
    names = list(dict.fromkeys([*settings[0], *settings[1]]))
    differ = {n: [s.get(n, "–") for s in settings] for n in names if settings[0].get(n) != settings[1].get(n)}
    return plain({
        "full": True, "a": str(a), "b": str(b), "command": f"paraboloid compare {a} {b}",
        "versions": {"paraboloid": paraboloid.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "threads": torch.get_num_threads(), "seconds": time.perf_counter() - start,
        "findings": _findings(kind, record_a, record_b, rows, differ), "settings": differ,
        "rows": [row.plain() for row in rows],
    })  # fmt: skip


def _findings(
    kind: ModuleType, a: dict[str, Any], b: dict[str, Any], rows: list[Row], differ: dict[str, list[str]]
) -> list[str]:
    if "problem" in differ:
        first = "The problems differ (A: {}, B: {}): losses are not on one scale.".format(*differ["problem"])
    elif differ:
        first = "A and B differ in " + ", ".join(f"{n} ({x}; {y})" for n, (x, y) in differ.items()) + "."
    else:
        first = "A and B were made with the same settings: what differs is chance or the machine."
    found = [first]
    for name in "AB" if "problem" not in differ else "":
        won = [row for row in rows if row.winner == name]
        for told, words in ((True, "is better, beyond two standard errors, in"), (None, "has the better")):
            if quantities := [row.quantity for row in won if row.told is told]:
                found.append(
                    f"{name} {words} {'; '.join(quantities)}" + (" (of single runs)." if told is None else ".")
                )
    unsure = [row.quantity for row in rows if row.told is False and row.values[0] != row.values[1]]
    if unsure:
        found.append(f"Within two standard errors they are not told apart in {'; '.join(unsure)}.")
    if kind is trained and "problem" not in differ and (told := trained.reached(a, b)):
        found.append(told)
    return found


def page(record: dict[str, Any], a: str | Path, b: str | Path) -> str:
    """The HTML page of `compare`'s record of two reports."""
    (made, record_a), (_, record_b) = read(a), read(b)
    kind = KINDS[made]
    rows, panels, columns = kind.rows(record_a, record_b), kind.panels(record_a, record_b), ["", "A", "B"]
    given = Table("Settings that differ", columns, [[n, *values] for n, values in record["settings"].items()])
    named = Table("The reports", ["", "written to"], [["A", str(a)], ["B", str(b)]])
    tables = [named, given] if record["settings"] else [named]
    sections = [Section("reports", "The two reports", [], [Panel(Markup(""), "", tables)])]
    for name in dict.fromkeys(row.section for row in rows):
        cells = [row.cells() for row in rows if row.section == name]
        table = Table(TITLES[name], [*columns, "B / A", "told"], cells)
        first, *others = panels.get(name) or [Panel(Markup(""), "")]
        sections.append(Section(name, TITLES[name], [], [replace(first, tables=[table]), *others]))
    return render_study(f"{a} and {b}", ABOUT, record, sections)
