"""The door of laplace-torch's shape: its values (of version 0.3, printed by it), and what it refuses with a sentence."""

import copy

import pytest
import torch
from posteriors.dense import close
from torch import nn

import paraboloid as pb
from paraboloid.posteriors import Laplace, largest_magnitude, largest_variance

F64 = torch.float64
# likelihood, subset, structure -> log marginal likelihood at precision 3, its derivative, the first probabilities (or
# covariances) of two inputs at 2, log likelihood, sum of the precisions after five steps of Adam
VALUES = {
    ("classification", "all", "full"): [-40.779995616, -8.5934779271, 0.1122991364, 0.6259647969, -12.6418185037, 0.3886539717],
    ("classification", "all", "diag"): [-41.2998484612, -8.3569064777, 0.1150756956, 0.6202456968, -12.6418185037, 0.4433018807],
    ("classification", "all", "kron"): [-41.0469529922, -8.4845213936, 0.1127302953, 0.6241526081, -12.6418185037, 1.7980331143],
    ("classification", "last_layer", "full"): [-27.4855799435, -4.2550889494, 0.0970101529, 0.66091206, -12.6418185037, 0.4001476563],
    ("classification", "last_layer", "diag"): [-27.9501375292, -4.0471404818, 0.1008443761, 0.6539647586, -12.6418185037, 0.6760931417],
    ("classification", "last_layer", "kron"): [-27.7040260857, -4.1700645849, 0.0991135357, 0.6566293016, -12.6418185037, 0.4231091266],
    ("regression", "all", "full"): [-84.9749392142, -5.8221355471, 0.1139396842, 0.0384219638, -58.1683639174, 0.4436745565],
    ("regression", "all", "diag"): [-92.0231129956, -4.0851897106, 0.3171378319, 0.1576093532, -58.1683639174, 1.767686738],
    ("regression", "all", "kron"): [-88.3122503255, -5.1361293232, 0.1859822209, 0.1023340663, -58.1683639174, 3.9915168768],
    ("regression", "last_layer", "full"): [-69.6760819666, -1.7461072742, 0.0934746784, 0.0, -58.1683639174, 1.0878528213],
    ("regression", "last_layer", "diag"): [-72.4939782864, -1.1249093726, 0.2387643888, 0.0, -58.1683639174, 2.2417953018],
    ("regression", "last_layer", "kron"): [-70.943967565, -1.5229708794, 0.1347913114, 0.0, -58.1683639174, 1.2082906721],
}  # fmt: skip


def problem(likelihood):
    classes = 3 if likelihood == "classification" else 2
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, classes)).double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(1.0, p.numel() + 1, dtype=F64) * (i + 1)).view_as(p))
    x = torch.cos(torch.arange(36.0, dtype=F64).view(12, 3) * 1.7)
    y = torch.arange(12) % 3 if classes == 3 else torch.sin(torch.arange(24.0, dtype=F64)).view(12, 2)
    return model, x, y


def batches(x, y):
    return list(zip(x.split(5), y.split(5), strict=True))


@pytest.mark.parametrize("case", VALUES, ids=" ".join)
def test_the_flagship_loop_has_laplace_torchs_values(case):
    likelihood, subset, structure = case
    model, x, y = problem(likelihood)
    options = {"sigma_noise": 0.7} if likelihood == "regression" else {}
    la = Laplace(model, likelihood, subset, structure, prior_precision=2.0, prior_mean=0.1, temperature=1.3, **options)
    la.fit(batches(x, y), progress_bar=False)
    precision = torch.tensor([3.0], dtype=F64, requires_grad=True)
    value = la.log_marginal_likelihood(precision)
    value.backward()
    la.prior_precision = 2.0
    found = la(x[:2])
    first = (found[1] if likelihood == "regression" else found).flatten()[:2]
    layerwise = structure == "kron" and subset == "all"
    la.optimize_prior_precision(
        pred_type="glm", method="marglik", n_steps=5, lr=0.2, prior_structure="layerwise" if layerwise else "scalar",
        verbose=False,
    )  # fmt: skip
    got = torch.stack([value.detach(), precision.grad[0], *first, la.log_likelihood, la.prior_precision.sum()])
    torch.testing.assert_close(got, torch.tensor(VALUES[case], dtype=F64), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "gp"])
