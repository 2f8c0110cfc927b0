"""The door: sample the posterior of a linearised network, at any size."""

from __future__ import annotations

from torch import nn

from paraboloid.data.batches import Data, Output
from paraboloid.data.joined import joined
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.operators import GGN
from paraboloid.operators.vectors import join
from paraboloid.posteriors.fit import parameters_of
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.prior_tuning.evidence import groups_of
from paraboloid.posteriors.sampled.expectation_maximisation import Run, State, as_prior
from paraboloid.posteriors.sampled.sampled_posterior import SampledPosterior, by_name
from paraboloid.posteriors.sampled.tangent_system import TangentSystem, feature_scales
from paraboloid.posteriors.weights import Weights, choose, only


def sampled_laplace(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    samples: int = 16,
    em_steps: int = 10,
    g_prior: bool = True,
    seed: int = 0,
    *,
    weights: Weights = "all",
    prior_precision: float = 1.0,
    noise_variance: float = 1.0,
    per: str = "all",
    match: str | None = "auto",
    tol: float = 1e-3,
    output: Output | None = None,
    max_memory: int | None = None,
) -> SampledPosterior:
    """Draw from the Laplace posterior of a trained model's linearisation, by products with J and J^T alone.

    N(theta, (H / noise_variance + Lambda)^-1) with the H of `laplace`, the GGN of the summed negative log-likelihood,
    and Lambda the prior's precision.  Each draw is the solution of a linear system ("sample, then optimise"), all of
    them at once, so neither H nor a Jacobian is ever formed and memory is a few copies of the weights for each sample.
    Where `laplace` tunes the prior by determinants and traces, here they are sums over the samples.

    data             a batch or an iterable of batches, read again on every pass where its graphs do not fit into memory
    samples          how many draws; an effective dimension or a variance has the relative error sqrt(2 / samples)
    em_steps         updates of the prior's precision at most, by MacKay's rule at the optimum of the linearised model,
                     fewer where it no longer moves; 0 keeps `prior_precision`
    g_prior          Lambda = lambda diag(H): each weight counts in the unit in which the data sees it, so predictions
                     do not depend on the units of features; `prior_precision` is lambda.  False: Lambda = lambda I
    per              one precision for "all" weights, for each "layer" (module) or for each "parameter"
    match            "auto": after EM the confidence is matched to the network's on the data, as `match_confidence`
                     does; None leaves the plain Bayesian predictive
    tol              relative residual to which the systems are solved

    The model is run in evaluation mode and left in the mode it is in.  Sources:
    Antoran et al. 2023, arXiv:2210.04994 (samples, EM, g-prior); Antoran et al. 2022, arXiv:2206.08900 (the optimum).
    """
    check_count("samples", samples)
    check_count("em_steps", em_steps, least=0)
    check_choice("match", match, ("auto", None))
    likelihood = Likelihood.of(loss_fn)
    names = choose(model, weights, data, output)
    with only(model, names):
        theta = parameters_of(model)
        curvature = GGN(model, likelihood.loss, joined(data, model, max_memory), output=output, max_memory=max_memory)
        curvature.root.after(10**9)  # now or never, so that a resumed run computes the same
        strength = float(likelihood.strength(noise_variance))
        system = TangentSystem(curvature, strength, seed, range(samples))
        diagonal = system.diagonal()
        if g_prior:
            system.scale = feature_scales(diagonal, system.parameters)
            diagonal = diagonal * system.scale.square()
        groups, places = groups_of(theta, per), {name: i for i, name in enumerate(theta)}
        run = Run(
            system,
            [[places[k] for k in names] for names in groups],
            join(list(theta.values())),
            diagonal,
            tol,
        )
        state = run.go(State([prior_precision] * len(groups)), em_steps, lambda state: None)
        assert state.w is not None
        deviations = system.deviations(state.w)
    posterior = SampledPosterior(
        model, likelihood, theta, by_name(deviations, theta), as_prior(groups, state.precision, list(theta)),
        sum(state.gammas), state.history, noise_variance, (), output, max_memory, data,
    )  # fmt: skip
    if match == "auto" and em_steps and likelihood.kind in ("categorical", "bernoulli"):
        posterior.match_confidence()
    return posterior
