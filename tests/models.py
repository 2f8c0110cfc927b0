"""One table of models that every floor is tested on: name -> (build, draw inputs, output shape of one sample)."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations


class Residual(nn.Module):
    """A residual CNN: grouped and strided convolutions, GroupNorm, an in-place activation, padding="same"."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding="same", padding_mode="reflect")
        self.norm = nn.GroupNorm(2, 4)
        self.conv = nn.Conv2d(4, 4, (3, 2), padding="same", groups=2, dilation=(1, 2))
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu_(self.norm(self.stem(x)))
        x = x + F.relu(self.conv(x), inplace=True)
        return self.head(self.down(x).mean((2, 3)))


class GPT(nn.Module):
    """Tied token embedding and decoder, learned positions, fused causal attention, pre-norm."""

    def __init__(self, vocabulary=6, dim=4, heads=2, length=3):
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.shape[1]))
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.decode(self.norm3(x)).transpose(1, 2)  # [N, vocabulary, T], as CrossEntropyLoss wants

    def decode(self, x):
        return F.linear(x, self.tokens.weight)


class ClassToken(nn.Module):
    """A stock transformer layer on patches behind an expanded class token; scale and shift parameters."""

    def __init__(self, dim=4):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.layer = nn.TransformerEncoderLayer(dim, 2, 6, dropout=0.0, batch_first=True)
        self.scale, self.shift = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.layer(x)[:, 0] * self.scale + self.shift)


class SequenceFirst(nn.Module):
    """The attention's own [T, N, D] layout, with separate keys and values."""

    def __init__(self, dim=4):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(dim, 2, kdim=3, vdim=2), nn.Linear(dim, 3)

    def forward(self, q, k, v):
        z, _ = self.inner(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), need_weights=False)
        return self.head(z).mean(0)


class Shared(nn.Module):
    """A module called twice, a weight used transposed, a slice of a weight, a weight cast to its own type."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = torch.tanh(self.inner(torch.tanh(self.inner(x))))
        x = torch.tanh(self.outer(x)) @ self.outer.weight + x @ self.inner.weight.t()
        return F.linear(x, self.outer.weight[:3].double())


class Flattened(nn.Module):
    """Layers that see [N T, D], as Hugging Face's Conv1D does, with addmm."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x):
        z = torch.addmm(self.bias, x.flatten(0, 1), self.weight)
        return self.head(self.norm(torch.tanh(z))).view(*x.shape[:2], -1).mean(1)


class Frozen(nn.Module):
    """A low-rank adapter on a frozen layer: the trained weight is a product of two parameters."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 3)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return self.base(x) + F.linear(x, self.b @ self.a)


def normed(build):
    """Batch norm in eval mode, with running statistics that are not the default."""

    def make():
        model = build()
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.uniform_(-1, 1), m.running_var.uniform_(0.5, 2)
        return model.eval()

    return make


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def conv1d():
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=2, padding_mode="circular", groups=2), nn.BatchNorm1d(4), nn.ReLU(True),
        nn.Conv1d(4, 3, 2, padding="same", padding_mode="replicate"), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
    )  # fmt: skip


def conv3d():
    return nn.Sequential(
        nn.Conv3d(1, 2, (1, 2, 2), padding=(0, 1, 1), dilation=(1, 1, 2), bias=False), nn.BatchNorm3d(2), nn.Sigmoid(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def initialised(build, x):
    def make():
        model = build()
        model(x)
        return model

    return make


def reparametrised():
    first = parametrizations.weight_norm(nn.Linear(4, 5))
    second = parametrizations.spectral_norm(nn.Linear(5, 3))
    return nn.Sequential(first, nn.Tanh(), second).eval()


def dense(*shape):
    return lambda n: torch.randn(n, *shape)


MODELS = {
    "mlp": (mlp, dense(4), (3,)),
    "sequence mlp": (mlp, dense(2, 4), (2, 3)),
    "residual cnn": (Residual, dense(2, 5, 4), (3,)),
    "conv1d": (normed(conv1d), dense(2, 6), (3,)),
    "conv3d": (normed(initialised(conv3d, torch.zeros(2, 1, 2, 3, 3))), dense(1, 2, 3, 3), (3,)),
    "gpt": (GPT, lambda n: torch.randint(6, (n, 3)), (6, 3)),
    "class token": (ClassToken, dense(1, 4, 4), (3,)),
    "transformer layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True, norm_first=True), nn.Linear(4, 2)),
        dense(3, 4), (3, 2),
    ),
    "sequence first": (SequenceFirst, lambda n: (torch.randn(n, 3, 4), torch.randn(n, 3, 3), torch.randn(n, 3, 2)), (3,)),
    "shared": (Shared, dense(4), (3,)),
    "flattened": (Flattened, dense(3, 3), (2,)),
    "low rank": (Frozen, dense(4), (3,)),
    "reparametrised": (reparametrised, dense(4), (3,)),
}  # fmt: skip


def make(name, n=3, seed=0):
    """(model in float64, inputs), the same for the same seed."""
    build, draw, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().double()
        inputs = draw(n)
    cast = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return model, tuple(map(cast, inputs)) if isinstance(inputs, tuple) else cast(inputs)
