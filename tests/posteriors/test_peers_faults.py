"""What other Laplace packages get wrong or refuse, each by name: right here."""

import math

import models
import pytest
import torch
from posteriors.dense import close, curvature, jacobian, log_evidence, theta
from torch import nn
from torch.linalg import LinAlgError
from torch.utils.data import DataLoader, TensorDataset

import paraboloid as pb

F64 = torch.float64
CE = nn.CrossEntropyLoss()


def classifier(n=12):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(n, 3, dtype=F64), torch.arange(n) % 3


def test_low_rank_eigenvalues_do_not_depend_on_the_number_of_batches():
    model, x, y = classifier()
    one = pb.laplace(model, CE, (x, y), "lowrank", rank=5)
    many = pb.laplace(model, CE, [(x[i : i + 1], y[i : i + 1]) for i in range(12)], "lowrank", rank=5)
    close(many.curvature.A.square().sum(1), one.curvature.A.square().sum(1), 1e-8)
    close(one.curvature.A.square().sum(1), torch.linalg.eigvalsh(curvature(model, CE, x, y)).flip(0)[:5], 1e-8)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "functional"])
def test_drop_last_counts_what_was_seen(structure):
    model, x, y = classifier(13)
    loader = DataLoader(TensorDataset(x, y), batch_size=5, drop_last=True)
    posterior = pb.laplace(model, CE, loader, structure)
    assert posterior.count == 10
    close(posterior.functional(x)[1], pb.laplace(model, CE, (x[:10], y[:10]), structure).functional(x)[1])


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
def test_class_weights_and_ignored_targets(structure):
    model, x, y = classifier()
    y[3] = -100
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=F64))
    kept = torch.arange(12) != 3
    all_ = pb.laplace(model, loss_fn, [(x[:5], y[:5]), (x[5:], y[5:])], structure)
    if structure == "kron":  # the input factor averages over all samples, the ignored ones too: only its trace is known
        trace = all_.curvature.by_name["2.bias"].trace()
        close(trace, curvature(model, loss_fn, x[kept], y[kept]).diagonal()[-3:].sum())
    else:
        same = pb.laplace(model, loss_fn, (x[kept], y[kept]), structure)
        close(all_.functional(x)[1], same.functional(x)[1])
        close(all_.log_evidence(), same.log_evidence())


@pytest.mark.parametrize("name", ["sequence mlp", "transformer layer", "gpt", "unet", "tagger", "detector"])
@pytest.mark.parametrize("structure", ["kron", "diag"])
def test_sequence_pixel_and_several_outputs(name, structure):
    model, x = models.make(name, 4)
    f = model(*x) if isinstance(x, tuple) else model(x)
    y = torch.randint(f.shape[1], (4, *f.shape[2:]), generator=torch.Generator().manual_seed(0))
    posterior = pb.laplace(model, CE, (x, y), structure)
    p = posterior.predict(x)
    assert p.shape == f.shape
    close(p.sum(1), torch.ones_like(p.sum(1)))


@pytest.mark.parametrize(
    "name", ["conv1d", "residual cnn", "class token", "vit", "gpt", "shared", "transformer layer", "resnet", "low rank"]
)
def test_normalisation_convolution_raw_parameters_attention_tied_layers_and_adapters(name):
    model, x = models.make(name, 4)
    f = model(x)
    y = torch.randint(f.shape[1], (4, *f.shape[2:]), generator=torch.Generator().manual_seed(0))
    for structure in ("kron", "ekfac"):
        if name == "low rank":  # a product of two parameters has no Kronecker factors
            with pytest.warns(UserWarning, match="no Kronecker factors"):
                posterior = pb.laplace(model, CE, (x, y), structure)
            assert torch.isfinite(posterior.predict(x)).all()
            diagonal = pb.laplace(model, CE, (x, y), "diag").curvature.diagonal()
            kept = [form for form in posterior.curvature.forms if form.left.vectors is None]
            assert kept
            assert all(torch.isin(form.values.flatten(), diagonal).all() for form in kept)
        else:
            assert torch.isfinite(pb.laplace(model, CE, (x, y), structure).predict(x)).all()
    posterior = pb.laplace(model, CE, (x, y), "diag")
    _, J = jacobian(model, x)
    h = curvature(model, CE, x, y).diagonal() + 1
    close(posterior.functional(x)[1], (J / h) @ J.mT)


