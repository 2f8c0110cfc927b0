"""What every operator offers: forms of vectors, dense and iterative answers, the algebra, and every error."""

import numpy as np
import pytest
import torch
from operators.oracle import LOSSES, classes, dense_ggn, dense_hessian, make_inputs, make_model
from torch import nn

from paraboloid.linalg import hutchinson_trace
from paraboloid.operators import GGN, Estimate, Hessian, Identity, LinearOperator, Product, TensorEstimate
from paraboloid.operators.matrix_free.batching import Batching

N = 6


def problem(name="partly"):
    return make_model(name), LOSSES["cross-entropy"][0], (make_inputs(name, N, 1), classes(N, 2))


@pytest.fixture
def model_and_operator():
    model, loss_fn, batch = problem()
    return model, GGN(model, loss_fn, batch)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(A, damping):
    return A.to_dense() + damping * torch.eye(A.shape[0], dtype=A.dtype)


def test_vectors_are_flat_matrices_or_dicts(model_and_operator):
    model, A = model_and_operator
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    D = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert A.shape == (D, D)
    assert list(A.parameters) == names
    assert (A.dtype, A.device.type) == (torch.float64, "cpu")
    V = random(D, 3)
    product = A @ V
    assert product.shape == (D, 3)
    torch.testing.assert_close(A @ V[:, 1], product[:, 1])

    def tree(flat):
        pieces = flat.split([p.numel() for p in A.parameters.values()])
        return {
            k: t.reshape(p.shape + flat.shape[1:])
            for (k, p), t in zip(A.parameters.items(), pieces, strict=True)
        }  # fmt: skip

    for flat in (V[:, 0], V):
        found = A @ tree(flat)
        assert list(found) == names
        for k, expected in tree(A @ flat).items():
            torch.testing.assert_close(found[k], expected, rtol=1e-12, atol=1e-14)
    assert repr(A) == f"GGN([{D}, {D}], torch.float64, cpu)"


def test_vectors_take_the_parameters_dtype(model_and_operator):
    _, A = model_and_operator
    v = random(A.shape[0])
    assert (A @ v.float()).dtype == torch.float64
    assert (A @ torch.ones(A.shape[0], dtype=torch.int64)).dtype == torch.float64


def test_single_precision_models_give_single_precision():
    model, loss_fn, (x, y) = problem()
    A64 = GGN(model, loss_fn, (x, y)).to_dense()
    A = GGN(model.float(), loss_fn, (x.float(), y))
    assert (A @ random(A.shape[0])).dtype == torch.float32
    torch.testing.assert_close(A.to_dense().double(), A64, rtol=1e-4, atol=1e-5)
    values, vectors = A.eigsh(2)
    assert values.dtype == vectors.dtype == torch.float32


def test_parameters_of_several_precisions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.Tanh(), Cast(), nn.Linear(4, 2))
    A = GGN(model, nn.MSELoss(), (random(5, 3), torch.zeros(5, 2)))
    assert A.dtype == torch.float64
    tree = {k: torch.ones_like(p) for k, p in A.parameters.items()}
    assert {k: t.dtype for k, t in (A @ tree).items()} == {k: p.dtype for k, p in A.parameters.items()}


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(3, 3, 3), torch.zeros(())])
def test_wrong_shapes(model_and_operator, wrong):
    _, A = model_and_operator
    with pytest.raises(ValueError, match=rf"the vector has shape .*; expected \[{A.shape[0]}\] or \[{A.shape[0]}, K\]"):
        A @ wrong


def test_wrong_vectors(model_and_operator):
    _, A = model_and_operator
    D = A.shape[0]
    with pytest.raises(ValueError, match="the vector is a ndarray; expected a tensor"):
        A @ np.zeros(D)
    with pytest.raises(ValueError, match=r"the vector has dtype torch\.complex64; expected a real type"):
        A @ torch.zeros(D, dtype=torch.complex64)
    with pytest.raises(ValueError, match="the vector is on meta; expected cpu"):
        A @ torch.zeros(D, device="meta")
    with pytest.raises(ValueError, match=r"missing \['unused', .*\], unknown \['weight'\]"):
        A @ {"weight": torch.zeros(2)}
    for directions in (torch.zeros(D), torch.zeros(2, D + 1), [1.0]):
        with pytest.raises(ValueError, match=rf"the directions are .*; expected a tensor \[k, {D}\]"):
            A.quadratic_forms(directions)