def test_what_is_assigned_acts(structure):
    model, x, y = problem("regression")
    la = Laplace(model, "regression", "all", structure, sigma_noise=1.0).fit(batches(x, y))
    la.sigma_noise, la.temperature, la.prior_precision = 0.5, 2.0, torch.tensor([3.0], dtype=F64)
    other = Laplace(model, "regression", "all", structure, 0.5, 3.0, temperature=2.0).fit(batches(x, y))
    for found, expected in zip(la(x), other(x), strict=True):
        close(found, expected)
    close(la.log_marginal_likelihood(), other.log_marginal_likelihood())
    sigma = torch.tensor([0.6], dtype=F64, requires_grad=True)
    la.log_marginal_likelihood(sigma_noise=sigma).backward()
    step = 1e-5
    up, down = (float(other.log_marginal_likelihood(sigma_noise=0.6 + d)) for d in (step, -step))
    assert float(sigma.grad) == pytest.approx((up - down) / (2 * step), rel=1e-6)
    mean, covariance = la(x[:3], joint=True)
    assert (mean.shape, covariance.shape) == ((6,), (6, 6))
    close(covariance[2:4, 2:4], la(x[:3])[1][1])
    close(la(x[:3], diagonal_output=True)[1], la(x[:3])[1].diagonal(dim1=1, dim2=2))


