"""What models and data may be: half precision, complex inside, sparse, saturated, callables, forces; any targets."""

import copy

import pytest
import torch
import torch.nn.functional as F
from posteriors.dense import close
from torch import nn
from torch.utils.data import TensorDataset

import paraboloid as pb

F64 = torch.float64
CE = nn.CrossEntropyLoss()
STRUCTURES = ["full", "diag", "kron", "ekfac", "lowrank", "functional"]


def data():
    torch.manual_seed(1)
    return torch.randn(8, 4), torch.arange(8) % 3


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_a_float32_posterior(structure, dtype, tmp_path):
    x, y = data()
    half = net().to(dtype)
    wide = copy.deepcopy(half).float()
    posterior = pb.laplace(half, CE, (x.to(dtype), y), structure)
    expected = pb.laplace(wide, CE, (x.to(dtype).float(), y), structure)
    for link in ("probit", "mc", "weights"):
        close(
            posterior.predict(x.to(dtype), link, samples=5),
            expected.predict(x.to(dtype).float(), link, samples=5),
            1e-5,
        )
    close(posterior.log_evidence(), expected.log_evidence(), 1e-5)
    assert posterior.sample(2)["0.bias"].dtype == torch.float32
    assert all(p.dtype == dtype for p in half.parameters())
    posterior.save(tmp_path / "p.pt")
    assert torch.equal(
        pb.load_posterior(tmp_path / "p.pt", half, CE).predict(x.to(dtype)), posterior.predict(x.to(dtype))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_operators_that_factorise(dtype):
    x, y = data()
    half = net().to(dtype)
    wide, given, v = copy.deepcopy(half).float(), (x.to(dtype), y), torch.ones(38 + 5)
    uses = {
        "blocks": lambda m, b: pb.GGN(m, CE, b, blocks="layer").inverse(1e-1) @ v,
        "eigsh": lambda m, b: pb.GGN(m, CE, b).eigsh(2)[0],
        "solve": lambda m, b: pb.GGN(m, CE, b).solve(v, damping=0.1),
        "low rank": lambda m, b: pb.operators.LowRank.from_operator(pb.GGN(m, CE, b), 3).logdet(1.0),
        "kfac": lambda m, b: pb.KFLR(m, CE, b).inverse(1e-1) @ v, "ekfac": lambda m, b: pb.EKFAC(m, CE, b).logdet(1.0),
        "quadratic": lambda m, b: pb.quadratic(m, CE, b).along(torch.eye(43)[:3])[1],
    }  # fmt: skip
    for name, use in uses.items():
        found, expected = use(half, given), use(wide, (x.to(dtype).float(), y))
        assert found.dtype == torch.float32, name
        assert (found - expected).norm() <= 0.1 * expected.norm(), name


class Fourier(nn.Module):
    """A convolution by way of complex numbers."""

    def __init__(self):
        super().__init__()
        self.scale, self.kernel, self.head = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4)), nn.Linear(8, 3)

    def forward(self, x):
        spectrum = torch.fft.rfft(self.kernel, n=8) * torch.fft.rfft(x, n=8) * self.scale
        return self.head(torch.fft.irfft(spectrum, n=8))


@pytest.mark.filterwarnings("ignore:.* has no rule for these arguments")
@pytest.mark.parametrize("structure", ["full", "diag", "functional"])
def test_complex_numbers_between_real_parameters(structure):
    torch.manual_seed(0)
    model, (x, y) = Fourier().double(), data()
    x = x.double()
    f, params = model(x), list(model.parameters())
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in f.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(8, 3, -1)
    p = f.softmax(1).detach()
    H = torch.einsum("nkd,nkl,nle->de", J, p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1), J)
    H = H.diagonal().diag() if structure == "diag" else H
    close(pb.laplace(model, CE, (x, y), structure).functional(x)[1], J @ torch.linalg.inv(H + torch.eye(len(H))) @ J.mT)


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=F64))

    def forward(self, x):
        return torch.sparse.mm(x, self.weight) if x.is_sparse else x @ self.weight


class Words(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        self.words, self.head = nn.Embedding(6, 3, sparse=sparse), nn.Linear(3, 3)

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids)).mean(1))


