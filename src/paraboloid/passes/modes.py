"""torch's ambient switches (autocast, inference mode, compiled code): set for our own arithmetic, and put back."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from paraboloid.passes.module_tree import modules_of
from paraboloid.passes.torch_internals import COMPILER, casts_somewhere

P = ParamSpec("P")
R = TypeVar("R")


KNOWN = ("cpu", "cuda")  # which autocast is there for
TF32 = 2.0**-11  # of the products that devices offer in the place of float32 ones


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """What a product of numbers of this type is rounded to, relative to its size: eps, or TF32's off the CPU, where
    convolutions (on CUDA by default) and matrix products take it for float32."""
    eps = torch.finfo(dtype).eps
    return max(eps, TF32) if dtype == torch.float32 and device.type != "cpu" else eps


def largest_entry(t: Tensor) -> Tensor:
    """max |t|, without a copy as large."""
    if t.is_complex():
        return t.abs().max()
    low, high = torch.aminmax(t)
    return torch.maximum(-low, high)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast casts to on the device; None where it is off."""
    kind = device.type
    if (kind not in KNOWN and not torch.amp.is_autocast_available(kind)) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


@contextmanager
def autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype` inside the block, whatever is on outside; None: no autocast."""
    if dtype == autocast_dtype(device):
        yield
    else:
        with torch.autocast(device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            yield


_AS_IT_IS = nullcontext()


def own_arithmetic(device: torch.device) -> AbstractContextManager[None]:
    """Inside, numbers keep their type and results are ordinary tensors, under autocast and inference mode too."""
    if not torch.is_inference_mode_enabled() and (not casts_somewhere() or autocast_dtype(device) is None):
        return _AS_IT_IS  # as most often: it is on already
    return _own_arithmetic(device)


@contextmanager
def _own_arithmetic(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), autocast(device, None):
        yield


def precisely(method: Callable[P, R]) -> Callable[P, R]:
    """The method under `own_arithmetic` on its object's device."""

    @wraps(method)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (casts_somewhere() or torch.is_inference_mode_enabled()):
            return method(*args, **kwargs)
        with own_arithmetic(args[0].device):  # pyright: ignore[reportAttributeAccessIssue] - of a class with .device
            return method(*args, **kwargs)

    return inside


def in_own_arithmetic(function: Callable[P, R]) -> Callable[P, R]:
    """The function under `own_arithmetic` on every device."""

    @wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), autocast(torch.device("cpu"), None), autocast(torch.device("cuda"), None):
            return function(*args, **kwargs)

    return inside


def evaluating(model: Any) -> AbstractContextManager[None]:
    """The model in evaluation mode, and afterwards each of its modules in the mode it was in; a plain callable, or a
    model that is in evaluation mode, as it is."""
    modules = modules_of(model)
    for module in modules:
        if module.training:
            return _evaluating(model, modules)
    return _AS_IT_IS


@contextmanager
def _evaluating(model: Any, modules: list[Any]) -> Iterator[None]:
    modes = {module: module.training for module in modules}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Eager:
    """How many recordings are under way, in all threads, and torch.compile's stance that they share.

    The stance belongs to the process.  The first recording sets it and the last one puts it back: if each did so for
    itself, two that overlap in time could leave it set for good.
    """

    def __init__(self):
        self.lock, self.depth = threading.Lock(), 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            if self.stance is None and COMPILER in sys.modules:  # looking is cheap, importing it is not
                try:
                    self.stance = torch.compiler.set_stance("force_eager")
                except RuntimeError as e:
                    raise RuntimeError(
                        "a recording began inside a function that torch.compile compiles; expected it outside. Compile "
                        "the model instead of the training step (an optimiser is given the compiled model), or call "
                        "this from a function that is decorated with torch.compiler.disable."
                    ) from e
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0 and self.stance is not None:
                self.stance.__exit__(None, None, None)
                self.stance = None


_eager = _Eager()


def eager_code() -> AbstractContextManager[None]:
    """Inside, what torch.compile compiled runs eagerly, call by call; nothing is compiled anew because of it."""
    return _eager
