"""How much a mini-batch quadratic misjudges the directions that were chosen with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Chunks, Output, sample_count, take
from paraboloid.linalg.operand import check_count
from paraboloid.passes import trees
from paraboloid.passes.memory import MEASURED
from paraboloid.quadratics.bias_result import WHICH, Bias
from paraboloid.quadratics.local_model import CURVATURES, Quadratic, quadratic

DIRECTIONS = ("eigen", "cg", "kfac", "ekfac")
CHUNK = 512  # samples of the full data that are evaluated together
PARTS = 16  # of a subset that stands for the full data: its standard error is that of their mean
EIGEN_TOLERANCE = 1e-4  # relative residual of eigenvectors; curvatures along them are off by its square


def bias(
    model: nn.Module,
    loss_fn: Any,
    dataset: Any,
    batch_size: int = 128,
    k: int = 10,
    repeats: int = 15,
    directions: str = "eigen",
    curvature: str = "ggn",
    weight_decay: float = 0.0,
    seed: int = 0,
    *,
    damping: float = 0.0,
    full_samples: int | None = None,
    overlap: bool | Tensor = False,
    output: Output | None = None,
    max_memory: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Bias:
    """Measure the bias of mini-batch quadratics in slope and curvature along directions that a batch chose.

    Each of `repeats` times, two disjoint batches of `batch_size` samples are drawn; k directions are taken from the
    first, and slope and curvature along them are found on the first, on the second and on all data.

    dataset       a map-style dataset of (input, target), or a pair of tensors (inputs, targets); its samples are moved
                  to the model's device
    directions    "eigen": the top k eigenvectors of the first batch's curvature; "cg": its first k conjugate
                  directions, with `damping` added to the curvature; "kfac", "ekfac": the top eigenvectors of its
                  Kronecker factors, by KFAC's or EKFAC's eigenvalue
    curvature     "ggn", "hessian" or "fisher" (one label drawn for each sample, once)
    weight_decay  part of all three quadratics
    full_samples  so many samples, drawn once, stand for all data; the result carries the standard error of that
    overlap       measure the overlap with the directions of all data too, which are then computed once; or those
                  directions themselves, [k, D], where they are known
    max_memory    bytes of recorded graphs kept for the full data, see `paraboloid.operators`
    progress      called as progress(done, repeats) after each repeat

    Same-batch curvatures along top eigenvectors are overstated, for the batch's noise helped to choose them; an
    independent batch is unbiased for the data without the first batch.  Source: arXiv:2410.14325.
    """
    samples = sample_count(dataset)
    for name, count in (("batch_size", batch_size), ("repeats", repeats)):
        check_count(name, count)
    if 2 * batch_size > samples:
        raise ValueError(f"batch_size is {batch_size} for {samples} samples; expected at most {samples // 2}, so that "
                         "two disjoint batches exist.")  # fmt: skip
    if directions not in DIRECTIONS:
        raise ValueError(f"directions is {directions!r}; expected one of {list(DIRECTIONS)}.")
    if curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}; expected one of {list(CURVATURES)}.")
    if full_samples is not None and not PARTS <= full_samples <= samples:
        raise ValueError(f"full_samples is {full_samples}; expected an integer in {PARTS}..{samples}, the number of "
                         "samples, or None for all.")  # fmt: skip
    parameters = trees.parameters(model)
    size = sum(p.numel() for p in parameters.values())
    check_count("k", k, most=size)
    if isinstance(overlap, Tensor) and overlap.shape != (k, size):
        raise ValueError(f"overlap has shape {tuple(overlap.shape)}; expected the directions of all data, [{k}, "
                         f"{size}], or True.")  # fmt: skip
    device = next(iter(parameters.values())).device

    def fit(data: Any) -> Quadratic:
        return quadratic(model, loss_fn, data, curvature, weight_decay, output=output, seed=seed, max_memory=max_memory)

    def choose(q: Quadratic) -> Tensor:
        if directions == "eigen":
            return q.eigen_directions(k, tol=EIGEN_TOLERANCE, seed=seed)
        if directions == "cg":
            return q.conjugate_directions(k, damping, seed=seed)
        return q.kron_directions(k, corrected=directions == "ekfac")

    chunk = max(CHUNK, batch_size)
    everything = Chunks(dataset, chunk, device)
    if full_samples is None:
        full = AllData([fit(everything)])
    else:
        chosen = torch.randperm(samples, generator=torch.Generator().manual_seed(seed + 1))[:full_samples]
        parts = [Selected(dataset, part, chunk, device) for part in chosen.tensor_split(PARTS)]
        full = AllData([fit(part) for part in parts], [len(p.indices) for p in parts], samples)
        everything = Selected(dataset, chosen, chunk, device)
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[tuple[Tensor, ...]]] = {which: [] for which in WHICH}
    waiting: list[Tensor] = []  # directions not yet measured on the full data, which may have to be read for it

    def measure_on_full() -> None:
        found["full"].extend(zip(*(values.split(k) for values in full.along(torch.cat(waiting))), strict=True))
        waiting.clear()

    overlaps: list[Tensor] = []
    if overlap is False:
        basis = None
    elif isinstance(overlap, Tensor):
        basis = orthonormal(overlap)
    else:
        basis = orthonormal(choose(full.parts[0] if len(full.parts) == 1 else fit(everything)))
    for repeat in range(repeats):
        first, second = torch.randperm(samples, generator=generator)[: 2 * batch_size].split(batch_size)
        same, other = (fit(take(dataset, indices, device)) for indices in (first, second))
        rows = choose(same)
        if basis is not None:
            overlaps.append((orthonormal(rows) @ basis.T).square().sum() / k)
        slopes, curvatures = same.along(rows)
        downhill = torch.where(slopes > 0, -1.0, 1.0).to(rows)
        rows = downhill.unsqueeze(1) * rows
        found["same"].append((downhill * slopes, curvatures))
        found["other"].append(other.along(rows))
        waiting.append(rows)
        if sum(r.nbytes for r in waiting) + rows.nbytes > MEASURED.of():
            measure_on_full()
        if progress is not None:
            progress(repeat + 1, repeats)
    if waiting:
        measure_on_full()

    def stacked(which: str, i: int) -> Tensor:
        return torch.stack([values[i] for values in found[which]]).double().cpu()

    return Bias(
        {which: stacked(which, 1) for which in WHICH},
        {which: stacked(which, 0) for which in WHICH},
        batch_size, samples, directions, curvature, weight_decay, seed, full_samples,
        None if full_samples is None else {"slope": stacked("full", 2), "curvature": stacked("full", 3)},
        torch.stack(overlaps).double().cpu() if overlaps else None,
    )  # fmt: skip


class AllData:
    """The quadratic of all data; or that of a random subset in parts, with the standard error of their mean."""

    def __init__(self, parts: list[Quadratic], sizes: list[int] | None = None, samples: int = 0):
        self.parts, self.sizes, self.samples = parts, sizes, samples

    def along(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Slopes and curvatures, then (of a subset) their standard errors: [k] each."""
        found = [part.along(rows) for part in self.parts]
        if self.sizes is None:
            return found[0]
        drawn, n = sum(self.sizes), len(self.parts)
        weights = torch.tensor(self.sizes).to(rows) / drawn
        values = [torch.stack([f[i] for f in found]) for i in (0, 1)]
        means = [weights @ v for v in values]
        rest = 1 - drawn / self.samples  # nothing is uncertain once all samples were drawn
        spreads = [(weights.unsqueeze(1) * (v - m)).square().sum(0) for v, m in zip(values, means, strict=True)]
        return (*means, *(spread.mul(rest * n / (n - 1)).sqrt() for spread in spreads))


class Selected:
    """Some samples of a map-style dataset as batches of `size`; can be iterated again."""

    def __init__(self, dataset: Any, indices: Tensor, size: int, device: torch.device):
        self.dataset, self.indices, self.size, self.device = dataset, indices, size, device

    def __iter__(self) -> Iterator[Any]:
        for indices in self.indices.split(self.size):
            yield take(self.dataset, indices, self.device)


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span."""
    return torch.linalg.qr(rows.T).Q.T
