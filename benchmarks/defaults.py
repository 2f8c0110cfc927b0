"""Train every problem with every optimiser as it comes, and with its learning rate times .3 and 3.

    python -m benchmarks.defaults                the runs that benchmarks/results/defaults.jsonl lacks, and the table
    python -m benchmarks.defaults --seeds 0 1 --only KFAC EKFAC --problems digits-cnn

Each run adds one line to the file, so that it may be stopped and gone on with at any time; `--again` forgets the lines
of the chosen runs first.  A run is a plain loop of a few epochs on little data: no schedule, no warm start, no argument
but the learning rate.  AdamW with torch's defaults (1e-3, weight decay .01) runs beside them on the same batches;
HessianFree, which is made for large ones, takes batches four times as large.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import paraboloid as pb
from benchmarks import defaults_nets
from paraboloid.passes.random_state import copied_buffers, seeded

FILE = Path("benchmarks/results/defaults.jsonl")
OURS = ("KFAC", "EKFAC", "Preconditioned", "KBFGS", "KBFGSL", "HessianFree", "Polar")
FACTORS = (0.3, 1.0, 3.0)
SEEDS = range(5)
Key = tuple[str, str, float, int]


@dataclass(frozen=True)
class Case:
    """A problem, made small: how it is made from a seed, and how long it is trained."""

    make: Callable[[int], pb.Problem]
    batch_size: int
    epochs: int


def built_in(name: str, batch_size: int, epochs: int, **options: Any) -> Case:
    return Case(lambda seed: pb.problems.load(name, seed=seed, **options), batch_size, epochs)


CASES = {
    "digits-mlp": built_in("digits-mlp", 64, 3),
    "digits-tanh": built_in("digits-tanh", 64, 3),
    "digits-cnn": built_in("digits-cnn", 64, 3),
    "digits-autoencoder": built_in("digits-autoencoder", 100, 4),
    "curves-autoencoder": built_in("curves-autoencoder", 100, 3, samples=800),
    "faces-autoencoder": built_in("faces-autoencoder", 50, 3, samples=400, width=0.25),
    "random-features": built_in("random-features", 50, 3),
    "shapes-cnn": built_in("shapes-cnn", 64, 8, samples=640, width=0.25),
    "sequence-transformer": built_in("sequence-transformer", 32, 3, samples=320),
    "resnet8": Case(defaults_nets.resnet8, 32, 3),
    "gpt": Case(defaults_nets.gpt, 16, 3),
    "lora": Case(defaults_nets.lora, 32, 3),
}


def batches(problem: pb.Problem, size: int, epoch: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
    assert isinstance(problem.train, TensorDataset)
    x, y = problem.train.tensors
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    for rows in order.split(size):
        yield x[rows], y[rows]


def train(
    problem: pb.Problem, opt: Any, size: int, epochs: int, seed: int = 0, each: Callable[[float], None] | None = None
) -> None:
    """The plain loop; `each` is told every batch's loss."""
    model, loss_fn = problem.model.train(), problem.loss_fn
    for epoch in range(epochs):
        for x, y in batches(problem, size, epoch, seed):

            def closure(x: Any = x, y: Tensor = y) -> Tensor:
                opt.zero_grad()
                loss = loss_fn(model(x), y)
                loss.backward()
                return loss.detach()

            if isinstance(opt, pb.optim.HessianFree):
                loss = opt.step((x, y))
            elif isinstance(opt, pb.optim.KBFGS):
                loss = opt.step(closure)
            else:
                loss = closure()
                opt.step()
            if each is not None:
                each(math.nan if loss is None else float(loss))


def made(name: str, problem: pb.Problem, factor: float = 1.0, **options: Any) -> Any:
    """The optimiser as it comes, or with `factor` times its learning rate."""
    if name == "AdamW":
        return torch.optim.AdamW([p for p in problem.model.parameters() if p.requires_grad])
    kind = getattr(pb.optim, name)
    if factor != 1:
        fresh = kind(problem.model, problem.loss_fn)
        options["lr"] = factor * fresh.param_groups[0]["lr"]
        options |= {"graft": "adam"} if isinstance(fresh, pb.optim.KBFGS) else {}  # the default's form, not the paper's
        if hasattr(fresh, "remove"):
            fresh.remove()
    return kind(problem.model, problem.loss_fn, **options)


