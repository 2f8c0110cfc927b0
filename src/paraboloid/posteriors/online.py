"""Training with the evidence: the prior's precisions (and a Gaussian's noise) move with the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.linalg.operand import check_count
from paraboloid.losses import LossFunction
from paraboloid.passes import trees
from paraboloid.posteriors import prior as priors
from paraboloid.posteriors.fit_laplace import laplace
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.posterior import Posterior
from paraboloid.posteriors.prior_tuning.evidence import groups_of


def train_by_evidence(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Data,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    *,
    structure: str = "kron",
    per: str = "layer",
    noise: bool = True,
    burn_in: int = 0,
    every: int = 1,
    steps: int = 10,
    lr: float = 0.1,
    prior_precision: float = 1.0,
    noise_variance: float = 1.0,
    output: Output | None = None,
    callback: Callable[[int, Posterior], None] | None = None,
    **options: Any,
) -> Posterior:
    """Train the model's weights, and by the evidence its prior, in one run; returns the posterior at the last weights.

    Each epoch minimises (strength * summed loss + |theta|^2_Lambda / 2) / elements of the targets with `optimizer`.
    After every `every` epochs beyond `burn_in` a Laplace posterior is fitted and `steps` steps of Adam (`lr`) are taken
    on its log evidence in log Lambda (one precision for "all", each "layer" or "parameter") and, with `noise`, in the
    logarithm of a Gaussian's noise variance.  `callback(epoch, posterior)` sees each of them.  Number of outputs and of
    samples are both counted: a regression with K outputs has N K target elements.  `options` are those of `laplace`.

    Source: Immer et al. 2021, arXiv:2104.04975.
    """
    check_count("epochs", epochs)
    check_count("every", every)
    likelihood, weights = Likelihood.of(loss_fn), trees.parameters(model)
    noise = noise and likelihood.takes_noise
    first = next(iter(weights.values()))
    groups = groups_of(weights, per)
    logs = [torch.full((), prior_precision, dtype=first.dtype, device=first.device).log() for _ in groups]
    log_noise = torch.full((), noise_variance, dtype=first.dtype, device=first.device).log()
    variables = [t.requires_grad_() for t in [*logs, *([log_noise] if noise else [])]]
    tuner = torch.optim.Adam(variables, lr)

    def prior() -> priors.Prior:
        return {k: log.exp() for names, log in zip(groups, logs, strict=True) for k in names}

    def fitted() -> Posterior:
        found = {k: t.item() for k, t in prior().items()}
        return laplace(
            model, loss_fn, loader, structure, prior_precision={k: found[k] for k in weights},
            noise_variance=log_noise.exp().item(), output=output, **options,
        )  # fmt: skip

    elements = sum(y.numel() for _, y in batch_data.batches(loader))
    posterior = None
    for epoch in range(1, epochs + 1):
        current = {k: t.detach() for k, t in prior().items()}
        strength = likelihood.strength(log_noise.detach().exp())
        for inputs, y in batch_data.batches(loader):
            optimizer.zero_grad()
            f = batch_data.call(model, inputs, output)
            data_part = strength * likelihood.loss.sample_losses(f, y).sum() / y.numel()
            (data_part + priors.square(current, weights) / (2 * elements)).backward()
            optimizer.step()
        posterior = None
        if epoch > burn_in and epoch % every == 0:
            posterior = fitted()
            for _ in range(steps):
                tuner.zero_grad()
                ordered = {k: prior()[k] for k in weights}
                value: Tensor = -posterior.log_evidence(ordered, log_noise.exp() if noise else None)
                value.backward()
                tuner.step()
            posterior.prior_precision = {k: prior()[k].item() for k in weights}
            posterior.noise_variance = log_noise.exp().item()
            if callback is not None:
                callback(epoch, posterior)
    return fitted() if posterior is None else posterior
