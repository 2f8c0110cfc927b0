"""Read a layer's mean inputs, outputs and output gradients off a closure that evaluates and backpropagates.

A layer is a weight [p, ..] that linear layers and convolutions use, with its bias: z = W abar, abar = [a; 1], for every
sample and position.  Any operation is one whose rule says so.  What is read are means over both; gradients at the
outputs are summed over the batch (of the loss as it is backpropagated, a mean) and averaged over positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid.distributed import collectives
from paraboloid.engine.recorder import Call, Recorder, tensors
from paraboloid.layers import Use
from paraboloid.passes import trees
from paraboloid.passes.memory import PIECES
from paraboloid.passes.modes import autocast_dtype, eager_code, own_arithmetic
from paraboloid.passes.wrappers import unwrapped
from paraboloid.reductions.kronecker_factors import LARGE, add_gram, mirror
from paraboloid.reductions.right import Right


@dataclass
class Reading:
    """Sums over the uses of one layer in one evaluation."""

    rows: int = 0  # samples times positions
    outputs: Tensor | None = None  # sum of z, [p]
    gradients: Tensor | None = None  # sum of dL/dz, [p]
    products: Tensor | None = None  # sum of [a; 1] [a; 1]^T
    samples: dict[int, int] = field(default_factory=dict)  # of each forward pass, axis 0 of the layer's input

    @property
    def positions(self) -> float:
        """T, for each sample."""
        return self.rows / sum(self.samples.values())


Places = tuple[int, int | None]  # among a call's uses: of the weight as a matrix, and of its bias


@dataclass(frozen=True)
class Layer:
    """Which parameters form W = [weight, bias], by name."""

    weight: str
    bias: str | None
    flip: bool  # the weight is stored as [q, p]


class Readings:
    """What evaluations of the closure show of the layers whose parameters are in `parameters`, one after the other.

    Only the model's forward pass is recorded; gradients arrive by hooks on the graph that it leaves.  `known` keeps
    from one object to the next what was found out about kinds of calls.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], known: dict[Any, Places | None]):
        self.known = known
        self.root = unwrapped(model)
        self.names = {id(p): name for name, p in parameters.items()}
        self.layers: dict[str, Layer] = {}
        self.irregular: set[str] = set()  # weights that are also used in another way
        self.recorder = Recorder(self.root, {id(p): name for name, p in trees.parameters(model).items()})

    @contextmanager
    def evaluation(self, moments: bool) -> Iterator[None]:
        """Read what the model does inside; `moments`: of the layers' inputs too."""
        self.moments, self.found, self.passes = moments, dict[str, Reading](), 0
        stack = ExitStack()
        self.recorder.noted = self._note

        def before(module: nn.Module, args: Any) -> None:
            self.passes += 1
            stack.enter_context(eager_code())
            stack.enter_context(self.recorder)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            stack.close()

        handles = [
            self.root.register_forward_pre_hook(before), self.root.register_forward_hook(after, always_call=True)
        ]  # fmt: skip
        try:
            yield
        finally:
            stack.close()  # after an interrupt
            for handle in handles:
                handle.remove()
            self.recorder.calls.clear()
            self.recorder.noted = None  # no cycle that the garbage collector would have to find

    def _note(self, call: Call, z: Tensor) -> None:
        places, uses = self._places(call, z), call.uses()
        if places is None:
            self.irregular.update(self.names[id(w)] for w in call.weights if id(w) in self.names)
            return
        use, bias = uses[places[0]], None if places[1] is None else uses[places[1]]
        name = self.names[id(use.weight)]
        layer = Layer(name, None if bias is None else self.names[id(bias.weight)], use.flip)
        if self.layers.setdefault(name, layer) != layer:
            self.irregular.add(name)
            return
        reading = self.found.setdefault(name, Reading())
        with _in_full(z):
            h = _arranged(use, z)
            reading.rows += h.shape[0]
            reading.outputs = _plus(reading.outputs, h.sum(0))
            reading.samples[self.passes] = max(reading.samples.get(self.passes, 0), len(z))
            if self.moments:
                products = _moments(use, h)
                reading.products = products if reading.products is None else reading.products.add_(products)

        place = call.edge.output_nr  # a hook that held the call would hold its own node

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[place]
            if g is not None:
                with _in_full(g):
                    reading.gradients = _plus(reading.gradients, _arranged(use, g).sum(0))

        call.edge.node.register_prehook(arrived)

    def _places(self, call: Call, z: Tensor) -> Places | None:
        """`_layer_of`, asked once for each kind of call."""
        kind: list[Any] = [call.op, call.shape, *call.kwargs]
        for a in (*call.args, *call.kwargs.values()):
            inside = [a] if isinstance(a, Tensor) else tensors(a)
            for t in inside:
                kind += [t.shape, t.requires_grad, self.names.get(id(t))]
            kind.append(len(inside) or repr(a))
        key = tuple(kind)
        if key not in self.known:
            self.known[key] = _layer_of(call, self.names, z)
        return self.known[key]

    def means(self, group: Any = None) -> dict[str, dict[str, Any]]:
        """By weight's name: "h" mean z [p], "g" the mean gradient [p], "positions" T []; and, with
        moments, "a" mean abar [q] and "A" mean abar abar^T [q, q].  Over all ranks of `group`."""
        sums, counts = {}, {}
        for name, r in self.found.items():
            if name in self.irregular:
                continue
            assert r.outputs is not None
            counts[name] = float(r.rows), float(sum(r.samples.values()))
            sums[name] = {"h": r.outputs, "g": torch.zeros_like(r.outputs) if r.gradients is None else r.gradients}
            if r.products is not None:
                sums[name]["A"] = r.products
        ranks = 1
        if group is not None:
            ranks, device = torch.distributed.get_world_size(group), next(iter(sums.values()))["h"].device
            each = torch.tensor(list(counts.values()), dtype=torch.float64)
            counts = dict(zip(counts, collectives.summed(each, group, device).tolist(), strict=True))
            sums = collectives.summed(sums, group, device)
        for name, found in sums.items():
            rows, samples = counts[name]
            found["positions"] = rows / samples
            found["g"] = found["g"] * (samples / rows / ranks)  # each rank backpropagates a mean of its own
            found["h"] = found["h"] / rows
            if "A" in found:
                products = found["A"] / rows  # of [a; 1]
                inner = slice(None) if self.layers[name].bias is not None else slice(-1)
                found["a"], found["A"] = products[inner, -1], products[inner, inner]
        return sums


