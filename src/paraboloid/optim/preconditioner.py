"""One parameter's curvature while training: running averages of its factors, and the inverse that is in use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Eigenform, NullSpaces, evened
from paraboloid.linalg.kronecker import Kron, Side
from paraboloid.linalg.operand import LinAlgError

KEPT = ("kron", "other", "form", "inverse", "metric")  # of a block's state
T = TypeVar("T", Kron, Eigenform)


class Block:
    """Running averages of a parameter's `Kron`, and the damped inverse made from them now and then.

    The first measurement counts in full; the t-th with weight max(1/t, 1 - decay), so early averages are plain means.
    """

    def __init__(self, name: str):
        self.name = name
        self.kron: Kron | None = None  # the average
        self.other: Kron | None = None  # that of the data which only measures eigenvalues, if there is such
        self.updates: dict[str, int] = {}
        self.form: Eigenform | None = None  # eigenbasis, with the eigenvalues in use; EKFAC's are averages of their own
        self.null: NullSpaces = None, None  # columns of the basis that the factors did not see
        self.inverse: Any = None  # a Kron (its two factors inverted) or an Eigenform
        self.metric: Kron | None = None  # what the next measurements are weighted by, see `weigh`
        self.damping = 0.0  # that of the inverse
        self.failures = 0

    # --- measurements --------------------------------------------------------------------------------------------

    def weight(self, what: str, decay: float) -> float:
        """The weight of the next measurement of `what` in its average."""
        self.updates[what] = t = self.updates.get(what, 0) + 1
        return max(1 / t, 1 - decay)

    def average(self, found: Kron, decay: float, other: bool = False) -> None:
        """One more measurement of the factors."""
        what = "other" if other else "kron"
        before: Kron | None = getattr(self, what)
        has = found.sides[0].data.dtype
        dtype = torch.promote_types(has, torch.float32) if before is None else before.sides[0].data.dtype
        found = found if has == dtype else found.to(dtype)
        w = self.weight(what, decay)
        if before is None or w == 1:
            setattr(self, what, found)
        else:
            (left, right), new = before.sides, found.sides
            setattr(self, what, Kron(left.mixed(new[0], w), right.mixed(new[1], w)))

    def average_values(self, values: Tensor, decay: float, other: bool = False) -> None:
        """One more measurement of EKFAC's eigenvalues in the present basis; other: on data that has not chosen it."""
        assert self.form is not None
        values = evened(values, self.null) if other else values
        values, w = values.to(self.form.values.dtype), self.weight("values", decay)
        self.form = replace(self.form, values=self.form.values.lerp(values, w))

    # --- inverses ------------------------------------------------------------------------------------------------

    def decompose(self, carried: bool) -> bool:
        """A new eigenbasis from the averages, with the Kronecker eigenvalues (of the other data's average if there is
        one) or, if `carried`, with the present eigenvalues carried over.  False, with a warning, where that fails."""
        assert self.kron is not None
        try:
            form = _in_double(Kron.eigenform, self.kron, f"parameter {self.name!r}")
        except LinAlgError as failure:
            return self._failed(failure)
        form = form.completed()  # what few rows leave out is measured too, along any complement
        self.null = form.null_spaces()
        if carried and self.form is not None:
            form = self.form.carried(form)
        elif self.other is not None:
            form = self.other.along(form)
        self.form = form
        return True

    def invert(self, damping: float, split: bool) -> None:
        """(block + damping I)^-1 from the eigenbasis, or (`split`) from two Cholesky factorisations."""
        assert self.kron is not None
        if split:
            try:
                self.inverse = _in_double(_split, self.kron, damping, self.name)
            except (LinAlgError, ValueError) as failure:
                self._failed(failure)
                return
        elif self.form is not None:
            values = self.form.values.clamp(min=0)
            least = torch.finfo(values.dtype).eps * float(values.max())  # as much as rounding leaves of the largest
            self.inverse = replace(self.form, values=1 / (values + damping).clamp(min=least))
        self.damping = damping

    def weigh(self, damping: float) -> None:
        """The damped inverses of the two factors, each divided by the trace of its product with its factor: an average
        vector of the present factor weighs one.  The last ones stay where that fails; none where a factor is zero."""
        assert self.kron is not None
        try:
            inverse = self.inverse
            if not isinstance(inverse, Kron):
                inverse = _in_double(lambda kron: kron.split_inverse(damping, f"parameter {self.name!r}"), self.kron)
        except (LinAlgError, ValueError) as failure:
            self._failed(failure)
            return
        pairs = list(zip(inverse.sides, self.kron.sides, strict=True))
        traces = [_trace_of_product(one, factor) for one, factor in pairs]
        safe = all(bool((t.isfinite() & (t > 0)).all()) for t in traces)
        left, right = (one.scaled(1 / t) for (one, _), t in zip(pairs, traces, strict=True))
        self.metric = Kron(left, right) if safe else None

    def _failed(self, failure: Exception) -> bool:
        if self.failures == 0:
            kept = "The last good inverse is kept" if self.inverse is not None else "Its plain gradient is used"
            warnings.warn(
                f"parameter {self.name!r}: its curvature could not be inverted, in float64 neither ({failure}) {kept}, "
                "and this is tried again at the next update. Increase damping if it goes on.", stacklevel=6,
            )  # fmt: skip
        self.failures += 1
        return False

    def apply(self, g: Tensor) -> Tensor:
        """inverse @ g; g itself as long as there is no inverse."""
        if self.inverse is None:
            return g
        return self.inverse.applied(g)

    def quadratic(self, d: Tensor) -> Tensor:
        """d . (block d), undamped."""
        assert self.kron is not None
        block = self.form or self.kron
        return (d * block.applied(d)).sum()

    @property
    def structure(self) -> str:
        """What is kept: "kronecker", "dense" (a bias) or "diagonal"."""
        if self.kron is None:
            return "none"
        left, right = self.kron.sides
        if right.size > 1:
            return "kronecker"
        return "diagonal" if left.kind == "diagonal" else "dense"

    def trace(self) -> float:
        return 0.0 if self.kron is None else float(self.kron.trace())

    # --- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As plain tensors and numbers, which torch.load(weights_only=True) takes."""
        kept = {what: getattr(self, what) for what in KEPT}
        return {what: None if t is None else t.state() for what, t in kept.items()} | {
            "updates": dict(self.updates), "damping": self.damping, "failures": self.failures, "null": list(self.null),
        }  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for what in KEPT:
            setattr(self, what, _restored(state.get(what)))  # an earlier version has fewer
        left, right = state.get("null", (None, None))  # of an earlier version
        self.null = left, right
        self.updates, self.damping, self.failures = dict(state["updates"]), state["damping"], state["failures"]


