"""How sure predictions are, matched to the network: its own log-odds, lowered where the training data says little.

The posterior of the weights is Bayesian; this is calibration.  Let u(x) be the variance of the linearised outputs, on
the mean over the classes, under the *unweighted* posterior (curvature="jacobian", a prior that knows as much as one
sample), and u_50, u_99 quantiles of it over the training data (u_95 for exact structures).  In steps as long as that
from the median to the 99th percentile, s(x) = log(u / u_99) / log(u_99 / u_50), the logits are multiplied by

    c(x) = 2^-(2 max(0, s(x) - 1)):

up to one step beyond the 99th percentile predictions are the network's own, and every further half step halves the
log-odds.  The most probable class stays.  Units drop out, and with them noise, temperature and everything that the
scale of a prior would be.

Why one step beyond: a network is as right about its own kind of inputs beyond the 99th percentile as before it, so that
lowering these costs likelihood.  Where log u has an exponential tail, two in 10,000 of the same kind lie beyond one
more step; a normal tail has two in a million.  Both numbers are quantiles, which single outliers do not move.
match="early" starts at the 99th percentile, with one halving a step.

Why unweighted: the softmax Hessian vanishes where a network is sure, so that a Laplace posterior keeps its variance
exactly where the network is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import isolated
from paraboloid.passes.wrappers import unwrapped

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

SAMPLES = 10_000  # of the data, the first ones, by which the quantiles are taken
OUTPUTS, VARIANCES = 15_000, 800  # fewer samples where these have more outputs, but so many variances
USUAL, RARE = 0.5, 0.99
RARE_OF_SAMPLES = 0.98  # of variances that others leave, as a few samples of the weights tell them
RARE_LEFT_OUT = 0.95  # of variances that are left by the others, and so have the tail that new inputs have
START, HALVINGS = 1.0, 2.0  # steps beyond the rare ones from which log-odds are lowered, and how often each halves them
SHORTEST = 0.1  # step, in the logarithm: variances of the training data that are all about the same tell no scale
MOST_OUTPUTS = 200  # of a sample, whose whole covariance is taken
ELEMENTS = 2**24  # that torch.quantile takes


@dataclass(frozen=True)
class Confidence:
    """The median and the 99th percentile of the variances on the training data; the 95th of those that others leave."""

    usual: float
    rare: float
    left_out: bool = False  # whether they are those that each sample's others leave
    start: float = 0.0  # what match="early" takes, and files of before
    halvings: float = 1.0

    def scale(self, variance: Tensor) -> Tensor:
        """What to multiply covariances of the outputs by, so that the probit approximation gives c times the logits."""
        c = self.factor(variance)
        return 8 / math.pi * (c**-2 - 1) / variance.clamp(min=torch.finfo(variance.dtype).tiny)

    def later(self) -> Confidence:
        """The same, lowered from one step beyond on, twice as fast."""
        return replace(self, start=START, halvings=HALVINGS)

    @staticmethod
    def of(variances: Tensor, rare: float = RARE, left_out: bool = False) -> Confidence:
        """The median and the quantile at `rare`."""
        flat = variances.double().flatten()[:ELEMENTS]
        places = torch.tensor([USUAL, rare], dtype=flat.dtype, device=flat.device)
        usual, high = flat.quantile(places).tolist()
        return Confidence(usual, high, left_out)

    def steps(self, variance: Tensor) -> Tensor:
        """log(u / u_99) / log(u_99 / u_50): 0 at the 99th percentile of the training data, -1 at its median."""
        if not self.rare > 0:
            return torch.zeros_like(variance)
        step = max(SHORTEST, math.log(self.rare / self.usual) if self.usual > 0 else math.inf)
        return (variance.clamp(min=torch.finfo(variance.dtype).tiny) / self.rare).log() / step

    def factor(self, variance: Tensor) -> Tensor:
        """c, of the shape of `variance`: 1 where nothing is lowered."""
        return torch.exp2(-self.halvings * (self.steps(variance) - self.start).clamp(min=0))


def shared(variance: Tensor, kind: str) -> Tensor:
    """Of classes that exclude each other, one variance: their mean over axis 1; of others, each its own."""
    return variance.mean(1, keepdim=True) if kind == "categorical" else variance


def novelty(posterior: Posterior, x: Inputs) -> Tensor:
    """See `Posterior.novelty`."""
    confidence, source = posterior.confidence, posterior.unweighted
    if confidence is None or source is None:
        raise ValueError("novelty needs a posterior of class probabilities that was matched to its network; call "
                         "tune_prior() with match='auto' first.")  # fmt: skip
    kind = posterior.likelihood.kind
    found = confidence.steps(shared(source.functional(x, diagonal=True)[1], kind))
    return found.squeeze(1) if kind == "categorical" else found


def seen(posterior: Posterior, data: Data, count: int | None = None) -> tuple[Tensor, bool]:
    """Variances of the outputs on the data that the posterior was fitted to, flat, and whether they are left by others.

    Of all samples, or of every so-manyth where the `count` samples of all data (default: the posterior's), of which
    `data` may be a part, have many outputs.  Where the curvature is exact, each sample's variance is the one that the
    others leave it, S (I - S)^-1 / strength with S = strength J Sigma J^T: its own output holds the rest of it down,
    which no new input's does.
    """
    kind, found, gone, every = posterior.likelihood.kind, [], 0, 0
    count = posterior.count if count is None else count
    whole = posterior.structure == "functional" and posterior.options["subset"] is None
    exact = posterior.structure == "full" or whole
    if whole and (at_hand := _at_hand(posterior)) is not None:
        return shared(at_hand, kind).flatten(), True
    for inputs, _ in batch_data.batches(data):
        cut = posterior._cuts.of(posterior.model, inputs, posterior.output)
        if not every:
            shape = _shape(posterior, cut.take(inputs, slice(0, 1)) if cut.possible else inputs)
            exact = exact and shape.numel() <= MOST_OUTPUTS
            apart = shape.numel() // (shape[0] if kind == "categorical" else 1)
            every = -(-count // max(OUTPUTS // shape.numel(), -(-VARIANCES // apart)))
        start, gone = -gone % every, gone + cut.samples  # of this batch; of all before and with it
        if every > 1 and cut.possible:
            if start >= cut.samples:
                continue
            inputs = cut.take(inputs, slice(start, None, every))
        if exact:
            mean, covariance = posterior.functional(inputs)
            strength = float(posterior.strength())
            variance = _left_out(covariance * strength).view_as(mean) / strength
        else:
            variance = posterior.functional(inputs, diagonal=True)[1]
        found.append(shared(variance, kind).flatten())
        if gone >= SAMPLES * every:
            break
    return torch.cat(found), exact


def _at_hand(unweighted: Posterior) -> Tensor | None:
    """The same variances where the rows of the curvature are those of the samples' own outputs, [N, K]."""
    if unweighted.options["fisher"] != "exact" or unweighted.count > SAMPLES:
        return None
    found = unweighted.precision().left_by_others()
    if found is None or found.shape[1] > MOST_OUTPUTS or unweighted.target not in ((), (found.shape[1],)):
        return None
    return found / float(unweighted.strength())


@torch.no_grad()
def _shape(posterior: Posterior, inputs: Any) -> torch.Size:
    """Of a sample's output."""
    device = next(iter(posterior.weights.values())).device
    with evaluating(posterior.model), isolated(posterior.model, device, 0):
        return batch_data.call(unwrapped(posterior.model), inputs, posterior.output)[0].shape


def _left_out(S: Tensor) -> Tensor:
    """The diagonal of S (I - S)^-1 for S [N, K, K] between 0 and I, [N, K]; up to rounding where S is close to I."""
    values, vectors = torch.linalg.eigh((S.double() + S.double().mT) / 2)
    values = values.clamp(0, 1 - torch.finfo(S.dtype).eps ** 0.5)
    return (vectors.square() @ (values / (1 - values)).unsqueeze(2)).squeeze(2).to(S.dtype)
