"""Cluster the samples of a dataset by their gradients, so that sampling one from each cluster has little variance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from paraboloid.data.batches import Batch, Output, Samples
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.noise.assignment import COUNTS, assign
from paraboloid.noise.centre_products import mean_sides, order_of, products, sums
from paraboloid.noise.centres import Centres, start
from paraboloid.noise.gradients import Gradients, pull
from paraboloid.passes import trees
from paraboloid.passes.memory import ASSIGNED
from paraboloid.reductions.outer import Outer, Zero
from paraboloid.reductions.products import Lookup, OnePosition, Products, Vector, keep_inputs, merge

UPDATES = ("singular", "mean")
Layers = Iterable[str] | Callable[[str], bool] | None


class Known(NamedTuple):
    """What a batch needs of one parameter's centres: ||C_k||^2 [K], and the basis of the side that is kept."""

    square_norms: Tensor
    basis: Tensor


class GradientClustering:
    """Weighted clustering of the samples' gradients g_n, with centres of low rank for each parameter.

    Minimises sum_k N_k sum_{i in k} ||g_i - C_k||^2, N^2 times the variance of the stratified estimator
    1/N sum_k N_k g_{k,j} with one uniform draw j from each cluster, which is unbiased.  The squared distance is summed
    over all parameters, weights and biases alike, before the clusters are compared; every parameter has a centre of its
    own: C_k = sum_r d_r (x) c_r for a weight, an exact vector for a bias, a scale or a raw parameter.

    num_clusters  K
    rank          of the centres, at most
    counts        "running": the sizes N_k grow sample by sample while a pass assigns them.  "fixed" (sizes of the pass
                  before, as the paper's text has it) FAILS: it herds the samples into few clusters and gives several
                  times the variance of plain sampling; it is there to show that.  "none" ignores the sizes (k-means)
    update        "singular": one side of a centre is refitted to the cluster's mean gradient in each pass, the sides
                  in turn, which is subspace iteration: it tends to the top singular vectors.  "mean": c is the mean of
                  the inputs (over positions too), d that of the output gradients (summed over positions); rank 1
                  only, and parameters without outer-product form are updated by "singular"
    min_size      a cluster with fewer samples after a pass takes half of the one with the largest N_k sum ||g - C||^2;
                  one such split in each pass
    layers        names of modules or parameters, or a predicate of a parameter's name: whose gradients are compared
    decay         None: centres move at the end of a pass.  A number such as .99: they move after every batch, sizes
                  and sums being decayed averages over the batches ("online")
    seed          of the first centres, the order of the samples, splits, and dropout in a model in training mode
    verify        how often sample independence is certified: "auto" (on the first batch of a pass, and there as
                  `pb.record` does; other batches "once"), "once", "always" or False

    After `fit`: `assignments` [N] int64, `sizes` [K], `distances` [N] (squared, to the own cluster's centre when it was
    assigned), `square_norms` [N], `distortions` [K] (sum of its distances), `centres` (name -> Centres), `passes`,
    `changed` (assignments that the last pass changed) and `converged`.

    Raises ValueError for arguments out of range, and where samples are not independent (batch norm in training mode).
    Source: Faghri et al. 2020, arXiv:2007.04532; the running counts are those of the authors' code.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFunction, num_clusters: int = 10, *, rank: int = 1,
        counts: str = "running", update: str = "singular", min_size: int = 1, layers: Layers = None,
        decay: float | None = None, seed: int = 0, output: Output | None = None, max_memory: int | None = None,
        verify: str | bool = "auto",
    ):  # fmt: skip
        for name, value, least in (("num_clusters", num_clusters, 1), ("rank", rank, 1), ("min_size", min_size, 0)):
            check_count(name, value, least)
        check_choice("counts", counts, COUNTS)
        check_choice("update", update, UPDATES)
        if update == "mean" and rank > 1:
            raise ValueError(f"rank is {rank} with update='mean', which has rank 1; use update='singular'.")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected a number in [0, 1), such as 0.99, or None.")
        self.model, self.loss_fn, self.num_clusters = model, loss_fn, num_clusters
        self.rank, self.counts, self.update, self.min_size = rank, counts, update, min_size
        self.layers, self.decay, self.seed, self.output = layers, decay, seed, output
        self.max_memory, self.verify = max_memory, verify
        self.centres: dict[str, Centres] = {}
        self.passes, self.updates, self.changed, self.converged = 0, 0, 0, False
        self.mass = np.zeros(num_clusters)  # decayed sizes, of the online mode
        self._fitted: dict[str, Tensor] = {}
        self._known: dict[str, Known] = {}  # of the centres while they stand still
        self._generator = torch.Generator().manual_seed(seed)

    # --- results -------------------------------------------------------------------------------------------------

    @property
    def assignments(self) -> Tensor:
        """The cluster of each sample, int64 [N]."""
        return self._result("assignments")

    @property
    def distances(self) -> Tensor:
        """Squared distance of each sample to the centre that it was assigned to, [N]."""
        return self._result("distances")

    @property
    def square_norms(self) -> Tensor:
        """||g_n||^2 over the clustered parameters, [N]."""
        return self._result("square_norms")

    @property
    def sizes(self) -> Tensor:
        """Samples of each cluster, int64 [K]."""
        return torch.bincount(self.assignments, minlength=self.num_clusters)

    @property
    def distortions(self) -> Tensor:
        """Sum over each cluster of the squared distances to its centre, [K]."""
        return torch.zeros(self.num_clusters, dtype=torch.float64, device="cpu").index_add_(
            0, self.assignments, self.distances
        )

    @property
    def deviations(self) -> Tensor:
        """Root mean squared distance in each cluster, [K]; for variance-optimal allocation."""
        return (self.distortions / self.sizes.clamp(min=1)).sqrt()

    @property
    def elements(self) -> int:
        """Numbers that all centres keep: the sum over parameters of K r (p + q) (K p for a bias)."""
        return sum(c.elements for c in self.centres.values())

    def _result(self, name: str) -> Tensor:
        if name not in self._fitted:
            raise ValueError(f"the clustering has no {name} yet; call fit(dataset) first.")
        return self._fitted[name]

    # --- fitting -------------------------------------------------------------------------------------------------

    def fit(
        self, dataset: Samples, batch_size: int = 256, passes: int = 3, *, until_stable: bool = False,
        max_passes: int = 50, progress: Callable[[int, int], None] | None = None,
    ) -> GradientClustering:  # fmt: skip
        """Run `passes` passes over a map-style dataset, from the centres as they are; returns self.

        until_stable  go on, up to `max_passes` in all, until a pass changes no assignment; `converged` says whether
                      it did
        progress      called as progress(samples done, samples in all) after each batch
        """
        for name, value in (("batch_size", batch_size), ("passes", passes)):
            check_count(name, value)
        data = Gradients(self.model, self.loss_fn, dataset, self.seed, self.output)
        N = data.samples
        if self.num_clusters > N:
            raise ValueError(f"num_clusters is {self.num_clusters} for {N} samples; expected at most {N}.")
        if len(self._fitted.get("assignments", torch.empty(N, device="cpu"))) != N:
            self._fitted = {}
        # one order for all passes: with another in each, running sizes would never settle
        order = torch.randperm(N, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        most = max(passes, max_passes) if until_stable else passes
        self.converged = False
        for i in range(most):
            before = self._fitted.get("assignments")
            self._pass(data, order, batch_size, (i * N, (most if until_stable else passes) * N), progress)
            now = self.assignments
            self.changed = N if before is None else int((now != before).sum())
            self.converged = self.changed == 0
            if until_stable and self.converged and i + 1 >= passes:
                break
        return self

    def _pass(self, data: Gradients, order: Tensor, size: int, done: tuple[int, int], progress) -> None:
        N = data.samples
        found = {
            "assignments": torch.empty(N, dtype=torch.int64, device="cpu"),
            "distances": torch.empty(N, dtype=torch.float64, device="cpu"),
            "square_norms": torch.empty(N, dtype=torch.float64, device="cpu"),
        }
        weights = np.zeros(self.num_clusters)
        if self.counts == "fixed":
            weights[:] = self.sizes.numpy() if "assignments" in self._fitted else N / self.num_clusters
        running: dict[tuple[str, str], Tensor] = {}
        parameters, seen = data.parameters, 0
        for indices, batch in data.batches(order, size):
            if self.decay is not None:
                weights = self.decay * self.mass
            verify = "once" if seen and self.verify == "auto" else self.verify
            cluster, distances, norms = self._batch(data, batch, parameters, weights, running, verify)
            found["assignments"][indices] = cluster
            found["distances"][indices] = distances[torch.arange(len(cluster)), cluster]
            found["square_norms"][indices] = norms
            seen += len(indices)
            if self.decay is not None:
                before, self.mass = self.mass, self.decay * self.mass + (1 - self.decay) * _counted(cluster, weights)
                self._move(running, self.mass, before)
                running = {}
            if progress is not None:
                progress(done[0] + seen, done[1])
        self._fitted = found
        if self.decay is None:
            self._move(running, self.sizes.double().numpy(), None)
        self.passes += 1
        self._split()

    @torch.no_grad()
    def _batch(
        self,
        data: Gradients,
        batch: Batch,
        parameters: dict[str, nn.Parameter],
        weights: np.ndarray,
        running: dict[tuple[str, str], Tensor],
        verify: str | bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Assign one batch and add to the sums from which the centres are refitted."""
        uses = self._pulled(data, batch, parameters, verify)
        keep, memory = ASSIGNED.of(self.max_memory), self.max_memory
        centres = {name: self._centres_of(name, o) for name, o in uses.items()}
        keep_inputs((o for k, o in uses.items() if self._reads_twice(o, centres[k])), keep)
        distances, norms = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        gradients: dict[str, Tensor | None] = {}
        for name, o in uses.items():
            found = products(o, centres[name], memory, keep=keep)
            if (J := found.gradients) is not None and self.update == "singular":
                gradients[name] = J
                keep -= J.nbytes
            norm = found.norms.double().cpu()
            parts = torch.add(norm[:, None], found.cross.cpu(), alpha=-2)  # in double precision, as the norms are
            distances = distances + parts.add_(self._known_of(name).square_norms).clamp_(min=0)
            norms = norms + norm
        gain = 1.0 if self.decay is None else 1 - self.decay
        cluster = assign(distances, weights, self.counts, gain)
        for name, o in uses.items():
            there = cluster.to(o.left.device)
            found = self._sums(name, o, centres[name], there, memory, gradients.get(name))
            for side, value in found.items():
                key = name, side
                running[key] = value if key not in running else running[key].add_(value)
        return cluster, distances, norms

    def _pulled(self, data: Gradients, batch: Batch, names: Iterable[str], verify: str | bool) -> dict[str, Outer]:
        outers = pull(self.model, data.loss, batch, self.seed, self.output, verify)
        chosen = {k: merge(uses) for k, uses in outers.items() if self._chosen(k, names)}
        return {k: o for k, o in chosen.items() if not isinstance(o, Zero)}

    def _chosen(self, name: str, names: Iterable[str]) -> bool:
        if self.layers is None:
            return True
        if callable(self.layers):
            return bool(self.layers(name))
        wanted = [self.layers] if isinstance(self.layers, str) else list(self.layers)
        for layer in wanted:
            if not any(each == layer or each.startswith(f"{layer}.") for each in names):
                raise ValueError(f"layers names {layer!r}, which is no parameter and no module with one; expected of "
                                 f"{list(names)}, or modules that hold them.")  # fmt: skip
        return any(name == layer or name.startswith(f"{layer}.") for layer in wanted)

    def _centres_of(self, name: str, o: Outer) -> Centres:
        if name not in self.centres:
            self.centres[name] = start(
                o.block, self.num_clusters, self.rank, o.left, self._generator, o.shape, o.flip
            )  # fmt: skip
        if (had := self.centres[name].block) != o.block:
            raise ValueError(f"parameter {name!r} has gradients in blocks [G, p, q] = {list(o.block)}, but its centres "
                             f"have {list(had)}; expected the same use of it in every batch.")  # fmt: skip
        return self.centres[name]

    # --- the centres ---------------------------------------------------------------------------------------------

    def _kept(self, centres: Centres) -> str:
        """The side that stays while the other is refitted: they take turns; a bias has only a left side."""
        if centres.block[2] == 1:
            return "right"
        return "left" if centres.block[1] == 1 or self.updates % 2 else "right"

    def _reads_twice(self, o: Outer, centres: Centres) -> bool:
        """Whether the update needs the inputs too: the gradients themselves were not formed, or do not serve."""
        if not isinstance(o, Products) or isinstance(o, OnePosition | Lookup):
            return False
        return self.update == "mean" or order_of(o, centres) == "gram"

    def _known_of(self, name: str) -> Known:
        if name not in self._known:
            centres = self.centres[name]
            basis = centres.basis(self._kept(centres)) if centres.block[2] > 1 else centres.right.permute(0, 2, 3, 1)
            self._known[name] = Known(centres.square_norms().double().cpu(), basis)
        return self._known[name]

    def _sums(
        self, name: str, o: Outer, centres: Centres, cluster: Tensor, memory: int | None, J: Tensor | None
    ) -> dict[str, Tensor]:
        if self.update == "mean" and isinstance(o, Products | Vector):
            left, right = mean_sides(o, cluster, self.num_clusters, memory)
            return {"mean left": left, "mean right": right}
        kept = self._kept(centres)
        return {f"kept {kept}": sums(o, kept, self._known_of(name).basis, cluster, memory, J)}

    def _move(self, running: dict[tuple[str, str], Tensor], sizes: np.ndarray, before: np.ndarray | None) -> None:
        """Refit the centres; with `before`, sums of one batch are added to decayed ones, of which centres are means."""
        size = torch.from_numpy(sizes)
        for (name, what), total in running.items():
            centres = self.centres[name]
            side = "left" if what in ("mean left", "kept right") else "right"
            old: Tensor = getattr(centres, side)
            basis = self._known_of(name).basis if what.startswith("kept") else None
            if before is not None:
                assert self.decay is not None
                past = old
                if basis is not None:  # the old centre, seen through the columns of the side that is kept
                    other = centres.right if side == "left" else centres.left
                    past = torch.einsum("ksgp,ksgq,kgqr->krgp", old, other, basis)
                past = past * (self.decay * torch.from_numpy(before)).to(past).view(-1, 1, 1, 1)
                total = past + (1 - self.decay) * total
            full = (size > 0).to(total.device).view(-1, 1, 1, 1)
            mean = total / size.to(total).clamp(min=1e-300 if total.dtype == torch.float64 else 1e-30).view(-1, 1, 1, 1)
            setattr(centres, side, torch.where(full, mean, old))
            if basis is not None and centres.block[2] > 1:
                other = "right" if side == "left" else "left"
                columns = basis.permute(0, 3, 1, 2)
                setattr(centres, other, torch.where(full, columns, getattr(centres, other)))
        self.updates += 1
        self._known = {}

    def _split(self) -> None:
        """The smallest cluster, if it has fewer than `min_size` samples, takes half of the most distorted one."""
        sizes = self.sizes
        small = int(sizes.argmin())
        if sizes[small] >= self.min_size:
            return
        large = int((sizes * self.distortions).argmax())
        members = torch.nonzero(self.assignments == large).flatten()
        if large == small or len(members) < 2:
            return
        taken = members[torch.randperm(len(members), generator=self._generator, device="cpu")[: len(members) // 2]]
        self._fitted["assignments"][taken] = small
        for centres in self.centres.values():
            centres.left[small], centres.right[small] = centres.left[large], centres.right[large]
        share = len(taken) / len(members)
        self.mass[small] += share * self.mass[large]
        self.mass[large] *= 1 - share

    # --- saving --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that fitting goes on from, as plain data and tensors for `torch.save`."""
        return {
            "num_clusters": self.num_clusters,
            "centres": {
                k: {"left": c.left.clone(), "right": c.right.clone(), "shape": list(c.shape), "flip": c.flip}
                for k, c in self.centres.items()
            },
            "fitted": {k: v.clone() for k, v in self._fitted.items()},
            "mass": torch.from_numpy(self.mass.copy()),
            "generator": self._generator.get_state(),
            "passes": self.passes,
            "updates": self.updates,
            "changed": self.changed,
            "converged": self.converged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; a resumed fit equals the uninterrupted one bit for bit."""
        if state["num_clusters"] != self.num_clusters:
            raise ValueError(f"the state has {state['num_clusters']} clusters and this clustering has "
                             f"{self.num_clusters}; expected the same number.")  # fmt: skip
        device = next(iter(trees.parameters(self.model).values())).device
        self.centres = {
            k: Centres(c["left"].to(device, copy=True), c["right"].to(device, copy=True), torch.Size(c["shape"]),
                       c["flip"])
            for k, c in state["centres"].items()
        }  # fmt: skip
        self._fitted = {k: v.clone() for k, v in state["fitted"].items()}
        self.mass = state["mass"].numpy().copy()
        self._known = {}
        self._generator.set_state(state["generator"])
        self.passes, self.updates = state["passes"], state["updates"]
        self.changed, self.converged = state["changed"], state["converged"]


def _counted(cluster: Tensor, like: np.ndarray) -> np.ndarray:
    return np.bincount(cluster.numpy(), minlength=len(like)).astype(np.float64)