def test_samples_and_draws():
    model, x, y = problem("classification")
    la = Laplace(model, "classification", "all", "full", prior_precision=5.0).fit(batches(x, y))
    generator = torch.Generator().manual_seed(3)
    first = la.sample(4, generator=generator)
    assert first.shape == (4, 31)
    assert not torch.equal(first, la.sample(4, generator=generator))
    f = la.functional_samples(x, n_samples=20_000, generator=generator)
    mean, covariance = la.posterior.functional(x)
    assert (f.mean(0) - mean).abs().max() < 0.05
    assert (torch.cov(f[:, 0].T) - covariance[0]).abs().max() < 0.05 * covariance[0].abs().max()
    p = la.predictive_samples(x, n_samples=50)
    close(p.sum(2), torch.ones_like(p[:, :, 0]))
    assert la.predictive_samples(x, pred_type="nn", n_samples=3).shape == (3, 12, 3)
    assert la(x, pred_type="nn", link_approx="mc", n_samples=3).shape == (12, 3)
    assert la(x, link_approx="mc", diagonal_output=True, n_samples=10).shape == (12, 3)
    H = la.posterior.curvature.to_dense()
    close(la.posterior_precision, H + 5 * torch.eye(31, dtype=F64))


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "lowrank", "gp"])
def test_states_are_loaded_bit_for_bit(structure):
    model, x, y = problem("classification")
    la = Laplace(model, "classification", "all", structure).fit(batches(x, y))
    la.prior_precision = 4.0
    other = Laplace(copy.deepcopy(model), "classification", "all", structure)
    other.load_state_dict(copy.deepcopy(la.state_dict()))
    assert torch.equal(other(x), la(x))
    assert other.prior_precision == 4.0
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[0].bias.add_(1)
    with pytest.raises(ValueError, match=r"have other values than those that the posterior was fitted"):
        Laplace(moved, "classification", "all", structure).load_state_dict(la.state_dict())


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("link", ["probit", "bridge", "bridge_norm"])
def test_predictions_are_differentiable_in_the_inputs(likelihood, link):
    model, x, y = problem(likelihood)
    la = Laplace(model, likelihood, "all", "kron", enable_backprop=True).fit(batches(x, y))
    at = x[:2].clone().requires_grad_()

    def value(at):
        found = la(at, link_approx=link)
        return found[1].diagonal(dim1=1, dim2=2).sum() if likelihood == "regression" else found[:, 0].log().sum()

    (g,) = torch.autograd.grad(value(at), at)
    step = torch.zeros_like(x[:2])
    step[1, 2] = 1e-5
    difference = (value(x[:2] + step) - value(x[:2] - step)).detach() / 2e-5
    torch.testing.assert_close(g[1, 2], difference, rtol=1e-6, atol=1e-9)
    plain = Laplace(model, likelihood, "all", "kron").fit(batches(x, y))(x[:2], link_approx=link)
    for a, b in zip(
        *((t if isinstance(t, tuple) else (t,)) for t in (la(x[:2], link_approx=link), plain)), strict=True
    ):
        close(a.detach(), b)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_subnetworks_of_single_weights(structure, likelihood, tmp_path):
    model, x, y = problem(likelihood)
    loss_fn = nn.CrossEntropyLoss() if likelihood == "classification" else nn.MSELoss()
    size = sum(p.numel() for p in model.parameters())
    at = torch.tensor([0, 3, 7, 13, 21])
    la = Laplace(model, likelihood, "subnetwork", structure, subnetwork_indices=at, prior_precision=2.0)
    la.fit(batches(x, y))
    whole = pb.laplace(model, loss_fn, (x, y), structure, prior_precision=2.0)
    H = whole.curvature.to_dense()[at][:, at]
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, unflat(model, w), (x,)), flat(model)
    )
    Sigma = torch.linalg.inv(H + 2 * torch.eye(5, dtype=F64))
    p = la.posterior
    close(p.functional(x)[1], J[..., at] @ Sigma @ J[..., at].mT)
    w = flat(model)[at]
    expected = p.log_likelihood() - (2 * w @ w + torch.logdet(H / 2 + torch.eye(5, dtype=F64))) / 2
    close(p.log_evidence(), expected)
    close(
        la.log_marginal_likelihood(),
        la.log_likelihood - (2 * w @ w + torch.logdet(H / 2 + torch.eye(5, dtype=F64))) / 2,
    )
    draws = la.sample(3)
    assert draws.shape == (3, size)
    moved = (draws != flat(model)).any(0).nonzero().flatten()
    assert torch.equal(moved, at)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[at] = True
    by_name = unflat(model, mask)
    for weights in (mask, at.flip(0), by_name, mask.numpy()):
        close(
            pb.laplace(model, loss_fn, (x, y), structure, weights, prior_precision=2.0).functional(x)[1],
            p.functional(x)[1],
        )
    p.save(tmp_path / "p.pt")
    assert torch.equal(pb.load_posterior(tmp_path / "p.pt", model, loss_fn).functional(x)[1], p.functional(x)[1])
    for method in ("evidence", "adapted"):
        tuned = pb.laplace(model, loss_fn, (x, y), structure, at).tune_prior(method, match=None, noise=False)
        assert 1e-6 < tuned.prior_precision < 1e6
    log = (
        torch.tensor(p.tune_prior("evidence", steps=1000, match=None, noise=False).prior_precision, dtype=F64)
        .log()
        .requires_grad_()
    )
    (slope,) = torch.autograd.grad(p.log_evidence(log.exp()), log)
    assert abs(slope) < 1e-4
    twice = pb.laplace(model, loss_fn, (x[:5], y[:5]), structure, at, prior_precision=2.0).update((x[5:], y[5:]))
    twice.prior_precision = p.prior_precision
    close(twice.functional(x)[1], p.functional(x)[1])


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def unflat(model, w):
    named = dict(model.named_parameters())
    return {
        k: t.view_as(p) for (k, p), t in zip(named.items(), w.split([p.numel() for p in named.values()]), strict=True)
    }


def test_the_largest_weights():
    model, x, y = problem("classification")
    at = largest_magnitude(model, 4)
    assert flat(model).abs()[at].min() >= flat(model).abs().sort(descending=True).values[3]
    diagonal = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "diag")
    variances = diagonal.precision().variances()
    assert variances[largest_variance(diagonal, 4)].min() == variances.sort(descending=True).values[3]
    with pytest.raises(ValueError, match=r"k is 40; expected an integer in 1..31"):
        largest_magnitude(model, 40)
    last = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "diag", "last_layer")
    with pytest.raises(ValueError, match=r"over 15 of the model's 31 weights; expected one over all"):
        largest_variance(last, 4)


