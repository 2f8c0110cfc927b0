"""The state of a run in a file that is complete at every moment, and refused where it belongs to something else."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paraboloid.posteriors.sampled.expectation_maximisation import EMStep, State
from paraboloid.posteriors.sampled.solvers import Position

VERSION = 1


def fingerprint(weights: dict[str, Tensor], replay: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What a state belongs to: the weights by two sums each, the data by its size and loss, and the settings."""
    sums = {}
    for name, w in weights.items():
        flat = w.detach().reshape(-1).double()
        ramp = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
        sums[name] = [list(w.shape), flat.sum().item(), torch.dot(flat, ramp).item()]
    return {"model": sums, "data": [replay.samples, replay.total], "settings": settings}


def save(path: Path, state: State, belongs: dict[str, Any]) -> None:
    """Beside the old file first, then in its place: a kill leaves one or the other."""
    packed = {**vars(state), "history": [asdict(step) for step in state.history]}
    packed["position"] = None if state.position is None else vars(state.position)
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        torch.save({"version": VERSION, "belongs": belongs, "state": packed}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: Path, belongs: dict[str, Any], device: torch.device) -> State:
    """Raises ValueError for a file of another origin, model, data or settings, saying which."""
    found = torch.load(path, weights_only=True, map_location=device)
    if not isinstance(found, dict) or found.get("version") != VERSION or "belongs" not in found:
        raise ValueError(f"{path} is no checkpoint of sampled_laplace of version {VERSION}; expected a file that it "
                         "wrote, or a path where there is none.")  # fmt: skip
    for part in ("model", "data", "settings"):
        mine, its = belongs[part], found["belongs"][part]
        if mine != its:
            raise ValueError(f"{path} is a checkpoint of {_other(part, mine, its)}; expected the {part} that it was "
                             "begun with. Take another path to begin anew.")  # fmt: skip
    state = found["state"]
    history = [
        EMStep(h["step"], tuple(h["precision"]), tuple(h["effective_dimension"]), h["residual"])
        for h in state["history"]
    ]
    position = None if state["position"] is None else Position(**state["position"])
    return State(**{**state, "history": history, "position": position})


def _other(part: str, mine: Any, its: Any) -> str:
    if part == "data":
        return f"other data, of {its[0]} samples with the summed loss {its[1]:.6g} (here {mine[0]} with {mine[1]:.6g})"
    names = [k for k in {**mine, **its} if mine.get(k) != its.get(k)]
    if part == "model":
        return f"another model, or of other weights of it: {names[:5]} differ"
    return "other settings: " + ", ".join(f"{k} was {its.get(k)!r} and is {mine.get(k)!r}" for k in names)
