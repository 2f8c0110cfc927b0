"""Weight and bias of a layer in one Kronecker block: the bias as the weight of an input that is always one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker import Kron, check_split
from paraboloid.losses import LossFunction
from paraboloid.operators.damping import whole_damping
from paraboloid.operators.linear_operator import LinearOperator
from paraboloid.operators.partition import places
from paraboloid.operators.structured.kfac import factors_of
from paraboloid.passes.parameter_layers import layers_of
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.quantity import Quantity, Source
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, Factors, scale_factors
from paraboloid.reductions.products import Lookup


def JointKFAC(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    *,
    fisher: str = "mc",
    samples: int = 1,
    seed: int = 0,
    max_factor: int = MAX_FACTOR,
    output: Output | None = None,
    max_memory: int | None = None,
) -> JointKronecker:
    """left (x) [[mean r r^T, mean r], [mean r^T, 1]] over [weight, bias] of each layer; others as in `pb.KFAC`.

    Couples a layer's weight and bias, which `pb.KFAC` keeps apart: for one sample at one position it is the exact block
    of both.  For linear layers and convolutions without groups that have a bias and are used once.  The arguments are
    those of `pb.KFAC`.  Source: Martens & Grosse 2015, arXiv:1503.05671, section 3.
    """
    passes = OverData(model, loss_fn, data, seed=seed, output=output, max_memory=max_memory)
    quantity = factors_of(fisher, samples, "expand", False, 0.0, max_factor)
    found = passes.sums([quantity, _InputSums(quantity.source)]).values
    factors, sums = found[quantity.name], found[_InputSums.name]
    krons = {k: scale_factors(v, passes.factor) for k, v in factors.items()}
    blocks, taken = [], set()
    for names in layers_of(passes.parameters).values():
        for weight in names:
            bias = next((k for k in names if _joins(passes.parameters, k, weight, krons, sums)), None)
            if bias is not None and not taken & {weight, bias}:
                taken |= {weight, bias}
                block = _joint(krons[weight], sums[weight], factors[weight])
                blocks.append(JointBlock((weight, bias), block, krons[weight].sides[1].size))
    blocks += [JointBlock((k,), kron, 0) for k, kron in krons.items() if k not in taken]
    return JointKronecker(passes.values, blocks)


class _InputSums(Quantity):
    """Sum of a weight's layer inputs over samples and positions, [q]; [0] where it is no plain matrix used once."""

    name, per_sample, over_ranks = "input_sums", False, "running"

    def __init__(self, source: Source):
        self.source = source

    def add(self, value, group):
        if value is not None:  # further vectors of the same inputs
            return value
        products = group.outer.products
        plain = len(products) == 1 and not isinstance(products[0], Lookup) and not products[0].flip
        if not plain or products[0].block[0] > 1:
            return group.outer.left.new_zeros(0)
        return products[0].inputs().sum((0, 1, 2)).to(group.outer.left)


def _joins(
    parameters: Mapping[str, Tensor], bias: str, weight: str, krons: Mapping[str, Kron], sums: Mapping[str, Tensor]
) -> bool:  # fmt: skip
    left, right = krons[weight].sides
    both = left.kind == right.kind == "matrix" and len(sums[weight]) == right.size > 0 and parameters[weight].dim() > 1
    return both and bias != weight and parameters[bias].shape == parameters[weight].shape[:1] == (left.size,)


def _joint(kron: Kron, total: Tensor, factors: Factors) -> Kron:
    mean = (total / float(factors.positions)).to(kron.dtype)
    one = mean.new_ones(1, 1)
    right = torch.cat([torch.cat([kron.right, mean[:, None]], 1), torch.cat([mean[None], one], 1)])
    return Kron(kron.left, right)


