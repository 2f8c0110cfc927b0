"""One parameter's curvature while training: running averages of its factors, and the inverse that is in use."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis, Eigenform
from paraboloid.linalg.kron import Kron
from paraboloid.linalg.operand import LinAlgError
from paraboloid.operators.structured.kfac import measured


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
        self.inverse: Any = None  # a Kron (its two factors inverted) or an Eigenform
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
        dtype = torch.promote_types(found.left.dtype, torch.float32)
        found = Kron(found.left.to(dtype), found.right.to(dtype), found.groups)
        before: Kron | None = getattr(self, what)
        w = self.weight(what, decay)
        if before is None or w == 1:
            setattr(self, what, found)
        else:
            before.left.lerp_(found.left, w)
            before.right.lerp_(found.right, w)

    def average_values(self, values: Tensor, decay: float) -> None:
        """One more measurement of EKFAC's eigenvalues in the present basis."""
        assert self.form is not None
        values, w = values.to(self.form.values.dtype), self.weight("values", decay)
        self.form = Eigenform(self.form.left, self.form.right, self.form.values.lerp(values, w), self.form.rest)

    # --- inverses ------------------------------------------------------------------------------------------------

    def decompose(self, carried: bool) -> bool:
        """A new eigenbasis from the averages, with the Kronecker eigenvalues (of the other data's average if there is
        one) or, if `carried`, with the present eigenvalues carried over.  False, with a warning, where that fails."""
        assert self.kron is not None
        try:
            form = _eigenform(self.kron, self.name)
        except LinAlgError as failure:
            return self._failed(failure)
        if carried and self.form is not None:
            form = Eigenform(form.left, form.right, _carried(self.form, form), form.rest)
        elif self.other is not None:
            form = measured(form, self.other.block)
        self.form = form
        return True

    def invert(self, damping: float, split: bool) -> None:
        """(block + damping I)^-1 from the eigenbasis, or (`split`) from two Cholesky factorisations."""
        assert self.kron is not None
        if split:
            try:
                self.inverse = _split_inverse(self.kron, damping, self.name)
            except (LinAlgError, ValueError) as failure:
                self._failed(failure)
                return
        elif self.form is not None:
            values = self.form.values.clamp(min=0)
            least = torch.finfo(values.dtype).eps * values.max()  # as much as rounding leaves of the largest
            self.inverse = Eigenform(self.form.left, self.form.right, 1 / (values + damping).clamp(min=least.item()),
                                     self.form.rest)  # fmt: skip
        self.damping = damping

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
        if isinstance(self.inverse, Kron):
            return _times(self.inverse, g)
        return _filtered(self.inverse, g)

    def quadratic(self, d: Tensor) -> Tensor:
        """d . (block d), undamped."""
        assert self.kron is not None
        return (d * (self.form @ d if self.form is not None else _times(self.kron, d))).sum()

    @property
    def structure(self) -> str:
        """What is kept: "kronecker", "dense" (a bias) or "diagonal"."""
        if self.kron is None:
            return "none"
        if self.kron.right.numel() > 1:
            return "kronecker"
        return "dense" if self.kron.left.dim() == 2 else "diagonal"

    def trace(self) -> float:
        return 0.0 if self.kron is None else float(self.kron.trace())

    # --- state ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """As plain tensors and numbers, which torch.load(weights_only=True) takes."""
        return {"kron": _plain(self.kron), "other": _plain(self.other), "form": _plain(self.form),
                "inverse": _plain(self.inverse), "updates": dict(self.updates), "damping": self.damping,
                "failures": self.failures}  # fmt: skip

    def load(self, state: dict[str, Any]) -> None:
        for what in ("kron", "other", "form", "inverse"):
            setattr(self, what, _restored(state[what]))
        self.updates, self.damping, self.failures = dict(state["updates"]), state["damping"], state["failures"]


def _times(kron: Kron, g: Tensor) -> Tensor:
    """(left (x) right) g, in the order that the shapes ask for."""
    left, right = kron.left, kron.right
    if kron.groups > 1:
        return (kron.block @ g.to(left.dtype)).to(g.dtype)
    G = g.to(left.dtype).reshape(left.shape[0], right.shape[0])
    if right.numel() > 1:
        G = G @ right if right.dim() == 2 else G * right
    else:
        G = G * right.reshape(())
    G = left @ G if left.dim() == 2 else left.unsqueeze(1) * G
    return G.view(g.shape).to(g.dtype)