def _layer_of(call: Call, names: Mapping[int, str], z: Tensor) -> Places | None:
    """Where in the call's uses the weight of a matrix, row by row, is, and its bias; None where it is no such layer."""
    uses = {i: u for i, u in enumerate(call.uses()) if u.weight is not None}
    matrices, biases = ([i for i, u in uses.items() if (u.right is None) == bias] for bias in (False, True))
    if len(call.shape) < 2 or len(matrices) != 1 or len(biases) > 1:
        return None  # a single sample without a batch axis, or no layer
    places = matrices[0], biases[0] if biases and uses[biases[0]].weight.requires_grad else None
    use, bias = uses[places[0]], None if places[1] is None else uses[places[1]]
    if use.lookup or use.groups > 1 or (use.flip and use.weight.dim() != 2):
        return None
    read = [u for u in (use, bias) if u is not None]
    is_plain = all(id(u.weight) in names and u.is_plain for u in read)
    return places if is_plain and _is_row_by_row(use, bias, z) else None


def _is_row_by_row(use: Use, bias: Use | None, z: Tensor) -> bool:
    """Whether rows [p] of the weight's outputs are z, each element once, and the bias is added to every row."""
    flat = torch.arange(z.numel(), device=z.device).view(1, *z.shape)
    columns, *added = (u.arranged(flat) for u in (use, bias) if u is not None)
    columns = columns.reshape(-1, columns.shape[-1]).sort(0)[0]
    return torch.equal(columns.flatten().sort()[0], flat.flatten()) and all(
        bias is not None and bias.weight.shape == columns.shape[1:]
        and torch.equal(at.reshape(columns.shape).sort(0)[0], columns) for at in added
    )  # fmt: skip


def _arranged(use: Use, z: Tensor) -> Tensor:
    """Outputs, or gradients there, as [rows, p] in at least float32."""
    z = z.detach()
    rows = use.arranged((z.float() if z.dtype in (torch.float16, torch.bfloat16) else z).unsqueeze(0))  # [1 R 1 T p]
    return rows.reshape(-1, rows.shape[-1])


def _moments(use: Use, h: Tensor) -> Tensor:
    """sum of [a; 1] [a; 1]^T over rows: its last column is the sum of [a; 1]."""
    assert use.right is not None
    size = use.q + 1
    if use.q_axes is None and size < LARGE:
        rows = F.pad(use.right(slice(None)).detach().reshape(-1, use.q).to(h.dtype), (0, 1), value=1.0)
        return rows.T @ rows
    products = h.new_empty(1, size, size)
    samples = h.shape[0] // (use.right(slice(0, 1))[0].numel() // use.q)  # rows of the rule's `right`
    right = Right(use.right, (1, samples, 1), dtype=h.dtype, q_axes=use.q_axes)
    most = PIECES.of(None, h.device, least=4 * products.nbytes)
    step = max(1, most * samples // max(1, h.shape[0] * size * h.element_size()))
    for start in range(0, samples, step):
        columns = right.columns(slice(start, min(start + step, samples))).detach()  # [1 q nT]
        columns = torch.cat([columns, columns.new_ones(1, 1, columns.shape[2])], 1)
        add_gram(products, columns, start > 0)
    return mirror(products)[0]


def _in_full(t: Tensor) -> Any:
    """A context without gradients, and without autocast where that is on."""
    if autocast_dtype(t.device) is None:
        return torch.no_grad()
    stack = ExitStack()
    stack.enter_context(own_arithmetic(t.device))
    stack.enter_context(torch.no_grad())
    return stack


def _plus(value: Tensor | None, more: Tensor) -> Tensor:
    return more.clone() if value is None else value.add_(more)
