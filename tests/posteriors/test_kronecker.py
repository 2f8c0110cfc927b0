"""Kronecker and EKFAC posteriors against dense matrices that are built from the factors, and debiased ones."""

import losses_table
import models
import pytest
import torch
from posteriors.dense import close, curvature, jacobian, theta
from posteriors.test_against_dense import halves, precisions, problem, scale_of
from torch import nn

import paraboloid as pb
from paraboloid.posteriors import laplace

F64 = torch.float64
MODELS = [
    "mlp",
    "sequence mlp",
    "residual cnn",
    "conv1d",
    "class token",
    "gpt",
    "vit",
    "resnet",
    "unet",
    "tagger",
    "flattened",
]
SUMMED = {"ce": nn.CrossEntropyLoss(reduction="sum"), "mse": nn.MSELoss(reduction="sum")}


def summed(loss_fn):
    """The same loss as a sum, by the library's own algebra, as a negative log-likelihood."""
    return pb.losses.Scaled(pb.Loss.from_torch(loss_fn), scale_of(loss_fn), normalizer=1.0)


def dense_blocks(structure, model, loss_fn, x, y):
    build = pb.KFAC if structure == "kron" else pb.EKFAC
    return build(model, summed(loss_fn), (x, y), fisher="exact").to_dense()


def per_parameter(model):
    return {k: 0.5 + 0.2 * i for i, (k, p) in enumerate(model.named_parameters()) if p.requires_grad}


def flat(prior, model):
    return torch.cat(
        [torch.full((p.numel(),), prior[k], dtype=F64) for k, p in model.named_parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, structure):
    model, x, loss_fn, y = problem(name)
    prior = per_parameter(model)
    H = dense_blocks(structure, model, loss_fn, x, y)
    S = torch.linalg.inv(H + flat(prior, model).diag())
    posterior = laplace(model, loss_fn, halves(x, y), structure, prior_precision=prior)
    _, J = jacobian(model, x)
    close(posterior.functional(x)[1], J @ S @ J.mT)
    close(posterior.functional(x, diagonal=True)[1].flatten(1), (J @ S @ J.mT).diagonal(dim1=1, dim2=2))
    close(posterior.functional(x, joint=True)[1].flatten(0, 1).flatten(1), J.flatten(0, 1) @ S @ J.flatten(0, 1).T)
    close(posterior.precision().variances(), S.diagonal())
    value = posterior.log_likelihood() - (flat(prior, model) * theta(model).square()).sum() / 2
    value = value + flat(prior, model).log().sum() / 2 - torch.logdet(H + flat(prior, model).diag()) / 2
    close(posterior.log_evidence(), value)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
@pytest.mark.parametrize("loss", losses_table.LOSSES)
def test_losses(loss, structure):
    model, x, loss_fn, y = problem("mlp", loss, 5)
    S = torch.linalg.inv(dense_blocks(structure, model, loss_fn, x, y) + 0.3 * torch.eye(len(theta(model)), dtype=F64))
    posterior = laplace(model, loss_fn, halves(x, y), structure, prior_precision=0.3)
    _, J = jacobian(model, x)
    close(posterior.functional(x)[1], J @ S @ J.mT)


def test_the_block_is_that_of_the_sum_whatever_the_reduction():
    model, x, _, y = problem("mlp", n=6)
    kron = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "kflr")["kflr"]["0.weight"].to_dense()
    for reduction in ("mean", "sum"):
        posterior = laplace(model, nn.CrossEntropyLoss(reduction=reduction), (x, y))
        close(posterior.curvature.by_name["0.weight"].to_dense(), 6 * kron)


