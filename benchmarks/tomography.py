"""python -m benchmarks.tomography: products with a projector and its adjoint against MIRTorch's, where it is installed.

One image of 128 x 128, 30 angles, one thread; median CPU milliseconds of interleaved runs.  pip install --no-deps
mirtorch==0.4.0 torchkbnufft PyWavelets brings the peer.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.harness import machine
from benchmarks.peers import installed
from paraboloid.tomography import ParallelBeam

REPEATS = 25


def measured(size: int, angles: int, dtype: torch.dtype) -> dict[str, Any]:
    A = ParallelBeam(size, angles)
    x = torch.rand(size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    y = A @ x
    runs = {"A @ x": lambda: A @ x, "A.T @ y": lambda: A.T @ y}
    if installed("mirtorch"):
        peer = import_module("mirtorch.linear").CT((size, size), A.angles, A.detectors, detector_spacing=A.spacing)
        runs |= {"MIRTorch's A x": lambda: peer(x), "MIRTorch's A^T y": lambda: peer.H(y)}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.process_time()
            run()
            found[name].append(1e3 * (time.process_time() - start))
    kind = str(dtype).removeprefix("torch.")
    return {"size": size, "angles": angles, "dtype": kind, **{name: median(values) for name, values in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--angles", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(options.size, options.angles, dtype) for dtype in (torch.float32, torch.float64)]
    columns = [name for name in rows[0] if name not in ("size", "angles", "dtype")]
    lines = [", ".join(f"{k} {v}" for k, v in machine().items()), "", "CPU milliseconds of one product.", "",
             "| size, angles, dtype | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]  # fmt: skip
    for row in rows:
        cells = " | ".join(f"{row[name]:.2f}" for name in columns)
        lines.append(f"| {row['size']}, {row['angles']}, {row['dtype']} | {cells} |")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tomography.json").write_text(json.dumps({"rows": rows, "machine": machine()}, indent=1) + "\n")
    (options.out / "tomography.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
