"""What all samples share: the grid of an operator net, position ids [1, T], prompts that images meet; and constants
that are plain attributes of a module.

What is computed from them and from parameters alone is clean: the same for every sample, a derived weight.  Which
inputs these are is not known before the number of samples is, that of the output.  So where the inputs of the model
have different lengths, the pass is recorded once more for each length that N may turn out to have, with all inputs of
another length as clean.  An attribute may be a part of the batch that the module kept.  Such a recording is asked only
where the plain one finds samples mixed, and if the model confirms by its outputs for half of the samples that the rest
belongs to all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.engine.recorder import Recorder, tensors
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import isolated
from paraboloid.passes.trees import mapped
from paraboloid.passes.wrappers import innermost

MOST = 3  # different lengths, beyond which no input is taken for a shared one
UNFIT = RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError  # of shapes that do not fit
_AS_IT_IS = nullcontext()
CLOSE = 10.0  # square roots of eps that outputs may differ by


class SharedInputs:
    """The further recordings of a model's passes, by the number of samples that they are for; attributes: see
    `Recorder`."""

    def __init__(self, model: Any, names: Mapping[int, str], attributes: Sequence[Tensor]):
        self.model, self.names, self.attributes = model, names, attributes
        self.recorders: dict[int, Recorder] = {}
        self.inputs: list[tuple[tuple, dict]] = []
        self._open: list[ExitStack] = []

    def watching(self) -> AbstractContextManager[None]:
        """Passes of the model inside the block are recorded so; its hooks are as before afterwards."""
        root = innermost(self.model)
        return self._watching(root) if isinstance(root, nn.Module) else _AS_IT_IS

    @contextmanager
    def _watching(self, root: nn.Module) -> Iterator[None]:
        def before(module: Any, args: tuple, kwargs: dict) -> None:
            stack = ExitStack()
            stack.enter_context(self.seen(args, kwargs))
            self._open.append(stack)

        def after(*_: Any) -> None:
            if self._open:
                self._open.pop().close()

        handles = [
            root.register_forward_pre_hook(before, with_kwargs=True),
            root.register_forward_hook(after, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def seen(self, args: tuple, kwargs: dict) -> AbstractContextManager[None]:
        """Record what runs inside, a pass of the model on these inputs."""
        lengths = {t.shape[0] for t in tensors(*args, *kwargs.values()) if t.dim()}
        if (len(lengths) > 1 or self.attributes) and len(lengths) <= MOST:
            return self._seen(args, kwargs, sorted(lengths - {0, 1}))
        return _AS_IT_IS

    @contextmanager
    def _seen(self, args: tuple, kwargs: dict, lengths: list[int]) -> Iterator[None]:
        ts = [t for t in tensors(*args, *kwargs.values()) if t.dim()]
        self.inputs.append((args, kwargs))
        with ExitStack() as stack:
            for N in lengths:
                recorder = self.recorders.setdefault(N, Recorder(self.model, self.names))
                recorder.mark_clean([*self.attributes, *(t for t in ts if len(t) != N and not t.requires_grad)])
                stack.enter_context(recorder)
            yield

    def recorder(self, N: int, confirm: bool) -> Recorder | None:
        """The recording for N samples, if there is one; with `confirm`, only if outputs say that it is right."""
        found = self.recorders.get(N)
        return found if found is None or not confirm or self._confirmed(N) else None

    def _confirmed(self, N: int) -> bool:
        """Whether half of the samples with all of the shared inputs have the outputs that they have among all."""

        def half(t: Tensor) -> Tensor:
            return t[: N // 2] if t.dim() and len(t) == N else t

        device = next((p.device for _, p in self.model.named_parameters()), torch.device("cpu"))
        for args, kwargs in self.inputs:
            try:
                with evaluating(self.model), isolated(self.model, device, 0), torch.no_grad():
                    whole = tensors(self.model(*args, **kwargs))
                    part = tensors(self.model(*mapped(half, args), **mapped(half, kwargs)))
            except UNFIT:
                return False
            pairs = [(a[: N // 2], b) for a, b in zip(whole, part, strict=False) if a.dim() and len(a) == N]
            if not pairs or len(whole) != len(part) or not all(_close(a, b) for a, b in pairs):
                return False
        return bool(self.inputs)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    tolerance = CLOSE * torch.finfo(a.dtype).eps ** 0.5
    largest = float(a.abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