def _in_double(of: Callable[..., T], kron: Kron, *args: Any) -> T:
    """of(kron, *args) in the factors' own precision, or in float64 where that fails."""
    try:
        return of(kron, *args)
    except (LinAlgError, ValueError):
        if kron.dtype == torch.float64:
            raise
        return of(kron.to(torch.float64), *args).to(kron.dtype)


def _split(kron: Kron, damping: float, name: str) -> Kron:
    """Two inverses; a block with one factor only is damped exactly."""
    first, second = kron.sides
    if second.data.shape[-1] > 1 or kron.groups > 1 or first.kind == "rows":
        return kron.split_inverse(damping, f"parameter {name!r}")
    left = first.data[0] * second.data.reshape(())
    if left.dim() == 1:
        return Kron(1 / (left + damping), torch.ones_like(kron.right))
    left.diagonal().add_(damping)
    L, info = torch.linalg.cholesky_ex(left)
    if info.item() != 0 or not L.isfinite().all():
        raise LinAlgError(
            f"the block, {list(left.shape)}, plus the damping {damping:.3g} has no Cholesky factorisation."
        )
    return Kron(torch.cholesky_inverse(L), torch.ones_like(kron.right))


def _trace_of_product(a: Side, b: Side) -> Tensor:
    """[G]."""
    if "diagonal" in (a.kind, b.kind):
        return (a.diagonal() * b.diagonal()).sum(1)
    return (a.dense() * b.dense()).sum((1, 2))


def _restored(state: Any) -> Kron | Eigenform | None:
    """What `state` of a `Kron` or an `Eigenform` made, or an earlier version of this file."""
    if isinstance(state, list):
        return Kron.of_state(state)
    if state is None:
        return None
    if "groups" in state:
        return Kron(state["left"], state["right"], state["groups"])
    if "sizes" in state:
        state = state | {k: (state[k], size) for k, size in zip(("left", "right"), state["sizes"], strict=True)}
    return Eigenform.of_state(state)
