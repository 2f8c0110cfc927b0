"""Differentiating a model twice without leaving a trace on it or on torch's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from paraboloid.engine.twice_differentiable import TwiceDifferentiable as TwiceDifferentiable
from paraboloid.passes.modes import eager_code
from paraboloid.passes.module_tree import modules_and_parameters_of
from paraboloid.passes.random_state import copied_buffers
from paraboloid.passes.tensor_hooks import unhooked
from paraboloid.passes.torch_internals import compiled_in_place, inside_compiled


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Inside, autograd is on and every operation has a second derivative; afterwards the model is as it was.

    Fused attention and cuDNN's recurrent layers have no double backward: the math kernels take their place.  Modules in
    training mode get copies of their buffers, so running statistics are not touched, neither by a forward pass nor by a
    checkpoint that is recomputed during a backward pass.
    """
    modules, parameters = modules_and_parameters_of(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):  # the forward pass restores it; backward passes do without
                stack.enter_context(torch.autocast(device, enabled=False))
        if any(isinstance(m, nn.RNNBase) for m in modules) and torch.backends.cudnn.is_available():
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if any(compiled_in_place(m) or inside_compiled(m) for m in modules):
            stack.enter_context(eager_code())
        stack.enter_context(copied_buffers(model, modules))
        stack.enter_context(unhooked(parameters))
        yield


class Autocast:
    """The autocast setting at the time of making, for forward passes that are run later."""

    def __init__(self, device: torch.device):
        self.device = device.type
        known = torch.amp.is_autocast_available(self.device)
        self.enabled = known and torch.is_autocast_enabled(self.device)
        self.dtype = torch.get_autocast_dtype(self.device) if self.enabled else None

    def __call__(self) -> Any:
        return torch.autocast(self.device, self.dtype, enabled=True) if self.enabled else ExitStack()
