"""Matrices of the form sum_n J_n^T H_n J_n, the GGN first; the Fishers differ in H_n alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paraboloid.data.batches import Data
from paraboloid.linalg.probes import Seed
from paraboloid.losses import LossFunction
from paraboloid.operators.matrix_free.ggn_root import Root, of_roots
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.matrix_free.recorded import Recorded
from paraboloid.operators.partition import Blocks, places
from paraboloid.operators.vectors import join, split
from paraboloid.quantities.curvature import DiagGGN


class JacobianForm(Recorded):
    """sum_n J_n^T H_n J_n times the reduction's factor, over the `OutputGraph`s of the data, which know J_n and H_n."""

    def _record(
        self, graph: Any, model: Any, loss_fn: LossFunction, data: Data, blocks: Blocks, **options: Any
    ) -> None:
        super()._record(graph, model, loss_fn, data, blocks, **options)
        self.root = Root(self.replay)

    def _product(self, rows: Tensor) -> Tensor:
        if (S := self.root.after(len(rows))) is None:
            return super()._product(rows)
        if self.blocks is None:
            return (rows @ S.T) @ S / self.replay.normalizer
        result = torch.empty_like(rows)
        for at in (places(self.parameters, block) for block in self.blocks):
            result[:, at] = (rows[:, at] @ S[:, at].T) @ S[:, at] / self.replay.normalizer
        return result

    def quadratic_forms(self, directions: Tensor) -> Tensor:
        if self.blocks is not None:
            return super().quadratic_forms(directions)
        rows = self.rows(directions)
        if (S := self.root.after(len(rows))) is not None:
            return (rows @ S.T).square().sum(1) / self.replay.normalizer
        with self.replay.graphs() as graphs:
            forms = rows.new_zeros(len(rows))
            for graph in graphs:
                self.replay.certify(graph)
                V = split(rows, graph.parameters)
                if (found := self.replay.together(graph, V, lambda v, g=graph: [g.push(v)])) is not None:
                    forms += (found[0] * graph.hessian(found[0])).flatten(1).sum(1)
                    continue
                for i in range(len(rows)):
                    jv = graph.push([v[i] for v in V])
                    forms[i] += (jv * graph.hessian(jv)).sum()
        return forms / self.replay.normalizer

    def sample_quadratic_forms(self, directions: Tensor) -> Tensor:
        """d.C_n d of every sample n for each row d of `directions` [k, D]: [k, N]; the mean over n is d.C d.

        C_n = N a J_n^T H_n J_n with the reduction's factor a.  The cost is that of `quadratic_forms`: about one
        gradient for each direction.  Samples count as single ones, even where batch norm in training mode couples them.

        Raises NotImplementedError for a loss that does not say how it divides, and for a matrix restricted to blocks.
        """
        if self.replay.loss.reduction == "whole" or self.blocks is not None:
            raise NotImplementedError("the quadratic forms of single samples need a torch loss module or a pb.Loss and "
                                      "the whole matrix (blocks='all'); found "
                                      f"{type(self.replay.loss).__name__} and blocks {self.blocks}.")  # fmt: skip
        rows, found = self.rows(directions), []
        with self.replay.graphs() as graphs:
            for graph in graphs:
                self.replay.certify(graph)
                V = split(rows, graph.parameters)
                together = self.replay.together(graph, V, lambda v, g=graph: [g.push(v)])
                jv = together[0] if together else torch.stack([graph.push([v[i] for v in V]) for i in range(len(rows))])
                found.append((jv * graph.hessian(jv)).flatten(2).sum(2))
        forms = torch.cat(found, 1)
        return forms * (forms.shape[1] / self.replay.normalizer)

    def diagonal(self, samples: int | None = None, seed: Seed = 0) -> Tensor:
        if samples is not None:
            return super().diagonal(samples, seed)
        vectors = self._root_vectors()
        if (S := self.root.after(min(self.shape[0], vectors))) is not None:
            return S.square().sum(0) / self.replay.normalizer
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        squares = lambda found: total.add_(join(found))  # noqa: E731
        if self.replay.loss.reduction != "whole" and of_roots(self.replay, DiagGGN(), self.shape[0] // 2, squares):
            return total / self.replay.normalizer
        if vectors >= self.shape[0]:
            return super().diagonal()
        total.zero_()
        with self.replay.graphs() as graphs:
            for graph in graphs:
                for root in graph.root():
                    for n in range(len(root)):
                        alone = torch.zeros_like(root)
                        alone[n] = root[n]
                        total += join(graph.pull(alone)).square()
        return total / self.replay.normalizer

    def _root_vectors(self) -> int:
        """How many backward passes the diagonal takes by way of the roots of H_n; D where there is no such way."""
        if self.replay.kept is None:
            return self.shape[0]
        try:
            return sum(len(graph.f) * graph.root_columns() for graph in self.replay.kept)
        except NotImplementedError:  # a plain callable may couple the samples
            return self.shape[0]


class GGN(JacobianForm):
    """sum_n J_n^T H_n J_n times the reduction's factor: the curvature of the loss as reduced, without the model's own.

    J_n is the Jacobian of the output of sample n, H_n the Hessian of its unreduced loss.  A loader counts as one big
    batch.  See `paraboloid.operators` for the arguments, and for what is kept between products.

    Cost, in gradients: a product with a kept graph is about 1.5, a quadratic form 1 (J alone).  `to_dense` takes D
    products; `diagonal` and `trace` one backward pass for each column of the loss's root (about C of them; see
    `pb.statistics`' diag_ggn), but where samples are coupled or an operation has no rule, D quadratic forms or N C
    backward passes; `samples=` takes that many products.  Where weights are used at many
    positions (convolutions) and many products are asked for, a square root of the matrix takes over: see `Root`.

    blocks: "all", or only the diagonal blocks of each "parameter", each "layer" or lists of names: see
    `paraboloid.operators.partition`.  A product with every block costs up to 2 gradients for each of them.
    """

    graph = OutputGraph
