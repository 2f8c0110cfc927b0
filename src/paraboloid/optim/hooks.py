"""Watch a model's training passes from outside: record the forward pass, and measure when the loss is called.

One pair of hooks on the root module records what runs under gradients; one hook on the loss sees outputs and targets,
and finds the passes that its outputs come from: several forward passes may come before the losses.
The measurement happens there, before `backward` frees the graph, so that the plain loop ``loss.backward(); opt.step()``
needs no change.  Forward passes under `no_grad` are ignored, and so is everything while `muted`.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paraboloid.data.batches import check_not_nested
from paraboloid.distributed import collectives
from paraboloid.engine.twice_differentiable import twice_differentiable
from paraboloid.losses import CrossEntropy, Loss
from paraboloid.optim.recorded_passes import Recorded
from paraboloid.passes.torch_internals import compiled_in_place, running_data_parallel
from paraboloid.quantities.recording import Recording

NOTHING_SEEN = (
    "saw no training pass since the last step: expected calls of the model and then of the loss, the very objects"
    " that it was given, with gradients enabled. Where the loop calls a wrapper (torch.compile, "
    "DistributedDataParallel), give the optimiser that; where the loss is computed by a function, call "
    "opt.observe(output, target) before backward()."
)


_TWICE = (
    "the loss was called twice on one forward pass with different targets (mixup): what each counts in their sum is "
    "not known here. Call it once: for cross-entropy without class weights the probabilities lam * one_hot(a) + "
    "(1 - lam) * one_hot(b) have the same value, for squared error lam * a + (1 - lam) * b has the same gradient; else "
    "give the optimiser a pb.Loss that takes both targets in one tensor."
)


class Observed(NamedTuple):
    """One forward pass with its loss: what was recorded, the output and target that the loss saw, the inputs, and the
    loss as reduced."""

    tape: Recording
    output: Tensor
    target: Tensor
    inputs: Any
    value: float


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is a {type(model).__name__}, a callable without hooks, by which this optimiser "
                         "sees layers; expected an nn.Module. pb.optim.HessianFree takes callables.")  # fmt: skip


class Capture:
    """Hooks on a model and its loss that call `measure(observed)` for every training pass while `wanted()`.

    twice  whether the forward pass is to be differentiated twice
    group  the ranks that measure together: a loss that is not finite on one counts for all
    """

    def __init__(self, model: nn.Module, loss_fn: Any, verify: str | bool, twice: bool, group: Any):
        check_module(model)
        if compiled_in_place(model):
            raise ValueError(
                "the model was compiled in place by model.compile(), which compiles its hooks too; expected "
                "compiled = torch.compile(model), given to the optimiser and called in the loop."
            )
        self.model, self.loss = model, Loss.from_torch(loss_fn)
        self.verify, self.twice, self.group = verify, twice, group
        self.passes = 0  # measured since the last `forget`
        self.nonfinite = False  # whether a loss since then was NaN or infinite
        self._muted = False
        self._open: tuple[ExitStack, Recording, FrameType] | None = None
        self._depth = 0
        self._recorded = Recorded()
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            model.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
        ]
        if isinstance(loss_fn, nn.Module):
            self._handles.append(loss_fn.register_forward_hook(_Hook(self._loss_called), with_kwargs=True))
        else:
            self._handles.append(self.loss.register_hook(_Hook(self._on_loss)))
        weakref.finalize(self, _remove, self._handles)

    def wanted(self) -> bool:
        """Asked when a forward pass begins: False costs nothing but the question."""
        raise NotImplementedError

    def measure(self, seen: Observed) -> None:
        """Called inside the loss's call, or by `observe`."""
        raise NotImplementedError

    def remove(self) -> None:
        """Take the hooks off the model and the loss."""
        _remove(self._handles)
        self.forget()

    def forget(self) -> None:
        """Let go of the recorded pass, and count anew."""
        self._recorded, self.passes, self.nonfinite = Recorded(), 0, False

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Passes inside the block are not watched."""
        before, self._muted = self._muted, True
        try:
            yield
        finally:
            self._muted = before

    # --- the forward pass ----------------------------------------------------------------------------------------

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is not self.model:
            return  # a shallow copy, which has the same hooks
        if self._open is not None and not _is_running(self._open[2]):
            self._close()  # an interrupt left the last forward pass without its hook
        if self._open is not None:
            self._depth += 1
        elif not self._muted and torch.is_grad_enabled() and self.wanted():
            self._check_wrapper()
            check_not_nested([*args, *kwargs.values()])
            stack, tape = ExitStack(), self._recorded.following() or Recording(self.model, self.verify)
            stack.enter_context(tape.recording((args, kwargs)))
            stack.enter_context(twice_differentiable() if self.twice else nullcontext())
            self._open, self._depth = (stack, tape, sys._getframe(2)), 1

    def _check_wrapper(self) -> None:
        """A bare model inside a data-parallel wrapper would use each rank's own curvature, and ranks drift."""
        active = running_data_parallel()
        if active is not None and self.group is None and active is not self.model:
            raise RuntimeError("the model runs inside DistributedDataParallel, but the optimiser was given the bare "
                               "model, so it would use the curvature of this rank's samples alone. Give it the wrapped "
                               "model, or all_reduce=True.")  # fmt: skip

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if self._open is None or module is not self.model:
            return
        self._depth -= 1
        if self._depth == 0:
            tape = self._open[1]
            self._close()
            if output is not None:
                self._recorded.add(tape, output, _inputs(args, kwargs))

    def _close(self) -> None:
        assert self._open is not None
        stack, self._open, self._depth = self._open[0], None, 0
        stack.close()

    # --- the loss ------------------------------------------------------------------------------------------------

    def _loss_called(self, module: nn.Module, args: tuple, kwargs: dict, value: Tensor) -> None:
        found = dict(zip(("input", "target"), args, strict=False)) | kwargs
        if self._waiting and {"input", "target"} <= set(found):
            self._on_loss(found["input"], found["target"], value)

    @property
    def _waiting(self) -> bool:
        return bool(self._recorded.passes) and not self._muted and torch.is_grad_enabled()

    def _on_loss(self, f: Tensor, y: Tensor, value: Tensor | None = None) -> None:
        """Measure, if f comes from passes that were recorded: each belongs to the loss that its output enters."""
        if not self._waiting or not f.requires_grad or not (found := self._recorded.behind(f)):
            return
        if False not in [p.seen_with(f, y) for p in found]:
            return  # once more, for a log say
        if True in [p.is_seen for p in found]:
            raise RuntimeError(_TWICE if all(p.seen_output is f for p in found) else "the loss was called twice on one "
                               "forward pass with different outputs or targets, so the curvature of their sum is not "
                               "known here. Give the optimiser one loss that contains both (pb.Loss objects add up), "
                               "and call that.")  # fmt: skip
        first, tape, inputs = found[0], found[0].tape, found[0].inputs if len(found) == 1 else None
        assert tape is not None
        for p in found:
            p.see(f, y)
        value = self.loss.value(f.detach(), y) if value is None or value.numel() != 1 else value.detach()
        if not collectives.everywhere(torch.isfinite(value), self.group):
            self.nonfinite = True
            return
        self.passes += 1
        self.measure(Observed(tape, *by_sample(self.loss, f, y, first.samples), inputs, float(value)))

    def observe(self, f: Tensor, y: Tensor) -> None:
        """What the hook on the loss does, for losses computed by a function: call it before backward()."""
        if not self._recorded.passes and not self._muted and self.wanted():
            raise RuntimeError("no forward pass of the model was recorded since the last step; call the model (itself, "
                               "not a submodule or its .forward) with gradients enabled before observe().")  # fmt: skip
        self._on_loss(f, y)


