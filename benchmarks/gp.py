"""python -m benchmarks.gp: Gaussian processes against GPyTorch's conjugate gradients, and their own solvers at scale.

Against GPyTorch: seconds of CPU time to a relative error of the predicted mean of 1e-3 (against conjugate gradients in
float64 to 1e-7), one thread, one process; each side with the loosest of its tolerances that reaches it, in float32, and
in float64 where GPyTorch does not get there in float32.  Ours is the solver that `condition` chooses by itself;
GPyTorch is given up after `--patience` times our own seconds.
`--scale N`: N generated points, `--samples` functions, to a relative residual of 1e-2, with `--solvers` side by side
(inducing: 500 random inputs); sdd is given up after `--longer` times the first solver's time, and block, sdd and sgd
after about `--seconds` of CPU time: a few steps tell how many these are.  The error is that of the mean at new inputs,
relative to the function that the data was generated from.  A million points: make bench-gp-million.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import paraboloid as pb
from benchmarks.harness import machine
from benchmarks.peers import installed
from paraboloid.gp.prior import PriorFunctions

AIM, DIMENSIONS, NEW = 1e-3, 3, 200
OURS = 30.0  # seconds of our own side: without a limit it goes on for long where float32 does not allow the aim
RESIDUAL, FEW = 1e-2, 500  # at scale: what is asked for, and inducing inputs
STEPPED = {"block": 4, "sdd": 512, "sgd": 512}  # solvers whose steps can be cut short, and how many tell their time
TOLERANCES = (1e-3, 7e-4, 5e-4, 2e-4, 1e-4)
PEERS = (("GPyTorch", 15), ("GPyTorch, rank 100", 100))  # 15 is its own default
KERNELS: dict[str, Callable[[], pb.gp.Kernel]] = {"Matern 3/2": lambda: pb.gp.Matern(1.5), "RBF": lambda: pb.gp.RBF()}


def generated(n: int, noise: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Normal inputs in three dimensions, a function drawn from the Matern prior, and noise."""
    return problem(n, noise, dtype)[:2]


def problem(n: int, noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`generated`, and new inputs with the function's values, without noise."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, DIMENSIONS, generator=g, dtype=dtype)
    functions = PriorFunctions(pb.gp.Matern(1.5), 1, 4096, x, g)
    y = functions(x)[0] + noise**0.5 * torch.randn(n, generator=g, dtype=dtype)
    new = torch.randn(NEW, DIMENSIONS, generator=g, dtype=dtype)
    return x, y, new, functions(new)[0]


def ours(kernel: pb.gp.Kernel, x: Tensor, y: Tensor, new: Tensor, noise: float, taken: list[str], tol: float) -> Tensor:
    """The mean by the solver that is chosen by itself, which is added to `taken`; the choice is in the time."""
    gp = pb.gp.condition(kernel, x, y, noise, samples=0, tol=tol)
    taken.append(gp.solver)
    return gp.mean(new)


def gpytorchs(name: str, rank: int, x: Tensor, y: Tensor, new: Tensor, noise: float, tol: float) -> Tensor:
    import gpytorch
    from gpytorch import settings

    class Model(gpytorch.models.ExactGP):
        def __init__(self, likelihood: Any, kernel: Any):
            super().__init__(x, y, likelihood)
            self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), gpytorch.kernels.ScaleKernel(kernel)

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    free = gpytorch.constraints.GreaterThan(1e-8)
    likelihood = gpytorch.likelihoods.GaussianLikelihood(noise_constraint=free).to(x)
    kernel = gpytorch.kernels.RBFKernel() if name == "RBF" else gpytorch.kernels.MaternKernel(nu=1.5)
    model = Model(likelihood, kernel).to(x)
    kernel.lengthscale, model.covar_module.outputscale, likelihood.noise = 1.0, 1.0, noise
    model.eval()
    with (
        torch.no_grad(),
        settings.max_cholesky_size(0),
        settings.eval_cg_tolerance(tol),
        settings.max_preconditioner_size(rank),
        settings.max_cg_iterations(4000),
        settings.skip_posterior_variances(True),
    ):
        return model(new).mean


class Late(Exception):
    """A run took longer than it was given."""


