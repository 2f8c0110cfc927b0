"""What else there is, each trained on the same digits, as its documentation says; left out where not installed."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import installed
from benchmarks.quality_data import BATCH, CLASSES, EPOCHS, Pair, network, trained

MEMBERS, MASKS, DROPOUT, SAMPLES = 5, 50, 0.2, 20
Predict = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Fitted:
    """How a method predicts, and the seconds of processor time that its parts took."""

    predict: Predict
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A trained network and its data."""

    net: str
    seed: int
    model: nn.Module
    train: Pair
    held_out: Pair

    def fresh(self, member: int = 1) -> nn.Sequential:
        return network(self.net, 1000 * member + self.seed)


Method = Callable[[Task], Fitted]


def methods() -> dict[str, Method]:
    """By the name of a row."""
    found: dict[str, Method] = {f"ensemble of {MEMBERS}": ensemble, "Monte Carlo dropout": dropout}
    if installed("ivon"):
        found["IVON"] = ivon
    if installed("vbll"):
        found["VBLL"] = vbll
    if installed("laplace"):
        found["laplace-torch, kron, last layer"] = lambda task: laplace_torch(task, "last_layer", "kron")
        found["laplace-torch, kron"] = lambda task: laplace_torch(task, "all", "kron")
        found["laplace-torch, diag"] = lambda task: laplace_torch(task, "all", "diag")
    return found


def temperature(task: Task) -> Fitted:
    """One temperature, the best on held-out digits."""
    with torch.no_grad():
        f = task.model(task.held_out[0])
    grid = torch.logspace(-1, 1, 200)
    best = min(grid.tolist(), key=lambda t: F.cross_entropy(f / t, task.held_out[1]).item())
    return Fitted(lambda x: (task.model(x) / best).softmax(1))


def ensemble(task: Task) -> Fitted:
    members = [task.model, *(trained(task.fresh(i), task.train) for i in range(1, MEMBERS))]
    return Fitted(lambda x: torch.stack([m(x).softmax(1) for m in members]).mean(0))


def dropout(task: Task) -> Fitted:
    """Before the last layer."""
    layers = list(task.fresh().children())
    mask = nn.Dropout(DROPOUT)
    masked = trained(nn.Sequential(*layers[:-1], mask, layers[-1]), task.train)
    mask.train()
    return Fitted(lambda x: torch.stack([masked(x).softmax(1) for _ in range(MASKS)]).mean(0))


def ivon(task: Task) -> Fitted:
    from ivon import IVON

    model, (x, y) = task.fresh(), task.train
    optimizer = IVON(model.parameters(), lr=0.1, ess=len(y), weight_decay=1e-3)
    model.train()
    for _ in range(EPOCHS):
        for i in torch.randperm(len(y)).split(BATCH):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    model.eval()

    def predict(x: Tensor) -> Tensor:
        total = torch.zeros(len(x), CLASSES)
        for _ in range(SAMPLES):
            with optimizer.sampled_params():
                total += model(x).softmax(1)
        return total / SAMPLES

    return Fitted(predict)


def vbll(task: Task) -> Fitted:
    import vbll as package

    layers = list(task.fresh().children())
    last = layers[-1]
    assert isinstance(last, nn.Linear)
    head = package.DiscClassification(last.in_features, CLASSES, 1 / len(task.train[1]))
    whole = nn.Sequential(*layers[:-1], head)
    trained(whole, task.train, lambda out, y: out.train_loss_fn(y))
    return Fitted(lambda x: whole(x).predictive.probs)


def laplace_torch(task: Task, weights: str, structure: str) -> Fitted:
    from laplace import Laplace
    from laplace.curvature.curvlinops import CurvlinopsGGN

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*task.train), BATCH)
    start = time.process_time()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        posterior = Laplace(copy.deepcopy(task.model), "classification", weights, structure, backend=CurvlinopsGGN)
        posterior.fit(loader)
        fitted = time.process_time()
        posterior.optimize_prior_precision()
    seconds = {"fit": fitted - start, "tune": time.process_time() - fitted}

    def predict(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return posterior(x, link_approx="probit").detach()

    return Fitted(predict, seconds)
