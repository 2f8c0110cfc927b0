"""What all optimisers of this package share: groups, closures, the guard against NaN, state and counters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.optim import foreach
from paraboloid.optim.preconditioner import Block
from paraboloid.passes import trees
from paraboloid.passes.random_state import copied_buffers

Closure = Callable[[], Any]


class Frame(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` of one model whose parameters have names.

    params     parameters of the model, or torch's groups (dicts with "params" and options); default: all trainable ones
    seed       of the optimiser's own generator; torch's global random state is never drawn from

    `_state()` and `_load(state)` are about what is not kept by parameter in `self.state`: its tensors are saved as they
    are, whereas torch casts its own to the parameter's dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        params: Iterable[Any] | None,
        seed: int,
    ):
        found = trees.parameters(model)
        for name, p in found.items():
            if p.numel() == 0:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(p.shape)}, which holds nothing; expected at "
                    "least one element. Remove the empty layer, or freeze it by requires_grad_(False)."
                )
        self.model = model
        super().__init__(list(found.values()) if params is None else params, defaults)
        names = {id(p): name for name, p in found.items()}
        self.names: dict[Tensor, str] = {}
        for p in self._parameters():
            if id(p) not in names:
                raise ValueError(f"a parameter of shape {tuple(p.shape)} was given that is no trainable parameter of "
                                 f"{type(model).__name__}; expected some of {list(found)}.")  # fmt: skip
            self.names[p] = names[id(p)]
        device = next(iter(self.names)).device
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.counters = {"steps": 0, "skipped": 0, "rejected": 0}
        self._blocks: dict[str, Block] = {}  # by name, for those that keep a curvature for each parameter

    # --- parameters ----------------------------------------------------------------------------------------------

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _with_gradient(self, group: dict[str, Any]) -> list[nn.Parameter]:
        """The group's parameters that take part in this step."""
        found = [p for p in group["params"] if p.grad is not None]
        for p in found:
            if p.grad.is_sparse:
                raise ValueError(f"parameter {self.names[p]!r} has a sparse gradient; expected a dense one. Build the "
                                 "embedding with sparse=False.")  # fmt: skip
        return found

    def _check_model(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise RuntimeError where the model's parameters are not those that the optimiser was made for."""
        for p, name in self.names.items():
            if p.requires_grad and parameters.get(name) is not p:
                now = tuple(parameters[name].shape) if name in parameters else "gone"
                raise RuntimeError(
                    f"the model changed: its parameter {name!r} is {now} and not the tensor {tuple(p.shape)} that this "
                    f"{type(self).__name__} was made for. Make a new optimiser after changing the model's layers."
                )

    # --- closures and guards -------------------------------------------------------------------------------------

    def _first(self, closure: Closure | None) -> Tensor | None:
        """The closure's loss, with its gradients in place; None without a closure."""
        if closure is None:
            return None
        self._replay = _random_state(next(iter(self.names)).device)
        with torch.enable_grad():
            loss = closure()
        if not any(p.grad is not None for p in self._parameters()):
            raise RuntimeError("the closure left no gradient on any parameter; expected it to clear the gradients, "
                               "evaluate the loss, call backward() on it and return it.")  # fmt: skip
        return loss

    @contextmanager
    def _again(self, keep_gradients: bool = True) -> Iterator[None]:
        """For calling a closure once more in a step: the first call's random state, no moved buffers (running
        statistics), and the gradients of the first call put back."""
        device = next(iter(self.names)).device
        devices = [device] if device.type == "cuda" else []
        gradients = [(p, p.grad, p.grad.clone()) for p in self._parameters() if p.grad is not None]
        with torch.random.fork_rng(devices=devices), copied_buffers(self.model), torch.enable_grad():
            _set_random_state(device, self._replay)
            try:
                yield
            finally:
                if keep_gradients:
                    for p in self._parameters():
                        p.grad = None
                    for p, grad, value in gradients:
                        p.grad = grad
                        grad.data.copy_(value)

    def _finite(self) -> bool:
        """Whether all gradients are; else the step is counted as skipped, with a warning for the first one."""
        grads = [gradient_of(p) for group in self.param_groups for p in self._with_gradient(group)]
        if not grads or bool(foreach.norm(grads).isfinite()):
            return True
        bad = [self.names[p] for p in self._parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if bad:  # a norm may overflow where no entry does
            self._skip(f"the gradient of {_some(bad)} has NaN or infinite entries")
        return not bad

    def _skip(self, why: str) -> None:
        if self.counters["skipped"] == 0:
            warnings.warn(
                f"step {self.counters['steps'] + self.counters['skipped'] + 1} was skipped: {why}. Parameters and "
                "curvature are as before; further skipped steps are only counted, see diagnostics()['skipped'].",
                stacklevel=4,
            )
        self.counters["skipped"] += 1

    def _with_momentum(self, group: dict, ps: list, d: list[Tensor]) -> list[Tensor]:
        """Heavy ball, or Nesterov's, on the directions of the parameters ps; what to subtract lr times."""
        mu = group["momentum"]
        if mu == 0:
            return d
        fresh = [p for p in ps if "momentum_buffer" not in self.state[p]]
        for p in fresh:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in ps]
        foreach.scale_(buffers, mu)
        foreach.add_(buffers, d)
        return foreach.added(d, buffers, alpha=mu) if group["nesterov"] else buffers

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"blocks": {name: block.state() for name, block in self._blocks.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        """Take over what `_state` gave."""
        for name, block in self._blocks.items():
            block.load(state["blocks"][name])

    def _layers(self) -> dict[str, dict[str, Any]]:
        """What diagnostics say of each parameter's block."""
        sizes = {name: p.numel() for p, name in self.names.items()}
        return {
            name: {"structure": b.structure, "damping": b.damping, "curvature": b.trace() / sizes[name],
                   "failures": b.failures} for name, b in self._blocks.items()
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """torch's, with the curvature, the counters and the generator's state under "paraboloid"."""
        own = {"optimizer": type(self).__name__, "names": list(self.names.values()), "counters": dict(self.counters),
               "generator": self.generator.get_state(), **self._state()}  # fmt: skip
        return {**super().state_dict(), "paraboloid": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken; raises ValueError for another optimiser's or model's state."""
        own = state_dict.get("paraboloid")
        if own is None or own["optimizer"] != type(self).__name__:
            found = "no such optimiser" if own is None else own["optimizer"]
            raise ValueError(f"the state is that of {found}; expected one of {type(self).__name__}.")
        if own["names"] != list(self.names.values()):
            raise ValueError(f"the state is that of a model with parameters {own['names']}; expected "
                             f"{list(self.names.values())}.")  # fmt: skip
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "paraboloid"})
        self.counters = dict(own["counters"])
        self.generator.set_state(own["generator"].cpu())
        device = next(iter(self.names)).device
        self._load(trees.mapped(lambda t: t.detach().to(device, copy=True), {
            k: v for k, v in own.items() if k not in ("optimizer", "names", "counters", "generator")
        }))  # fmt: skip

    def diagnostics(self) -> dict[str, Any]:
        """What happened so far: steps taken, skipped (NaN or infinite gradients) and rejected."""
        return dict(self.counters)


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def gradient_of(p: Tensor, weight_decay: float = 0.0) -> Tensor:
    """The gradient of a parameter that has one, plus weight_decay times the parameter."""
    assert p.grad is not None
    return p.grad if weight_decay == 0 else p.grad.add(p, alpha=weight_decay)


def value_of(loss: Any) -> float:
    """The number that a closure returned."""
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