def within(run: Callable[[], Tensor], seconds: float | None) -> Tensor:
    """run(), or `Late` after so many seconds of CPU time."""

    def stop(*_: Any) -> None:
        raise Late

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds or 0)
    try:
        return run()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fastest(
    run: Callable[[float], Tensor], exact: Tensor, repeats: int, limit: float | None = None
) -> dict[str, float | None]:
    """CPU seconds at the loosest tolerance that meets the aim, its error and itself; or the best error that was met,
    and `over`, the limit, where that stopped it."""
    best = float("inf")
    for tol in TOLERANCES:
        seconds = []
        for _ in range(repeats):
            start = time.process_time()
            try:
                mean = within(partial(run, tol), limit)
            except Late:
                return {"seconds": None, "error": min(best, 9e99), "tol": None, "over": limit}
            seconds.append(time.process_time() - start)
        error = float((mean.double() - exact).norm() / exact.norm())
        best = min(best, error)
        if error <= AIM:
            return {"seconds": min(seconds), "error": error, "tol": tol, "over": None}
    return {"seconds": None, "error": best, "tol": None, "over": None}


def against_gpytorch(
    sizes: list[int], kernels: list[str], noises: list[float], patience: float
) -> Iterator[dict[str, Any]]:
    x, y, new, _ = problem(100, 0.1, torch.float32)
    for _, rank in PEERS if installed("gpytorch") else ():
        gpytorchs("RBF", rank, x, y, new, 0.1, 1e-3)  # what is imported and set up once, without a limit
    for n in sizes:
        for name in kernels:
            for noise in noises:
                x, y = generated(n + NEW, noise)
                exact = pb.gp.condition(KERNELS[name](), x[:n], y[:n], noise, "cg", 0, tol=1e-7).mean(x[n:])
                for dtype in (torch.float32, torch.float64):
                    row = one(n, name, noise, x.to(dtype), y.to(dtype), exact, patience)
                    yield row
                    met = row["paraboloid"]["seconds"] is not None
                    theirs = [row[label] for label, _ in PEERS if label in row]
                    if met and (not theirs or any(r["seconds"] is not None or r["over"] for r in theirs)):
                        break


def one(
    n: int, name: str, noise: float, x: Tensor, y: Tensor, exact: Tensor, patience: float
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"n": n, "kernel": name, "noise": noise, "dtype": str(x.dtype).removeprefix("torch.")}
    repeats, data = 3 if n <= 5000 else 1, (x[:n], y[:n], x[n:], noise)
    start, taken = time.process_time(), list[str]()
    row["paraboloid"] = fastest(partial(ours, KERNELS[name](), *data, taken), exact, repeats, OURS)
    row["by"] = taken[-1] if taken else None
    mine = row["paraboloid"]["seconds"]
    limit = time.process_time() - start if mine is None else patience * mine
    for label, rank in PEERS if installed("gpytorch") else ():
        row[label] = fastest(partial(gpytorchs, name, rank, *data), exact, repeats, limit)
    return row


def at_scale(
    n: int, samples: int, noise: float, solvers: list[str], longer: float, seconds: float | None
) -> Iterator[dict[str, Any]]:
    """CPU seconds, residual and error of each solver, and this process's peak memory after it."""
    x, y, new, truth = problem(n, noise, torch.float32)
    first = None
    for solver in solvers:
        condition = partial(_conditioned, x, y, noise, solver, samples)
        limit = longer * first if first is not None and solver == "sdd" and longer else seconds
        steps = _steps_in(limit, condition, STEPPED[solver]) if limit and solver in STEPPED else None
        start, wall = time.process_time(), time.perf_counter()
        gp = condition(steps)
        taken, walled = time.process_time() - start, time.perf_counter() - wall
        first = taken if first is None else first
        yield {
            "n": n, "samples": samples, "noise": noise, "asked": solver, "solver": gp.solver, "reason": gp.reason,
            "seconds": taken, "wall": walled, "passes": gp.passes,
            "residual": None if solver == "inducing" else gp.residual,
            "error": float((gp.mean(new) - truth).norm() / truth.norm()),
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "stopped": steps is not None and gp.residual > RESIDUAL, "threads": torch.get_num_threads(),
        }  # fmt: skip


def _conditioned(
    x: Tensor, y: Tensor, noise: float, solver: str, samples: int, steps: int | None
) -> pb.gp.GaussianProcess:
    kernel = pb.gp.Matern(1.5)
    if solver == "inducing":
        chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:FEW]
        return pb.gp.condition(kernel, x, y, noise, samples=samples, inducing=x[chosen])
    return pb.gp.condition(kernel, x, y, noise, solver, samples, tol=RESIDUAL, steps=steps)


