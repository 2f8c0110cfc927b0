"""What the operators that are recorded from a model on data have in common: how they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from paraboloid.data.batches import Output
from paraboloid.operators.matrix_free.replay import Graph, Replay
from paraboloid.operators.structured.block_diagonal import Blocks, resolve_blocks


class Recorded:
    """The constructor of an operator whose matrix is a sum over recorded graphs, each made by `graph`.

    See `paraboloid.operators` for the arguments, and for what is kept between products.
    """

    graph: ClassVar[Callable[..., Graph]]

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        *,
        blocks: Blocks = "all",
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
    ):
        self._record(self.graph, model, loss_fn, data, blocks, output=output, seed=seed, max_memory=max_memory)

    def _record(
        self, graph: Callable[..., Graph], model: Any, loss_fn: Any, data: Any, blocks: Blocks, **options: Any
    ) -> None:
        self.replay = Replay(model, loss_fn, data, graph, **options)
        self.parameters = self.replay.parameters
        self.blocks = resolve_blocks(self.parameters, blocks)
