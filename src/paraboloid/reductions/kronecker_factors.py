"""Kronecker factors of a parameter's block, summed while the vectors come in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.kronecker import Kron, Side
from paraboloid.linalg.operand import check_count
from paraboloid.passes.memory import FACTORS, pooled
from paraboloid.reductions.outer import Outer, Zero
from paraboloid.reductions.products import Lookup, Products
from paraboloid.reductions.sums import Recent, reduce

LARGE = 256  # rows from which halving by symmetry pays
EXACT_VECTOR = 4096  # elements up to which a bias-like parameter's block is kept exactly
MAX_FACTOR = 5000  # rows up to which a factor is a matrix, by default


@dataclass(frozen=True)
class Kept:
    """How factors are kept.

    sharing     "expand" or "reduce", for weights used at several positions
    thin        factors of few rows by these
    max_factor  a side with more rows is its diagonal
    """

    sharing: str = "expand"
    thin: bool = False
    max_factor: int = MAX_FACTOR


DEFAULT = Kept()


def gradient_factor(o: Products, kept: Kept = DEFAULT) -> Tensor | Side:
    """sum over v, n (and t) of left left^T, [G p p], or its diagonal [G p]; `thin`: by its rows if these are fewer."""
    left = o.left.sum(3, keepdim=True) if kept.sharing == "reduce" else o.left
    positions, rows = left.shape[3:]
    if rows > kept.max_factor:
        return left.square().sum((0, 1, 3))
    if kept.thin and left[:, :, 0, :, 0].numel() < rows:
        return Side("rows", left.permute(2, 0, 1, 3, 4).flatten(1, 3))
    if positions >= rows:  # images: a product for each sample, without a copy
        left = left.mT.flatten(0, 1)
        return (left @ left.mT).sum(0)
    return gram(left.permute(2, 0, 1, 3, 4).flatten(1, 3).mT)  # [G p VNT], for one group a view


def input_factor(o: Products, kept: Kept = DEFAULT, memory: int | None = None) -> Tensor | Side:
    """sum over n (and t) of right right^T, [G q q], or its diagonal [G q], as that of a lookup; `thin`: as above."""
    reduced = kept.sharing == "reduce"
    if isinstance(o, Lookup) and not reduced:
        return o.counts()[None]
    if o.alike:
        return _of_one(o, kept, memory)
    N, G, T = o.left.shape[1:4]
    if o.q > kept.max_factor:
        squares = o.left.new_zeros(G, o.q)
        for n in o.chunks(G * T * o.q, memory, FACTORS):
            part = o.mean_inputs(n).movedim(0, 2) if reduced else o.columns(n)  # [G q n]
            squares += part.square().sum(2)
        return squares
    if kept.thin and not isinstance(o, Lookup) and N * (1 if reduced else T) < o.q:
        right = o.mean_inputs().unsqueeze(2) if reduced else o.inputs()
        return Side("rows", right.transpose(0, 1).flatten(1, 2).detach())  # it may be the layer's input itself
    ranges = o.chunks(G * T * o.q, memory, FACTORS, least=4 * G * o.q**2 * o.left.element_size())
    if len(ranges) == 1:
        return gram(o.mean_inputs().movedim(0, 2) if reduced else o.columns())
    A = pooled((G, o.q, o.q), o.left)
    for n in ranges:
        add_gram(A, o.mean_inputs(n).movedim(0, 2) if reduced else o.columns(n), n.start > 0)  # [G q n]
    return mirror(A)


def _of_one(o: Products, kept: Kept, memory: int | None) -> Tensor | Side:
    """N times that of the inputs that all samples have; computed once for all pieces of them."""
    known = {} if o.right.one is None else o.right.one.factors
    if kept not in known:
        known[kept] = input_factor(o.first, kept, memory)
    found, N = known[kept], o.left.shape[1]
    return Side("rows", found.data * N**0.5) if isinstance(found, Side) else found * N


def gram(R: Tensor) -> Tensor:
    """R R^T, [G q q], for R [G q K]."""
    A = pooled((*R.shape[:2], R.shape[1]), R)
    if R.shape[1] < LARGE:
        return A.baddbmm_(R, R.mT, beta=0)
    add_gram(A, R, add=False)
    return mirror(A)


def add_gram(A: Tensor, R: Tensor, add: bool) -> None:
    """A += R R^T (A = R R^T if not `add`) in the lower blocks: by symmetry half of the products (torch has no SYRK)."""
    q = R.shape[-2]
    if q < LARGE:
        A.baddbmm_(R, R.mT, beta=int(add))
        return
    half = q // 2
    add_gram(A[:, :half, :half], R[:, :half], add)
    add_gram(A[:, half:, half:], R[:, half:], add)
    A[:, half:, :half].baddbmm_(R[:, half:], R[:, :half].mT, beta=int(add))


def mirror(A: Tensor) -> Tensor:
    """Fill the upper blocks that `add_gram` leaves out."""
    q = A.shape[-1]
    if q >= LARGE:
        half = q // 2
        A[:, :half, half:] = A[:, half:, :half].mT
        mirror(A[:, :half, :half])
        mirror(A[:, half:, half:])
    return A


def _count(n: int) -> Tensor:
    """A tensor, so that it is summed with the others over ranks."""
    return torch.tensor(n, dtype=torch.float64, device="cpu")


@dataclass
class Factors:
    """Sums of one parameter's Kronecker factors while vectors come in, rows first, as the parameter is stored.

    Each of `rows` and `columns` is {"gradient": sum, "input": sum} over those uses whose gradients (inputs) run along
    it; the gradient's sums grow with every group of vectors, the input's are taken once.  `exact` is the whole block of
    a bias-like parameter instead: a matrix [1 p p], or a diagonal [1 p] beyond 4096 elements; and the diagonal [1 D] of
    one without such structure.  `diagonal` says why a parameter has less than it could.
    """

    rows: dict[str, Any]
    columns: dict[str, Any]
    positions: Tensor  # [], float64, on the CPU
    groups: int
    exact: Any = None
    diagonal: str = ""


def add_factors(
    value: Factors | None, o: Outer, kept: Kept = DEFAULT, memory: int | None = None, recent: Recent | None = None
) -> Factors:
    """One more group of vectors for the Kronecker factors of one parameter.

    A weight whose outer products live on a derived tensor or came from a fallback, or whose uses have blocks of
    different shapes, has no such factors: the diagonal of its block is summed instead.  `recent` is carried from
    parameter to parameter of one group of vectors.
    """
    if o.bias_like:
        block = _block(o, memory, kept, recent)
        p = o.shape.numel()
        return _whole(value, block, longer(kept, p) if p <= EXACT_VECTOR else "")
    if isinstance(o, Zero):
        return _zero_factors(o, kept)
    products, blocks = o.products, set[tuple[int, ...]]()
    for use in products:
        G, p, q = use.block
        blocks.add((G, q, p) if use.flip else (G, p, q))
    if len(blocks) != 1:
        squares = reduce(o, {"squares"}, memory)["squares"].reshape(1, -1)
        return _whole(value, squares, _unstructured(blocks))
    first = value is None
    if value is None:
        positions = sum([use.left.shape[1] if kept.sharing == "reduce" else use.positions for use in products])
        value = Factors({}, {}, _count(positions), o.left.shape[2])
    for use in products:
        gradients, inputs = (value.columns, value.rows) if use.flip else (value.rows, value.columns)
        part = gradient_factor(use, kept)
        if recent is not None and isinstance(part, Tensor) and part.dim() == 3 and use.left.shape[2:4] == (1, 1):
            recent.factor = use.left, part
        _increase(gradients, "gradient", part)
        if first:
            _increase(inputs, "input", input_factor(use, kept, memory))
            lookup = isinstance(use, Lookup) and kept.sharing == "expand"
            if (longest := max(use.left.shape[4], 0 if lookup else use.q)) > kept.max_factor:
                value.diagonal = value.diagonal or longer(kept, longest)
    return value


def _whole(value: Factors | None, block: Tensor | Side, why: str) -> Factors:
    before = None if value is None else value.exact
    return Factors({}, {}, _count(0), 1, block if before is None else _plus(before, block), why)


def check_max_factor(max_factor: int) -> int:
    """A number of rows; raises ValueError below 1."""
    return check_count("max_factor", max_factor)


def longer(kept: Kept, *sides: int) -> str:
    limit = kept.max_factor
    if max(sides) <= limit:
        return ""
    return f"a side of {max(sides)} rows, longer than max_factor={limit}: its diagonal is kept"


def _unstructured(blocks: set[tuple[int, ...]]) -> str:
    why = (
        f"no Kronecker factors, being used with blocks of different shapes (groups, rows, columns) {sorted(blocks)}"
        if blocks else "no Kronecker factors, entering the layer through another tensor (weight_norm, a product, "
        "columns) or through an operation without a rule"
    )  # fmt: skip
    return f"{why}: the diagonal of its block is kept, exact in every entry"


def say_what_is_diagonal(values: Mapping[str, Factors]) -> None:
    """Warn, once for all parameters, of diagonals in the place of factors, or of blocks."""
    why: dict[str, list[str]] = {}
    for name, value in values.items():
        if value.diagonal:
            why.setdefault(value.diagonal, []).append(name)
    if why:
        warnings.warn("; ".join(f"{_some(names)} {reason}" for reason, names in why.items()) + ".", stacklevel=4)


def _some(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    who = ", ".join(map(repr, names[:most])) + more
    return f"parameter {who} has" if len(names) == 1 else f"parameters {who} have"


def merged(value: Factors | None, other: Factors) -> Factors:
    """The sums of two batches."""
    if value is None or (not value.positions and value.exact is None):  # without influence there
        return other
    if not other.positions and other.exact is None:
        return value
    if (value.exact is None) != (other.exact is None):
        raise ValueError(f"a parameter has Kronecker factors in some batches only, in others "
                         f"{value.diagonal or other.diagonal}. Ask for 'diag_ggn', or for batches alike.")  # fmt: skip
    if other.exact is not None:
        return replace(value, exact=_plus(value.exact, other.exact))
    for mine, theirs in ((value.rows, other.rows), (value.columns, other.columns)):
        for key, part in theirs.items():
            _increase(mine, key, part)
    return replace(value, positions=value.positions + other.positions)


def _increase(sums: dict[str, Any], key: str, part: Tensor | Side) -> None:
    sums[key] = _plus(sums[key], part) if key in sums else part


def _plus(x: Tensor | Side, y: Tensor | Side) -> Tensor | Side:
    """[G p p] + [G p p], where one may be a diagonal [G p], or known by its rows."""
    if isinstance(x, Side) and isinstance(y, Side) and x.data.shape[1] + y.data.shape[1] < x.data.shape[2]:
        return Side("rows", torch.cat([x.data, y.data], 1))
    x, y = (t.dense() if isinstance(t, Side) else t for t in (x, y))
    if x.dim() == y.dim():
        return x + y
    return x + y.diag_embed() if x.dim() > y.dim() else x.diag_embed() + y


def scale_factors(value: Factors, a: float, own: bool = True) -> Kron:
    """The Kronecker block of one parameter, for the loss as reduced (a = 1 / normalizer); made of the sums themselves,
    unless they are not the block's `own`.

    Weights: gradient factor a sum_{v,n,t} l l^T and input factor 1/(N T) sum_{n,t} r r^T ("expand"), or with l summed
    and r averaged over positions and 1/N ("reduce").  Bias-like parameters: the exact block
    a sum_{v,n} (sum_t l)(sum_t l)^T.
    Several uses of one parameter are further positions; where one of them is transposed (an embedding tied to the
    decoder), its two factors change places first, so that left (x) right reads in the parameter's own order.
    Sources: Martens & Grosse 2015 (KFAC), Botev et al. 2017 (KFLR), Eschenhagen et al. 2023 (expand, reduce).
    """
    if value.exact is not None:
        exact = _side(_times(value.exact, a, own))
        return Kron(exact, Side("matrix", exact.data.new_ones(1, 1, 1)))
    scales = {"gradient": a, "input": 1 / max(1.0, value.positions.item())}
    sides = []
    for sums in (value.rows, value.columns):
        whole = None
        for key, part in sums.items():
            scaled = _times(part, scales[key], own)
            whole = scaled if whole is None else _plus(whole, scaled)
        assert whole is not None  # every use has both
        sides.append(_side(whole))
    return Kron(*sides)


def _times(part: Tensor | Side, scale: float, own: bool = True) -> Tensor | Side:
    """The sum times a number; rows may be the pulled-back vectors themselves, and are left as they are."""
    if isinstance(part, Side):
        return Side("rows", part.data * scale**0.5)
    return part.mul_(scale) if own else part * scale


def _side(part: Tensor | Side) -> Side:
    """A factor with all its groups."""
    return part if isinstance(part, Side) else Side("diagonal" if part.dim() == 2 else "matrix", part)


def _block(o: Outer, memory: int | None, kept: Kept, recent: Recent | None) -> Tensor | Side:
    """sum_{v,n} J_n^T v (J_n^T v)^T of a whole parameter, [1 p p]; its diagonal [1 p] beyond 4096 elements."""
    V, N = o.left.shape[:2]
    p = o.shape.numel()
    if p > min(EXACT_VECTOR, kept.max_factor):
        return reduce(o, {"squares"}, memory)["squares"].reshape(1, p)
    if kept.thin and p > V * N:
        return Side("rows", o.samples().reshape(1, V * N, p))
    if o.sides and recent is not None and (factor := recent.factor_of(o.left)) is not None:
        return factor.clone()
    block = o.left.new_zeros(p, p)
    for _, J in o.pieces(memory):
        J = J.reshape(-1, p)
        block.addmm_(J.mT, J)
    return block.unsqueeze(0)


def _zero_factors(o: Zero, kept: Kept) -> Factors:
    """The factors of a matrix parameter without influence on the output; `thin`: no rows at all."""
    sides = []
    for size in (o.shape[0], o.shape[1:].numel()):
        if size > kept.max_factor:
            sides.append(o.left.new_zeros(1, size))
        else:
            sides.append(Side("rows", o.left.new_zeros(1, 0, size)) if kept.thin else o.left.new_zeros(1, size, size))
    return Factors({"gradient": sides[0]}, {"input": sides[1]}, positions=_count(0), groups=1)
