"""The curvature matrices that can be inspected, and the trace of each over the layers with its error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import call
from paraboloid.jobs.inspection.subject import Subject, by_layer
from paraboloid.linalg.operand import check_choice
from paraboloid.linalg.probes import signs
from paraboloid.losses import Loss
from paraboloid.operators import EKFAC, GGN, KFAC, DiagonalGGN, Hessian, LinearOperator
from paraboloid.passes import trees

NAMES = {"ggn": "GGN", "hessian": "Hessian", "kfac": "KFAC", "ekfac": "EKFAC"}
EXACT_COLUMNS = 128  # of the root of the loss's Hessian (classes, pixels): with more it is estimated
LABELS, DRAWS = 4, 8  # sampled labels for each of so many independent estimates
PROBES = 32  # random vectors for the trace of the Hessian

Tick = Callable[[], None]


@dataclass(frozen=True)
class Traces:
    """The trace of each layer's diagonal block, in independent estimates: a single one is exact, if not `inexact`."""

    draws: list[dict[str, float]]
    method: str

    def layer(self, name: str) -> tuple[float, float | None]:
        """The mean over the draws, and its standard error; None where there is none, or it is not known."""
        return _mean(torch.tensor([draw[name] for draw in self.draws], dtype=torch.float64))

    def total(self) -> tuple[float, float | None]:
        return _mean(torch.tensor([sum(draw.values()) for draw in self.draws], dtype=torch.float64))


def _mean(draws: Tensor) -> tuple[float, float | None]:
    error = None if len(draws) == 1 else draws.std(correction=1).item() / len(draws) ** 0.5
    return draws.mean().item(), error


def ticks(kind: str) -> int:
    """How often `matrix` calls `tick`."""
    return PROBES if kind == "hessian" else 1


def matrix(subject: Subject, kind: str, seed: int, tick: Tick) -> tuple[LinearOperator, Traces]:
    """The curvature of the mean loss over all samples, and its traces; without weight decay."""
    model, loss_fn, batches = subject.model, subject.problem.loss_fn, list(subject.batches)
    if kind == "ggn":
        return GGN(model, loss_fn, batches, seed=seed), diagonal_ggn(subject, seed, tick)
    if kind == "hessian":
        H = Hessian(model, loss_fn, batches, seed=seed)
        return H, _probed(H, subject, seed, tick)
    check_choice("curvature", kind, list(NAMES))
    make = {"kfac": KFAC, "ekfac": EKFAC}[kind]
    if root_columns(subject) <= EXACT_COLUMNS:
        operator, how = make(model, loss_fn, batches, fisher="exact", seed=seed), "the exact Hessian of the loss."
    else:
        operator = make(model, loss_fn, batches, fisher="mc", samples=LABELS * DRAWS, seed=seed)
        how = f"{LABELS * DRAWS} labels per sample drawn from the model; the error of these draws is not known."
    found = by_layer(subject.layers, _as_tensors(operator.traces()))
    tick()
    return operator, Traces([found], f"That of the {NAMES[kind]} blocks, with {how}")


def _as_tensors(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _probed(A: LinearOperator, subject: Subject, seed: int, tick: Tick) -> Traces:
    """Hutchinson's estimate, layer by layer: v restricted to a layer, times A v, for random signs v."""
    generator = torch.Generator(device=A.device).manual_seed(seed)
    draws = []
    for _ in range(PROBES):
        v = signs((A.shape[0],), A, generator)
        draws.append(by_layer(subject.layers, trees.unflatten(v * (A @ v), A.parameters)))
        tick()
    return Traces(draws, f"Estimated from {PROBES} products with random vectors of signs; ± one standard error.")


def root_columns(subject: Subject) -> int:
    loss = Loss.from_torch(subject.problem.loss_fn)
    with torch.no_grad():
        return loss.root_columns(call(subject.model, subject.batches[0][0]))


def diagonal_ggn(subject: Subject, seed: int, tick: Tick) -> Traces:
    """From the GGN's diagonal: exact where the root of the loss's Hessian has few columns, else by Monte Carlo with
    labels drawn from the model."""
    model, loss_fn, batches = subject.model, subject.problem.loss_fn, list(subject.batches)
    exact = root_columns(subject) <= EXACT_COLUMNS
    options: list[dict[str, Any]] = [{}] if exact else [
        {"samples": LABELS, "seed": DRAWS * seed + draw} for draw in range(DRAWS)
    ]  # fmt: skip
    made = (DiagonalGGN(model, loss_fn, batches, **chosen) for chosen in options)
    draws = [by_layer(subject.layers, _as_tensors(operator.traces())) for operator in made]
    tick()
    if exact:
        return Traces(draws, "Exact, from the diagonal of the GGN.")
    return Traces(
        draws, f"Estimated from {DRAWS * LABELS} labels per sample, drawn from the model; ± one standard error."
    )
