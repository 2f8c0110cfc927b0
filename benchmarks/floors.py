"""python -m benchmarks.floors: what each quantity must cost at least, from the bare pieces that it cannot do without.

The pieces, each timed alone and next to a gradient: the plain forward pass F; one backward pass P to the layers'
outputs, without the parameters' gradients; the products M that turn it into these; the Kronecker factors' products,
half of them by symmetry (A of the inputs, B of the gradients, inputs already unfolded); and W, writing all individual
gradients into memory.  With C columns of the root of the loss's Hessian:

    square_norms    F + P                       diag_ggn, positions    F + C (P + M)
    second_moment   F + P + M                   diag_ggn, none         F + C P + M
    variance        F + P + M, 2 M where T = 1  kfac                   F + P + A + B
    sample_grads    F + P + W, + M for images   kflr                   F + C (P + B) + A

A sum of pieces is a floor of the method (vectors pulled back one by one by autograd), not of all methods.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import machine, seconds
from paraboloid.passes.memory import pooled
from paraboloid.reductions.kronecker_factors import gram

SETTINGS = [("mlp", 128), ("3c3d", 64), ("allcnnc", 8), ("transformer", 32)]


def pieces(net: str, batch: int) -> dict[str, Callable[[], object]]:
    model, x, y = nets.make(net, batch)
    loss_fn, parameters = nn.CrossEntropyLoss(), list(model.parameters())
    with pb.record(model) as tape:
        f = model(x)
    v = torch.randn_like(f)
    uses = [o for found in tape.pull(f, v[None]).values() for o in found if o.right is not None]
    edges = [call.edge for call in tape.plan(f).calls]
    plain = model(x)
    with torch.no_grad():
        inputs = [o.columns().contiguous() for o in uses]
        lefts = [o.left.permute(2, 0, 1, 3, 4).flatten(1, 3).mT for o in uses]
    size = sum(p.numel() for p in parameters)

    def factors(rows: list[Tensor]) -> list[Tensor]:
        return [gram(R) for R in rows]

    return {
        "gradient": lambda: torch.autograd.grad(loss_fn(model(x), y), parameters),
        "F": lambda: model(x),
        "P": lambda: torch.autograd.grad(f, edges, v, retain_graph=True),
        "P + M": lambda: torch.autograd.grad(plain, parameters, v, retain_graph=True),
        "A": lambda: factors(inputs),
        "B": lambda: factors(lefts),
        "W": lambda: pooled((batch, size), x).fill_(1.0),
    }


def measured(net: str, batch: int, rounds: int) -> dict[str, float]:
    """Each piece in multiples of the gradient of the same round, medians."""
    runs = pieces(net, batch)
    for run in runs.values():
        seconds(run)
    ratios: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        base = seconds(runs["gradient"])
        for name, run in runs.items():
            ratios[name].append(seconds(run) / base)
    found = {name: statistics.median(values) for name, values in ratios.items()}
    found["M"] = max(0.0, found.pop("P + M") - found["P"])
    return found


def floors(net: str, t: dict[str, float]) -> dict[str, float]:
    C, F, P, M = {"allcnnc": 99}.get(net, 9), t["F"], t["P"], t["M"]
    flat = net == "mlp"  # every weight is used at one position
    return {
        "sample_grads": F + P + t["W"] + (0 if flat else M),
        "square_norms": F + P,
        "second_moment": F + P + M,
        "variance": F + P + (2 * M if flat else M),
        "diag_ggn": F + C * P + M if flat else F + C * (P + M),
        "kfac": F + P + t["A"] + t["B"],
        "kflr": F + C * (P + t["B"]) + t["A"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    record, lines = [], ["Floors of the method, in multiples of a gradient, one thread: see benchmarks/floors.py.", ""]
    for net, batch in SETTINGS:
        t = measured(net, batch, args.rounds)
        found = floors(net, t)
        record.append({"net": net, "batch": batch, "pieces": t, "floors": found})
        lines += [
            f"### {net}, batch {batch}",
            "",
            "Pieces: " + ", ".join(f"{k} {v:.2f}" for k, v in t.items()) + ".",
            "",
        ]
        lines += ["| " + " | ".join(found) + " |", "|" + "---|" * len(found)]
        lines += ["| " + " | ".join(f"{v:.2f}" for v in found.values()) + " |", ""]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "floors.md").write_text("\n".join(lines))
    (args.out / "floors.json").write_text(json.dumps({"machine": machine(), "rows": record}, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
