"""A torch batch sampler that draws from every cluster, how often from each, and weights that keep the mean unbiased."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from paraboloid.linalg.operand import check_choice


class StratifiedBatchSampler(Sampler[list[int]]):
    """Batches with one index from each non-empty cluster; for ``DataLoader(dataset, batch_sampler=sampler)``.

    With `weights`, M N_k / N for a batch of M, the mean of weight * g over a batch is an unbiased estimate of the mean
    gradient.  A cluster's samples are drawn without replacement, in a random order, until all were drawn; then in a
    new order.  The clusters of a batch come in random order.

    assignments   the cluster of each sample, int64 [N]
    allocation    "one": one draw from each cluster.  "proportional" (to N_k) and "neyman" (to N_k times `deviations`,
                  the variance-optimal one) give batches of `batch_size`, at least one draw from each cluster
    num_replicas, rank   of distributed training: every rank has batches of its own, drawn from one common order, and
                  weights of its own, so that the average over ranks is unbiased; a cluster gives different samples to
                  different ranks as long as it has enough of them
    batches       batches of one iteration; default: N / M, rounded up, divided by the replicas

    Iterating again goes on with new batches.  After `set_epoch(e)` the order depends on (seed, e) alone.  A sampler
    is advanced as batches are drawn, by the main process, so workers need nothing; with workers a few batches are
    drawn ahead of the one that is used.

    Source: Faghri et al. 2020, arXiv:2007.04532; Neyman 1934 for the allocation.
    """

    def __init__(
        self, assignments: Tensor, seed: int = 0, *, batch_size: int | None = None, allocation: str = "one",
        deviations: Tensor | None = None, num_replicas: int = 1, rank: int = 0, batches: int | None = None,
    ):  # fmt: skip
        if num_replicas < 1 or not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank} of num_replicas {num_replicas}; expected 0 <= rank < num_replicas.")
        if batches is not None and batches < 1:
            raise ValueError(f"batches is {batches}; expected at least 1, or None.")
        self.seed, self.batch_size, self.allocation = seed, batch_size, allocation
        self.num_replicas, self.rank, self.batches = num_replicas, rank, batches
        self.epoch = 0
        self._place(assignments, deviations)
        self.set_epoch(0)

    def _place(self, assignments: Tensor, deviations: Tensor | None) -> None:
        assignments = torch.as_tensor(assignments, device="cpu").detach()
        if assignments.dim() != 1 or len(assignments) == 0 or assignments.is_floating_point():
            raise ValueError(f"assignments have shape {tuple(assignments.shape)} and dtype {assignments.dtype}; "
                             "expected the cluster of each sample, int64 [N] with N >= 1.")  # fmt: skip
        if int(assignments.min()) < 0:
            raise ValueError(f"assignments hold {int(assignments.min())}; expected clusters numbered from 0.")
        sizes = torch.bincount(assignments.long())
        kept = torch.nonzero(sizes).flatten()
        if deviations is not None:
            if len(deviations) < len(sizes):
                raise ValueError(f"deviations have length {len(deviations)} for {len(sizes)} clusters; expected one "
                                 "for each.")  # fmt: skip
            deviations = torch.as_tensor(deviations, device="cpu").detach().double()[kept]
        # nothing is changed before everything fits
        draws = allocate(self.allocation, sizes[kept], self.batch_size, deviations)
        self.assignments = assignments.long().clone()
        self._sizes, self._draws = sizes[kept], draws
        self._number = torch.full((len(sizes),), -1, dtype=torch.int64, device="cpu").index_copy_(
            0, kept, torch.arange(len(kept), device="cpu")
        )
        order = self.assignments.argsort(stable=True)
        self._members = list(order.split(self._sizes.tolist()))

    @property
    def clusters(self) -> int:
        """Number of non-empty clusters."""
        return len(self._sizes)

    @property
    def draws(self) -> Tensor:
        """Draws from each non-empty cluster in a batch, int64."""
        return self._draws.clone()

    @property
    def samples_per_batch(self) -> int:
        """M, the length of a batch."""
        return int(self._draws.sum())

    def __len__(self) -> int:
        if self.batches is not None:
            return self.batches
        return math.ceil(len(self.assignments) / (self.samples_per_batch * self.num_replicas))

    def set_epoch(self, epoch: int) -> None:
        """Start epoch `epoch`: what follows depends on the seed and this number alone."""
        self.epoch = int(epoch)
        mixed = torch.Generator().manual_seed(self.seed)
        # a seed for each epoch from the stream of `seed`, far apart for neighbouring numbers
        key = int(torch.randint(2**62, (1,), generator=mixed, device="cpu")) ^ (
            self.epoch * 0x9E3779B97F4A7C15 & (2**62 - 1)
        )
        self._generator = torch.Generator().manual_seed(key)
        self._shuffle_all()

    def _shuffle_all(self) -> None:
        self._orders = [self._shuffled(members) for members in self._members]
        self._at = [0] * len(self._members)

    def _shuffled(self, members: Tensor) -> list[int]:
        return members[torch.randperm(len(members), generator=self._generator, device="cpu")].tolist()

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            yield self._next()

    def _next(self) -> list[int]:
        """This rank's part of the next round; all ranks draw the same rounds."""
        mine: list[int] = []
        for k in torch.randperm(self.clusters, generator=self._generator, device="cpu").tolist():
            draws = int(self._draws[k])
            for rank in range(self.num_replicas):
                drawn = [self._draw(k) for _ in range(draws)]
                if rank == self.rank:
                    mine += drawn
        return mine

    def _draw(self, k: int) -> int:
        if self._at[k] == len(self._orders[k]):
            self._orders[k], self._at[k] = self._shuffled(self._members[k]), 0
        self._at[k] += 1
        return self._orders[k][self._at[k] - 1]

    def weights(self, indices: Any) -> Tensor:
        """What each sample's loss is multiplied with before the mean over the batch: M N_k / (N m_k), m_k its draws.

        With one draw from each of the M clusters this is M N_k / N.  In torch's default dtype, shape of `indices`.
        """
        indices = torch.as_tensor(indices, device="cpu").long()
        N = len(self.assignments)
        if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < N):
            raise ValueError(f"indices reach from {int(indices.min())} to {int(indices.max())}; expected 0 to {N - 1}.")
        k = self._number[self.assignments[indices]]
        value = self.samples_per_batch * self._sizes[k].double() / (N * self._draws[k])
        return value.to(torch.get_default_dtype())

    def update(self, assignments: Tensor, deviations: Tensor | None = None) -> None:
        """Draw from other clusters from the next batch on.  Batches drawn before have the weights of the old ones."""
        self._place(assignments, deviations)
        self._shuffle_all()

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on."""
        return {
            "assignments": self.assignments.clone(), "draws": self._draws.clone(), "seed": self.seed,
            "epoch": self.epoch, "orders": [list(o) for o in self._orders], "at": list(self._at),
            "generator": self._generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the batch after the last one that was drawn when the state was taken."""
        kept = self.allocation, self.batch_size
        self.allocation, self.batch_size = "one", None  # the draws are those of the state
        try:
            self._place(state["assignments"], None)
        finally:
            self.allocation, self.batch_size = kept
        self._draws = state["draws"].clone()
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._orders, self._at = [list(o) for o in state["orders"]], list(state["at"])
        self._generator.set_state(state["generator"])