@pytest.mark.parametrize("Operator, dense", [(GGN, dense_ggn), (Hessian, dense_hessian)])
def test_diagonals_and_traces(Operator, dense):
    model, loss_fn, batch = problem("mlp")
    A, expected = Operator(model, loss_fn, batch), dense(model, loss_fn, [batch])
    torch.testing.assert_close(A.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-12)
    assert A.trace() == pytest.approx(expected.trace().item(), rel=1e-10)
    assert type(A.trace()) is float
    diagonal = A.diagonal(samples=400, seed=1)
    assert isinstance(diagonal, TensorEstimate)
    off = (diagonal - expected.diagonal()).abs()
    assert (off <= 5 * torch.as_tensor(diagonal.standard_error) + 1e-12).all()
    trace = A.trace(samples=400, seed=1)
    assert isinstance(trace, Estimate)
    assert abs(trace - expected.trace().item()) <= 5 * trace.standard_error
    assert trace == A.trace(samples=400, seed=1)
    assert trace != A.trace(samples=400, seed=2)


@pytest.mark.parametrize("memory", [None, 0])
def test_the_diagonal_takes_a_pass_for_each_column_of_the_root(memory):
    model, loss_fn, (x, y) = problem("mlp")
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    expected = dense_ggn(model, loss_fn, [(x, y)]).diagonal()
    A = GGN(model, loss_fn, data, max_memory=memory)
    A.quadratic_forms = A.replay.graphs = None  # neither forms nor the kept graphs are needed
    torch.testing.assert_close(A.diagonal(), expected, rtol=1e-10, atol=1e-14)
    assert A.trace() == pytest.approx(expected.sum().item())


def test_the_diagonal_where_samples_are_coupled():
    """With one pull for each sample and column where those are fewer than parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    _, loss_fn, (x, y) = problem("mlp")
    for n, pulled in ((2, 4), (6, 12)):
        expected = dense_ggn(model, loss_fn, [(x[:n], y[:n])]).diagonal()
        A = GGN(model, loss_fn, (x[:n], y[:n]))
        pulls = count(A, "pull")
        torch.testing.assert_close(A.diagonal(), expected, rtol=1e-9, atol=1e-14)
        assert pulls == [pulled]


def test_the_diagonal_takes_the_cheaper_of_two_ways():
    """A plain callable has no root: forms."""
    model, loss_fn, (x, y) = problem("mlp")
    expected = dense_ggn(model, loss_fn, [(x[:1], y[:1])]).diagonal()
    opaque = GGN(model, lambda f, y: loss_fn(f, y), (x[:1], y[:1]))
    torch.testing.assert_close(opaque.diagonal(), expected, rtol=1e-10, atol=1e-14)


def count(operator, method):
    """Counts the calls of a method of the operator's one graph, in a list of one number."""
    graph, calls = operator.replay.kept[0], [0]
    original = getattr(graph, method)

    def counted(*args):
        calls[0] += 1
        return original(*args)

    setattr(graph, method, counted)
    return calls


def no_batching():
    return Batching(torch.zeros(1), flops=10**12, size=1, max_memory=10**9)


def test_a_quadratic_form_of_the_ggn_does_not_go_back():
    model, loss_fn, batch = problem("mlp")
    A = GGN(model, loss_fn, batch)
    A.replay.batching = no_batching()
    A @ random(A.shape[0])  # the first product certifies the second derivatives
    pulls, pushes = count(A, "pull"), count(A, "push")
    A.quadratic_forms(random(4, A.shape[0]))
    assert (pushes, pulls) == ([4], [0])
    A @ random(A.shape[0], 3)
    assert (pushes, pulls) == ([7], [3])


@pytest.mark.parametrize("Operator, dense", [(GGN, dense_ggn), (Hessian, dense_hessian)])
@pytest.mark.parametrize("k", [1, 3, "all"])
def test_eigsh(Operator, dense, k):
    model, loss_fn, batch = problem("mlp")
    A, expected = Operator(model, loss_fn, batch), dense(model, loss_fn, [batch])
    k = len(expected) if k == "all" else k
    values, vectors = A.eigsh(k)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected).flip(0)[:k], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(expected @ vectors, vectors * values, rtol=0, atol=1e-9)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=f"k is {len(expected) + 1}; expected an integer in 1..{len(expected)}"):
        A.eigsh(len(expected) + 1)


