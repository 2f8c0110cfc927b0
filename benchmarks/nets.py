"""The networks that the tables of the field are made on."""

from __future__ import annotations

import itertools

import torch
from torch import nn


def mlp() -> nn.Module:
    """784-500-300-10."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 300), nn.ReLU(), nn.Linear(300, 10)
    )


def sigmoid_mlp() -> nn.Module:
    """784-500-300-10 with sigmoids, whose Hessian is not the GGN plus nothing."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 500), nn.Sigmoid(), nn.Linear(500, 300), nn.Sigmoid(), nn.Linear(300, 10)
    )


def net_3c3d() -> nn.Module:
    """Three convolutions and three dense layers, 895,210 parameters (DeepOBS)."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 96, 3), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(96, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def all_cnn_c() -> nn.Module:
    """All-CNN-C with 100 classes (Springenberg et al. 2015)."""
    layers: list[nn.Module] = []
    for i, (c, d, k, s, p) in enumerate(
        [
            (3, 96, 3, 1, 1), (96, 96, 3, 1, 1), (96, 96, 3, 2, 1), (96, 192, 3, 1, 1), (192, 192, 3, 1, 1),
            (192, 192, 3, 2, 1), (192, 192, 3, 1, 0), (192, 192, 1, 1, 0), (192, 100, 1, 1, 0),
        ]
    ):  # fmt: skip
        layers += [nn.Conv2d(c, d, k, s, p), nn.ReLU()] if i < 8 else [nn.Conv2d(c, d, k, s, p)]
    return nn.Sequential(*layers, nn.AvgPool2d(6), nn.Flatten())


class Transformer(nn.Module):
    """Two stock encoder layers, d 64, 4 heads, on sequences of 32; mean pooling and a head for 10 classes."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Basic(nn.Module):
    """ResNet's block of two convolutions."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )  # fmt: skip

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 with the stem for large images and 100 classes (He et al. 2016)."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [64, 64, 128, 256, 512]
    blocks = []
    for i, (channels, out) in enumerate(itertools.pairwise(widths)):
        blocks += [Basic(channels, out, 1 if i == 0 else 2), Basic(out, out, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))


NETS = {
    "mlp": (mlp, (1, 28, 28), 10),
    "sigmoid mlp": (sigmoid_mlp, (1, 28, 28), 10),
    "3c3d": (net_3c3d, (3, 32, 32), 10),
    "allcnnc": (all_cnn_c, (3, 32, 32), 100),
    "transformer": (Transformer, (32, 64), 10),
    "resnet18": (resnet18, (3, 64, 64), 100),
}


def make(name: str, batch: int, seed: int = 0) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(model, inputs, class targets)."""
    build, shape, classes = NETS[name]
    torch.manual_seed(seed)
    model = build()
    return model, torch.rand(batch, *shape), torch.randint(classes, (batch,))