def _steps_in(seconds: float, condition: Callable[[int], Any], steps: int) -> int:
    """How many steps take so long, from one and `steps` more of them, or four times as many and so on."""

    def taking(steps: int) -> float:
        start = time.process_time()
        condition(steps)
        return time.process_time() - start

    few = taking(1)
    while (more := taking(1 + steps) - few) < 0.01 * seconds:
        steps *= 4
    return max(1, 1 + int(steps * (seconds - few) / more))


def cell(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    if found["seconds"] is not None:
        return f"{found['seconds']:.2f} s"
    return f"over {found['over']:.2f} s" if found.get("over") else f"not met (best error {found['error']:.1e})"


def times(row: dict[str, Any], label: str) -> str:
    mine, other = row["paraboloid"]["seconds"], row.get(label, {})
    if not mine or not other:
        return ""
    if other["seconds"]:
        return f"{other['seconds'] / mine:.1f}"
    return f"over {other['over'] / mine:.0f}" if other.get("over") else ""


def markdown(rows: list[dict[str, Any]], scale: list[dict[str, Any]]) -> str:
    columns = ["paraboloid", *(label for label, _ in PEERS)]
    lines = [", ".join(f"{k} {v}" for k, v in machine().items()), ""]
    if rows:
        lines += ["CPU seconds to a mean within 1e-3 (one right-hand side); times: GPyTorch's over ours.", "",
                  "| n, kernel, noise | " + " | ".join(columns) + " | times | times, rank 100 |",
                  "|---|" + "---|" * (len(columns) + 2)]  # fmt: skip
        for r in rows:
            cells = [*(cell(r.get(c)) for c in columns), *(times(r, c) for c in columns[1:])]
            cells[0] += f" ({r['by']})" if r.get("by") else ""
            dtype = ", float64" * (r.get("dtype") == "float64")
            lines.append(f"| {r['n']}, {r['kernel']}, {r['noise']:g}{dtype} | {' | '.join(cells)} |")
    if scale:
        columns = ["n, samples, noise", "solver", "CPU seconds", "passes", "residual", "error", "peak memory"]
        said = ("To a relative residual of 1e-2 (Matern 3/2, float32). The error is that of the mean at new inputs, "
                "relative to the function that the data was generated from.")  # fmt: skip
        lines += ["", said, "", f"| {' | '.join(columns)} |", "|---|" + "---|" * (len(columns) - 1)]
        for r in scale:
            solver = (
                r["solver"]
                + " (auto)" * (r.get("asked") == "auto")
                + ", cut short" * r["stopped"]
                + f", {r['threads']} threads" * (r["threads"] > 1)
            )
            memory = "" if r["gib"] is None else f"{r['gib']:.1f} GiB"
            residual, error = ("" if r.get(key) is None else f"{r[key]:.1e}" for key in ("residual", "error"))
            lines.append(f"| {r['n']}, {r['samples']}, {r['noise']:g} | {solver} | {r['seconds']:.0f} "
                         f"| {r['passes']:.2f} | {residual} | {error} | {memory} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("n", "samples", "solver", "kernel", "noise", "dtype"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", type=int, default=[3000, 20_000])
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--noises", nargs="+", type=float, default=[0.1, 1e-3])
    parser.add_argument("--scale", type=int, default=None, help="this many points instead")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--solvers", nargs="+", default=["auto", "sdd"])
    parser.add_argument("--seconds", type=float, default=None, help="of CPU time for a solver at scale, about")
    parser.add_argument("--patience", type=float, default=6.0)
    parser.add_argument("--longer", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    path = options.out / "gp.json"
    record = json.loads(path.read_text()) if path.exists() else {"peers": [], "scale": []}
    options.out.mkdir(parents=True, exist_ok=True)
    if options.scale:
        sizes = options.scale, options.samples, options.noises[0]
        part, rows = "scale", at_scale(*sizes, options.solvers, options.longer, options.seconds)
    else:
        part, rows = ("peers", against_gpytorch(options.sizes, options.kernels, options.noises, options.patience))
    for row in rows:  # kept as they come, and instead of those of earlier runs
        print(json.dumps(row), flush=True)
        rest = [r for r in record[part] if _place(r) != _place(row)]
        record[part] = sorted([*rest, row], key=lambda r: r["n"])
        path.write_text(json.dumps({**record, "machine": machine()}, indent=1, allow_nan=False) + "\n")
    text = markdown(record["peers"], record["scale"])
    (options.out / "gp.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
