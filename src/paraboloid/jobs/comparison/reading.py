"""What the other commands wrote, read back: the file of a report, and which command made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("report.json", "record.json")  # of inspect, noise and uncertainty; of train
MADE_BY = {
    "inspect": ("problem", "training", "noise", "curvature", "bias"),
    "noise": ("problem", "training", "noise"),
    "train": ("settings", "metrics", "parameters"),
    "uncertainty": ("findings", "results", "command"),
}
EXPECTED = "expected a folder (or its JSON file) written by `paraboloid inspect`, `noise`, `train` or `uncertainty`"


def read(path: str | Path) -> tuple[str, dict[str, Any]]:
    """(which command made it, the record) of a report's folder or JSON file; raises ValueError for anything else."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds neither {NAMES[0]} nor {NAMES[1]}; {EXPECTED}.")
        if len(found) > 1:
            raise ValueError(f"{path} holds both {NAMES[0]} and {NAMES[1]}; name the file that you mean.")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"there is no {path}; {EXPECTED}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {EXPECTED}.") from error
    return _made_by(record, path), record


def _made_by(record: Any, path: Path) -> str:
    keys = list(record) if isinstance(record, dict) else [type(record).__name__]
    for command, expected in MADE_BY.items():
        if set(expected) <= set(keys):
            if command == "uncertainty" and "posterior" not in record["results"]:
                raise ValueError(f"{path} was made by `{record['command']}`: a study compares methods on its own page; "
                                 f"{EXPECTED}.")  # fmt: skip
            return command
    raise ValueError(f"{path} holds {keys}; {EXPECTED}.")
