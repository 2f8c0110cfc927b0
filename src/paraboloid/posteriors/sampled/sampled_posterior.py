"""A posterior that is known by samples from it: predictions, covariances and functions from J d alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Inputs, Output
from paraboloid.data.cutting import Cuts
from paraboloid.passes import trees
from paraboloid.passes.wrappers import plain_parameters
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.prediction import predictive, sharpness
from paraboloid.posteriors.prediction.confidence import Confidence
from paraboloid.posteriors.prediction.tangent_outputs import tangent_outputs
from paraboloid.posteriors.sampled.state import EMStep


@dataclass(eq=False, repr=False)
class SampledPosterior:
    """Draws from N(theta, (strength H + Lambda)^-1) over the weights theta of a trained model.

    Made by `paraboloid.sampled_laplace`; `model` must keep its weights, and stay in the mode in which it was.

    samples              deviations from theta, name -> [samples, *shape]; zero for held normalisation parameters
    prior_precision      a number or a dict by name, in units of the g-prior where there is one
    effective_dimension  gamma, how many weights the data determines: the mean over the samples
    history              what was known after each EM step
    """

    model: nn.Module
    likelihood: Likelihood
    weights: dict[str, Tensor]  # theta, by name, of the weights that are sampled
    samples: dict[str, Tensor]
    prior_precision: Any
    effective_dimension: float
    history: list[EMStep]
    noise_variance: float
    target: tuple[int, ...]  # shape of a sample's target
    output: Output | None = None
    max_memory: int | None = None
    data: Data | None = None  # what it was fitted on, for `match_confidence`
    sharpness: float = 1.0
    confidence: Confidence | None = None  # by which `predict` is matched to the network
    unweighted: SampledPosterior | None = None  # whose variances that takes
    _cuts: Cuts = field(default_factory=Cuts, repr=False)  # where the samples lie in inputs

    @property
    def count(self) -> int:
        """How many samples there are."""
        return len(next(iter(self.samples.values())))

    @property
    def residual(self) -> float:
        """How far the samples are from solving their systems: ||b - A w|| / ||b|| of the worst one."""
        return self.history[-1].residual

    def sample(self, samples: int, seed: int = 0) -> dict[str, Tensor]:
        """The first `samples` draws of the weights, theta + deviation: name -> [samples, *shape].

        Raises ValueError where there are fewer; `seed` is not looked at, for these draws are all that there are.
        """
        if not 1 <= samples <= self.count:
            raise ValueError(f"samples is {samples}; expected a number in 1..{self.count}, for that many were drawn by "
                             "sampled_laplace(samples=...).")  # fmt: skip
        return {k: w + self.samples[k][:samples] for k, w in self.weights.items()}

    def functional(self, x: Inputs, *, joint: bool = False, diagonal: bool = False) -> tuple[Tensor, Tensor]:
        """Mean [N, *shape] and covariance [N, K, K] of the linearised outputs f(x) + J(x) d, as the samples have them.

        The mean is f(x), which is known, so the covariance is the mean over the samples of (J d)(J d)^T, without bias;
        its relative standard error is about sqrt(2 / samples).  K is the number of elements of a sample's output.
        diagonal=True: the variances alone, of the mean's shape; joint=True: [N, K, N, K] over all inputs together.
        """
        means, parts, draws = [], [], []
        for f, d in self.outputs(x):
            means.append(f)
            flat = d.flatten(2)  # [S, n, K]
            if joint:
                draws.append(flat)
            elif diagonal:
                parts.append(d.square().mean(0))
            else:
                parts.append(torch.einsum("snk,snl->nkl", flat, flat) / len(d))
        mean = torch.cat(means)
        if joint:
            every = torch.cat(draws, 1)
            return mean, torch.einsum("snk,sml->nkml", every, every) / len(every)
        return mean, torch.cat(parts)

    def functional_samples(self, x: Inputs, samples: int | None = None, seed: int = 0) -> Tensor:
        """The samples' functions f(x) + J(x) d, [samples, N, *shape]: values at different inputs belong together."""
        parts = [f + d for f, d in self.outputs(x, samples)]
        return torch.cat(parts, 1)

    def outputs(self, x: Inputs, samples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """(f [n, *shape], J d [samples, n, *shape]) of each chunk of inputs."""
        self.check_weights()
        rows = torch.cat([self.samples[k][:samples].flatten(1) for k in self.weights], 1)
        return tangent_outputs(self.model, list(self.weights), x, self.output, rows, self.max_memory, self._cuts)

    def predict(self, x: Inputs, link: str | None = None, *, samples: int = 1000, seed: int = 0) -> Any:
        """The predictive distribution, as `Posterior.predict` has it: probabilities [N, C, ...] of a classification,
        else a `Prediction`.

        link  "probit" (default of a classification), "bridge" or "bridge_norm" (categorical), "mc" (`samples` draws
              from the Gaussian of the linearised outputs), or "weights" (the networks at the drawn weights)
        """
        samples = min(samples, self.count) if link == "weights" else samples
        posterior: Any = self
        return predictive.predict(posterior, x, link, samples, seed)

    def match_confidence(self, data: Data | None = None, *, validation: Data | None = None) -> SampledPosterior:
        """Choose `sharpness` in place, as `Posterior.match_confidence` does; returns self."""
        if self.likelihood.kind not in ("categorical", "bernoulli"):
            raise ValueError(f"match_confidence with a {self.likelihood.kind} likelihood; expected classes "
                             "(nn.CrossEntropyLoss or nn.BCEWithLogitsLoss).")  # fmt: skip
        posterior: Any = self
        self.confidence, self.unweighted, self.sharpness = None, None, 1.0
        data = self.data if data is None else data
        self.sharpness = (
            sharpness.matched(posterior, data) if validation is None else sharpness.best(posterior, validation)
        )
        return self

    def check_weights(self) -> None:
        """Raise RuntimeError if the model's weights are not those that the posterior was fitted at."""
        current = plain_parameters(self.model)
        for name, w in self.weights.items():
            if name not in current or not torch.equal(current[name].detach(), w):
                raise RuntimeError(f"parameter {name!r} is not what it was when the posterior was fitted; a posterior "
                                   "belongs to one set of weights. Fit a new one.")  # fmt: skip

    def __repr__(self) -> str:
        size = sum(w.numel() for w in self.weights.values())
        return f"SampledPosterior({self.count} samples of {size} weights, {self.likelihood.kind})"


def by_name(rows: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flat rows [S, D] as name -> [S, *shape]."""
    return {k: t.movedim(-1, 0) for k, t in trees.unflatten(rows.T, weights).items()}
