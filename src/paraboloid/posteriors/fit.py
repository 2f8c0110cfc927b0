"""The curvature of the summed negative log-likelihood in each structure, and the likelihood of the data on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.data.cutting import Chosen, Cut, Cuts, Half
from paraboloid.data.joined import joined
from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.operand import check_count
from paraboloid.operators import GGN, Hessian
from paraboloid.operators.structured.block_diagonal import BlockDiagonal
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.operators.structured.kfac import factors_of, measured_scales
from paraboloid.passes import trees
from paraboloid.posteriors.curvature_rows import all_rows, check_memory, rows
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.structures.eigenbasis import CrossFitted, Kronecker, diagonal_of
from paraboloid.posteriors.structures.rows import Rows
from paraboloid.posteriors.structures.subnetwork import Subnetwork
from paraboloid.quantities.curvature import DiagGGN, DiagHessian, SqrtGGN
from paraboloid.quantities.gradients import SampleGrads, SecondMoment
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.quantity import Quantity
from paraboloid.quantities.sums import Sums
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, Factors, scale_factors

STRUCTURES = ("full", "diag", "kron", "ekfac", "lowrank", "functional")
FISHERS = ("exact", "mc", "empirical", "hessian")


@dataclass
class Fitting:
    """What all structures are fitted with; `log_likelihood` (at strength 1, without constants) grows on the way."""

    model: nn.Module
    likelihood: Likelihood
    fisher: str
    samples: int
    generator: torch.Generator
    output: Output | None
    max_memory: int | None
    max_factor: int = MAX_FACTOR
    said: list[bool] = field(default_factory=list)  # shared by copies: what is diagonal is said once
    loss: float = 0.0  # summed over the data
    constant: float = 0.0
    count: int = 0  # samples
    elements: int = 0  # of the targets
    target: tuple[int, ...] = ()  # shape of a sample's target
    cuts: Cuts = field(default_factory=Cuts)
    tol: float = 0.0  # of the relative trace of the loss's Hessians
    left_out: tuple[float, float] = (0.0, 0.0)  # that trace: left out, and in all

    def cut(self, inputs: Any) -> Cut:
        """Where the samples of a batch lie in its inputs; raises ValueError where they cannot be told apart."""
        found = self.cuts.of(self.model, inputs, self.output)
        if found.samples > 1 and not found.possible:
            raise ValueError("the inputs of a batch cannot be cut into samples: the model on some of them does not "
                             "give these rows of its output. Leave subset= or debias=True out.")  # fmt: skip
        return found

    def note(self, y: Any) -> None:
        """Count a batch's targets."""
        self.constant += self.likelihood.constant(y)
        self.count += len(y)
        self.elements += y.numel()
        self.target = tuple(y.shape[1:])

    def over(self, data: Data, again: bool = False) -> OverData:
        """Passes over the data, the first of which counts it."""
        return _Counted(self, data, again)

    def sums(self, passes: OverData, quantity: Quantity, generator: torch.Generator | None = None) -> dict[str, Any]:
        """A quantity of all the data, unscaled."""
        found = passes.sums([quantity], generator)
        self.leave(found)
        return found.values[quantity.name]

    def leave(self, sums: Sums) -> None:
        """Count what a tolerance left out."""
        for left, total in sums.left_out.values():
            self.left_out = self.left_out[0] + left, self.left_out[1] + total

    def factors(self, passes: OverData) -> dict[str, Factors]:
        """The sums of every parameter's Kronecker factors."""
        quantity = factors_of(self.fisher, self.samples, tol=self.tol, max_factor=self.max_factor)
        quantity.per_sample = True
        found = self.sums(passes, quantity)
        if not self.said:
            quantity.announce(found)
            self.said.append(True)
        return found

    def factors_of(self, data: Data) -> dict[str, Factors]:
        """Those of some data, small batches of which are joined."""
        return self.factors(self.over(joined(data, self.model, self.max_memory, self.output, self.cuts)))

    def scales(self, passes: OverData, forms: Mapping[str, Eigenform]) -> dict[str, Tensor]:
        """The exact eigenvalues along given eigenvectors."""
        return measured_scales(passes, forms, self.fisher, self.samples, separate=True, tol=self.tol)[0]

    def rows(self, data: Data) -> Iterator[Tensor]:
        """S_n^T J_n of every sample and column of the root, [v N, D], some of a batch after the others."""
        return rows(self.over(data), self.root(), self.generator, self.leave)

    def all_rows(self, data: Data) -> tuple[Tensor, list[tuple[int, int]]]:
        """All of them, and the columns and samples of each batch where they are its own."""
        return all_rows(self.over(data), self.root(), self.generator, self.leave)

    def root(self) -> Quantity:
        """The quantity whose rows, squared and summed, are the curvature."""
        if self.fisher == "empirical":
            return SampleGrads()
        return SqrtGGN(None if self.fisher == "exact" else self.samples, self.tol)


