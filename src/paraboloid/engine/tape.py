"""Pull output vectors back through a recorded forward pass, sample by sample; certify that the answer is right.

The recorder keeps the arguments of every call and the gradient edge of its output; autograd does everything between
calls (residuals, attention, weight tying, a module called twice, any control flow), and a call's rule does the rest.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import resolve_name

from paraboloid.engine import many_vectors
from paraboloid.engine.derived_weights import promote, replay
from paraboloid.engine.one_by_one import pull_one_by_one
from paraboloid.engine.per_sample import Part, fallback_parts, rule_parts, vjp
from paraboloid.engine.plan import Plan, Reach, check_totals, refuse_batch_statistics, signature_of
from paraboloid.engine.recorder import Call, Recorder
from paraboloid.engine.sample_axes import sample_axes
from paraboloid.engine.sample_independence import Layouts, Mixing, Owned, certify, check_agreement, mixes
from paraboloid.engine.shared_inputs import SharedInputs
from paraboloid.engine.shared_rows import by_rows_parts, has_axis, row_layouts, whole_parts
from paraboloid.passes import trees
from paraboloid.passes.frozen_encoders import fused_as_usual
from paraboloid.passes.memory import gives_back, pooled
from paraboloid.passes.modes import eager_code, own_arithmetic
from paraboloid.passes.module_tree import modules_of
from paraboloid.passes.random_state import copied_buffers
from paraboloid.passes.tensor_hooks import unhooked
from paraboloid.passes.torch_internals import LEAF, REENTRANT_CHECKPOINT, DisableTorchFunction, gradients_at
from paraboloid.reductions.alike import apart
from paraboloid.reductions.outer import EVERYTHING, Derived, Outer, zero

SIGNATURES = 512  # recorded sequences of calls and shapes that are remembered per model
_certified: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[int, list[Layouts]]]] = weakref.WeakKeyDictionary()
gives_back(_certified.clear)


def doubling(count: int) -> bool:
    """Whether call number `count`, from 1, is one of 1, 2, 4, 8, ...: often at first, while things still change."""
    return count & (count - 1) == 0


class Tape:
    """The recording of one forward pass of `model`.  Use it through `paraboloid.record`.

    verify: how often sample independence is certified by numbers: "auto" (the first time a sequence of calls and shapes
    is seen, on its calls 2, 4, 8, ..., and wherever the graph alone does not prove it), "once" (without calls 2, 4,
    ...), "always" (for every recorded graph) or False.
    """

    def __init__(self, model: nn.Module, verify: str | bool = "auto", modules: list[nn.Module] | None = None):
        if verify not in ("auto", "once", "always", False):
            raise ValueError(f"verify is {verify!r}; expected 'auto', 'once', 'always' or False.")
        self.model, self.verify = model, verify
        self.modules = modules_of(model) if modules is None else modules
        self.parameters = trees.parameters(model)
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.recorder = Recorder(model, self.names, self.modules if isinstance(model, nn.Module) else None)
        self.shared = SharedInputs(model, self.names, self.recorder.attributes)
        self._plan: tuple[Tensor, tuple[bool, bool], Plan] | None = None
        self._said: set[str] = set()  # parameters whose slow way was said already

    @property
    def calls(self) -> list[Call]:
        return self.recorder.calls

    @contextmanager
    def recording(self, inputs: tuple[tuple, dict] | None = None) -> Iterator[None]:
        """Note the calls made inside the block; what torch.compile compiled runs eagerly there, call by call.

        inputs: those of the one pass of the model in the block; else it is watched for them.
        """
        shared = self.shared.watching() if inputs is None else self.shared.seen(*inputs)
        with eager_code(), fused_as_usual(self.model), self.recorder, shared:
            yield

    # --- guards --------------------------------------------------------------------------------------------------

    def _check_fresh(self, calls: list[Call]) -> None:
        for call in calls:
            if not call.is_fresh:
                raise RuntimeError(
                    f"{self.where(call)}: a tensor it used was modified in place after the forward pass (an input, or "
                    "a parameter by an optimiser step); pull before that, or run the forward pass again."
                )

    def reached(self, f: Tensor, calls: list[Call]) -> Reach:
        """What lies on the paths from f to the leaves."""
        at = {call.edge.node: call for call in calls}
        seen, stack, missed, found = set(), [f.grad_fn], set(), set()
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if type(node).__name__ == REENTRANT_CHECKPOINT:
                raise RuntimeError(
                    "the model uses torch.utils.checkpoint with use_reentrant=True, through which no gradient of a "
                    "layer's output can be taken; pass use_reentrant=False there, or switch checkpointing off."
                )
            if (leaf := getattr(node, LEAF, None)) is not None:
                missed.add(self.names.get(id(leaf)))
            if (call := at.get(node)) is not None:
                stack += call.below
                found |= self._behind(call)
            else:
                for below, _ in node.next_functions:
                    stack.append(below)
        missed -= {None}
        return Reach([call for call in calls if call.edge.node in seen], missed, found | missed)

    def leaves(self, derived: Tensor) -> set[str]:
        """Names of the parameters that a weight is computed from."""
        if id(derived) in self.names:
            return {self.names[id(derived)]}
        seen, stack = set(), [derived.grad_fn or get_gradient_edge(derived).node]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [n for n, _ in node.next_functions]
        leaves = {id(leaf) for n in seen if (leaf := getattr(n, LEAF, None)) is not None}
        return {self.names[i] for i in leaves & self.names.keys()}

    def _behind(self, call: Call) -> set[str]:
        """The parameters that a call's weights are, or are made of."""
        found = set[str]()
        for w in call.weights:
            if (name := self.names.get(id(w))) is not None:
                found.add(name)
            else:
                found |= self.leaves(w)
        return found

    def where(self, call: Call) -> str:
        names = [self.names.get(id(w)) or f"a tensor derived from {sorted(self.leaves(w))}" for w in call.weights]
        return f"{resolve_name(call.op) or getattr(call.op, '__name__', call.op)} on {', '.join(names)}"

    # --- pulling back --------------------------------------------------------------------------------------------

    def plan(self, f: Tensor, batch_statistics: bool = False, by_rows: bool = False) -> Plan:
        """Guards, sample layouts and rules for pulls from f; computed once for each recorded graph."""
        mixed = batch_statistics and bool(self.recorder.batch_norms)
        if self._plan is None or self._plan[0] is not f or self._plan[1] != (mixed, by_rows):
            self._plan = f, (mixed, by_rows), self._make_plan(f, mixed, by_rows)
        return self._plan[2]

    def _make_plan(self, f: Tensor, mixed: bool, by_rows: bool) -> Plan:
        if f.dim() == 0 or len(f) == 0:
            raise ValueError(f"the output has shape {tuple(f.shape)}; expected axis 0 to be the N >= 1 samples.")
        if not f.requires_grad:
            raise ValueError("the output does not require grad: the forward pass ran under no_grad or inference_mode, "
                             "or does not depend on any trainable parameter.")  # fmt: skip
        try:
            return self._made_of(self.recorder, f, mixed)
        except Mixing:
            confirm = bool(self.verify) and not self.recorder.batch_norms
            other = None if self.recorder.batch_norms else self.shared.recorder(len(f), confirm)
            with suppress(Mixing):
                if other is not None:
                    return self._made_of(other, f, mixed)
            if (plan := self._of_shared_rows(f, mixed, by_rows)) is None:
                raise
            return plan

    def _of_shared_rows(self, f: Tensor, mixed: bool, by_rows: bool) -> Plan | None:
        """Where samples see each other as nodes of a graph do, or no call has an axis of N samples (the output is a
        part of the nodes): what each sample's own output gives is right all the same.  None where they do otherwise."""
        recorder, N = self.recorder, len(f)
        calls, missed, found = self.reached(f, recorder.calls)
        edges = [c.edge for c in calls]
        layouts = None if recorder.hooked else row_layouts(f, edges, recorder.handed_in, mixed)
        if layouts is None and has_axis(calls, N):
            return None
        parts = by_rows_parts(calls, layouts, recorder.alias) if by_rows and layouts is not None else None
        plan = Plan(calls, layouts or [], parts or whole_parts(calls, recorder.alias), missed, apart=parts is None)
        if self.verify:
            u = torch.randn(f.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(f)
            inputs: list[Any] = [*edges, *self.parameters.values()]
            gs = torch.autograd.grad(f, inputs, u, retain_graph=True, allow_unused=True)
            self._check_totals(f, plan, list(gs[: len(edges)]), list(gs[len(edges) :]))
        if plan.apart:
            warnings.warn(
                f"the {N} samples see each other (they share rows of the layers' outputs, as nodes of a graph do): "
                f"each is pulled back by itself, in {N} backward passes for every vector, which is exact.",
                stacklevel=6,
            )  # fmt: skip
            self._said |= found
        return plan

    def _made_of(self, recorder: Recorder, f: Tensor, mixed: bool) -> Plan:
        calls, missed, found = self.reached(f, recorder.calls)
        if not found:
            raise ValueError(f"the output depends on none of the model's {len(self.parameters)} trainable parameters; "
                             "was it computed inside the record block, with the model's own parameters (not by "
                             "functional_call with others)?")  # fmt: skip
        first = calls
        history = _certified.setdefault(self.model, {})
        self._check_fresh(calls)
        signature = signature_of(f, calls, recorder.candidates, mixed)
        count, steps = history.get(signature, (0, []))
        due = self.verify == "always" or (self.verify == "auto" and (doubling(count + 1) or not steps))
        if any(isinstance(layout, Owned) for layouts in steps for layout in layouts):
            steps = []  # they were those of another batch
        check = None
        replayed = None if due else replay(calls, steps, recorder.candidates, recorder.alias)
        if replayed is not None and self.verify:
            proved = None if recorder.hooked else sample_axes(f, [c.edge for c in replayed[0]], mixed)
            replayed = None if proved is None else (replayed[0], proved)
        if replayed is not None:
            calls, layouts = replayed
        else:
            layouts, steps, further = [], [], calls
            while further is not None:
                with recorder.statistics_held(mixed):
                    try:
                        layouts, check = certify(f, further, list(self.parameters.values()), self.where)
                    except ValueError:
                        if not steps:
                            raise
                        break  # the weights that were taken for data are none
                calls, steps = further, [*steps, layouts]
                further = promote(calls, layouts, recorder.candidates, recorder.alias) if recorder.candidates else None
            proved = None if recorder.hooked else sample_axes(f, [c.edge for c in calls], mixed)
            if proved is not None:  # where gradients have vanished, numbers fit any layout
                layouts = [None if layout is None else p for layout, p in zip(layouts, proved, strict=True)]
        if not mixed:
            refuse_batch_statistics(calls, layouts, self.where)
        if calls is not first:
            missed = self.reached(f, calls).missed
        plan = Plan(calls, layouts, self._parts(calls, layouts, recorder), missed)
        if due and check is not None:
            self._check_totals(f, plan, *check)
        history.pop(signature, None)
        history[signature] = count + 1, steps
        if len(history) > SIGNATURES:
            history.pop(next(iter(history)))
        return plan

    def _check_totals(self, f: Tensor, plan: Plan, gs: list[Tensor | None], truth: list[Tensor | None]) -> None:
        outers = self._outers(plan, [None if g is None else g[None] for g in gs])
        check_totals(f, plan, self.parameters, outers, list(map(self._behind, plan.calls)), gs, truth)

    def _parts(self, calls: list[Call], layouts: Layouts, recorder: Recorder) -> list[list[Part] | None]:
        parts: list[list[Part] | None] = []
        for call, layout in zip(calls, layouts, strict=True):
            if layout is None:
                parts.append(None)
                continue
            got = rule_parts(call, layout, recorder.alias)
            if got is None and isinstance(layout, Owned) and any(True for _ in call.uses()):
                raise mixes(self.where(call), call.shape, layout.samples)  # a row belongs to several samples
            if got is None:
                warnings.warn(
                    f"{self.where(call)} has no rule for these arguments; falling back to one pull-back of this call "
                    "per sample, which is exact but slower, and has no Kronecker factors.", stacklevel=6,
                )  # fmt: skip
                got = fallback_parts(call, layout)
            parts.append(got)
        owned = [call for call, layout in zip(calls, layouts, strict=True) if isinstance(layout, Owned)]
        if owned:
            check_agreement(calls, layouts, self.where)
            warnings.warn(
                f"the samples lie along no axis of the outputs of {len(owned)} of {len(calls)} calls, the first "
                f"{self.where(owned[0])} {tuple(owned[0].shape)}: their rows are sorted to the samples that own them, "
                "which is exact, and takes a check by numbers (two gradients or more) for every batch.", stacklevel=6,
            )  # fmt: skip
        return parts

    @torch.no_grad()
    def _outers(self, plan: Plan, gs: list[Tensor | None]) -> dict[str, list[Outer]]:
        out: dict[str, list[Outer]] = {name: [] for name in self.parameters}
        for parts, g in zip(plan.parts, gs, strict=True):
            if parts is None or g is None:
                continue
            for part in parts:
                if (name := self.names.get(id(part.root))) is not None:
                    out[name].append(part.outer(g))
                else:
                    inner = part.outer(g)
                    for name in self.leaves(part.root):
                        p = self.parameters[name]
                        out[name].append(Derived(inner, partial(vjp, part.root, p), p.shape))
        return out

    @contextmanager
    def undisturbed(self, f: Tensor) -> Iterator[None]:
        """Inside, nothing that is on around it acts on what the tape does, which changes nothing of the model's."""
        kept = copied_buffers(self.model, self.modules), unhooked(self.parameters.values())
        with DisableTorchFunction(), own_arithmetic(f.device), kept[0], kept[1]:
            yield

    def pull(
        self, f: Tensor, v: Tensor, totals: dict[str, Tensor | None] | None = None, batch_statistics: bool = False,
        by_rows: bool = False, some: slice = EVERYTHING,
    ) -> dict[str, list[Outer]]:  # fmt: skip
        """Pull `v` [V *f.shape] back through the recorded graph, keeping the samples apart (axis 0 of f).

        Returns for every trainable parameter the list of its uses in outer-product form; a parameter without influence
        has one zero use.  The graph is kept, so pulls may be repeated, also inside the `record` block.  A dict given as
        `totals` receives autograd's own gradients, summed over samples and vectors, from the same backward pass.

        `batch_statistics=True` accepts batch norm in training mode.  Row n is then the gradient of the whole pulled
        v . f at the layer's outputs for sample n, as optimisers with Kronecker factors use it: the rows add up to the
        gradient, but they are not the samples' own.  Independence is certified with the statistics held constant.

        Samples that see each other because indices or a matrix among the inputs, buffers and attributes say so (nodes
        of a graph) are pulled back one by one, `some` of them if asked.  `by_rows=True` takes the rows of the layers'
        outputs for samples instead, as with batch norm, in one pull.

        Raises ValueError where the samples are not independent (batch statistics, softmax over the batch), and
        RuntimeError where a tensor of the forward pass was modified afterwards.
        """
        with self.undisturbed(f):
            return self._pull(f, v, totals, batch_statistics, by_rows, some)

    def _pull(
        self, f: Tensor, v: Tensor, totals: dict[str, Tensor | None] | None, batch_statistics: bool, by_rows: bool,
        some: slice = EVERYTHING,
    ) -> dict[str, list[Outer]]:  # fmt: skip
        if v.shape[1:] != f.shape or v.dim() == 0 or v.shape[0] == 0:
            raise ValueError(f"v has shape {tuple(v.shape)}; expected [V, *output shape] = [V, {list(f.shape)}].")
        before, plan = self._plan, self.plan(f, batch_statistics, by_rows)
        if before is self._plan:  # not made now, which checks it
            self._check_fresh(plan.calls)
        v = v.to(f.dtype)
        if plan.apart:
            out = self._apart(f, plan, v, totals, some)
        else:
            out = self._outers(plan, self._gradients(f, plan.calls, v, totals))
        if plan.missed:
            missed = {name: self.parameters[name] for name in sorted(plan.missed)}
            out |= pull_one_by_one(f, v, missed, self._said, some)
        for name, uses in out.items():
            if not uses:
                out[name] = [zero(self.parameters[name], len(v), len(range(len(f))[some]))]
        return out

    def _apart(
        self, f: Tensor, plan: Plan, v: Tensor, totals: dict[str, Tensor | None] | None, some: slice
    ) -> dict[str, list[Outer]]:  # fmt: skip
        """Each of some samples by itself, through all rows of every call."""
        if totals is not None:
            self._gradients(f, [], v, totals)
        at = torch.arange(len(f), device=f.device)[some]
        alone = v.new_zeros(len(v), len(at), *f.shape)
        alone[:, torch.arange(len(at), device=f.device), at] = v[:, some]
        outers = self._outers(plan, self._gradients(f, plan.calls, alone.flatten(0, 1), None))
        return {name: [apart(o, len(v)) for o in uses] for name, uses in outers.items()}

    def _gradients(
        self, f: Tensor, calls: list[Call], v: Tensor, totals: dict[str, Tensor | None] | None
    ) -> list[Tensor | None]:
        """Gradients at the calls' outputs, [V *z] each.  On a CPU a loop of single pulls mostly beats the
        vectorised one, if each is put into its place while it is in the cache."""
        edges = [c.edge for c in calls]
        leaves = [] if totals is None else list(self.parameters.values())
        if not edges and not leaves:
            return []
        alone = len(v) == 1 or leaves or self.recorder.hooked
        if not alone and (together := many_vectors.pull(self.model, f, calls, v)) is not None:
            return together
        found, inputs = list[Tensor | None](), (*edges, *leaves)
        for i in range(v.shape[0]):
            grads = gradients_at(f, inputs, v[i])
            if (V := v.shape[0]) == 1:
                found = [None if g is None else g[None] for g in grads[: len(edges)]]
            elif i == 0:
                found = [None if g is None else pooled((V, *g.shape), g) for g in grads[: len(edges)]]
            if V > 1:
                for place, g in zip(found, grads, strict=False):
                    if place is not None:
                        place[i].copy_(g)
            if totals is not None:
                for name, g in zip(self.parameters, grads[len(edges) :], strict=True):
                    before = totals.get(name)
                    totals[name] = g if before is None or g is None else before + g
        return found


@contextmanager
def record(model: nn.Module, verify: str | bool = "auto") -> Iterator[Tape]:
    """``with record(model) as tape: output = model(x)`` notes every call that consumes a trainable parameter."""
    tape = Tape(model, verify)
    with tape.recording():
        yield tape
