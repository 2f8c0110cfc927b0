"""What the optimisers' options may be."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from paraboloid.losses import Loss

TORCHS = {  # options that torch's optimisers have, and why they are refused; None: taken, and without effect
    "foreach": None,  # parameters are always updated together
    "fused": "there is no fused kernel for this step",
    "capturable": "a step decides by numbers on the host, so it cannot be captured in a CUDA graph",
    "differentiable": "no graph is built through a step",
    "maximize": "the curvature of a loss that is to grow is not positive",
}


def check_made(name: str, model: Any, loss_fn: Any, options: Mapping[str, Any]) -> Any:
    """The loss; raises where an optimiser is made like one of torch's: TypeError without a model and a loss, ValueError
    for `options` of torch's that it does not have, TypeError for unknown ones."""
    if loss_fn is None or (isinstance(model, Iterable | Mapping) and not isinstance(model, nn.Module)):
        found = "no loss_fn" if loss_fn is None else f"a {type(model).__name__} in the place of the model"
        raise TypeError(
            f"{name} got {found}; expected {name}(model, loss_fn, ...): it watches both for curvature. Where a trainer "
            f"makes its optimiser from the parameters alone (optimizer= of skorch), override what makes it: in skorch "
            f"`def initialize_optimizer(self, *_, **__): self.optimizer_ = {name}(self.module_, self.criterion_)`."
        )
    for key, value in options.items():
        if key not in TORCHS:
            raise TypeError(f"{name} got an unexpected option {key!r}; see help({name}).")
        if value and TORCHS[key] is not None:
            instead = " Minimise its negative." if key == "maximize" else ""
            raise ValueError(f"{key} is {value!r}; expected False, for {TORCHS[key]}.{instead}")
    return loss_fn


def of_paper(make: Callable[..., Any], constants: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with a paper's constants where they are as `make` has them by default."""
    usual = inspect.signature(make).parameters
    return {k: constants[k] if k in constants and v == usual[k].default else v for k, v in given.items()}


def rate(group: Mapping[str, Any]) -> float:
    """A group's learning rate, which may be a tensor."""
    return float(group["lr"])


def check_number(name: str, value: Any, least: float, above: bool = False) -> Any:
    """`value`, or ValueError where it is not a number (or a tensor of one) of at least (or above) `least`."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if (
        isinstance(number, bool)
        or not isinstance(number, int | float)
        or not (number > least if above else number >= least)
    ):
        raise ValueError(f"{name} is {value!r}; expected a number {'above' if above else 'of at least'} {least}.")
    return value


def check_share(name: str, value: float) -> float:
    """`value`, or ValueError where it is not in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name} is {value!r}; expected a number in [0, 1).")
    return value


def check_samplable(loss: Loss, fisher: str) -> None:
    """Raise NotImplementedError where labels are to be sampled from a loss that does not say how."""
    for term in loss.terms if fisher == "mc" else ():
        own = type(term)
        if own.sample_targets is Loss.sample_targets and own.sampled_gradients is Loss.sampled_gradients:
            raise NotImplementedError(
                f"{type(term).__name__} does not say how to draw labels from the model's predictive distribution, as "
                "fisher='mc' needs; expected a `sample_targets` method. Use fisher='exact' or 'empirical' instead."
            )


def group_defaults(lr, momentum, nesterov, weight_decay, decoupled, damping) -> dict[str, Any]:
    check_number("lr", lr, 0)
    check_number("damping", damping, 0)
    check_share("momentum", momentum)
    check_number("weight_decay", weight_decay, 0)
    if nesterov and momentum == 0:
        raise ValueError("nesterov is True and momentum 0; expected a momentum above 0.")
    return {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "decoupled": decoupled, "damping": damping}  # fmt: skip
