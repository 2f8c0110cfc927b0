"""A Gaussian posterior over weights: evidence, samples, and the linearised model's outputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Data, Inputs, Output
from paraboloid.data.cutting import Cuts
from paraboloid.linalg.operand import check_count
from paraboloid.linalg.probes import Seed, generator_of
from paraboloid.losses import LossFunction
from paraboloid.operators.structured.block_diagonal import BlockDiagonal
from paraboloid.operators.structured.diagonalised import Diagonalised
from paraboloid.passes.wrappers import plain_parameters
from paraboloid.posteriors import prior as priors
from paraboloid.posteriors import saving
from paraboloid.posteriors.fit import Fitting, curvature
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.precision import Precision
from paraboloid.posteriors.prediction import differentiable as input_gradients
from paraboloid.posteriors.prediction import last_layer, predictive, sharpness, through_head
from paraboloid.posteriors.prediction.confidence import Confidence, novelty
from paraboloid.posteriors.prediction.jacobian import Jacobian, pull_outputs, recorded
from paraboloid.posteriors.prediction.moments import moments
from paraboloid.posteriors.prior_tuning import tuning
from paraboloid.posteriors.structures.dense import Dense
from paraboloid.posteriors.structures.eigenbasis import CrossFitted, InEigenbasis, Kronecker, Mixture
from paraboloid.posteriors.structures.leading_rows import Leading, LeadingRows
from paraboloid.posteriors.structures.rows import Rows, Woodbury
from paraboloid.posteriors.structures.subnetwork import InSubnetwork, Subnetwork
from paraboloid.posteriors.weights import only
from paraboloid.posteriors.widened import widened
from paraboloid.quantities.result import relative
from paraboloid.reductions.kronecker_factors import MAX_FACTOR

PRECISIONS: dict[type, type[Precision]] = {  # by what the curvature is kept as
    BlockDiagonal: Dense, Diagonalised: InEigenbasis, Kronecker: InEigenbasis, CrossFitted: Mixture, Rows: Woodbury,
    LeadingRows: Leading, Subnetwork: InSubnetwork,
}  # fmt: skip


@dataclass(eq=False, repr=False)
class Posterior:
    """N(theta, (strength H + Lambda)^-1) over the chosen weights theta of a trained model.

    H is the curvature of the summed negative log-likelihood in one of the structures, Lambda = diag(prior_precision),
    and strength = 1 / (noise_variance * temperature), or 1 / (noise_variance^2 * temperature) with the empirical
    Fisher, whose gradients (f - y) / noise_variance enter twice.  Made by `paraboloid.laplace`; `model` must keep its
    weights.  It is run in evaluation mode, whatever mode it is in, and left as it was.
    """

    model: nn.Module
    likelihood: Likelihood
    structure: str
    curvature: Any
    weights: dict[str, Tensor]  # theta, by name
    loss: float  # summed loss at theta, at strength 1
    constant: float  # what the negative log-likelihood has besides
    count: int  # samples
    elements: int  # of the targets
    target: tuple[int, ...]  # shape of a sample's target
    noise_variance: float = 1.0
    temperature: float = 1.0
    output: Output | None = None
    max_memory: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the fit
    data: Data | None = None  # what it was fitted on, for `tune_prior` and `match_confidence`; not saved
    sharpness: float = 1.0  # exponent of the predicted probabilities, see `match_confidence`
    spread: float = 1.0  # what a Gaussian's predicted variances are multiplied by, see `tune_prior`
    confidence: Confidence | None = None  # by which `predict` is matched to the network, see `tune_prior`
    unweighted: Posterior | None = field(default=None, repr=False)  # whose variances that takes
    _prior: Any = 1.0
    _sizes: dict[Any, Any] = field(default_factory=dict, repr=False)  # what an output takes to predict
    _cuts: Cuts = field(default_factory=Cuts, repr=False)  # where samples lie in inputs
    _precision: Precision | None = field(default=None, repr=False)  # the last one, with what it solved
    _number: tuple[Any, Any] = field(default=(None, None), init=False)  # a prior that is one, as `prior` gives it

    @property
    def left_out(self) -> float:
        """The relative trace of the loss's Hessians that `tol` left out, over all data."""
        return relative(self.options.get("left_out"))

    @property
    def prior_precision(self) -> Any:
        """A float, a tensor or a dict by name, as it was given or tuned; set by hand, predictions are plain again."""
        return self._prior

    @prior_precision.setter
    def prior_precision(self, value: Any) -> None:
        self.prior(value)
        self._prior = value
        self.confidence, self.unweighted, self.spread = None, None, 1.0

    def prior(self, value: Any = None) -> priors.Prior:
        """`prior_precision` (or a value in its place) as a tensor for each parameter: [] or the parameter's shape."""
        prior = priors.as_prior(self._prior if value is None else value, self.weights)
        return priors.scalars(prior, self.structure) if self.structure in ("kron", "ekfac") else prior

    def strength(self, noise_variance: Any = None) -> Any:
        """What H is multiplied by: 1 / (noise_variance * temperature), with noise_variance 1 but for a Gaussian; its
        square in the empirical Fisher, which is made of gradients."""
        noise = self.noise_variance if noise_variance is None else noise_variance
        return self.likelihood.curvature_strength(noise, self.options.get("fisher", "exact")) / self.temperature

    def precision(self, prior: priors.Prior | None = None, noise_variance: Any = None) -> Precision:
        """strength H + Lambda and its inverse; the last one that no gradients flow through is remembered."""
        if prior is None and isinstance(self._prior, float | int):  # the same tensors as long as it is that number
            self._number = self._number if self._number[0] == self._prior else (self._prior, self.prior())
            prior = self._number[1]
        prior, strength = self.prior() if prior is None else prior, self.strength(noise_variance)
        if self._precision is None or not self._precision.holds(self.curvature, prior, strength):
            found = PRECISIONS[type(self.curvature)](self.curvature, prior, strength)
            if not found.holds(self.curvature, prior, strength):
                return found
            self._precision = found
        return self._precision

    # --- evidence ---------------------------------------------------------------------------------------------------

    def log_likelihood(self, noise_variance: Any = None) -> Tensor:
        """log p(data | theta) / temperature, every constant included, 0-dimensional."""
        noise = self.noise_variance if noise_variance is None else noise_variance
        value = -self.likelihood.strength(noise) * self.loss - self.constant
        value = (value - self.likelihood.log_normalizer(self.elements, noise)) / self.temperature
        first = next(iter(self.weights.values()))
        return torch.as_tensor(value, dtype=first.dtype, device=first.device)

    def log_evidence(self, prior_precision: Any = None, noise_variance: Any = None) -> Tensor:
        """log of the Laplace approximation to p(data), every constant included, 0-dimensional:

        log p(data | theta) - |theta|^2_Lambda / 2 - log det(I + Lambda^-1 strength H) / 2.

        Differentiable in `prior_precision` and `noise_variance` where they are given as tensors (default: the current
        ones).  Source: MacKay 1992; Immer et al. 2021, arXiv:2104.04975.
        """
        prior = self.prior(prior_precision)
        volume = self.precision(prior, noise_variance).log_det()
        return self.log_likelihood(noise_variance) - priors.square(prior, self.counted()) / 2 - volume / 2

    def counted(self) -> dict[str, Tensor]:
        """The weights that the posterior is over; where it is over single ones, the others as zero."""
        return self.curvature.restricted(self.weights) if isinstance(self.curvature, Subnetwork) else self.weights

    def effective_dimension(self) -> float:
        """gamma = tr(strength H Sigma): the number of weights that the data determines rather than the prior."""
        return self.precision().effective_dimension([list(self.weights)])[0].item()

    def tune_prior(
        self,
        method: str | None = None,
        data: Data | None = None,
        validation: Data | None = None,
        *,
        match: str | None = "auto",
        per: str | None = None,
        noise: bool | None = None,
        steps: int = 100,
        grid: Any = None,
    ) -> Posterior:
        """Choose `prior_precision` and a Gaussian's noise variance in place, then how sure to be; returns self.

        method  "adapted" (default with curvature="ggn"): alternate the optimum w* of the linearised model on `data`
                (default: what the posterior was fitted on) and MacKay's update of the precisions at w*, up to `steps`
                times, to a stationary point of the evidence of the linearised model; on a linear model the evidence's
                maximiser (arXiv:2206.08900)
                "evidence": the same updates at the trained weights, which are no optimum of the linearised model: on
                early-stopped networks they tend to make predictions worse than the network's own
                "grid": the precision of `grid` (default: 25 from 1e-3 to 1e5) whose predictions have the lowest
                negative log-likelihood on `validation`, a batch or an iterable of batches; "cross_validation": the same
                on each fifth of `data`, under the curvature of the rest.  A best one at the grid's edge warns
                "unit" (default with curvature="jacobian"): what one sample tells of each parameter, at once
        match   how sure predictions are, which is calibration and changes neither the evidence nor samples nor
                `functional`.  "auto": class probabilities have the network's own confidence, lowered where the outputs'
                variance under curvature="jacobian" and method="unit" is well beyond that on `data` (`confidence`);
                after "grid" an exponent, the best on `validation`.  A Gaussian's variances are multiplied by `spread`,
                so that their mean on `data` is that of Kronecker factors (module `spread`).  "early": from the 99th
                percentile on.  "exponent": `match_confidence(data)`.  None: none, the plain Bayesian predictive.
                Without the training data (loaded or updated, and no data=) what was matched stays
        per     one precision for "all" (default of the evidence), for each "layer" (module) or "parameter" (of "unit")
        noise   whether the noise variance is tuned too; default: where there is one, but for "grid"
        Raises ValueError where what a method needs is missing.
        """
        data = self.data if data is None else data
        tuning.tune(self, method, data, validation, match, per=per, noise=noise, steps=steps, grid=grid)
        return self

    def match_confidence(self, data: Data | None = None, *, validation: Data | None = None) -> Posterior:
        """Choose `sharpness`, the exponent s of predicted class probabilities p^s / sum p^s, in place; returns self.

        So that the mean entropy of the predictions is that of the network's own on `data` (default: what the posterior
        was fitted on; at most the first 10,000 samples): as sure as the network where it was trained, less sure where
        the posterior's variance is larger than there.  The most probable class stays what it was.  With `validation=`,
        labelled data that was not trained on, the exponent of the lowest negative log-likelihood there instead.

        For the prior precision at hand: tune that first, with match=None.  Raises ValueError for a likelihood without
        classes, and where there is no data.
        """
        if self.likelihood.kind not in ("categorical", "bernoulli"):
            raise ValueError(f"match_confidence with a {self.likelihood.kind} likelihood; expected classes "
                             "(nn.CrossEntropyLoss or nn.BCEWithLogitsLoss).")  # fmt: skip
        data = self.data if data is None else data
        if data is None and validation is None:
            raise ValueError("match_confidence needs the training data, and this posterior has it no longer (it was "
                             "loaded or updated); pass data=, or validation=.")  # fmt: skip
        self.confidence, self.unweighted, self.sharpness = None, None, 1.0
        self.sharpness = sharpness.matched(self, data) if validation is None else sharpness.best(self, validation)
        return self

    # --- samples and outputs ----------------------------------------------------------------------------------------

    def sample(self, samples: int, seed: Seed = 0) -> dict[str, Tensor]:
        """Weights drawn from the posterior: name -> [samples, *shape]."""
        check_count("samples", samples)
        first = next(iter(self.weights.values()))
        size = sum(w.numel() for w in self.weights.values())
        generator = generator_of(seed, first.device)
        noise = torch.randn(samples, size, generator=generator, dtype=first.dtype, device=first.device)
        deviations = self.precision().deviations(noise)
        pieces = deviations.split([w.numel() for w in self.weights.values()], 1)
        return {k: w + d.view(-1, *w.shape) for (k, w), d in zip(self.weights.items(), pieces, strict=True)}

    def functional(
        self, x: Inputs, *, joint: bool = False, diagonal: bool = False, differentiable: bool = False
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mean [N, *shape] and covariance [N, K, K] of the linearised outputs f(x) + J(x) (w - theta).

        K is the number of elements of a sample's output.  diagonal=True: the variances alone, of the mean's shape;
        joint=True: the covariance over all inputs together, [N, K, N, K].  Source: Immer et al. 2021, arXiv:2008.08216.

        differentiable=True: gradients flow from both to the inputs, at one backward pass for each of the N K outputs.
        """
        self.check_weights()
        precision, names = self.precision(), list(self.weights)
        if differentiable:
            mean, covariance = input_gradients.moments(self.model, names, x, self.output, precision)
            return mean, covariance.diagonal(dim1=1, dim2=2).reshape(mean.shape) if diagonal else covariance
        if joint:
            with recorded(self.model, names, x, self.output) as (tape, f):
                rows = pull_outputs(tape, f).dense().flatten(0, 1)  # [N K, D]
            with torch.no_grad():
                covariance = precision.apply(rows) @ rows.T
            N, K = len(f), f[0].numel()
            return f.detach(), covariance.view(N, K, N, K)

        def covariance_of(J: Jacobian) -> Tensor:
            return precision.covariance(J, diagonal, self.max_memory)

        if diagonal and (found := last_layer.variances(self, x, precision, self._cuts, self._sizes)) is not None:
            return found
        if diagonal:
            cut = self._cuts.of(self.model, x, self.output)
            if (found := through_head.variances(self, x, precision, cut, self._sizes)) is not None:
                return found
        mean, covariance = moments(
            self.model, names, x, self.output, covariance_of, precision.formed, self.max_memory, self._sizes,
            self._cuts, apart=diagonal,
        )  # fmt: skip
        return mean, covariance.view_as(mean) if diagonal else covariance

    def functional_samples(self, x: Inputs, samples: int, seed: int = 0) -> Tensor:
        """Draws of the linearised outputs, [samples, N, *shape]: the same functions for every x and call with a seed.

        f(x) + J(x) d for weight deviations d from the posterior, so that values at different inputs belong together.
        """
        self.check_weights()
        check_count("samples", samples)
        drawn = self.sample(samples, seed)
        deviations = torch.cat([(drawn[k] - w).reshape(len(drawn[k]), -1) for k, w in self.weights.items()], 1)

        def draws_of(J: Jacobian) -> Tensor:
            return J.dense() @ deviations.T  # [n, K, samples]

        mean, found = moments(
            self.model, list(self.weights), x, self.output, draws_of, deviations.shape[1], self.max_memory,
            self._sizes, self._cuts, apart=True,
        )  # fmt: skip
        return mean + found.permute(2, 0, 1).reshape(samples, *mean.shape)

    def check_weights(self) -> None:
        """Raise RuntimeError if the model's weights are not those that the posterior was fitted at."""
        current = plain_parameters(self.model)
        for name, w in self.weights.items():
            if name not in current or not torch.equal(current[name].detach(), w):
                raise RuntimeError(f"parameter {name!r} is not what it was when the posterior was fitted; a posterior "
                                   "belongs to one set of weights. Fit a new one.")  # fmt: skip

    def novelty(self, x: Inputs) -> Tensor:
        """How far each input is beyond the training data, in steps: [N]; of binary outputs each its own, [N, ...].

        log(u / u_99) / log(u_99 / u_50) for the variance u of the outputs under curvature="jacobian" and a prior that
        knows as much as one sample, and its quantiles on the training data: -1 is as usual as their median, 0 as rare
        as one in a hundred of them, and beyond 1 every half step halves the log-odds of `predict`.  Reject by this
        rather than by low confidence, in which an input that the network finds easy outweighs one it does not know.
        Raises ValueError where nothing was matched (`tune_prior`).
        """
        return novelty(self, x)

    def predict(
        self, x: Inputs, link: str | None = None, *, samples: int = 1000, seed: int = 0, differentiable: bool = False
    ) -> Any:  # fmt: skip
        """The predictive distribution: probabilities [N, C, ...] of a classification, else a `Prediction` with `.mean`
        and `.variance` of y, split into `.model_variance` and `.noise_variance`.

        link  "probit" (default of a classification), "bridge" or "bridge_norm" (categorical), "mc": the mean over
              `samples` draws of the linearised outputs, with the same random numbers for every input; or "weights": the
              mean over `samples` networks with weights drawn from the posterior
        Class probabilities are raised to the power `sharpness` (1 unless `match_confidence` chose one) and normalised.
        A regression's moments and a Poisson rate's are in closed form (link=None).  A loss of your own is predicted
        by its method ``predictive(f)``, averaged over draws of f.  differentiable=True: see `functional`.
        """
        return predictive.predict(self, x, link, samples, seed, differentiable)

    # --- more data, and files ---------------------------------------------------------------------------------------

    def update(self, more_data: Data) -> Posterior:
        """Add the curvature and the likelihood of more data at the same weights, in place; returns self.

        Two streamed halves give what one pass over both gives; low rank then keeps the largest `rank` of both, and
        ekfac the eigenvectors of what came first.
        """
        self.check_weights()
        seed = self.options["seed"] + self.count  # other sampled labels than those of the data before
        device = next(iter(self.weights.values())).device
        fitting = Fitting(
            self.model, self.likelihood, self.options["fisher"], self.options["samples"],
            torch.Generator(device).manual_seed(seed), self.output, self.max_memory,
            self.options.get("max_factor", MAX_FACTOR), tol=self.options.get("tol", 0.0),
        )  # fmt: skip
        with only(self.model, list(self.weights)):
            more = curvature(self.structure, fitting, self.weights, more_data, self.options, self.curvature)
        self.curvature = self.curvature.plus(more)
        before = self.options.get("left_out", (0.0, 0.0))
        self.options["left_out"] = [a + b for a, b in zip(before, fitting.left_out, strict=True)]
        self.loss += fitting.loss
        self.constant += fitting.constant
        self.count += fitting.count
        self.elements += fitting.elements
        self.data = None  # no longer all of it
        if self.unweighted is not None and self.unweighted is not self:
            self.unweighted.update(more_data)
        return self

    def __repr__(self) -> str:
        size = sum(w.numel() for w in self.weights.values())
        return f"Posterior({self.structure!r} over {size} weights, {self.likelihood.kind}, {self.count} samples)"

    def network_outputs(self, x: Inputs, samples: int, seed: int = 0) -> Iterator[Tensor]:
        """Outputs of networks with weights drawn from the posterior, [N, *shape] each."""
        return predictive.network_draws(self, x, samples, seed)

    def state_dict(self) -> dict[str, Any]:
        """What `save` writes, as tensors and plain data that share this posterior's tensors; see `of_state`."""
        return saving.state_of(self)

    @staticmethod
    def of_state(
        state: dict[str, Any], model: nn.Module, loss_fn: LossFunction, *, output: Output | None = None
    ) -> Posterior:  # fmt: skip
        """The posterior that `state_dict` described, for the same model at the same weights; raises as
        `load_posterior`."""
        model = widened(model)
        read = saving.of_state(state, model, Likelihood.of(loss_fn), "the state")
        return _made(*read, model, loss_fn, output)

    def save(self, path: str | Path) -> None:
        """Write everything but the model, the data and `output` to a file that `paraboloid.load_posterior` reads."""
        saving.save(self, path)


def load_posterior(
    path: str | Path, model: nn.Module, loss_fn: LossFunction, *, output: Output | None = None
) -> Posterior:
    """A posterior that `Posterior.save` wrote, bit for bit, for the same model at the same weights.

    Raises ValueError where the model's parameters have other names, shapes or values than those that the posterior was
    fitted at, where the loss is of another kind, and for a file of another origin.
    """
    model = widened(model)
    return _made(*saving.read(path, model, Likelihood.of(loss_fn)), model, loss_fn, output)


def _made(
    own: dict[str, Any], unweighted: dict[str, Any] | None, model: nn.Module, loss_fn: LossFunction,
    output: Output | None,
) -> Posterior:  # fmt: skip
    """A posterior, with the one that its confidence is matched by, from what was read."""

    def made(state: dict[str, Any]) -> Posterior:
        return Posterior(model, Likelihood.of(loss_fn, state["options"]["curvature"]), **state, output=output)

    found = made(own)
    if found.confidence is not None:
        found.unweighted = found if unweighted is None else made(unweighted)
    return found