def run(case: Case, name: str, factor: float, seed: int, **options: Any) -> dict[str, Any]:
    """Training losses before and after."""
    problem = case.make(seed)
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = training_loss(problem, case.batch_size)
        opt = made(name, problem, factor, **options)
        losses: list[float] = []
        began = time.perf_counter()
        size = case.batch_size * (4 if name == "HessianFree" else 1)
        train(problem, opt, size, case.epochs, seed, losses.append)
        seconds = time.perf_counter() - began
        end = training_loss(problem, case.batch_size)
    told = opt.diagnostics() if hasattr(opt, "diagnostics") else {}
    counts = {k: v for k, v in told.items() if isinstance(v, int) and k != "steps" and v}
    counts |= {k: v for k, v in (told.get("trust") or {}).items() if isinstance(v, int | float) and v}
    return {"start": start, "end": end if math.isfinite(end) else None, "worst": max(losses, key=_badness),
            "seconds": round(seconds, 3), "counts": counts}  # fmt: skip


@torch.no_grad()
def training_loss(problem: pb.Problem, size: int) -> float:
    """Mean over all batches, in training mode: what is minimised; running statistics lag behind it."""
    model, total, count = problem.model.train(), 0.0, 0
    with copied_buffers(model):
        for x, y in batches(problem, size, 0, 0):
            total += len(y) * float(problem.loss_fn(model(x), y))
            count += len(y)
    return total / count


def _badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


# --- the file ---------------------------------------------------------------------------------------------------------


def keys(problems: list[str], optimisers: list[str], factors: list[float], seeds: list[int]) -> list[Key]:
    """Every run, seed by seed, so that what stops early has all problems."""
    return [
        (problem, name, factor, seed) for seed in seeds for problem in problems for name in optimisers
        for factor in factors if name != "AdamW" or factor == 1
    ]  # fmt: skip


def read(path: Path) -> dict[Key, dict[str, Any]]:
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(r["problem"], r["optimizer"], r["factor"], r["seed"]): r for r in rows}


def write(path: Path, rows: dict[Key, dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


# --- the table --------------------------------------------------------------------------------------------------------


def table(rows: dict[Key, dict[str, Any]]) -> str:
    """Final training losses with the plain default, means over the seeds that are there; what failed, by name."""
    problems = [p for p in CASES if any(key[0] == p for key in rows)]
    names = [n for n in ("AdamW", *OURS) if any(key[1] == n for key in rows)]
    lines = ["| | start | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    pairs, worse = 0, []
    for problem in problems:
        mean = {
            n: _mean([r["end"] for (p, m, f, _), r in rows.items() if (p, m, f) == (problem, n, 1.0)]) for n in names
        }
        start = _mean([r["start"] for (p, *_), r in rows.items() if p == problem])
        cells = []
        for n in names:
            adam = mean.get("AdamW")
            bad = mean[n] is not None and n != "AdamW" and adam is not None and not mean[n] <= adam
            pairs += mean[n] is not None and n != "AdamW"
            worse += [f"{n} on {problem}"] if bad else []
            cells.append("" if mean[n] is None else f"{mean[n]:.3g}" + (" *" if bad else ""))
        lines.append(f"| {problem} | {start:.3g} | " + " | ".join(cells) + " |")
    ours = {key: r for key, r in rows.items() if key[1] != "AdamW"}
    nan = [_name(key) for key, r in ours.items() if r["end"] is None]
    above = [_name(key) for key, r in ours.items() if r["end"] is not None and r["end"] > r["start"]]
    ends = f"{len(ours)} runs; ended in NaN: {len(nan)}{_listed(nan)}; above where they began: "
    ends += f"{len(above)}{_listed(above)}."
    beaten = f"No worse than AdamW with the plain default: {pairs - len(worse)} of {pairs} pairs; the others (*)"
    return "\n".join([*lines, "", ends, beaten + _listed(worse) + "."]) + "\n"


def _mean(values: list[float | None]) -> float | None:
    if not values:
        return None
    return math.nan if None in values else sum(v for v in values if v is not None) / len(values)


def _name(key: Key) -> str:
    return f"{key[1]} on {key[0]} (lr x {key[2]:g}, seed {key[3]})"


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--only", nargs="*", default=["AdamW", *OURS], choices=["AdamW", *OURS])
    parser.add_argument("--factors", nargs="*", type=float, default=list(FACTORS))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--options", type=json.loads, default={}, help="as JSON, for every optimiser of ours")
    parser.add_argument("--again", action="store_true", help="run anew what is in the file already")
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    wanted = keys(args.problems, args.only, args.factors, args.seeds)
    found = read(args.file)
    if args.again:
        found = {key: row for key, row in found.items() if key not in set(wanted)}
        write(args.file, found)
    for key in (key for key in wanted if key not in found):
        problem, name, factor, seed = key
        result = run(CASES[problem], name, factor, seed, **({} if name == "AdamW" else args.options))
        row = {"problem": problem, "optimizer": name, "factor": factor, "seed": seed, **result}
        with args.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(read(args.file)))


if __name__ == "__main__":
    main()
