"""A pass over data that needs a loss of some kind, and looks at the outputs alone."""

from __future__ import annotations

from torch import Tensor

from paraboloid.losses import MSE


class OutputsAlone(MSE):
    """Half the outputs' squares: whatever the targets are, they have no influence."""

    def sample_losses(self, f: Tensor, y: Tensor) -> Tensor:
        return f.square().reshape(len(f), -1).sum(1)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return self.sample_losses(f, y).sum()

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return f.detach()

    def normalizer(self, f: Tensor, y: Tensor) -> float:
        return 1.0

    def check(self, f: Tensor, y: Tensor) -> None:
        pass