def test_solve(model_and_operator):
    _, A = model_and_operator
    b = random(A.shape[0], 2)
    expected = torch.linalg.solve(positive(A, 0.1), b)
    torch.testing.assert_close(A.solve(b, damping=0.1), expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(A.solve(b[:, 0], damping=0.1), expected[:, 0], rtol=1e-7, atol=1e-8)
    preconditioner = torch.diag(1 / (A.diagonal() + 0.1))
    torch.testing.assert_close(A.solve(b, damping=0.1, preconditioner=preconditioner), expected, rtol=1e-7, atol=1e-8)
    tree = {k: torch.ones_like(p) for k, p in A.parameters.items()}
    found = A.solve(tree, damping=0.1)
    assert {k: t.shape for k, t in found.items()} == {k: p.shape for k, p in A.parameters.items()}
    with pytest.raises(torch.linalg.LinAlgError, match="A is not positive definite: add damping"):
        (-1 * A).solve(b)


def test_a_negative_damping_may_make_it_indefinite(model_and_operator):
    _, A = model_and_operator
    with pytest.raises(torch.linalg.LinAlgError, match="add damping"):
        A.solve(random(A.shape[0]), damping=-100.0)


def test_what_products_alone_cannot_give(model_and_operator):
    _, A = model_and_operator
    for call, name in (
        (lambda: A.inverse(damping=1.0), "inverse"),
        (lambda: A.logdet(damping=1.0), "logdet"),
        (lambda: A.sqrt_matmul(random(A.shape[0])), "sqrt_matmul"),
    ):
        with pytest.raises(
            NotImplementedError, match=rf"GGN is known by its products alone, so it has no {name}.*Use solve"
        ):
            call()


def test_scipy_sees_double_precision(model_and_operator):
    from scipy.sparse.linalg import eigsh

    _, A = model_and_operator
    S = A.to_scipy()
    dense = A.to_dense().numpy()
    v = random(A.shape[0], 2).numpy()
    np.testing.assert_allclose(S @ v, dense @ v, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(S.T @ v[:, 0], dense @ v[:, 0], rtol=1e-10, atol=1e-12)
    assert (S @ v[:, 0]).dtype == np.float64
    values = eigsh(S, 3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values)[::-1], A.eigsh(3)[0].numpy(), rtol=1e-8)
    model, loss_fn, (x, y) = problem()
    single = GGN(model.float(), loss_fn, (x.float(), y)).to_scipy()
    assert single.dtype == np.float64
    assert (single @ v).dtype == np.float64
    assert (single @ np.ones(A.shape[0], dtype=np.int64)).dtype == np.float64


def test_algebra():
    model, loss_fn, batch = problem()
    G, H = GGN(model, loss_fn, batch), Hessian(model, loss_fn, batch)
    A: LinearOperator = 2 * G + H * 0.5 + 0.1 * Identity(G.parameters)
    expected = 2 * G.to_dense() + 0.5 * H.to_dense() + 0.1 * torch.eye(A.shape[0], dtype=torch.float64)
    V = random(A.shape[0], 2)
    torch.testing.assert_close(A @ V, expected @ V, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(A.to_dense(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(A.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(A.quadratic_forms(V.T), (V * (expected @ V)).sum(0), rtol=1e-10, atol=1e-12)
    assert A.trace() == pytest.approx(expected.trace().item())
    off = (A.diagonal(samples=500) - expected.diagonal()).abs()
    assert (off <= 5 * torch.as_tensor(A.diagonal(samples=500).standard_error) + 1e-12).all()
    torch.testing.assert_close(A.eigsh(2)[0], torch.linalg.eigvalsh(expected).flip(0)[:2])
    with pytest.raises(NotImplementedError, match="GGN is known by its products alone, so it has no inverse"):
        A.inverse()
    with pytest.raises(TypeError):
        G + 1
    with pytest.raises(TypeError):
        G * "2"


def test_sums_need_the_same_parameters():
    G = GGN(*problem())
    other = GGN(*problem("mlp"))
    with pytest.raises(
        ValueError, match=r"the summed operators have the parameters .*; expected the same names and shapes"
    ):
        G + other


def test_differences_and_quotients():
    model, loss_fn, batch = problem()
    G, H = GGN(model, loss_fn, batch), Hessian(model, loss_fn, batch)
    dense, other, V = G.to_dense(), H.to_dense(), random(G.shape[0], 2)
    for A, expected in (
        (-G, -dense), (G - H, dense - other), (G / 2, dense / 2), (-(G - 3 * H) / 4, (3 * other - dense) / 4),
        (np.float32(2) * G, 2 * dense), (G * np.int64(3), 3 * dense),
    ):  # fmt: skip
        assert isinstance(A, LinearOperator)
        torch.testing.assert_close(A @ V, expected @ V, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(A.to_dense(), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(A.diagonal(), expected.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((-G).eigsh(1)[0], torch.linalg.eigvalsh(-dense)[-1:], atol=1e-12, rtol=1e-10)
    with pytest.raises(ValueError, match="the operator is divided by 0; expected a number other than 0"):
        G / 0
    for wrong in (lambda: G / "2", lambda: G - 1, lambda: 1 - G, lambda: 1 / G):
        with pytest.raises(TypeError):
            wrong()


def test_structure_survives_signs_and_quotients():
    one = Identity(GGN(*problem()).parameters)
    positive_definite = -(one / -2) - one / 4
    torch.testing.assert_close(positive_definite.logdet(), torch.tensor(0.25).double().log() * one.shape[0])
    torch.testing.assert_close(positive_definite.inverse().diagonal(), 4 * one.diagonal())
    torch.testing.assert_close((one / 4).sqrt_matmul(one.diagonal()), one.diagonal() / 2)


def test_products_of_operators():
    model, loss_fn, batch = problem()
    G, H = GGN(model, loss_fn, batch), Hessian(model, loss_fn, batch)
    dense, other, V = G.to_dense(), H.to_dense(), random(G.shape[0], 2)
    for P, expected in (
        (G @ H, dense @ other), ((G @ H).T, other @ dense), (-(G @ H) / 2, -dense @ other / 2),
        (G @ H @ G, dense @ other @ dense), (G @ (H @ G), dense @ other @ dense),
        ((G @ H) @ (H @ G), dense @ other @ other @ dense), (3 * (G @ (G - H)), 3 * dense @ (dense - other)),
    ):  # fmt: skip
        assert isinstance(P, Product)
        assert (P.shape, P.dtype, P.device.type) == (G.shape, torch.float64, "cpu")
        torch.testing.assert_close(P @ V, expected @ V, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(V.T @ P, V.T @ expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(V[:, 0] @ P, V[:, 0] @ expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(P.to_dense(), expected, rtol=1e-10, atol=1e-12)
        S, v = P.to_scipy(), V.numpy()
        for found, wanted in ((S @ v, expected @ V), (S.T @ v, expected.T @ V), (S.T @ v[:, 0], expected.T @ V[:, 0])):
            np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-10, atol=1e-12)
    trace = hutchinson_trace(G @ H, samples=1000, seed=0)
    assert abs(trace - (dense * other).sum().item()) < 5 * trace.standard_error
    assert not hasattr(G @ H, "eigsh")  # which is for symmetric matrices
    assert repr(G @ H) == f"{G!r} @ {H!r}"
    with pytest.raises(ValueError, match=r"the multiplied operators have the parameters .*; expected the same names"):
        G @ GGN(*problem("mlp"))


def test_vectors_from_the_left(model_and_operator):
    _, A = model_and_operator
    D, V = A.shape[0], random(3, A.shape[0])
    torch.testing.assert_close(V @ A, V @ A.to_dense(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(V[0] @ A, A @ V[0], rtol=0, atol=0)
    pieces = V[0].split([p.numel() for p in A.parameters.values()])
    v = {k: t.view_as(p) for (k, p), t in zip(A.parameters.items(), pieces, strict=True)}
    for k, expected in (A @ v).items():
        torch.testing.assert_close((v @ A)[k], expected, rtol=0, atol=0)
    torch.testing.assert_close(V @ (2 * A + A), 3 * (V @ A), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=rf"the directions are \(3, {D - 1}\); expected a tensor \[k, {D}\]"):
        V[:, 1:] @ A
    for product in (lambda v: v @ A, lambda v: A @ v):  # NumPy is no torch, from neither side
        with pytest.raises(ValueError, match="the vector is a ndarray; expected a tensor"):
            product(V[0].numpy())
