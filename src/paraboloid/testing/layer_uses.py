"""What a rule says of one call, row by row of its output, against autograd of the call itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from paraboloid.engine.per_sample import broadcast_axes
from paraboloid.layers import LOWERINGS, RULES, Use
from paraboloid.testing.cases import Case, first, named
from paraboloid.testing.comparison import check_equal

VECTORS = 2


def check_uses(case: Case) -> list[int]:
    """Check everything that a rule's uses claim; the axes of the output that may hold the samples.

    Where z_r is row r of the output (an index of the axes that all uses of a weight call rows), the vectors v of

        sum_{g,t} left[v, r, g, t, p] right[r, g, t, q]      must be      d (v_r . z_r) / d weight.
    """
    tensors = case.arguments()
    z, uses = _called(case, tensors)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(VECTORS, *z.shape, generator=generator, dtype=torch.float64)
    common = set(range(z.dim()))
    for slot, root in case.roots.items():
        label = f"{case.name}: `{case.labels[slot]}`"
        mine = [u for u in uses if u.weight is tensors[slot]]
        if not mine:
            raise AssertionError(f"{label} requires grad, but the rule yields no Use of it (it falls back for these "
                                 f"arguments); expected one. It yields {len(uses)} of others.")  # fmt: skip
        for u in mine:
            _check_form(u, z, label)
            _check_input(u, case, tensors, label)
        axes = sorted(set.intersection(*({*_rows(u, z, root)} for u in mine)))
        common &= set(axes)
        found = torch.stack([_jacobians(u, v, z, root, axes, label) for u in mine]).sum(0)
        check_equal(found, _truth(z, root, v, axes), f"{label}: left times right {_axes(axes)}")
        _check_affine(mine, case, slot, label)
    return sorted(common)


def check_lowering(case: Case) -> list[int]:
    """Check that a lowering computes what its operation does; the axes of the output that may hold the samples."""
    found, expected = case.call(case.arguments(), LOWERINGS[case.op]), case.call(case.arguments())
    if found is NotImplemented:
        raise AssertionError(f"{case.name}: the lowering returns NotImplemented for these arguments: they fall back.")
    one, other = ([t] if isinstance(t, Tensor) else list(t) for t in (found, expected))
    if len(one) != len(other):
        raise AssertionError(f"{case.name}: the lowering gives {len(one)} tensors; expected {len(other)}.")
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        check_equal(a, b, f"{case.name}: output {i} of the lowering", named(case.op))
    return [axis for axis in range(other[0].dim()) if case.axes_along(axis)]


def _called(case: Case, tensors: list[Tensor]) -> tuple[Tensor, list[Use]]:
    """The output, and what the rule says of the arguments as torch hands them on."""
    with _Seen() as seen:
        z = first(case.call(tensors))
    found = [(args, kwargs) for op, args, kwargs in seen.calls if RULES.get(op) is RULES[case.op]]  # x + y is add(x, y)
    if not found:
        raise AssertionError(f"{case.name}: torch hands on {[named(op) for op, _, _ in seen.calls]} of this call, not "
                             f"{named(case.op)}; expected a rule for what is handed on.")  # fmt: skip
    return z, _uses(case, tensors, *found[0])


class _Seen(TorchFunctionMode):
    """The operations inside, as a recorder sees them."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _uses(case: Case, tensors: list[Tensor], args: tuple, kwargs: dict) -> list[Use]:
    try:
        uses = list(RULES[case.op](*args, **kwargs))
    except TypeError as e:
        raise AssertionError(f"{case.name}: the rule does not take the arguments of the operation ({e}); expected a "
                             f"function of {len(args)} arguments and the keywords {list(kwargs)}, as torch hands "
                             "them on.") from e  # fmt: skip
    known = {id(t) for t in tensors}
    for i, u in enumerate(uses):
        if not isinstance(u, Use):
            raise AssertionError(f"{case.name}: the rule yields a {type(u).__name__}; expected a Use.")
        if u.weight is not None and isinstance(u.weight, Tensor) and id(u.weight) not in known:
            raise AssertionError(f"{case.name}: the weight of Use {i}, {list(u.weight.shape)}, is not an argument of "
                                 "the call; expected the argument itself, not something made of it.")  # fmt: skip
    return uses


