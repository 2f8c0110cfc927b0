"""How samples are drawn: a tangent system of the model on its data, the solver that is cheapest, and a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.data.joined import joined
from paraboloid.data.pieces import in_pieces
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.operators.vectors import join
from paraboloid.passes import trees
from paraboloid.passes.memory import GIB, RECORDINGS, available
from paraboloid.passes.parameter_layers import layer_of
from paraboloid.passes.random_state import RandomStream
from paraboloid.passes.wrappers import unwrapped
from paraboloid.posteriors.fit import parameters_of
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.prediction.confidence import SAMPLES, Confidence, shared
from paraboloid.posteriors.prior_tuning.evidence import groups_of
from paraboloid.posteriors.sampled import checkpoint as checkpoints
from paraboloid.posteriors.sampled import noise
from paraboloid.posteriors.sampled.expectation_maximisation import Run, as_prior
from paraboloid.posteriors.sampled.in_float64 import NotCarried, in_float64
from paraboloid.posteriors.sampled.sampled_posterior import SampledPosterior, by_name
from paraboloid.posteriors.sampled.shortfall import tell
from paraboloid.posteriors.sampled.solvers import Descent
from paraboloid.posteriors.sampled.state import Progress, State
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature, displaced, marks_of
from paraboloid.posteriors.sampled.tangent_kernel import MOST_ROWS, TangentKernel, rows_of
from paraboloid.posteriors.sampled.tangent_system import TangentSystem, feature_scales
from paraboloid.posteriors.weights import only

LARGE = 1_000_000  # weights from which the graphs of all data at once would not fit
ITERATIONS = 100  # of conjugate gradients that a solution counts as, in the choice of a solver
NORMALISATION = (
    nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm,
)  # fmt: skip


@dataclass(eq=False)
class Fitting:
    """What every draw from a model's posteriors shares; see `sampled_laplace` for what the options are."""

    model: nn.Module
    names: list[str]  # of the weights that are sampled
    data: Data
    samples: int
    seed: int
    noise_variance: float | None  # None: EM finds it
    solver: str
    tol: float
    epochs: int
    lr: float | None
    batch_size: int
    noisy: bool
    output: Output | None
    max_memory: int | None
    group: Group
    shard: str
    first: int = 0  # the number of this process's first data point
    order: Tensor | None = None  # the marks of its data, to which the noise belongs

    @cached_property
    def mine(self) -> range:
        """The samples that this process solves for."""
        if self.group is None or self.shard == "data":
            return range(self.samples)
        return range(collectives.rank_of(self.group), self.samples, collectives.size_of(self.group))

    def drawn(
        self, likelihood: Likelihood, g_prior: bool, prior_precision: float, per: str, em_steps: int,
        path: Path | None, callback: Callable[[Progress], Any] | None,
    ) -> SampledPosterior:  # fmt: skip
        """A posterior under a likelihood; with the identity for the loss's Hessian EM is replaced by the prior of
        `unit_information`.

        Where float32 does not carry samples by a Cholesky factor, all is done anew in float64.
        """
        options = g_prior, prior_precision, per, em_steps
        beside = None if path is None else path.with_name(path.name + ".float64")
        begun = beside is not None and checkpoints.begun(beside, self.group)
        other = self._in_float64(likelihood) if begun else None
        if other is None:
            try:
                return self._drawn(likelihood, *options, path, callback, carried=True)
            except NotCarried:
                if (other := self._in_float64(likelihood)) is None:
                    return self._drawn(likelihood, *options, path, callback)
        found = other._drawn(likelihood, *options, beside, callback)
        self.first, self.order = other.first, other.order
        return found

    def _in_float64(self, likelihood: Likelihood) -> Fitting | None:
        model = in_float64(self.model, likelihood.curved, self.data, self.output)
        return None if model is None else replace(self, model=model)

    def _drawn(
        self, likelihood: Likelihood, g_prior: bool, prior_precision: float, per: str, em_steps: int,
        path: Path | None, callback: Callable[[Progress], Any] | None, carried: bool = False,
    ) -> SampledPosterior:  # fmt: skip
        with only(self.model, self.names):
            theta = parameters_of(self.model)
            check_memory(theta, len(self.mine), 5 if self.solver == "sgd" else 4)
            system = self._system(likelihood, theta)
            unit = likelihood.curvature == "jacobian" and em_steps > 0
            solver, kernel = self.solver, None if rows_of(system) is None else TangentKernel(system)
            if solver == "auto":
                solver = cheapest(system, self.max_memory, kernel, g_prior and not unit)
            probes = self.solver == "auto" and solver == "sgd"
            descent = Descent(self.epochs, self.lr, noisy=self.noisy) if solver == "sgd" else None
            self.first, self.order = system.first, system.curvature.order
            groups, places = groups_of(theta, "parameter" if unit else per), {name: i for i, name in enumerate(theta)}
            at = [[places[k] for k in members] for members in groups]
            across = self.group if self.shard == "samples" else None
            settings = {
                "dtype": str(system.like.dtype), "likelihood": likelihood.kind,
                "samples": self.samples, "here": [self.mine.start, self.mine.step], "seed": self.seed,
                "g_prior": g_prior, "per": per, "curvature": likelihood.curvature,
                "solver": "either" if probes else solver, "tol": self.tol,
                "noise_variance": self.noise_variance, "prior_precision": "unit" if unit else prior_precision,
                **({} if descent is None else {
                    "epochs": self.epochs, "lr": self.lr, "noisy": self.noisy, "batches": system.steps,
                }),
            }  # fmt: skip
            belongs = checkpoints.fingerprint(theta, system.curvature, settings)
            path = None if path is None else checkpoints.of_process(path, self.group)
            state = None if path is None else checkpoints.resumed(path, belongs, system.like.device, self.group)
            state = State([prior_precision] * len(groups)) if state is None else state
            elements, first = 0.0, 1.0
            if self.noise_variance is None:
                elements = float(system.count * math.prod(system.curvature.target))
                squares = 2 * system.summed(torch.tensor(system.replay.total, dtype=torch.float64)).item()
                first = max(squares / elements, torch.finfo(torch.float32).tiny)
                system.strength = 1 / first
                state.noise = first if state.noise is None else state.noise
            fresh = state.diagonal is None
            diagonal = state.diagonal = system.diagonal() if state.diagonal is None else state.diagonal
            if g_prior:
                parameters = system.parameters
                system.scale = input_scales(parameters) if unit else feature_scales(diagonal, parameters)
                diagonal = (diagonal * system.scale).mul_(system.scale)
            dual = dual_of(kernel, solver) if solver in ("dual", "block") else None  # of rows in the units of the scale
            run = Run(
                system, at, join(list(theta.values())), diagonal, self.tol, descent, dual, solver == "block", across,
                probes, elements, first, likelihood.loss, carried and system.like.dtype == torch.float32,
            )  # fmt: skip
            if state.noise is not None:
                run.place(state.noise)
            if unit and state.b is None:
                state.precision = unit_information(run)

            def after(state: State) -> None:
                # Descents for samples apart are not at one place; that of processes with data apart is.
                if path is not None and (across is None or state.position is None):
                    checkpoints.save(path, state, belongs, keep=self.group is not None)
                if callback is not None:
                    callback(run.progress(state))

            if fresh:
                after(state)
            state = run.go(state, 0 if unit else em_steps, after)
            assert state.w is not None
            tell(state, "passes" if state.chosen == "cg" else solver, self.tol, self.epochs, system.like.dtype)
            deviations = system.deviations(state.w)
            if across is not None:
                deviations = _interleaved(deviations, self.samples, self.mine, across)
        samples = by_name(deviations, theta)
        for name, p in held(self.model, self.names):
            samples[name] = p.new_zeros(self.samples, *p.shape)
        return SampledPosterior(
            self.model, likelihood, theta, samples, as_prior(groups, state.precision, list(theta)), sum(state.gammas),
            state.history, self.noise_variance or state.noise or 1.0, system.curvature.target, self.output,
            self.max_memory, self.data,
        )  # fmt: skip

    def _system(self, likelihood: Likelihood, theta: dict[str, Tensor]) -> TangentSystem:
        apart = self.solver == "sgd" or sum(w.numel() for w in theta.values()) > LARGE
        if apart:
            pieces = in_pieces(self.data, self.batch_size, self.model, self.output)
        else:
            pieces = joined(self.data, self.model, self.max_memory, self.output)
        ordered = self.noisy or self.solver not in ("cg", "sgd")  # else a kernel made on another pass is of other data
        curvature = TangentCurvature(
            self.model, likelihood.curved, pieces, output=self.output, max_memory=self.max_memory, ordered=ordered
        )
        strength = float(likelihood.strength(self.noise_variance or 1.0))
        group = self.group if self.shard == "data" else None
        return TangentSystem(curvature, strength, self.seed, self.mine, group=group)

    @torch.no_grad()
    def confidence(self, unweighted: SampledPosterior, rare: float) -> Confidence:
        """The median and the quantile `rare`, on all data, of the variances that the *others* leave each data point.

        Its own output holds its variance down, which no new input's does.  With S_n = strength J_n Sigma J_n^T the
        variance without n is S_n (1 - S_n)^-1 / strength.  A draw's outputs f_n = sqrt(strength) J_n d have the second
        moment S_n, and eps_n - f_n, with the noise that the draw was made of, has 1 - S_n: their ratio is taken, each
        on the mean over the samples (and over classes that share one variance).  See `prediction.confidence`.
        """
        found, seen, root = [], 0, float(unweighted.likelihood.strength(unweighted.noise_variance)) ** 0.5
        device = next(iter(unweighted.weights.values())).device
        for inputs, y in batch_data.in_order(self.data, RandomStream(0, device)):  # that of the noise
            means, draws = zip(*unweighted.outputs(inputs), strict=True)
            self._check_order(marks_of(unweighted.likelihood.curved, torch.cat(means), y), seen)
            f = root * torch.cat(draws, 1)  # [S, n, *shape]
            eps = noise.of_data(self.seed, self.first + seen, f.shape[1], range(self.samples), f[0, 0].numel(), f)
            rest = eps.view_as(f).sub_(f)
            own, left = (shared(t.square().mean(0), unweighted.likelihood.kind) for t in (f, rest))
            found.append((own / left.clamp(min=torch.finfo(f.dtype).tiny) / root**2).flatten())
            seen += f.shape[1]
            if seen >= SAMPLES:
                break
        variances = torch.cat(found)
        if self.group is not None and self.shard == "data":
            variances = torch.cat([torch.tensor(part) for part in collectives.gathered(variances.tolist(), self.group)])
        return Confidence.of(variances, rare)

    def _check_order(self, marks: Tensor, start: int) -> None:
        assert self.order is not None
        known = self.order[start : start + len(marks)]
        at = 0 if len(known) < len(marks) else displaced(marks, known)
        if at is not None:
            raise RuntimeError(
                f"data point {start + at} is another one than in the first pass over the data, so that the samples' "
                "noise, by which confidence is matched, is not its own; expected the same order on every pass. Give "
                "the loader no generator of its own, turn shuffling off, or take match='exponent' or match=None."
            )


