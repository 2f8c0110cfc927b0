"""What a tolerance buys where there are many classes: exact curvature of trained networks, with and without.

`python -m benchmarks.tolerance`: trains All-CNN-C on 100 classes and an MLP on 1,000 (a prototype of each class, with
noise), times diag_ggn and kflr exactly and at several tolerances, interleaved, and says what was left out: in output
space (`left_out`, certified) and of the trace of diag_ggn, over all parameters and in the worst one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import paraboloid as pb
from benchmarks.harness import seconds
from benchmarks.nets import all_cnn_c

TOLERANCES = (0.1, 1e-2, 1e-3)
ROUNDS = 3


def data(classes: int, shape: tuple[int, ...], samples: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Prototypes of every class with noise on top; neighbours are confusable."""
    generator = torch.Generator().manual_seed(0)
    coarse = [s if i == 0 else max(s // 4, 1) for i, s in enumerate(shape)] if len(shape) == 3 else list(shape)
    prototypes = torch.randn(classes, *coarse, generator=generator)
    if len(shape) == 3:
        prototypes = nn.functional.interpolate(prototypes, size=shape[1:], mode="bilinear")
    y = torch.randint(classes, (samples,), generator=generator)
    return prototypes[y] + noise * torch.randn(samples, *shape, generator=generator), y


def trained(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, batch: int, lr: float) -> float:
    """Adam; the part of a held-back batch of training data that is classified rightly."""
    opt, generator = torch.optim.Adam(model.parameters(), lr), torch.Generator().manual_seed(1)
    for step in range(steps):
        at = torch.randint(len(x), (batch,), generator=generator)
        for group in opt.param_groups:
            group["lr"] = lr * (1 - step / steps)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x[at]), y[at]).backward()
        opt.step()
    with torch.no_grad():
        return (model(x[:256]).argmax(1) == y[:256]).float().mean().item()


def rows(name: str, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], quantity: str) -> list[str]:
    loss = nn.CrossEntropyLoss()
    run = {tol: lambda tol=tol: pb.statistics(model, loss, batch, [quantity], tol=tol) for tol in (0.0, *TOLERANCES)}
    times: dict[float, list[float]] = {tol: [] for tol in run}
    for _ in range(ROUNDS):
        for tol, call in run.items():
            times[tol].append(seconds(call))
    ratios = {tol: sorted(e / t for e, t in zip(times[0.0], times[tol], strict=True))[ROUNDS // 2] for tol in run}
    exact = run[0.0]()[quantity]
    columns = pb.Loss.from_torch(loss)
    found = []
    for tol in TOLERANCES:
        stats = run[tol]()
        root = columns.leading_root(stats.output, batch[1], tol)
        assert root.own is not None
        count = f"{root.count} / {root.own.counts.double().mean():.0f}"
        left = {k: 1 - _trace(v) / _trace(exact[k]) for k, v in stats[quantity].items()}
        whole = 1 - sum(map(_trace, stats[quantity].values())) / sum(map(_trace, exact.values()))
        found.append(f"| {name} | {quantity} | {tol:g} | {count} | {stats.left_out[quantity]:.2e} | {whole:.2e} | "
                     f"{max(left.values()):.2e} | {ratios[tol]:.1f} |")  # fmt: skip
    return found


def _trace(value) -> float:
    return float(value.sum() if isinstance(value, torch.Tensor) else value.left.trace() * value.right.trace())


def main(out: Path) -> None:
    torch.manual_seed(0)
    lines = [
        "# A tolerance for many classes",
        "",
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; the exact quantity and the tolerances",
        f"interleaved in one process, medians of {ROUNDS}. `left_out` is certified in output space; beside it what",
        "was left out of the trace, over all parameters and in the parameter where it is most. Vectors: where each",
        "sample takes as many as the others / its own number, on average.",
        "",
        "| network | quantity | tol | vectors | left_out | of the trace | worst parameter | times faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cases = [
        ("All-CNN-C, 100 classes, batch 8", all_cnn_c(), data(100, (3, 32, 32), 4000, 0.7), (400, 32, 1e-3), 8),
        ("MLP 256-512-512-1000, batch 64", nn.Sequential(
            nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1000)
        ), data(1000, (256,), 30_000, 1.0), (2000, 128, 2e-3), 64),
    ]  # fmt: skip
    for name, model, (x, y), (steps, batch, lr), size in cases:
        right = trained(model, x, y, steps, batch, lr)
        print(f"{name}: {right:.3f} of the training data right", file=sys.stderr)
        for quantity in ("diag_ggn", "kflr"):
            lines += rows(f"{name} ({100 * right:.0f}% right)", model, (x[:size], y[:size]), quantity)
        print("\n".join(lines[-6:]), file=sys.stderr)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "tolerance.md")
