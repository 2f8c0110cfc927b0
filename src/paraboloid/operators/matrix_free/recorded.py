"""What the operators that are recorded from a model on data have in common: how they are made, and their blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.losses import LossFunction
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.matrix_free.replay import Graph, Replay
from paraboloid.operators.partition import Blocks, places, resolve_blocks
from paraboloid.operators.structured.block_diagonal import BlockDiagonal
from paraboloid.operators.vectors import put, split

MOST_ELEMENTS = 20_000  # of one block as a dense matrix


class Recorded(LinearOperator):
    """An operator whose matrix is a sum over recorded graphs, each made by `graph`.

    See `paraboloid.operators` for the arguments, and for what is kept between products.
    """

    graph: ClassVar[Callable[..., Graph]]
    _dense: BlockDiagonal | None = None

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        *,
        blocks: Blocks = "all",
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
    ):
        self._record(self.graph, model, loss_fn, data, blocks, output=output, seed=seed, max_memory=max_memory)

    def _record(
        self, graph: Callable[..., Graph], model: Any, loss_fn: LossFunction, data: Data, blocks: Blocks, **options: Any
    ) -> None:
        self.replay = Replay(model, loss_fn, data, graph, **options)
        self.parameters = self.replay.parameters
        self.blocks = resolve_blocks(self.parameters, blocks)

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} is known by its products alone and holds the recorded graph of its model, so it is "
            "neither copied nor pickled. Make it again where it is needed, or save its dense matrix (to_dense()) or "
            "eigenpairs (pb.operators.LowRank.from_operator(A, k))."
        )

    def _product(self, rows: Tensor) -> Tensor:
        if self.blocks is None:
            return self._block_products([range(len(self.parameters))], [rows])[0]
        at = [places(self.parameters, block) for block in self.blocks]
        result = torch.empty_like(rows)
        for where, part in zip(at, self._block_products(self.blocks, [rows[:, i] for i in at]), strict=True):
            result[:, where] = part
        return result

    def _block_products(self, blocks: Sequence[Sequence[int]], rows: Sequence[Tensor]) -> list[Tensor]:
        """Products of the diagonal blocks with rows [K, D_b] each, in one pass over the data."""
        replay, parameters = self.replay, list(self.parameters.values())
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

    def dense_blocks(self) -> BlockDiagonal:
        """The blocks of an operator made with `blocks=`, as dense matrices: D products, made once."""
        if self.blocks is None:
            raise ValueError(f"{type(self).__name__} was made with blocks='all'; expected 'parameter', 'layer' or "
                             "lists of names. Use to_dense() for the whole matrix.")  # fmt: skip
        if self._dense is not None:
            self.replay.check_unchanged()
            return self._dense
        sizes = [len(places(self.parameters, block)) for block in self.blocks]
        if max(sizes) > MOST_ELEMENTS:
            raise ValueError(
                f"a block of {type(self).__name__} has {max(sizes)} elements, too many for a dense matrix; expected at "
                f"most {MOST_ELEMENTS}. Use solve(b, damping=...) or a Kronecker-factored operator."
            )
        eyes = [torch.eye(size, dtype=self.dtype, device=self.device) for size in sizes]
        found = self._block_products(self.blocks, eyes)
        self._dense = BlockDiagonal(self.parameters, self.blocks, [(B + B.T) / 2 for B in found])
        return self._dense

    def to_dense(self) -> Tensor:
        """The matrix [D, D], exactly symmetric; D products, or as many as the largest block has parameters."""
        return super().to_dense() if self.blocks is None else self.dense_blocks().to_dense()

    def _structured(self, what: str) -> Any:
        return super()._structured(what) if self.blocks is None else self.dense_blocks()._structured(what)
