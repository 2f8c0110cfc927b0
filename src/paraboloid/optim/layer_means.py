"""Read a layer's mean inputs, outputs and output gradients off a closure that evaluates and backpropagates.

A layer is a weight [p, ..] that linear layers and convolutions use, with its bias: z = W abar, abar = [a; 1], for every
sample and position.  Any operation is one whose rule says so.  What is read are means over both; gradients at the
outputs are summed over the batch (of the loss as it is backpropagated, a mean) and averaged over positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.distributed import collectives
from paraboloid.engine.recorder import Call, Recorder, tensors
from paraboloid.engine.tape import doubling
from paraboloid.layers import Use
from paraboloid.optim import input_moments, plain_layers
from paraboloid.optim.plain_layers import Layer, PlainLayer, Watched
from paraboloid.passes import trees
from paraboloid.passes.modes import autocast_dtype, eager_code, own_arithmetic
from paraboloid.passes.module_tree import ModuleTree
from paraboloid.passes.wrappers import unwrapped

OFTEN = 64  # steps after which a recording is made again


class Reading:
    """Sums over the uses of one layer in one evaluation.

    rows                 samples times positions
    outputs, gradients   sums of z and of dL/dz, [p]
    products             sum of [a; 1] [a; 1]^T
    samples              of each forward pass: axis 0 of the layer's input
    uses, backward       of an ordinary layer, and how often a backward pass went through those; one that is itself
                         recorded counts twice
    """

    __slots__ = ("backward", "biases", "gradients", "outputs", "products", "rows", "samples", "uses")

    def __init__(self):
        self.rows, self.uses, self.backward = 0, 0, 0
        self.biases: list[Tensor] = []  # views that retain their gradients: sums of dL/dz
        self.outputs: Tensor | None = None
        self.gradients: Tensor | None = None
        self.products: Tensor | None = None
        self.samples: dict[int, int] = {}

    def add(self, z: Tensor, rows: int, forward_pass: int, samples: int) -> None:
        self.rows += rows
        self.outputs = z if self.outputs is None else self.outputs.add_(z)
        if self.samples.get(forward_pass, 0) < samples:
            self.samples[forward_pass] = samples

    def add_gradients(self, g: Tensor) -> None:
        self.gradients = g if self.gradients is None else self.gradients.add_(g)

    def add_retained(self) -> bool:
        """What came back through the uses whose biases retain it; once, after the evaluation.  False where nothing did:
        whoever asks autograd for some gradients only may have left out the bias's."""
        found = [b.grad for b in self.biases if b.grad is not None]
        for g in found:
            self.backward += 1 + g.requires_grad
            self.add_gradients(g.detach())
        complete, self.biases = len(found) == len(self.biases), []
        return complete

    def add_products(self, products: Tensor) -> None:
        self.products = products if self.products is None else self.products.add_(products)


@dataclass
class Means:
    """A layer's sums in one evaluation, over all ranks, and the means that they are."""

    outputs: Tensor
    gradients: Tensor
    products: Tensor | None
    rows: float
    positions: float  # T, for each sample
    has_bias: bool
    ranks: int = 1  # each backpropagates a mean of its own

    @property
    def h(self) -> Tensor:
        """Mean z, [p]."""
        return self.outputs / self.rows

    @property
    def g(self) -> Tensor:
        """Mean gradient, [p]."""
        return self.gradients / (self.positions * self.ranks)

    @property
    def A_sum(self) -> Tensor:
        """rows times A."""
        assert self.products is not None
        return self.products if self.has_bias else self.products[:-1, :-1]

    @property
    def A(self) -> Tensor:
        """Mean abar abar^T, [q, q]."""
        return self.A_sum / self.rows

    @property
    def a_sum(self) -> Tensor:
        """rows times a."""
        assert self.products is not None
        return self.products[:, -1] if self.has_bias else self.products[:-1, -1]

    @property
    def a(self) -> Tensor:
        """Mean abar, [q]."""
        return self.a_sum / self.rows