@pytest.mark.parametrize("weights, message", [
    (torch.tensor([0, 31]), r"expected different int64 numbers in 0..30"),
    (torch.tensor([0, 0]), r"expected different int64 numbers"), (torch.tensor([0.5]), r"expected different int64"),
    (torch.zeros(31, dtype=torch.bool), "chooses none of the weights"),
    (torch.ones(30, dtype=torch.bool), r"the mask has shape \(30,\); expected \[31\]"),
    ({"0.bias": torch.ones(3, dtype=torch.bool)}, r"the mask of '0.bias' is torch.bool of shape \(3,\); expected"),
    ({"bias": torch.ones(4, dtype=torch.bool)}, r"weights has masks of \['bias'\]"),
])  # fmt: skip
def test_wrong_masks(weights, message):
    model, x, y = problem("classification")
    with pytest.raises(ValueError, match=message):
        pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "full", weights)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_the_full_hessian(structure, likelihood):
    model, x, y = problem(likelihood)
    loss = nn.CrossEntropyLoss(reduction="sum") if likelihood == "classification" else nn.MSELoss(reduction="sum")
    half = 1.0 if likelihood == "classification" else 0.5
    w = flat(model)
    f = lambda w: half * loss(torch.func.functional_call(model, unflat(model, w), (x,)), y)  # noqa: E731
    H = torch.autograd.functional.hessian(f, w)
    H = H if structure == "full" else H.diagonal().diag()
    la = Laplace(model, likelihood, "all", structure, prior_precision=50.0, backend="CurvlinopsHessian").fit(
        batches(x, y)
    )
    close(la.posterior.curvature.to_dense(), H)
    eye = torch.eye(len(w), dtype=F64)
    close(la.posterior.precision().apply(eye), torch.linalg.inv(H + 50 * eye))
    assert la.posterior.count == 12
    if structure == "full":
        la.prior_precision = 1e-6
        with pytest.raises(RuntimeError, match=r"has no Cholesky factor .* Increase prior_precision"):
            la(x)
    with pytest.raises(ValueError, match=r"fisher is 'hessian' with structure='kron' and curvature='ggn'; expected"):
        pb.laplace(model, nn.CrossEntropyLoss(), (x, y), fisher="hessian")


def test_backends_and_last_layers_by_name():
    model, x, y = problem("classification")

    class AsdlEF:
        """What a backend of laplace-torch is known by."""

    def fitted(**options):
        return Laplace(model, "classification", "all", "diag", **options).fit(batches(x, y)).posterior

    ce = nn.CrossEntropyLoss()
    close(
        fitted(backend=AsdlEF).functional(x)[1],
        pb.laplace(model, ce, (x, y), "diag", fisher="empirical").functional(x)[1],
    )
    sampled = fitted(backend="CurvlinopsGGN", backend_kwargs={"stochastic": True, "num_samples": 5})
    assert (sampled.options["fisher"], sampled.options["samples"]) == ("mc", 5)
    named = Laplace(model, "classification", "last_layer", last_layer_name="0").fit(batches(x, y)).posterior
    assert list(named.weights) == ["0.weight", "0.bias"]


