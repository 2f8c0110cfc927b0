"""What `pb.statistics` gives: quantity -> parameter -> value, finished from sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import check_finite
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.linalg.kronecker import Kron
from paraboloid.losses import Loss
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.passes.tensor_hooks import accumulated, hooked
from paraboloid.quantities.named import check_samples
from paraboloid.quantities.quantity import Quantity, Scale
from paraboloid.quantities.sums import Gradient, LeftOut, Sums, Values, combine, scale_of


class Statistics(Mapping[str, dict[str, Any]]):
    """quantity -> parameter name -> value; with the loss as reduced and the model's output, detached.

    `samples` is the number of samples N and `normalizer` what the loss divides by (N for a plain mean, 1 for a sum);
    with `all_reduce` both are those of all ranks, like the loss.  `left_out[quantity]` is the relative trace of the
    loss's Hessians that quantities with a `tol` left out, 0 for those without.
    """

    def __init__(
        self, values: dict[str, dict[str, Any]], loss: Tensor, output: Tensor, scale: Scale, left_out: LeftOut
    ):
        self._values, self.loss, self.output = values, loss, output
        self.left_out = {name: relative(left_out.get(name)) for name in values}
        self.samples, self.normalizer = scale.N, 1 / scale.a

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._values:
            raise KeyError(f"{name!r} was not asked for; available: {list(self._values)}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def total(self, name: str) -> Tensor:
        """Sum over parameters, for values whose shape does not depend on the parameter (square_norms, gram)."""
        values = list(self[name].values())
        if not all(isinstance(v, Tensor) and v.shape == values[0].shape for v in values) or name not in TOTALS:
            raise ValueError(f"{name!r} has a value of its own shape for every parameter, so there is no total; totals "
                             f"exist for {sorted(TOTALS)}.")  # fmt: skip
        return torch.stack(values).sum(0)

    def __repr__(self) -> str:
        return f"Statistics({list(self._values)}, loss={float(self.loss):.6g})"


TOTALS = {"square_norms", "gram"}


def relative(traces: Sequence[float] | None) -> float:
    """What was left out as a part of all; 0 where nothing was, or there is nothing."""
    left, total = traces or (0.0, 0.0)
    return left / total if total else 0.0


def concluded(
    model: nn.Module, parameters: Mapping[str, Tensor], quantities: Sequence[Quantity], values: Values,
    gradient: Gradient | None, scale: Scale, loss: Tensor, output: Any, left_out: LeftOut,
    group: Group = None,
) -> Statistics:  # fmt: skip
    """The finished values; a gradient that is given is added to `.grad`."""
    found = {q.name: finished(q, values[q.name], parameters, scale) for q in quantities}
    if gradient is not None:
        _accumulate(gradient, parameters, scale.a, collectives.wrapper_group(model) if group is None else None)
    return Statistics(found, loss, output, scale, left_out)


def of_sums(
    model: nn.Module, parameters: Mapping[str, Tensor], quantities: Sequence[Quantity], loss: Loss, sums: Sums,
    outputs: Sequence[Tensor], accumulate: bool, group: Group,
) -> Statistics:  # fmt: skip
    """The same from the sums of several batches, or of this rank's part of a batch."""
    f = full(outputs[0][:0])
    if group is None:
        scale = scale_of(loss, [(sums.N, sums.normalizers)], "batch")
    else:
        sums, scale = combine(quantities, sums, parameters, loss, f.device, group)
    value = check_finite(torch.tensor(sums.loss * scale.a, dtype=f.dtype, device=f.device))
    check_samples(quantities, scale.N)
    gradient = sums.gradient if accumulate else None
    return concluded(
        model, parameters, quantities, sums.values, gradient, scale, value, joined(outputs), sums.left_out, group
    )  # fmt: skip


@torch.no_grad()
def finished(q: Quantity, values: Mapping[str, Any], parameters: Mapping[str, Tensor], scale: Scale) -> dict[str, Any]:
    """A quantity's values, in the parameters' types: the sums of one in half precision were kept in float32."""
    q.announce(values)
    found = {}
    for k, v in values.items():
        value, dtype = q.finish(v, scale), parameters[k].dtype
        found[k] = value if isinstance(value, Tensor) and value.dtype == dtype else _in(dtype, value)
    return found


def _in(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor | Kron) else trees.mapped(lambda t: t.to(dtype), value)


def joined(outputs: Sequence[Tensor]) -> Any:
    """The outputs of all batches as one tensor, in order; a list where they differ in more than axis 0."""
    outputs = [f.detach() for f in outputs]
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs) if len({f.shape[1:] for f in outputs}) == 1 else outputs


@torch.no_grad()
def _accumulate(gradient: Gradient, parameters: Mapping[str, Tensor], a: float, wrapper: Any) -> None:
    """Add a times the gradient to `.grad` as backward() does: averaged over a data-parallel wrapper's group, and with
    the hooks that the parameters carry."""
    if wrapper is not None:
        gradient, a = collectives.averaged(gradient, parameters, a, wrapper), 1.0
    for name, p in parameters.items():
        if (g := gradient[name]) is not None:
            g = hooked(p, a * g)
            p.grad = g if p.grad is None else p.grad.add_(g)
            accumulated(p)
