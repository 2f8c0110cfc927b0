"""scikit-image's phantom at 128 x 128: the linearised deep image prior and its rivals, where no matrix of pixels fits.

    python -m benchmarks.tomography_phantom               the cases that the record lacks, one after another
    python -m benchmarks.tomography_phantom --cases 0     the table again

From 10 and 20 angles with 5 and 10 per cent of noise, as `paraboloid reproduce tomography --full` has it: evidence by
matrices of the measurements, samples by conjugate gradients and Matheron's rule.  One line for each case in
results/tomography-phantom.jsonl; an interrupted training goes on where it stopped, and dropout comes last.  Needs
scikit-image, whose 400 x 400 pixels are resized with its own anti-aliasing.  One thread.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import machine
from benchmarks.tomography_quality import rounded
from paraboloid.jobs.studies.tomography import Plan
from paraboloid.jobs.studies.tomography.maps import dropout, reconstructed

NAME = "tomography-phantom"
SIZE = 128
CASES = ((20, 0.05), (10, 0.10), (10, 0.05), (20, 0.10))


def phantom() -> Tensor:
    """[128, 128], float32 between 0 and 1."""
    drawn = import_module("skimage.data").shepp_logan_phantom()
    return torch.from_numpy(import_module("skimage.transform").resize(drawn, (SIZE, SIZE), anti_aliasing=True)).float()


def posterior(angles: int, level: float, seed: int, keep: Path) -> dict[str, Any]:
    """A case without its maps and the rival."""
    start = time.process_time()
    row = reconstructed(phantom(), angles, level, Plan(), seed, keep)
    row.pop("maps")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return rounded({**row, "cpu_seconds": time.process_time() - start, "peak_gib": peak})


def table(rows: list[dict[str, Any]]) -> list[str]:
    about = (
        f"scikit-image's phantom, {SIZE} x {SIZE}, one image in each case. PSNR in dB; densities of the true image in "
        "nats per pixel, under one variance too: the one that fits the error best, and the published protocol's (the "
        "noise's times the mean diagonal of (A^T A)^+ of rank 100); intervals' coverage in per cent; CPU seconds and "
        "the process's peak memory."
    )
    names = [
        "angles, noise", "posterior mean", "network", "total variation", "density", "in 4 x 4 patches",
        "best one variance", "the noise's", "MC dropout", "50 %", "90 %", "correlation", "noise ratio", "CPU s", "GiB",
    ]  # fmt: skip
    head, rule = "| " + " | ".join(names) + " |", "|" + "---|" * len(names)
    lines = [", ".join(f"{k} {v}" for k, v in machine().items()), "", about, "", head, rule]
    for row in sorted(rows, key=lambda row: (row["noise"], row["angles"])):
        own = row["posterior"]
        rival = row.get("dropout", {"density": float("nan")})
        values = (own["psnr"], row["network"], row["tv"], own["density"], own["patches 4"], row["isotropic"],
                  row["carried"], rival["density"])  # fmt: skip
        sure = [f"{100 * own['inside'][key]:.0f}" for key in ("50", "90")]
        ratio = row["noise_variance"] / row["true_noise_variance"]
        cells = [*(f"{v:.2f}" for v in values), *sure, f"{own['correlation']:.2f}", f"{ratio:.2f}",
                 f"{row['cpu_seconds']:.0f}", f"{row['peak_gib']:.1f}"]  # fmt: skip
        lines.append(f"| {row['angles']}, {row['noise']:.0%} | " + " | ".join(cells) + " |")
    return lines


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / f"{NAME}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{NAME}.md").write_text("\n".join(table(rows)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = options.out / f"{NAME}.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    cases = CASES[: options.cases]
    for angles, level in cases:
        if (angles, level) not in {(row["angles"], row["noise"]) for row in rows}:
            keep = options.out / f"{NAME}-{angles}-{100 * level:.0f}.pt"
            rows.append(posterior(angles, level, options.seed, keep))
            _write(options.out, rows)
            keep.unlink()
    for row in rows:
        if "dropout" not in row:
            start = time.process_time()
            row["dropout"] = rounded(dropout(phantom(), row["angles"], row["noise"], Plan(), options.seed))
            row["cpu_seconds"] += time.process_time() - start
            _write(options.out, rows)
    _write(options.out, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
