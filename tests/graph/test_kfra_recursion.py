"""KFRA against its recursion written out with every sample's Jacobian of every layer."""

import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()


def recursion(model, x, y, largest=None):
    """Factors of a Sequential: M = a sum_n H_n at the output, mean_n J_n^T M J_n below each layer.

    largest: beyond so many elements, M keeps only the couplings between channels at one position, below convolutions
    and pooling layers.
    """
    inputs = [x]
    for module in model:
        inputs.append(module(inputs[-1]).detach())
    f = inputs[-1]
    M = 0
    for n in range(len(f)):
        M = M + torch.autograd.functional.hessian(lambda e, n=n: nn.functional.cross_entropy(e, y[n]), f[n]).flatten(
            0
        ).view(f[n].numel(), -1) / len(f)
    found = {}
    for i, module in reversed(list(enumerate(model))):
        if module._parameters and not isinstance(module, nn.modules.batchnorm._BatchNorm):
            out = inputs[i + 1][0]
            channels = out.shape[-1] if isinstance(module, nn.Linear) else out.shape[0]
            T = out.numel() // channels
            five = (
                M.view(T, channels, T, channels).transpose(0, 1).transpose(2, 3)
                if isinstance(module, nn.Linear)
                else M.view(channels, T, channels, T)
            )
            found[f"{i}.weight"] = five.diagonal(dim1=1, dim2=3).sum(2)
            found[f"{i}.bias"] = five.sum((1, 3))
        J = [
            torch.autograd.functional.jacobian(lambda e, m=module: m(e[None])[0], e).reshape(
                inputs[i + 1][0].numel(), -1
            )
            for e in inputs[i]
        ]
        M = sum(j.T @ M @ j for j in J) / len(x)
        spatial = (
            isinstance(module, nn.modules.conv._ConvNd)
            or "Pool" in type(module).__name__
            or "Upsample" in type(module).__name__
        )
        if largest is not None and spatial and len(M) > largest:
            T = inputs[i][0, 0].numel()
            M = (M.view(-1, T, len(M) // T, T) * torch.eye(T)[:, None]).reshape(len(M), -1)
    return found


NETS = {
    "mlp": (lambda: [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)], (4,)),
    "sequence": (lambda: [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)], (3, 4)),
    "convolutions": (
        lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Conv2d(4, 6, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)],
        (2, 7, 7),
    ),
    "average pooling": (
        lambda: [nn.Conv2d(1, 3, 3, padding="same", dilation=2), nn.GELU(), nn.AvgPool2d(2), nn.Conv2d(3, 4, 2, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 3)],
        (1, 6, 6),
    ),
    "batch norm and dropout": (
        lambda: [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, affine=False), nn.LeakyReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 3)],
        (1, 5, 5),
    ),
    "one dimension": (lambda: [nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(4, 3, 2), nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten()], (2, 8)),
    "three dimensions": (lambda: [nn.Conv3d(1, 2, 2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(2, 3)], (1, 3, 4, 3)),
}  # fmt: skip


def make(name, N=4):
    torch.manual_seed(0)
    build, shape = NETS[name]
    model = nn.Sequential(*build()).double().eval()
    return model, torch.randn(N, *shape).double(), torch.arange(N) % 3


@pytest.mark.parametrize("name", NETS)
def test_the_recursion(name):
    model, x, y = make(name)
    expected = recursion(model, x, y)
    found = pb.statistics(model, CE, (x, y), ["kfra", "kflr"], max_memory=2**30)
    for k, left in expected.items():
        close(found["kfra"][k].left, left, k)
        close(found["kfra"][k].right, found["kflr"][k].right, k)


@pytest.mark.parametrize(
    "name", ["convolutions", "average pooling", "batch norm and dropout", "one dimension", "three dimensions"]
)
def test_channel_blocks(name):
    """Where the whole matrix does not fit, couplings between positions are dropped below each spatial layer."""
    model, x, y = make(name)
    expected = recursion(model, x, y, largest=1)
    found = pb.statistics(model, CE, (x, y), "kfra", max_memory=1)["kfra"]
    whole = recursion(model, x, y)
    for k, left in expected.items():
        close(found[k].left, left, k)
    assert any((expected[k] - whole[k]).abs().max() > 1e-3 * whole[k].abs().max() for k in expected)
    size = 27 if name == "convolutions" else 0  # elements up to which the matrix is whole
    if size:
        found = pb.statistics(model, CE, (x, y), "kfra", max_memory=4 * 8 * size**2)["kfra"]
        for k, left in recursion(model, x, y, largest=size).items():
            close(found[k].left, left, k)


@pytest.mark.parametrize("name", NETS)
def test_one_sample_is_kflr(name):
    model, x, y = make(name, N=1)
    found = pb.statistics(model, CE, (x, y), ["kfra", "kflr"], max_memory=2**30)
    for k, kron in found["kflr"].items():
        close(found["kfra"][k].left, kron.left, k)
        close(found["kfra"][k].right, kron.right, k)


def test_a_deep_linear_network_is_kflr():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 4).double(), torch.randn(7, 2).double()
    found = pb.statistics(model, nn.MSELoss(), (x, y), ["kfra", "kflr"])
    for k, kron in found["kflr"].items():
        close(found["kfra"][k].to_dense(), kron.to_dense(), k)


