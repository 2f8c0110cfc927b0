"""The GGN's square root: made when it pays, exact, and never where the graph alone is right."""

import pytest
import torch
from operators.oracle import classes, dense_ggn, make_inputs, make_model
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from paraboloid.operators import GGN
from paraboloid.quadratics.local_model import quadratic

CE = nn.CrossEntropyLoss()


def batches():
    return [(make_inputs("residual", n, n), classes(n, n)) for n in (5, 3)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model():
    return make_model("residual")


def test_it_is_made_after_as_many_products_as_it_costs(model):
    """Two root columns for three classes: the graph serves the first product, the root all others."""
    A = GGN(model, CE, batches())
    expected = dense_ggn(model, CE, batches())
    v = random(A.shape[0])
    torch.testing.assert_close(A @ v, expected @ v)
    assert A.root.rows is None
    torch.testing.assert_close(A @ v, expected @ v)
    assert A.root.rows.shape == (2 * 8, A.shape[0])
    torch.testing.assert_close(A @ v, expected @ v)


def test_a_parameter_without_axes():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.shift = make_model("residual"), nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            return self.body(x) + self.shift * torch.arange(3)

    model = Shifted()
    A = GGN(model, CE, batches())
    torch.testing.assert_close(A.to_dense(), dense_ggn(model, CE, batches()))
    assert A.root.rows is not None


def test_everything_is_exact_with_it(model):
    A, expected = GGN(model, CE, batches()), dense_ggn(model, CE, batches())
    V = random(A.shape[0], 3)
    torch.testing.assert_close(A @ V, expected @ V)
    assert A.root.rows is not None
    torch.testing.assert_close(A.quadratic_forms(V.T), (V * (expected @ V)).sum(0))
    torch.testing.assert_close(A.diagonal(), expected.diagonal())
    torch.testing.assert_close(A.to_dense(), expected)
    assert A.trace() == pytest.approx(expected.trace().item())
    torch.testing.assert_close(A.eigsh(3)[0], torch.linalg.eigvalsh(expected).flip(0)[:3])


def test_a_diagonal_asks_for_as_many_products_as_it_would_take(model):
    A = GGN(model, CE, batches())
    torch.testing.assert_close(A.diagonal(), dense_ggn(model, CE, batches()).diagonal())
    assert A.root.rows is not None


@pytest.mark.parametrize("loss_fn, rows", [(nn.MSELoss(), 3), (nn.CrossEntropyLoss(ignore_index=2), 2)])
def test_losses(model, loss_fn, rows):
    """A batch of ignored targets alone adds no rows."""
    data = [(x, random(len(x), 3, seed=1) if rows == 3 else y) for x, y in batches()]
    if rows == 2:
        data.append((data[0][0], torch.full((5,), 2)))
    A = GGN(model, loss_fn, data)
    torch.testing.assert_close(A.to_dense(), dense_ggn(model, loss_fn, data))
    assert len(A.root.rows) == rows * 8


def test_masks_are_those_of_the_graph():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (
            nn.Conv1d(1, 3, 3),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Conv1d(3, 3, 3),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
        )
        model = nn.Sequential(*layers).double()
    loader = DataLoader(TensorDataset(random(7, 1, 9), classes(7, 0)), batch_size=4, shuffle=True)
    A = GGN(model, CE, loader, seed=3)
    v = random(A.shape[0])
    by_graph = A @ v
    assert A.root.rows is None
    by_root = A @ v.expand(20, -1).T
    assert A.root.rows is not None
    torch.testing.assert_close(by_root[:, 0], by_graph)


def test_a_model_that_is_cheaper_to_run_has_none():
    data = (make_inputs("mlp", 5, 0), classes(5, 0))
    A = GGN(make_model("mlp"), CE, data)
    A.to_dense()
    assert A.root.rows is None
    assert A.root.columns == 0


def test_it_keeps_to_the_memory_limit(model):
    size = GGN(model, CE, batches()).replay.size
    root = 16 * sum(p.numel() for p in model.parameters()) * 8
    for limit, made in ((size + root, True), (size + root - 1, False), (0, False)):
        A = GGN(model, CE, batches(), max_memory=limit)
        torch.testing.assert_close(A.to_dense(), dense_ggn(model, CE, batches()))
        assert (A.root.rows is not None) == made


def test_changed_parameters_raise_with_it_too(model):
    A = GGN(model, CE, batches())
    A.to_dense()
    assert A.root.rows is not None
    with torch.no_grad():
        model.head.bias.add_(1)
    for call in (lambda: A @ random(A.shape[0]), A.diagonal, lambda: A.quadratic_forms(random(1, A.shape[0]))):
        with pytest.raises(RuntimeError, match=r"parameter 'head.bias' has changed since this operator was made"):
            call()


def test_samples_that_are_not_separate_have_none():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = batches()[0]
    A = GGN(model, CE, batch)
    torch.testing.assert_close(A.to_dense(), dense_ggn(model, CE, [batch]), rtol=1e-8, atol=1e-10)
    assert A.root.rows is None


def test_a_plain_callable_has_none(model):
    A = GGN(model, lambda f, y: CE(f, y), batches()[0])
    torch.testing.assert_close(A.to_dense(), dense_ggn(model, CE, batches()[:1]))
    assert A.root.rows is None


def test_data_that_moves_leaves_it_to_the_graphs(model):
    class Augmented(Dataset):
        def __init__(self):
            self.generator = torch.Generator().manual_seed(0)

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return random(1, 4, 4, seed=i) + torch.rand((), generator=self.generator, dtype=torch.float64), i % 3

    A = GGN(model, CE, DataLoader(Augmented(), batch_size=2))
    V = random(A.shape[0], 5)
    first = A @ V
    assert A.root.rows is None
    assert torch.equal(A @ V, first)


def test_single_precision(model):
    data = [(x.float(), y) for x, y in batches()]
    expected = dense_ggn(model, CE, batches())
    q = quadratic(model.float(), CE, data)
    found = q.along(q.eigen_directions(3))[1]
    assert q.curvature.root.rows.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.linalg.eigvalsh(expected).flip(0)[:3], rtol=1e-4, atol=1e-6)
