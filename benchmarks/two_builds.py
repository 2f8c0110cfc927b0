"""python -m benchmarks.two_builds --base DIR: is this checkout slower than another one, row by row?

The package of DIR/src and that of this checkout are imported into one process, and every row is timed in turns on one
thread: base, new, new, base.  Reported are medians over the rounds: both times in multiples of the reference (a plain
gradient, if nothing else is said) and new / base of the same round, with its quartiles.  The clock is this process's
own, which leaves out what other programs take.  Rows more than 3 % slower are timed again, with three times the rounds
and everything made anew in the other order, for one copy of a network may lie better in memory than the other: that
tells noise from truth.  What is slower twice is listed at the end.

Each build measures with the benchmarks of its own checkout, where it has them: what they import of the package may have
moved.  The default takes about five minutes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Run, machine

HERE = Path(__file__).resolve().parents[1]
OWNED = ("paraboloid", "benchmarks")  # packages of which each build has its own
SLOWER = 1.03
LEAST_SECONDS = 0.004  # of one timing: shorter calls are repeated
LEAST, MOST, AGAIN = 5, 41, 3  # rounds, and how many times as many the second time


# --- two builds in one process ---------------------------------------------------------------------------------------


def taken() -> dict[str, ModuleType]:
    """The owned modules, no longer in `sys.modules`."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in OWNED}


class Build:
    """The package and the benchmarks of one checkout; `sys.modules` holds them while the build is active, so that
    imports inside functions find their own build too.

    Raises ValueError for a directory without a package.
    """

    def __init__(self, label: str, root: Path):
        if not (root / "src" / "paraboloid" / "__init__.py").is_file():
            raise ValueError(f"{root} has no src/paraboloid/__init__.py; expected a checkout of the package.")
        self.label, self.source = label, (root / "src").resolve()
        self.modules: dict[str, ModuleType] = {}
        self.path = [str(self.source), str(root.resolve())]
        with self.active():
            import benchmarks
            import paraboloid  # noqa: F401

            if (lent := str(HERE / "benchmarks")) not in benchmarks.__path__:  # for what the checkout lacks
                benchmarks.__path__.append(lent)

    @contextmanager
    def active(self) -> Iterator[None]:
        others, path = taken(), list(sys.path)
        sys.modules.update(self.modules)
        sys.path[:0] = self.path
        try:
            yield
        finally:
            self.modules = taken()
            sys.path[:] = path
            sys.modules.update(others)

    def check(self) -> None:
        """Raise RuntimeError where a module of the package came from elsewhere."""
        files = {name: getattr(m, "__file__", None) for name, m in self.modules.items() if "paraboloid" in name}
        strange = {
            k: f for k, f in files.items() if f is not None and not Path(f).resolve().is_relative_to(self.source)
        }
        if strange:
            raise RuntimeError(f"the build {self.label!r} imported {strange}; expected files below {self.source}.")


# --- rows ------------------------------------------------------------------------------------------------------------
# A group is a function that is called while a build is active, and imports what it times: the reference, and its rows.

Group = tuple[Run, dict[str, Run]]
CROSS = nn.CrossEntropyLoss()


def gradient(model: nn.Module, loss_fn: nn.Module, x: Any, y: Any) -> Run:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(loss_fn(model(x), y), parameters)


def small_calls() -> Group:
    """Calls on a tiny network, which are nothing but overhead."""
    from benchmarks import walks

    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    return gradient(model, CROSS, torch.randn(8, 4), torch.randint(3, (8,))), dict(walks.calls())


def statistics_of(net: str, batch: int) -> Group:
    import paraboloid as pb
    from benchmarks import nets
    from benchmarks import statistics as bench

    model, x, y = nets.make(net, batch)
    for _ in range(bench.SETTLED):
        pb.statistics(model, CROSS, (x, y), ["grad"])
    left_out = bench.HEAVY.get((net, batch), ())
    return gradient(model, CROSS, x, y), {
        name: partial(pb.statistics, model, CROSS, (x, y), wanted)
        for name, wanted in bench.QUANTITIES.items() if name not in left_out
    }  # fmt: skip


