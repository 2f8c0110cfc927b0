"""From a Gaussian over outputs to a predictive distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Inputs
from paraboloid.linalg.operand import check_count
from paraboloid.losses import BCE, KLDiv
from paraboloid.passes.memory import COVARIANCES
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import isolated
from paraboloid.passes.wrappers import Elsewhere, unwrapped
from paraboloid.posteriors.prediction.confidence import shared
from paraboloid.posteriors.prediction.sharpness import sharpened

if TYPE_CHECKING:
    from paraboloid.posteriors.posterior import Posterior

BRIDGES = ("bridge", "bridge_norm")
LINKS = ("probit", *BRIDGES, "mc", "weights")


@dataclass(frozen=True)
class Prediction:
    """Moments of y: mean [N, C, ...] and its variance, that of the model (its weights) plus that of the noise."""

    mean: Tensor
    model_variance: Tensor
    noise_variance: Tensor

    @property
    def variance(self) -> Tensor:
        return self.model_variance + self.noise_variance

    @property
    def stddev(self) -> Tensor:
        return self.variance.sqrt()


def predict(
    posterior: Posterior, x: Inputs, link: str | None, samples: int, seed: int, differentiable: bool = False
) -> Any:  # fmt: skip
    """See `Posterior.predict`."""
    found, kind = _predict(posterior, x, link, samples, seed, differentiable), posterior.likelihood.kind
    if kind == "gaussian" and (spread := getattr(posterior, "spread", 1.0)) != 1.0:
        return Prediction(found.mean, spread * found.model_variance, spread * found.noise_variance)
    return sharpened(found, posterior.sharpness, kind) if kind in ("categorical", "bernoulli") else found


def _predict(
    posterior: Posterior, x: Inputs, link: str | None, samples: int, seed: int, differentiable: bool
) -> Any:  # fmt: skip
    kind = posterior.likelihood.kind
    option: dict[str, Any] = {"differentiable": True} if differentiable else {}  # which not every posterior has
    if link is not None and link not in LINKS:
        raise ValueError(f"link is {link!r}; expected one of {LINKS}.")
    check_count("samples", samples)
    classes = kind in ("categorical", "bernoulli")
    probabilities = isinstance(posterior.likelihood.given, BCE | KLDiv)
    if probabilities and link in (None, "probit"):
        return of_probabilities(posterior.likelihood.given, *posterior.functional(x, diagonal=True, **option))
    if link in ("probit", *BRIDGES) and not classes:
        raise ValueError(f"link is {link!r} with a {kind} likelihood; expected None or one of ('mc', 'weights').")
    if getattr(posterior, "confidence", None) is not None:  # posteriors of other kinds have none
        if differentiable:
            raise ValueError("differentiable=True for predictions of matched confidence; expected plain ones: "
                             "tune_prior(..., match=None).")  # fmt: skip
        return matched(posterior, x, link, samples, seed)
    if differentiable and link == "weights":
        raise ValueError("differentiable=True with link='weights'; expected a link of the linearised outputs: None, "
                         "'probit', 'bridge', 'bridge_norm' or 'mc'.")  # fmt: skip
    if link == "weights":
        return averaged(posterior, network_draws(posterior, x, samples, seed))
    if link == "mc" or kind == "other":
        if not differentiable and _is_large(posterior, x):
            return averaged(posterior, iter(posterior.functional_samples(x, samples, seed)))
        mean, covariance = posterior.functional(x, **option)
        draws = gaussian_draws(mean.flatten(1), covariance, samples, seed)
        return averaged(posterior, iter(draws.view(samples, *mean.shape)))
    if link in BRIDGES:
        return _bridge(posterior, link, *posterior.functional(x, **option))
    mean, variance = posterior.functional(x, diagonal=True, **option)
    if classes:
        return probit(mean, variance, kind == "categorical")
    if kind == "poisson":
        return poisson(posterior, mean, variance)
    if kind == "heteroscedastic":
        return heteroscedastic(posterior, mean, variance)
    return Prediction(mean, variance.clamp(min=0), gaussian_noise(posterior, variance))  # rounding may leave less


def gaussian_noise(posterior: Posterior, like: Tensor) -> Tensor:
    """The noise's variance in what is predicted: none where the output itself is, since only a measurement has it."""
    return torch.full_like(like, 0.0 if posterior.likelihood.is_observed else posterior.noise_variance)


