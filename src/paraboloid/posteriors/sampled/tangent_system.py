"""The linear system whose solutions are posterior samples, over the graphs of the data; it knows J and J^T alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.losses import NoTargets
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.operators.vectors import join, put, split
from paraboloid.posteriors.sampled import noise
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature
from paraboloid.quantities.curvature import DiagGGN
from paraboloid.quantities.recording import record

ROUNDING = (
    8  # units of it that a Jacobian's element is, beside the largest of its input, where the data does not see it
)
AT_ONCE = 2**20  # weights up to which several products are worth an attempt at once
FEW = 10  # columns of the loss's root up to which the curvature's diagonal is taken exactly


@dataclass(eq=False)
class TangentSystem:
    """(S (strength G) S + Lambda) w = b over rows w [K, D], with G = sum_n J_n^T H_n J_n of the summed loss.

    A row stands for the deviation S w of the weights, where S = diag(scale) is the g-prior's (the identity without).
    b = Lambda^1/2 theta_0 + sqrt(strength) S sum_n J_n^T L_n eps_n with L_n L_n^T = H_n and standard normal theta_0 and
    eps makes each solution an exact draw from N(0, (S strength G S + Lambda)^-1): the minimiser of

        strength / 2 sum_n ||J_n S w||^2_{H_n} + ||w - Lambda^-1 b||^2_Lambda / 2.

    Over several processes each holds some of the data, of which G and b are sums over `group`.
    Source: Antoran et al. 2023, arXiv:2210.04994, equation 7.
    """

    curvature: TangentCurvature
    strength: float
    seed: int
    samples: range  # which of the posterior's samples are solved for here
    scale: Tensor | None = None  # [D]
    group: Group = None  # of the processes that hold other data

    def __post_init__(self) -> None:
        self.replay = self.curvature.replay
        self.parameters: list[Tensor] = list(self.replay.parameters.values())
        self.size = sum(p.numel() for p in self.parameters)
        own = self.replay.samples, self.replay.batches
        every = [own] if self.group is None else collectives.gathered(own, self.group)
        counts = [samples for samples, _ in every]
        self.count = sum(counts)  # data points, everywhere
        self.first = sum(counts[: collectives.rank_of(self.group)])
        self.steps = max(batches for _, batches in every)  # of a pass that takes a batch of each process at a time

    @property
    def everyone(self) -> range:
        """All samples of the posterior, those of other processes included."""
        return range(self.samples.stop)

    @property
    def like(self) -> Tensor:
        return self.parameters[0].detach()

    def deviations(self, rows: Tensor) -> Tensor:
        """S w: deviations of the weights."""
        return rows if self.scale is None else rows * self.scale

    def summed(self, total: Tensor) -> Tensor:
        """Over the processes that hold other data."""
        return total if self.group is None else collectives.summed(total, self.group, total.device)

    def of_all(self, graph: OutputGraph, parts: list[Tensor]) -> tuple[list[Tensor], float]:
        """An estimate of strength times a sum over all data points from a batch's own part of it: (sums, coefficient).

        Over several processes each one's batch stands for its part of the data, so that unequal ones are without bias.
        """
        share = self.replay.samples / len(graph.f)
        if self.group is None:
            return parts, self.strength * share
        return [self.summed(t * share) for t in parts], self.strength

    # --- products -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def product(self, rows: Tensor, by_root: bool = False) -> Tensor:
        """S (strength G) S times the rows of a [K, D] tensor; one pass over the data.

        by_root: H_n as L_n L_n^T, column by column, which rounding cannot make indefinite.
        """
        times = _by_root if by_root else lambda graph, u: graph.hessian(u)
        if (root := self.curvature.root.rows) is not None:
            found = (self.deviations(rows) @ root.T) @ root
        else:
            found = torch.zeros_like(rows)
            with self.replay.graphs() as graphs:
                for graph in graphs:
                    for k, parts in self.pulled(graph, times(graph, self.pushed(graph, rows))):
                        put(parts, found[k], 1.0, add=True)
        found = self.summed(found).mul_(self.strength)
        return found if self.scale is None else found.mul_(self.scale)

    def pushed(self, graph: OutputGraph, rows: Tensor) -> Tensor:
        """J S w_k of one batch for all rows, [K, *f.shape]."""
        self.replay.certify(graph)
        if self.size <= AT_ONCE and len(rows) > 1:
            V = split(self.deviations(rows), self.parameters)
            if (found := self.replay.together(graph, V, lambda v: [graph.push(v)])) is not None:
                return found[0]
        return torch.stack([graph.push(split(self.deviations(row), self.parameters)) for row in rows])

    def pulled(self, graph: OutputGraph, u: Tensor) -> Iterator[tuple[int, list[Tensor]]]:
        """(k, J^T u_k) of one batch for all of u [K, *f.shape]: one tensor for each parameter."""
        found = self.replay.together(graph, [u], lambda v: graph.pull(v[0])) if self.size <= AT_ONCE else None
        if found is not None:
            yield from ((k, [t[k] for t in found]) for k in range(len(u)))
            return
        for k in range(len(u)):
            yield k, graph.pull(u[k])

    # --- right-hand sides ---------------------------------------------------------------------------------------------

    def prior_noise(self, sample: int) -> Tensor:
        """theta_0 [D]."""
        return noise.of_prior(self.seed, sample, self.size, self.like)

    @torch.no_grad()
    def right_hand_sides(self, precision: Tensor, data: bool = True) -> Tensor:
        """b [K, D] under Lambda = diag(precision [D]), by one pass over the data; without it Lambda^1/2 theta_0."""
        b, start = self.like.new_zeros(len(self.samples), self.size), 0
        if data:
            with self.replay.graphs() as graphs:
                for graph in graphs:
                    for k, parts in self.pulled(graph, self.noisy_outputs(graph, start)):
                        put(parts, b[k], self.strength**0.5, add=True)
                    start += len(graph.f)
            b = self.summed(b)
            if self.scale is not None:
                b.mul_(self.scale)
        for row, sample in zip(b, self.samples, strict=True):
            row.addcmul_(precision.sqrt(), self.prior_noise(sample))
        return b

    @torch.no_grad()
    def reweighted(self, b: Tensor, w: Tensor, before: Tensor, after: Tensor, shares: Tensor) -> None:
        """The right-hand sides under another prior, and solutions to begin at, in place.

        theta_0 alone moves with the prior: b by what it adds, w by as much of what solves for it without data as
        `shares` [D] says.
        """
        moved, drawn = after.sqrt() - before.sqrt(), (after.rsqrt() - before.rsqrt()) * shares
        for k, sample in enumerate(self.samples):
            theta = self.prior_noise(sample)
            b[k].addcmul_(moved, theta)
            w[k].addcmul_(drawn, theta)

    @torch.no_grad()
    def louder(self, b: Tensor, factor: float, precision: Tensor) -> None:
        """The data's part of the right-hand sides times a number, in place."""
        for row, sample in zip(b, self.samples, strict=True):
            row.mul_(factor).addcmul_(precision.sqrt(), self.prior_noise(sample), value=1 - factor)

    @torch.no_grad()
    def prior_draws(self, precision: Tensor) -> Tensor:
        """Lambda^-1/2 theta_0 [K, D], which solve the system where the data says nothing."""
        found = self.like.new_empty(len(self.samples), self.size)
        for row, sample in zip(found, self.samples, strict=True):
            torch.mul(precision.rsqrt(), self.prior_noise(sample), out=row)
        return found

    def noisy_outputs(self, graph: OutputGraph, start: int, samples: range | None = None) -> Tensor:
        """L_n eps_n [K, *f.shape] of a batch whose first data point is number `start` of this process."""
        samples = self.samples if samples is None else samples
        f, columns = graph.f.detach(), graph.root_columns()
        eps = noise.of_data(self.seed, self.first + start, len(f), samples, columns, f)
        u = f.new_zeros(len(samples), *f.shape)
        for v, column in enumerate(graph.root()):
            u.addcmul_(column, eps[:, :, v].reshape(len(samples), len(f), *[1] * (f.dim() - 1)))
        return u

    # --- the diagonal -------------------------------------------------------------------------------------------------

    def diagonal(self) -> Tensor:
        """The diagonal of strength G, [D]: exact where the root of H_n has few columns, else

            mean over the samples of sum_n (J_n^T L_n eps_n)^2,

        by the engine in one pass.  Where an operation has no rule, the squares of the sums over n, which have the same
        mean and more variance.  One draw for many data points would not do: a weight that few of them see would be
        called unseen now and then, and the g-prior would give it a scale without measure.
        """
        total = self.like.new_zeros(self.size)
        if not self._squares(total):
            total.zero_()
            start = 0
            with torch.no_grad(), self.replay.graphs() as graphs:
                sums = self.like.new_zeros(len(self.everyone), self.size)
                for graph in graphs:
                    for k, parts in self.pulled(graph, self.noisy_outputs(graph, start, self.everyone)):
                        put(parts, sums[k], 1.0, add=True)
                    start += len(graph.f)
                total = sums.square_().mean(0)
        return self.summed(total).mul_(self.strength)

    def _squares(self, total: Tensor) -> bool:
        with warnings.catch_warnings(), suppress(ValueError, NotImplementedError, RuntimeError, Warning):
            warnings.simplefilter("error")  # a warned-of fallback is exact, but slower than the graph
            start = 0
            with self.replay.recorded(lambda: record(self.replay.model)) as tapes:
                for index, (tape, f, y) in enumerate(tapes):
                    graph: Any = self.replay.graph(f, y, self.replay.loss, self.parameters, index)
                    with suppress(NoTargets):
                        total += join(self._batch_squares(tape, f, graph, start))
                    start += len(f)
            return True
        return False

    def _batch_squares(self, tape: Any, f: Tensor, graph: OutputGraph, start: int) -> Sequence[Tensor]:
        if graph.root_columns() <= max(len(self.everyone), FEW):
            vectors = graph.root()
        else:
            u = self.noisy_outputs(graph, start, self.everyone)
            vectors = iter(u / len(u) ** 0.5)
        return list(tape.of_vectors(f, vectors, DiagGGN(), self.replay.max_memory).values())


