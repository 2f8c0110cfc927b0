"""Curvature as linear operators, matrices [D, D] over the parameters; imports from `quantities` and below.

Arguments that all of them take:

model       any nn.Module, in the mode it is in; only parameters with requires_grad take part
loss_fn     a torch loss module, a `pb.Loss`, or any callable (f, y) -> scalar
data        a batch or an iterable of batches; an iterable is read on each product unless its graphs are kept, must give
            the same samples each time, and counts as one big batch (but for layers that couple a batch's samples)
blocks      which parameters are coupled: see `paraboloid.operators.partition`
output      picks the output tensor from a structured result, e.g. ``lambda o: o.logits``
seed        of dropout masks and the like, drawn once: the operator is the same on every product
max_memory  bytes of recorded graphs (and of a GGN's root) that are kept between products (default 1 GiB).  With all
            graphs kept the operator stays that of the samples first seen; otherwise each product records anew
"""

from paraboloid.linalg.estimate import Estimate, TensorEstimate
from paraboloid.operators.identity import Identity
from paraboloid.operators.linear_operator import LinearOperator, Scaled, Sum
from paraboloid.operators.matrix_free.fisher import EmpiricalFisher, Fisher
from paraboloid.operators.matrix_free.hessian import Hessian
from paraboloid.operators.matrix_free.jacobian import Jacobian
from paraboloid.operators.matrix_free.jacobian_form import GGN
from paraboloid.operators.matrix_free.pch import PCH
from paraboloid.operators.product import Product
from paraboloid.operators.saving import load
from paraboloid.operators.structured.block_diagonal import BlockDiagonal
from paraboloid.operators.structured.diagonal_ggn import DiagonalGGN
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.operators.structured.foof import FOOF
from paraboloid.operators.structured.joint_kfac import JointKFAC, JointKronecker
from paraboloid.operators.structured.kfac import EKFAC, KFAC, KFLR
from paraboloid.operators.structured.kfoc import KFOC
from paraboloid.operators.structured.kronecker_factored import KroneckerFactored
from paraboloid.operators.structured.low_rank import LowRank
from paraboloid.operators.submatrix import Submatrix

__all__ = [
    "EKFAC", "FOOF", "GGN", "KFAC", "KFLR", "KFOC", "PCH", "BlockDiagonal", "DiagonalGGN", "Diagonalised",
    "EmpiricalFisher", "Estimate", "Fisher", "Hessian", "Identity", "Jacobian", "JointKFAC", "JointKronecker",
    "KroneckerFactored", "LinearOperator", "LowRank", "Product", "Scaled", "Submatrix", "Sum", "TensorEstimate", "load",
]  # fmt: skip
