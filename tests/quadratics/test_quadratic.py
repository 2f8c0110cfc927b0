"""The quadratic model: value, gradient and curvature with weight decay, directions, and steps along them."""

import pytest
import torch
from operators.oracle import classes, dense_ggn, dense_hessian, gradient, make_inputs, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paraboloid import linalg
from paraboloid.operators import EKFAC, GGN, KFAC, Hessian, Identity
from paraboloid.quadratics.local_model import quadratic

CE = nn.CrossEntropyLoss()
BETA = 0.03
DENSE = {"ggn": dense_ggn, "hessian": dense_hessian}


def batch(n, seed, name="mlp"):
    return make_inputs(name, n, seed), classes(n, seed)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(model, batches, curvature, beta):
    """(value, gradient, curvature) in plain view."""
    f = torch.cat([model(x) for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    theta = flat(model)
    C = DENSE[curvature](model, CE, batches) + beta * torch.eye(len(theta), dtype=torch.float64)
    return CE(f, y).detach() + beta / 2 * theta @ theta, gradient(model, CE, batches) + beta * theta, C


@pytest.fixture(params=["ggn", "hessian"])
def kind(request):
    return request.param


@pytest.fixture(params=[0.0, BETA])
def beta(request):
    return request.param


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("name", ["mlp", "partly"])
def test_everything_includes_weight_decay(kind, beta, memory, name):
    model, batches = make_model(name), [batch(5, 1), batch(3, 2)]
    q = quadratic(model, CE, batches, curvature=kind, weight_decay=beta, max_memory=memory)
    value, g, C = reference(model, batches, kind, beta)
    assert q.value.shape == ()
    torch.testing.assert_close(q.value, value, rtol=1e-12, atol=0)
    assert {k: t.shape for k, t in q.gradient.items()} == {
        k: p.shape for k, p in model.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in q.gradient.values()]), g, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(q.curvature.to_dense(), C, rtol=1e-10, atol=1e-12)
    step = random(len(g))
    expected = value + g @ step + step @ C @ step / 2
    torch.testing.assert_close(q(step), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(q(tree(step, q.gradient)), expected, rtol=1e-10, atol=0)
    D = random(3, len(g), seed=1)  # of any length: the values are those per unit step
    U = D / D.norm(dim=1, keepdim=True)
    slopes, curvatures = q.along(D)
    torch.testing.assert_close(slopes, U @ g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(curvatures, (U @ C * U).sum(1), rtol=1e-10, atol=1e-12)


def tree(vector, like):
    pieces = vector.split([t.numel() for t in like.values()])
    return {k: piece.view_as(t) for (k, t), piece in zip(like.items(), pieces, strict=True)}


def test_it_predicts_the_loss_nearby():
    """The Hessian's quadratic is off by the third order: an eighth for half the step."""
    model, data = make_model("mlp"), batch(8, 0)
    q = quadratic(model, CE, data, curvature="hessian", weight_decay=BETA)
    d = random(len(flat(model)))
    d /= d.norm()

    def loss(step):
        shifted = {
            k: p + s for (k, p), s in zip(model.named_parameters(), tree(step, q.gradient).values(), strict=True)
        }
        f = torch.func.functional_call(model, shifted, data[0])
        return CE(f, data[1]) + BETA / 2 * (flat(model) + step).square().sum()

    errors = [(q(t * d) - loss(t * d)).abs().item() for t in (0.02, 0.01)]
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)


def test_a_loader_is_one_batch():
    model, (x, y) = make_model("mlp"), batch(9, 0)
    whole, loader = (
        quadratic(model, CE, data, weight_decay=BETA)
        for data in ((x, y), DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True))
    )
    torch.testing.assert_close(loader.value, whole.value)
    torch.testing.assert_close(loader.gradient, whole.gradient)
    torch.testing.assert_close(loader.curvature.to_dense(), whole.curvature.to_dense())


def test_an_operator_is_a_curvature():
    model, data, other = make_model("mlp"), batch(6, 0), batch(4, 1)
    q = quadratic(model, CE, data, curvature=Hessian(model, CE, other), weight_decay=BETA)
    value, g, _ = reference(model, [data], "ggn", BETA)
    torch.testing.assert_close(q.value, value)
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in q.gradient.values()]), g)
    expected = reference(model, [other], "hessian", BETA)[2]
    torch.testing.assert_close(q.curvature.to_dense(), expected)


def test_precision_follows_the_model():
    model, (x, y) = make_model("mlp").float(), batch(6, 0)
    q = quadratic(model, CE, (x.float(), y), weight_decay=BETA)
    step = q.step_along(q.eigen_directions(3))
    assert {t.dtype for t in (q.value, q(step), step, *q.along(q.eigen_directions(2)))} == {torch.float32}