def _check_form(u: Use, z: Tensor, label: str) -> None:
    """The shapes, and that `arrange` and `right` do nothing but what they may."""
    flat = torch.arange(1, z.numel() + 1).view(1, *z.shape)
    left = u.pull(torch.ones(VECTORS, *z.shape, dtype=torch.float64))
    if u.left is None and not torch.isin(u.arranged(flat), F.pad(flat.flatten(), (1, 0))).all():
        raise AssertionError(f"{label}: `arrange` changes numbers; expected views, copies and zeros only, and what is "
                             "multiplied in `factor`.")  # fmt: skip
    if u.rows is None:
        expected = (VECTORS, *(z.shape if u.shape is None else u.shape))
        if left.shape != expected:
            raise AssertionError(f"{label}: factor * arrange(g) has shape {list(left.shape)}; expected "
                                 f"{list(expected)}, that of g (or [V, *shape] with `shape`).")  # fmt: skip
        return
    R = math.prod(z.shape[i] for i in u.rows)
    lead = f"[V = {VECTORS}, R = {R} rows, G = {u.groups}, T, p]"
    if left.dim() != 5 or left.shape[:3] != (VECTORS, R, u.groups):
        raise AssertionError(f"{label}: factor * arrange(g) has shape {list(left.shape)}; expected {lead}.")
    if u.right is None:
        return
    right, T = dense_right(u, slice(None)), left.shape[3]
    if right.shape != (R, u.groups, T, u.q):
        raise AssertionError(f"{label}: right has shape {list(right.shape)}; expected [R = {R}, G = {u.groups}, "
                             f"T = {T}, q = {u.q}].")  # fmt: skip
    for n in (0, R - 1):
        check_equal(dense_right(u, slice(n, n + 1)), right[n : n + 1], f"{label}: right(slice({n}, {n + 1}))",
                    "the same rows of right(slice(None))")  # fmt: skip


def dense_right(u: Use, rows: slice) -> Tensor:
    """The input side as numbers, [R G T q]; a lookup as zeros and ones."""
    assert u.right is not None
    right = u.right(rows)
    if u.lookup:
        return F.one_hot(right.flatten(2) + 1, u.q + 1)[..., 1:].double()
    if u.q_axes is not None:
        right = right.flatten(2 + u.q_axes).flatten(2, 1 + u.q_axes).mT
    return right.detach().double()


def _rows(u: Use, z: Tensor, root: Tensor) -> Sequence[int]:
    """The axes of z that a use keeps apart."""
    if u.rows is not None:
        return u.rows
    shape = z.shape if u.shape is None else u.shape
    return [i for i in broadcast_axes(shape, root.shape) if i < z.dim() and shape[i] == z.shape[i]]


def _jacobians(u: Use, v: Tensor, z: Tensor, root: Tensor, axes: Sequence[int], label: str) -> Tensor:
    """left times right, [V, *sizes of the axes, *shape]; other rows are summed over."""
    left = u.pull(v)
    if u.rows is None:
        shape = left.shape[1:]
        rows, kept = broadcast_axes(shape, root.shape), root.shape
        J = left.movedim([1 + i for i in rows], list(range(1, 1 + len(rows)))).reshape(
            len(v), *(shape[i] for i in rows), *kept
        )
    else:
        rows = u.rows
        J = left.sum(3).unsqueeze(-1) if u.right is None else torch.einsum(
            "vrgtp,rgtq->vrgpq", left, dense_right(u, slice(None))
        )  # fmt: skip
        J = J.mT if u.flip else J
        if J[0, 0].numel() != root.numel():
            raise AssertionError(f"{label}: left times right has {J[0, 0].numel()} entries for each row; expected "
                                 f"those of the weight {list(root.shape)}.")  # fmt: skip
        J = J.reshape(len(v), *(z.shape[i] for i in rows), *root.shape)
    summed = [1 + at for at, i in enumerate(rows) if i not in axes]
    J = J.sum(summed) if summed else J
    kept = [i for i in rows if i in axes]
    return J.movedim([1 + kept.index(i) for i in axes], list(range(1, 1 + len(axes)))) if axes else J


