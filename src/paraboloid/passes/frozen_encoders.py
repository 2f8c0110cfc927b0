"""Transformer encoders without a trainable parameter, in evaluation mode, take torch's fused path for a user.

With a padding mask it gives other numbers than the plain one (padded places are cut off, or zero).  While a mode of
ours looks on, torch takes the plain path: such an encoder's forward pass, a constant for us, is shielded from it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from paraboloid.passes.torch_internals import DisableTorchFunction

KINDS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
_encoders: weakref.WeakKeyDictionary[Any, list[nn.Module]] = weakref.WeakKeyDictionary()  # of a model


_AS_IT_IS = nullcontext()


def fused_as_usual(model: Any) -> AbstractContextManager[None]:
    """Inside, frozen encoders take the path that they take without us."""
    if not isinstance(model, nn.Module):
        return _AS_IT_IS
    found: list[nn.Module] | None = _encoders.get(model)
    if found is None:
        found = [m for m in model.modules() if isinstance(m, KINDS) and type(m).forward in _FORWARDS]
        _encoders[model] = found
    return _shielding(found) if found else _AS_IT_IS


@contextmanager
def _shielding(found: list[nn.Module]) -> Iterator[None]:
    frozen = [m for m in found if not m.training and not any(p.requires_grad for p in m.parameters())]
    shielded = [m for m in frozen if "forward" not in m.__dict__]
    for m in shielded:
        m.__dict__["forward"] = _shielded(m)
    try:
        yield
    finally:
        for m in shielded:
            m.__dict__.pop("forward", None)


_FORWARDS = {kind.forward for kind in KINDS}


def _shielded(module: nn.Module) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with DisableTorchFunction():
            return type(module).forward(module, *args, **kwargs)

    return forward
