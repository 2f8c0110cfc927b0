"""The prior over a network's convolutions: smooth kernels, as large and as smooth as each block says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from paraboloid.linalg.operand import check_choice

PRIORS = ("per_block", "shared")
LENGTH = 1.0  # of correlation at first, in pixels


@dataclass(frozen=True)
class Block:
    """Convolutions that share a prior: kernels [..., k, k] of one size k."""

    name: str
    parameters: tuple[str, ...]
    size: int

    def distances(self) -> Tensor:
        """Between all pairs of a kernel's positions, [k^2, k^2], in pixels."""
        at = torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size)).double().view(-1, 2)
        return (at.unsqueeze(1) - at).norm(dim=2)

    def classes(self) -> tuple[Tensor, Tensor]:
        """The different distances [R], and which pairs of positions have each, [R, k^2, k^2] of 0 and 1."""
        distances = self.distances()
        ranks = distances.mul(1e6).round().unique(return_inverse=True)[1]
        pairs = torch.stack([ranks == r for r in range(int(ranks.max()) + 1)])
        return torch.stack([distances[which][0] for which in pairs]), pairs.double()


def blocks_of(model: nn.Module, prior: str) -> list[Block]:
    """The model's two-dimensional convolutions with square kernels, by the module that they stand in and their size.

    "shared": all of one size are a block.  Raises ValueError for an unknown prior and a model without convolutions.
    """
    check_choice("prior", prior, PRIORS)
    found: dict[tuple[str, int], list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and len(set(module.kernel_size)) == 1:
            place = name.rpartition(".")[0] or name if prior == "per_block" else "all"
            found.setdefault((place, module.kernel_size[0]), []).append(f"{name}.weight".lstrip("."))
    if not found:
        raise ValueError(f"the model {type(model).__name__} has no nn.Conv2d with a square kernel; expected some, "
                         "whose kernels the prior is over.")  # fmt: skip
    return [Block(f"{place}, {k} x {k}", tuple(names), k) for (place, k), names in found.items()]


@dataclass(eq=False)
class KernelPrior:
    """w ~ N(0, Sigma): kernels are independent, each with the covariance v_b exp(-d / l_b) between its positions.

    d is the distance of two positions, v_b and l_b are variance and length of the block b.  Source: arXiv:2203.00479,
    section 3.
    """

    blocks: Sequence[Block]
    log_variance: Tensor  # [B]
    log_length: Tensor  # [B]
    names: list[str] = field(init=False)  # of the weights, in the order of `blocks`

    def __post_init__(self) -> None:
        self.names = [name for block in self.blocks for name in block.parameters]

    @staticmethod
    def of(model: nn.Module, prior: str) -> KernelPrior:
        """With each block's mean square weight as its variance."""
        blocks, weights = blocks_of(model, prior), dict(model.named_parameters())
        squares = [torch.cat([weights[n].detach().flatten() for n in b.parameters]).square().mean() for b in blocks]
        variances = torch.stack(squares).double().clamp(min=1e-8)
        return KernelPrior(blocks, variances.log(), torch.full_like(variances, LENGTH).log())

    def coefficients(self) -> Tensor:
        """v_b exp(-d_r / l_b) for every block and distance, one after another: Sigma = sum_br c_br S_br."""
        found = []
        for b, block in enumerate(self.blocks):
            d = block.classes()[0].to(self.log_length)
            found.append((self.log_variance[b] - d / self.log_length[b].exp()).exp())
        return torch.cat(found)

    def covariances(self) -> Iterator[Tensor]:
        """v_b exp(-d / l_b), [k^2, k^2], of each weight's kernels."""
        for b, block in enumerate(self.blocks):
            d = block.distances().to(self.log_length)
            yield from [(self.log_variance[b] - d / self.log_length[b].exp()).exp()] * len(block.parameters)

    def times(self, v: Sequence[Tensor]) -> list[Tensor]:
        """Sigma v, for v one tensor [..., k, k] for each weight."""
        return [_on_kernels(t, C.to(t)) for t, C in zip(v, self.covariances(), strict=True)]

    def draws(self, shapes: Sequence[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
        """[count, *shape] from N(0, Sigma) for each weight, in the dtype of `shapes`."""
        found = []
        for like, C in zip(shapes, self.covariances(), strict=True):
            L = torch.linalg.cholesky(C)
            z = torch.randn(count, *like.shape, generator=generator, dtype=like.dtype, device=generator.device)
            found.append(_on_kernels(z.to(like.device), L.to(like)))
        return found

    def square(self, v: Sequence[Tensor]) -> Tensor:
        """v . Sigma^-1 v of each block, [B]; differentiable in variances and lengths."""
        found, covariances = [], self.covariances()
        at = iter(v)
        for block in self.blocks:
            parts = []
            for _ in block.parameters:
                flat, C = next(at).reshape(-1, block.size**2).double(), next(covariances)
                parts.append((flat.T * torch.linalg.solve(C, flat.T)).sum())
            found.append(torch.stack(parts).sum())
        return torch.stack(found)

    def forms(self, u: Sequence[Tensor], v: Sequence[Tensor]) -> Tensor:
        """u . S_br v for every block and distance, [R in all]: the pairs of positions at that distance."""
        at, found = 0, []
        for block in self.blocks:
            _, pairs = block.classes()
            total = pairs.new_zeros(block.size**2, block.size**2)
            for _ in block.parameters:
                flat = [t[at].reshape(-1, block.size**2).double() for t in (u, v)]
                total += flat[0].T @ flat[1]
                at += 1
            found.append((pairs * total).sum((1, 2)))
        return torch.cat(found)


def _on_kernels(t: Tensor, M: Tensor) -> Tensor:
    """M times each kernel of t [..., k, k]."""
    return (t.flatten(-2) @ M.T).view_as(t)
