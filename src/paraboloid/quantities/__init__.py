"""The quantities that `pb.statistics` knows, and the class to derive one from;
imports from `graph`, `reductions` and below."""

from paraboloid.linalg.kronecker import Kron
from paraboloid.quantities.named import (
    FISHERS,
    KFAC,
    KFRA,
    QUANTITIES,
    DiagGGN,
    DiagHessian,
    EigenScale,
    Grad,
    Gram,
    SampleDiagGGN,
    SampleGrads,
    SecondMoment,
    SqrtGGN,
    SquareNorms,
    Variance,
    resolve,
)
from paraboloid.quantities.quantity import GRADIENT, NOTHING, ROOT, Group, Quantity, Scale, Source

__all__ = [
    "FISHERS", "GRADIENT", "KFAC", "KFRA", "NOTHING", "QUANTITIES", "ROOT", "DiagGGN", "DiagHessian", "EigenScale",
    "Grad", "Gram", "Group", "Kron", "Quantity", "SampleDiagGGN", "SampleGrads", "Scale", "SecondMoment", "Source",
    "SqrtGGN", "SquareNorms", "Variance", "resolve",
]  # fmt: skip
