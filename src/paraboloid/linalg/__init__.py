"""Linear algebra that knows a matrix only by its products, and Kronecker algebra; imports from `passes`.

Any object with ``@`` and ``.shape`` is an operator.

`Operand` says how torch tensors, SciPy's and other people's operators are told apart.
"""

from paraboloid.linalg.block_descent import block_solves
from paraboloid.linalg.block_eigensolver import lobpcg
from paraboloid.linalg.column_nystrom import Columns, pivoted_columns
from paraboloid.linalg.conjugate_gradients import Iterates, cg, cg_iterates, cg_solution
from paraboloid.linalg.density import spectral_density
from paraboloid.linalg.dual_descent import sdd
from paraboloid.linalg.eigen import eigh, eigsh
from paraboloid.linalg.estimate import Estimate, TensorEstimate
from paraboloid.linalg.iterative_inverses import lsmr, neumann
from paraboloid.linalg.krylov import lanczos
from paraboloid.linalg.log_determinant import logdet
from paraboloid.linalg.nystrom_approximation import Nystrom, nystrom
from paraboloid.linalg.row_blocks import RowBlocks
from paraboloid.linalg.solution import Solution
from paraboloid.linalg.stochastic_diagonal import diagonal, xdiag
from paraboloid.linalg.trace import hutchinson_trace, hutchpp_trace, squared_frobenius, xtrace

__all__ = [
    "Columns", "Estimate", "Iterates", "Nystrom", "RowBlocks", "Solution", "TensorEstimate", "block_solves", "cg",
    "cg_iterates", "cg_solution", "diagonal", "eigh", "eigsh", "hutchinson_trace", "hutchpp_trace", "lanczos", "lobpcg",
    "logdet", "lsmr", "neumann", "nystrom", "pivoted_columns", "sdd", "spectral_density", "squared_frobenius", "xdiag",
    "xtrace",
]  # fmt: skip
