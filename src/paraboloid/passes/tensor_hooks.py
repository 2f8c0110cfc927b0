"""Hooks that a user registered on parameters: they change gradients, not what the model is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from paraboloid.passes.torch_internals import gradient_hooks, post_gradient_hooks

_AS_IT_IS = nullcontext()


def unhooked(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Inside, derivatives of parameters are the model's own: hooks such as `p.register_hook(clip)` are off."""
    held = [hooks for hooks in map(gradient_hooks, parameters) if hooks]
    return _without(held) if held else _AS_IT_IS


@contextmanager
def _without(found: list[dict[Any, Any]]) -> Iterator[None]:
    held = [(hooks, dict(hooks)) for hooks in found]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, before in held:
            hooks.update(before)


def hooked(p: Tensor, g: Tensor) -> Tensor:
    """The gradient as the hooks of a parameter leave it, in `backward()`."""
    for hook in list((gradient_hooks(p) or {}).values()):
        changed = hook(g)
        g = g if changed is None else changed
    return g


def accumulated(p: Tensor) -> None:
    """Call what shall be called when a gradient has been added to `.grad`."""
    for hook in list((post_gradient_hooks(p) or {}).values()):
        hook(p)
