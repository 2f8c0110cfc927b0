"""Curvature by dense autograd in plain view: double backward in loops over every parameter and every output."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint


def rows_of_jacobian(f, xs):
    """d f_i / d xs as a matrix [f.numel(), D]."""
    rows = []
    for i in range(f.numel()):
        g = torch.autograd.grad(f.reshape(-1)[i], xs, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([t.reshape(-1) for t in g]))
    return torch.stack(rows).detach()


def second_derivative(value, xs):
    """d^2 value / d xs^2, [D, D]."""
    grads = torch.autograd.grad(value, xs, create_graph=True, allow_unused=True, materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    return rows_of_jacobian(flat, xs) if flat.requires_grad else torch.zeros(len(flat), len(flat), dtype=value.dtype)


def outputs(model, batches):
    return torch.cat([model(x) for x, _ in batches]), torch.cat([y for _, y in batches])


class PlainWeightNorm(TorchFunctionMode):
    """The fused weight norm has a wrong double backward (its Hessian is not symmetric): write it out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch._weight_norm:
            v, g, dim = args
            return v * (g / v.flatten(1).norm(dim=1).view_as(g)) if dim == 0 else None
        return func(*args, **(kwargs or {}))


def dense_hessian(model, loss_fn, batches):
    with sdpa_kernel(SDPBackend.MATH), PlainWeightNorm():
        return second_derivative(loss_fn(*outputs(model, batches)), trainable(model))


def dense_ggn(model, loss_fn, batches):
    """J^T H J with J the Jacobian of all outputs, and H the second derivative of the reduced loss in all of them."""
    f, y = outputs(model, batches)
    J = rows_of_jacobian(f, trainable(model))
    leaf = f.detach().requires_grad_()
    return J.T @ second_derivative(loss_fn(leaf, y), [leaf]) @ J


def gradient(model, loss_fn, batches):
    g = torch.autograd.grad(
        loss_fn(*outputs(model, batches)), trainable(model), allow_unused=True, materialize_grads=True
    )
    return torch.cat([t.reshape(-1) for t in g])


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


class Residual(nn.Module):
    """A convolutional residual block with group normalisation and an in-place activation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.stem(x), inplace=True)
        h = h + self.conv(F.gelu(self.norm(h)))
        return self.head(h.mean((2, 3)))


class Attention(nn.Module):
    """Self-attention through the fused function, over five positions of a vector."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(1, 4)
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.up(x.unsqueeze(-1))
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = self.norm(h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(h.mean(1))


class EncoderLayer(nn.Module):
    """torch's own transformer layer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(1, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(self.up(x.unsqueeze(-1))).mean(1))


class Tied(nn.Module):
    """One matrix used twice, once transposed, and a module called twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.twice = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        h = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(torch.sigmoid(self.first(h)) @ self.first.weight)


class Checkpointed(nn.Module):
    """Activations thrown away and computed again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 5), nn.ReLU(inplace=True))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Partly(nn.Module):
    """A parameter that the output does not depend on, one that enters linearly, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.randn(3))
        self.body = nn.Linear(5, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return self.head(F.softplus(self.frozen(torch.tanh(self.body(x))))) + self.shift


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(1, 3, batch_first=True)

    def forward(self, x):
        return self.rnn(x.unsqueeze(-1))[0][:, -1]


def mlp(*activation):
    return nn.Sequential(nn.Linear(5, 6), *activation, nn.Linear(6, 3))


VECTOR_MODELS = {
    "mlp": lambda: mlp(nn.Tanh()),
    "in-place": lambda: mlp(nn.ReLU(inplace=True)),
    "attention": Attention,
    "encoder layer": EncoderLayer,
    "tied": Tied,
    "checkpointed": Checkpointed,
    "partly": Partly,
    "recurrent": Recurrent,
    "weight norm": lambda: mlp(nn.Tanh()).apply(
        lambda m: torch.nn.utils.parametrizations.weight_norm(m) if isinstance(m, nn.Linear) else m
    ),
}
MODELS = {**VECTOR_MODELS, "residual": Residual}


def make_model(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MODELS[name]().double()


def make_inputs(name, n, seed):
    g = torch.Generator().manual_seed(seed)
    shape = (1, 4, 4) if name == "residual" else (5,)
    return torch.randn(n, *shape, generator=g, dtype=torch.float64)


def classes(n, seed):
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))


def soft_classes(n, seed):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


def real_targets(n, seed):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(n, seed):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_ignored(n, seed):
    y = classes(n, seed)
    y[1] = 7
    return y


WEIGHT = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), classes),
    "cross-entropy sum": (nn.CrossEntropyLoss(reduction="sum"), classes),
    "cross-entropy weights": (nn.CrossEntropyLoss(weight=WEIGHT), classes),
    "cross-entropy everything": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=7, label_smoothing=0.2), with_ignored),
    "cross-entropy ignored": (nn.CrossEntropyLoss(ignore_index=7), with_ignored),
    "cross-entropy smoothing": (nn.CrossEntropyLoss(label_smoothing=0.3), classes),
    "cross-entropy soft": (nn.CrossEntropyLoss(weight=WEIGHT), soft_classes),
    "squared error": (nn.MSELoss(), real_targets),
    "squared error sum": (nn.MSELoss(reduction="sum"), real_targets),
    "binary": (nn.BCEWithLogitsLoss(), bits),
    "binary weights": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT, weight=WEIGHT.flip(0), reduction="sum"), bits),
}
