"""A certificate never outlives its reasons: what can change without changing shapes is proved, or checked each time."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import close, sample_grads
from torch import nn
from torch.autograd.graph import get_gradient_edge

import paraboloid as pb
from paraboloid.engine import tape as tape_module
from paraboloid.engine.sample_axes import sample_axes
from paraboloid.engine.sample_independence import Layout

CE = nn.CrossEntropyLoss()


def double(model, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data = torch.randn(p.shape).double()
    return model.double()


class FrozenAffine(nn.Module):
    """A batch norm whose scale and shift are frozen: no recorded call in it, so that only its mode tells."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5).requires_grad_(False), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class Adjacency(nn.Module):
    """A graph network on [nodes of all graphs, features] with a dense block-diagonal adjacency matrix."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, A, graphs):
        z = A @ torch.tanh(self.first(x))
        return self.last(torch.stack([z[graphs == g].mean(0) for g in range(3)]))


class Scattered(Adjacency):
    def forward(self, x, A, graphs):
        z = torch.tanh(self.first(x))
        return self.last(torch.zeros(3, 5, dtype=z.dtype).index_add(0, graphs, z))


class Sorting(nn.Module):
    """Sorts the samples by their first feature and leaves them so."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))[x[:, 0].argsort()])


class Gated(nn.Module):
    """Attends over the batch behind a gate that is zero at first."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(4, 5), nn.Linear(5, 3), 0.0

    def forward(self, x):
        z = torch.tanh(self.first(x))
        return self.last(z + self.gate * z.mean(0))


def sizes(*counts):
    graphs = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    A = (graphs[:, None] == graphs).double()
    x = torch.randn(len(graphs), 4, generator=torch.Generator().manual_seed(len(graphs))).double()
    return x, A, graphs


def right_or_refused(model, inputs, y):
    """The statistics, if there are any, are those of every sample's own gradient; returns whether there are."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="the samples lie along no axis")
            stats = pb.statistics(model, CE, (inputs, y), ["sample_grads"])
    except ValueError as error:
        assert "does not separate" in str(error) or "batch statistics" in str(error)
        return False
    f = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    truth = sample_grads(CE, f, y, {k: p for k, p in model.named_parameters() if p.requires_grad})
    for k, g in truth.items():
        close(stats["sample_grads"][k], g, k)
    return True


def test_train_mode_of_a_frozen_batch_norm_is_noticed_on_every_call():
    model, x, y = double(FrozenAffine()), torch.randn(6, 4).double(), torch.randint(3, (6,))
    for call in range(7):
        model.train(call == 4)
        assert right_or_refused(model, x, y) == (call != 4)


def test_the_modes_siblings_are_noticed_too():
    for change in (lambda m: setattr(m, "gate", 1.0), lambda m: m.__dict__.update(gate=torch.tensor(2.0).double())):
        model, x, y = double(Gated()), torch.randn(6, 4).double(), torch.randint(3, (6,))
        for call in range(7):
            if call == 3:
                change(model)
            assert right_or_refused(model, x, y) == (call < 3)


@pytest.mark.parametrize("n", [1, 5])
def test_a_branch_whose_scale_was_zero_at_first_is_not_left_out(n):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.branch, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.register_buffer("scale", torch.zeros(()).double())

        def forward(self, x):
            z = torch.tanh(self.first(x))
            return self.last(z + self.scale * self.branch(z))

    model, x, y = double(Scaled()), torch.randn(n, 4).double(), torch.randint(3, (n,))
    model.scale.zero_()
    for call in range(5):
        model.scale.fill_(float(call >= 2))
        assert right_or_refused(model, x, y)


@pytest.mark.parametrize("kind", [Adjacency, Scattered])
def test_unequal_graphs_after_equal_ones(kind):
    model, y = double(kind()), torch.tensor([0, 1, 2])
    for counts in ((2, 2, 2), (2, 2, 2), (3, 2, 1), (2, 2, 2), (1, 3, 2), (2, 3, 1)):
        assert right_or_refused(model, sizes(*counts), y)  # never another sample's gradient


def test_a_model_that_sorts_after_sorted_batches():
    model, y = double(Sorting()), torch.randint(3, (6,))
    x = torch.randn(6, 4).double()
    ordered = x[x[:, 0].argsort()]
    assert right_or_refused(model, ordered, y)
    assert right_or_refused(model, ordered, y)
    for _ in range(5):
        assert right_or_refused(model, x, y)  # a sample is a row of the output


def test_a_hook_on_a_tensor_is_not_trusted():
    class Hooked(FrozenAffine):
        leak = 0.0

        def forward(self, x):
            z = self.first(x)
            z.register_hook(lambda g: g + self.leak * g.flip(0))
            return self.last(torch.tanh(z))

    model, x, y = double(Hooked()), torch.randn(6, 4).double(), torch.randint(3, (6,))
    for call in range(6):
        model.leak = float(call == 4)
        if call == 4:
            with pytest.raises(ValueError, match="does not separate"):
                pb.statistics(model, CE, (x, y), ["sample_grads"])
        else:
            pb.statistics(model, CE, (x, y), ["sample_grads"])


def test_a_proved_graph_is_not_checked_by_numbers(monkeypatch):
    """Calls 1, 2, 4, 8 of a signature are; the others are proved from the graph."""
    model = double(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)))
    x, y = torch.randn(5, 1, 8, 8).double(), torch.randint(3, (5,))
    checks = []
    certify = tape_module.certify
    monkeypatch.setattr(tape_module, "certify", lambda *a, **k: checks.append(1) or certify(*a, **k))
    counts = []
    for _ in range(9):
        checks.clear()
        pb.statistics(model, CE, (x, y), ["variance"])
        counts.append(len(checks))
    assert counts == [1, 1, 0, 1, 0, 0, 0, 1, 0]