def operators_on(net: str, batch: int, *only: str) -> Group:
    from benchmarks import nets
    from benchmarks import operators as bench

    model, x, y = nets.make(net, batch)
    runs = bench.ours(model, CROSS, [(x, y)])
    return gradient(model, CROSS, x, y), {k: run for k, run in runs.items() if not only or k in only}


def diagonals(net: str, batch: int) -> Group:
    """Of operators: what is not among the benchmarks of operators."""
    import paraboloid as pb
    from benchmarks import nets

    model, x, y = nets.make(net, batch)
    E = pb.EKFAC(model, CROSS, (x, y))
    E @ (v := torch.randn(E.shape[0]))
    return gradient(model, CROSS, x, y), {
        "diagonal, exact": lambda: pb.DiagonalGGN(model, CROSS, (x, y)),
        "diagonal, Monte Carlo": lambda: pb.DiagonalGGN(model, CROSS, (x, y), samples=1),
        "EKFAC product, repeated": lambda: E @ v,
        "EKFAC inverse and logdet": lambda: (E.inverse(1e-2), E.logdet(1e-2)),
    }


def optimisers_on(title: str) -> Group:
    """Steps as they come, most of them without a renewal, and steps with everything due."""
    import paraboloid as pb
    from benchmarks import optimisers as bench

    model, x, y, loss_fn = bench.PROBLEMS[title]()
    due: dict[str, Any] = {"lr": 1e-5, "damping": 1e-2, "factor_interval": 1, "inverse_interval": 1}
    makers = {name: make for name, make in bench.OPTIMISERS.items() if name != "Adam"} | {
        "KFAC, all due": lambda m, loss: pb.optim.KFAC(m, loss, **due),
        "EKFAC, all due": lambda m, loss: pb.optim.EKFAC(m, loss, **due),
        "Preconditioned, kfac": lambda m, loss: pb.optim.Preconditioned(m, loss, curvature="kfac", lr=1e-5),
    }
    runs: dict[str, Run] = {}
    for name, make in makers.items():
        own = copy.deepcopy(model)
        opt = make(own, loss_fn)
        if isinstance(opt, pb.optim.KBFGS):
            opt.warm_start([(x, y)])
        runs[name] = bench.stepper(own, loss_fn, opt, x, y)
        for _ in range(100 if name == "KBFGSL" else 3):  # a full memory
            runs[name]()
        if name in ("KFAC", "EKFAC"):
            opt.counters["steps"] = bench.SETTLED
    free = pb.optim.HessianFree(copy.deepcopy(model), loss_fn, lr=1e-5, max_iterations=10, line_search=False)
    runs["HessianFree, 10 iterations"] = partial(free.step, (x, y))
    return gradient(model, loss_fn, x, y), runs


def fits(net: str, *kinds: str) -> Group:
    """Against an epoch of plain gradients."""
    from benchmarks import posteriors as bench

    model, data, _ = bench.make(net)
    return partial(bench.epoch, model, data), {k: partial(bench.fitted, "paraboloid", model, data, k) for k in kinds}


def predictions(net: str, *kinds: str) -> Group:
    """Against a forward pass of the same points."""
    from benchmarks import posteriors as bench

    model, data, x = bench.make(net)
    return partial(bench.forward, model, x), {
        k: partial(bench.predicted, "paraboloid", bench.fitted("paraboloid", model, data, k), x) for k in kinds
    }


