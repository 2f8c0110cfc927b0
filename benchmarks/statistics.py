"""python -m benchmarks.statistics: what each quantity costs, against a plain gradient and against the peers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import Table, compare, write
from benchmarks.peers import PEERS

FIRST = ["sample_grads", "square_norms", "second_moment", "variance"]
QUANTITIES = {q: [q] for q in (*FIRST, "diag_ggn_mc", "diag_ggn", "kfac", "kflr", "diag_hessian")} | {
    "first-order together": ["grad", *FIRST]
}
SETTINGS = {
    "mlp": [128],
    "sigmoid mlp": [32],
    "3c3d": [64, 128],
    "allcnnc": [8, 32],
    "transformer": [32],
}
HEAVY = {  # minutes each (All-CNN-C's 99 columns), or beside the point of the net: by --only
    ("allcnnc", 8): {"diag_ggn", "kflr", "diag_hessian"},
    ("allcnnc", 32): {"diag_ggn", "kflr", "diag_hessian"},
    ("transformer", 32): {"diag_hessian"},
    ("sigmoid mlp", 32): {*QUANTITIES} - {"diag_hessian", "diag_ggn"},
}

# Sample independence is certified on calls 1, 2, 4, 8, 16, ... of a model, by two more pulls: what is timed are later
# calls, as in a training run, and the certified ones among them fall under the median.
SETTLED = 9


def table(net: str, batch: int, only: list[str] | None, budget: float, peers: bool) -> Table:
    model, x, y = nets.make(net, batch)
    loss_fn = nn.CrossEntropyLoss()

    def gradient():
        return torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))

    for _ in range(SETTLED):
        pb.statistics(model, loss_fn, (x, y), ["grad"])
    theirs = {label: build(model, x, y) for label, build in PEERS.items()} if peers else {}
    rows = {}
    for name, wanted in QUANTITIES.items():
        if (only and name not in only) or (not only and name in HEAVY.get((net, batch), ())):
            continue
        ours = {"paraboloid": lambda wanted=wanted: pb.statistics(model, loss_fn, (x, y), wanted)}
        rows[name] = ours | {label: runs[name] for label, runs in theirs.items() if name in runs}
    return compare(f"{net}, batch {batch}", gradient, rows, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--batch", type=int, nargs="*", help="batch sizes (default: those of the tables)")
    parser.add_argument("--only", nargs="*", choices=list(QUANTITIES))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stem", default="statistics", help="name of the files that are written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = [
        table(net, batch, args.only, args.budget, not args.no_peers)
        for net in args.nets for batch in args.batch or SETTINGS[net]
    ]  # fmt: skip
    write(tables, args.out, args.stem)


if __name__ == "__main__":
    main()
