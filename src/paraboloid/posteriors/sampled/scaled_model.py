"""The linearised model in the g-prior's units: no number of its optimisation depends on the units of the features."""

from __future__ import annotations

from torch import Tensor

from paraboloid.losses import Loss
from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel
from paraboloid.posteriors.sampled.tangent_system import TangentSystem


class ScaledModel(LinearisedModel):
    """The linearised model as a function of S^-1 (w - theta), flat [D], with S = diag(scale) of a tangent system."""

    def __init__(self, system: TangentSystem, loss: Loss | None = None):
        super().__init__(system.replay)
        self.system, self.loss = system, self.loss if loss is None else loss
        if system.scale is not None:
            self.theta = self.theta / system.scale

    def value(self, delta: Tensor) -> Tensor:
        return self.system.summed(super().value(self.system.deviations(delta)))

    def gradient(self, delta: Tensor) -> Tensor:
        return self.system.deviations(self.system.summed(super().gradient(self.system.deviations(delta))))

    def curvature(self, delta: Tensor, v: Tensor) -> Tensor:
        rows = self.system.deviations(v.T if v.dim() == 2 else v)
        found = super().curvature(self.system.deviations(delta), rows.T if v.dim() == 2 else rows)
        found = self.system.summed(found.contiguous())
        return self.system.deviations(found.T).T if v.dim() == 2 else self.system.deviations(found)
