"""How much a mini-batch quadratic misjudges the directions that were chosen with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Chunks, Data, Output, Samples, sample_count, take
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.passes import trees
from paraboloid.passes.memory import MEASURED
from paraboloid.quadratics.bias_result import WHICH, Bias
from paraboloid.quadratics.local_model import CURVATURES, DIRECTIONS, Quadratic, chosen, quadratic

CHUNK = 512  # samples of the full data that are evaluated together
PARTS = 16  # of a subset that stands for the full data: its standard error is that of their mean
EIGEN_TOLERANCE = 1e-4  # relative residual of eigenvectors; curvatures along them are off by its square


def bias(
    model: nn.Module,
    loss_fn: LossFunction,
    dataset: Samples,
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
    samples, parameters = sample_count(dataset), trees.parameters(model)
    size, device = sum(p.numel() for p in parameters.values()), next(iter(parameters.values())).device
    _check_counts(samples, batch_size, repeats, full_samples)
    check_choice("directions", directions, list(DIRECTIONS))
    check_choice("curvature", curvature, list(CURVATURES))
    check_count("k", k, most=size)
    if isinstance(overlap, Tensor) and overlap.shape != (k, size):
        raise ValueError(f"overlap has shape {tuple(overlap.shape)}; expected the directions of all data, [{k}, "
                         f"{size}], or True.")  # fmt: skip

    def fit(data: Data) -> Quadratic:
        return quadratic(model, loss_fn, data, curvature, weight_decay, output=output, seed=seed, max_memory=max_memory)

    def choose(q: Quadratic) -> Tensor:
        return chosen(q, directions, k, damping, seed, EIGEN_TOLERANCE)

    chunks = partial(Chunks, dataset, max(CHUNK, batch_size), device)
    full, everything = _all_data(samples, full_samples, seed, fit, chunks)
    basis = None
    if overlap is not False:
        known = isinstance(overlap, Tensor)
        basis = orthonormal(overlap if known else choose(full.parts[0] if full.sizes is None else fit(everything)))
    measured, overlaps = Measurements(full), list[Tensor]()
    generator = torch.Generator().manual_seed(seed)
    for repeat in range(repeats):
        batches = torch.randperm(samples, generator=generator, device="cpu")[: 2 * batch_size].split(batch_size)
        same, other = (fit(take(dataset, indices, device)) for indices in batches)
        rows = choose(same)
        if basis is not None:
            overlaps.append((orthonormal(rows) @ basis.T).square().sum() / k)
        measured.add(rows, same, other)
        if progress is not None:
            progress(repeat + 1, repeats)
    slope, values, *errors = measured.finished()
    return Bias(
        values, slope, batch_size, samples, directions, curvature, weight_decay, seed, full_samples,
        dict(zip(("slope", "curvature"), (error["full"] for error in errors), strict=True)) if errors else None,
        torch.stack(overlaps).double().cpu() if overlaps else None,
    )  # fmt: skip


def _check_counts(samples: int, batch_size: int, repeats: int, full_samples: int | None) -> None:
    check_count("batch_size", batch_size)
    check_count("repeats", repeats)
    if 2 * batch_size > samples:
        raise ValueError(f"batch_size is {batch_size} for {samples} samples; expected at most {samples // 2}, so that "
                         "two disjoint batches exist.")  # fmt: skip
    if full_samples is not None and not PARTS <= full_samples <= samples:
        raise ValueError(f"full_samples is {full_samples}; expected an integer in {PARTS}..{samples}, the number of "
                         "samples, or None for all.")  # fmt: skip


def _all_data(
    samples: int, full_samples: int | None, seed: int, fit: Callable[[Data], Quadratic], chunks: Callable[..., Chunks]
) -> tuple[AllData, Chunks]:
    """What stands for all data: its quadratic, and its samples."""
    if full_samples is None:
        everything = chunks()
        return AllData([fit(everything)]), everything
    drawn = torch.randperm(samples, generator=torch.Generator().manual_seed(seed + 1), device="cpu")[:full_samples]
    parts = drawn.tensor_split(PARTS)
    return AllData([fit(chunks(part)) for part in parts], [len(part) for part in parts], samples), chunks(drawn)


class Measurements:
    """Slopes and curvatures along directions, on the batch that chose them, on another and on all data.

    Directions wait for the measurement on all data, which may have to be read for each.
    """

    def __init__(self, full: AllData):
        self.full, self.waiting = full, list[Tensor]()
        self.found: dict[str, list[tuple[Tensor, ...]]] = {which: [] for which in WHICH}

    def add(self, rows: Tensor, same: Quadratic, other: Quadratic) -> None:
        """Directions [k, D] that the batch of `same` chose; they are turned downhill there."""
        slopes, curvatures = same.along(rows)
        downhill = torch.where(slopes > 0, -1.0, 1.0).to(rows)
        rows = downhill.unsqueeze(1) * rows
        self.found["same"].append((downhill * slopes, curvatures))
        self.found["other"].append(other.along(rows))
        self.waiting.append(rows)
        if sum(r.nbytes for r in self.waiting) + rows.nbytes > MEASURED.of():
            self._on_full()

    def _on_full(self) -> None:
        values = (each.split(len(self.waiting[0])) for each in self.full.along(torch.cat(self.waiting)))
        self.found["full"].extend(zip(*values, strict=True))
        self.waiting.clear()

    def finished(self) -> list[dict[str, Tensor]]:
        """[repeats, k] by where it was measured: slopes, curvatures, and of a subset of all data their errors."""
        if self.waiting:
            self._on_full()
        return [
            {
                which: torch.stack([values[i] for values in found]).double().cpu()
                for which, found in self.found.items()
                if i < len(found[0])
            }
            for i in range(len(self.found["full"][0]))
        ]


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
        weights = torch.tensor(self.sizes, device="cpu").to(rows) / drawn
        values = [torch.stack([f[i] for f in found]) for i in (0, 1)]
        means = [weights @ v for v in values]
        rest = 1 - drawn / self.samples  # nothing is uncertain once all samples were drawn
        spreads = [(weights.unsqueeze(1) * (v - m)).square().sum(0) for v, m in zip(values, means, strict=True)]
        return (*means, *(spread.mul(rest * n / (n - 1)).sqrt() for spread in spreads))


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows with the same span."""
    return torch.linalg.qr(rows.T).Q.T