def of_probabilities(loss: BCE | KLDiv, mean: Tensor, variance: Tensor) -> Tensor:
    """The probit approximation from moments of log-probabilities, or of probabilities by way of their logits: where
    p = sigmoid(z) the linearised z has the variance of p over (p (1 - p))^2."""
    if isinstance(loss, KLDiv):
        return probit(mean, variance, categorical=True)
    slope = (mean * (1 - mean)).clamp(min=torch.finfo(mean.dtype).eps)
    return probit(mean.logit(torch.finfo(mean.dtype).eps), variance / slope.square(), categorical=False)


def _is_large(posterior: Posterior, x: Inputs) -> bool:
    """Whether the covariances of all elements of each output, [N, K, K], are too much to hold."""
    cut = posterior._cuts.of(posterior.model, x, posterior.output)
    if cut.samples == 0:
        return False
    one = cut.take(x, slice(0, 1)) if cut.possible else x
    first = next(iter(posterior.weights.values()))
    with evaluating(posterior.model), isolated(posterior.model, first.device, 0):
        K = batch_data.evaluate(unwrapped(posterior.model), one, posterior.output)[0].numel()
    return cut.samples * K**2 * first.element_size() > COVARIANCES.of()


def _bridge(posterior: Posterior, link: str | None, mean: Tensor, covariance: Tensor) -> Tensor:
    kind = posterior.likelihood.kind
    if kind != "categorical" or mean.dim() != 2:
        raise ValueError(f"link={link!r} is for class probabilities of outputs [N, C]; found a {kind} likelihood "
                         f"and outputs {tuple(mean.shape)}. Use 'probit' or 'mc'.")  # fmt: skip
    return bridge(mean, covariance, normalised=link == "bridge_norm")


def matched(posterior: Posterior, x: Inputs, link: str | None, samples: int, seed: int) -> Tensor:
    """Probabilities with the network's confidence, lowered where the training data says little; see `confidence`.

    Probit: the logits times c.  Other links: the outputs N(f, s Sigma) of the unweighted posterior, with s such that
    the probit approximation of that is the same.
    """
    kind, source, confidence = posterior.likelihood.kind, posterior.unweighted, posterior.confidence
    assert source is not None and confidence is not None
    if link in (None, "probit"):
        mean, variance = source.functional(x, diagonal=True)
        return probit(confidence.factor(shared(variance, kind)) * mean, torch.zeros_like(mean), kind == "categorical")
    if link in ("mc", "weights") and _is_large(source, x):
        mean, variance = source.functional(x, diagonal=True)
        covariance = None
    else:
        mean, covariance = source.functional(x)
        variance = covariance.diagonal(dim1=1, dim2=2).view_as(mean)
    root = confidence.scale(shared(variance, kind)).sqrt().expand_as(mean)
    if link == "weights":
        return averaged(posterior, (mean + root * (f - mean) for f in network_draws(source, x, samples, seed)))
    if covariance is None:
        return averaged(posterior, (mean + root * (f - mean) for f in source.functional_samples(x, samples, seed)))
    covariance = root.flatten(1).unsqueeze(2) * covariance * root.flatten(1).unsqueeze(1)
    if link in BRIDGES:
        return _bridge(posterior, link, mean, covariance)
    draws = gaussian_draws(mean.flatten(1), covariance, samples, seed)
    return averaged(posterior, iter(draws.view(samples, *mean.shape)))


def poisson(posterior: Posterior, mean: Tensor, variance: Tensor) -> Prediction:
    """Moments of a count whose log rate is Gaussian: E y = E rate = exp(m + v / 2), and E rate is the noise's part."""
    if not posterior.likelihood.given.log_input:  # the output is the rate
        return Prediction(mean, variance, mean)
    rate = (mean + variance / 2).exp()
    return Prediction(rate, variance.expm1() * rate.square(), rate)


def heteroscedastic(posterior: Posterior, mean: Tensor, variance: Tensor) -> Prediction:
    """The mean's own moments, and the expected noise variance: E exp(u) = exp(m + v / 2) of a Gaussian logarithm."""
    loss = posterior.likelihood.given
    if loss.variance is not None:
        noise = torch.as_tensor(loss.variance, dtype=mean.dtype, device=mean.device)
        return Prediction(mean, variance, noise.expand_as(mean))
    size = posterior.target[0] if len(posterior.target) == mean.dim() - 1 else 1
    noise, spread = mean[:, size:], variance[:, size:]
    noise = (noise + spread / 2).exp() if loss.log_variance else noise.clamp(min=loss.eps)
    return Prediction(mean[:, :size], variance[:, :size], noise.expand_as(mean[:, :size]))


