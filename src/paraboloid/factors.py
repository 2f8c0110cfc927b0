"""Kronecker factors of a parameter's block, summed while the vectors come in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paraboloid.kron import Kron
from paraboloid.outer import CHUNK_BYTES, Outer, merge
from paraboloid.reductions import pieces, reduce, samples

LARGE = 384  # rows from which halving by symmetry pays
EXACT_VECTOR = 4096  # elements up to which a bias-like parameter's block is kept exactly


def gradient_factor(o: Outer, sharing: str) -> Tensor:
    """sum over v, n (and t) of left left^T, [G p p]."""
    left = o.left.sum(3, keepdim=True) if sharing == "reduce" else o.left
    positions, rows = left.shape[3:]
    if positions >= rows:  # images: a product for each sample, without a copy
        left = left.mT.flatten(0, 1)
        return (left @ left.mT).sum(0)
    left = left.permute(2, 4, 0, 1, 3).flatten(2)  # [G p VNT]
    return left @ left.mT


def input_factor(o: Outer, sharing: str, memory: int | None = None) -> Tensor:
    """sum over n (and t) of right right^T, [G q q]; the diagonal [1 q] for a lookup."""
    if o.right is not None and o.lookup and sharing == "expand":
        return torch.bincount(o.right().flatten() + 1, minlength=o.q + 1)[1:].to(o.left)[None]
    G, T = o.left.shape[2:4]
    A = o.left.new_zeros(G, o.q, o.q)
    size = max(CHUNK_BYTES, 4 * A.numel() * A.element_size()) if memory is None else memory // 2
    for n in o.chunks(G * T * o.q, size):
        if sharing == "reduce":
            right = o.dense_right(n)
            count = right.sum((2, 3), keepdim=True).clamp(min=1) if o.lookup else T
            add_gram(A, (right / count).sum(2).movedim(0, 2))  # [G q n]
        else:
            add_gram(A, o.columns(n))
    return mirror(A)


def add_gram(A: Tensor, R: Tensor) -> None:
    """A += R R^T in the lower blocks only: half of the multiplications by symmetry (torch has no SYRK)."""
    q = R.shape[-2]
    if q < LARGE:
        A.baddbmm_(R, R.mT)
        return
    half = q // 2
    add_gram(A[:, :half, :half], R[:, :half])
    add_gram(A[:, half:, half:], R[:, half:])
    A[:, half:, :half].baddbmm_(R[:, half:], R[:, :half].mT)


def mirror(A: Tensor) -> Tensor:
    """Fill the upper blocks that `add_gram` leaves out."""
    q = A.shape[-1]
    if q >= LARGE:
        half = q // 2
        A[:, :half, half:] = A[:, half:, :half].mT
        mirror(A[:, :half, :half])
        mirror(A[:, half:, half:])
    return A


def _positions(o: Outer) -> int:
    """N T, without the empty positions of ragged bags."""
    if o.lookup and o.right is not None:
        return int((o.right() >= 0).sum())
    return o.left.shape[1] * o.left.shape[3]


def _count(n: int) -> Tensor:
    return torch.tensor(n, dtype=torch.float64)  # a tensor, so that it is summed with the others over ranks


@dataclass
class Factors:
    """Sums of one parameter's Kronecker factors while vectors come in, rows first, as the parameter is stored.

    Each of `rows` and `columns` is {"gradient": sum, "input": sum} over those uses whose gradients (inputs) run along
    it; the gradient's sums grow with every group of vectors, the input's are taken once.  `exact` is the whole block of
    a bias-like parameter instead: a matrix, or a diagonal beyond 4096 elements.
    """

    rows: dict[str, Tensor]
    columns: dict[str, Tensor]
    positions: Tensor  # [], float64, on the CPU
    groups: int
    exact: Tensor | None = None


def add_factors(value: Factors | None, outers: list[Outer], sharing: str, memory: int | None = None) -> Factors:
    """One more group of vectors for the Kronecker factors of one parameter.

    Raises NotImplementedError for a weight whose outer products live on a derived tensor or came from a fallback, and
    where the uses of a shared weight have blocks of different shapes.
    """
    outers = merge(outers)
    if outers[0].kind == "zero" and len(outers[0].shape) > 1:
        return _zero_factors(outers[0])
    if all(o.kind == "vector" or (o.kind in ("general", "zero") and len(o.shape) < 2 and not o.via) for o in outers):
        block = _block(outers, memory)
        return Factors({}, {}, _count(0), 1, block if value is None or value.exact is None else value.exact.add_(block))
    if any(o.via is not None or o.kind != "matrix" for o in outers):
        raise NotImplementedError(
            "has no Kronecker factors: it enters the layer through another tensor (weight_norm, a product, columns) "
            "or through an operation without a rule. Use diag_ggn or diag_ggn_mc, or freeze it with "
            "requires_grad_(False)."
        )
    blocks = {(o.left.shape[2], *((o.q, o.left.shape[4]) if o.flip else (o.left.shape[4], o.q))) for o in outers}
    if len(blocks) > 1:
        raise NotImplementedError(f"is used with blocks of different shapes (groups, rows, columns) {sorted(blocks)}.")
    first = value is None
    if value is None:
        positions = sum(o.left.shape[1] if sharing == "reduce" else _positions(o) for o in outers)
        value = Factors({}, {}, _count(positions), outers[0].left.shape[2])
    for o in outers:
        gradients, inputs = (value.columns, value.rows) if o.flip else (value.rows, value.columns)
        _increase(gradients, "gradient", gradient_factor(o, sharing))
        if first:
            _increase(inputs, "input", input_factor(o, sharing, memory))
    return value


def _increase(sums: dict[str, Tensor], key: str, part: Tensor) -> None:
    sums[key] = _plus(sums[key], part) if key in sums else part


def _plus(x: Tensor, y: Tensor) -> Tensor:
    """[G p p] + [G p p], where one may be a diagonal [G p]."""
    if x.dim() == y.dim():
        return x + y
    return x + y.diag_embed() if x.dim() > y.dim() else x.diag_embed() + y


def scale_factors(value: Factors, a: float) -> Kron:
    """The Kronecker block of one parameter, for the loss as reduced (a = 1 / normalizer).

    Weights: gradient factor a sum_{v,n,t} l l^T and input factor 1/(N T) sum_{n,t} r r^T ("expand"), or with l summed
    and r averaged over positions and 1/N ("reduce").  Bias-like parameters: the exact block
    a sum_{v,n} (sum_t l)(sum_t l)^T.
    Several uses of one parameter are further positions; where one of them is transposed (an embedding tied to the
    decoder), its two factors change places first, so that left (x) right reads in the parameter's own order.
    Sources: Martens & Grosse 2015 (KFAC), Botev et al. 2017 (KFLR), Eschenhagen et al. 2023 (expand, reduce).
    """
    if value.exact is not None:
        return Kron(value.exact.mul_(a), value.exact.new_ones(1, 1))
    scales = {"gradient": a, "input": 1 / max(1.0, float(value.positions))}
    sides = []
    for sums in (value.rows, value.columns):
        scaled = [part.mul_(scales[key]) for key, part in sums.items()]
        sides.append(scaled[0] if len(scaled) == 1 else _plus(*scaled))
    rows, columns = sides if value.groups > 1 else (side[0] for side in sides)
    return Kron(rows, columns, value.groups)


def _block(outers: list[Outer], memory: int | None) -> Tensor:
    """sum_{v,n} J_n^T v (J_n^T v)^T of a whole parameter, [p p]; its diagonal [p] beyond 4096 elements."""
    p = samples(outers, slice(0, 1))[0, 0].numel()
    if p > EXACT_VECTOR:
        return reduce(outers, {"squares"}, memory)["squares"].flatten()
    block = outers[0].left.new_zeros(p, p)
    for _, J in pieces(outers, memory):
        J = J.reshape(-1, p)
        block.addmm_(J.mT, J)
    return block


def _zero_factors(o: Outer) -> Factors:
    """The factors of a matrix parameter without influence on the output."""
    p, q = o.shape[0], o.shape[1:].numel()
    zeros = o.left.new_zeros
    return Factors({"gradient": zeros(1, p, p)}, {"input": zeros(1, q, q)}, positions=_count(0), groups=1)