class _Hook:
    """A method as a hook that does not keep its object alive: an optimiser nobody holds takes its hooks with it.

    In a copied or unpickled module it does nothing.
    """

    def __init__(self, method: Callable[..., None] | None = None):
        self._held = (lambda: None) if method is None else weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> None:
        if (alive := self._held()) is not None:
            alive(*args)

    def __reduce__(self) -> Any:
        return _Hook, ()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def by_sample(loss: Loss, f: Tensor, y: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """Output and target with the samples on axis 0, where a sequence was flattened into rows for the loss.

    A [N T, C] output of a model whose output has N samples becomes [N, C, T] for cross-entropy, [N, T, C] for others;
    the loss is the same.
    """
    if len(f) == N or N == 0 or len(f) % N or len(y) != len(f):
        return f, y
    f, y = f.unflatten(0, (N, -1)), y.unflatten(0, (N, -1))
    return (f.movedim(-1, 1) if isinstance(loss, CrossEntropy) and f.dim() == 3 else f), y


def _inputs(args: tuple, kwargs: dict) -> Any:
    """The call's arguments as the inputs of a batch; None where they are both positional and by name."""
    if args and kwargs:
        return None
    return dict(kwargs) if kwargs else args[0] if len(args) == 1 else args


def _is_running(frame: FrameType) -> bool:
    at = sys._getframe(1)
    while at is not None:
        if at is frame:
            return True
        at = at.f_back
    return False
