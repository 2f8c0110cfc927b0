"""Read samples of a map-style dataset as one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from paraboloid.data import Batch, as_batch
from paraboloid.problems.problem import Samples


def read(dataset: Samples, indices: Tensor | None = None, device: torch.device | None = None) -> Batch:
    """`(inputs, targets)` of the samples `indices` (int64, default all), on `device` (default: where they are).

    A TensorDataset is indexed as a whole; other datasets are read one by one and stacked. Raises ValueError for items
    that are not `(input, target)`, and where inputs and targets differ in length.
    """
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        _check_lengths(*dataset.tensors)
        batch = dataset.tensors if indices is None else tuple(t[indices.to(t.device)] for t in dataset.tensors)
    else:
        chosen = range(len(dataset)) if indices is None else indices.tolist()
        items = [dataset[i] for i in chosen]
        batch = as_batch(default_collate(items))
        if batch is None:
            raise ValueError(f"the dataset's items are {_form(items[0])}; expected pairs (input, target).")
    inputs, targets = batch
    return _to(inputs, device), _to(targets, device)


def _check_lengths(inputs: Tensor, targets: Tensor) -> None:
    if len(inputs) != len(targets):
        raise ValueError(
            f"the inputs have {len(inputs)} samples but the targets have {len(targets)}; expected the same number."
        )


def _form(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"{type(item).__name__}s of {len(item)} elements"
    return f"of type {type(item).__name__}"


def _to(value: Any, device: torch.device | None) -> Any:
    if device is None:
        return value
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
