"""The longest rows of a curvature A^T A, with what all the others add to first order.

A network that is sure of most of its training data leaves most rows S_n^T J_n short: a seventh of them has nine tenths
of the trace.  They precondition as well as all do, and tell how many weights the data determines within some percent,
in time that is linear in the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from paraboloid.posteriors.structures.rows import Rows, Woodbury, shared_precision

LEADING, SEEN, SEED = 512, 64, 0  # rows that are kept, and of the others those that are looked at


class LeadingRows(Rows):
    """The kept rows [R, D], and the spectrum of all of them within some percent."""

    def __init__(self, parameters: Mapping[str, Tensor], A: Tensor, others: Tensor, left: float):
        super().__init__(parameters, A)
        self.others, self.left = others, left

    @staticmethod
    def of(parameters: Mapping[str, Tensor], pieces: Iterable[Tensor], leading: int = LEADING) -> LeadingRows:
        """From all rows, some [r, D] after the others; of those that are not kept `SEEN` are drawn, each as likely as
        its square is large (Efraimidis and Spirakis 2006)."""
        generator = torch.Generator().manual_seed(SEED)
        kept = others = keys = None
        sum_of_squares = 0.0
        for piece in pieces:
            pool = piece if kept is None else torch.cat([kept, piece])
            squares = torch.linalg.vector_norm(pool, dim=1).double().square()
            sum_of_squares += squares[len(pool) - len(piece) :].sum().item()
            order = squares.argsort(descending=True)
            kept, rest = pool[order[:leading]], order[leading:]
            rest = rest[squares[rest] > 0]
            drawn = torch.rand(len(rest), generator=generator, dtype=torch.float64).log().to(squares.device)
            new, at = (drawn / squares[rest]).topk(min(SEEN, len(rest)))
            new_rows = pool[rest[at]]
            keys = new if keys is None else torch.cat([keys, new])
            others = new_rows if others is None else torch.cat([others, new_rows])
            best = keys.topk(min(SEEN, len(keys))).indices
            keys, others = keys[best], others[best]
        assert kept is not None and others is not None
        left = sum_of_squares - torch.linalg.vector_norm(kept, dim=1).double().square().sum().item()
        return LeadingRows(parameters, kept, others, max(0.0, left))

    @property
    def missing(self) -> float:
        """The others' share of the trace."""
        return self.left / (self.left + self.A.square().sum().item())

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Nodes, and how many eigenvalues of A^T A each stands for.

        The other rows add to the eigenvalues of the kept ones what they have along their eigenvectors, and are
        orthogonal to each other beyond.
        """
        values, U = torch.linalg.eigh(self.gram.double())
        counts = torch.ones_like(values)
        if not len(self.others):
            return values.clamp(min=0), counts
        squares = self.others.square().sum(1).double()
        there = values > values.max() * torch.finfo(self.A.dtype).eps * len(values)
        along = ((self.others @ self.A.T).double() @ U).square()[:, there] / values[there]
        along = along / squares.unsqueeze(1)
        values = values.clamp(min=0)
        values[there] += self.left * along.mean(0)
        beyond = squares * (1 - along.sum(1)).clamp(min=0)
        return torch.cat([values, beyond]), torch.cat([counts, self.left / (len(squares) * squares)])


class Leading(Woodbury):
    """strength A^T A + Lambda by the kept rows, and the effective dimension by the spectrum of all."""

    def roughly_determined(self, groups: Sequence[Sequence[str]]) -> list[Tensor]:
        precision, whole = shared_precision(self.prior), [set(names) for names in groups] == [set(self.prior)]
        if precision is None or not whole:
            return self.effective_dimension(groups)
        nodes, counts = self.curvature.spectrum
        e = float(self.strength) * nodes / float(precision)
        return [(counts * e / (1 + e)).sum().clamp(min=torch.finfo(precision.dtype).eps).to(precision)]