class _Counted(OverData):
    """Passes whose first one a fitting sees."""

    def __init__(self, fitting: Fitting, data: Data, again: bool):
        self.fitting = fitting
        super().__init__(
            fitting.model, fitting.likelihood.curved, data, output=fitting.output, max_memory=fitting.max_memory,
            seed=fitting.generator.initial_seed(), again=again,
        )  # fmt: skip

    def _count(self, f: Tensor, y: Any) -> None:
        super()._count(f, y)
        self.fitting.note(y)

    def _look(self, f: Tensor, y: Any, index: int) -> float:
        total = super()._look(f, y, index)
        self.fitting.loss += total if self.passes == 0 else 0.0
        return total


def hessian(fitting: Fitting, parameters: Mapping[str, Tensor], data: Data) -> Tensor:
    """The Hessian of the summed loss, [D, D]: it may be indefinite where the model bends."""
    operator = Hessian(
        fitting.model, fitting.likelihood.loss, data, output=fitting.output, max_memory=fitting.max_memory,
        seed=fitting.generator.initial_seed(),
    )  # fmt: skip
    for _ in fitting.over(data):  # for the likelihood
        pass
    return operator.to_dense() * operator.replay.normalizer


def full(fitting: Fitting, parameters: Mapping[str, Tensor], data: Data) -> BlockDiagonal:
    size, first = sum(p.numel() for p in parameters.values()), next(iter(parameters.values()))
    check_memory(
        f"structure='full' over {size} weights", 2 * size**2 * first.element_size(),
        "Use structure='kron' or 'diag', or fewer weights (weights='last_layer').",
    )  # fmt: skip
    if fitting.fisher == "hessian":
        return BlockDiagonal(parameters, [range(len(parameters))], [hessian(fitting, parameters, data)])
    H = torch.zeros(size, size, dtype=first.dtype, device=first.device)
    for A in fitting.rows(data):
        H.addmm_(A.T, A)
    return BlockDiagonal(parameters, [range(len(parameters))], [H])


def subnetwork(
    fitting: Fitting, parameters: Mapping[str, Tensor], data: Data, structure: str, at: Tensor
) -> Subnetwork:  # fmt: skip
    """H among single weights: the whole of it, or its diagonal."""
    if structure == "diag":
        return Subnetwork(parameters, at, diagonal(fitting, parameters, data).diagonal()[at])
    if fitting.fisher == "hessian":
        return Subnetwork(parameters, at, hessian(fitting, parameters, data)[at][:, at])
    first = next(iter(parameters.values()))
    check_memory(
        f"structure='full' over {len(at)} weights", 2 * len(at) ** 2 * first.element_size(),
        "Use structure='diag', or fewer weights.",
    )  # fmt: skip
    H = torch.zeros(len(at), len(at), dtype=first.dtype, device=first.device)
    for A in fitting.rows(data):
        H.addmm_(A[:, at].T, A[:, at])
    return Subnetwork(parameters, at, H)