@pytest.mark.filterwarnings("ignore:.* has no rule for these arguments")
def test_sparse_inputs_and_sparse_gradients():
    torch.manual_seed(0)
    x, y = data()[0].double(), data()[1]
    model = Sparse()
    for use in (
        lambda x: pb.GGN(model, CE, (x, y)).to_dense(), lambda x: pb.Hessian(model, CE, (x, y)).to_dense(),
        lambda x: pb.laplace(model, CE, (x, y), "full").predict(x),
        lambda x: pb.laplace(model, CE, [(x, y), (x, y)], "diag").tune_prior(match=None).predict(x),
    ):  # fmt: skip
        close(use(x.to_sparse()), use(x), 1e-7)
    one, other = Words(True).double(), Words(False).double()
    other.load_state_dict(one.state_dict())
    ids = torch.arange(32).view(8, 4) ** 2 % 6
    for use in (
        lambda m: pb.GGN(m, CE, (ids, y)) @ torch.ones(30, dtype=F64), lambda m: pb.Hessian(m, CE, (ids, y)).to_dense(),
        lambda m: pb.KFLR(m, CE, (ids, y)).to_dense(), lambda m: pb.quadratic(m, CE, (ids, y)).gradient["words.weight"],
        lambda m: pb.statistics(m, CE, (ids, y), "variance")["variance"]["words.weight"],
        lambda m: pb.laplace(m, CE, (ids, y)).tune_prior(match=None).predict(ids),
        lambda m: pb.laplace(m, CE, (ids, y), "lowrank").predict(ids),
    ):  # fmt: skip
        close(use(one), use(other), 1e-7)


def test_targets_of_several_tensors_and_of_small_integers():
    torch.manual_seed(0)
    model, (x, y) = net().double(), data()
    x = x.double()

    def loss(f, t):
        a, b = t.values() if isinstance(t, dict) else t
        return F.cross_entropy(f, a) + 0.1 * F.cross_entropy(f, b)

    targets = {"a": y, "b": y.flip(0)}
    for Operator in (pb.Hessian, pb.GGN, pb.EmpiricalFisher):
        if Operator is pb.EmpiricalFisher:
            g = torch.stack([torch.cat([t.flatten() for t in torch.autograd.grad(
                loss(model(x[n : n + 1]), (y[n : n + 1], y.flip(0)[n : n + 1])), list(model.parameters())
            )]) for n in range(8)])  # fmt: skip
            expected = g.T @ g / 8
        else:
            expected = Operator(model, lambda f, _: loss(f, targets), (x, y)).to_dense()
        for t in (targets, tuple(targets.values()), list(targets.values())):
            close(Operator(model, loss, (x, t)).to_dense(), expected)
    small = pb.laplace(model, CE, (x, y.to(torch.uint8)))
    close(small.predict(x), pb.laplace(model, CE, (x, y)).predict(x))
    ignored = torch.full((8,), -100)
    for structure in STRUCTURES:
        both = pb.laplace(model, CE, [(x, y), (x, ignored)], structure)
        alone = pb.laplace(model, CE, (x, y), structure)
        if structure not in ("kron", "ekfac"):  # whose input factors average over all inputs
            close(both.functional(x)[1], alone.functional(x)[1], 1e-7)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_saturated_networks_in_float32(structure):
    """Logits so large that rounding makes the linearised model's curvature indefinite."""
    model, (x, y) = net(), data()
    model[2].weight.data.mul_(1000)
    posterior = pb.laplace(model, CE, (x, y), structure).tune_prior("adapted", match=None)
    assert posterior.predict(x).isfinite().all()
    assert posterior.log_evidence().isfinite()


class Callable:
    """Nothing but a call and its parameters."""

    def __init__(self, inner):
        self.inner = inner

    def named_parameters(self):
        return self.inner.named_parameters()

    def __call__(self, x):
        return self.inner(x)


def test_callables_with_parameters(tmp_path):
    inner, (x, y) = net().double(), data()
    x = x.double()
    model, batch = Callable(inner), (x, y)

    def saved(m):
        pb.laplace(m, CE, batch).save(tmp_path / "p.pt")
        return pb.load_posterior(tmp_path / "p.pt", m, CE).predict(x)

    uses = [
        lambda m: pb.statistics(m, CE, batch, ["diag_hessian"])["diag_hessian"]["0.weight"],
        *(lambda m, O=O: O(m, CE, batch).to_dense() for O in (pb.GGN, pb.Hessian, pb.Fisher, pb.KFAC, pb.EKFAC, pb.PCH)),
        *(lambda m, s=s: pb.laplace(m, CE, batch, s).tune_prior("adapted", match=None).predict(x) for s in STRUCTURES),
        lambda m: pb.laplace(m, CE, batch, weights="last_layer").predict(x, "weights", samples=3),
        lambda m: pb.laplace(m, CE, [batch, batch]).match_confidence().predict(x),
        lambda m: pb.quadratic(m, CE, batch, "kfac").eigen_directions(2), saved,
        lambda m: pb.operators.load(pb.KFAC(m, CE, batch).state_dict(), m).to_dense(),
        lambda m: torch.as_tensor(pb.bias(m, CE, TensorDataset(x, y), batch_size=3, k=2, repeats=2).curvature["other"]),
    ]  # fmt: skip
    before = [p.data_ptr() for p in inner.parameters()]
    for use in uses:
        close(use(model), use(inner))
    assert [p.data_ptr() for p in inner.parameters()] == before
    with pytest.raises(ValueError, match=r"the model is a Callable, a callable without hooks, .*HessianFree takes"):
        pb.optim.KFAC(model, CE)
    step = copy.deepcopy(inner)
    value = pb.optim.HessianFree(Callable(step), CE, max_iterations=2).step(batch)
    assert CE(step(x), y) < value


