"""A study's parts one after the other, with progress and the seconds that each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Tick = Callable[[], None]
Part = Callable[[Any, int, Tick], Any]  # of the plan and the seed; calls the tick as often as its total says
Progress = Callable[[str, int, int], None]  # part, done, total


def run_parts(
    parts: Mapping[str, Part], plan: Any, seed: int, progress: Progress | None, totals: Mapping[str, int]
) -> dict[str, Any]:
    """What each part found, by its name, and under "seconds" how long it took."""
    report = progress or (lambda part, done, total: None)
    found: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    for part, run in parts.items():
        start, done = time.perf_counter(), 0
        report(part, 0, totals[part])

        def tick(part: str = part) -> None:
            nonlocal done
            done += 1
            report(part, done, totals[part])

        found[part] = run(plan, seed, tick)
        seconds[part] = time.perf_counter() - start
    return {**found, "seconds": seconds}


def listed(rows: Callable[[Any, int], Iterator[Any]]) -> Part:
    """The part that lists what a generator of rows yields, with a tick for each."""

    def run(plan: Any, seed: int, tick: Tick) -> list[Any]:
        found = []
        for row in rows(plan, seed):
            found.append(row)
            tick()
        return found

    return run