@dataclass(frozen=True)
class JointBlock:
    """One block: a weight [p, q] and a bias [p] as the columns of [p, q + 1], or one parameter (q = 0)."""

    names: tuple[str, ...]
    block: Kron | Eigenform
    q: int

    def product(self, rows: Tensor) -> Tensor:
        """Products with rows [K, D_b], the weight's elements first."""
        if not self.q:
            return self.block.product(rows)
        p = rows.shape[1] // (self.q + 1)
        weight, bias = rows.split([p * self.q, p], 1)
        joined = torch.cat([weight.view(-1, p, self.q), bias.unsqueeze(2)], 2)
        found = self.block.product(joined.flatten(1)).view_as(joined)
        return torch.cat([found[:, :, : self.q].flatten(1), found[:, :, self.q]], 1)


class JointKronecker(LinearOperator):
    """A block-diagonal matrix of such blocks; products, inverse and log determinant are exact."""

    def __init__(self, parameters: Mapping[str, Tensor], blocks: Sequence[JointBlock]):
        self.parameters, self.joint = parameters, list(blocks)
        names = list(parameters)
        self.at = [torch.cat([places(parameters, [names.index(k)]) for k in block.names]) for block in self.joint]

    @property
    def dtype(self) -> torch.dtype:
        return self.joint[0].block.dtype

    def _product(self, rows: Tensor) -> Tensor:
        result = torch.empty_like(rows)
        for at, block in zip(self.at, self.joint, strict=True):
            result[:, at] = block.product(rows[:, at])
        return result

    def _forms(self) -> list[Eigenform]:
        return [b.block.eigenform(" + ".join(b.names)) if isinstance(b.block, Kron) else b.block for b in self.joint]

    def inverse(self, damping: float = 0.0, split: str | None = None) -> JointKronecker:
        """(A + damping I)^-1, exact; or with split="pi" or "same" by two inverses, as in `pb.KFAC(...).inverse`.

        Raises ValueError where an eigenvalue + damping is not safely positive, and for a `split` of an inverse's.
        """
        if check_split(split) is None:
            blocks = [form.inverse(damping) for form in self._forms()]
        else:
            krons = [b.block for b in self.joint if isinstance(b.block, Kron)]
            if len(krons) < len(self.joint):
                whole_damping(self, split)
            named = zip(self.joint, krons, strict=True)
            blocks = [kron.split_inverse(damping, " + ".join(b.names), split == "same") for b, kron in named]
        pairs = zip(self.joint, blocks, strict=True)
        return JointKronecker(self.parameters, [JointBlock(b.names, block, b.q) for b, block in pairs])

    def sqrt_matmul(self, v: Any) -> Any:
        """A^(1/2) v with the symmetric root; v in any form that `@` takes."""
        pairs = zip(self.joint, self._forms(), strict=True)
        return JointKronecker(self.parameters, [JointBlock(b.names, f.sqrt(), b.q) for b, f in pairs]) @ v

    def traces(self) -> dict[str, float]:
        """The trace of each block, by its parameters' names joined by " + "."""
        return {" + ".join(b.names): b.block.trace().item() for b in self.joint}

    def trace(self, samples=None, seed=0):
        return super().trace(samples, seed) if samples is not None else sum(self.traces().values())

    def frobenius_norm(self) -> Tensor:
        return torch.stack([b.block.frobenius_norm() for b in self.joint]).norm()

    def _structured(self, what: str) -> Any:
        raise NotImplementedError(
            f"a JointKronecker has no {what}: its eigenvectors run through a weight and its bias together; expected "
            "inverse, solve, logdet, sqrt_matmul, traces or eigsh(k). pb.KFAC keeps them apart."
        )

    def logdet(self, damping: float = 0.0) -> Tensor:
        """log det(A + damping I)."""
        return torch.stack([form.logdet(damping) for form in self._forms()]).sum()

    def solve(self, b: Any, damping: float = 0.0, tol=None, max_iterations=None, preconditioner=None) -> Any:
        """x with (A + damping I) x = b, exact."""
        return self.inverse(damping) @ b
