"""Linear algebra that knows a matrix only by its products, and Kronecker algebra; imports from `passes`.

Any object with ``@`` and ``.shape`` is an operator.

`Operand` says how torch tensors, SciPy's and other people's operators are told apart.
"""

from paraboloid.linalg.block_eigensolver import lobpcg
from paraboloid.linalg.conjugate_gradients import Iterates, cg, cg_iterates
from paraboloid.linalg.density import spectral_density
from paraboloid.linalg.eigen import eigh, eigsh
from paraboloid.linalg.estimate import Estimate, TensorEstimate
from paraboloid.linalg.krylov import lanczos
from paraboloid.linalg.nystrom_approximation import Nystrom, nystrom
from paraboloid.linalg.stochastic_diagonal import diagonal, xdiag
from paraboloid.linalg.trace import hutchinson_trace, hutchpp_trace, xtrace

__all__ = [
    "Estimate", "Iterates", "Nystrom", "TensorEstimate", "cg", "cg_iterates", "diagonal", "eigh", "eigsh",
    "hutchinson_trace", "hutchpp_trace", "lanczos", "lobpcg", "nystrom", "spectral_density", "xdiag", "xtrace",
]  # fmt: skip
