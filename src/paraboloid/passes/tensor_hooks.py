"""Hooks that a user registered on parameters: they change gradients, not what the model is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from paraboloid.passes.torch_internals import gradient_hooks, post_gradient_hooks


@contextmanager
def unhooked(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, derivatives of parameters are the model's own: hooks such as `p.register_hook(clip)` are off."""
    held = [(hooks, dict(hooks)) for p in parameters if (hooks := gradient_hooks(p))]
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
