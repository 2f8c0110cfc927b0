"""A problem with duplicates, wrong labels, smoothed labels, or another schedule of the learning rate."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from paraboloid import problems
from paraboloid.data.batches import sample_count, take
from paraboloid.problems import Problem

COPIED, SHARE, WRONG, SMOOTHING = 5, 0.5, 0.2, 0.1


def of(problem: Problem, variant: str, seed: int) -> Problem:
    """The problem, its training data or loss changed."""
    if variant == "duplicates":
        return dataclasses.replace(problem, train=duplicated(problem.train, SHARE, COPIED))
    if variant == "corrupted labels":
        return dataclasses.replace(problem, train=corrupted(problem.train, WRONG, seed))
    if variant == "smoothed labels":
        return dataclasses.replace(problem, loss_fn=nn.CrossEntropyLoss(label_smoothing=SMOOTHING))
    if variant not in VARIANTS:
        raise ValueError(f"the variant is {variant!r}; expected one of {tuple(VARIANTS)}.")
    return problem


VARIANTS = {
    "plain": "as it is",
    "duplicates": f"the last {SHARE:.0%} of the samples are copies of the first {COPIED}",
    "corrupted labels": f"{WRONG:.0%} of the labels are drawn anew",
    "smoothed labels": f"label smoothing {SMOOTHING}",
    "learning-rate drop": "a tenth of the learning rate in the second half",
}


def duplicated(dataset: Any, share: float, originals: int) -> Any:
    """The dataset with its last `share` replaced by copies of its first `originals` samples, in turn."""
    N = sample_count(dataset)
    copies = round(share * N)
    index = torch.cat([torch.arange(N - copies), torch.arange(copies) % originals])
    return torch.utils.data.Subset(dataset, index.tolist())


def corrupted(dataset: Any, share: float, seed: int) -> Any:
    """The dataset in memory, with random labels for a random share of its samples."""
    x, y = take(dataset, torch.arange(sample_count(dataset)), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    y = y.clone()
    y[chosen] = torch.randint(int(y.max()) + 1, (len(chosen),), generator=generator)
    return TensorDataset(x, y)


def trained(problem: Problem, variant: str, epochs: int, points: int, seed: int, callback: Any) -> None:
    """Train by SGD, calling back as `pb.problems.train` does; with a drop, in two halves of the points."""
    lr = problem.training.lr if problem.training.optimizer == "sgd" else 0.02
    settings = dataclasses.replace(problem.training, optimizer="sgd", lr=lr, momentum=0.9, epochs=epochs, steps=None)
    first = dataclasses.replace(problem, training=settings)
    if variant != "learning-rate drop":
        problems.train(first, seed, evaluations=points, callback=callback)
        return
    total = problems.step_count(first)
    half = points // 2
    problems.train(first, seed, steps=total // 2, evaluations=half, callback=callback)
    second = dataclasses.replace(first, training=dataclasses.replace(settings, lr=lr / 10))

    def later(step: int, model: Any, point: Any) -> None:
        if step:  # the end of the first half was measured
            callback(total // 2 + step, model, point)

    problems.train(second, seed + 1, steps=total - total // 2, evaluations=points - half, callback=later)
