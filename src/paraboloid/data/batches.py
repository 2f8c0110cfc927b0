"""What counts as a batch, how a model is called on it, and how batches are taken from a map-style dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset, default_collate

from paraboloid.passes.random_state import RandomStream
from paraboloid.passes.torch_internals import tree_leaves
from paraboloid.passes.trees import mapped

Inputs = Any  # of a model: a tensor, a tuple or list of arguments, a mapping of keywords, or an object of its own
Batch = tuple[Inputs, Any]
Data = Batch | Mapping[str, Any] | Iterable[Any]  # a batch, or an iterable of batches
Output = Callable[[Any], Tensor]  # picks the tensor from what the model returns


class Samples(Protocol):
    """A map-style dataset, `dataset[i]` being `(input, target)` or a dict with 'labels'; or a pair of tensors."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def as_batch(data: Any) -> Batch | None:
    """`(inputs, targets)` if `data` is one batch, else None.

    A two-element tuple or list whose second element is a tensor is a batch; so is a pair of a tensor and a dict, tuple
    or list of tensors, for a loss that takes such targets.  A dict with `labels` (Hugging Face) is one too, its other
    entries being the inputs.  Tensors made under inference_mode (batches of a trainer's validation) are copied:
    autograd cannot keep them.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        x, y = data
        if isinstance(x, Tensor) and not (x.is_inference() or y.is_inference()):  # as most often
            return x, y
        return _ordinary(x), _ordinary(y)
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[0], Tensor) and _is_tree(data[1]):
        return _ordinary(data[0]), _ordinary(data[1])
    if isinstance(data, Mapping) and "labels" in data:
        return {k: _ordinary(v) for k, v in data.items() if k != "labels"}, _ordinary(data["labels"])
    return None


def device_of(target: Any) -> torch.device:
    """That of a target, or of the first of several."""
    return next((t.device for t in tree_leaves(target) if isinstance(t, Tensor)), torch.device("cpu"))


def _ordinary(tree: Any) -> Any:
    """The same, with a copy of every tensor that was made under inference_mode."""
    if isinstance(tree, Tensor):
        if not tree.is_inference():
            return tree
        with torch.inference_mode(False):
            return tree.clone()
    if isinstance(tree, Mapping | tuple | list) and any(
        isinstance(t, Tensor) and t.is_inference() for t in tree_leaves(tree)
    ):
        return mapped(_ordinary, tree)
    return tree


def _is_tree(y: Any) -> bool:
    """Several tensors as one target."""
    parts = list(y.values()) if isinstance(y, Mapping) else y if isinstance(y, tuple | list) else []
    return bool(parts) and all(isinstance(t, Tensor) for t in parts)


def batches(data: Any) -> Iterator[Batch]:
    """The batches of a batch or of an iterable of batches; raises ValueError for an empty or malformed iterable."""
    if (batch := as_batch(data)) is not None:
        yield batch
        return
    if not isinstance(data, Iterable) or isinstance(data, Tensor | str | Mapping):
        raise ValueError(f"data is a {type(data).__name__}; expected a batch (inputs, targets), a dict with 'labels', "
                         "or an iterable of batches such as a DataLoader.")  # fmt: skip
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


def in_order(data: Any, stream: RandomStream) -> Iterator[Batch]:
    """The batches as every pass with the stream's random numbers sees them: a loader that shuffles draws."""
    stream.rewind()
    iterator = batches(data)
    while True:
        with stream:
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def arguments(inputs: Inputs) -> tuple[tuple, dict]:
    """What a model is called with: a dict is passed as keywords, a tuple or list as positional arguments.

    Raises ValueError for nested tensors.
    """
    check_not_nested(inputs)
    inputs = _ordinary(inputs)
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def run(model: Any, inputs: Inputs) -> Any:
    """What the model returns on `inputs`, whatever it is; see `call`."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def call(model: nn.Module, inputs: Inputs, output: Output | None = None) -> Tensor:
    """The model's output tensor on `inputs`, see `arguments`.

    `output` picks the tensor from a structured result, e.g. ``lambda o: o.logits``.
    """
    return picked(run(model, inputs), output)


def picked(result: Any, output: Output | None) -> Tensor:
    """The tensor in what a model returned; raises ValueError where it is none."""
    result = output(result) if output is not None else result
    if not isinstance(result, Tensor):
        raise ValueError(f"the model returned a {type(result).__name__}; expected a tensor. Pass output=, a function "
                         "that picks it, for example output=lambda o: o.logits.")  # fmt: skip
    return result


def evaluate(model: Any, inputs: Inputs, output: Output | None = None) -> Tensor:
    """The model's output without a graph.  A model whose forward pass differentiates (forces, residuals of differential
    equations) cannot run without one: it is run again with gradients on, and its output detached."""
    try:
        with torch.no_grad():
            return call(model, inputs, output)
    except RuntimeError as e:
        if "does not require grad" not in str(e):
            raise
    with torch.inference_mode(False), torch.enable_grad():
        return call(model, inputs, output).detach()


def check_not_nested(inputs: Inputs) -> None:
    """Raise ValueError for a nested tensor among the inputs of a model."""
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    parts = parts if isinstance(parts, tuple | list) else [parts]
    if True in [isinstance(t, Tensor) and t.is_nested for t in parts]:
        raise ValueError("an input is a nested (jagged) tensor, whose samples lie along no axis of one tensor; "
                         "expected padded inputs: torch.nested.to_padded_tensor(x, 0.0), with a mask as an input of "
                         "the model.")  # fmt: skip


def check_finite(loss: Tensor) -> Tensor:
    """Raise ValueError if the loss is NaN or infinite."""
    if not torch.isfinite(loss):
        raise ValueError(f"the loss is {loss.item()}; expected a finite number. Check the inputs and the parameters.")
    return loss


def sample_count(dataset: Any) -> int:
    """Number of samples of a map-style dataset, or of a pair of tensors (inputs, targets)."""
    if (pair := _pair(dataset)) is not None:
        inputs, targets = pair
        if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
            raise ValueError(f"the inputs have shape {tuple(inputs.shape)} and the targets {tuple(targets.shape)}; "
                             "expected the same number of samples along axis 0.")  # fmt: skip
        return len(inputs)
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and any(isinstance(part, Tensor) for part in dataset):
        kinds = " and ".join(type(part).__name__ for part in dataset)
        raise ValueError(f"the dataset is a batch of inputs and targets, {kinds}; expected a "
                         "map-style dataset of (input, target), of which batches are drawn. Wrap the tensors in a "
                         "TensorDataset; samples that see each other (nodes of a graph) cannot be drawn apart: "
                         "pb.statistics and pb.noise.measures take them as one batch.")  # fmt: skip
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or isinstance(dataset, Tensor | Mapping):
        raise ValueError(f"the dataset is a {type(dataset).__name__}; expected a map-style dataset (with len and "
                         "indexing) of (input, target), or a pair of tensors.")  # fmt: skip
    return len(dataset)


def take(dataset: Any, indices: Tensor, device: torch.device) -> Batch:
    """Samples `indices` (int64) as one batch on `device`: tensors are indexed as a whole, other items are stacked."""
    if isinstance(dataset, Subset):
        chosen = torch.as_tensor(dataset.indices, device="cpu")[indices.cpu()]
        return take(dataset.dataset, chosen, device)
    if (pair := _pair(dataset)) is not None:
        inputs, targets = (t[indices.to(t.device)] for t in pair)
        return inputs.to(device), targets.to(device)
    items = [dataset[i] for i in indices.tolist()]
    if (batch := as_batch(default_collate(items))) is None:
        raise ValueError(f"the dataset's items are of type {type(items[0]).__name__}; expected pairs (input, target) "
                         "or dicts with 'labels'.")  # fmt: skip
    return _to(batch[0], device), _to(batch[1], device)


class Chunks:
    """Samples of a map-style dataset (all, or those of `indices`) as batches of `size`; can be iterated again."""

    def __init__(self, dataset: Any, size: int, device: torch.device, indices: Tensor | None = None):
        self.dataset, self.size, self.device = dataset, size, device
        self.indices = torch.arange(sample_count(dataset), device="cpu") if indices is None else indices

    def __iter__(self) -> Iterator[Batch]:
        for indices in self.indices.split(self.size):
            yield take(self.dataset, indices, self.device)


def _pair(dataset: Any) -> tuple[Tensor, Tensor] | None:
    if isinstance(dataset, TensorDataset):
        dataset = dataset.tensors
    if isinstance(dataset, tuple | list) and len(dataset) == 2 and all(isinstance(t, Tensor) for t in dataset):
        return dataset[0], dataset[1]
    return None


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_to(item, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
