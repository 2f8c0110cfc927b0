"""The door: sample the posterior of a linearised network, at any size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import AllReduce
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.passes import trees
from paraboloid.passes.parameter_layers import layer_of
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.prediction.confidence import RARE, RARE_OF_SAMPLES, Confidence
from paraboloid.posteriors.prior_tuning.matching import MATCHES
from paraboloid.posteriors.sampled import checkpoint as checkpoints
from paraboloid.posteriors.sampled.fitting import Fitting, normalisation_layers
from paraboloid.posteriors.sampled.sampled_posterior import SampledPosterior
from paraboloid.posteriors.sampled.state import Progress
from paraboloid.posteriors.weights import Weights, choose
from paraboloid.posteriors.widened import widened

ABOUT, UNSOLVED = 1e-2, 0.5  # residuals of samples that only order inputs by their variance: aimed at, useless from
SOLVERS, OBJECTIVES = ("auto", "dual", "block", "cg", "sgd"), ("low-variance", "noisy-targets")


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
    normalisation: str = "held",
    prior_precision: float = 1.0,
    noise_variance: float | None = 1.0,
    per: str = "all",
    curvature: str = "ggn",
    match: str | None = "auto",
    solver: str = "auto",
    tol: float = 1e-3,
    epochs: int = 10,
    lr: float | None = None,
    batch_size: int = 64,
    objective: str = "low-variance",
    checkpoint: str | Path | None = None,
    callback: Callable[[Progress], Any] | None = None,
    output: Output | None = None,
    max_memory: int | None = None,
    all_reduce: AllReduce = False,
    shard: str = "data",
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
    noise_variance   of a squared error's Gaussian; None: found by EM beside the precision, from that of the model's own
                     residuals on
    normalisation    "held": scales and shifts of normalisation layers stay what they are, in every draw, unless
                     `weights` names them; "free": they are weights as others
    per              one precision for "all" weights, for each "layer" (module) or for each "parameter"
    curvature        "ggn", or "jacobian": the identity in the place of the loss's Hessian, as in `laplace`; the prior
                     is then what one sample tells of each parameter, without EM (em_steps=0: `prior_precision`)
    match            how sure class probabilities are, as in `Posterior.tune_prior`, unless em_steps=0.  "auto": the
                     network's own confidence, lowered where the outputs' variance under curvature="jacobian" is well
                     beyond that on `data` (as many samples again, and with a warning not at all where those are no
                     solutions); "early": from its 99th percentile on; "exponent": `match_confidence()`; None: the
                     plain Bayesian predictive
    solver           "dual" (exact, by the tangent kernel of all outputs and data points), "block" (solves on blocks of
                     that kernel, to the relative residual `tol`), "cg" (all data in each product, to `tol`), "sgd"
                     (`epochs` passes with Nesterov's momentum and averaging, in batches of `batch_size` where `data` is
                     one batch, at the rate `lr` or one measured by the curvature), or "auto": "sgd" where an `lr` is
                     given, else the cheapest of "dual" and "cg" by the operations that each takes; where the graphs of
                     the data do not fit into `max_memory`, the better of "sgd" and "cg" after a few passes by each
    objective        of "sgd": "low-variance" has the noise of the targets in the right-hand side, by one pass before;
                     "noisy-targets" has it in each batch, with the same solution and noisier gradients where the data
                     determines less than half of its outputs
    checkpoint       a file that is renewed, atomically, after each part of the work; where it exists the run goes on
                     from it, up to `em_steps` in total, and ends where it would have ended uninterrupted, bit for bit
    callback         called with a `Progress` at the same moments
    all_reduce       a process group (True: the default one) whose ranks share the work: shard="data", each with its own
                     part of the data, or shard="samples", all with the same data and some of the samples each

    The model is run in evaluation mode and left in the mode it is in.  Where float32 does not carry the samples of
    "dual", as under tiny precisions, a copy of it in float64 takes its place, in the posterior too.

    Raises ValueError for arguments that do not fit, a checkpoint of something else, an `lr` with which the descent
    diverges, and samples that would not fit into memory (saying what they take); LinAlgError for those of "dual" that
    rounding leaves no solutions at all; TypeError for an unknown loss.
    Sources: Antoran et al. 2023, arXiv:2210.04994 (samples, EM, g-prior); Lin et al. 2023, arXiv:2306.11589 (descent);
    Antoran et al. 2022, arXiv:2206.08900 (the optimum of the linearised model).
    """
    model = widened(model)
    check_count("samples", samples)
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    for name, value, choices in (
        ("match", match, MATCHES), ("solver", solver, SOLVERS), ("objective", objective, OBJECTIVES),
        ("normalisation", normalisation, ("held", "free")), ("shard", shard, ("data", "samples")),
        ("g_prior", g_prior, (True, False)),
    ):  # fmt: skip
        check_choice(name, value, choices)
    for name, value in (("prior_precision", prior_precision), ("tol", tol)):
        _check_positive(name, value)
    if not tol < 1:
        raise ValueError(f"tol is {tol}; expected a residual below 1, that of no solution at all.")
    if noise_variance is not None:
        _check_positive("noise_variance", noise_variance, ", or None to have EM find it")
    if lr is not None:
        _check_positive("lr", lr, ", or None to have it measured")
        if solver not in ("sgd", "auto"):
            raise ValueError(f"lr is {lr} with solver={solver!r}, which has no learning rate; expected 'sgd'.")
        solver = "sgd"  # a rate is for a descent: "auto" would not look at it
    if max_memory is not None:
        check_count("max_memory", max_memory)
    if not (callback is None or callable(callback)):
        raise ValueError(f"callback is {callback!r}; expected a function of a Progress.")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}; expected an integer.")
    if objective == "noisy-targets" and solver != "sgd":
        raise ValueError(f"objective='noisy-targets' with solver={solver!r}; expected 'sgd', which alone sees it.")
    check_count("em_steps", em_steps, least=0)
    likelihood, group = Likelihood.of(loss_fn, curvature), collectives.group_of(all_reduce)
    if noise_variance is None and not (likelihood.takes_noise and em_steps and curvature == "ggn"):
        raise ValueError(
            f"noise_variance is None with a {likelihood.kind} likelihood, em_steps={em_steps} and "
            f"curvature={curvature!r}; expected nn.MSELoss, em_steps of at least 1 and 'ggn', under which EM finds it."
        )
    if shard == "samples" and samples < collectives.size_of(group):
        raise ValueError(f"samples is {samples} for {collectives.size_of(group)} processes; expected at least one for "
                         "each. Take more samples, or shard='data'.")  # fmt: skip
    names = chosen(model, weights, normalisation, data, output)
    for name, p in trees.parameters(model).items():
        if not torch.isfinite(p).all():
            raise ValueError(f"parameter {name!r} holds NaN or infinity; expected a trained model.")
    noise = None if noise_variance is None else float(noise_variance)
    fitting = Fitting(
        model, names, data, samples, seed, noise, solver, tol, epochs, lr, batch_size,
        objective == "noisy-targets", output, max_memory, group, shard,
    )  # fmt: skip
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"checkpoint is {str(path)!r}; expected the path of a file in a folder that exists.")
    if path is not None:
        checkpoints.begun(path, group)
    posterior = fitting.drawn(likelihood, g_prior, float(prior_precision), per, em_steps, path, callback)
    if em_steps and match is not None and likelihood.kind in ("categorical", "bernoulli"):
        if match == "exponent":
            return posterior.match_confidence()
        if curvature == "jacobian":
            posterior.unweighted = posterior
        else:
            beside = None if path is None else path.with_name(path.name + ".unweighted")
            unweighted = replace(likelihood, curvature="jacobian")
            fitting = replace(fitting, tol=max(tol, ABOUT))
            posterior.unweighted = fitting.drawn(unweighted, g_prior, 1.0, per, 1, beside, callback)
        early = match == "early"
        confidence = _confidence(fitting, posterior.unweighted, RARE if early else RARE_OF_SAMPLES)
        posterior.confidence = confidence if early else confidence.later()
    return posterior