ALLOCATIONS = ("one", "proportional", "neyman")


def allocate(allocation: str, sizes: Tensor, batch_size: int | None, deviations: Tensor | None = None) -> Tensor:
    """Draws m_k >= 1 from strata of N_k = `sizes` samples, int64 [K]; they add up to `batch_size` (K for "one").

    "proportional": m_k ~ N_k.  "neyman": m_k ~ N_k S_k with the `deviations` S_k, which minimises the variance
    N^-2 sum_k N_k^2 S_k^2 / m_k.  Rounded down, what is left going where it lowers the sum of (ideal)^2 / m_k most.
    """
    check_choice("allocation", allocation, ALLOCATIONS)
    K = len(sizes)
    if allocation == "one":
        if batch_size is not None and batch_size != K:
            raise ValueError(f"batch_size is {batch_size} with allocation='one', which draws one sample from "
                             f"each of the {K} non-empty clusters; leave it out, or use another one.")  # fmt: skip
        return torch.ones(K, dtype=torch.int64, device="cpu")
    if batch_size is None or batch_size < K:
        raise ValueError(f"batch_size is {batch_size} with allocation={allocation!r} and {K} non-empty clusters; "
                         f"expected at least {K}, one draw from each.")  # fmt: skip
    share = sizes.double()
    if allocation == "neyman":
        if deviations is None:
            raise ValueError("allocation='neyman' needs deviations, the spread of the gradients in each cluster; pass "
                             "clusters.deviations.")  # fmt: skip
        if not (torch.isfinite(deviations).all() and (deviations >= 0).all()):
            raise ValueError("deviations hold negative or infinite numbers; expected finite ones, at least 0.")
        share = share * deviations
    if share.sum() == 0:
        share = torch.ones_like(share)
    ideal = batch_size * share / share.sum()
    draws = ideal.floor().clamp(min=1).long()
    while int(draws.sum()) > batch_size:  # from raising small ones to one
        loss = torch.where(draws > 1, ideal.square() * (1 / (draws - 1).clamp(min=1) - 1 / draws), torch.inf)
        draws[loss.argmin()] -= 1
    while int(draws.sum()) < batch_size:
        draws[(ideal.square() * (1 / draws - 1 / (draws + 1))).argmax()] += 1
    return draws