class Forces(nn.Module):
    """The negative gradient of an energy, made without regard to the mode that it is called in."""

    def __init__(self):
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return -g


@pytest.mark.filterwarnings("ignore:parameter .* is used by an operation that could not be recorded")
def test_models_whose_forward_pass_differentiates():
    torch.manual_seed(0)
    model, loss_fn = Forces().double(), nn.MSELoss()
    x, y = torch.randn(6, 3, dtype=F64), torch.randn(6, 3, dtype=F64)
    posterior = pb.laplace(model, loss_fn, (x, y), "full")
    f, params = model(x), list(model.parameters())
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True)])
                     for e in f.flatten()])  # fmt: skip
    Sigma = torch.linalg.inv(J.T @ J + torch.eye(J.shape[1], dtype=F64))
    close(posterior.functional(x)[1], J.view(6, 3, -1) @ Sigma @ J.view(6, 3, -1).mT)
    spread = posterior.predict(x, "weights", samples=50).model_variance
    assert spread.isfinite().all() and (spread > 0).any()
    trained = copy.deepcopy(model)
    value = pb.optim.HessianFree(trained, loss_fn).step((x, y))
    assert loss_fn(trained(x), y) < value
    clusters = pb.noise.GradientClustering(model, loss_fn, num_clusters=2, seed=0).fit(TensorDataset(x, y), passes=1)
    losses = pb.noise.suspicion(clusters, TensorDataset(x, y), "loss")
    close(losses, (f - y).square().sum(1).detach())


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_predictions_of_probabilities_and_of_log_probabilities(structure):
    """The linearised logits of a sigmoid, and a softmax's up to what all of them share."""
    torch.manual_seed(0)
    x, y = data()[0].double(), torch.rand(8, 3, dtype=F64).round()
    core = net().double()
    sigmoid = pb.laplace(nn.Sequential(core, nn.Sigmoid()), nn.BCELoss(), (x, y), structure)
    z, v = core(x).detach(), sigmoid.functional(x, diagonal=True)[1]
    p = z.sigmoid()
    close(sigmoid.predict(x), (z / (1 + torch.pi / 8 * v / (p * (1 - p)) ** 2).sqrt()).sigmoid(), 1e-7)
    for link in ("mc", "weights"):
        found = sigmoid.predict(x, link, samples=200)
        assert ((found >= 0) & (found <= 1)).all()
    soft = y + 0.1
    soft = soft / soft.sum(1, keepdim=True)
    logs = pb.laplace(nn.Sequential(core, nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean"), (x, soft), structure)
    f, v = z.log_softmax(1), logs.functional(x, diagonal=True)[1]
    close(logs.predict(x), (f / (1 + torch.pi / 8 * v).sqrt()).softmax(1))
    close(logs.predict(x, "mc", samples=20).sum(1), torch.ones(8, dtype=F64))
    for posterior, target in ((sigmoid, y), (logs, soft)):
        posterior.tune_prior("grid", validation=(x, target), grid=[1.0], match=None)


def test_a_default_device_that_is_not_the_models(monkeypatch):
    model, (x, y) = net().double(), data()
    x = x.double()
    expected = {s: pb.laplace(model, CE, (x, y), s).tune_prior().predict(x) for s in ("kron", "functional")}
    kfac = pb.KFAC(model, CE, (x, y)).inverse(0.1).to_dense()
    torch.set_default_device("meta")
    try:
        for structure, value in expected.items():
            close(pb.laplace(model, CE, (x, y), structure).tune_prior().predict(x), value)
        close(pb.KFAC(model, CE, (x, y)).inverse(0.1).to_dense(), kfac)
        for Operator in (pb.GGN, pb.Hessian, pb.Fisher, pb.EKFAC, pb.DiagonalGGN):
            assert Operator(model, CE, (x, y)).eigsh(2)[0].device.type == "cpu"
        pb.statistics(model, CE, (x, y), ["variance", "kfac", "diag_hessian", "sqrt_ggn", "gram"])
    finally:
        torch.set_default_device(None)