# --- directions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, "all"])
def test_eigen_directions(kind, beta, k):
    model, data = make_model("mlp"), batch(8, 0)
    q = quadratic(model, CE, data, curvature=kind, weight_decay=beta)
    C = reference(model, [data], kind, beta)[2]
    k = len(C) if k == "all" else k
    U = q.eigen_directions(k)
    assert U.shape == (k, len(C))
    torch.testing.assert_close(U @ U.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(q.along(U)[1], torch.linalg.eigvalsh(C).flip(0)[:k], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [1, 2, 5, 12, "all"])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_step_along_conjugate_directions_is_the_cg_iterate(k, damping):
    model, data = make_model("mlp"), batch(8, 0)
    q = quadratic(model, CE, data, weight_decay=BETA)
    _, g, C = reference(model, [data], "ggn", BETA + damping)
    k = len(g) if k == "all" else k
    D = q.conjugate_directions(k, damping=damping)
    assert D.shape == (k, len(g))
    torch.testing.assert_close(D.norm(dim=1), torch.ones(k, dtype=torch.float64))
    products = D @ C @ D.T
    scale = products.diagonal().sqrt()
    off = products / scale / scale[:, None] - torch.eye(k, dtype=torch.float64)
    assert off.abs().max() < 1e-7  # conjugate
    g = reference(model, [data], "ggn", BETA)[1]
    expected = linalg.cg(C, -g, tol=0, max_iterations=k) if k < len(g) else torch.linalg.solve(C, -g)
    found = q.step_along(D, damping=damping)
    assert (found - expected).norm() <= 1e-8 * expected.norm()


def test_conjugate_directions_of_a_hessian_pass_negative_curvature():
    model, data = make_model("mlp"), batch(8, 0)
    q = quadratic(model, CE, data, curvature="hessian")
    C = dense_hessian(model, CE, [data])
    assert torch.linalg.eigvalsh(C)[0] < 0
    D = q.conjugate_directions(6)
    products = D @ C @ D.T
    assert (products - products.diagonal().diag()).abs().max() < 1e-8 * C.norm()


def test_conjugate_directions_span_the_space_though_the_residual_vanishes():
    """One sample: the GGN has rank two, so CG is done after two iterations; slopes vanish along the rest."""
    model, data = make_model("mlp"), batch(1, 0)
    q = quadratic(model, CE, data)
    D = q.conjugate_directions(57)
    assert torch.linalg.matrix_rank(D) == 57
    slopes, curvatures = q.along(D)
    assert slopes[2:].abs().max() < 1e-10
    assert curvatures[2:].abs().max() < 1e-10
    assert torch.equal(D, q.conjugate_directions(57))
    zero = quadratic(make_model("mlp"), nn.MSELoss(), (data[0], make_model("mlp")(data[0]).detach()))  # no gradient
    torch.testing.assert_close(zero.conjugate_directions(3).norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_a_step_with_another_batch_is_debiased():
    model, first, second = make_model("mlp"), batch(8, 0), batch(8, 1)
    one, other = (quadratic(model, CE, data, weight_decay=BETA) for data in (first, second))
    D = one.conjugate_directions(4, damping=0.1)
    _, g, C = reference(model, [second], "ggn", BETA)
    expected = sum(-(d @ g) / (d @ C @ d + 0.1) * d for d in D)
    torch.testing.assert_close(other.step_along(D, damping=0.1), expected, rtol=1e-10, atol=1e-12)


def test_a_step_does_not_depend_on_the_directions_lengths():
    q = quadratic(make_model("mlp"), CE, batch(8, 0), weight_decay=BETA)
    D = q.eigen_directions(3)
    lengths = torch.tensor([[2.0], [-0.5], [10.0]], dtype=torch.float64)
    torch.testing.assert_close(q.step_along(lengths * D, damping=0.1), q.step_along(D, damping=0.1))
    slopes, curvatures = q.along(lengths * D)
    torch.testing.assert_close(slopes, lengths[:, 0].sign() * q.along(D)[0])
    torch.testing.assert_close(curvatures, q.along(D)[1])
    D[1] = 0
    for use in (q.along, q.step_along):
        with pytest.raises(ValueError, match=r"direction 1 has the length 0; expected one above 0"):
            use(D)


# --- errors ------------------------------------------------------------------------------------------------------


def test_flat_directions_need_damping():
    model = make_model("partly")
    q = quadratic(model, CE, batch(4, 0))
    unused = torch.zeros(2, q.curvature.shape[0], dtype=torch.float64)
    unused[0, -1] = unused[1, 0] = 1  # `unused` is the first parameter
    with pytest.raises(ValueError, match=r"the curvature \+ damping is 0 along direction 1; .*Give a damping above 0"):
        q.step_along(unused)
    q.step_along(unused, damping=1.0)


@pytest.mark.parametrize("k", [0, 58, 2.0])
def test_numbers_of_directions(k):
    q = quadratic(make_model("mlp"), CE, batch(4, 0))
    for directions in (q.eigen_directions, q.conjugate_directions):
        with pytest.raises(ValueError, match=rf"k is {k}; expected an integer in 1\.\.57"):
            directions(k)


def test_bad_arguments():
    model, data = make_model("mlp"), batch(4, 0)
    with pytest.raises(
        ValueError, match=r"curvature is 'newton'; expected one of \['ggn', 'hessian', 'fisher', 'kfac', 'ekfac'\] or a"
    ):
        quadratic(model, CE, data, curvature="newton")
    with pytest.raises(ValueError, match="weight_decay is -1; expected a number of at least 0"):
        quadratic(model, CE, data, weight_decay=-1)
    with pytest.raises(ValueError, match="weight_decay is nan"):
        quadratic(model, CE, data, weight_decay=float("nan"))
    with pytest.raises(ValueError, match=r"the curvature has the parameters .*; expected those of the model"):
        quadratic(model, CE, data, curvature=Identity({"w": torch.zeros(3)}))
    q = quadratic(model, CE, data)
    with pytest.raises(ValueError, match=r"the directions are \(57,\); expected a tensor \[k, 57\]"):
        q.along(torch.zeros(57))
    with pytest.raises(ValueError, match=r"the step has shape \(57, 1\); expected \[57\], or a dict"):
        q(torch.zeros(57, 1))
    with pytest.raises(ValueError, match="the vector has shape"):
        q(torch.zeros(3))


def test_graphs_are_shared_by_gradient_and_curvature():
    """One reading of the data gives value, gradient and curvature."""
    reads = []

    class Data:
        def __iter__(self):
            reads.append(1)
            return iter([batch(4, 0)])

    q = quadratic(make_model("mlp"), CE, Data())
    q.along(q.eigen_directions(2))
    assert reads == [1]
    assert isinstance(q.curvature, GGN)


# --- Kronecker directions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher", "kfac", "ekfac"])
def test_kron_directions_are_rank_one_within_a_parameter_and_ordered(curvature, corrected):
    model, data = make_model("mlp"), batch(7, 3)
    q = quadratic(model, CE, data, curvature=curvature, weight_decay=BETA)
    rows = q.kron_directions(57, corrected)
    torch.testing.assert_close(rows @ rows.T, torch.eye(57, dtype=torch.float64), rtol=0, atol=1e-12)
    fisher = "exact" if curvature in ("ggn", "hessian") else "mc"
    expected = (EKFAC if corrected else KFAC)(model, CE, data, fisher=fisher).to_dense()
    values = torch.stack([d @ expected @ d for d in rows])
    torch.testing.assert_close(values, torch.linalg.eigvalsh(expected).flip(0), rtol=1e-9, atol=1e-12)
    sizes = [p.numel() for p in model.parameters()]
    for d in rows:
        parts = [(part, p) for part, p in zip(d.split(sizes), model.parameters(), strict=True) if part.norm() > 1e-9]
        assert len(parts) == 1
        part, p = parts[0]
        if p.dim() == 2:
            assert torch.linalg.svdvals(part.view(p.shape))[1:].max() < 1e-9


@pytest.mark.parametrize("name, Operator", [("kfac", KFAC), ("ekfac", EKFAC)])
def test_structured_curvatures_are_those_operators_with_weight_decay(name, Operator):
    model, data = make_model("mlp"), batch(7, 3)
    q = quadratic(model, CE, data, curvature=name, weight_decay=BETA, seed=5)
    C = Operator(model, CE, data, seed=5).to_dense() + BETA * torch.eye(57, dtype=torch.float64)
    torch.testing.assert_close(q.curvature.to_dense(), C, rtol=1e-10, atol=1e-14)
    curvatures = q.along(random(4, 57))[1]
    expected = torch.stack([d @ C @ d / (d @ d) for d in random(4, 57)])
    torch.testing.assert_close(curvatures, expected, rtol=1e-10, atol=1e-12)
    given = quadratic(model, CE, data, curvature=Operator(model, CE, data))
    assert given.kron_directions(3).shape == (3, 57)


@pytest.mark.parametrize("make", [KFAC, EKFAC])
def test_kron_directions_of_one_batch_with_the_eigenvalues_of_another(make):
    """KFAC's on batch 2 is (u.L2 u)(w.R2 w); EKFAC's, of all positions, mean_n (u.g_n w)^2 = u (x) w . GGN2 u (x) w."""
    model, first, second = make_model("mlp"), batch(7, 1), batch(9, 2)
    rows = quadratic(model, CE, first).kron_directions(57)
    C = make(model, CE, first, fisher="exact", measure_on=second)
    found = quadratic(model, CE, second, C).along(rows)[1]
    if make is EKFAC:
        expected = quadratic(model, CE, second).along(rows)[1]
    else:
        other = KFAC(model, CE, second, fisher="exact")
        expected = other.quadratic_forms(rows)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(C @ rows.T, rows.T * found, rtol=1e-9, atol=1e-10)  # they are its eigenvectors
    same = make(model, CE, first, fisher="exact", measure_on=first)
    torch.testing.assert_close(
        same.to_dense(), make(model, CE, first, fisher="exact").to_dense(), rtol=1e-9, atol=1e-12
    )


def test_an_operator_without_factors_has_no_kron_directions():
    model, data = make_model("mlp"), batch(7, 3)
    q = quadratic(model, CE, data, curvature=GGN(model, CE, data))
    with pytest.raises(ValueError, match="the curvature is a GGN given as an operator, which has no Kronecker factors"):
        q.kron_directions(2)
