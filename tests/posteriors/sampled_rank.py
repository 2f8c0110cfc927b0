"""One rank of the tests of sampled posteriors: python sampled_rank.py RANK WORLD FOLDER."""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import leave
from torch import nn

import paraboloid as pb

CUTS = [0, 13, 40]
OPTIONS = {
    "data": {"samples": 3, "em_steps": 2, "solver": "cg", "tol": 1e-9},
    "data by layer": {"samples": 3, "em_steps": 1, "solver": "cg", "tol": 1e-9, "per": "layer", "match": None},
    "data unweighted": {"samples": 3, "solver": "cg", "tol": 1e-9, "curvature": "jacobian"},
    "data of a regression": {"samples": 3, "em_steps": 2, "solver": "cg", "tol": 1e-9, "noise_variance": None},
    "data by descent": {"samples": 2, "em_steps": 1, "solver": "sgd", "epochs": 3, "lr": 1e-3, "match": None},
    "data by noisy descent": {
        "samples": 2, "em_steps": 1, "solver": "sgd", "epochs": 3, "lr": 1e-3, "match": None, "objective": "noisy-targets",
    },
    "samples": {"samples": 5, "em_steps": 1, "tol": 1e-9},
    "samples by dual": {"samples": 3, "em_steps": 2, "solver": "dual", "per": "layer", "match": "exponent"},
    "samples by block": {"samples": 3, "em_steps": 1, "solver": "block", "tol": 1e-9, "match": None},
    "samples by cg": {"samples": 3, "em_steps": 2, "solver": "cg", "tol": 1e-9, "per": "parameter", "g_prior": False},
    "samples of a regression": {"samples": 3, "em_steps": 2, "solver": "dual", "noise_variance": None},
    "samples by descent": {"samples": 3, "em_steps": 1, "solver": "sgd", "epochs": 3, "batch_size": 8, "match": None},
}  # fmt: skip


def problem_of(name):
    """(model, loss, x, y)"""
    model, x, y = problem()
    return (model, nn.MSELoss(), x, x[:, :3].sin()) if "regression" in name else (model, nn.CrossEntropyLoss(), x, y)


def problem():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=g, dtype=torch.float64), torch.randint(3, (40,), generator=g)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double(), x, y


def main(rank, world, folder):
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(hours=1))
    found = {}
    for name, options in OPTIONS.items():
        model, loss, x, y = problem_of(name)
        shard = name.split()[0]
        mine = slice(CUTS[rank], CUTS[rank + 1]) if shard == "data" else slice(None)
        posterior = pb.sampled_laplace(model, loss, (x[mine], y[mine]), all_reduce=True, shard=shard, **options)
        found[name] = (
            posterior.samples,
            posterior.prior_precision,
            posterior.effective_dimension,
            posterior.noise_variance,
            posterior.confidence,
        )
    model, x, y = problem()
    try:
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 1, all_reduce=True, shard="samples")
    except ValueError as error:
        found["too few"] = str(error)
    mine, path = slice(CUTS[rank], CUTS[rank + 1]), folder / "run"
    options = {"solver": "sgd", "epochs": 2, "batch_size": 8, "all_reduce": True, "checkpoint": path, "match": None}
    for em_steps in (1, 2):  # two batches here, four there; and gone on from
        posterior = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x[mine], y[mine]), 2, em_steps, **options)
    found["unequal"] = posterior.samples, posterior.history
    leave(found, rank, world, folder)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