def test_a_table_whose_padding_differs_from_sample_to_sample():
    """The same curvature for every sample, times the mean of what is padded: it used to be the first sample's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=0), nn.Linear(4, 5), nn.Flatten(), nn.Linear(15, 2)).double()
    x, y = torch.tensor([[1, 2, 0], [0, 0, 3], [4, 5, 5]]), torch.randn(3, 2).double()
    found = pb.statistics(model, nn.MSELoss(), (x, y), ["kfra", "kflr"])
    for k, kron in found["kflr"].items():
        close(found["kfra"][k].to_dense(), kron.to_dense(), k)


@pytest.mark.parametrize(
    "layers, shape",
    [
        ([nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(6, 3)], (4, 4, 4)),
        ([nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(), nn.Linear(18, 3)], (2, 4, 4)),
        ([nn.Embedding(9, 4), nn.Linear(4, 5), nn.SiLU(), nn.Flatten(), nn.Linear(15, 3)], None),
        ([nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)], (1, 3, 3)),
        ([nn.Conv2d(1, 2, 3), nn.ReLU(), nn.PixelShuffle(1), nn.ZeroPad2d(1), nn.Conv2d(2, 1, 2), nn.Flatten(), nn.Linear(9, 3)], (1, 4, 4)),
        ([nn.Linear(4, 5), nn.Hardtanh(), nn.Linear(5, 3, bias=False)], (4,)),
    ],
)  # fmt: skip
def test_other_layers_on_one_sample(layers, shape):
    """Groups, norm parameters, transposed convolutions, tables, paddings: where one sample makes KFRA equal to KFLR."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers).double().eval()
    x = torch.tensor([[1, 5, 5]]) if shape is None else torch.randn(1, *shape).double()
    found = pb.statistics(model, CE, (x, torch.tensor([1])), ["kfra", "kflr"])
    for k, kron in found["kflr"].items():
        close(found["kfra"][k].to_dense(), kron.to_dense(), k)


def test_outputs_with_positions_and_the_loss_as_reduced():
    """Pixels as targets; a multiple of the loss; a sum instead of a mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 1)).double()
    x, y = torch.randn(1, 1, 4, 3).double(), torch.randint(2, (1, 3, 2))
    for loss_fn in (nn.CrossEntropyLoss(), 3 * pb.losses.CrossEntropy(reduction="sum")):
        found = pb.statistics(model, loss_fn, (x, y), ["kfra", "kflr"])
        for k, kron in found["kflr"].items():
            close(found["kfra"][k].left, kron.left, k)
    blocks = pb.statistics(model, loss_fn, (x, y), "kfra", max_memory=1)["kfra"]
    close(blocks["2.weight"].left, found["kfra"]["2.weight"].left)


def test_a_large_bias_keeps_a_diagonal(monkeypatch):
    from paraboloid.graph import kfra_recursion

    model, x, y = make("mlp")
    whole = pb.statistics(model, CE, (x, y), "kfra")["kfra"]
    monkeypatch.setattr(kfra_recursion, "EXACT_VECTOR", 4)
    found = pb.statistics(model, CE, (x, y), "kfra")["kfra"]
    close(found["0.bias"].left, whole["0.bias"].left.diagonal())
    close(found["4.bias"].left, whole["4.bias"].left)


def test_the_graph_and_the_model_are_left_alone():
    model, x, y = make("convolutions")
    before = {k: p.clone() for k, p in model.named_parameters()}
    found = pb.statistics(model, CE, (x, y), ["kfra", "grad"])["kfra"]
    assert all(torch.equal(before[k], p) and p.grad is None for k, p in model.named_parameters())
    assert not any(kron.left.requires_grad for kron in found.values())
    single = pb.statistics(model.float(), CE, (x.float(), y), "kfra")["kfra"]
    assert all(kron.left.dtype == torch.float32 for kron in single.values())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        z = self.inner(x)
        return self.head(z + torch.tanh(z))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1)))).mean(0)


REFUSED = {
    "residual": (Residual, (4,), r"needs a chain of layers; found a branch: the graph node AddBackward0 has 2 inputs"),
    "softmax": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Linear(5, 3)), (4,), r"knows linear, convolution, activation and pooling layers; found the graph node SoftmaxBackward0"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), (4,), "found the graph node NativeLayerNormBackward0"),
    "used twice": (Twice, (4,), r"the parameters \['inner.weight', 'inner.bias'\] are used several times"),
    "time first": (Turned, (2, 4), r"has its samples along axis 1 of \(2, 3, 5\); expected axis 0"),
    "circular": (lambda: nn.Sequential(nn.Conv1d(1, 2, 2), nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(6, 3)), (1, 4), "found a branch|found the graph node"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    torch.manual_seed(0)
    build, shape, message = REFUSED[case]
    with pytest.raises(NotImplementedError, match=message):
        pb.statistics(build().double(), CE, (torch.randn(3, *shape).double(), torch.tensor([0, 1, 2])), "kfra")


def test_layers_that_need_the_whole_matrix_say_so():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()
    batch = torch.randn(2, 2, 3, 3).double(), torch.tensor([0, 1])
    with pytest.raises(
        NotImplementedError,
        match=r"can be passed with the whole curvature matrix only, which exceeds 1 x 1; raise max_memory",
    ):
        pb.statistics(model, CE, batch, "kfra", max_memory=1)
