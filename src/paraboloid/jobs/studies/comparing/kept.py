"""Finished trainings in a file, so that an interrupted study goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """A file with a line of JSON for each finished piece of work; the last line may be torn by an interruption."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.found: dict[str, Any] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.found[json.dumps(entry["what"])] = entry["result"]

    def once(self, what: Any, make: Callable[[], Any]) -> Any:
        """What the file has of `what` (plain data), or what is made now, and kept."""
        key = json.dumps(what)
        if key not in self.found:
            line = json.dumps({"what": what, "result": make()}, allow_nan=False)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{line}\n")  # apart from a torn line
            self.found[key] = json.loads(line)["result"]
        return self.found[key]