def test_a_large_diagonal_is_not_a_matrix():
    """A million weights and thousands of outputs: the fit holds a few vectors of the parameters' size."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, 3, padding=1)
    x, y = torch.randn(2, 3, 40, 40), torch.randn(2, 3, 40, 40)
    posterior = pb.laplace(model, nn.MSELoss(), (x, y), "diag", fisher="mc", samples=4)
    assert posterior.curvature.diagonal().numel() == 84
    assert posterior.curvature.forms[0].values.min() > 0


def test_the_same_samples_for_every_input():
    model, x, y = classifier()
    posterior = pb.laplace(model, CE, (x, y))
    together = posterior.functional_samples(x, 4, seed=1)
    alone = torch.cat([posterior.functional_samples(x[i : i + 1], 4, seed=1) for i in range(12)], 1)
    close(together, alone)
    assert torch.equal(posterior.sample(3, seed=2)["0.bias"], posterior.sample(3, seed=2)["0.bias"])


def test_a_regression_with_several_outputs_has_its_own_evidence():
    """log evidence of independent outputs is the sum over them."""
    g = torch.Generator().manual_seed(0)
    X, Y = torch.randn(20, 4, generator=g, dtype=F64), torch.randn(20, 3, generator=g, dtype=F64)
    model = nn.Linear(4, 3, bias=False).double()
    parts = []
    for i in range(3):
        single = nn.Linear(4, 1, bias=False).double()
        with torch.no_grad():
            single.weight.copy_(model.weight[i : i + 1])
        parts.append(pb.laplace(single, nn.MSELoss(), (X, Y[:, i : i + 1]), "full", noise_variance=0.3).log_evidence())
    close(pb.laplace(model, nn.MSELoss(), (X, Y), "full", noise_variance=0.3).log_evidence(), sum(parts))


def test_a_failed_cholesky_says_why():
    model, x, y = classifier()
    posterior = pb.laplace(model, CE, (x, y), "full")
    posterior.curvature.matrices[0].sub_(5 * torch.eye(31, dtype=F64))  # as an indefinite matrix of one's own would be
    with pytest.raises(LinAlgError, match=r"precision of 31 weights has no Cholesky factor .the curvature's smallest"):
        posterior.functional(x)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac", "functional"])
def test_the_empirical_fisher_of_a_gaussian_is_divided_by_the_noise_variance_twice(structure):
    """Its gradients are (f - y) / s times the Jacobian, so that the curvature is r^2 J J^T / s^2."""
    torch.manual_seed(0)
    model, s, prior = nn.Linear(3, 1, bias=False).double(), 0.3, 0.7
    x, y = torch.randn(12, 3, dtype=F64), torch.randn(12, 1, dtype=F64)
    posterior = pb.laplace(model, nn.MSELoss(), (x, y), structure, fisher="empirical", noise_variance=s,
                           prior_precision=prior, temperature=2.0)  # fmt: skip
    f, J = jacobian(model, x)
    g = (f - y) * J[:, 0] / s
    H = g.T @ g / 2.0
    if structure == "diag":
        H = H.diagonal().diag()
    if structure in ("kron", "ekfac"):  # the eigenvectors are the inputs'
        kron = pb.statistics(model, nn.MSELoss(), (x, y), "kfac_empirical")["kfac_empirical"]["weight"]
        values, U = torch.linalg.eigh(kron.right)
        along = (g @ U).square().sum(0) if structure == "ekfac" else values * ((f - y) / s).square().sum()
        H = (U * along / 2.0) @ U.T
    Sigma = torch.linalg.inv(H + prior * torch.eye(3, dtype=F64))
    close(posterior.functional(x)[1], J @ Sigma @ J.mT)
    log_likelihood = -((f - y).square().sum() / s + 12 * math.log(2 * math.pi * s)) / 2 / 2.0
    weights = theta(model)
    expected = log_evidence(log_likelihood, H, torch.full((3,), prior, dtype=F64), weights)
    close(posterior.log_evidence(), expected)
    noise = torch.tensor(s, dtype=F64, requires_grad=True)
    close(posterior.log_evidence(noise_variance=noise), expected)
    posterior.temperature = 1.0
    posterior.tune_prior("evidence", noise=True, steps=500)
    noise = torch.tensor(posterior.noise_variance, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(posterior.log_evidence(noise_variance=noise), noise)
    assert abs(slope * noise) < 1e-3  # tuned: a stationary point


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "functional", "lowrank"])
def test_a_model_in_training_mode_predicts_as_in_evaluation_mode(structure):
    """Neither batch norm's other samples nor one fixed mask of dropout have a say, at the fit and at predictions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 3)).double()
    x, y = torch.randn(12, 3, dtype=F64), torch.arange(12) % 3
    model(x)  # running statistics
    expected = pb.laplace(model.eval(), CE, (x, y), structure)
    model.train()
    model[3].eval()
    found = pb.laplace(model, CE, (x, y), structure, weights="all")
    for link in ("probit", "mc", "weights"):
        close(found.predict(x, link, samples=20), expected.predict(x, link, samples=20))
        close(expected.predict(x[:5], link, samples=20), expected.predict(x, link, samples=20)[:5])
    close(found.functional_samples(x[:2], 3), expected.functional_samples(x, 3)[:, :2])
    close(found.log_evidence(), expected.log_evidence())
    close(found.update((x, y)).functional(x)[1], expected.update((x, y)).functional(x)[1])
    assert [m.training for m in model] == [True, True, True, False, True]
    close(torch.tensor(found.tune_prior("adapted", (x, y)).prior_precision).double(),
          torch.tensor(expected.tune_prior("adapted", (x, y)).prior_precision).double())  # fmt: skip
    close(torch.tensor(found.match_confidence((x, y)).sharpness), torch.tensor(expected.match_confidence((x, y)).sharpness))  # fmt: skip
