"""Kronecker factors of a parameter's curvature block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paraboloid.linalg.eigenform import Eigenform
from paraboloid.linalg.kronecker_product import KroneckerProduct, Side


@dataclass(frozen=True)
class Kron:
    """A block left (x) right, in the parameter's own row-major order.

    `left` is [p, p] and `right` [q, q], symmetric positive semi-definite; a one-dimensional [p] or [q] is a diagonal.
    A grouped convolution has one pair for each of its G groups, [G, p, p] and [G, q, q]; its block is block-diagonal.

        damped = kron.inverse(damping=1e-3)            # exact, by eigendecompositions: made once, used often
        step = damped @ gradient                       # of the parameter's shape

    `name` in the methods is the parameter's, for error messages.
    """

    left: Tensor
    right: Tensor
    groups: int = 1

    @property
    def block(self) -> KroneckerProduct:
        """The same block with the algebra that its methods stand on."""
        return KroneckerProduct(self._side(self.left), self._side(self.right))

    def _side(self, factor: Tensor) -> Side:
        factor = factor if self.groups > 1 else factor.unsqueeze(0)
        return Side("diagonal" if factor.dim() == 2 else "matrix", factor)

    @property
    def shape(self) -> tuple[int, int]:
        size = self.block.size
        return size, size

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with a vector of D = G p q numbers in any shape, in that shape; or with [D, K]."""
        return self.block @ v

    def to_dense(self) -> Tensor:
        """The block as a matrix, [D, D] with D = groups p q."""
        return self.block.to_dense()

    def diagonal(self) -> Tensor:
        """[D]."""
        return self.block.diagonal()

    def trace(self) -> Tensor:
        return self.block.trace()

    def frobenius_norm(self) -> Tensor:
        return self.block.frobenius_norm()

    def eigenform(self, name: str = "the block") -> Eigenform:
        """The block by its eigenvalues (products of the factors') and eigenvectors, for every function of it.

        Raises `torch.linalg.LinAlgError` with the name and the condition number where a factor has no decomposition.
        """
        return self.block.eigenform(name)

    def inverse(self, damping: float = 0.0, split: str | None = None, name: str = "the block") -> Eigenform | Kron:
        """(left (x) right + damping I)^-1, exact; or with split="pi" its factored approximation (see `split_inverse`).

        Raises ValueError where an eigenvalue + damping is below eps times the largest.
        """
        if split not in (None, "pi"):
            raise ValueError(f"split is {split!r}; expected None (exact) or 'pi'.")
        if split is None:
            return self.eigenform(name).inverse(damping)
        inverse = self.block.split_inverse(damping, name)
        left, right = (s.data if self.groups > 1 else s.data[0] for s in (inverse.left, inverse.right))
        return Kron(left, right, self.groups)

    def sqrt(self, name: str = "the block") -> Eigenform:
        """The symmetric root."""
        return self.eigenform(name).sqrt()

    def logdet(self, damping: float = 0.0, name: str = "the block") -> Tensor:
        """log det(left (x) right + damping I)."""
        return self.eigenform(name).logdet(damping)