def diagonal(fitting: Fitting, parameters: Mapping[str, Tensor], data: Data) -> Diagonalised:
    if fitting.fisher == "hessian":
        sums = OverData(
            fitting.model, fitting.likelihood.loss, data, output=fitting.output, max_memory=fitting.max_memory,
            seed=fitting.generator.initial_seed(), twice=True,
        ).sums([DiagHessian()]).values["diag_hessian"]  # fmt: skip
        for _ in fitting.over(data):  # for the likelihood
            pass
        return diagonal_of(parameters, {k: h.to(parameters[k].dtype) for k, h in sums.items()})
    empirical = fitting.fisher == "empirical"
    quantity: Quantity = (
        SecondMoment() if empirical else DiagGGN(None if fitting.fisher == "exact" else fitting.samples, fitting.tol)
    )
    sums = fitting.sums(fitting.over(data), quantity, fitting.generator)
    return diagonal_of(parameters, {k: h.to(parameters[k].dtype) for k, h in sums.items()})


def functional(fitting: Fitting, parameters: Mapping[str, Tensor], data: Data, subset: int | None) -> Rows:
    """All samples' rows, or those of `subset` samples drawn without replacement, scaled to stand for all."""
    if subset is None:
        A, batches = fitting.all_rows(data)
        return Rows(parameters, A, batches=batches)
    for _ in fitting.over(data):  # for the likelihood of all samples, and their number
        pass
    N = fitting.count
    check_count("subset", subset, most=N)
    chosen = torch.zeros(N, dtype=torch.bool, device=fitting.generator.device)
    chosen[torch.randperm(N, generator=fitting.generator, device=chosen.device)[:subset]] = True
    part = replace(fitting)  # what it notes is counted already
    A, _ = part.all_rows(Chosen(data, fitting.cut, chosen.cpu()))
    fitting.left_out = part.left_out
    return Rows(parameters, A.mul_((N / subset) ** 0.5))


def kronecker(
    fitting: Fitting, parameters: Mapping[str, Tensor], data: Data, exact: bool, before: Kronecker | None = None
) -> Kronecker:
    """KFAC's blocks; `exact`: the exact eigenvalues along KFAC's eigenvectors (EKFAC), or along those of `before`."""
    if before is not None and before.factors is None:
        return Kronecker(parameters, along(fitting, data, before.by_name, exact))
    passes = fitting.over(data, again=exact)
    fitted = Kronecker.of_factors(parameters, fitting.factors(passes))
    if not exact:
        return fitted
    scales = fitting.scales(passes, fitted.by_name)
    return Kronecker(parameters, {k: replace(f, values=scales[k]) for k, f in fitted.by_name.items()})


def along(
    fitting: Fitting, data: Data, forms: Mapping[str, Eigenform], exact: bool
) -> dict[str, Eigenform]:  # fmt: skip
    """Eigenvalues of other data along the eigenvectors of `forms`: exact ones, or products of the factors' own.

    Bases that are thin, for the data that they came from had few samples, are completed: other data needs all of them.
    """
    forms = {k: f.completed() for k, f in forms.items()}
    passes = fitting.over(data)
    if exact:
        scales = fitting.scales(passes, forms)
        found = {k: replace(f, values=f.evened(scales[k])) for k, f in forms.items()}
    else:
        products = {k: scale_factors(v, 1.0) for k, v in fitting.factors(passes).items()}
        found = {k: products[k].along(f) for k, f in forms.items()}
    return found


def cross_fitted(
    fitting: Fitting, parameters: Mapping[str, Tensor], data: Data, exact: bool, before: CrossFitted | None = None
) -> CrossFitted:
    """Two posteriors, each with the eigenvectors of one half of the data and the eigenvalues of the other half."""
    halves = [Half(data, fitting.cut, which) for which in (0, 1)]
    if before is None:
        forms = [kronecker(replace(fitting), parameters, half, False).by_name for half in halves]
    else:
        forms = [part.by_name for part in before.parts]
    parts, counts = [], []
    for own, other in zip(forms, reversed(halves), strict=True):
        seen = fitting.count
        parts.append(along(fitting, other, own, exact))
        counts.append(fitting.count - seen)
    scales = [sum(counts) / count for count in counts]
    return CrossFitted(tuple(
        Kronecker(parameters, {k: f.map(lambda h, s=s: s * h) for k, f in part.items()})
        for part, s in zip(parts, scales, strict=True)
    ))  # fmt: skip


