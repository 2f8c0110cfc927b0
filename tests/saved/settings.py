"""Tiny networks and their data for the saved files.

Every number, the weights' too, comes from `settings.pt.xz`: a later torch may draw others for the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from saved import files
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import paraboloid as pb

FILE = Path(__file__).with_name("settings.pt.xz")
F64 = torch.float64


class Words(nn.Module):
    """The mean of a few words' embeddings, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, tokens):
        return self.head(self.words(tokens).mean(1))


def mlp(*sizes: int) -> Callable[[], nn.Module]:
    p, q, c = sizes
    return lambda: nn.Sequential(nn.Linear(p, q), nn.Tanh(), nn.Linear(q, c))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2, 3))


def normed() -> nn.Module:
    """The first weight is made of two parameters, which have no Kronecker factors."""
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.4), nn.Linear(4, 3))


def labels(N: int, g: torch.Generator) -> Tensor:
    return torch.randint(3, (N,), generator=g)


def some_ignored(N: int, g: torch.Generator) -> Tensor:
    return labels(N, g).index_fill(0, torch.tensor([1]), -100)


def numbers(N: int, g: torch.Generator) -> Tensor:
    return torch.randn(N, 2, generator=g, dtype=F64)


def bits(N: int, g: torch.Generator) -> Tensor:
    return torch.randint(2, (N, 2), generator=g).to(F64)


def counts(N: int, g: torch.Generator) -> Tensor:
    return torch.randint(4, (N, 2), generator=g).to(F64)


def dense(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda N, g: torch.randn(N, *shape, generator=g, dtype=F64)


def tokens(N: int, g: torch.Generator) -> Tensor:
    return torch.randint(6, (N, 3), generator=g)


def uneven() -> nn.Module:
    return nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=F64), label_smoothing=0.1, reduction="sum")


CROSS = nn.CrossEntropyLoss
# name -> network, loss, inputs, targets, samples
NETWORKS = {
    "classes": (mlp(3, 4, 3), CROSS, dense(3), labels, 12),
    "regression": (mlp(3, 4, 2), nn.MSELoss, dense(3), numbers, 12),
    "binary": (mlp(3, 4, 2), nn.BCEWithLogitsLoss, dense(3), bits, 12),
    "counts": (mlp(3, 4, 2), nn.PoissonNLLLoss, dense(3), counts, 12),
    "spread": (mlp(3, 4, 4), lambda: pb.losses.GaussianNLL(log_variance=True), dense(3), numbers, 12),
    "uneven": (mlp(3, 4, 3), uneven, dense(3), some_ignored, 12),
    "few": (mlp(9, 7, 3), CROSS, dense(9), labels, 2),  # factors of fewer rows than columns
    "images": (images, CROSS, dense(2, 3, 3), labels, 6),
    "words": (Words, CROSS, tokens, labels, 8),
    "normed": (normed, CROSS, dense(3), labels, 12),
    "dropout": (dropout, CROSS, dense(3), labels, 12),
    "many": (mlp(3, 4, 3), CROSS, dense(3), labels, 48),
}
NEW = 3  # inputs to predict at


@dataclass
class Setting:
    """A network in eval mode at its trained weights, its data, and inputs to predict at."""

    model: nn.Module
    loss_fn: nn.Module | pb.Loss
    x: Tensor
    y: Tensor
    new: Tensor

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return self.x, self.y

    def batches(self, size: int = 6) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.x.split(size), self.y.split(size), strict=True))


def load(name: str, dtype: torch.dtype = F64) -> Setting:
    """The same setting on every call, in tensors of its own."""
    build, loss = NETWORKS[name][:2]
    kept = _kept()[name]
    with torch.random.fork_rng(devices=[]):
        model = build().to(F64)
    model.load_state_dict(kept["model"])
    x, y, new = (t.clone() if not t.is_floating_point() else t.to(dtype, copy=True) for t in kept["data"])
    return Setting(model.to(dtype).eval(), loss(), x, y, new)


@lru_cache
def _kept() -> dict:
    return files.read(FILE)


def draw() -> None:
    """Write `settings.pt.xz`: what is there stays as it is, and settings that are missing are drawn."""
    kept = files.read(FILE) if FILE.exists() else {}
    before = set(kept)
    for seed, (name, (build, _, inputs, targets, N)) in enumerate(NETWORKS.items()):
        if name not in kept:
            g = torch.Generator().manual_seed(seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = build().to(F64)
            data = [inputs(N, g), targets(N, g), inputs(NEW, g)]
            kept[name] = {"model": model.state_dict(), "data": data}
    if set(kept) != before:
        files.write(kept, FILE)
