"""Rows of a measurement that goes on where it was stopped: NAME.jsonl, and beside it NAME.md, written as rows come."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Record:
    """The rows of earlier runs, and those that are added."""

    folder: Path
    name: str
    tables: Callable[[list[Row]], Sequence[str]]
    """The lines of NAME.md."""
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        path = self._file("jsonl")
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def holds(self, **values: Any) -> bool:
        """Whether a row has these values."""
        return any(all(row[k] == v for k, v in values.items()) for row in self.rows)

    def add(self, rows: Sequence[Row], **values: Any) -> None:
        """Rows with these values before their own."""
        self.rows += [{**values, **row} for row in rows]
        self._file("jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._file("md").write_text("\n".join(self.tables(self.rows)))

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"
