"""What the optimisers' options may be."""

from __future__ import annotations

from typing import Any

from paraboloid.losses import Loss


def check_number(name: str, value: float, least: float, above: bool = False) -> float:
    """`value`, or ValueError where it is not a number of at least (or above) `least`."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value > least if above else value >= least)
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