class Keyed(nn.Module):
    """Takes its batch as one dictionary."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, batch):
        return self.inner(batch["x"])


def test_batches_that_are_dictionaries_are_the_models_one_argument():
    model, x, y = problem("classification")
    loader = [{"x": a, "y": b} for a, b in batches(x, y)]
    la = Laplace(Keyed(model), "classification", "all", "diag", dict_key_y="y").fit(loader)
    close(la({"x": x}), Laplace(model, "classification", "all", "diag").fit(batches(x, y))(x))
    with pytest.raises(
        ValueError, match=r"a batch has the keys \['x', 'y'\]; expected the targets under dict_key_y='l"
    ):
        Laplace(Keyed(model), "classification", "all", "diag").fit(loader)


def test_grids():
    model, x, y = problem("classification")
    la = Laplace(model, "classification", "all", "diag").fit(batches(x, y))
    la.optimize_prior_precision(method="gridsearch", val_loader=batches(x, y), grid_size=5, log_prior_prec_min=-2,
                                log_prior_prec_max=2)  # fmt: skip
    scores = []
    for value in 10.0 ** torch.linspace(-2, 2, 5):
        la.posterior.prior_precision = value.item()
        scores.append(nn.functional.nll_loss(la(x).log(), y).item())
    assert la.prior_precision == pytest.approx(10.0 ** (-2 + min(range(5), key=scores.__getitem__)))
    la.optimize_prior_precision(method="gridsearch", val_loader=batches(x, y), grid_size=3, loss=lambda p, y: p.max())
    assert la.prior_precision == pytest.approx(1e-4)  # the least sure
    model, x, y = problem("regression")
    la = Laplace(model, "regression", "all", "diag").fit(batches(x, y))
    la.optimize_prior_precision(method="gridsearch", val_loader=batches(x, y), grid_size=3,
                                loss=lambda mean, variance, y: -variance.mean())  # fmt: skip
    assert la.prior_precision == pytest.approx(1e-4)
    la.optimize_prior_precision(method="gridsearch", val_loader=batches(x, y), grid_size=3)


@pytest.mark.parametrize("options, message", [
    ({"feature_reduction": "average"}, "feature_reduction='average' has no meaning here; expected nothing: the model's"),
    ({"asdl_fisher_kwargs": {}}, "asdl_fisher_kwargs={} has no meaning here; expected fisher='mc'"),
    ({"functional_approximation": "nystrom"}, "functional_approximation='nystrom' has no meaning here; expected hess"),
    ({"colour": 1}, "colour=1 has no meaning here; expected an option of pb.laplace"),
    ({"sigma_noise": 2.0}, "sigma_noise is 2.0 with a classification; expected 1"),
    ({"backend": "Magic"}, "backend is 'Magic'; expected a name that ends in GGN, EF or Hessian"),
    ({"backend_kwargs": {"mode": 1}}, r"backend_kwargs has \['mode'\]; expected stochastic and num_samples"),
    ({"subnetwork_indices": torch.tensor([1])}, "subset_of_weights is 'last_layer' and subnetwork_indices Tensor"),
    ({"subset_of_weights": "all", "last_layer_name": "2"}, "last_layer_name is '2' with subset_of_weights='all'"),
    ({"temperature": 0}, "temperature is 0; expected a positive number"),
])  # fmt: skip
def test_options_are_never_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        Laplace(problem("classification")[0], "classification", **options)


def test_wrong_uses():
    model, x, y = problem("classification")
    la = Laplace(model, "classification", "all", "diag").fit(batches(x, y))
    with pytest.raises(ValueError, match="sigma_noise can be changed for a regression only"):
        la.log_marginal_likelihood(sigma_noise=2.0)
    with pytest.raises(ValueError, match="needs val_loader"):
        la.optimize_prior_precision(method="gridsearch")
    with pytest.raises(ValueError, match=r"optimize_prior_precision got \['colour'\]"):
        la.optimize_prior_precision(colour=1)
    with pytest.raises(ValueError, match="prior_structure is 'blocks'"):
        la.optimize_prior_precision(prior_structure="blocks")
    with pytest.raises(ValueError, match="link_approx is 'cubic'"):
        la(x, link_approx="cubic")
    la.prior_mean = torch.zeros(3)
    with pytest.raises(ValueError, match=r"prior_mean has shape \(3,\); expected a number or \[31\]"):
        la.log_marginal_likelihood()
    regression = Laplace(problem("regression")[0], "regression")
    with pytest.raises(ValueError, match=r"sigma_noise is -1; expected one positive number"):
        regression.sigma_noise = -1
