"""The door: fit a Laplace posterior to a trained model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paraboloid.data.batches import Data, Output
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.passes import trees
from paraboloid.posteriors import fit
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.posterior import Posterior
from paraboloid.posteriors.subnetworks import chosen_elements, is_elementwise
from paraboloid.posteriors.weights import Weights, choose, only
from paraboloid.posteriors.widened import widened
from paraboloid.quantities.kronecker import fisher_source
from paraboloid.quantities.quantity import check_tolerance
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, check_max_factor


def laplace(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    structure: str = "kron",
    weights: Weights = "all",
    prior_precision: Any = 1.0,
    noise_variance: float = 1.0,
    debias: bool = False,
    seed: int = 0,
    *,
    curvature: str = "ggn",
    fisher: str = "exact",
    samples: int = 1,
    rank: int = 10,
    subset: int | None = None,
    temperature: float = 1.0,
    max_factor: int = MAX_FACTOR,
    output: Output | None = None,
    max_memory: int | None = None,
    tol: float = 0.0,
) -> Posterior:
    """The Laplace approximation at a trained model's weights: N(theta, (H / noise_variance + Lambda)^-1).

    H is the GGN of the *summed* negative log-likelihood of the data, whatever `reduction` says (class weights and
    ignored targets inside), and Lambda the diagonal of the prior's precisions.  The empirical Fisher of a squared error
    is divided by noise_variance^2: its gradients are (f - y) / noise_variance times the Jacobian.

    loss_fn          CrossEntropyLoss (categorical), BCEWithLogitsLoss (Bernoulli), MSELoss (read as
                     N(f, noise_variance I)), GaussianNLL (heteroscedastic), PoissonNLLLoss, or a `pb.Loss` of your own
    data             a batch or an iterable of batches; the fit does not depend on how it is batched
    structure        "kron" (KFAC's blocks, damped in their eigenbasis), "ekfac" (the exact eigenvalues along KFAC's
                     eigenvectors), "diag", "full", "lowrank" (the `rank` largest eigenpairs), or "functional" (the
                     exact GGN in its dual form, of all samples or of `subset` of them, scaled)
    weights          "all", "last_layer", a list of names of parameters or modules, or a predicate; with "full" and
                     "diag" also single weights (a subnetwork): their places, int64 [S], or a mask, bool [D], among all
                     trainable ones, or masks by name (`pb.posteriors.largest_magnitude`, `.largest_variance`)
    prior_precision  a number, [D], [number of parameters] or a dict by name; one number for each parameter with "kron"
                     and "ekfac"
    debias           for "kron" and "ekfac": eigenvectors from one half of every batch and eigenvalues from the other,
                     in both roles (`CrossFitted`); for posteriors fitted on few samples
    curvature        "ggn": H = sum_n J_n^T H_n J_n with the loss's Hessian H_n; "jacobian": the identity in its place,
                     sum_n J_n^T J_n (times 1 / noise_variance where there is one), the same thing for a squared error.
                     A softmax Hessian vanishes where the network is sure, which leaves the posterior its variance where
                     the network is right; without it every sample narrows the posterior.  Evidence then is a score, no
                     probability of the data
    fisher           "exact" (the loss's own Hessian), "mc" (`samples` labels drawn from the model) or "empirical"; with
                     "full" and "diag" also "hessian": the network's own curvature too, which may be indefinite (then
                     prior_precision has to make up for it)
    temperature      divides the log-likelihood
    max_factor       of "kron" and "ekfac": a Kronecker side with more rows is kept as its diagonal, and so is the whole
                     block of a parameter without Kronecker factors; a warning names them
    output           picks the output tensor from a structured result, e.g. ``lambda o: o.logits``
    max_memory       bytes, an upper aim for temporary memory
    tol              with fisher="exact": relative trace of the loss's Hessians that may be left out, for many classes;
                     see `paraboloid.statistics`.  What was left out is `posterior.left_out`

    The model is run in evaluation mode, at the fit and at predictions, and left in the mode it is in: a prediction
    depends neither on the batch that an input comes in nor on masks of dropout.

    A model in half precision is copied, and the posterior over its weights is computed in float32.

    Raises ValueError for arguments that do not fit, weights that are not finite, and matrices that would not fit into
    memory (saying how large they are, and what would); TypeError for an unknown loss.
    Sources: MacKay 1992; Ritter et al. 2018 (Kronecker); Immer et al. 2021, arXiv:2008.08216 (GGN, linearised outputs).
    """
    check_choice("structure", structure, fit.STRUCTURES)
    check_choice("fisher", fisher, fit.FISHERS)
    for name, value in (("noise_variance", noise_variance), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected a positive number.")
    if debias and structure not in ("kron", "ekfac"):
        raise ValueError(f"debias=True with structure={structure!r}; expected 'kron' or 'ekfac', whose eigenvectors "
                         "and eigenvalues can be taken from different samples.")  # fmt: skip
    if curvature == "jacobian" and fisher == "empirical":
        raise ValueError("curvature='jacobian' with fisher='empirical'; expected fisher='exact' or 'mc': the empirical "
                         "Fisher is made of the loss's gradients.")  # fmt: skip
    check_count("rank", rank)
    model, likelihood = widened(model), Likelihood.of(loss_fn, curvature)
    known = trees.parameters(model)
    at = None
    if is_elementwise(weights):
        if structure not in ("full", "diag"):
            raise ValueError(f"structure is {structure!r} with single weights; expected 'full' or 'diag', or whole "
                             "parameters.")  # fmt: skip
        names, at = chosen_elements(model, weights)
    else:
        names = choose(model, weights, data, output, known)
    if fisher == "hessian" and (structure not in ("full", "diag") or curvature == "jacobian"):
        raise ValueError(f"fisher is 'hessian' with structure={structure!r} and curvature={curvature!r}; expected "
                         "'full' or 'diag' and 'ggn', or the GGN (fisher='exact'), which alone is known to be positive "
                         "semi-definite.")  # fmt: skip
    for name, p in known.items():
        if not torch.isfinite(p).all():
            raise ValueError(f"parameter {name!r} holds NaN or infinity; expected a trained model.")
    with only(model, names, known):
        parameters = {name: known[name].detach().clone() for name in names}
        device = next(iter(parameters.values())).device
        tolerance = check_tolerance(tol)
        if fisher != "hessian":
            tolerance = fisher_source(fisher, samples, tolerance).tol
        fitting = fit.Fitting(
            model, likelihood, fisher, check_count("samples", samples), torch.Generator(device).manual_seed(seed),
            output, max_memory, check_max_factor(max_factor),
            tol=tolerance,
        )  # fmt: skip
        options = {"fisher": fisher, "samples": samples, "rank": rank, "subset": subset, "seed": seed, "debias": debias,
                   "max_factor": max_factor, "tol": fitting.tol, "curvature": curvature, "at": at}  # fmt: skip
        fitted = fit.curvature(structure, fitting, parameters, data, options)
        options["left_out"] = list(fitting.left_out)
    posterior = Posterior(
        model, likelihood, structure, fitted, parameters, fitting.loss, fitting.constant, fitting.count,
        fitting.elements, fitting.target, float(noise_variance), float(temperature), output, max_memory, options, data,
    )  # fmt: skip
    posterior.prior_precision = prior_precision
    return posterior
