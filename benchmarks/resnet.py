"""python -m benchmarks.resnet: KFAC and EKFAC of ResNet-18 on 3x64x64, batch 16, float32, eigendecompositions included.

Each row runs in a process of its own: seconds, multiples of a gradient taken beside it, and the peak memory of the
whole process.  The factors of the late layers are 4608 wide; their rows (64 positions) are not.
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

import torch
from torch import nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import machine

BATCH, DAMPING = 16, 1e-3
ROWS = {
    "KFAC, factors alone": lambda *problem: pb.KFAC(*problem),
    "KFAC, with its inverse": lambda *problem: pb.KFAC(*problem).inverse(DAMPING),
    "EKFAC, with its inverse": lambda *problem: pb.EKFAC(*problem).inverse(DAMPING),
    "KFAC exact, with its inverse (100 classes)": lambda *problem: pb.KFAC(*problem, fisher="exact").inverse(DAMPING),
}


def measure(row: str, rounds: int, threads: int) -> dict[str, float]:
    """Median seconds and multiples of a gradient, and peak GiB, in this process."""
    torch.set_num_threads(threads)
    model, x, y = nets.make("resnet18", BATCH)
    model.eval()  # running statistics are those of the initial network: per-sample terms are separate
    loss_fn, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    times = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        torch.autograd.grad(loss_fn(model(x), y), parameters)
        middle = time.perf_counter()
        ROWS[row](model, loss_fn, (x, y))
        times.append((middle - start, time.perf_counter() - middle))
    seconds = statistics.median(t for _, t in times[1:])
    ratio = statistics.median(t / g for g, t in times[1:])
    return {"seconds": seconds, "gradients": ratio, "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.rounds, args.threads)))
        return
    found = {}
    for row in ROWS:
        command = [sys.executable, "-m", "benchmarks.resnet", "--one", row]
        command += ["--rounds", str(args.rounds), "--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[row] = json.loads(done.stdout.splitlines()[-1])
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    title = f"ResNet-18, batch {BATCH} of 3x64x64, float32, {threads}: multiples of a gradient, peak of the process."
    lines = [title, "", "| | seconds | gradients | peak GiB |", "|---|---|---|---|"]
    lines += [f"| {k} | {r['seconds']:.2f} | {r['gradients']:.1f} | {r['GiB']:.2f} |" for k, r in found.items()]
    text = "\n".join(lines) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "resnet18.md").write_text(text)
    (args.out / "resnet18.json").write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
