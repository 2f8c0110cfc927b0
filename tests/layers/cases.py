"""One table of layers and their options: name -> (build, draw inputs for n samples)."""

import torch
import torch.nn.functional as F
from torch import nn


class Around(nn.Module):
    """A layer inside a function of it and the inputs."""

    def __init__(self, layer, function, **parameters):
        super().__init__()
        self.layer, self.function = layer, function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


class Head(nn.Module):
    """The layer between two others, so that its input needs gradients and its output is mixed over positions."""

    def __init__(self, before, layer, width):
        super().__init__()
        self.before, self.layer = before, layer
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(torch.tanh(self.before(x)))).flatten(1))


def dense(*shape):
    return lambda n: torch.randn(n, *shape)


def ids(*shape, rows=6):
    return lambda n: torch.randint(rows, (n, *shape))


def around(function, layer=lambda: None, **parameters):
    return lambda: Around(layer(), function, **{k: torch.randn(shape) for k, shape in parameters.items()})


def ragged(lengths, last=False, weights=False):
    """(indices, offsets) of bags with the given lengths, over and over; and a weight for each entry."""

    def draw(n):
        sizes = torch.tensor([lengths[i % len(lengths)] for i in range(n)])
        total = int(sizes.sum())
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        found = torch.randint(6, (total,)), offsets if last else offsets[:-1]
        return (*found, torch.randn(total)) if weights else found

    return draw


def bag(layer, x, offsets=None, weights=None):
    return layer.layer(x, offsets, weights)


def recurrent(kind, *, initial=None, batch_first=False, read="output", **options):
    """A recurrent layer on [N T 3] inputs, with the initial state zero, drawn, or a parameter expanded to the batch."""
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    width = options.get("proj_size", 0) or 4

    def forward(m, x, *state):
        x = x if batch_first else x.transpose(0, 1)
        if initial == "learned":
            state = tuple(s.expand(-1, m.samples(x), -1).contiguous() for s in (m.h, m.c) if s is not None)
        elif state:
            state = tuple(s.transpose(0, 1) for s in state)
        z, last = m.layer(x, (state if kind is nn.LSTM else state[0]) if state else None)
        z = z if batch_first else z.transpose(0, 1)
        last = last if isinstance(last, tuple) else (last,)
        states = torch.cat([s.transpose(0, 1).flatten(1) for s in last], 1)
        return torch.cat([z.flatten(1), states], 1) if read == "both" else z if read == "output" else states

    def build():
        parameters = {}
        if initial == "learned":
            parameters = {"h": (rows, 1, width), "c": (rows, 1, 4)} if kind is nn.LSTM else {"h": (rows, 1, width)}
        model = around(forward, lambda: kind(3, 4, batch_first=batch_first, **options), **parameters)()
        model.samples = lambda x: x.shape[0 if batch_first else 1]
        if initial == "learned" and kind is not nn.LSTM:
            model.c = None
        return model.eval()

    def draw(n):
        x = torch.randn(n, 2, 3)
        if initial != "given":
            return x
        return (x, torch.randn(n, rows, width)) + ((torch.randn(n, rows, 4),) if kind is nn.LSTM else ())

    return build, draw


def cell(kind):
    """A recurrent cell in the user's own loop."""

    def forward(m, x):
        state = None
        for step in x.unbind(1):
            state = m.layer(step, state)
        return torch.cat(state, 1) if isinstance(state, tuple) else state

    return around(forward, lambda: kind(3, 4)), dense(2, 3)


def attention(cross=False, mask=None, weights=False, average=True, lengths=(2, 3), **options):
    """Multi-head attention on batch-first inputs, whatever its own layout."""
    widths = 4, options.get("kdim", 4) or 4, options.get("vdim", 4) or 4
    batch_first = options.get("batch_first", False)

    def forward(m, q, k=None, v=None, padding=None):
        k, v = (q if k is None else k), (q if k is None else k) if v is None else v
        if not batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        attn_mask = None
        if mask == "bool":
            attn_mask = torch.tensor([[False, True, False], [False, False, True]])[: q.shape[-2 if batch_first else 0]]
        elif mask == "float":
            attn_mask = torch.linspace(-1, 1, 6, dtype=q.dtype).view(2, 3)
        elif mask == "causal":
            attn_mask = torch.triu(torch.ones(2, 2, dtype=torch.bool), 1)
        z, w = m.layer(
            q, k, v, need_weights=weights, average_attn_weights=average, attn_mask=attn_mask, key_padding_mask=padding,
            is_causal=mask == "causal",
        )  # fmt: skip
        z = z if batch_first else z.transpose(0, 1)
        return torch.cat([z.flatten(1), w.flatten(1)], 1) if weights else z

    def draw(n):
        q = torch.randn(n, lengths[0], widths[0])
        if not cross:
            return q
        k = torch.randn(n, lengths[1], widths[1])
        found = (q, k) if cross == "pair" else (q, k, torch.randn(n, lengths[1], widths[2]))
        if mask != "padding":
            return found
        padding = torch.zeros(n, lengths[1], dtype=torch.bool)
        padding[0, -1] = True
        return (*found, padding)

    return around(forward, lambda: nn.MultiheadAttention(4, 2, **options).eval()), draw


