"""One process of the tests of data parallelism: `python one_rank.py RANK WORLD FOLDER`; results go to the folder."""

import datetime
import sys
from pathlib import Path

import models
import torch
import torch.distributed as dist
from ranks import leave
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call

SUMS = ["grad", "second_moment", "variance", "diag_ggn", "kflr", "kfac_empirical"]
LOCAL = ["sample_grads", "square_norms", "gram", "sample_diag_ggn"]
NAMES = ["mlp", "residual cnn", "gpt"]
SIZES = 2, 5  # samples on each rank
REDUCED = pb.quantities.KFAC("empirical", sharing="reduce")


def sums(name):
    """What is summed; the Hessian's diagonal is slow for a tied embedding, and warns."""
    return SUMS if name.startswith("gpt") else [*SUMS, "diag_hessian"]


def cases():
    """name -> (model, loss, inputs, targets) of the big batch."""
    found = {}
    for name in NAMES:
        model, x = models.make(name, sum(SIZES))
        f = call(model, x)
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(f.shape[1], (len(f), *f.shape[2:]), generator=generator)
        y[0] = y[-1] = -100
        found[f"{name}, mean over targets"] = model, pb.losses.CrossEntropy(), x, y
        found[f"{name}, sum"] = model, pb.losses.CrossEntropy(reduction="sum"), x, y
        found[f"{name}, squares"] = model, nn.MSELoss(), x, torch.randn(f.shape, generator=generator).double()
    model, x = models.make("mlp", sum(SIZES))
    nothing = torch.tensor([-100, -100, 0, 1, 2, 1, 0])
    found["a rank without targets"] = model, nn.CrossEntropyLoss(), x, nothing
    y = torch.randn(sum(SIZES), 3, generator=torch.Generator().manual_seed(1)).double()
    both = 2 * pb.Loss.from_torch(nn.MSELoss()) + pb.losses.BCEWithLogits(reduction="batchmean")
    found["a sum of losses"] = model, both, x, y.sigmoid()
    return found


def errors(rank, mine):
    """Messages of what is refused, on every rank and without waiting."""

    class Mute(pb.quantities.Quantity):
        name, source = "mute", pb.quantities.Source("gradient")

    model, x = models.make("mlp", 7)
    y = torch.tensor([0, 1, -100, 0, 1, 2, 2])
    mixed = pb.losses.CrossEntropy() + pb.losses.CrossEntropy(reduction="batchmean")
    frozen, _ = models.make("mlp", 7)
    frozen[0].requires_grad_(rank == 0)
    attempts = {
        "mute": (model, nn.CrossEntropyLoss(), y, Mute()),
        "mixed": (model, mixed, y, "grad"),
        "different": (model, nn.CrossEntropyLoss(), y, ["grad", "variance"][rank]),
        "frozen": (frozen, nn.CrossEntropyLoss(), y, "grad"),
        "no targets": (model, nn.CrossEntropyLoss(), torch.full((7,), -100), "grad"),
    }
    found = {}
    for name, (m, loss, targets, quantities) in attempts.items():
        try:
            pb.statistics(m, loss, (x[mine], targets[mine]), quantities, all_reduce=True)
        except ValueError as e:
            found[name] = str(e)
    return found


def wrapped(rank, mine):
    """A DistributedDataParallel model: its own training step next to ours, and `.grad` as its backward() leaves it."""
    plain, x = models.make("mlp", 7)
    model = nn.parallel.DistributedDataParallel(plain)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    batch, loss = (x[mine], y[mine]), nn.CrossEntropyLoss()
    found = {}
    for _ in range(2):  # a second step fails where the wrapper still waits for a backward pass
        found["local"] = pb.statistics(model, loss, batch, ["grad", "variance"])
        with pb.record(model) as tape:
            output = model(batch[0])
        found["recorded"] = tape.statistics(loss, output, batch[1], ["grad", "variance"])
        loss(output, batch[1]).backward()
        found["backward"] = {k: p.grad.clone() for k, p in plain.named_parameters()}
        model.zero_grad()
        pb.statistics(model, loss, batch, "square_norms", accumulate_grad=True)
        found["accumulated"] = {k: p.grad.clone() for k, p in plain.named_parameters()}
        model.zero_grad()
        with pb.record(model) as tape:
            output = model.module(batch[0])
        tape.statistics(loss, output, batch[1], "grad", accumulate_grad=True)
        found["instead of backward"] = {k: p.grad.clone() for k, p in plain.named_parameters()}
        model.zero_grad()
        with model.no_sync():
            pb.statistics(model, loss, batch, "square_norms", accumulate_grad=True)
        found["not synchronised"] = {k: p.grad.clone() for k, p in plain.named_parameters()}
        model.zero_grad()
    for k in ("local", "recorded"):
        found[k] = {q: dict(found[k][q]) for q in found[k]}
    return found


def main(rank, world, folder):
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(hours=1))
    start = sum(SIZES[:rank])
    mine = slice(start, start + SIZES[rank])
    found = {}
    for name, (model, loss, x, y) in cases().items():
        model.zero_grad()
        for accumulate in (False, True):
            stats = pb.statistics(
                model,
                loss,
                (x[mine], y[mine]),
                sums(name) + LOCAL,
                all_reduce=dist.group.WORLD,
                accumulate_grad=accumulate,
            )
        values = {q: dict(stats[q]) for q in stats}
        values["reduce"] = pb.statistics(model, loss, (x[mine], y[mine]), REDUCED, all_reduce=True)["kfac_empirical"]
        cut = [(x[mine][:1], y[mine][:1]), (x[mine][1:], y[mine][1:])]  # the rank's part as two batches
        listed = pb.statistics(model, loss, cut, sums(name), all_reduce=True)
        found[name] = {
            "values": values,
            "listed": {q: dict(listed[q]) for q in listed},
            "listed loss": listed.loss,
            "loss": stats.loss,
            "samples": stats.samples,
            "normalizer": stats.normalizer,
            "grad": {k: p.grad.clone() for k, p in model.named_parameters()},
        }
    model, x = models.make("mlp", 7)
    pulls = [
        pb.statistics(model, nn.MSELoss(), (x[:3], torch.zeros(3, 3).double()), q, all_reduce=True, seed=s)[q][
            "0.weight"
        ]
        for q, s in (("diag_ggn_mc", 0), ("diag_ggn_mc", 0), ("diag_ggn_mc", 1))
    ]
    noise = torch.nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5)).double()
    masks = pb.statistics(noise, nn.MSELoss(), (x[:3], torch.zeros(3, 50).double()), "square_norms", all_reduce=True)
    found["seeds"] = {"pulls": pulls, "masks": masks.output}
    found["errors"], found["wrapped"] = errors(rank, mine), wrapped(rank, mine)
    leave(found, rank, world, folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
