"""One table of models that every floor is tested on: name -> (build, draw inputs, output shape of one sample)."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


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


class ViT(nn.Module):
    """A vision transformer: patches, class token, positions, pre-norm blocks with a scale for each layer, attention pooling."""

    def __init__(self, dim=4):
        super().__init__()
        self.patch, self.token = nn.Conv2d(1, dim, 2, stride=2), nn.Parameter(torch.randn(1, 1, dim))
        self.positions, self.query = nn.Parameter(torch.randn(1, 5, dim)), nn.Parameter(torch.randn(1, 1, dim))
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.RMSNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.up, self.down, self.gamma = nn.Linear(dim, 5), nn.Linear(5, dim), nn.Parameter(torch.randn(dim))
        self.pool, self.head = nn.MultiheadAttention(dim, 1, batch_first=True), nn.Linear(dim, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions[:, : x.shape[1] + 1]
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.gamma * self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm3(x)
        return self.head(self.pool(self.query.expand(len(x), -1, -1), x, x)[0][:, 0])


class ResNet(nn.Module):
    """Two residual blocks with batch norm, the second with stride and a projection; activations in place."""

    def __init__(self):
        super().__init__()
        conv = lambda i, o, k, s=1: nn.Conv2d(i, o, k, s, k // 2, bias=False)  # noqa: E731
        self.stem = nn.Sequential(conv(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(True))
        self.one = nn.Sequential(conv(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(True), conv(2, 2, 3), nn.BatchNorm2d(2))
        self.two = nn.Sequential(conv(2, 3, 3, 2), nn.BatchNorm2d(3), nn.ReLU(True), conv(3, 3, 3), nn.BatchNorm2d(3))
        self.skip = nn.Sequential(conv(2, 3, 1, 2), nn.BatchNorm2d(3))
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu_(x + self.one(x))
        x = F.relu_(self.two(x) + self.skip(x))
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, a skip by concatenation; one output for every pixel."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2, affine=True)
        self.bottom, self.slope = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.PReLU(3)
        self.up, self.last = nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = F.silu(self.norm(self.down(x)))
        return self.last(torch.cat([x, self.up(self.slope(self.bottom(x)))], 1))


class EncoderDecoder(nn.Module):
    """torch's own Transformer: self-, causal and cross-attention, tokens in and out, the table tied to the decoder."""

    def __init__(self, vocabulary=4, dim=4):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Parameter(torch.randn(2, dim))
        self.inner = nn.Transformer(dim, 2, 1, 1, 5, dropout=0.0, batch_first=True)
        self.decoder = nn.Linear(dim, vocabulary)
        self.decoder.weight = self.tokens.weight

    def forward(self, source, target):
        x, y = self.tokens(source), self.tokens(target) + self.positions
        mask = torch.triu(torch.full((2, 2), float("-inf"), dtype=x.dtype), 1)
        return self.decoder(self.inner(x, y, tgt_mask=mask)).transpose(1, 2)


class Detector(nn.Module):
    """Learned queries that attend to each other and to an encoded image; one label for each query."""

    def __init__(self):
        super().__init__()
        self.back, self.query = nn.Conv2d(1, 4, 2, 2), nn.Embedding(2, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 5, 0.0)
        self.decoder, self.head = nn.TransformerDecoderLayer(4, 2, 5, 0.0), nn.Linear(4, 3)

    def forward(self, x):
        memory = self.encoder(self.back(x).flatten(2).permute(2, 0, 1))
        query = self.query.weight.unsqueeze(1).repeat(1, len(x), 1)
        return self.head(self.decoder(torch.zeros_like(query) + query, memory)).permute(1, 2, 0)


class Tagger(nn.Module):
    """A bidirectional LSTM on bags of character features and words, a GRU on top; one label for every word."""

    def __init__(self):
        super().__init__()
        self.words, self.letters = nn.Embedding(5, 3), nn.EmbeddingBag(4, 2)
        self.lstm = nn.LSTM(5, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, words, letters):
        bags = self.letters(letters.flatten(0, 1)).view(*words.shape, -1)
        x, _ = self.lstm(torch.cat([self.words(words), bags], 2))
        return self.head(self.gru(x)[0]).transpose(1, 2)


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


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


def old_style():
    """Weight and spectral norm by hooks, as before parametrizations; a pruned layer; a symmetric and an orthogonal one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # weight_norm is deprecated, and still in use
        first = nn.utils.weight_norm(nn.Linear(4, 4))
    second = nn.utils.spectral_norm(nn.Linear(4, 4, bias=False))
    third = prune.random_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    fourth = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric())
    fifth = parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley")
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third, nn.Tanh(), fourth, nn.Tanh(), fifth).eval()


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
    "old style": (old_style, dense(4), (3,)),
    "vit": (ViT, dense(1, 4, 4), (3,)),
    "resnet": (normed(ResNet), dense(1, 5, 5), (3,)),
    "unet": (UNet, dense(1, 4, 2), (2, 4, 2)),
    "encoder decoder": (
        EncoderDecoder, lambda n: (torch.randint(4, (n, 3)), torch.randint(4, (n, 2))), (4, 2)
    ),
    "detector": (Detector, dense(1, 4, 4), (3, 2)),
    "tagger": (Tagger, lambda n: (torch.randint(5, (n, 3)), torch.randint(4, (n, 3, 2))), (2, 3)),
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
