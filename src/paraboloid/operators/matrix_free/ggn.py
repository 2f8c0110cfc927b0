"""The generalised Gauss-Newton matrix of the loss."""

from __future__ import annotations

from paraboloid.operators.matrix_free.jacobian_form import JacobianForm
from paraboloid.operators.matrix_free.output_graph import OutputGraph


class GGN(JacobianForm):
    """sum_n J_n^T H_n J_n times the reduction's factor: the curvature of the loss as reduced, without the model's own.

    J_n is the Jacobian of the output of sample n, H_n the Hessian of its unreduced loss.  A loader counts as one big
    batch.  See `paraboloid.operators` for the arguments, and for what is kept between products.

    Cost, in gradients: a product with a kept graph is about 1.5, a quadratic form 1 (J alone).  `to_dense` takes D
    products; `diagonal` and `trace` one backward pass for each column of the loss's root (about C of them; see
    `pb.statistics`' diag_ggn), but where samples are coupled or an operation has no rule, D quadratic forms or N C
    backward passes; `samples=` takes that many products.  Where weights are used at many
    positions (convolutions) and many products are asked for, a square root of the matrix takes over: see `Root`.

    blocks: "all", or only the diagonal blocks of each "parameter", each "layer" or lists of names: see
    `paraboloid.operators.partition`.  A product with every block costs up to 2 gradients for each of them.
    """

    graph = OutputGraph
