"""The generalised Gauss-Newton matrix of the loss."""

from __future__ import annotations

from paraboloid.operators.jacobian_form import JacobianForm
from paraboloid.operators.output_graph import OutputGraph


class GGN(JacobianForm):
    """sum_n J_n^T H_n J_n times the reduction's factor: the curvature of the loss as reduced, without the model's own.

    J_n is the Jacobian of the output of sample n, H_n the Hessian of its unreduced loss.  A loader counts as one big
    batch.  See `paraboloid.operators` for the arguments, and for what is kept between products.

    Cost, in gradients: a product with a kept graph is about 2, a quadratic form 1 (J alone).  `to_dense` takes D
    products; `diagonal` and `trace` take D quadratic forms, or one backward pass for each sample and column of the
    loss's root (about N C of them) where those are fewer; `samples=` takes that many.  Where weights are used at many
    positions (convolutions) and many products are asked for, a square root of the matrix takes over: see `Root`.

    blocks: "all", or only the diagonal blocks of each "parameter", each "layer" or lists of names: see
    `paraboloid.operators.blocks`.  A product with every block costs up to 2 gradients for each of them.
    """

    graph = OutputGraph
