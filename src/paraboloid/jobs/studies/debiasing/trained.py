"""The study's subjects: problems at moments of their training, all their data, pairs of disjoint batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid import problems
from paraboloid.data.batches import take
from paraboloid.problems import Problem

Batch = tuple[Tensor, Tensor]
CPU = torch.device("cpu")


def states(name: str, moments: Sequence[float], seed: int) -> Iterator[tuple[float, Problem]]:
    """The problem's model after each part of its training, 0 <= moment <= 1, in order; it is the same object."""
    problem = problems.load(name, seed=seed)
    total = problems.step_count(problem)
    wanted = {round(moment * 100) * total // 100: moment for moment in moments}
    kept: dict[float, dict[str, Tensor]] = {}

    def keep(step: int, model: nn.Module, point: dict[str, Any]) -> None:
        if step in wanted:
            kept[wanted[step]] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    problems.train(problem, seed, evaluations=evaluations(wanted, total), callback=keep)
    for moment in moments:
        problem.model.load_state_dict(kept[moment])
        yield moment, problem


def evaluations(steps: Any, total: int) -> int:
    """The least number of equally spaced evaluations that meets all the steps."""
    return next(n for n in range(1, total + 1) if set(steps) <= {round(total * i / n) for i in range(n + 1)})


def whole(problem: Problem) -> Batch:
    return take(problem.train, torch.arange(len(problem.train)), CPU)


def pairs(problem: Problem, m: int, repeats: int, seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Two disjoint batches of m samples, again and again."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(repeats):
        first, second = torch.randperm(len(problem.train), generator=generator)[: 2 * m].split(m)
        yield take(problem.train, first, CPU), take(problem.train, second, CPU)
