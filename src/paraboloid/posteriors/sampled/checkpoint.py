"""The state of a run in a file that is complete at every moment, and refused where it belongs to something else."""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.posteriors.sampled.solvers import Position
from paraboloid.posteriors.sampled.state import EMStep, State
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature, displaced, same_in_another_order

VERSION = 3
ROUNDED = 1e-5  # relative difference of two summed losses that is rounding: they are in the model's type
TINY = 1e-12  # of sums of weights, in double, for each of them


def fingerprint(weights: dict[str, Tensor], curvature: TangentCurvature, settings: dict[str, Any]) -> dict[str, Any]:
    """What a state belongs to: the weights by two sums each, the data by its size, its loss and a mark of each data
    point in their order, to which the samples' noise belongs, and the settings."""
    replay = curvature.replay
    sums = {}
    for name, w in weights.items():
        flat = w.detach().reshape(-1).double()
        ramp = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
        sums[name] = [list(w.shape), flat.sum().item(), torch.dot(flat, ramp).item()]
    return {"model": sums, "data": [replay.samples, replay.total, curvature.order], "settings": settings}


def of_process(path: Path, group: Group) -> Path:
    """Each process has a file of its own."""
    size = collectives.size_of(group)
    return path if size == 1 else path.with_name(f"{path.name}.{collectives.rank_of(group)}-of-{size}")


def begun(path: Path, group: Group) -> bool:
    """Whether a process of the group has a file, which one that was ended before its first does not have.

    Raises ValueError where there are files of another number of processes alone, that would be begun anew.
    """
    size = collectives.size_of(group)
    named = re.compile(re.escape(path.name) + r"\.\d+-of-(\d+)")
    counts = {int(found[1]) for p in path.parent.iterdir() if (found := named.fullmatch(p.name))}
    counts |= {1} if path.exists() else set()
    every = [counts] if size == 1 else collectives.gathered(counts, group)
    if others := {count for found in every if size not in found for count in found}:
        raise ValueError(f"{path} is a checkpoint of {max(others)} processes, and these are {size}; expected as many "
                         "as it was begun with. Take another path to begin anew.")  # fmt: skip
    return any(every)


def save(path: Path, state: State, belongs: dict[str, Any], keep: bool = False) -> None:
    """Beside the old file first, then in its place: a kill leaves one or the other.

    keep: the old one too, which other processes may be at yet.
    """
    state.saves += 1
    packed = {**vars(state), "history": [asdict(step) for step in state.history]}
    packed["position"] = None if state.position is None else vars(state.position)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        torch.save({"version": VERSION, "belongs": belongs, "state": packed}, file)
        file.flush()
        os.fsync(file.fileno())
    if keep and path.exists():
        os.replace(path, _before(path))
    os.replace(beside, path)


def resumed(path: Path, belongs: dict[str, Any], device: torch.device, group: Group) -> State | None:
    """The last state that every process has; None where they have none yet.

    Raises ValueError as `load` does, and for files of processes that do not belong together.
    """
    if collectives.size_of(group) == 1:
        return load(path, belongs, device) if path.exists() else None
    found = {s.saves: s for s in (load(p, belongs, device) for p in (_before(path), path) if p.exists())}
    every = collectives.gathered(list(found), group)
    common = set(every[0]).intersection(*every[1:])
    if common:
        return found[max(common)]
    if all(not saves or min(saves) == 1 for saves in every):  # one process had not saved its first state
        return None
    raise ValueError(f"the processes' checkpoints at {path} are {every} parts of the work along; expected files of one "
                     "run, which are at most one part apart. Take another path to begin anew.")  # fmt: skip


def _before(path: Path) -> Path:
    return path.with_name(path.name + ".before")


def load(path: Path, belongs: dict[str, Any], device: torch.device) -> State:
    """Raises ValueError for a file of another origin, model, data or settings, saying which."""
    try:
        found = torch.load(path, weights_only=True, map_location=device)
    except OSError:
        raise
    except Exception:  # torch, pickle and zip raise many kinds for a file that is something else
        found = None
    if not isinstance(found, dict) or found.get("version") != VERSION or "belongs" not in found:
        raise ValueError(f"{path} is no checkpoint of sampled_laplace of version {VERSION}; expected a file that it "
                         "wrote, or a path where there is none.")  # fmt: skip
    for part in ("model", "data", "settings"):
        mine, its = belongs[part], found["belongs"][part]
        if not _same(part, mine, its):
            raise ValueError(f"{path} is a checkpoint of {_other(part, mine, its)}; expected the {part} that it was "
                             "begun with. Take another path to begin anew.")  # fmt: skip
    state = found["state"]
    history = [
        EMStep(**{**h, **{k: tuple(h[k]) for k in ("precision", "effective_dimension")}}) for h in state["history"]
    ]
    position = None if state["position"] is None else Position(**state["position"])
    return State(**{**state, "history": history, "position": position})


def _same(part: str, mine: Any, its: Any) -> bool:
    """Sums may be rounded otherwise, by another number of threads or on another machine."""
    if part == "data":
        known = mine[0] == its[0] and math.isclose(mine[1], its[1], rel_tol=ROUNDED)
        return known and displaced(mine[2], its[2]) is None
    if part == "settings" or mine.keys() != its.keys():
        return mine == its
    return all(_close(mine[name], its[name]) for name in mine)


def _close(mine: list[Any], its: list[Any]) -> bool:
    (shape, *sums), (its_shape, *its_sums) = mine, its
    within = TINY * math.prod(shape)
    pairs = zip(sums, its_sums, strict=True)
    return shape == its_shape and all(math.isclose(a, b, rel_tol=TINY, abs_tol=within) for a, b in pairs)


def _other(part: str, mine: Any, its: Any) -> str:
    if part == "data":
        at = displaced(mine[2], its[2]) if mine[0] == its[0] else None
        if at is not None and same_in_another_order(mine[2], its[2]):
            return (f"the same data in another order, from data point {at} on, to which the samples' noise belongs (a "
                    "loader that shuffles by a generator of its own has another order on every pass)")  # fmt: skip
        return f"other data, of {its[0]} samples with the summed loss {its[1]:.6g} (here {mine[0]} with {mine[1]:.6g})"
    names = [k for k in {**mine, **its} if k not in mine or k not in its or not _same(part, {k: mine[k]}, {k: its[k]})]
    if part == "model":
        return f"another model, or of other weights of it: {names[:5]} differ"
    return "other settings: " + ", ".join(f"{k} was {its.get(k)!r} and is {mine.get(k)!r}" for k in names)