def running(layer):
    """Running statistics that are not the default, in eval mode."""

    def make():
        model = layer()
        model.running_mean.uniform_(-1, 1), model.running_var.uniform_(0.5, 2)
        return model.eval()

    return make


CONVOLUTIONS = {
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2), dense(4, 3)
    ),
    "conv_transpose1d, output padding beyond the stride": (
        lambda: nn.ConvTranspose1d(2, 3, 2, dilation=3, output_padding=2), dense(2, 3)
    ),
    "conv_transpose1d, padding beyond the kernel": (lambda: nn.ConvTranspose1d(2, 3, 2, padding=2), dense(2, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(2, 3, (3, 2), (2, 1), (1, 0), (1, 0), dilation=(1, 2)), dense(2, 2, 3)
    ),
    "conv_transpose2d without bias": (lambda: nn.ConvTranspose2d(3, 2, 2, 2, bias=False), dense(3, 2, 2)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 4, 2, (1, 2, 1), (0, 1, 0), groups=2), dense(2, 1, 2, 2)),
    "conv_transpose2d in the middle": (
        lambda: Head(nn.Conv2d(1, 2, 2, 2), nn.ConvTranspose2d(2, 1, 2, 2), 16), dense(1, 4, 4)
    ),
}  # fmt: skip

BAGS = {
    "embedding_bag": (lambda: nn.EmbeddingBag(6, 3), ids(4)),
    "embedding_bag sum": (lambda: nn.EmbeddingBag(6, 3, mode="sum"), ids(4)),
    "embedding_bag, padding": (lambda: nn.EmbeddingBag(6, 3, padding_idx=2), ids(4)),
    "embedding_bag sum, last padding": (lambda: nn.EmbeddingBag(6, 3, mode="sum", padding_idx=-1), ids(4)),
    "embedding_bag, offsets": (around(bag, lambda: nn.EmbeddingBag(6, 3)), ragged([2, 0, 3])),
    "embedding_bag sum, offsets": (around(bag, lambda: nn.EmbeddingBag(6, 3, mode="sum")), ragged([1, 4, 0, 2])),
    "embedding_bag, offsets with the last": (
        around(bag, lambda: nn.EmbeddingBag(6, 3, include_last_offset=True, padding_idx=1)), ragged([2, 3], last=True)
    ),
    "embedding_bag sum, weights": (
        around(lambda m, x, w: m.layer(x, per_sample_weights=w), lambda: nn.EmbeddingBag(6, 3, mode="sum")),
        lambda n: (torch.randint(6, (n, 4)), torch.randn(n, 4)),
    ),
    "embedding_bag sum, offsets and weights": (
        around(bag, lambda: nn.EmbeddingBag(6, 3, mode="sum")), ragged([3, 1], weights=True)
    ),
}  # fmt: skip

NORMS = {
    "rms_norm": (lambda: nn.RMSNorm(4), dense(3, 4)),
    "rms_norm over two axes, eps": (lambda: nn.RMSNorm((3, 4), eps=0.1), dense(3, 4)),
    "layer_norm without bias": (lambda: nn.LayerNorm(4, bias=False), dense(3, 4)),
    "group_norm on a sequence": (lambda: nn.GroupNorm(2, 4), dense(4, 3)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(3, affine=True), dense(3, 4)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(2, affine=True), dense(2, 3, 2)),
    "instance_norm3d": (lambda: nn.InstanceNorm3d(2, affine=True, eps=0.1), dense(2, 2, 2, 2)),
    "instance_norm2d, running statistics": (
        running(lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True)), dense(2, 3, 2)
    ),
    "instance_norm2d, tracking": (lambda: nn.InstanceNorm2d(2, affine=True, track_running_stats=True), dense(2, 3, 2)),
    "batch_norm1d": (running(lambda: nn.BatchNorm1d(4)), dense(4)),
    "batch_norm3d": (running(lambda: nn.BatchNorm3d(2)), dense(2, 2, 1, 2)),
    "instance_norm1d in the middle": (
        lambda: Head(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3, affine=True), 9), dense(2, 4)
    ),
}  # fmt: skip

