"""The quantities that `pb.statistics` knows, and the class to derive one from;
imports from `graph`, `reductions` and below."""

from paraboloid.linalg.kronecker import Kron
from paraboloid.quantities.curvature import DiagGGN, DiagHessian, SampleDiagGGN, SampleDiagHessian, SqrtGGN
from paraboloid.quantities.gradients import Grad, Gram, SampleGrads, SecondMoment, SquareNorms, Variance
from paraboloid.quantities.kronecker import FISHERS, KFAC, KFRA, EigenScale
from paraboloid.quantities.named import QUANTITIES, resolve
from paraboloid.quantities.quantity import GRADIENT, NOTHING, ROOT, Group, PerSample, Quantity, Scale, Source

__all__ = [
    "FISHERS", "GRADIENT", "KFAC", "KFRA", "NOTHING", "QUANTITIES", "ROOT", "DiagGGN", "DiagHessian", "EigenScale",
    "Grad", "Gram", "Group", "Kron", "PerSample", "Quantity", "SampleDiagGGN", "SampleDiagHessian", "SampleGrads",
    "Scale", "SecondMoment", "Source", "SqrtGGN", "SquareNorms", "Variance", "resolve",
]  # fmt: skip