def _confidence(fitting: Fitting, unweighted: SampledPosterior, rare: float) -> Confidence:
    """That of the fit; where its samples are no solutions, that which leaves the network's predictions, with a warning.

    Samples that are not solved have about the same variance on all training data and a much larger one everywhere else,
    by which the inputs of the training data's own kind would all lose their classes.
    """
    if unweighted.residual < UNSOLVED:
        return fitting.confidence(unweighted, rare)
    warnings.warn(
        f"the relative residual of the samples by which confidence is matched is {unweighted.residual:.2g}; expected "
        f"less than {UNSOLVED}. They do not tell which inputs are rare: class probabilities are the network's own. "
        "Take more epochs, solver='cg', or match=None for the plain Bayesian predictive.", RuntimeWarning, stacklevel=3,
    )  # fmt: skip
    return Confidence(0.0, 0.0)


def _check_positive(name: str, value: Any, otherwise: str = "") -> None:
    number = isinstance(value, Real | Tensor) and not isinstance(value, bool) and torch.as_tensor(value).numel() == 1
    if not (number and 0 < float(value) < math.inf):
        raise ValueError(f"{name} is {value!r}; expected a positive number{otherwise}.")


def chosen(model: nn.Module, weights: Weights, normalisation: str, data: Data, output: Output | None) -> list[str]:
    """The names of the weights that are sampled: without normalisation layers, unless a list names them.

    Source: Antoran et al. 2022, arXiv:2206.08900, section 4: their scale is what makes the weights before them count by
    direction alone.
    """
    names = choose(model, weights, data, output)
    if normalisation == "free" or not (weights == "all" or callable(weights)):
        return names
    layers = normalisation_layers(model)
    return [name for name in names if layer_of(name) not in layers] or names
