"""One process of the data-parallel test of the optimisers: `python optimiser_rank.py RANK WORLD FOLDER`."""

import datetime
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import leave
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import paraboloid as pb

STEPS, N = 4, 24
LOSS = nn.CrossEntropyLoss()
OPTIMISERS = {
    "kfac": lambda model: pb.optim.KFAC(model, LOSS, lr=0.1, damping=0.1, fisher="exact", inverse_interval=2),
    "ekfac": lambda model: pb.optim.EKFAC(model, LOSS, lr=0.1, damping=0.1, fisher="empirical", factor_interval=1),
    "diagonal": lambda model: pb.optim.Preconditioned(model, LOSS, curvature="diag_ggn", damping=0.1),
}

QUASI_NEWTON = {
    "kbfgs": lambda model: pb.optim.KBFGS(model, LOSS),
    "kbfgsl": lambda model: pb.optim.KBFGSL(model, LOSS, memory=2),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(t):
    g = torch.Generator().manual_seed(t)
    return torch.randn(N, 5, generator=g, dtype=torch.float64), torch.randint(3, (N,), generator=g)


def train(wrapped, make, mine, accumulate):
    """Parameters after some steps on this rank's parts of the batches."""
    opt = make(wrapped)
    for t in range(STEPS):
        x, y = (part[mine] for part in batch(t))
        opt.zero_grad()
        pieces = [(x[:4], y[:4]), (x[4:], y[4:])] if accumulate else [(x, y)]
        for i, (xs, ys) in enumerate(pieces):
            with wrapped.no_sync() if i + 1 < len(pieces) else nullcontext():
                (len(ys) / len(y) * LOSS(wrapped(xs), ys)).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in wrapped.parameters()])


def train_with_closures(wrapped, make, mine):
    """Parameters after a warm start and some steps, which evaluate twice, on this rank's parts of the batches."""
    opt = make(wrapped)
    parts = [tuple(part[mine] for part in batch(t)) for t in range(STEPS)]
    opt.warm_start(parts)
    for x, y in parts:

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = LOSS(wrapped(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    return torch.cat([p.detach().flatten() for p in wrapped.parameters()])


def skipped(rank, wrapped, mine):
    """A loss that is NaN on one rank alone."""
    opt = OPTIMISERS["kfac"](wrapped)
    before = [p.detach().clone() for p in wrapped.parameters()]
    x, y = (part[mine] for part in batch(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LOSS(wrapped(x * (float("nan") if rank == 1 else 1.0)), y).backward()
        opt.step()
    return opt.counters["skipped"], all(torch.equal(p, b) for p, b in zip(wrapped.parameters(), before, strict=True))


def bare(wrapped, mine):
    """What an optimiser of the bare model says inside the wrapper."""
    opt = OPTIMISERS["kfac"](wrapped.module)
    try:
        wrapped(batch(0)[0][mine])
    except RuntimeError as error:
        return str(error)
    finally:
        opt.remove()


def resumed(folder, wrapped, mine):
    """Parameters of a run with sampled labels that went on, and of one that was resumed from a distributed checkpoint:
    each rank draws labels of its own."""
    make = lambda model: pb.optim.KFAC(model, LOSS, lr=0.1, damping=0.1, factor_interval=1)  # noqa: E731
    opt, other = make(wrapped), nn.parallel.DistributedDataParallel(model())
    fresh, found = make(other), []
    for t in range(2 * STEPS):
        if t == STEPS:
            own, states = get_state_dict(wrapped, opt)
            dcp.save({"model": own, "opt": states}, checkpoint_id=folder / "checkpoint")
            own, states = get_state_dict(other, fresh)
            state = {"model": own, "opt": states}
            dcp.load(state, checkpoint_id=folder / "checkpoint")
            set_state_dict(other, fresh, model_state_dict=state["model"], optim_state_dict=state["opt"])
        for net, it in [(wrapped, opt), (other, fresh)][: 1 + (t >= STEPS)]:
            x, y = (part[mine] for part in batch(t))
            it.zero_grad()
            LOSS(net(x), y).backward()
            it.step()
    for net in (wrapped, other):
        found.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return found


def main():
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world,
                            timeout=datetime.timedelta(hours=1))  # fmt: skip
    size = N // world
    mine = slice(rank * size, (rank + 1) * size)
    found = {}
    for name, make in OPTIMISERS.items():
        for accumulate in (False, True):
            wrapped = nn.parallel.DistributedDataParallel(model())
            found[name, accumulate] = train(wrapped, make, mine, accumulate)
    for name, make in QUASI_NEWTON.items():
        found[name] = train_with_closures(nn.parallel.DistributedDataParallel(model()), make, mine)
    found["skipped"] = skipped(rank, nn.parallel.DistributedDataParallel(model()), mine)
    found["bare"] = bare(nn.parallel.DistributedDataParallel(model()), mine)
    found["resumed"] = resumed(folder, nn.parallel.DistributedDataParallel(model()), mine)
    leave(found, rank, world, folder)


if __name__ == "__main__":
    main()