def _by_root(graph: OutputGraph, u: Tensor) -> Tensor:
    """L_n L_n^T u_n for u [K, *f.shape]."""
    found = torch.zeros_like(u)
    for column in graph.root():
        inner = (column * u).reshape(*u.shape[:2], -1).sum(2)
        found.addcmul_(column, inner.reshape(*inner.shape, *[1] * (u.dim() - 2)))
    return found


def feature_scales(diagonal: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The g-prior's s = diag(strength G)^-1/2, [D]: features of equal curvature, whatever unit each came in.

    A weight that the data does not see gets that with which w / s is the parameter's root mean square of it, so the
    units of its input and output do not count there either; where it is zero, that of the parameter's mean curvature.
    A parameter without any gets 1.
    Source: Antoran et al. 2023, arXiv:2210.04994, section 5.
    """
    pairs = zip(split(diagonal, parameters), parameters, strict=True)
    return torch.cat([_of_all(d, p.detach().square()).rsqrt().reshape(-1) for d, p in pairs])


def _of_all(d: Tensor, squares: Tensor) -> Tensor:
    """A parameter's diagonal, with something for the weights that the data does not see."""
    axes = (0,) if d.dim() > 1 else tuple(range(d.dim()))  # along which the weights of one input lie
    seen = d > (ROUNDING * torch.finfo(d.dtype).eps) ** 2 * d.amax(axes, keepdim=True)
    if not seen.any():
        return torch.ones_like(d)
    known, count = torch.where(seen, d, 0.0), seen.sum()
    instead = (known * squares).sum() / count / squares
    usable = torch.isfinite(instead) & (instead > 0)
    return torch.where(seen, d, torch.where(usable, instead, known.sum() / count))
