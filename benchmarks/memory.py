"""python -m benchmarks.memory: peak memory of each quantity over the bare network, each in a process of its own.

Peak resident memory of the process while a quantity is computed twice, less what it was with the packages imported and
the network and batch made.  Results that are returned (individual gradients) count.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks import nets
from benchmarks.harness import machine
from benchmarks.statistics import QUANTITIES

SETTINGS = [("mlp", 128), ("3c3d", 128), ("allcnnc", 8)]
LIMITED = [("allcnnc", 32, "diag_ggn", 2**29)]  # with max_memory, which the peer does not have


def measure(package: str, net: str, batch: int, quantity: str, max_memory: int | None) -> float:
    """MB, in this process."""
    import paraboloid as pb
    from benchmarks.peers import PEERS

    torch.set_num_threads(1)
    importlib.import_module("torch.fx.experimental.symbolic_shapes")  # 40 MB that torch loads at the first pull
    model, x, y = nets.make(net, batch)
    loss_fn = nn.CrossEntropyLoss()
    if package == "gradient":

        def run():
            return torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))
    elif package == "paraboloid":

        def run():
            return pb.statistics(model, loss_fn, (x, y), QUANTITIES[quantity], max_memory=max_memory)
    else:
        run = PEERS[package](model, x, y)[quantity]
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024


def elsewhere(package: str, net: str, batch: int, quantity: str, max_memory: int | None = None) -> float | None:
    """The same in a fresh process; None where the package does not offer it, or fails."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", package, net, str(batch), quantity]
    command += ["--max-memory", str(max_memory)] if max_memory else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return float(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, metavar=("PACKAGE", "NET", "BATCH", "QUANTITY"))
    parser.add_argument("--max-memory", type=int)
    parser.add_argument("--nets", nargs="*", default=[n for n, _ in SETTINGS])
    parser.add_argument("--only", nargs="*", choices=list(QUANTITIES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.one:
        package, net, batch, quantity = args.one
        print(measure(package, net, int(batch), quantity, args.max_memory))
        return
    lines, record = ["| | | paraboloid | BackPACK |", "|---|---|---|---|"], []
    for net, batch in SETTINGS:
        if net not in args.nets:
            continue
        base = elsewhere("gradient", net, batch, "grad")
        lines.append(f"| {net}, batch {batch} | gradient | {base:.0f} | {base:.0f} |")
        for quantity in args.only or QUANTITIES:
            if (net, quantity) in {("allcnnc", "diag_ggn"), ("allcnnc", "kflr")} and not args.only:
                continue
            row = {p: elsewhere(p, net, batch, quantity) for p in ("paraboloid", "BackPACK")}
            record.append({"net": net, "batch": batch, "quantity": quantity, "gradient": base, **row})
            cells = " | ".join("–" if v is None else f"{v:.0f}" for v in row.values())
            lines.append(f"| | {quantity} | {cells} |")
            print(lines[-1], file=sys.stderr, flush=True)
    for net, batch, quantity, limit in LIMITED if set(args.nets) == {n for n, _ in SETTINGS} and not args.only else ():
        peak = elsewhere("paraboloid", net, batch, quantity, limit)
        record.append({"net": net, "batch": batch, "quantity": quantity, "max_memory": limit, "paraboloid": peak})
        lines.append(f"| {net}, batch {batch} | {quantity}, max_memory {limit / 2**20:.0f} MiB | {peak:.0f} |  |")
    args.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["Peak MB over the bare network, one thread.", "", *lines]) + "\n"
    (args.out / "memory.md").write_text(text)
    (args.out / "memory.json").write_text(json.dumps({"machine": machine(), "rows": record}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
