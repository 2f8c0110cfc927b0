"""Read a layer's mean inputs, outputs and output gradients off a closure that evaluates and backpropagates.

A layer is a weight [p, ..] that linear layers and convolutions use, with its bias: z = W abar, abar = [a; 1], for every
sample and position.  What is read are means over both; gradients at the outputs are summed over the batch (of the loss
as it is backpropagated, a mean) and averaged over positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid import distributed, trees
from paraboloid.ambient import eager_code, own_arithmetic
from paraboloid.factors import add_gram, mirror
from paraboloid.layers import RULES, Use
from paraboloid.outer import CHUNK_BYTES, Right
from paraboloid.recording import Call, Recorder

LAYERS = (F.linear, F.conv1d, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul, Tensor.__matmul__)


@dataclass
class Reading:
    """Sums over the uses of one layer in one evaluation."""

    rows: int = 0  # samples times positions
    outputs: Tensor | None = None  # sum of z, [p]
    gradients: Tensor | None = None  # sum of dL/dz, [p]
    inputs: Tensor | None = None  # sum of abar, [q]
    products: Tensor | None = None  # sum of abar abar^T, [q, q]
    samples: dict[int, int] = field(default_factory=dict)  # of each forward pass, axis 0 of the layer's input

    @property
    def positions(self) -> float:
        """T, for each sample."""
        return self.rows / sum(self.samples.values())


@dataclass(frozen=True)
class Layer:
    """Which parameters form W = [weight, bias], by name."""

    weight: str
    bias: str | None
    flip: bool  # the weight is stored as [q, p]


class Readings:
    """What one evaluation of the closure shows of the layers whose parameters are in `names`."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], moments: bool):
        self.names = {id(p): name for name, p in parameters.items()}
        self.moments = moments
        self.found: dict[str, Reading] = {}
        self.layers: dict[str, Layer] = {}
        self.irregular: set[str] = set()  # weights that are also used in another way
        self.passes = 0
        tracked = {id(p): name for name, p in trees.parameters(model).items()}
        self.recorder = Recorder(trees.unwrapped(model), tracked)
        self.recorder.noted = self._note

    @contextmanager
    def of(self, model: nn.Module) -> Iterator[None]:
        """Read what runs inside."""

        def counted(*_: Any) -> None:
            self.passes += 1

        handle = trees.unwrapped(model).register_forward_pre_hook(counted)
        try:
            with eager_code(), self.recorder:
                yield
        finally:
            handle.remove()
            self.recorder.calls.clear()

    def _note(self, call: Call, z: Tensor) -> None:
        if torch._C._current_autograd_node() is not None:
            return  # a checkpoint runs its part again for the backward pass
        mine = [self.names[id(w)] for w in call.weights if id(w) in self.names]
        use, bias = _layer_of(call, self.names)
        if use is None:
            self.irregular.update(mine)
            return
        name = self.names[id(use.weight)]
        layer = Layer(name, None if bias is None else self.names.get(id(bias)), use.flip)
        if self.layers.setdefault(name, layer) != layer:
            self.irregular.add(name)
            return
        with own_arithmetic(z.device), torch.no_grad():
            reading = self.found.setdefault(name, Reading())
            h = _arranged(use, z)
            reading.rows += h.shape[0]
            reading.outputs = _plus(reading.outputs, h.sum(0))
            reading.samples[self.passes] = max(reading.samples.get(self.passes, 0), len(call.args[0]))
            if self.moments:
                self._add_moments(reading, use, layer, h)

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[call.edge.output_nr]
            if g is not None:
                with own_arithmetic(g.device), torch.no_grad():
                    reading.gradients = _plus(reading.gradients, _arranged(use, g).sum(0))

        call.edge.node.register_prehook(arrived)

    def _add_moments(self, reading: Reading, use: Use, layer: Layer, h: Tensor) -> None:
        assert use.right is not None
        size = use.q + (layer.bias is not None)
        if reading.products is None:
            reading.inputs, reading.products = h.new_zeros(size), h.new_zeros(size, size)
        inputs, A = reading.inputs, h.new_empty(1, use.q, use.q)
        assert inputs is not None
        samples = _samples(use, h)
        right = Right(use.right, (1, samples, 1), dtype=h.dtype, q_axes=use.q_axes)
        step = max(1, max(CHUNK_BYTES, 4 * A.nbytes) // max(1, h.shape[0] // samples * use.q * h.element_size()))
        total = h.new_zeros(use.q)
        for start in range(0, samples, step):
            columns = right.columns(slice(start, min(start + step, samples)))  # [1 q nT]
            add_gram(A, columns, start > 0)
            total += columns[0].sum(1)
        mirror(A)
        reading.products[: use.q, : use.q] += A[0]
        inputs[: use.q] += total
        if layer.bias is not None:
            reading.products[use.q, : use.q] += total
            reading.products[: use.q, use.q] += total
            reading.products[use.q, use.q] += h.shape[0]
            inputs[use.q] += h.shape[0]

    def means(self, group: Any = None) -> dict[str, dict[str, Tensor]]:
        """By weight's name: "h" mean z [p], "g" the mean gradient [p], "positions" T []; and, with
        moments, "a" mean abar [q] and "A" mean abar abar^T [q, q].  Over all ranks of `group`."""
        sums = {}
        for name, r in self.found.items():
            if name in self.irregular:
                continue
            assert r.outputs is not None
            like = r.outputs
            sums[name] = {"rows": like.new_tensor(r.rows), "samples": like.new_tensor(sum(r.samples.values())),
                          "h": like, "g": torch.zeros_like(like) if r.gradients is None else r.gradients}  # fmt: skip
            if r.inputs is not None:
                sums[name] |= {"a": r.inputs, "A": r.products}
        ranks = 1
        if group is not None:
            sums = distributed.summed(sums, group, next(iter(sums.values()))["h"].device)
            ranks = torch.distributed.get_world_size(group)
        for found in sums.values():
            rows, samples = found.pop("rows"), found.pop("samples")
            found["positions"] = rows / samples
            found["g"] = found["g"] / (found["positions"] * ranks)  # each rank backpropagates a mean of its own
            for key in {"h", "a", "A"} & set(found):
                found[key] = found[key] / rows
        return sums


def _layer_of(call: Call, names: Mapping[int, str]) -> tuple[Use | None, Any]:
    """The call's use of a weight as a matrix, and its bias; None where it is no such layer."""
    if call.op not in LAYERS or call.op not in RULES:
        return None, None
    uses = [u for u in RULES[call.op](*call.args, **call.kwargs) if u.weight is not None]
    matrices = [u for u in uses if u.right is not None and not u.lookup and u.groups == 1]
    if (
        len(matrices) != 1
        or id(matrices[0].weight) not in names
        or (matrices[0].flip and matrices[0].weight.dim() != 2)
    ):
        return None, None
    others = [u.weight for u in uses if u is not matrices[0]]
    if len(others) > 1 or any(id(w) not in names for w in others if w.requires_grad):
        return None, None
    bias = others[0] if others and others[0].requires_grad else None
    return matrices[0], bias


def _arranged(use: Use, z: Tensor) -> Tensor:
    """Outputs, or gradients there, as [rows, p] in at least float32."""
    z = z.detach()
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    left = use.left(z.unsqueeze(0))  # [1 R 1 T p]
    return left.reshape(-1, left.shape[-1])


def _samples(use: Use, h: Tensor) -> int:
    """How many rows the rule's `right` has."""
    assert use.right is not None
    one = use.right(slice(0, 1))
    positions = one[0].numel() // use.q
    return h.shape[0] // positions


def _plus(value: Tensor | None, more: Tensor) -> Tensor:
    return more.clone() if value is None else value.add_(more)