def averaged(posterior: Posterior, draws: Iterator[Tensor]) -> Any:
    """The mixture over draws of the outputs f: mean probabilities, or the mixture's moments of y."""
    kind, loss = posterior.likelihood.kind, posterior.likelihood.given
    if kind in ("categorical", "bernoulli"):
        return _mean(f.softmax(1) if kind == "categorical" else f.sigmoid() for f in draws)
    if kind == "other":
        if not callable(getattr(loss, "predictive", None)):
            raise NotImplementedError(
                f"{type(loss).__name__} does not say what an output predicts; expected a method predictive(f) that "
                "maps outputs [N, ...] to probabilities or a mean. Or use functional(x), sample(n)."
            )
        return _mean(loss.predictive(f) for f in draws)
    moments = []
    for f in draws:
        if kind == "gaussian":
            moments.append((f, gaussian_noise(posterior, f)))
        else:
            found = poisson if kind == "poisson" else heteroscedastic
            certain = found(posterior, f, torch.zeros_like(f))
            moments.append((certain.mean, certain.noise_variance))
    means, noise = (torch.stack(part) for part in zip(*moments, strict=True))
    return Prediction(means.mean(0), means.var(0, correction=0), noise.mean(0))


def _mean(values: Iterable[Tensor]) -> Tensor:
    total, count = None, 0
    for value in values:
        total = value.clone() if total is None else total.add_(value)
        count += 1
    assert total is not None
    return total / count


def network_draws(posterior: Posterior, x: Inputs, samples: int, seed: int) -> Iterator[Tensor]:
    """Outputs of networks with weights drawn from the posterior, one network at a time."""
    posterior.check_weights()
    drawn = posterior.sample(samples, seed)
    for s in range(samples):
        network: Any = Elsewhere(posterior.model, {k: w[s] for k, w in drawn.items()})
        with evaluating(network.model), isolated(network.model, next(iter(drawn.values())).device, 0):
            f = batch_data.evaluate(network, x, posterior.output)
        yield f


def probit(mean: Tensor, variance: Tensor, categorical: bool) -> Tensor:
    """softmax(f_c / sqrt(1 + pi/8 v_c)) over axis 1, or the sigmoid of each: needs variances alone, [N, C, ...].

    Source: MacKay 1992; for several classes Lu, Ie and Sha 2020, arXiv:2006.07584.
    """
    scaled = mean / (1 + math.pi / 8 * variance).sqrt()
    return scaled.softmax(1) if categorical else scaled.sigmoid()


def bridge(mean: Tensor, covariance: Tensor, normalised: bool = False) -> Tensor:
    """The mean of the Dirichlet distribution that the Laplace bridge assigns to N(mean [N, C], covariance [N, C, C]).

    The Gaussian is first conditioned on a sum of zero, where the bridge is defined; alpha_c proportional to
    (1 - 2/C + exp(f_c) / C^2 sum_j exp(-f_j)) / v_c.  `normalised`: f over the root of mean_c v_c / sqrt(C / 2) first,
    for large variances break the map.  Source: Hobbhahn, Kristiadi and Hennig 2022, arXiv:2003.01227.
    """
    C = mean.shape[1]
    total, rows = covariance.sum((1, 2)), covariance.sum(2)
    scale = torch.where(total > 0, total, 1)
    f = mean - rows * (mean.sum(1) / scale).unsqueeze(1)
    v = covariance.diagonal(dim1=1, dim2=2) - rows.square() / scale.unsqueeze(1)
    v = v.clamp(min=torch.finfo(v.dtype).tiny ** 0.5)
    if normalised:
        f = f / (v.mean(1, keepdim=True) / (C / 2) ** 0.5).sqrt()  # v by the same number leaves alpha's ratios
    share = math.log(C**2 - 2 * C) if C > 2 else -math.inf
    log_alpha = torch.logaddexp(f + torch.logsumexp(-f, 1, keepdim=True), torch.full_like(f, share)) - v.log()
    return log_alpha.softmax(1)


def gaussian_draws(mean: Tensor, covariance: Tensor, samples: int, seed: int) -> Tensor:
    """[S, N, K] from N(mean [N, K], covariance [N, K, K]): the same standard normal numbers for every input.

    So that predictions are smooth in the input, and the difference of two inputs has little noise.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(1) @ vectors.mT  # symmetric, so it moves smoothly
    generator = torch.Generator(device=mean.device).manual_seed(seed)
    z = torch.randn(samples, 1, mean.shape[1], generator=generator, dtype=mean.dtype, device=mean.device)
    return mean + (root @ z.unsqueeze(-1)).squeeze(-1)