def test_thin_bases_of_a_wide_layer():
    """Fewer samples than inputs: what the factors leave out has the prior's variance alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 40, dtype=F64), torch.arange(5) % 3
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), prior_precision=0.7)
    assert not posterior.curvature.by_name["0.weight"].full
    S = torch.linalg.inv(
        dense_blocks("kron", model, nn.CrossEntropyLoss(), x, y) + 0.7 * torch.eye(len(theta(model)), dtype=F64)
    )
    new = torch.randn(4, 40, dtype=F64)
    _, J = jacobian(model, new)
    close(posterior.functional(new)[1], J @ S @ J.mT)
    close(posterior.precision().variances(), S.diagonal())
    draws = posterior.sample(20_000)["0.weight"].flatten(1)
    error = S.diagonal()[:240] * (2 / 20_000) ** 0.5
    assert ((draws.var(0) - S.diagonal()[:240]) / error).abs().max() < 5


def test_ekfac_has_the_trace_of_the_exact_curvature():
    model, x, loss_fn, y = problem("residual cnn", n=6)
    H = curvature(model, loss_fn, x, y)
    posterior = laplace(model, loss_fn, halves(x, y), "ekfac")
    trace = sum(form.trace() for form in posterior.curvature.forms)
    close(trace, H.trace())


def test_more_data_with_the_eigenvectors_of_the_first():
    model, x, loss_fn, y = problem("mlp", n=8)
    first = laplace(model, loss_fn, (x[:4], y[:4]), "ekfac")
    vectors = first.curvature.by_name["0.weight"].left.vectors
    first.update((x[4:], y[4:]))
    assert torch.equal(first.curvature.by_name["0.weight"].left.vectors, vectors)
    close(sum(f.trace() for f in first.curvature.forms), curvature(model, loss_fn, x, y).trace())


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_debiased(structure, tmp_path):
    """The eigenvectors of every other sample, the eigenvalues of the rest, in both roles, counting for all samples."""
    model, x, loss_fn, y = problem("mlp", n=10)
    data = [(x[:6], y[:6]), (x[6:], y[6:])]
    posterior = laplace(model, loss_fn, data, structure, debias=True, prior_precision=0.4)
    build = pb.KFAC if structure == "kron" else pb.EKFAC
    at = torch.tensor([0, 2, 4, 6, 8])
    own, other = (x[at], y[at]), (x[at + 1], y[at + 1])
    S = 0
    for a, b in ((own, other), (other, own)):
        H = 2 * build(model, summed(loss_fn), a, fisher="exact", measure_on=b).to_dense()
        S = S + torch.linalg.inv(H + 0.4 * torch.eye(len(H), dtype=F64)) / 2
    _, J = jacobian(model, x)
    close(posterior.functional(x)[1], J @ S @ J.mT)
    close(posterior.functional(x, joint=True)[1].flatten(0, 1).flatten(1), J.flatten(0, 1) @ S @ J.flatten(0, 1).T)
    close(posterior.precision().variances(), S.diagonal())
    assert posterior.count == 10
    plain = laplace(model, loss_fn, data, structure, prior_precision=0.4)
    close(posterior.log_likelihood(), plain.log_likelihood())
    draws = posterior.sample(20_000)["0.bias"]
    expected = S.diagonal()[20:25]
    assert ((draws.var(0) - expected) / expected).abs().max() < 0.06
    posterior.save(tmp_path / "p.pt")
    loaded = pb.load_posterior(tmp_path / "p.pt", model, loss_fn)
    assert torch.equal(loaded.predict(x), posterior.predict(x))
    before = posterior.curvature.parts[0].by_name["0.weight"].trace()
    assert posterior.update(data).curvature.parts[0].by_name["0.weight"].trace() > before


def test_batch_norm_and_a_frozen_base():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.randn(6, 2, 6, dtype=F64), torch.arange(6) % 3
    for structure in ("kron", "diag", "ekfac"):  # the mode that the model is in has no influence
        training = laplace(model.train(), nn.CrossEntropyLoss(), (x, y), structure)
        found = training.predict(x[:1])
        assert model[1].training
        close(found, laplace(model.eval(), nn.CrossEntropyLoss(), (x, y), structure).predict(x)[:1])
    model[0].requires_grad_(False)
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y))
    assert list(posterior.weights) == ["1.weight", "1.bias", "4.weight", "4.bias"]
    assert torch.isfinite(posterior.predict(x)).all()


def test_dict_batches_and_structured_outputs():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = models.make("gpt")[0]

        def forward(self, tokens):
            return {"logits": self.inner(tokens)}

    model, x = Wrapped(), models.make("gpt", 4)[1]
    y = torch.randint(6, x.shape, generator=torch.Generator().manual_seed(0))
    posterior = laplace(model, nn.CrossEntropyLoss(), {"tokens": x, "labels": y}, output=lambda o: o["logits"])
    assert posterior.predict({"tokens": x}).shape == (4, 6, 3)
    close(posterior.predict({"tokens": x}).sum(1), torch.ones(4, 3, dtype=F64))


def test_a_prior_that_varies_within_a_block_is_refused():
    model, x, loss_fn, y = problem("mlp")
    with pytest.raises(ValueError, match=r"prior_precision of '0.weight' differs from weight to weight \(0.5 to"):
        laplace(model, loss_fn, (x, y), "kron", prior_precision=precisions(model))
    with pytest.raises(ValueError, match="debias=True with structure='full'"):
        laplace(model, loss_fn, (x, y), "full", debias=True)
