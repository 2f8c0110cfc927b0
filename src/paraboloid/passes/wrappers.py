"""What stands around a model (torch.compile, data parallel, FSDP, checkpoints): the module inside, its plain names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.passes.module_tree import named_parameters_of
from paraboloid.passes.torch_internals import WRAPPERS, inside_compiled

DATA_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def plain_name(name: str) -> str:
    """The parameter's name in the plain module: what torch.compile, FSDP and checkpoint wrappers insert is removed."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unwrapped(model: Any) -> Any:
    """The module inside data-parallel wrappers (and torch.compile's around those); any other model as it is."""
    inside = model
    while True:
        if isinstance(inside, DATA_PARALLEL):
            model = inside = inside.module
        elif (compiled := inside_compiled(inside)) is not None:
            inside = compiled
        else:
            return model


def innermost(model: Any) -> Any:
    """The plain module inside torch.compile's and data-parallel wrappers, which cannot be differentiated twice."""
    while True:
        if isinstance(model, DATA_PARALLEL):
            model = model.module
        elif (compiled := inside_compiled(model)) is not None:
            model = compiled
        else:
            return model


def distributed(model: Any) -> nn.parallel.DistributedDataParallel | None:
    """The wrapper that averages gradients over ranks, possibly inside torch.compile's; None where there is none."""
    while model is not None and not isinstance(model, nn.parallel.DistributedDataParallel):
        model = inside_compiled(model)
    return model


def plain_parameters(model: Any) -> dict[str, nn.Parameter]:
    """All parameters by plain name, frozen ones too."""
    named = named_parameters_of(unwrapped(model))
    if "_mod" not in "".join(named):  # which is in the prefix of every wrapper
        return named
    return {plain_name(name): p for name, p in named.items()}


class Elsewhere:
    """The model at other values of some parameters, given by plain name, as a callable."""

    def __init__(self, model: Any, values: Mapping[str, Tensor]):
        self.model = unwrapped(model)
        names = {plain_name(name): name for name, _ in self.model.named_parameters()}
        self.values = {names[name]: value for name, value in values.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model, nn.Module):
            return torch.func.functional_call(self.model, self.values, args, kwargs)
        parameters = dict(self.model.named_parameters())  # a plain callable's are moved, and put back
        before = {name: parameters[name].data for name in self.values}
        try:
            for name, value in self.values.items():
                parameters[name].data = value.detach()
            return self.model(*args, **kwargs)
        finally:
            for name, value in before.items():
                parameters[name].data = value