def _filtered(form: Eigenform, g: Tensor) -> Tensor:
    """form @ g; for one group, which all but grouped convolutions have, without the bookkeeping of `Eigenform`."""
    values = form.values
    if len(values) > 1 or not form.full:
        return (form @ g.to(values.dtype)).to(g.dtype)
    U, W = form.left.vectors, form.right.vectors
    c = g.to(values.dtype).view(form.left.size, form.right.size)
    if form.right.size == 1:
        W = None  # one vector of length one: its sign is there twice
    c = c if U is None else U[0].T @ c
    c = (c if W is None else c @ W[0]) * values[0]
    c = c if W is None else c @ W[0].T
    c = c if U is None else U[0] @ c
    return c.view(g.shape).to(g.dtype)


def _eigenform(kron: Kron, name: str) -> Eigenform:
    """In the factors' own precision, or in float64 where that fails."""
    try:
        return kron.eigenform(f"parameter {name!r}")
    except LinAlgError:
        dtype = kron.left.dtype
        if dtype == torch.float64:
            raise
        return _doubled(kron).eigenform(f"parameter {name!r}").to(dtype)


def _split_inverse(kron: Kron, damping: float, name: str) -> Kron:
    """Two inverses; a block with one factor only is damped exactly."""
    try:
        return _split(kron, damping, name)
    except (LinAlgError, ValueError):
        if kron.left.dtype == torch.float64:
            raise
        inverse = _split(_doubled(kron), damping, name)
        return Kron(inverse.left.to(kron.left.dtype), inverse.right.to(kron.left.dtype), kron.groups)


def _split(kron: Kron, damping: float, name: str) -> Kron:
    if kron.right.numel() > 1 or kron.groups > 1:
        inverse = kron.inverse(damping, split="pi", name=f"parameter {name!r}")
        assert isinstance(inverse, Kron)
        return inverse
    left = kron.left * kron.right.reshape(())
    if left.dim() == 1:
        return Kron(1 / (left + damping), torch.ones_like(kron.right))
    left.diagonal().add_(damping)
    L, info = torch.linalg.cholesky_ex(left)
    if info.item() != 0 or not L.isfinite().all():
        raise LinAlgError(
            f"the block, {list(left.shape)}, plus the damping {damping:.3g} has no Cholesky factorisation."
        )
    return Kron(torch.cholesky_inverse(L), torch.ones_like(kron.right))


def _doubled(kron: Kron) -> Kron:
    return Kron(kron.left.double(), kron.right.double(), kron.groups)


def _carried(old: Eigenform, new: Eigenform) -> Tensor:
    """The diagonal, in the new basis, of the matrix that is diagonal in the old one."""
    values = old.values
    left, right = _overlap(new.left, old.left), _overlap(new.right, old.right)
    values = values if left is None else left @ values
    return values if right is None else values @ right.mT


def _overlap(new: Basis, old: Basis) -> Tensor | None:
    """(u_i . v_j)^2, [G, r, r]; None where both are the unit vectors."""
    if new.vectors is None or old.vectors is None:
        return None
    return (new.vectors.mT @ old.vectors).square()


def _plain(thing: Kron | Eigenform | None) -> dict[str, Any] | None:
    if thing is None:
        return None
    if isinstance(thing, Kron):
        return {"left": thing.left, "right": thing.right, "groups": thing.groups}
    return {"left": thing.left.vectors, "right": thing.right.vectors, "sizes": [thing.left.size, thing.right.size],
            "values": thing.values, "rest": thing.rest}  # fmt: skip


def _restored(state: dict[str, Any] | None) -> Kron | Eigenform | None:
    if state is None:
        return None
    if "groups" in state:
        return Kron(state["left"], state["right"], state["groups"])
    left, right = (Basis(state[k], size) for k, size in zip(("left", "right"), state["sizes"], strict=True))
    return Eigenform(left, right, state["values"], state["rest"])