Places = tuple[int, int | None]  # among a call's uses: of the weight as a matrix, and of its bias


class Readings:
    """What evaluations of the closure show of the layers whose parameters are in `parameters`, one after the other.

    Only the model's forward pass is watched.  Ordinary layers note their sums themselves; others are found by a
    recorder, and their gradients arrive by hooks on the graph.  Where a recording shows nothing but ordinary layers, it
    is made again in steps 1, 2, 4, 8, ... and every `OFTEN` steps, and left out in between.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]):
        self.model, self.root, self.tree = model, unwrapped(model), ModuleTree(model)
        self.names = {id(p): name for name, p in parameters.items()}
        self.known: dict[Any, Places | None] = {}  # what was found out about kinds of calls
        self.plain = [] if isinstance(model, nn.DataParallel) else plain_layers.plain_layers(self.root, self.names)
        self.watched = Watched(self.plain, self._read)
        self._names_of_plain = {n for each in self.plain for n in (each.layer.weight, each.layer.bias)}
        self.wrapped = self.root is not model  # a data-parallel wrapper waits for every gradient
        self.steps, self.settled, self.retains = 0, False, True
        self._open: list[Any] = []  # contexts that the model's forward pass runs in
        self.begin()

    def begin(self) -> None:
        """A step of one or two evaluations."""
        self.steps += 1
        self.found: dict[str, Reading] = {}
        self.recorder: Recorder | None = None
        if not self.settled or doubling(self.steps) or self.steps % OFTEN == 0:
            self.layers: dict[str, Layer] = {}
            self.irregular: set[str] = set()  # weights that are also used in another way
            self.recorder = Recorder(self.root, {id(p): k for k, p in trees.parameters(self.model).items()})

    @contextmanager
    def evaluation(self, moments: bool) -> Iterator[None]:
        """Read what the model does inside; `moments`: of the layers' inputs too, in the first one of a step."""
        saving = not self.wrapped and not moments and all(r.backward == r.uses for r in self.found.values())
        self.saving = saving and bool(self.found)
        self.moments, self.found, self.passes, self.others = moments, {}, 0, False
        if self.recorder is not None:
            self.recorder.noted = self._note
        handles = [
            self.root.register_forward_pre_hook(self._enter),
            self.root.register_forward_hook(self._leave, always_call=True),
        ]
        try:
            yield
        finally:
            self._leave()  # after an interrupt
            for reading in self.found.values():
                self.retains = reading.add_retained() and self.retains
            for handle in handles:
                handle.remove()
            if self.recorder is not None:
                self.recorder.calls.clear()
                self.recorder.noted = None  # no cycle that the garbage collector would have to find
                self.settled = not self.others

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.passes += 1
        self._open.append(eager_code())
        self._open[-1].__enter__()
        for context in (self.watched,) if self.recorder is None else (self.watched, self.recorder):
            context.__enter__()
            self._open.append(context)

    def _leave(self, *_: Any) -> None:
        while self._open:
            self._open.pop().__exit__(None, None, None)

    # --- ordinary layers -----------------------------------------------------------------------------------------

    def _read(self, plain: PlainLayer, args: tuple | None) -> Tensor | None:
        """The layer's output, with its sums noted; None for a call that is left to its rule."""
        layer = plain.layer
        if args is None or ((known := self.layers.setdefault(layer.weight, layer)) is not layer and known != layer):
            self.settled = False
            return None
        reading = self.found.get(layer.weight)
        if reading is None:
            reading = self.found[layer.weight] = Reading()
        z = self._output(plain, args, reading)
        reading.uses += 1
        shape = z.shape
        reading.add(plain.sum(z), z.numel() // shape[plain.channels], self.passes, shape[0])
        if self.moments:
            with torch.no_grad():
                reading.add_products(input_moments.of_layer(plain.op, args, z.dtype))
        return z

    def _output(self, plain: PlainLayer, args: tuple, reading: Reading) -> Tensor:
        """Of the layer, with what comes back through it to be noted: by its bias, where that is cheap, or by a hook."""
        large = plain_layers.is_large(args)
        if self.retains and not large and plain_layers.has_full_bias(args):
            x, weight, bias, *others = args
            bias = bias.view_as(bias)  # autograd sums dL/dz for it, and keeps that without a call of Python
            bias.retain_grad()
            reading.biases.append(bias)
            return plain.op(x, weight, bias, *others)
        if self.saving and large and not plain_layers.saved_elsewhere():
            z = plain_layers.without_weight_gradient(plain.op, args)
        else:
            z = plain.op(*args)
        node: Any = z.grad_fn
        node.register_prehook(_Arrival(plain, reading))
        return z

    # --- by their rules ------------------------------------------------------------------------------------------

    def _note(self, call: Call, z: Tensor) -> None:
        places, uses = self._places(call, z), call.uses()
        if places is None:
            inside = {self.names[id(w)] for w in call.weights if id(w) in self.names}
            self.others = self.others or not inside.isdisjoint(self._names_of_plain)
            self.irregular |= inside
            return
        self.others = True
        use, bias = uses[places[0]], None if places[1] is None else uses[places[1]]
        name = self.names[id(use.weight)]
        layer = Layer(name, None if bias is None else self.names[id(bias.weight)], use.flip)
        if self.layers.setdefault(name, layer) != layer:
            self.irregular.add(name)
            return
        reading = self.found.setdefault(name, Reading())
        with _in_full(z):
            h = _arranged(use, z)
            reading.add(h.sum(0), h.shape[0], self.passes, len(z))
            if self.moments:
                reading.add_products(input_moments.of_use(use, h))

        place = call.edge.output_nr  # a hook that held the call would hold its own node

        def arrived(gradients: tuple[Tensor | None, ...]) -> None:
            g = gradients[place]
            if g is not None:
                with _in_full(g):
                    reading.add_gradients(_arranged(use, g).sum(0))

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

    # --- the means -----------------------------------------------------------------------------------------------

    def means(self, group: Any = None) -> dict[str, Means]:
        """By weight's name.  Over all ranks of `group`."""
        found: dict[str, Means] = {}
        for name, r in self.found.items():
            if name in self.irregular:
                continue
            assert r.outputs is not None
            g = torch.zeros_like(r.outputs) if r.gradients is None else r.gradients
            samples = sum(r.samples.values())
            found[name] = Means(r.outputs, g, r.products, r.rows, r.rows / samples, self.layers[name].bias is not None)
        return found if group is None else _summed(found, group)


class _Arrival:
    """A hook on the node of an ordinary layer's output: what goes back through it."""

    def __init__(self, plain: PlainLayer, reading: Reading):
        self.plain, self.reading = plain, reading

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        (g,) = gradients
        self.reading.backward += 1 + torch.is_grad_enabled()
        if g is not None:
            self.reading.add_gradients(self.plain.sum(g))


def _summed(found: dict[str, Means], group: Any) -> dict[str, Means]:
    device = next(iter(found.values())).outputs.device
    each = torch.tensor([[m.rows, m.rows / m.positions] for m in found.values()], dtype=torch.float64, device="cpu")
    counts = collectives.summed(each, group, device).tolist()
    sums = {
        name: {"h": m.outputs, "g": m.gradients} | ({} if m.products is None else {"A": m.products})
        for name, m in found.items()
    }
    sums = collectives.summed(sums, group, device)
    ranks = torch.distributed.get_world_size(group)
    return {
        name: Means(s["h"], s["g"], s.get("A"), rows, rows / samples, found[name].has_bias, ranks)
        for (name, s), (rows, samples) in zip(sums.items(), counts, strict=True)
    }


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


def _in_full(t: Tensor) -> Any:
    """A context without gradients, and without autocast where that is on."""
    if autocast_dtype(t.device) is None:
        return torch.no_grad()
    stack = ExitStack()
    stack.enter_context(own_arithmetic(t.device))
    stack.enter_context(torch.no_grad())
    return stack
