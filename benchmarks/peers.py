"""The same quantities by the packages of the field, each as its documentation says; None where it is not installed."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn


def installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def backpack(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """BackPACK: extensions run inside backward()."""
    if not installed("backpack") or not isinstance(model, nn.Sequential):
        return {}  # it knows no attention, and passes over the parameters inside without a word
    from backpack import backpack as context
    from backpack import extend, extensions

    model, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

    def run(*found: object) -> Callable[[], object]:
        def step():
            for p in model.parameters():
                p.grad = None
            with context(*found), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss(model(x), y).backward()

        return step

    e = extensions
    return {
        "sample_grads": run(e.BatchGrad()),
        "square_norms": run(e.BatchL2Grad()),
        "second_moment": run(e.SumGradSquared()),
        "variance": run(e.Variance()),
        "first-order together": run(e.BatchGrad(), e.BatchL2Grad(), e.SumGradSquared(), e.Variance()),
        "diag_ggn_mc": run(e.DiagGGNMC()),
        "diag_ggn": run(e.DiagGGNExact()),
        "kfac": run(e.KFAC()),
        "kflr": run(e.KFLR()),
        "diag_hessian": run(e.DiagHessian()),
    }


def opacus(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """opacus: individual gradients by hooks."""
    if not installed("opacus"):
        return {}
    from opacus.grad_sample import GradSampleModule

    wrapped, loss = GradSampleModule(copy.deepcopy(model)), nn.CrossEntropyLoss()

    def step():
        wrapped.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss(wrapped(x), y).backward()
        for p in wrapped.parameters():
            p.grad_sample = None

    return {"sample_grads": step}


def functorch(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], object]]:
    """torch.func: vmap of grad."""
    params = {k: p.detach() for k, p in model.named_parameters()}

    def sample_loss(params, x, y):
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    grads = torch.func.vmap(torch.func.grad(sample_loss), in_dims=(None, 0, 0))
    return {"sample_grads": lambda: grads(params, x, y)}


class Collated(list):
    """Batches as a loader that has nothing left to collate, which would cost more than the gradients do."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], dataset: object):
        super().__init__(batches)
        self.dataset, self.batch_size = dataset, len(batches[0][0])


def laplace_torch(model: nn.Module, batches: list[tuple[Tensor, Tensor]], kind: str, backend: str) -> Callable:
    """A posterior of laplace-torch, fitted, and ready to predict; `backend` is curvlinops or backpack."""
    from laplace import Laplace
    from laplace.curvature.backpack import BackPackGGN
    from laplace.curvature.curvlinops import CurvlinopsGGN
    from torch.utils.data import TensorDataset

    structure, _, last = kind.partition(", ")
    structure, options = structure.split()[0], {}
    if structure == "functional":
        structure, options = "gp", {"n_subset": int(last.split()[0])}
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches, strict=True)))
    posterior = Laplace(
        copy.deepcopy(model),
        "classification",
        subset_of_weights="last_layer" if last == "last layer" else "all",
        hessian_structure=structure,
        backend={"curvlinops": CurvlinopsGGN, "backpack": BackPackGGN}[backend],
        **options,
    )
    posterior.fit(Collated(batches, data))
    return posterior


PEERS = {"BackPACK": backpack, "opacus": opacus, "torch.func": functorch}
