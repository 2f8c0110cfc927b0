"""Time several things fairly on a noisy machine.

Everything is timed in one process and interleaved: in every round each contender runs once, next to the reference (a
plain gradient), and its ratio to the reference *of the same round* is taken.  What is reported is the median of the
ratios over the rounds with their quartiles.  One absolute time would mean nothing; the reference's is given for scale.
"""

from __future__ import annotations

import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

Run = Callable[[], object]


@dataclass
class Timing:
    """Ratio to the reference: median and quartiles over the rounds, or why there is none."""

    label: str
    median: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass
class Table:
    """One row per quantity, one column per contender."""

    title: str
    reference: str
    reference_seconds: float = 0.0
    rows: dict[str, dict[str, Timing]] = field(default_factory=dict)

    def markdown(self) -> str:
        columns = list(dict.fromkeys(label for row in self.rows.values() for label in row))
        lines = [
            f"### {self.title}",
            "",
            f"Multiples of {self.reference} ({1e3 * self.reference_seconds:.2f} ms here); median (quartiles).",
            "",
            "| | " + " | ".join(columns) + " |",
            "|---|" + "---|" * len(columns),
        ]
        for name, row in self.rows.items():
            lines.append(f"| {name} | " + " | ".join(_cell(row.get(c)) for c in columns) + " |")
        return "\n".join(lines)


def _cell(t: Timing | None) -> str:
    if t is None:
        return ""
    if t.median is None:
        return t.note
    return f"{t.median:.2f} ({t.low:.2f}–{t.high:.2f})"


def seconds(run: Run) -> float:
    """Wall time of one call, with the device's queue drained on both sides."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def compare(title: str, reference: Run, rows: dict[str, dict[str, Run]], budget: float = 4.0) -> Table:
    """Time every contender of every row against the reference, about `budget` seconds for each row.

    A contender that raises is reported by the first line of its error; the others go on.
    """
    table = Table(title, "one gradient")
    for _ in range(3):
        seconds(reference)
    all_references: list[float] = []
    for name, contenders in rows.items():
        table.rows[name] = {}
        working: dict[str, Run] = {}
        warm = 0.0
        for label, run in contenders.items():
            try:
                first = seconds(run)
                warm += seconds(run) if first < 2 else first
                working[label] = run
            except Exception as error:  # a peer's refusal is a result
                table.rows[name][label] = _refused(label, error)
        ratios: dict[str, list[float]] = {label: [] for label in working}
        rounds = max(3, min(41, int(budget / (warm + 1e-9))))
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                before = seconds(reference)
                times = {}
                for label, run in list(working.items()):
                    try:
                        times[label] = seconds(run)
                    except Exception as error:  # what another contender left behind may be one's end
                        table.rows[name][label] = _refused(label, error)
                        del working[label], ratios[label]
                base = (before + seconds(reference)) / 2
                all_references.append(base)
                for label, elapsed in times.items():
                    ratios[label].append(elapsed / base)
        finally:
            gc.enable()
        for label, values in ratios.items():
            low, median, high = statistics.quantiles(values, n=4)
            table.rows[name][label] = Timing(label, median, low, high)
        _progress(title, name, table.rows[name])
    table.reference_seconds = statistics.median(all_references)
    return table


def _refused(label: str, error: Exception) -> Timing:
    line = (str(error).strip().splitlines() or [""])[0][:60]
    return Timing(label, note=f"{type(error).__name__}: {line}")


def _progress(title: str, name: str, row: dict[str, Timing]) -> None:
    cells = ", ".join(f"{label} {_cell(t)}" for label, t in row.items())
    print(f"{title} | {name}: {cells}", file=sys.stderr, flush=True)


def machine() -> dict[str, str | int]:
    """What the figures were measured on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def write(tables: list[Table], folder: Path, stem: str) -> None:
    """One Markdown and one JSON file of the same name, with what they were measured on."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "tables": [asdict(t) for t in tables]}
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    text = "\n\n".join([", ".join(f"{k} {v}" for k, v in machine().items()), *(t.markdown() for t in tables)])
    (folder / f"{stem}.md").write_text(text + "\n")
    print(text)
