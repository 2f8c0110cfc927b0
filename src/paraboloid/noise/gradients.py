"""Mean gradients of chosen samples, and their outer-product form; nothing of the model is touched."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Batch, Output, Samples, call, check_finite, sample_count, take
from paraboloid.losses import Loss, LossFunction
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.passes.modes import own_arithmetic
from paraboloid.passes.random_state import isolated_with_gradients
from paraboloid.passes.torch_internals import DisableTorchFunction
from paraboloid.passes.wrappers import Elsewhere, unwrapped
from paraboloid.quantities.recording import forward
from paraboloid.reductions.outer import Outer

CHUNK = 512  # samples whose gradients are summed in one backward pass


def pull(
    model: nn.Module, loss: Loss, batch: Batch, seed: int, output: Output | None, verify: str | bool
) -> dict[str, list[Outer]]:
    """The gradients of the unreduced loss of each sample, as the outer products of each parameter; V = 1."""
    inputs, y = batch
    recorded = forward(model, inputs, y.device, seed, output, verify)
    with recorded as (tape, f), DisableTorchFunction(), own_arithmetic(f.device):
        loss.check(f, y)
        check_finite(loss.value(full(f), y))
        return tape.pull(f, loss.gradient(f, y)[None])


class Gradients:
    """Mean gradients over samples of a dataset, flat [D], in units of the unreduced loss.

    The model is read as it is when a method is called; `at(values)` reads it at other parameters.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, dataset: Samples, seed: int = 0, output: Output | None = None,
        chunk: int = CHUNK,
    ):  # fmt: skip
        self.model, self.dataset, self.seed, self.output, self.chunk = model, dataset, seed, output, chunk
        self.loss = Loss.from_torch(loss_fn)
        self.samples = sample_count(dataset)
        if self.samples == 0:
            raise ValueError("the dataset is empty; expected at least one sample.")

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return trees.parameters(self.model)

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @property
    def size(self) -> int:
        """Number of trainable parameters D."""
        return sum(p.numel() for p in self.parameters.values())

    def mean(self, indices: Tensor, weights: Tensor | None = None, at: dict[str, Tensor] | None = None) -> Tensor:
        """1/M sum_i w_i g_i over the M given samples, [D]; `at`: other values of the parameters."""
        if len(indices) == 0:
            raise ValueError("a batch of no samples was drawn; expected at least one index.")
        total = None
        for part in torch.arange(len(indices), device="cpu").split(self.chunk):
            w = None if weights is None else weights[part]
            g = self._sum(indices[part], w, at)
            total = g if total is None else total.add_(g)
        assert total is not None
        if not torch.isfinite(total).all():
            raise ValueError("the gradient is NaN or infinite; expected a finite one. Check the inputs and the "
                             "parameters.")  # fmt: skip
        return total / len(indices)

    def full(self, at: dict[str, Tensor] | None = None) -> Tensor:
        """The mean over all samples, [D]."""
        return self.mean(torch.arange(self.samples, device="cpu"), at=at)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the current parameters."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    def batches(self, indices: Tensor, size: int) -> Iterator[tuple[Tensor, Batch]]:
        """The samples `indices`, in nearly equal batches of at most `size`: (their indices, the batch)."""
        device = self.device
        for part in indices.tensor_split(-(-len(indices) // size)):
            yield part, take(self.dataset, part, device)

    def _sum(self, indices: Tensor, weights: Tensor | None, at: dict[str, Tensor] | None) -> Tensor:
        inputs, y = take(self.dataset, indices, self.device)
        parameters = self.parameters
        with isolated_with_gradients(self.model, self.device, self.seed):
            used = parameters if at is None else {name: at[name].clone().requires_grad_() for name in parameters}
            model: Any = unwrapped(self.model) if at is None else Elsewhere(self.model, used)
            f = call(model, inputs, self.output)
            self.loss.check(f, y)
            v = self.loss.gradient(f, y)
            if weights is not None:
                v = v * weights.to(v).view(-1, *[1] * (v.dim() - 1))
            grads = torch.autograd.grad(f, list(used.values()), v.to(f.dtype), allow_unused=True)
        pieces = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters.values(), strict=True)
        ]  # fmt: skip
        return torch.cat([g.flatten() for g in pieces])