def _truth(z: Tensor, root: Tensor, v: Tensor, axes: Sequence[int]) -> Tensor:
    sizes = [z.shape[i] for i in axes]
    truth = torch.zeros(len(v), *sizes, *root.shape, dtype=torch.float64)
    for index in product(*map(range, sizes)):
        mask = torch.zeros(z.shape, dtype=torch.float64)
        where: list[Any] = [slice(None)] * z.dim()
        for axis, i in zip(axes, index, strict=True):
            where[axis] = i
        mask[tuple(where)] = 1
        for k, u in enumerate(v):
            (g,) = torch.autograd.grad(z, root, u * mask, retain_graph=True, allow_unused=True)
            if g is not None:
                truth[(k, *index)] = g
    return truth


def _check_affine(uses: list[Use], case: Case, slot: int, label: str) -> None:
    if all(u.affine or (u.affine is None and u.is_constant) for u in uses):
        found = _second_derivative(case, slot)
        if found is not None:
            raise AssertionError(f"{label}: the rule takes the operation as affine in it, but its second derivative is "
                                 f"{found[1]:.4g} at entry {found[0]}; expected affine=False.")  # fmt: skip


def _check_input(u: Use, case: Case, tensors: list[Tensor], label: str) -> None:
    """That `right` is made of elements of `input`, in which z is affine."""
    if u.input is None or u.right is None:
        return
    slots = [i for i, t in enumerate(tensors) if t is u.input]
    if not slots:
        raise AssertionError(f"{label}: `input` {list(u.input.shape)} is not an argument of the call; expected the "
                             "argument itself, or None.")  # fmt: skip
    right = dense_right(u, slice(None))
    odd = right[(right != 0) & ~torch.isin(right, u.input.detach().double())]
    found = _second_derivative(case, slots[0])
    if len(odd) or found is not None:
        what = f"right has the entry {float(odd[0]):.4g}, which it has not" if len(odd) else (
            f"the second derivative of the output in it is {found[1]:.4g} at entry {found[0]}" if found else ""
        )  # fmt: skip
        raise AssertionError(f"{label}: `input` is `{case.labels[slots[0]]}`, but {what}; expected that right only "
                             "re-indexes the input and that the output depends on it through the weight alone. Leave "
                             "`input` out.")  # fmt: skip


def _second_derivative(case: Case, slot: int) -> tuple[list[int], float] | None:
    """The largest entry of u -> d^2 (v . z) / dx^2 u for random u and v, and its place; None where it is zero."""
    tensors = case.arguments()
    if slot not in case.weights:
        tensors[slot] = tensors[slot].requires_grad_()
    z = first(case.call(tensors))
    v, u = (torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=z.dtype) for t in (z, tensors[slot]))
    (g,) = torch.autograd.grad(z, tensors[slot], v, create_graph=True)
    if not g.requires_grad:
        return None
    try:
        (second,) = torch.autograd.grad(g, tensors[slot], u, allow_unused=True)
    except RuntimeError:  # torch has none for the operation
        return None
    if second is None or second.abs().max() <= 1e-10 * (1 + g.detach().abs().max()):
        return None
    at = tuple(int(i) for i in torch.unravel_index(second.abs().argmax(), second.shape))
    return list(at), float(second[at])


def _axes(axes: Sequence[int]) -> str:
    """How the entries of what is compared are counted."""
    return f"[{', '.join(['vector', *(f'axis {i} of the output' for i in axes), '*shape'])}]"
