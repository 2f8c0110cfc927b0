"""Problems that are none of the built-in ones: batch norm, a language model, adapters of a frozen transformer."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import paraboloid as pb
from benchmarks.nets import Basic
from paraboloid.passes.random_state import seeded

WORDS, LENGTH = 1000, 32


def resnet8(seed: int) -> pb.Problem:
    """A ResNet-8 with batch norm, 16 channels at first, on textured shapes."""
    shapes = pb.problems.load("shapes-cnn", seed=seed, samples=320, width=0.25)
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Basic(16, 16, 1), Basic(16, 32, 2),
            Basic(32, 64, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip
    return pb.Problem(model, nn.CrossEntropyLoss(), shapes.train, shapes.test, name="resnet8")


class GPT(nn.Module):
    """Tokens [N, T] to the next ones' logits [N, C, T]: two causal layers, d 64, the embedding tied to the head."""

    def __init__(self, d: int = 64, heads: int = 4, layers: int = 2):
        super().__init__()
        self.embedding, self.position = nn.Embedding(WORDS, d), nn.Embedding(LENGTH, d)
        layer = nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, WORDS, bias=False)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 * 2.5)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.triu(torch.full((LENGTH, LENGTH), float("-inf")), 1), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(h, mask=self.mask))).transpose(1, 2)


def gpt(seed: int) -> pb.Problem:
    """A GPT of 1,000 words on text of a Markov chain: each word has 8 successors, drawn by Zipf's law."""
    g = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, WORDS + 1).float()
    successors = torch.multinomial(frequency.expand(WORDS, -1), 8, generator=g)  # [words, 8]
    choice = torch.multinomial(1 / torch.arange(1, 9).float().expand(320, -1), LENGTH, replacement=True, generator=g)
    words = [torch.multinomial(frequency, 320, replacement=True, generator=g)]
    for t in range(LENGTH):
        words.append(successors[words[-1], choice[:, t]])
    text = torch.stack(words, 1)
    with seeded(seed):
        model = GPT()
    data = TensorDataset(text[:, :-1], text[:, 1:])
    return pb.Problem(model, nn.CrossEntropyLoss(), data, data, name="gpt")


class Adapted(nn.Module):
    """A frozen linear layer plus a product of two thin ones, the second zero at first."""

    def __init__(self, frozen: nn.Linear, rank: int = 4):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down, self.up = (
            nn.Linear(frozen.in_features, rank, bias=False),
            nn.Linear(rank, frozen.out_features, False),
        )
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


class Feed(nn.Module):
    """A transformer block whose projections are layers of their own, so that they may be adapted."""

    def __init__(self, d: int = 64, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.widen, self.narrow = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, 2))
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.narrow(torch.relu(self.widen(self.second(x))))


class Encoder(nn.Module):
    """Tokens [N, 1 + T] to logits [N, C, T] of the symbols."""

    def __init__(self, d: int = 64):
        super().__init__()
        self.embedding, self.position = nn.Embedding(18, d), nn.Embedding(16, d)
        self.blocks, self.head = nn.Sequential(Feed(d), Feed(d)), nn.Linear(d, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.blocks(h)[:, 1:]).transpose(1, 2)


@lru_cache(maxsize=1)
def _base(seed: int) -> dict[str, Tensor]:
    """A transformer trained for a while to copy sequences."""
    data = pb.problems.load("sequence-transformer", seed=seed, samples=640).train
    x, _ = data.tensors  # pyright: ignore[reportAttributeAccessIssue]
    with seeded(seed):
        model = Encoder()
        opt = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(4):
            for rows in torch.randperm(len(x)).split(32):
                loss = nn.functional.cross_entropy(model(x[rows]), x[rows, 1:])
                opt.zero_grad()
                loss.backward()
                opt.step()
    return model.state_dict()


def lora(seed: int) -> pb.Problem:
    """Adapters of rank 4 on every projection of a frozen transformer, which learnt to copy and is to sort too."""
    sequences = pb.problems.load("sequence-transformer", seed=seed, samples=320)
    with seeded(seed):
        model = Encoder()
        model.load_state_dict(_base(seed))
        model.requires_grad_(False)
        for block in model.blocks:
            for name in ("qkv", "out", "widen", "narrow"):
                setattr(block, name, Adapted(getattr(block, name)))
    return pb.Problem(model, sequences.loss_fn, sequences.train, sequences.test, name="lora")
