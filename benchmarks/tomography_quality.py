"""Reconstructions of generated characters and how sure they are, the published protocol's 50 images.

    python -m benchmarks.tomography_quality --images 50     the images that the record lacks, one after another
    python -m benchmarks.tomography_quality --images 0      the table again

Of each image 28 x 28 from 5, 10, 20 and 30 angles with 5 and 10 per cent of noise: the linearised deep image prior
against the network's own image, total variation, one variance for all pixels and Monte Carlo dropout, as
`paraboloid reproduce tomography` has them.  One line for each image and cell in results/tomography-quality.jsonl;
an interrupted run goes on where it stopped.  One thread: some 50 seconds an image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from benchmarks.harness import machine
from paraboloid.jobs.studies.tomography import Plan, cells_of, scores
from paraboloid.jobs.studies.tomography.reading import SHORT, cells
from paraboloid.problems.pictures import draw_characters
from paraboloid.tomography import ParallelBeam

NAME = "tomography-quality"


def rounded(row: Any) -> Any:
    """The same with numbers of six digits."""
    if isinstance(row, dict):
        return {key: rounded(value) for key, value in row.items()}
    return float(f"{row:.6g}") if isinstance(row, float) else row


def against(rows: list[dict[str, Any]], cell: dict[str, Any]) -> tuple[float, float]:
    """The posterior mean's PSNR less the better of the rivals' means, and the standard error over images."""
    mine = [r for r in rows if (r["noise"], r["angles"]) == (cell["noise"], cell["angles"])]
    best = max(("tv", "network"), key=lambda rival: cell[rival])
    gains = [r["posterior"]["psnr"] - r[best] for r in mine]
    return mean(gains), stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")


def carried(rows: list[dict[str, Any]], cell: dict[str, Any]) -> float:
    """The mean density of the published protocol's one variance."""
    mine = [r for r in rows if (r["noise"], r["angles"]) == (cell["noise"], cell["angles"])]
    share = scores.carried(ParallelBeam(Plan().size, cell["angles"]), 1.0)
    return mean([scores.isotropic(r["posterior"]["mse"], [share * r["true_noise_variance"]]) for r in mine])


def table(rows: list[dict[str, Any]]) -> list[str]:
    found = cells({"cells": rows})
    images = len({row["image"] for row in rows})
    about = (f"{images} images. PSNR in dB, its gain over the better rival with the standard error over images; "
             "densities of the true image in nats per pixel, under one variance too: the best, that of the other "
             "images, and the published protocol's (the noise's times the mean diagonal of (A^T A)^+ of rank 100); "
             "intervals' coverage in per cent.")  # fmt: skip
    head = ("| angles, noise | posterior mean | network | total variation | gain | density | in 4 x 4 patches | best "
            "one variance | of the other images | the noise's | MC dropout | 50 % | 90 % | correlation | noise ratio "
            "|")  # fmt: skip
    lines = [", ".join(f"{k} {v}" for k, v in machine().items()), "", about, "", head, "|" + "---|" * 15]
    for c in found:
        gain, error = against(rows, c)
        psnr = " | ".join(f"{c[key]:.2f}" for key in ("posterior", "network", "tv"))
        dense = [f"{c[key]:.2f}" for key in ("density", "patches", "best isotropic", "isotropic", "dropout")]
        dense = " | ".join([*dense[:4], f"{carried(rows, c):.2f}", *dense[4:]])
        sure = f"{100 * c['50']:.0f} | {100 * c['90']:.0f} | {c['correlation']:.2f} | {c['noise ratio']:.2f}"
        lines.append(f"| {c['angles']}, {c['noise']:.0%} | {psnr} | {gain:+.2f} ± {error:.2f} | {dense} | {sure} |")
    nearer = sum(c["posterior"] >= max(c["tv"], c["network"]) - SHORT for c in found)
    denser = sum(c["density"] > max(c["best isotropic"], c["isotropic"], c["dropout"]) for c in found)
    seconds = mean([row["network_seconds"] + row["posterior_seconds"] for row in rows])
    said = (f"No worse in PSNR than both rivals (by {SHORT} dB) in {nearer} of {len(found)} cells, denser than all in "
            f"{denser}. Network and posterior together took {seconds:.1f} s a cell (of a busy machine).")  # fmt: skip
    lines += ["", said]
    return lines


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / f"{NAME}.md").write_text("\n".join(table(rows)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, plan = options.out / f"{NAME}.jsonl", Plan()
    rows = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    done = {row["image"] for row in rows}
    for i, truth in enumerate(torch.from_numpy(draw_characters(50, options.seed))[: options.images]):
        if i not in done:
            rows += [rounded({"image": i, **row}) for row in cells_of(truth, plan, 1000 * (options.seed + i))]
            record.write_text("".join(json.dumps(row) + "\n" for row in rows))
            _write(options.out, rows)
    _write(options.out, rows)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
