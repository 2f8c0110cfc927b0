"""python -m benchmarks.bias: how long `pb.bias` takes, and what two-batch curvature costs in gradients.

The first table is in seconds, of `pb.bias` on a trained digits-cnn with 10 directions and 15 repeats.  The second is
the cost of slopes and curvatures of one batch along 10 directions of another, for each direction, in gradients of that
batch: of a quadratic that is there already, and with making it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import Run, Table, Timing, compare, seconds, write
from paraboloid import problems
from paraboloid.data.batches import take

SIZES, K, REPEATS, BATCH = (32, 64, 128, 256, 512), 10, 15, 128
LOSS = nn.CrossEntropyLoss()
CURVATURES = ("ggn", "hessian", "fisher")


def whole() -> Table:
    """Seconds of `pb.bias` for each batch size, and together."""
    problem = problems.load("digits-cnn")
    problems.train(problem, evaluations=1)
    table, total = Table(f"pb.bias on digits-cnn, k = {K}, {REPEATS} repeats", "a second", 1.0), 0.0
    for m in SIZES:
        spent = seconds(lambda m=m: pb.bias(problem.model, problem.loss_fn, problem.train, m, k=K, repeats=REPEATS))
        table.rows[f"batches of {m}"], total = {"seconds": Timing("seconds", spent, spent, spent)}, total + spent
    table.rows["all five"] = {"seconds": Timing("seconds", total, total, total)}
    return table


def digits(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    problem = problems.load(name)
    return problem.model, *take(problem.train, torch.arange(BATCH), torch.device("cpu"))


def net_3c3d() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nets.net_3c3d(), torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))


NETS = {"digits-mlp": lambda: digits("digits-mlp"), "digits-cnn": lambda: digits("digits-cnn"), "3c3d": net_3c3d}


def along(name: str, budget: float) -> Table:
    """Two-batch curvature, per direction, in gradients."""
    model, x, y = NETS[name]()
    parameters = list(model.parameters())
    size = sum(p.numel() for p in parameters)
    D = torch.randn(K, size, generator=torch.Generator().manual_seed(0))
    D /= D.norm(dim=1, keepdim=True)
    rows: dict[str, dict[str, Run]] = {}
    for kind in CURVATURES:
        made = pb.quadratic(model, LOSS, (x, y), kind)
        rows[kind] = {
            "of a quadratic": lambda q=made: q.along(D),
            "making it too": lambda k=kind: pb.quadratic(model, LOSS, (x, y), k).along(D),
        }
    table = compare(
        f"{name}, batch of {BATCH}: curvature and slope along {K} directions, for each direction",
        lambda: torch.autograd.grad(LOSS(model(x), y), parameters), rows, budget,
    )  # fmt: skip
    for row in table.rows.values():
        for t in row.values():
            if t.median is not None and t.low is not None and t.high is not None:
                t.median, t.low, t.high = t.median / K, t.low / K, t.high / K
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--budget", type=float, default=8.0, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write([whole(), *(along(name, options.budget) for name in options.nets)], options.out, "bias")


if __name__ == "__main__":
    main()
