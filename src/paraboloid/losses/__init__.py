"""Losses: value, gradient and curvature in the output, per sample and as the user reduces it; imports from `passes`.

Every loss is a sum over samples of an *unreduced* loss l_n(f_n, y_n), divided by a normalizer:

    value = sum_n l_n / normalizer,        l_n = sum of sample n's elements under ``reduction="none"``.

`gradient`, `hessian_product`, `curvature_product`, `hessian_root` and `sampled_gradients` are those of the unreduced
sum: multiply by ``1 / normalizer`` (the factor a) for the loss as reduced.
"""

from paraboloid.losses.cross_entropy import CrossEntropy
from paraboloid.losses.elementwise import BCE, MSE, BCEWithLogits, Elementwise
from paraboloid.losses.gaussian import GaussianNLL
from paraboloid.losses.log_probabilities import NLL, KLDiv
from paraboloid.losses.loss import Loss, LossFunction, NoTargets, Scaled, Sum, settled
from paraboloid.losses.observed import Observed
from paraboloid.losses.opaque import Opaque
from paraboloid.losses.poisson import PoissonNLL
from paraboloid.losses.torch_module import PiecewiseLinear, TorchElementwise, TorchLoss
from paraboloid.losses.unweighted import Unweighted

__all__ = [
    "BCE", "MSE", "NLL", "BCEWithLogits", "CrossEntropy", "Elementwise", "GaussianNLL", "KLDiv", "Loss", "LossFunction",
    "NoTargets", "Observed", "Opaque", "PiecewiseLinear", "PoissonNLL", "Scaled", "Sum", "TorchElementwise",
    "TorchLoss", "Unweighted", "settled",
]  # fmt: skip