def layout(f, z):
    found = sample_axes(f, [get_gradient_edge(z)])
    return None if found is None else found[0]


W = torch.randn(6, 6)
FIXED = (1, 4, 1)
# name -> (from z [4, 6, 6] to the output, the layout at z or None where nothing is proved)
NODES = {
    "itself": (lambda z: z, Layout(0, FIXED)),
    "transposed": (lambda z: z.transpose(0, -1).permute(2, 1, 0), Layout(0, FIXED)),
    "flattened": (lambda z: z.reshape(24, 6).tanh().view(4, 36), Layout(0, FIXED)),
    "sequence first": (lambda z: (z.movedim(0, 1).reshape(24, 6) @ W).view(6, 4, 6).movedim(1, 0), Layout(0, FIXED)),
    "sum": (lambda z: z.sum(1), Layout(0, FIXED)),
    "sum over the samples": (lambda z: z.sum(0).expand(4, 6, 6), None),
    "mean kept": (lambda z: z - z.mean(0, keepdim=True), None),
    "mean of the others": (lambda z: z - z.mean((1, -1), keepdim=True), Layout(0, FIXED)),
    "softmax": (lambda z: z.softmax(-1), Layout(0, FIXED)),
    "softmax over the samples": (lambda z: z.softmax(0), None),
    "rolled samples": (lambda z: z.roll(1, 0), None),
    "rolled flat": (lambda z: z.roll(1), None),
    "rolled": (lambda z: z.roll(1, -2), Layout(0, FIXED)),
    "shifted by padding": (lambda z: F.pad(z, (0, 0, 0, 0, 1, -1)), None),
    "padded": (lambda z: F.pad(z, (1, -1, 0, 2)), Layout(0, FIXED)),
    "stacked": (lambda z: torch.stack([z, 2 * z], -1).unbind(-1)[1], Layout(0, FIXED)),
    "stacked in front": (lambda z: torch.stack([z, z]).sum(0), Layout(0, FIXED)),
    "samples joined": (lambda z: torch.cat([z[2:], z[:2]]), None),
    "features joined": (lambda z: torch.cat([z, z], 2), Layout(0, FIXED)),
    "selected": (lambda z: z[:, 2] + z.select(-1, 0), Layout(0, FIXED)),
    "picked": (lambda z: z[:, torch.tensor([0, 3])] * z[:, :, [1]][:, :2], Layout(0, FIXED)),
    "picked samples": (lambda z: z[torch.tensor([1, 0, 2, 3])], None),
    "products of data": (lambda z: z @ z.mT, Layout(0, FIXED)),
    "products of products": (lambda z: (z.mT @ z) @ z.mT, Layout(0, FIXED)),
    "a Gram matrix of the samples": (lambda z: (z[:, 0] @ z[:, 0].T) @ z[:, 0], None),
    "rows from the left": (lambda z: z[:, 0] @ W, Layout(0, FIXED)),
    "an adjacency matrix": (lambda z: torch.eye(4) @ z[:, 0], None),
    "unfolded": (lambda z: z.unfold(-1, 2, 1), Layout(0, FIXED)),
    "unfolded samples": (lambda z: z.unfold(0, 1, 1), None),
    "sorted": (lambda z: z.sort(-1)[0], Layout(0, FIXED)),
    "sorted samples": (lambda z: z.sort(0)[0], None),
    "convolved": (lambda z: F.conv1d(z, torch.randn(2, 6, 3)), Layout(0, FIXED)),
    "samples as channels": (lambda z: F.conv1d(z.transpose(0, 1), torch.eye(4)[..., None]).transpose(0, 1), None),
    "normalised": (lambda z: F.layer_norm(z, (6, 6)), Layout(0, FIXED)),
    "normalised over the samples": (lambda z: F.layer_norm(z.movedim(0, 2), (4,)).movedim(2, 0), None),
    "instance norm": (lambda z: F.instance_norm(z), Layout(0, FIXED)),
    "batch norm": (lambda z: F.batch_norm(z, None, None, training=True), None),
    "running batch norm": (lambda z: F.batch_norm(z, torch.zeros(6), torch.ones(6)), Layout(0, FIXED)),
    "attention": (lambda z: F.scaled_dot_product_attention(z[:, None], z[:, None], z[:, None]), Layout(0, FIXED)),
    "attention over the samples": (
        lambda z: F.scaled_dot_product_attention(*[z.transpose(0, 1)[None]] * 3)[0].transpose(0, 1), None,
    ),
    "pooled": (lambda z: F.max_pool1d(z, 2), Layout(0, FIXED)),
    "two ways": (lambda z: z + z.flip(2), Layout(0, FIXED)),
    "two ways that disagree": (lambda z: z[:, :4, 0] + z[:, :4, 0].T, None),
    "not used": (lambda z: torch.ones(4, 6, requires_grad=True) * 2, None),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_what_nodes_do_to_the_samples_axis(name):
    function, expected = NODES[name]
    z = torch.randn(4, 6, 6, requires_grad=True) * 1
    assert layout(function(z), z) == expected


def test_a_function_that_bears_the_name_of_a_node_is_not_taken_for_it():
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.flip(0)

    z = torch.randn(4, 6, requires_grad=True) * 1
    f = Relu.apply(z)
    assert type(f.grad_fn).__name__ == "ReluBackward"
    assert layout(f, z) is None