ACTIVATIONS = {
    "prelu": (lambda: nn.PReLU(), dense(3, 2)),
    "prelu, a slope for each channel": (lambda: nn.PReLU(3), dense(3, 2, 2)),
    "prelu, a slope for each feature": (lambda: nn.PReLU(4), dense(4)),
    "prelu in the middle": (lambda: Head(nn.Linear(4, 3), nn.PReLU(3, init=-0.5), 3), dense(4)),
}

BILINEAR = {
    "bilinear": (lambda: nn.Bilinear(3, 2, 4), lambda n: (torch.randn(n, 3), torch.randn(n, 2))),
    "bilinear without bias, on sequences": (
        lambda: nn.Bilinear(3, 2, 4, bias=False), lambda n: (torch.randn(n, 2, 3), torch.randn(n, 2, 2))
    ),
    "bilinear form of one input": (
        around(lambda m, x: m.layer(torch.tanh(x), x), lambda: nn.Bilinear(3, 3, 2)), dense(3)
    ),
}  # fmt: skip

RECURRENT = {
    "rnn": recurrent(nn.RNN),
    "rnn relu, two layers, batch first": recurrent(nn.RNN, nonlinearity="relu", num_layers=2, batch_first=True),
    "rnn both ways without bias": recurrent(nn.RNN, bidirectional=True, bias=False, read="both"),
    "lstm": recurrent(nn.LSTM, read="both"),
    "lstm, two layers both ways, batch first": recurrent(
        nn.LSTM, num_layers=2, bidirectional=True, batch_first=True, read="both", dropout=0.5
    ),
    "lstm without bias, given state": recurrent(nn.LSTM, bias=False, initial="given", read="both"),
    "lstm projected, both ways": recurrent(nn.LSTM, proj_size=2, bidirectional=True, num_layers=2, read="both"),
    "lstm projected without bias, given state": recurrent(nn.LSTM, proj_size=2, bias=False, initial="given"),
    "lstm, learned state": recurrent(nn.LSTM, initial="learned", bidirectional=True),
    "gru, last state": recurrent(nn.GRU, read="state"),
    "gru, two layers both ways": recurrent(nn.GRU, num_layers=2, bidirectional=True, batch_first=True, read="both"),
    "gru without bias, learned state": recurrent(nn.GRU, bias=False, initial="learned"),
    "rnn cell": cell(nn.RNNCell),
    "rnn relu cell": cell(lambda i, h: nn.RNNCell(i, h, nonlinearity="relu")),
    "lstm cell": cell(nn.LSTMCell),
    "gru cell": cell(lambda i, h: nn.GRUCell(i, h, bias=False)),
}

ATTENTION = {
    "attention": attention(),
    "attention, batch first, weights": attention(batch_first=True, weights=True),
    "attention, weights of every head": attention(weights=True, average=False, bias=False),
    "attention, cross": attention(cross="pair"),
    "attention, cross, keys as values": attention(cross="pair", batch_first=True),
    "attention, cross, three inputs, batch first": attention(cross="triple", batch_first=True),
    "attention, cross, own widths": attention(cross="triple", kdim=3, vdim=2, weights=True),
    "attention, own widths without bias": attention(cross="triple", kdim=3, vdim=2, bias=False, batch_first=True),
    "attention, learned key and value": attention(add_bias_kv=True, add_zero_attn=True),
    "attention, everything": attention(
        cross="triple", kdim=3, vdim=2, add_bias_kv=True, add_zero_attn=True, batch_first=True, weights=True
    ),
    "attention, bool mask": attention(cross="pair", mask="bool"),
    "attention, float mask": attention(cross="pair", mask="float", weights=True),
    "attention, padded keys": attention(cross="triple", mask="padding", batch_first=True),
    "attention, padded keys, learned key": attention(cross="triple", mask="padding", add_bias_kv=True),
    "attention, causal": attention(mask="causal", batch_first=True),
}

