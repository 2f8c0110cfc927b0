"""The exact diagonal of the Hessian of the loss, for every trainable parameter.

A parameter that is used once, in a call affine in it, needs the Hessian H_n of the loss in that call's output alone,
for each sample (see `through_call`).  There are two ways to it; each call takes the one that pulls fewer vectors:

signed   the squares of pulled-back vectors: the loss's root, as for the diagonal of the GGN, and the diagonals of the
         smooth elementwise activations (`signed_diagonal`).  Piecewise linear networks cost what diag_ggn costs, and a
         two-layer sigmoid network little more; deeper smooth ones add one column for each unit two layers up
columns  products with H_n, one for each element of the call's output or of the parameter (`hessian_columns`): what
         softmax, normalisation and products of activations need

Parameters that are used several times, or through other tensors (tied weights, weight_norm), take one product for each
of their elements, with a warning.  On some calls a few entries are compared with autograd's own second derivative.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from paraboloid.engine.plan import Plan
from paraboloid.engine.tape import SIGNATURES, Tape, doubling
from paraboloid.graph.columns import Gradients, add_columns, products_needed
from paraboloid.graph.custom_functions import check_twice
from paraboloid.graph.nodes import Graph
from paraboloid.graph.signed_root import Spread, add_bends, add_signed_root, spread
from paraboloid.graph.single_use import Parts, Recorded, single_uses
from paraboloid.losses import Loss
from paraboloid.passes.memory import gives_back
from paraboloid.passes.modes import rounding

MANY = 5000  # pulled vectors from which the cost is announced
SPOTS = 3  # parameters of which one entry is certified on the first call; one on later ones
PRODUCT_COST = 3  # pulls that a product with the Hessian takes

Squares = Mapping[str, Tensor | None]
_calls: weakref.WeakKeyDictionary[Any, dict[int, int]] = weakref.WeakKeyDictionary()
gives_back(_calls.clear)


def diag_hessian(
    tape: Tape, loss: Loss, f: Tensor, y: Tensor, memory: int | None, each: bool = False
) -> tuple[bool, Callable[[Squares], dict[str, Tensor]]]:
    """Whether the squares of the loss's pulled-back root are needed, and what makes the diagonal from them.

    The diagonal is that of the unreduced loss, by parameter name; or `each` sample's own, [N, *shape], of as many
    squares.
    """
    seed = _due(tape, f)
    try:
        plan = tape.plan(f)
        if plan.apart:  # rows of its calls belong to several samples: by products with the Hessian alone
            plan = Plan([], [], [], tape.reached(f, plan.calls).found)
        graph = _checked_graph(Graph(f, [c.edge for c in plan.calls]))
        recorded = Recorded(tape, plan, loss, f, y, memory, each)
        parts, entangled = single_uses(recorded)
        signed, spreads = choose(recorded, graph, parts, probe_all=seed == 1 or tape.verify == "always")
    except RuntimeError as e:
        raise _explained(e) from e

    @torch.no_grad()
    def finish(squares: Squares) -> dict[str, Tensor]:
        found = {}
        for name in (name for i in signed for name in parts[i]):
            start = squares[name] if loss.exact_root else None
            found[name] = recorded.zeros(tape.parameters[name]) if start is None else start
        if signed and not loss.exact_root:
            add_signed_root(recorded, parts, signed, found)
        add_bends(recorded, parts, signed, spreads, found)
        if entangled:
            _warn(recorded, entangled)
        try:
            add_columns(recorded, parts, [i for i in parts if i not in signed], entangled, found)
            if seed:
                summed = {name: d.sum(0) for name, d in found.items()} if each else found
                certify(recorded, [name for i in sorted(signed) for name in parts[i]], summed, seed)
        except RuntimeError as e:
            raise _explained(e) from e
        return {name: found[name] if name in found else recorded.zeros(p) for name, p in tape.parameters.items()}

    return bool(signed) and loss.exact_root, finish


@torch.no_grad()
def choose(recorded: Recorded, graph: Graph, parts: Parts, probe_all: bool) -> tuple[set[int], list[Spread]]:
    """The calls that go the signed way, and the bends of the network: the choice that pulls the fewest vectors."""
    f, loss = recorded.f, recorded.loss
    bends, full = graph.bends(f, loss.exact_gradient(f.detach(), recorded.y), probe_all)
    able = [i for i in parts if not full >> i & 1]
    needed = sum(1 << i for i in able)
    spreads = [spread(recorded, graph, b, parts) for b in bends if graph.under[b.node] & needed]

    def vectors(signed: list[int]) -> int:
        bits = sum(1 << i for i in signed)
        pulls = (loss.root_columns(f) if signed else 0) + sum(s.columns for s in spreads if s.far & bits)
        return pulls + PRODUCT_COST * sum(products_needed(recorded, parts, i) for i in parts if i not in signed)

    able.sort(key=lambda i: sum(s.columns for s in spreads if s.far >> i & 1))
    signed = min((able[:j] for j in range(len(able) + 1)), key=vectors)
    if (count := vectors(signed)) > MANY:
        warnings.warn(
            f"diag_hessian takes about {count} backward passes for this network, whose smooth layers couple many "
            "units; pb.Hessian(...).diagonal(samples=...) estimates it, diag_ggn leaves them out.", stacklevel=7,
        )  # fmt: skip
    return set(signed), spreads


def certify(recorded: Recorded, names: list[str], found: Mapping[str, Tensor], seed: int) -> None:
    """Raise RuntimeError where one entry, drawn for each of a few parameters, is not autograd's second derivative."""
    generator = torch.Generator().manual_seed(seed)
    names = [names[j] for j in torch.randperm(len(names), generator=generator)[: SPOTS if seed == 1 else 1].tolist()]
    if not names:
        return
    parameters = [recorded.tape.parameters[name] for name in names]
    largest = torch.stack([d.abs().max() for d in found.values()]).max()
    gradients = Gradients(recorded.loss, recorded.f, recorded.y, parameters, batched=False)
    dtypes = {recorded.f.dtype, *(call.autocast for call in recorded.calls if call.autocast is not None)}
    for i, (name, p) in enumerate(zip(names, parameters, strict=True)):
        at = int(torch.randint(p.numel(), (), generator=generator))
        unit = torch.zeros(p.numel(), dtype=p.dtype, device=p.device)
        unit[at] = 1
        column, d = gradients.products(i, unit.view(1, *p.shape)).flatten(), found[name].flatten()
        eps, g = max(rounding(dtype, p.device) for dtype in {p.dtype, *dtypes}), gradients.g[i]
        absolute = eps**0.75 * (largest + (0 if g is None else g.detach().abs().max()))  # where the entry is zero
        if not abs(column[at] - d[at]) <= eps**0.4 * (column.abs().max() + d.abs().max()) + absolute:
            raise RuntimeError(
                f"diag_hessian of parameter {name!r} at element {at} is {float(d[at]):.10g}, but autograd's second "
                f"derivative is {float(column[at]):.10g}. Please report it; pb.Hessian(...).diagonal() is slower and "
                "does not depend on the graph's structure."
            )


