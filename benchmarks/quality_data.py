"""What `posterior_quality` trains and tests on: few or all digits, networks for them, and inputs unlike them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraboloid import problems
from paraboloid.passes.random_state import seeded
from paraboloid.problems.networks import Residual

FEW, ALL, HELD_OUT = 400, 1437, 100
TEST = {FEW: 300, ALL: 260}  # digits
EPOCHS, BATCH, CLASSES = 100, 50, 10
LETTERS = {  # 8 x 8, one row a number in base 16
    "A": "183C66667E666600", "E": "7E60607C60607E00", "F": "7E60607C60606000", "H": "6666667E66666600",
    "K": "666C7870786C6600", "M": "63777F6B63636300", "T": "7E18181818181800", "X": "66663C183C666600",
}  # fmt: skip
TURNS, SHIFTS, NOISES, BLURS = (15, 30, 60, 90), (1, 2, 4), (0.1, 0.2, 0.3, 0.5), (1, 2, 4)
Pair = tuple[Tensor, Tensor]
Loss = Callable[[Any, Tensor], Tensor]


def batchnorm() -> nn.Sequential:
    """digits-cnn with a normalisation after each convolution: 3,866 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, CLASSES),
    )  # fmt: skip


def resnet8() -> nn.Sequential:
    """ResNet-8 with half the channels, for one of grey: 19,762 parameters."""
    blocks = [Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2)]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, CLASSES),
    )  # fmt: skip


def network(net: str, seed: int) -> nn.Sequential:
    """Untrained, its layers one after the other."""
    made = {"digits-batchnorm": batchnorm, "digits-resnet8": resnet8}
    if net not in made:
        model = problems.load(net, seed=seed).model
        assert isinstance(model, nn.Sequential)
        return model
    with seeded(seed):
        return made[net]()


def trained(model: nn.Module, train: Pair, loss: Loss = F.cross_entropy) -> nn.Module:
    """The model after 100 epochs of Adam, in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(EPOCHS):
        for i in torch.randperm(len(train[1])).split(BATCH):
            optimizer.zero_grad()
            loss(model(train[0][i]), train[1][i]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def split(net: str, size: int, seed: int) -> tuple[Pair, Pair, Pair]:
    """Training, test and held-out digits, as the network takes them."""
    problem = problems.load("digits-mlp" if net == "digits-mlp" else "digits-cnn")
    pairs = zip(problem.train.tensors, problem.test.tensors, strict=True)  # type: ignore[attr-defined]
    x, y = (torch.cat(pair) for pair in pairs)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test_size = TEST.get(size, 300)
    parts = order[: size + test_size + HELD_OUT].split([size, test_size, HELD_OUT])
    train, test, held_out = ((x[i], y[i]) for i in parts)
    return train, test, held_out


def unlike(x: Tensor, seed: int) -> dict[str, Tensor]:
    """Inputs unlike the digits x: of no class (noise, letters), and the digits themselves, harder step by step."""
    generator = torch.Generator().manual_seed(seed)
    side = 16 if x.dim() == 4 else 8
    images, pixel = x.view(len(x), 1, side, side), 2 / 8  # of the coordinates -1 to 1

    def enlarged(t: Tensor) -> Tensor:
        return t if side == 8 else F.interpolate(t, size=(side, side), mode="bilinear")

    def moved(degrees: float = 0.0, across: float = 0.0) -> Tensor:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        move = torch.tensor([[[c, -s, across], [s, c, 0.0]]]).expand(len(x), 2, 3)
        grid = F.affine_grid(move, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def blurred(times: int) -> Tensor:
        found, box = images, torch.ones(1, 1, 3, 3) / 9
        for _ in range(times * (side // 8)):
            found = F.conv2d(found, box, padding=1)
        return found

    glyphs = torch.tensor([[[int(b) for b in f"{int(rows[2 * i : 2 * i + 2], 16):08b}"] for i in range(8)]
                           for rows in LETTERS.values()], dtype=x.dtype).unsqueeze(1)  # fmt: skip
    drawn = glyphs[torch.randint(len(glyphs), (len(x),), generator=generator)]
    drawn = drawn * (0.7 + 0.3 * torch.rand(len(x), 1, 8, 8, generator=generator))
    found = {"noise": enlarged(torch.rand(len(x), 1, 8, 8, generator=generator)), "letters": enlarged(drawn)}
    found |= {f"turned {angle}°": moved(angle) for angle in TURNS}
    found |= {f"shifted {by}": moved(across=by * pixel) for by in SHIFTS}
    for std in NOISES:
        found[f"noisy {std}"] = images + std * enlarged(torch.randn(len(x), 1, 8, 8, generator=generator))
    found |= {f"blurred {times}": blurred(times) for times in BLURS}
    return {name: t.reshape(x.shape) for name, t in found.items()}