RAW = {
    "weight vector": (around(lambda m, x: x @ m.w, w=(4,)), dense(3, 4)),
    "linear without an output axis": (around(lambda m, x: F.linear(x, m.w), w=(4,)), dense(3, 4)),
    "matrix times vector": (around(lambda m, x: torch.mv(x, m.w), w=(4,)), dense(4)),
    "layer scale by view": (around(lambda m, x: m.s.view(1, -1, 1) * x, s=(3,)), dense(3, 2)),
    "shift by a turned parameter": (around(lambda m, x: x + m.s.t(), s=(2, 3)), dense(3, 2)),
    "rows of a stack of matrices": (around(lambda m, x: (x @ m.w[0]).tanh() @ m.w[1], w=(2, 4, 4)), dense(4)),
    "a kernel viewed as a matrix": (around(lambda m, x: F.linear(x, m.w.view(3, 4)), w=(3, 1, 2, 2)), dense(4)),
    "slices of one matrix": (
        around(lambda m, x: F.linear(F.linear(x, m.w[:4]).tanh(), m.w[4:], m.b[4:]) + m.b[:2], w=(6, 4), b=(6,)), dense(4)
    ),
    "rows of a matrix used from the right": (around(lambda m, x: x[:, :2] @ m.w[1:3] + x @ m.w, w=(4, 3)), dense(4)),
    "rows of a table": (around(lambda m, x: F.embedding(x, m.w[2:]) + F.embedding(x, m.w), w=(8, 3)), ids(2)),
    "rows of a kernel": (around(lambda m, x: F.conv1d(x, m.w[1:3], m.b[1:3]), w=(4, 2, 2), b=(4,)), dense(2, 4)),
    "rows of a grouped kernel": (around(lambda m, x: F.conv1d(x, m.w[:2], groups=2), w=(4, 1, 2)), dense(2, 4)),
    "joined matrices": (
        around(lambda m, x: F.linear(x, torch.cat([m.a, m.b]), torch.cat([m.c, torch.zeros(2), m.d])),
               a=(3, 4), b=(2, 4), c=(1,), d=(2,)), dense(4)
    ),
    "joined matrices used from the right": (
        around(lambda m, x: x @ torch.cat([m.a, m.b]), a=(3, 2), b=(1, 2)), dense(4)
    ),
    "joined tables": (around(lambda m, x: F.embedding(x, torch.cat([m.a, m.b])), a=(4, 2), b=(2, 2)), ids(3)),
    "stacked vectors": (around(lambda m, x: F.linear(x, torch.stack([m.a, m.b])), a=(4,), b=(4,)), dense(4)),
    "a shift repeated over the batch": (
        around(lambda m, x: torch.cat([m.s.repeat(len(x), 1, 1), x], 1), s=(1, 2, 4)), dense(3, 4)
    ),
    "stretched matrices and vectors": (
        around(lambda m, x: F.layer_norm(F.linear(x, m.w.expand(3, 4), m.b.expand(3)), (3,), m.s.expand(3))
               + F.group_norm(x[:, :3], 1, m.s.expand(3)), w=(1, 4), b=(1,), s=(1,)), dense(4)
    ),
    "a copy, and a copy changed in place": (
        around(lambda m, x: F.linear(F.linear(x, m.w.clone()).tanh(), m.v.clone().mul_(m.s)), w=(3, 4), v=(2, 3), s=(3,)),
        dense(4),
    ),
    "a turned and stretched matrix": (around(lambda m, x: F.linear(x, m.w.t().expand(3, 4)), w=(4, 1)), dense(4)),
    "in-place sums": (around(lambda m, x: F.linear(x, m.w).add_(m.b), w=(3, 4), b=(3,)), dense(4)),
    "differently spelled arithmetic": (
        around(lambda m, x: torch.divide(torch.multiply(torch.subtract(x, m.a), m.b), 2 + m.b**2), a=(4,), b=(4,)), dense(4)
    ),
}  # fmt: skip

LEARNED = {
    "learned query": (
        around(lambda m, x: m.layer(m.q.expand(len(x), -1, -1), x, x, need_weights=False)[0],
               lambda: nn.MultiheadAttention(4, 2, batch_first=True), q=(1, 2, 4)), dense(3, 4)
    ),
    "learned query behind a layer, repeated": (
        around(lambda m, x: F.scaled_dot_product_attention(m.layer(m.q).repeat(len(x), 1, 1), x, x),
               lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), q=(1, 2, 4)), dense(3, 4)
    ),
    "own recurrence from zeros": (
        around(lambda m, x: m.layer(torch.tanh(F.linear(x, m.w) + m.layer(torch.zeros(len(x), 3).to(x)))),
               lambda: nn.Linear(3, 3), w=(3, 4)), dense(4)
    ),
    "own recurrence from constant zeros": (
        around(lambda m, x: m.layer(torch.tanh(F.linear(x, m.w) + m.layer(torch.zeros(len(x), 3, dtype=x.dtype)))),
               lambda: nn.Linear(3, 3), w=(3, 4)), dense(4)
    ),
    "batched product": (around(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=(4, 2)), dense(3, 4)),
}  # fmt: skip

CASES = CONVOLUTIONS | BAGS | NORMS | ACTIVATIONS | BILINEAR | RECURRENT | ATTENTION | RAW | LEARNED


def make(name, n=3, seed=0):
    """(model in float64, inputs), the same for the same seed."""
    build, draw = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, inputs = build().double(), draw(n)
        for p in model.parameters():  # no zeros or ones that would hide a slip
            p.data.add_(torch.randn(p.shape), alpha=0.3)
    cast = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return model, tuple(map(cast, inputs)) if isinstance(inputs, tuple) else cast(inputs)
