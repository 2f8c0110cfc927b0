"""What is measured: the model, its layers, and the samples that stand for all data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.utils.data import Subset

from paraboloid.data.batches import Batch
from paraboloid.passes import trees
from paraboloid.passes.parameter_layers import layers_of
from paraboloid.passes.wrappers import plain_name
from paraboloid.problems import Problem, read

CHUNK = 256  # samples that are differentiated at a time


@dataclass(frozen=True)
class Layer:
    """The trainable parameters of one module, by name; those of the model itself are one too, called by their names."""

    name: str
    kind: str
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters.values())


@dataclass(frozen=True)
class Subject:
    """A problem with the samples that are measured: a fixed random subset where there are more than asked for.

    `dataset` and `batches` hold the same samples. Everything called "all data" in the record means them.
    """

    problem: Problem
    dataset: Any
    batches: Sequence[Batch]
    layers: Sequence[Layer]

    @property
    def model(self) -> nn.Module:
        return self.problem.model

    @property
    def size(self) -> int:
        return len(self.dataset)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return trees.parameters(self.model)


def subject(problem: Problem, samples: int, seed: int) -> Subject:
    """The problem with at most `samples` of its training samples, drawn by `seed`, read into memory."""
    size = len(problem.train)
    dataset = problem.train
    if size > samples:
        chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:samples].sort().values
        dataset = Subset(problem.train, chosen.tolist())  # pyright: ignore[reportArgumentType] - it has len and indexing
    device = next(iter(trees.parameters(problem.model).values())).device
    # Pieces of nearly equal size, so that none is left with one sample, of which there is no variance.
    pieces = torch.arange(len(dataset)).tensor_split(math.ceil(len(dataset) / CHUNK))
    batches = [read(dataset, indices, device) for indices in pieces]
    return Subject(problem, dataset, batches, layers(problem.model))


def layers(model: nn.Module) -> list[Layer]:
    """The trainable parameters grouped by the module that owns them, in the model's order."""
    kinds = {plain_name(name): type_before_parametrizations(module).__name__ for name, module in model.named_modules()}
    found = trees.parameters(model)
    return [
        Layer(name, kinds.get(name, "parameter"), {k: found[k] for k in members})
        for name, members in layers_of(found).items()
    ]


def by_layer(layers: Sequence[Layer], values: dict[str, Tensor]) -> dict[str, float]:
    """Sums of the values, one tensor for each parameter, over each layer; added up in float64."""
    return {layer.name: sum(values[name].double().sum().item() for name in layer.parameters) for layer in layers}
