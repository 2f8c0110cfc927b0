"""What counts as a batch, how a model is called on it, and what its output is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, Any]
Output = Callable[[Any], Tensor]


def as_batch(data: Any) -> Batch | None:
    """`(inputs, targets)` if `data` is one batch, else None.

    A two-element tuple or list whose second element is a tensor is a batch; a dict with `labels` (Hugging Face) is one
    too, its other entries being the inputs.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        return data[0], data[1]
    if isinstance(data, Mapping) and "labels" in data:
        return {k: v for k, v in data.items() if k != "labels"}, data["labels"]
    return None


def batches(data: Any) -> Iterator[Batch]:
    """The batches of a batch or of an iterable of batches; raises ValueError for an empty or malformed iterable."""
    if (batch := as_batch(data)) is not None:
        yield batch
        return
    if not isinstance(data, Iterable) or isinstance(data, Tensor | str | Mapping):
        raise ValueError(f"data is a {type(data).__name__}; expected a batch (inputs, targets), a dict with 'labels', or "
                         "an iterable of batches such as a DataLoader.")  # fmt: skip
    found = False
    for item in data:
        if (batch := as_batch(item)) is None:
            shape = f" of length {len(item)}" if isinstance(item, tuple | list) else ""
            raise ValueError(f"the data yielded a {type(item).__name__}{shape}; expected batches (inputs, targets) or "
                             "dicts with 'labels'.")  # fmt: skip
        found = True
        yield batch
    if not found:
        raise ValueError("the data is empty: it yielded no batch; expected at least one. (A generator can be read only "
                         "once: pass a list or a DataLoader.)")  # fmt: skip


def call(model: nn.Module, inputs: Any, output: Output | None = None) -> Tensor:
    """The model's output tensor on `inputs`: a dict is passed as keywords, a tuple or list as positional arguments.

    `output` picks the tensor from a structured result, e.g. ``lambda o: o.logits``.
    """
    if isinstance(inputs, Mapping):
        result = model(**inputs)
    elif isinstance(inputs, tuple | list):
        result = model(*inputs)
    else:
        result = model(inputs)
    result = output(result) if output is not None else result
    if not isinstance(result, Tensor):
        raise ValueError(f"the model returned a {type(result).__name__}; expected a tensor. Pass output=, a function "
                         "that picks it, for example output=lambda o: o.logits.")  # fmt: skip
    return result


def check_finite(loss: Tensor) -> Tensor:
    """Raise ValueError if the loss is NaN or infinite."""
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}; expected a finite number. Check the inputs and the parameters.")
    return loss
