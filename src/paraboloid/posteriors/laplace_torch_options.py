"""laplace-torch's options and batches, and in a sentence what to use instead of options that have no meaning here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs

LIKELIHOODS = {"classification": nn.CrossEntropyLoss, "regression": nn.MSELoss}
STRUCTURES = {"full": "full", "kron": "kron", "diag": "diag", "lowrank": "lowrank", "gp": "functional"}
# options of `pb.laplace` that are taken too
OWN = {"debias", "seed", "fisher", "samples", "rank", "subset", "output", "max_memory", "max_factor", "tol"}
INSTEAD = {
    "asdl_fisher_kwargs": "fisher='mc' and samples= for sampled labels",
    "feature_reduction": "nothing: the model's own forward pass is recorded, its reduction included",
    "damping": "prior_precision, which is added to the curvature's eigenvalues: no approximation is damped here",
    "functional_approximation": "hessian_structure='gp' with n_subset, the subset of data",
    "diagonal_kernel": "hessian_structure='gp', whose covariance of the outputs is exact",
    "independent_outputs": "hessian_structure='gp', whose covariance of the outputs is exact",
    "subset_of_data": "n_subset",
    "subsample_size": "n_subset",
    "n_eigenvalues": "hessian_structure='lowrank' with rank",
    "inducing_locations": "hessian_structure='gp' with n_subset",
}


def refuse_others(options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that are not known, with what to use instead."""
    for name in options:
        if name not in OWN:
            instead = INSTEAD.get(name, f"an option of pb.laplace {sorted(OWN)}, or pb.laplace itself")
            raise ValueError(f"{name}={options[name]!r} has no meaning here; expected {instead}.")


def refuse_tuning_options(options: Mapping[str, Any]) -> None:
    if options:
        raise ValueError(f"optimize_prior_precision got {sorted(options)}; expected its options, or method='adapted' "
                         "for those of tune_prior (data, per, noise, steps).")  # fmt: skip


def curvature_of(backend: Any, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The Fisher that a backend of laplace-torch stands for, by its name, and its sampled labels."""
    options = dict(options or {})
    stochastic = bool(options.pop("stochastic", False))
    samples = [options.pop(k) for k in ("num_samples", "mc_samples", "samples") if k in options]
    if options:
        raise ValueError(f"backend_kwargs has {sorted(options)}; expected stochastic and num_samples, or options of "
                         "pb.laplace.")  # fmt: skip
    if backend is None:
        return {"fisher": "mc", "samples": samples[0] if samples else 1} if stochastic else {}
    name = backend if isinstance(backend, str) else getattr(backend, "__name__", type(backend).__name__)
    kinds = {"ef": "empirical", "hessian": "hessian", "ggn": "mc" if stochastic else "exact"}
    for ending, fisher in kinds.items():
        if name.lower().endswith(ending):
            return {"fisher": fisher, **({"samples": samples[0]} if samples else {})}
    raise ValueError(f"backend is {name!r}; expected a name that ends in GGN, EF or Hessian, such as 'CurvlinopsGGN'. "
                     "All of them are computed here.")  # fmt: skip


def measured(loss: Any, found: Sequence[tuple[Any, Tensor]]) -> float:
    """A loss of all predictions and targets: a torchmetrics object, or a function of (probabilities, targets) or of a
    regression's (means, variances, targets)."""
    parts = [(*(outputs if isinstance(outputs, tuple) else (outputs,)), y) for outputs, y in found]
    if callable(getattr(loss, "update", None)) and callable(getattr(loss, "compute", None)):
        loss.reset()
        for *outputs, y in parts:
            loss.update(outputs[0], y)
        return float(loss.compute().mean())
    return float(loss(*(torch.cat(column) for column in zip(*parts, strict=True))))


class Keyed:
    """Batches of a loader; a dictionary is the model's one argument, with its targets under a key."""

    def __init__(self, data: Data, key: str):
        self.data, self.key = data, key

    def __iter__(self) -> Iterator[batch_data.Batch]:
        if batch_data.as_batch(self.data) is not None and not isinstance(self.data, Mapping):
            yield from batch_data.batches(self.data)
            return
        for item in [self.data] if isinstance(self.data, Mapping) else self.data:
            if isinstance(item, Mapping):
                if self.key not in item:
                    raise ValueError(f"a batch has the keys {list(item)}; expected the targets under dict_key_y="
                                     f"{self.key!r}.")  # fmt: skip
                yield (item,), item[self.key]
            else:
                yield from batch_data.batches(item)


def keyed(x: Inputs) -> Inputs:
    return (x,) if isinstance(x, Mapping) else x


def plain(precision: Any) -> Any:
    """A tensor [1] as the number that it is."""
    return precision.reshape(()) if isinstance(precision, Tensor) and precision.numel() == 1 else precision


def seed_of(generator: torch.Generator | None) -> int:
    """A seed drawn from the generator, or 0."""
    if generator is None:
        return 0
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))


def number_of(value: Any) -> float:
    """A number, or a tensor of one, without its graph."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
