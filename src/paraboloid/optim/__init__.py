"""Second-order optimisers, subclasses of `torch.optim.Optimizer`; imports from `quadratics`, `operators` and below."""

from paraboloid.optim.hessian_free import HessianFree
from paraboloid.optim.kbfgs import KBFGS, KBFGSL
from paraboloid.optim.kfac import EKFAC, KFAC
from paraboloid.optim.polar import Polar
from paraboloid.optim.preconditioned import Preconditioned

__all__ = ["EKFAC", "KBFGS", "KBFGSL", "KFAC", "HessianFree", "Polar", "Preconditioned"]