def clustering(net: str) -> Group:
    """A pass, against an epoch of plain gradients."""
    import paraboloid as pb
    from benchmarks import noise as bench

    build, size = bench.NETS[net]
    model, data = build()
    runs: dict[str, Run] = {}
    for update in ("singular", "mean"):
        clusters = pb.noise.GradientClustering(model, CROSS, 10, update=update)
        runs[f"{update} update"] = partial(clusters.fit, data, batch_size=size, passes=1)
    return partial(bench.epoch, model, data, size), runs


def biases(net: str) -> Group:
    import paraboloid as pb
    from benchmarks import bias as bench
    from paraboloid import problems

    model, x, y = bench.digits(net)
    data = problems.load(net).train
    size = sum(p.numel() for p in model.parameters())
    D = nn.functional.normalize(torch.randn(10, size))
    q = pb.quadratic(model, CROSS, (x, y))
    return gradient(model, CROSS, x, y), {
        "bias, 3 directions, 2 repeats": lambda: pb.bias(model, CROSS, data, 64, k=3, repeats=2),
        "10 directions of a quadratic": lambda: q.along(D),
        "making it too": lambda: pb.quadratic(model, CROSS, (x, y)).along(D),
    }


DIGITS = "digits autoencoder, batch 100"
LAPLACE = ("diag", "kron", "kron, last layer")
GROUPS: dict[str, Callable[[], Group]] = {
    "small calls": small_calls,
    "statistics, mlp 128": partial(statistics_of, "mlp", 128),
    "statistics, 3c3d 64": partial(statistics_of, "3c3d", 64),
    "statistics, allcnnc 8": partial(statistics_of, "allcnnc", 8),
    "statistics, transformer 32": partial(statistics_of, "transformer", 32),
    "operators, mlp 128": partial(operators_on, "mlp", 128),
    "operators, 3c3d 64": partial(operators_on, "3c3d", 64, "GGN product, repeated", "KFAC, Monte Carlo",
                                  "EKFAC, Monte Carlo"),
    "operators, transformer 32": partial(operators_on, "transformer", 32),
    "diagonals, mlp 128": partial(diagonals, "mlp", 128),
    f"steps, {DIGITS}": partial(optimisers_on, DIGITS),
    "fit, digits-mlp (epochs)": partial(fits, "digits-mlp", *LAPLACE, "lowrank 10", "functional, 200 samples"),
    "fit, digits-cnn (epochs)": partial(fits, "digits-cnn", *LAPLACE),
    "predict, digits-mlp (forward passes)": partial(predictions, "digits-mlp", *LAPLACE, "lowrank 10"),
    "predict, digits-cnn (forward passes)": partial(predictions, "digits-cnn", *LAPLACE),
    "clustering, digits-cnn (epochs)": partial(clustering, "digits-cnn"),
    "bias, digits-mlp": partial(biases, "digits-mlp"),
}  # fmt: skip


# --- timing ----------------------------------------------------------------------------------------------------------


@dataclass
class Figure:
    """Medians over the rounds: multiples of the reference, and new / base with its quartiles."""

    base: float
    new: float
    ratio: float
    low: float
    high: float
    rounds: int

    def row(self) -> str:
        return f"{self.base:.2f} | {self.new:.2f} | {self.ratio:.3f} ({self.low:.3f}–{self.high:.3f}) | {self.rounds}"


def seconds(run: Run) -> float:
    start = time.process_time()
    result = run()
    spent = time.process_time() - start
    del result
    return spent


