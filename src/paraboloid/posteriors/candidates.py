"""Rewards of several candidates side by side: preferences as a classification."""

from __future__ import annotations

from torch import Tensor, nn


class Candidates(nn.Module):
    """A reward model r on inputs [N, K, ...], K candidates each: rewards [N, K].

    With `nn.CrossEntropyLoss` and the index of the preferred candidate as target it is the Bradley-Terry model (K = 2:
    P(0 preferred to 1) = sigmoid(r_0 - r_1)), and Luce's choice model for more.  Only differences are observed, so the
    rewards' common level has the prior's uncertainty.  K = 1 gives single rewards: `posterior.functional(x[:, None])`.
    """

    def __init__(self, reward: nn.Module):
        super().__init__()
        self.reward = reward

    def forward(self, x: Tensor) -> Tensor:
        return self.reward(x.flatten(0, 1)).view(x.shape[:2])
