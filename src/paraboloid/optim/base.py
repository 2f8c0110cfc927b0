"""What all optimisers of this package share: named parameters, groups, the guard against NaN, state and counters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.distributed import collectives
from paraboloid.optim import foreach
from paraboloid.optim.acceptance import total_damping
from paraboloid.optim.closures import Closure, Evaluation
from paraboloid.optim.direction import AUTO, Move
from paraboloid.optim.options import TORCHS, check_made
from paraboloid.optim.sealed_state import KEY, opened, sealed
from paraboloid.optim.trust import LOST, START, LastStep, Trust, go_back, stop
from paraboloid.passes import trees, wrappers
from paraboloid.passes.torch_internals import versions

_GRADIENT = attrgetter("grad")
FRAME = ("optimizer", "names", "shapes", "options", "counters", "generator", "trust")  # the rest is the subclass's


class Frame(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` of one model whose parameters have names.

    params     parameters of the model, or torch's groups (dicts with "params" and options); default: all trainable ones
    seed       of the optimiser's own generator; torch's global random state is never drawn from
    all_reduce over the ranks that step together: "auto", those of a DistributedDataParallel model; or as in
               `pb.statistics`

    A subclass sets the attributes named in `OPTIONS`, calls this constructor and then `_compose`, which makes the parts
    that follow from its options: a loaded state brings its own.  `_state()` and `_load(state)` are about what is not
    kept by parameter in `self.state`: its tensors are saved as they are, torch casts its own to the parameter's dtype.
    """

    OPTIONS: tuple[str, ...] = ()  # that are not kept by group, but say what is computed
    OLDER: Mapping[str, Any] = {"rise_factor": None, "kl_clip": None}  # where an older build's state does not say
    rise_factor: float | None = None
    trust: Trust | None = None

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        params: Iterable[Any] | None,
        seed: int,
        all_reduce: Any = "auto",
    ):
        self.model, self._group, self._composed = model, distributed_group(model, all_reduce), False
        self.names: dict[Tensor, str] = {}
        super().__init__(list(trees.parameters(model).values()) if params is None else params, defaults)
        self.device = next(iter(self.names)).device
        self._note_started()
        self.generator = torch.Generator(device=self.device).manual_seed(collectives.rank_seed(seed, self._group))
        self.counters = {"steps": 0, "skipped": 0, "rejected": 0}

    def _note_started(self) -> None:
        """A state that is not empty: torch.distributed.checkpoint would take a step to fill it."""
        self.state[next(iter(self.names))]  # a defaultdict: reading makes it

    def _compose(self) -> None:
        """Make the parts that follow from the options and the names of the parameters."""
        rate = START if getattr(self, "kl_clip", None) == AUTO else 1.0
        self._composed = True
        self.trust = None if self.rise_factor is None else Trust(self.rise_factor, rate, self._short())
        self._last_step, self._gradients = LastStep(), (list[Tensor](), None)
        self._left = list[int]()  # versions of the parameters after the last step; those that came later are not in it

    def _short(self) -> float | None:
        """See `Trust`."""
        return None

    # --- parameters ----------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """torch's, for trainable parameters of the model."""
        found = trees.parameters(self.model)
        for name, p in found.items():
            if p.numel() == 0:
                raise ValueError(
                    f"parameter {name!r} has shape {tuple(p.shape)}, which holds nothing; expected at "
                    "least one element. Remove the empty layer, or freeze it by requires_grad_(False)."
                )
        if isinstance(param_group, dict):
            check_made(type(self).__name__, self.model, True, {k: v for k, v in param_group.items() if k in TORCHS})
        super().add_param_group(param_group)
        names = {id(p): name for name, p in found.items()}
        for p in self.param_groups[-1]["params"]:
            if id(p) not in names:
                self.param_groups.pop()
                raise ValueError(f"a parameter of shape {tuple(p.shape)} was given that is no trainable parameter of "
                                 f"{type(self.model).__name__}; expected some of {list(found)}.")  # fmt: skip
        new = {p: names[id(p)] for p in self.param_groups[-1]["params"]}
        self.names |= new
        if self._composed:
            self._added(new.values())

    def _added(self, names: Iterable[str]) -> None:
        """Parameters came after the optimiser was made."""

    def _keeps_batches(self) -> bool:
        """Whether the step evaluates the model on the batches of the passes that were watched."""
        return False

    def _parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    def _dampings(self) -> dict[str, float]:
        """What is added to the curvature of each parameter."""
        found: dict[str, float] = {}
        for group in self.param_groups:
            total = total_damping(group)
            for p in group["params"]:
                found[self.names[p]] = total
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

    # --- a step --------------------------------------------------------------------------------------------------

    def _evaluated(self, closure: Closure | None) -> Evaluation | None:
        return None if closure is None else Evaluation(closure, self.model, self._parameters())

    def _moves(self, finite_loss: bool = True) -> list[Move] | None:
        """Each group's step, its direction still the gradient; None, with a warning for the first one, and counted as
        skipped, where the loss or a gradient is NaN or infinite."""
        if not finite_loss:
            return self._skip("the loss is NaN or infinite")
        moves, gradients = [], []
        for group in self.param_groups:
            m = Move(group, 1.0 if self.trust is None else self.trust.rate)
            for p in group["params"]:
                if (g := p.grad) is not None:
                    if g.is_sparse:
                        raise ValueError(f"parameter {self.names[p]!r} has a sparse gradient; expected a dense one. "
                                         "Build the embedding with sparse=False.")  # fmt: skip
                    m.add(self.names[p], p, self.state[p], g)
                    kept = m.states[-1].get("momentum_buffer", p)
                    if kept.dtype != p.dtype or kept.device != p.device:
                        raise self._moved(p, kept)
            if m.params:
                moves.append(m)
                gradients += m.gradient
        whole = foreach.joined(gradients)
        if not foreach.finite(gradients, whole):
            bad = [name for m in moves for name, g in zip(m.names, m.gradient, strict=True) if not g.isfinite().all()]
            return self._skip(f"the gradient of {_some(bad)} has NaN or infinite entries")
        self._gradients = gradients, whole
        if len(moves) == 1:
            moves[0].joined = whole
        return moves

    def _moved(self, p: Tensor, kept: Tensor) -> RuntimeError:
        name = type(self).__name__
        return RuntimeError(
            f"parameter {self.names[p]!r} is {p.dtype} on {p.device}, but what this {name} keeps of it is {kept.dtype} "
            f"on {kept.device}: the model was moved or cast after a step. Make a new {name} of it, and give that "
            "load_state_dict(state_dict()) to go on."
        )

    # --- trust in steps: see `Trust` -------------------------------------------------------------------------------

    def _states(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, state) for p in self.names if (state := self.state.get(p)) is not None]

    def _renew(self) -> None:
        """The curvature is to be measured anew in the next pass."""

    def _forget(self) -> None:
        """The passes since the last step are none of this one's."""

    def _unwatched(self) -> AbstractContextManager[Any]:
        """Passes inside are none of the step's."""
        return nullcontext()

    def _judged(self, first: Evaluation | None, loss: float | None) -> Evaluation | None:
        """What a loss says of the last step: one that rose is taken back, if a closure can tell, and the closure is
        evaluated again; if not, the next steps are shorter."""
        trust = self.trust
        if trust is None or loss is None:
            return first
        if first is not None:
            loss = collectives.mean(loss, self._group, self.device)
        if not math.isfinite(loss) or trust.rises(loss):
            if first is not None and self._is_better_before(first, loss):
                self._distrust("taken_back", f"the loss was {loss:.4g} after step {self.counters['steps']}, which was "
                               "taken back")  # fmt: skip
                self._forget()
                first = first.anew()
                loss = collectives.mean(first.value, self._group, self.device)
            elif math.isfinite(loss):
                self._distrust("rose", f"the loss rose to {loss:.4g} from about {trust.mean:.4g}")
        trust.pending = loss
        return first

    def _is_better_before(self, first: Evaluation, loss: float) -> bool:
        """Whether the step's batch had a much lower loss at the parameters before the last step, which stay if so."""
        assert self.trust is not None
        states = self._states()
        if not any("before" in state for _, state in states) or not self._are_as_left():
            return False
        now = [(p, p.detach().clone()) for p, _ in states]
        go_back(states)
        with self._unwatched():
            before = collectives.mean(first.again(), self._group, self.device)
        if math.isfinite(before) and self.trust.rises(loss, than=before):
            return True
        for p, value in now:
            p.copy_(value)
        return False

    def _distrust(self, event: str, why: str) -> None:
        assert self.trust is not None
        self.trust.cut(event, why)
        stop(self._states())
        self._renew()

    def _are_as_left(self) -> bool:
        """Whether nobody else changed the parameters since the last step: then they are what came of it."""
        return versions(list(self.names)[: len(self._left)]) == self._left

    def _begin(self, moves: list[Move]) -> bool:
        """Before the parameters move: the slope along the last step as it is now says whether that went too far.  False
        where it went so far that the parameters went back instead."""
        if (trust := self.trust) is None:
            return True
        trust.lost, pending, trust.pending = 0, trust.pending, None
        step = self.counters["steps"]
        params, states = [p for m in moves for p in m.params], [state for m in moves for state in m.states]
        now = foreach.joined(params)
        if trust.slope is not None and self._are_as_left():
            change = (trust.slope + self._slope(params, now)) / 2
            if trust.is_far_off(change):
                go_back(self._states())
                self._distrust(
                    "taken_back", f"step {step} raised the loss by about {change:.3g} instead of lowering it"
                )
                return False
            if trust.overshoots(change):
                self._distrust("overshot", f"the loss rose along the steps before step {step + 1}")
        if trust.slope is not None:
            trust.grow()
        if pending is not None:
            trust.note(pending)
        for m in moves:
            m.rate, m.loss_scale = trust.rate, trust.scale()
        self._last_step.begin(params, states, now)
        return True

    def _slope(self, params: list[Tensor], now: Tensor | None) -> float:
        """The slope along the last step, by the gradients that the step in the making found."""
        gradients, whole = self._gradients
        if list(map(id, map(_GRADIENT, params))) != list(map(id, gradients)):
            whole = None
        return self._last_step.slope(self._states, params, now, whole)

    def _end(self, moves: list[Move]) -> None:
        """After the parameters moved."""
        if self.trust is not None:
            params = [p for m in moves for p in m.params]
            self.trust.slope = self._slope(params, foreach.joined(params))
            self._gradients = [], None
            self._left = versions(list(self.names))

    def _lose(self) -> None:
        """A step was skipped; after a few in a row the parameters go back to those before the last one that was not."""
        if (trust := self.trust) is None:
            return
        trust.lost += 1
        if trust.lost >= LOST and self._states():
            trust.lost = 0
            go_back(self._states())
            self._distrust("taken_back", f"{LOST} losses or gradients in a row were NaN or infinite")

    def _skip(self, why: str) -> None:
        if self.counters["skipped"] == 0:
            warnings.warn(
                f"step {self.counters['steps'] + self.counters['skipped'] + 1} was skipped: {why}. Parameters and "
                "curvature are as before; further skipped steps are only counted, see diagnostics()['skipped'].",
                stacklevel=6,
            )
        self.counters["skipped"] += 1

    # --- state ---------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {}

    def _load(self, state: dict[str, Any]) -> None:
        """Take over what `_state` gave."""

    def state_dict(self) -> dict[str, Any]:
        """torch's, with options, curvature, counters and the generator's state under "paraboloid"; all of it
        in a parameter's state too, for `torch.distributed.checkpoint`, which keeps nothing else."""
        own = {"optimizer": type(self).__name__, "names": list(self.names.values()),
               "shapes": [list(p.shape) for p in self.names], "counters": dict(self.counters),
               "options": {name: getattr(self, name) for name in self.OPTIONS},
               "trust": None if self.trust is None else self.trust.state(),
               "generator": self.generator.get_state(), **self._state()}  # fmt: skip
        found = super().state_dict()
        at = next((i for i, p in enumerate(self.names) if p.requires_grad), 0)
        state = sealed(found["state"], own, at, len(self.names), collectives.rank(self._group))
        return {**found, "state": state, KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, with its options; raises ValueError for the state of another
        optimiser or model."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        state, own = opened(state_dict["state"], ids, collectives.rank(self._group))
        own = state_dict.get(KEY, own)
        if own is None or own["optimizer"] != type(self).__name__:
            found = "no such optimiser" if own is None else own["optimizer"]
            raise ValueError(f"the state is that of {found}; expected one of {type(self).__name__}.")
        if own["names"] != list(self.names.values()):
            raise ValueError(f"the state is that of a model with parameters {own['names']}; expected "
                             f"{list(self.names.values())}.")  # fmt: skip
        for (p, name), shape in zip(self.names.items(), own.get("shapes", [None] * len(self.names)), strict=True):
            if shape not in (None, list(p.shape)):
                raise ValueError(f"the state is that of a model whose parameter {name!r} has shape {tuple(shape)}; "
                                 f"expected {tuple(p.shape)}.")  # fmt: skip
        super().load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
        for p, values in self.state.items():  # torch shares them with the state that is loaded
            self.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        self._note_started()
        older = {k: v for k, v in self.OLDER.items() if k in self.OPTIONS and ("options" in own or _is_unsaid(self, k))}
        for name, value in {**older, **own.get("options", self._first_options())}.items():
            setattr(self, name, value)
        self._compose()
        if self.trust is not None and own.get("trust") is not None:
            self.trust.load(own["trust"])
        self.counters = dict(own["counters"])
        self.generator.set_state(own["generator"].cpu())
        rest = {k: v for k, v in own.items() if k not in FRAME}
        kinds = {torch.promote_types(p.dtype, torch.float32) for p in self.names}  # of a cast model, in its type

        def own_copy(t: Tensor) -> Tensor:
            dtype = next(iter(kinds)) if len(kinds) == 1 and t.is_floating_point() else t.dtype
            return t.detach().to(self.device, dtype, copy=True)

        self._load(trees.mapped(own_copy, rest))

    def _first_options(self) -> dict[str, Any]:
        """What the builds computed whose states say no options, where nobody chose otherwise."""
        return {}

    def __getstate__(self) -> Any:
        name = type(self).__name__
        raise TypeError(
            f"a {name} is bound to its model, which it watches, so it is neither copied nor pickled. Copy the model, "
            f"make a {name} of the copy, and give that load_state_dict(state_dict())."
        )

    def diagnostics(self) -> dict[str, Any]:
        """What happened so far: steps taken, skipped (NaN or infinite gradients) and rejected; and, under "trust", the
        rate that multiplies steps, what cut it last and how often (see `Trust`); None where it is off."""
        return {**self.counters, "trust": None if self.trust is None else self.trust.diagnostics()}


def _is_unsaid(opt: Frame, option: str) -> bool:
    """Whether nobody chose the option: then that of a state without options is the one of its time."""
    return option != "kl_clip" or getattr(opt, option) == AUTO


def distributed_group(model: nn.Module, all_reduce: Any) -> Any:
    """The process group over which curvature is summed."""
    if all_reduce != "auto":
        return collectives.group_of(all_reduce)
    wrapper = wrappers.distributed(model)
    return None if wrapper is None else wrapper.process_group


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more