def _due(tape: Tape, f: Tensor) -> int:
    """A positive number where the result is to be certified: on calls 1, 2, 4, 8, ... of a signature, or always."""
    counts = _calls.setdefault(tape.model, {})
    key = hash((f.shape, f.dtype, *((c.op, c.shape) for c in tape.calls)))
    counts[key] = count = counts.pop(key, 0) + 1
    if len(counts) > SIGNATURES:
        counts.pop(next(iter(counts)))
    return count if tape.verify == "always" or (tape.verify and doubling(count)) else 0


def _checked_graph(graph: Graph) -> Graph:
    """Raise RuntimeError where the graph has an operation whose second derivative torch gets wrong."""
    if any("WeightNormInterface" in node.name() for node in graph.active):
        raise RuntimeError("the model's weight_norm ran as a fused operation, whose second derivative is wrong in "
                           "torch; expected the plain one, which pb.statistics(...) runs instead.")  # fmt: skip
    check_twice(graph.active, "diag_hessian")
    return graph


def _warn(recorded: Recorded, names: list[str]) -> None:
    count = sum(recorded.tape.parameters[name].numel() for name in names)
    elements = f"{count} elements" + (f" and {len(recorded.f)} samples" if recorded.each else "")
    warnings.warn(
        f"diag_hessian: the parameters {names} are used several times, through other tensors or by an operation "
        "without a rule, so that their second derivatives do not come from one call; falling back on one product "
        f"with the Hessian for each of their {elements}: exact but slow.", stacklevel=6,
    )  # fmt: skip


def _explained(e: RuntimeError) -> RuntimeError:
    if "is not implemented" not in str(e):
        return e
    return RuntimeError(
        f"the model has an operation without a second derivative in torch ({str(e).splitlines()[0]}). For fused "
        "attention, run the forward pass under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), as pb.statistics(...) "
        "does."
    )
