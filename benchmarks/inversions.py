"""python -m benchmarks.inversions: what a step costs that renews the inverses of KFAC's factors, and what one without.

Each network trains from its initialisation with the optimiser as it comes, which inverts in steps 0, 1, 2, 4 and 8 of
the first twelve; every step is divided by gradients taken right before and after it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import machine, seconds
from paraboloid.optim.curvature import due

STEPS, LATE = 12, 100  # steps taken; the interval of inversions
Problem = tuple[nn.Module, Tensor, Tensor]


class Encoder(nn.Module):
    """Embedded tokens through a stock encoder; the first of them is read."""

    def __init__(self, embed: nn.Module, tokens: int, d: int, heads: int, layers: int, classes: int, first: bool):
        super().__init__()
        layer = nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, "gelu", batch_first=True, norm_first=first)
        self.embed, self.positions = embed, nn.Parameter(0.02 * torch.randn(1, tokens, d))
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x) + self.positions)[:, 0])


def vit() -> Problem:
    """Six layers of width 192 on 64 patches of 8 x 8 pixels, 16 images."""
    torch.manual_seed(0)
    patches = nn.Sequential(nn.Conv2d(3, 192, 8, 8), nn.Flatten(2), Transposed())
    return Encoder(patches, 64, 192, 3, 6, 100, True), torch.rand(16, 3, 64, 64), torch.randint(100, (16,))


def bert() -> Problem:
    """Two layers of BERT-base's width 768 on 8 sentences of 64 tokens."""
    torch.manual_seed(0)
    x = torch.randint(2000, (8, 64))
    return Encoder(nn.Embedding(2000, 768), 64, 768, 12, 2, 2, False), x, torch.randint(2, (8,))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "ResNet-18, 16 of 3x64x64": lambda: nets.make("resnet18", 16),
    "ViT, d 192, 6 layers, 16 of 3x64x64": vit,
    "BERT's width 768, 2 layers, 8 x 64 tokens": bert,
}


def measure(title: str) -> dict[str, float]:
    model, x, y = PROBLEMS[title]()
    loss_fn, beside = nn.CrossEntropyLoss(), copy.deepcopy(model)
    opt, others = pb.optim.KFAC(model, loss_fn), list(beside.parameters())

    def gradient() -> object:
        return torch.autograd.grad(loss_fn(beside(x), y), others)

    def step() -> None:
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()

    gradient()
    times = []
    for _ in range(STEPS):
        before, own, after = seconds(gradient), seconds(step), seconds(gradient)
        times.append(2 * own / (before + after))
    with_inverse = [r for t, r in enumerate(times) if due(t, LATE)]
    without = [r for t, r in enumerate(times) if not due(t, LATE)]
    return {"with": statistics.median(with_inverse), "most": max(with_inverse), "without": statistics.median(without),
            "mean": statistics.fmean(times)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {title: measure(title) for title in args.problems}
    lines = ["KFAC's first twelve steps in gradients: those that invert (median and largest), the others, and all.", ""]
    lines += ["| | inverting | largest | without | mean |", "|---|---|---|---|---|"]
    lines += [
        f"| {k} | {r['with']:.1f} | {r['most']:.1f} | {r['without']:.1f} | {r['mean']:.1f} |" for k, r in found.items()
    ]
    text = "\n".join(lines) + "\n"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "inversions.md").write_text(text)
    (args.out / "inversions.json").write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
