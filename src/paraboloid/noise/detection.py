"""What clusters say about the data: prototypes and outliers, samples that look mislabelled, and duplicates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Output, Samples
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import Loss, LossFunction
from paraboloid.losses.loss import full
from paraboloid.noise.centre_products import products
from paraboloid.noise.centres import Centres, start
from paraboloid.noise.clustering import GradientClustering
from paraboloid.noise.gradients import Gradients, pull
from paraboloid.passes.random_state import isolated
from paraboloid.passes.wrappers import unwrapped
from paraboloid.reductions.outer import Zero
from paraboloid.reductions.products import merge

SCORES = ("distance", "norm", "loss")


@dataclass(frozen=True)
class Members:
    """One cluster: its number and size, `spread` (mean squared distance), and the nearest and farthest samples."""

    cluster: int
    size: int
    spread: float
    prototypes: list[int]
    outliers: list[int]


def members(clusters: GradientClustering, count: int = 5) -> list[Members]:
    """The `count` samples nearest to the centre of each non-empty cluster, and the farthest, most extreme first."""
    check_count("count", count)
    found = []
    sizes, distances = clusters.sizes, clusters.distances
    for k in torch.nonzero(sizes).flatten().tolist():
        mine = torch.nonzero(clusters.assignments == k).flatten()
        order = mine[distances[mine].argsort(stable=True)].tolist()
        prototypes = order[:count]
        outliers = [i for i in reversed(order) if i not in prototypes][:count]
        found.append(Members(k, len(mine), float(distances[mine].mean()), prototypes, outliers))
    return found


def suspicion(clusters: GradientClustering, dataset: Samples | None = None, score: str = "loss") -> Tensor:
    """How much each sample looks mislabelled, [N]; larger is more suspicious.

    "loss": its loss, which needs `dataset`; "distance": squared distance of its gradient to its cluster's centre;
    "norm": that of its gradient.  The loss ranked best in our measurements, the distance close
    behind at the end of training: see the page on gradient noise.
    """
    check_choice("score", score, SCORES)
    if score == "distance":
        return clusters.distances
    if score == "norm":
        return clusters.square_norms
    if dataset is None:
        raise ValueError("score='loss' needs the dataset; pass it.")
    return sample_losses(clusters.model, clusters.loss_fn, dataset, output=clusters.output)


@torch.no_grad()
def sample_losses(
    model: nn.Module, loss_fn: LossFunction, dataset: Samples, *, batch_size: int = 512, output: Output | None = None
) -> Tensor:
    """The unreduced loss of each sample, [N], float64."""
    data, loss = Gradients(model, loss_fn, dataset, output=output), Loss.from_torch(loss_fn)
    found = []
    for _, (inputs, y) in data.batches(torch.arange(data.samples, device="cpu"), batch_size):
        with isolated(model, y.device, 0):
            f = batch_data.evaluate(unwrapped(model), inputs, output)
        loss.check(f, y)
        found.append(loss.sample_losses(full(f), y).double().cpu())
    return torch.cat(found)


def precision_at(scores: Tensor, truth: Tensor, k: int) -> float:
    """Share of `truth` (bool [N]) among the k samples with the largest scores."""
    check_count("k", k, most=len(scores))
    return float(truth[scores.argsort(descending=True, stable=True)[:k]].double().mean())


def duplicates(
    model: nn.Module, loss_fn: LossFunction, dataset: Samples, *, tolerance: float = 1e-4,
    output: Output | None = None, batch_size: int = 256, sketch: int = 16, seed: int = 0,
) -> list[list[int]]:  # fmt: skip
    """Groups of samples with equal gradients, up to `tolerance` times their norm; largest group first.

    Each gradient is known by its norm and its products with `sketch` random centres of rank one.  Samples whose
    distance in all of them (scaled by the root mean square of each column) is within the tolerance of a neighbour in
    the order of the first are one group.  Equal inputs and targets always have equal gradients; the converse is not
    certain, above all where gradients vanish (a fitted network): samples with gradients below 1e-12 of the largest
    are left out.
    """
    check_count("sketch", sketch)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; expected a number between 0 and 1.")
    prints, norms = _fingerprints(model, loss_fn, dataset, sketch, seed, output, batch_size)
    prints = prints / norms.sqrt().clamp(min=1e-300)[:, None]
    scale = prints.square().mean(0).sqrt().clamp(min=1e-300)
    values = torch.cat([prints / scale, norms.sqrt().clamp(min=1e-300).log()[:, None]], 1)
    alive = torch.nonzero(norms > 1e-24 * norms.max()).flatten()
    parent = list(range(len(norms)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    order = alive[values[alive, -1].argsort(stable=True)].tolist()
    ordered = values[order].numpy()
    for a in range(len(order)):
        b = a + 1
        while b < len(order) and ordered[b, -1] - ordered[a, -1] <= tolerance:
            if abs(ordered[b] - ordered[a]).max() <= tolerance:
                parent[root(order[b])] = root(order[a])
                break  # further ones are neighbours of this one
            b += 1
    groups: dict[int, list[int]] = {}
    for i in alive.tolist():
        groups.setdefault(root(i), []).append(i)
    return sorted((g for g in groups.values() if len(g) > 1), key=lambda g: (-len(g), g))


def _fingerprints(model, loss_fn, dataset, sketch: int, seed: int, output, batch_size: int) -> tuple[Tensor, Tensor]:
    """Products of each gradient with random centres, [N, sketch], and squared norms [N]; float64."""
    data = Gradients(model, loss_fn, dataset, seed, output)
    generator = torch.Generator().manual_seed(seed)
    rows, norms = [], []
    centres: dict[str, Centres] = {}
    for _, batch in data.batches(torch.arange(data.samples, device="cpu"), batch_size):
        cross, norm = torch.zeros((), device="cpu"), torch.zeros((), device="cpu")
        with torch.no_grad():
            for name, uses in pull(model, data.loss, batch, seed, output, "auto").items():
                o = merge(uses)
                if isinstance(o, Zero):
                    continue
                if name not in centres:
                    made = start(o.block, sketch, 1, o.left, generator, o.shape, o.flip)
                    for side in (made.left, made.right):  # signs, not the positive numbers that centres start with
                        if side.shape[3] > 1 or side is made.left:
                            side.copy_(torch.randn(side.shape, generator=generator, dtype=torch.float64, device="cpu"))
                    centres[name] = made
                found = products(o, centres[name])
                cross, norm = cross + found.cross.double().cpu(), norm + found.norms.double().cpu()
        rows.append(cross)
        norms.append(norm)
    return torch.cat(rows), torch.cat(norms)
