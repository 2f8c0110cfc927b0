"""Random networks that hypothesis draws: images and sequences, with what the engine must take apart."""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

ACTIVATIONS = st.sampled_from(
    [nn.ReLU, lambda: nn.ReLU(inplace=True), nn.Tanh, nn.GELU, lambda: nn.LeakyReLU(0.3), nn.Identity]
)


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Transposed(nn.Module):
    """The weight used forwards and backwards."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dim) / 2)

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class Recurrent(nn.Module):
    """The outputs of a recurrent layer, both directions added."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        z, _ = self.inner(x)
        return sum(z.chunk(2, -1)) if self.inner.bidirectional else z


class Crossing(nn.Module):
    """Attention of a learned query, or of a layer's output, over the sequence."""

    def __init__(self, dim, learned, **options):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, dim)) if learned else nn.Linear(dim, dim)
        self.inner = nn.MultiheadAttention(dim, 2, batch_first=True, **options)

    def forward(self, x):
        q = self.query(x) if isinstance(self.query, nn.Module) else self.query.expand(len(x), -1, -1)
        return x + self.inner(q, x, x, need_weights=False)[0].mean(1, keepdim=True)


class Squared(nn.Module):
    """A bilinear form of the input with itself."""

    def __init__(self, dim):
        super().__init__()
        self.form = nn.Bilinear(dim, dim, dim)

    def forward(self, x):
        return self.form(x, torch.tanh(x))


class Shifted(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return self.scale * x + self.shift


@st.composite
def images(draw):
    """A convolutional trunk on [N C H W] and a linear head."""
    channels = draw(st.sampled_from([2, 4]))
    size, layers = draw(st.integers(3, 5)), []
    x = torch.zeros(1, channels, size, size)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "transposed", "norm", "residual", "shift", "slope", "pool"]))
        if kind == "conv":
            groups, out = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4]))
            same, kernel, dilation = draw(st.booleans()), draw(st.integers(1, 3)), draw(st.integers(1, 2))
            if same and kernel == 2:  # torch warns of a copy where the total padding is odd
                dilation = 2
            layer = nn.Conv2d(
                x.shape[1], out, kernel, stride=1 if same else draw(st.integers(1, 2)), dilation=dilation, groups=groups,
                padding="same" if same else dilation * (kernel - 1), bias=draw(st.booleans()),
                padding_mode=draw(st.sampled_from(["zeros", "circular" if not same else "zeros", "replicate"])),
            )  # fmt: skip
        elif kind == "transposed":
            groups, stride, dilation = draw(st.sampled_from([1, 2])), draw(st.integers(1, 2)), draw(st.integers(1, 2))
            layer = nn.ConvTranspose2d(
                x.shape[1], 2, draw(st.integers(1, 3)), stride, dilation=dilation, padding=draw(st.integers(0, x.shape[2] // 3)),
                output_padding=draw(st.integers(0, max(stride, dilation) - 1)), groups=groups, bias=draw(st.booleans()),
            )  # fmt: skip
        elif kind == "norm":
            norms = [
                nn.GroupNorm(2 if x.shape[2] > 1 else 1, x.shape[1]), nn.BatchNorm2d(x.shape[1]), nn.LayerNorm(x.shape[1:]),
                nn.InstanceNorm2d(x.shape[1], affine=True, track_running_stats=draw(st.booleans()) or x.shape[2] == 1),
            ]  # fmt: skip
            layer = draw(st.sampled_from(norms))
        elif kind == "slope":
            layer = nn.PReLU(draw(st.sampled_from([1, x.shape[1]])))
        elif kind == "residual":
            layer = Residual(nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1))
        elif kind == "shift":
            layer = Shifted((x.shape[1], 1, 1))
        else:
            layer = nn.MaxPool2d(2, ceil_mode=True)
        layers += [layer, draw(ACTIVATIONS)()]
        if (
            kind == "conv"
            and layer.padding_mode == "circular"
            and layer._reversed_padding_repeated_twice[0] > x.shape[2]
        ):
            layers = layers[:-2]  # torch pads at most once around
        x = nn.Sequential(*layers).eval()(torch.zeros(1, channels, size, size))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(x.numel(), 3)), (channels, size, size)


@st.composite
def sequences(draw):
    """Layers on [N T D], and a head per position or pooled."""
    dim, length, layers = 4, draw(st.integers(1, 3)), []
    for _ in range(draw(st.integers(1, 3))):
        kinds = [
            "linear",
            "norm",
            "residual",
            "twice",
            "attention",
            "transposed",
            "shift",
            "conv",
            "recurrent",
            "cross",
        ]
        kind = draw(st.sampled_from([*kinds, "form"]))
        layers.append(
            {
                "linear": lambda: nn.Linear(dim, dim, bias=draw(st.booleans())),
                "norm": lambda: draw(st.sampled_from([nn.LayerNorm, nn.RMSNorm]))(dim),
                "recurrent": lambda: Recurrent(
                    draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))(
                        dim,
                        dim,
                        draw(st.integers(1, 2)),
                        bias=draw(st.booleans()),
                        batch_first=True,
                        bidirectional=draw(st.booleans()),
                    )
                ),
                "cross": lambda: Crossing(
                    dim, draw(st.booleans()), add_bias_kv=draw(st.booleans()), bias=draw(st.booleans())
                ),
                "form": lambda: Squared(dim),
                "residual": lambda: Residual(nn.Sequential(nn.Linear(dim, 3), draw(ACTIVATIONS)(), nn.Linear(3, dim))),
                "twice": lambda: Twice(nn.Linear(dim, dim)),
                "attention": lambda: nn.TransformerEncoderLayer(
                    dim, 2, 3, 0.0, batch_first=draw(st.booleans()) or length == 1, norm_first=draw(st.booleans())
                ),
                "transposed": lambda: Transposed(dim),
                "shift": lambda: Shifted((dim,)),
                "conv": lambda: nn.Sequential(
                    nn.Unflatten(1, (length, 1)), nn.Flatten(1, 2), nn.Conv1d(length, length, 1)
                ),
            }[kind]()
        )
        layers.append(draw(ACTIVATIONS)())
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(length * dim, 3)), (length, dim)


def mixes(model):
    """A sequence-first attention layer fed batch-first attends over the batch."""
    return any(isinstance(m, nn.MultiheadAttention) and not m.batch_first for m in model.modules())
