"""python -m benchmarks.sampled: sampled Laplace of ResNet-50, 1000 classes, batches of 8 images of 3x64x64, float32.

What a step of descent takes for several samples, in gradients of the same batch with respect to all weights (processor
time, so that other work on the machine counts less); and the peak memory of whole runs, each in a process of its own,
from which the copies of the weights for each sample are the slope.  `--long 8` is one run instead, of 50 steps for the
samples and 50 for the linearised optimum, which goes on from `--checkpoint` where it was stopped; the time of each part
is noted beside it as it ends, and the minutes are those of all parts, whichever process made them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import paraboloid as pb
from benchmarks.harness import machine
from paraboloid.posteriors.likelihood import Likelihood
from paraboloid.posteriors.sampled.scaled_model import ScaledModel
from paraboloid.posteriors.sampled.solvers import Descent, Position, descended, optimum_targets, sample_targets
from paraboloid.posteriors.sampled.tangent_curvature import TangentCurvature
from paraboloid.posteriors.sampled.tangent_system import TangentSystem
from paraboloid.posteriors.weights import only
from paraboloid.problems import networks

BATCH, SIDE = 8, 64


def problem(net: str, batches: int) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model, g = getattr(networks, net)().eval(), torch.Generator().manual_seed(1)
    data = [
        (torch.randn(BATCH, 3, SIDE, SIDE, generator=g), torch.randint(1000, (BATCH,), generator=g))
        for _ in range(batches)
    ]
    return model, data


def step_costs(net: str, samples: int, rounds: int) -> dict[str, float]:
    """Gradients that a step for the samples, a step of the optimum, and a plain gradient take; the medians."""
    model, data = problem(net, 1)
    every = list(model.parameters())
    names = [k for k, p in model.named_parameters() if p.dim() > 1 or k.endswith(f"{len(model) - 1}.bias")]  # type: ignore[arg-type]
    with only(model, names):
        system = TangentSystem(
            TangentCurvature(model, Likelihood.of(nn.CrossEntropyLoss()).loss, data, max_memory=1),
            1.0,
            0,
            range(samples),
        )
        precision = torch.full((system.size,), 100.0)
        P, linear, settings = 1 / precision, ScaledModel(system), Descent(epochs=1)
        b = system.right_hand_sides(precision, data=False)
        runs: dict[str, Any] = {
            "samples": (system.prior_draws(precision), b, sample_targets(system, settings)),
            "optimum": (torch.zeros(1, system.size), -precision * linear.theta[None], optimum_targets(linear)),
        }  # fmt: skip
        found: dict[str, list[float]] = {"samples": [], "optimum": [], "seconds": []}
        for _ in range(rounds + 1):
            for p in every:
                p.requires_grad_(True)
            start = time.process_time()
            torch.autograd.grad(F.cross_entropy(model(data[0][0]), data[0][1]), every)
            gradient = time.process_time() - start
            for p, (name, _) in zip(every, model.named_parameters(), strict=True):
                p.requires_grad_(name in names)
            found["seconds"].append(gradient)
            for kind, (x, right, outputs) in runs.items():
                steps = descended(x, Position(1e-6), system, settings, precision, P, right, outputs)
                start = time.process_time()
                for _ in steps:
                    pass
                found[kind].append((time.process_time() - start) / gradient)
    return {kind: statistics.median(values[1:]) for kind, values in found.items()}


class Parts:
    """Notes, as a callback, the time of each part of a run as it ends, beside the checkpoint where there is one."""

    def __init__(self, checkpoint: Path | None):
        self.beside = None if checkpoint is None else checkpoint.with_suffix(".jsonl")
        self.rows: list[dict[str, Any]] = []
        if self.beside is not None and self.beside.exists():  # of the processes before
            self.rows = [json.loads(line) for line in self.beside.read_text().splitlines()]
        self.clocks = time.time(), time.process_time()

    def __call__(self, progress: Any) -> None:
        now = time.time(), time.process_time()
        row = {
            "ended": f"{progress.doing} {progress.em_step}", "epoch": progress.epoch,
            "seconds": now[0] - self.clocks[0], "cpu_seconds": now[1] - self.clocks[1],
            "GiB": peak(), "residual": progress.residual,
        }  # fmt: skip
        self.rows.append(row)
        self.clocks = now
        if self.beside is not None:
            with self.beside.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def summary(self, posterior: Any) -> dict[str, Any]:
        """Seconds and peak of all processes that the run took, and what it found."""
        last = posterior.history[-1]
        return {
            "seconds": sum(row["seconds"] for row in self.rows),
            "cpu_seconds": sum(row["cpu_seconds"] for row in self.rows),
            "GiB": max(peak(), *(row["GiB"] for row in self.rows)), "parts": self.rows,
            "weights": sum(w.numel() for w in posterior.weights.values()),
            "precision": last.precision[0], "effective_dimension": last.effective_dimension[0],
            "residuals": [step.residual for step in posterior.history],
            "optimum": [step.optimum for step in posterior.history],
        }  # fmt: skip


def whole_run(net: str, samples: int, steps: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """A fit with one EM step, streamed, in this process: seconds, peak GiB, and what it found."""
    model, data = problem(net, steps)
    parts = Parts(checkpoint)
    posterior = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), data, samples, em_steps=1, prior_precision=1000.0, solver="sgd", epochs=1,
        max_memory=1, match=None, checkpoint=checkpoint, callback=parts,
    )  # fmt: skip
    return parts.summary(posterior)


def peak() -> float:
    """GiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def slope(curve: dict[int, dict[str, float]]) -> float:
    """Copies of the weights for each sample, by least squares through the peaks."""
    counts, peaks = list(curve), [row["GiB"] for row in curve.values()]
    copy = next(iter(curve.values()))["weights"] * 4 / 2**30
    return statistics.linear_regression(counts, peaks).slope / copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=4, help="batches of a pass, and steps of each descent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", type=int, help="one whole run with so many samples, in this process")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--long", type=int, metavar="SAMPLES", help="one run of 50 steps with so many samples, instead")
    parser.add_argument("--checkpoint", type=Path, default=Path("sampled-run"), help="of --long")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(whole_run(args.net, args.one, args.steps)))
        return
    if args.long:
        record = {"machine": machine(), **whole_run(args.net, args.long, 50, args.checkpoint)}
        (args.out / "sampled-long.json").write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record, indent=1))
        return
    curve: dict[int, dict[str, float]] = {}
    for samples in args.samples:
        command = [sys.executable, "-m", "benchmarks.sampled", "--one", str(samples), "--net", args.net]
        command += ["--steps", str(args.steps), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        curve[samples] = json.loads(done.stdout.splitlines()[-1])
    costs = step_costs(args.net, max(args.samples), args.rounds)
    copies = slope(curve) if len(curve) > 1 else float("nan")
    lines = [
        f"Sampled Laplace of {args.net}, {BATCH} images of 3x{SIDE}x{SIDE}, float32, {args.threads} thread(s).",
        "",
        f"A step for {max(args.samples)} samples: {costs['samples']:.1f} gradients (of {costs['seconds']:.2f} s).",
        f"A step of the linearised optimum: {costs['optimum']:.1f}.",
        f"Memory: {copies:.1f} copies of the weights for each sample.",
        "",
        f"Whole runs, {args.steps} steps for each of: samples, optimum, samples again.",
        "",
        "| samples | peak GiB | processor seconds | residual |",
        "|---|---|---|---|",
        *(f"| {k} | {r['GiB']:.2f} | {r['cpu_seconds']:.0f} | {r['residuals'][-1]:.2g} |" for k, r in curve.items()),
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sampled.md").write_text("\n".join(lines) + "\n")
    record = {"machine": machine(), "costs": costs, "copies": copies, "steps": args.steps, "runs": curve}
    (args.out / "sampled.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
