"""What other Laplace packages get wrong or refuse, each by name: right here."""

import models
import pytest
import torch
from posteriors.dense import close, curvature, jacobian
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
            with pytest.raises(NotImplementedError, match="has no Kronecker factors"):
                pb.laplace(model, CE, (x, y), structure)
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