def input_scales(parameters: Sequence[Tensor]) -> Tensor:
    """The root of the mean square of the weights behind each input, [D]: the network's own unit for it.

    Rescaling an input rescales its weights alike.  What the data seldom sees has no larger a unit for it, as it would
    have by the g-prior, under which the few inputs that are seen by one sample alone rule all variances.
    Inputs are axis 1; weights with fewer axes are in units of 1, and inputs whose weights are all zero have the mean.
    """
    found = []
    for p in parameters:
        w = p.detach()
        if w.dim() < 2 or not w.any():
            found.append(torch.ones_like(w).reshape(-1))
            continue
        rms = w.square().mean([axis for axis in range(w.dim()) if axis != 1], keepdim=True).sqrt()
        found.append(torch.where(rms > 0, rms, rms.mean()).expand_as(w).reshape(-1))
    return torch.cat(found)


def unit_information(run: Run) -> list[float]:
    """The mean of diag(S strength G S) / N over each group: a prior that knows as much as one sample.

    A group that the data does not reach has the mean of the others.  Source: Kass and Wasserman 1995.
    """
    means = [total / n for total, n in zip(run.totals(run.diagonal), run.counts, strict=True)]
    reached = [mean for mean in means if mean > 0]
    instead = sum(reached) / len(reached) if reached else float(run.system.count)
    return [(mean if mean > 0 else instead) / run.system.count for mean in means]


