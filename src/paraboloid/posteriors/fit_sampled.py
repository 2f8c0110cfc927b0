"""The door: sample the posterior of a linearised network, at any size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Output
from paraboloid.data.joined import joined
from paraboloid.data.pieces import in_pieces
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import AllReduce
from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.losses import LossFunction
from paraboloid.operators.vectors import join
from paraboloid.passes import trees
from paraboloid.passes.memory import GIB, RECORDINGS, available
from paraboloid.passes.parameter_layers import layer_of
from paraboloid.passes.wrappers import unwrapped
from paraboloid.posteriors.fit import parameters_of
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.prior_tuning.evidence import groups_of
from paraboloid.posteriors.sampled import checkpoint as checkpoints
from paraboloid.posteriors.sampled.expectation_maximisation import Progress, Run, State, as_prior
from paraboloid.posteriors.sampled.sampled_posterior import SampledPosterior, by_name
from paraboloid.posteriors.sampled.solvers import Descent
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature
from paraboloid.posteriors.sampled.tangent_kernel import MOST_ROWS, TangentKernel, rows_of
from paraboloid.posteriors.sampled.tangent_system import TangentSystem, feature_scales
from paraboloid.posteriors.weights import Weights, choose, only

SOLVERS, OBJECTIVES, CURVATURES = ("auto", "cg", "sgd", "dual"), ("low-variance", "noisy-targets"), ("ggn", "jacobian")
EM_STEPS, LARGE = 10, 1_000_000
ITERATIONS = 100  # of conjugate gradients that a solution counts as, in the choice of a solver
NORMALISATION = (
    nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm,
)  # fmt: skip


def sampled_laplace(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Data,
    samples: int = 16,
    em_steps: int | None = None,
    g_prior: bool = True,
    seed: int = 0,
    *,
    weights: Weights = "all",
    normalisation: str = "held",
    prior_precision: float = 1.0,
    noise_variance: float = 1.0,
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
                     fewer where it no longer moves (default 10, and 0 with curvature="jacobian"); 0 keeps
                     `prior_precision`
    g_prior          Lambda = lambda diag(H): each weight counts in the unit in which the data sees it, so predictions
                     do not depend on the units of features; `prior_precision` is lambda.  False: Lambda = lambda I
    normalisation    "held": scales and shifts of normalisation layers stay what they are, in every draw, unless
                     `weights` names them; "free": they are weights as others
    per              one precision for "all" weights, for each "layer" (module) or for each "parameter"
    curvature        "ggn", or "jacobian": H = sum_n J_n^T J_n, for which confident data counts too
    match            "auto": after EM (and with "jacobian") the confidence is matched to the network's on the data, as
                     `match_confidence` does; None leaves the plain Bayesian predictive
    solver           "dual" (exact, by the tangent kernel of all outputs and data points), "cg" (all data in each
                     product, to the relative residual `tol`), "sgd" (`epochs` passes with Nesterov's momentum and
                     averaging, in batches of `batch_size` where `data` is one batch, at the rate `lr` or one measured
                     by the curvature), or "auto": the cheapest by the operations that each takes, "sgd" where the
                     graphs of the data do not fit into `max_memory`
    objective        of "sgd": "low-variance" has the noise of the targets in the right-hand side, by one pass before;
                     "noisy-targets" has it in each batch, with the same solution and noisier gradients
    checkpoint       a file that is renewed, atomically, after each part of the work; where it exists the run goes on
                     from it, up to `em_steps` in total, and ends where it would have ended uninterrupted, bit for bit
    callback         called with a `Progress` at the same moments
    all_reduce       a process group (True: the default one) whose ranks share the work: shard="data", each with its own
                     part of the data, or shard="samples", all with the same data and some of the samples each

    The model is run in evaluation mode and left in the mode it is in.

    Raises ValueError for arguments that do not fit, a checkpoint of something else, an `lr` with which the descent
    diverges, and samples that would not fit into memory (saying what they take); TypeError for an unknown loss.
    Sources: Antoran et al. 2023, arXiv:2210.04994 (samples, EM, g-prior); Lin et al. 2023, arXiv:2306.11589 (descent);
    Antoran et al. 2022, arXiv:2206.08900 (the optimum of the linearised model).
    """
    check_count("samples", samples)
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    for name, value, choices in (
        ("match", match, ("auto", None)), ("solver", solver, SOLVERS), ("objective", objective, OBJECTIVES),
        ("curvature", curvature, CURVATURES), ("normalisation", normalisation, ("held", "free")),
        ("shard", shard, ("data", "samples")),
    ):  # fmt: skip
        check_choice(name, value, choices)
    for name, value in (("prior_precision", prior_precision), ("noise_variance", noise_variance), ("tol", tol)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; expected a positive number.")
    if lr is not None and not lr > 0:
        raise ValueError(f"lr is {lr}; expected a positive number, or None to have it measured.")
    if objective == "noisy-targets" and solver != "sgd":
        raise ValueError(f"objective='noisy-targets' with solver={solver!r}; expected 'sgd', which alone sees it.")
    em_steps = (EM_STEPS if curvature == "ggn" else 0) if em_steps is None else em_steps
    check_count("em_steps", em_steps, least=0)
    likelihood, group = Likelihood.of(loss_fn), collectives.group_of(all_reduce)
    names = chosen(model, weights, normalisation, data, output)
    for name, p in trees.parameters(model).items():
        if not torch.isfinite(p).all():
            raise ValueError(f"parameter {name!r} holds NaN or infinity; expected a trained model.")
    mine = range(samples)
    if group is not None and shard == "samples":
        mine = range(collectives.rank_of(group), samples, collectives.size_of(group))
    with only(model, names):
        theta = parameters_of(model)
        check_memory(theta, len(mine), 5 if solver == "sgd" else 4)
        large = sum(w.numel() for w in theta.values()) > LARGE  # whose graphs of all data at once would not fit
        pieces = (
            in_pieces(data, batch_size, model, output) if solver == "sgd" or large else joined(data, model, max_memory)
        )
        tangent = TangentCurvature(
            model, likelihood.loss, pieces, unweighted=curvature == "jacobian", output=output, max_memory=max_memory,
            ordered=objective == "noisy-targets",
        )  # fmt: skip
        strength, across = float(likelihood.strength(noise_variance)), group if shard == "samples" else None
        system = TangentSystem(tangent, strength, seed, mine, group=None if across is not None else group)
        diagonal = system.diagonal()
        if g_prior:
            system.scale = feature_scales(diagonal, system.parameters)
            diagonal = diagonal.mul_(system.scale).mul_(system.scale)
        groups, places = groups_of(theta, per), {name: i for i, name in enumerate(theta)}
        solver = cheapest(system, max_memory) if solver == "auto" else solver
        descent = Descent(epochs, lr, noisy=objective == "noisy-targets") if solver == "sgd" else None
        dual = dual_of(system) if solver == "dual" else None
        at = [[places[k] for k in members] for members in groups]
        run = Run(system, at, join(list(theta.values())), diagonal, tol, descent, dual, across)
        settings = {
            "samples": samples, "here": [mine.start, mine.step], "seed": seed, "g_prior": g_prior, "per": per,
            "curvature": curvature, "solver": solver, "objective": objective, "tol": tol,
            "noise_variance": noise_variance, "prior_precision": prior_precision,
            **({} if descent is None else {"epochs": epochs, "lr": lr}),
        }  # fmt: skip
        belongs = checkpoints.fingerprint(theta, system.replay, settings)
        state = State([float(prior_precision)] * len(groups))
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and path.exists():
            state = checkpoints.load(path, belongs, system.like.device)

        def after(state: State) -> None:
            if path is not None:
                checkpoints.save(path, state, belongs)
            if callback is not None:
                callback(run.progress(state))

        state = run.go(state, em_steps, after)
        assert state.w is not None
        deviations = system.deviations(state.w)
        if across is not None:
            deviations = _interleaved(deviations, samples, mine, across)
    every = by_name(deviations, theta)
    for name, p in held(model, names):
        every[name] = p.new_zeros(samples, *p.shape)
    posterior = SampledPosterior(
        model, likelihood, theta, every, as_prior(groups, state.precision, list(theta)), sum(state.gammas),
        state.history, float(noise_variance), tangent.target, output, max_memory, data,
    )  # fmt: skip
    classes = likelihood.kind in ("categorical", "bernoulli")
    if match == "auto" and classes and (em_steps or curvature == "jacobian"):
        posterior.match_confidence()
    return posterior


def cheapest(system: TangentSystem, max_memory: int | None) -> str:
    """ "sgd" where graphs are not kept; else "dual" or "cg", by the multiplications of forming and of products.

    A product takes about four forward passes for each sample; `ITERATIONS` of them stand for a solution.
    """
    rows = rows_of(system)
    if system.replay.kept is None or rows is None:
        return "sgd" if system.replay.kept is None else "cg"
    fits = rows * system.size * system.like.element_size() <= RECORDINGS.of(max_memory) - system.replay.size
    dual = 2 * rows**2 * system.size + rows**3
    return (
        "dual"
        if fits and rows <= MOST_ROWS and dual < ITERATIONS * 4 * system.replay.flops * len(system.everyone)
        else "cg"
    )


def dual_of(system: TangentSystem) -> TangentKernel:
    """Raises ValueError where the tangent kernel would be too large, or its graphs are not at hand."""
    rows = rows_of(system)
    if rows is None:
        raise ValueError(
            "solver='dual' needs the graphs of all data in this process, and they do not fit into max_memory or the "
            "data is shared out; expected less data. Take solver='sgd' or 'cg'."
        )
    if rows > MOST_ROWS:
        raise ValueError(
            f"solver='dual' with {rows} outputs times data points; expected at most {MOST_ROWS}, whose tangent kernel "
            "has a Cholesky factor. Take solver='cg' or 'sgd'."
        )
    return TangentKernel(system)


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


def normalisation_layers(model: nn.Module) -> set[str]:
    plain = unwrapped(model)
    modules = plain.named_modules() if isinstance(plain, nn.Module) else []
    return {name for name, module in modules if isinstance(module, NORMALISATION)}


def held(model: nn.Module, names: list[str]) -> list[tuple[str, Tensor]]:
    """The normalisation layers' parameters that stay what they are."""
    layers = normalisation_layers(model)
    return [
        (name, p.detach()) for name, p in trees.parameters(model).items()
        if name not in names and layer_of(name) in layers
    ]  # fmt: skip


def check_memory(theta: dict[str, Tensor], samples: int, copies: int) -> None:
    """Raise ValueError where that many copies of the weights for each sample would not fit."""
    size, first = sum(w.numel() for w in theta.values()), next(iter(theta.values()))
    needed, free = copies * samples * size * first.element_size(), available(first.device)
    if free is not None and needed > free:
        one = copies * size * first.element_size()
        raise ValueError(
            f"{samples} samples of {size} weights would take {needed / GIB:.1f} GiB, {copies} copies of the weights "
            f"for each; {free / GIB:.1f} GiB are free, enough for {int(0.8 * free / one)}. Take fewer samples, "
            "fewer weights (weights='last_layer'), or more processes (all_reduce=True, shard='samples')."
        )


def _interleaved(rows: Tensor, samples: int, mine: range, group: Any) -> Tensor:
    """The rows of all processes, in the samples' order."""
    every = rows.new_zeros(samples, rows.shape[1])
    every[mine.start :: mine.step] = rows
    return collectives.summed(every, group, rows.device)
