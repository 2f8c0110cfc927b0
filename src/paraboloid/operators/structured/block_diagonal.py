"""Block-diagonal curvature: what couples the parameters of different blocks is left out.

blocks: "all" (one block), "parameter" (a block for each), "layer" (the parameters of one module together), or a list of
lists of names that holds each parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.linalg.eigenform import Basis, Eigenform, decomposed
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.matrix_free.replay import Replay
from paraboloid.operators.vectors import put, split
from paraboloid.passes.modes import precisely
from paraboloid.passes.parameter_layers import layers_of

if TYPE_CHECKING:
    from paraboloid.operators.structured.diagonalised import Diagonalised

Blocks = str | Sequence[Sequence[str]]
MOST_ELEMENTS = 20_000  # of one block as a dense matrix


def resolve_blocks(parameters: Mapping[str, Tensor], blocks: Blocks) -> list[list[int]] | None:
    """The places of each block's parameters in the order of `parameters`; None for "all".

    Raises ValueError for wrong names.
    """
    names = list(parameters)
    if blocks == "all":
        return None
    if blocks == "parameter":
        return [[i] for i in range(len(names))]
    if blocks == "layer":
        blocks = list(layers_of(names).values())
    if isinstance(blocks, str):
        raise ValueError(f"blocks is {blocks!r}; expected 'all', 'parameter', 'layer' or a list of lists of names.")
    given = [list(block) for block in blocks]
    flat = [name for block in given for name in block]
    unknown, missing = sorted(set(flat) - set(names)), [name for name in names if name not in flat]
    repeated = sorted({name for name in flat if flat.count(name) > 1})
    if unknown or missing or repeated or not all(given):
        raise ValueError(
            f"blocks does not hold every parameter once: unknown {unknown}, missing {missing}, repeated {repeated}; "
            f"expected lists with the names {names}."
        )
    at = {name: i for i, name in enumerate(names)}
    return [sorted(at[name] for name in block) for block in given]


def places(parameters: Mapping[str, Tensor], block: Sequence[int]) -> Tensor:
    """Where the elements of a block's parameters lie in a flat vector, [D_b]."""
    sizes = [p.numel() for p in parameters.values()]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    device = next(iter(parameters.values())).device
    return torch.cat([torch.arange(ends[i] - sizes[i], ends[i], device=device) for i in block])


def block_products(replay: Replay, blocks: Sequence[Sequence[int]], rows: Sequence[Tensor]) -> list[Tensor]:
    """Products of the diagonal blocks with rows [K, D_b] each, in one pass over the data."""
    parameters = list(replay.parameters.values())
    with replay.graphs() as graphs:
        results = [torch.empty_like(r) for r in rows]
        for place, graph in enumerate(graphs):
            for block, r, result in zip(blocks, rows, results, strict=True):
                chosen = [parameters[i] for i in block]
                found = replay.together(graph, split(r, chosen), lambda v, g=graph, b=block: g.product(v, b))
                if found is not None:
                    put(found, result, 1 / replay.normalizer, add=place > 0)
                    continue
                for v, total in zip(r, result, strict=True):
                    put(replay.product(graph, split(v, chosen), block), total, 1 / replay.normalizer, add=place > 0)
    return results


def product(replay: Replay, blocks: Sequence[Sequence[int]] | None, rows: Tensor) -> Tensor:
    """Products of the block-diagonal matrix (the whole one for None) with rows [K, D]."""
    if blocks is None:
        return block_products(replay, [range(len(replay.parameters))], [rows])[0]
    at = [places(replay.parameters, block) for block in blocks]
    result = torch.empty_like(rows)
    for where, part in zip(at, block_products(replay, blocks, [rows[:, i] for i in at]), strict=True):
        result[:, where] = part
    return result


def dense_blocks(operator: Any) -> BlockDiagonal:
    """The blocks of an operator with `replay` and `blocks` as dense matrices, in one pass over the data."""
    sizes = [len(places(operator.parameters, block)) for block in operator.blocks]
    if max(sizes) > MOST_ELEMENTS:
        raise ValueError(
            f"a block of {type(operator).__name__} has {max(sizes)} elements, too many for a dense matrix; expected at "
            f"most {MOST_ELEMENTS}. Use solve(b, damping=...) or a Kronecker-factored operator."
        )
    eyes = [torch.eye(size, dtype=operator.dtype, device=operator.device) for size in sizes]
    found = block_products(operator.replay, operator.blocks, eyes)
    return BlockDiagonal(operator.parameters, operator.blocks, [(B + B.T) / 2 for B in found])


class BlockDiagonal(LinearOperator):
    """A block-diagonal matrix with dense symmetric blocks: block b couples the parameters at the places blocks[b]."""

    exact = True

    def __init__(self, parameters: Mapping[str, Tensor], blocks: Sequence[Sequence[int]], matrices: Sequence[Tensor]):
        self.parameters, self.blocks, self.matrices = parameters, [list(b) for b in blocks], list(matrices)
        self.at = [places(parameters, block) for block in blocks]

    @precisely
    def _product(self, rows: Tensor) -> Tensor:
        result = torch.zeros_like(rows)
        for where, B in zip(self.at, self.matrices, strict=True):
            result[:, where] = rows[:, where] @ B
        return result

    def to_dense(self) -> Tensor:
        result = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for where, B in zip(self.at, self.matrices, strict=True):
            result[where.unsqueeze(1), where] = B
        return result

    def diagonal(self, samples=None, seed=0):
        if samples is not None:
            return super().diagonal(samples, seed)
        result = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for where, B in zip(self.at, self.matrices, strict=True):
            result[where] = B.diagonal()
        return result

    @cached_property
    def eigenform(self) -> Diagonalised:
        """The same matrix by the eigenvalues and eigenvectors of its blocks."""
        from paraboloid.operators.structured.diagonalised import Diagonalised, block_names

        forms = []
        for name, B in zip(block_names(self.parameters, self.blocks or []), self.matrices, strict=True):
            values, vectors = decomposed(B.unsqueeze(0), name)
            bases = Basis(vectors, len(B)), Basis(None, 1)
            forms.append(Eigenform(*bases, values.unsqueeze(2), values.new_zeros(())))
        return Diagonalised(self.parameters, forms, self.blocks)

    def _structured(self, what: str) -> Diagonalised:
        return self.eigenform

    def frobenius_norm(self) -> Tensor:
        return torch.stack([B.norm() for B in self.matrices]).norm()

    def trace(self, samples=None, seed=0):
        return super().trace(samples, seed) if samples is not None else sum(B.trace().item() for B in self.matrices)