def cheapest(system: TangentSystem, max_memory: int | None, kernel: TangentKernel | None, varied: bool) -> str:
    """The solver: "sgd" where graphs are not kept, which is probed against "cg"; else "dual" or "cg", by the
    multiplications of forming and of products.

    A product takes about four forward passes for each sample; `ITERATIONS` of them stand for a solution.
    varied: whether the g-prior gives each weight a scale of its own.
    """
    if system.replay.kept is None or kernel is None:
        return "sgd" if system.replay.kept is None else "cg"
    if kernel.size > MOST_ROWS:
        return "cg"
    if kernel.outputs is not None:
        forming = kernel.outputs.multiplications(varied)
    else:  # by all rows
        forming, size = kernel.size**2 * system.size, kernel.size * system.size * system.like.element_size()
        if size > RECORDINGS.of(max_memory) - system.replay.size:
            return "cg"
    dual = 2 * forming + kernel.size**3
    return "dual" if dual < ITERATIONS * 4 * system.replay.flops * len(system.everyone) else "cg"


def dual_of(kernel: TangentKernel | None, solver: str) -> TangentKernel:
    """Raises ValueError where the tangent kernel would be too large, or its graphs or its rows are not at hand."""
    if kernel is None:
        raise ValueError(
            f"solver={solver!r} needs the graphs of all data in this process, and they do not fit into max_memory or "
            "the data is shared out; expected less data. Take solver='sgd' or 'cg'."
        )
    system, rows = kernel.system, kernel.size
    if solver == "dual" and rows > MOST_ROWS:
        raise ValueError(
            f"solver='dual' with {rows} outputs times data points; expected at most {MOST_ROWS}, whose tangent kernel "
            "has a Cholesky factor. Take solver='cg' or 'sgd'."
        )
    if solver == "block" and kernel.B is None:
        raise ValueError(
            f"solver='block' keeps the tangent kernel's {rows} rows of {system.size} numbers, "
            f"{rows * system.size * system.like.element_size() / GIB:.2g} GiB; they do not fit into max_memory, or an "
            "operation of the model has no rule for them. Take solver='cg' or 'sgd'."
        )
    return kernel


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
