"""The record: what `inspect` measured, as plain data, and its form on disk (strict JSON).

A record is a dict with the keys below whose values are dicts, lists, strings, numbers, booleans and None. Undefined
numbers are None (null), never NaN. The page is drawn from a record alone: nothing here knows a model or a tensor.
"""

from __future__ import annotations

import json
import math
from typing import Any

Record = dict[str, Any]

KEYS = ("problem", "training", "noise", "curvature", "bias")
NOISE_KEYS = KEYS[:3]  # of `paraboloid noise`


def plain(value: Any, where: str = "record") -> Any:
    """`value` with every non-finite number replaced by None and tuples by lists; raises TypeError for anything else."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where} has the key {odd[0]!r} of type {type(odd[0]).__name__}; expected strings.")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} is a {type(value).__name__}; expected plain data (dict, list, str, number, bool, None).")


def to_json(record: Record) -> str:
    """Strict JSON of a record of `inspect` or `noise`; raises ValueError for anything else."""
    check(record)
    return strict_json(record)


def strict_json(record: Record) -> str:
    """Strict JSON of any plain data: keys in order, null for what is not finite, one trailing newline."""
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False, indent=1) + "\n"


def from_json(text: str) -> Record:
    """The record that `to_json` wrote; raises ValueError for anything else."""
    record = json.loads(text, parse_constant=_refuse)
    check(record)
    return record


def check(record: Any) -> None:
    """Raise ValueError unless `record` has exactly the five sections, or those of a record of the noise alone."""
    found = list(record) if isinstance(record, dict) else type(record).__name__
    if not isinstance(record, dict) or set(record) not in (set(KEYS), set(NOISE_KEYS)):
        raise ValueError(f"the record holds {found}; expected exactly the sections {list(KEYS)}.")


def _refuse(constant: str) -> float:
    raise ValueError(f"the record holds the number {constant}; expected strict JSON, with null for undefined numbers.")