class Pair:
    """One row in both builds."""

    def __init__(self, reference: Run, runs: tuple[Run, Run], builds: tuple[Build, Build], order: tuple[int, int]):
        self.reference, self.runs, self.builds = reference, runs, builds
        self.repeats = 1
        first = [self._time(which) for which in order]  # and what is made or imported at the first call
        warm = sum(self._time(which) for which in order) if sum(first) < 2 else sum(first)
        self.repeats = max(1, min(200, round(2 * LEAST_SECONDS / warm)))
        self.round_seconds = self.repeats * warm + seconds(reference)

    def _time(self, which: int) -> float:
        """Seconds of one call; the imports change hands outside of what is timed."""
        run = self.runs[which]
        with self.builds[which].active():
            return seconds(lambda: [run() for _ in range(self.repeats)]) / self.repeats

    def measured(self, rounds: int) -> Figure:
        times: tuple[list[float], list[float]] = ([], [])
        references = []
        gc.collect()
        gc.disable()
        try:
            for i in range(rounds):
                references.append(seconds(self.reference))
                for which in ((0, 1), (1, 0))[i % 2]:
                    times[which].append(self._time(which))
        finally:
            gc.enable()
        base, new = ([t / r for t, r in zip(each, references, strict=True)] for each in times)
        low, ratio, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
        return Figure(statistics.median(base), statistics.median(new), ratio, low, high, rounds)


def pairs(
    name: str, builds: tuple[Build, Build], wanted: Callable[[str], bool], order: tuple[int, int] = (0, 1)
) -> dict[str, Pair]:
    """The wanted rows of a group that both builds have; `order`: which build makes its own first."""
    groups: dict[int, Group] = {}
    for which in order:
        with builds[which].active():
            torch.manual_seed(0)
            groups[which] = GROUPS[name]()
    (reference, base), (_, new) = groups[0], groups[1]
    for row in base.keys() ^ new.keys():
        print(f"{name} | {row}: in one build only, left out", file=sys.stderr)
    for _ in range(3):
        reference()
    rows = [row for row in base if row in new and wanted(row)]
    return {row: Pair(reference, (base[row], new[row]), builds, order) for row in rows}


def timed(name: str, builds: tuple[Build, Build], parts: list[str], options: Any) -> dict[str, list[Figure]]:
    """Every row of a group that has one of the parts in its name: once, or twice where it was slower."""

    def wanted(row: str) -> bool:
        return any(part.strip() in row for part in parts)

    found: dict[str, list[Figure]] = {}
    for row, pair in pairs(name, builds, wanted).items():
        rounds = options.rounds or max(LEAST, min(MOST, int(options.budget / pair.round_seconds)))
        found[row] = [pair.measured(rounds)]
        print(f"| {name}: {row} | {found[row][0].row()} |", flush=True)
    slower = {row for row, figures in found.items() if figures[0].ratio > SLOWER}
    for row, pair in pairs(name, builds, slower.__contains__, (1, 0)).items() if slower else ():
        found[row].append(pair.measured(AGAIN * found[row][0].rounds))
        print(f"| {name}: {row}, again | {found[row][1].row()} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the other checkout")
    parser.add_argument("--new", type=Path, default=HERE, help="default: this checkout")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help='parts of names, such as "statistics" or "mlp 128 | kfac"'
    )
    parser.add_argument("--rounds", type=int, help="of every row (default: by --budget)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each row, 5 to 41 rounds")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    builds = Build("base", options.base), Build("new", options.new)

    print("| row | base | new | new / base | rounds |\n|---|---|---|---|---|")
    found: dict[str, list[Figure]] = {}
    for group in GROUPS:
        parts = [row for of, _, row in (part.partition("|") for part in options.rows) if of.strip() in group]
        if parts:
            found |= {f"{group} | {row}": figures for row, figures in timed(group, builds, parts, options).items()}
    for build in builds:
        build.check()
    again = {name: figures[1] for name, figures in found.items() if len(figures) > 1}
    slower = {name: f for name, f in again.items() if f.ratio > SLOWER}
    print(f"\n{len(found)} rows; {len(again)} were more than {SLOWER - 1:.0%} slower and timed again; slower twice: "
          f"{len(slower)}.")  # fmt: skip
    for name, figure in slower.items():
        print(f"- {name}: {figure.ratio:.3f} ({figure.low:.3f}–{figure.high:.3f})")
    if options.out:
        record = {"machine": machine(), "rows": {name: [asdict(f) for f in figures] for name, figures in found.items()}}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