def low_rank(fitting: Fitting, parameters: Mapping[str, Tensor], data: Data, rank: int, seed: int) -> Rows:
    """The `rank` largest eigenpairs of the GGN of all data, however it is batched."""
    size = sum(p.numel() for p in parameters.values())
    if fitting.fisher != "exact":
        raise ValueError(f"fisher is {fitting.fisher!r} with structure='lowrank'; expected 'exact'.")
    if fitting.tol:
        raise ValueError(f"tol is {fitting.tol} with structure='lowrank'; expected 0: its products with the GGN are "
                         "exact and cost no pull per class.")  # fmt: skip
    operator = GGN(
        fitting.model, fitting.likelihood.curved, data, output=fitting.output, max_memory=fitting.max_memory, seed=seed
    )
    values, vectors = operator.eigsh(min(rank, size), seed=seed)
    with torch.no_grad(), operator.replay.graphs() as graphs:
        for graph in graphs:
            fitting.loss += fitting.likelihood.loss.sample_losses(graph.f, graph.y).sum().item()
            fitting.note(graph.y)
    kept = values > values.max().clamp(min=0) * torch.finfo(values.dtype).eps * size
    return Rows(parameters, (values[kept].sqrt() * vectors[:, kept]).T.contiguous(), rank)


@torch.no_grad()
def curvature(
    structure: str,
    fitting: Fitting,
    parameters: Mapping[str, Tensor],
    data: Data,
    options: Mapping[str, Any],
    before: Any = None,
) -> Any:
    """The fitted structure; `before` is what it will be added to.  Raises ValueError where it overflowed."""
    if not options["debias"]:  # whose halves are of each batch
        data = joined(data, fitting.model, fitting.max_memory, fitting.output, fitting.cuts)
    found = _curvature(structure, fitting, parameters, data, options, before)
    if False in [bool(t.isfinite().all()) for t in _numbers(found)]:
        dtype = next(iter(parameters.values())).dtype
        raise ValueError(f"the curvature of structure={structure!r} holds numbers beyond {dtype}; expected finite "
                         "ones. Fit in float64 (model.double()), or scale the inputs and targets.")  # fmt: skip
    return found


def _curvature(
    structure: str, fitting: Fitting, parameters: Mapping[str, Tensor], data: Data, options: Mapping[str, Any],
    before: Any,
) -> Any:  # fmt: skip
    if options.get("at") is not None:
        return subnetwork(fitting, parameters, data, structure, options["at"])
    if structure == "full":
        return full(fitting, parameters, data)
    if structure == "diag":
        return diagonal(fitting, parameters, data)
    if structure == "lowrank":
        return low_rank(fitting, parameters, data, options["rank"], options["seed"])
    if structure == "functional":
        return functional(fitting, parameters, data, options["subset"])
    if options["debias"]:
        return cross_fitted(fitting, parameters, data, structure == "ekfac", before)
    return kronecker(fitting, parameters, data, structure == "ekfac", before)


def _numbers(curvature: Any) -> list[Tensor]:
    """What says of a curvature whether it overflowed."""
    if isinstance(curvature, CrossFitted):
        return [t for part in curvature.parts for t in _numbers(part)]
    if isinstance(curvature, BlockDiagonal):
        return list(curvature.matrices)
    if isinstance(curvature, Subnetwork):
        return [curvature.H]
    if isinstance(curvature, Rows):
        return [curvature.A.square().sum(1)]
    return [form.values for form in curvature.forms]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """The chosen parameters' values, copied."""
    return {k: p.detach().clone() for k, p in trees.parameters(model).items()}
