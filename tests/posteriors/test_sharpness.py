"""Predictions as sure as the network where it was trained, and less sure elsewhere."""

import pytest
import torch
from posteriors.dense import close
from posteriors.test_against_dense import problem
from sklearn.metrics import roc_auc_score
from torch import nn

from paraboloid import problems
from paraboloid.posteriors import laplace, load_posterior

F64 = torch.float64


def entropy(p):
    return torch.special.entr(p).sum(1).mean()


@pytest.mark.parametrize("structure", ["kron", "functional"])
def test_the_mean_entropy_on_the_data_is_the_networks(structure):
    model, x, loss_fn, y = problem("mlp", n=12)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    posterior = laplace(model, loss_fn, batches, structure, prior_precision=0.1)
    before = posterior.predict(x)
    own = model(x).softmax(1).detach()
    assert entropy(before) > entropy(own) * 1.01
    assert posterior.match_confidence() is posterior
    after = posterior.predict(x)
    close(entropy(after), entropy(own))
    close(after, before**posterior.sharpness / (before**posterior.sharpness).sum(1, keepdim=True))
    for link in ("mc", "bridge", "weights"):
        p = posterior.predict(x, link, samples=20)
        close(p.sum(1), torch.ones(len(x), dtype=F64))
    again = posterior.sharpness
    assert posterior.match_confidence(batches).sharpness == again  # from scratch, not from what it was


def test_bernoulli_pixels():
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(30, 3, dtype=F64), torch.randint(2, (30, 4)).to(F64)
    posterior = laplace(model, nn.BCEWithLogitsLoss(), (x, y), "full", prior_precision=0.01).match_confidence()
    p, own = posterior.predict(x), model(x).sigmoid().detach()
    close(entropy(torch.stack([p, 1 - p], 1)), entropy(torch.stack([own, 1 - own], 1)))


def test_validation_data_choose_the_likeliest():
    model, x, _, y = problem("mlp", n=40)
    posterior = laplace(model, nn.CrossEntropyLoss(), (x[:20], y[:20]), "kron", prior_precision=0.1)
    posterior.match_confidence(validation=[(x[20:30], y[20:30]), (x[30:], y[30:])])

    def loss(factor):
        z = posterior.predict(x[20:]).log() * factor
        return nn.functional.cross_entropy(z, y[20:]).item()

    assert posterior.sharpness != 1
    assert loss(1) <= min(loss(0.98), loss(1.02))


def test_it_is_saved_and_refused_without_classes(tmp_path):
    model, x, _, y = problem("mlp", n=12)
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "diag", prior_precision=0.1).match_confidence()
    posterior.save(tmp_path / "p.pt")
    loaded = load_posterior(tmp_path / "p.pt", model, nn.CrossEntropyLoss())
    assert torch.equal(loaded.predict(x), posterior.predict(x))
    with pytest.raises(ValueError, match="training data, and this posterior has it no longer"):
        loaded.match_confidence()
    regression = laplace(nn.Linear(3, 1), nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 1)))
    with pytest.raises(ValueError, match="match_confidence with a gaussian likelihood; expected classes"):
        regression.match_confidence()


def test_digits_against_noise():
    """Tuned by evidence alone the predictions are far too unsure; matched they are about as likely as the network's, and
    tell noise from digits much better."""
    torch.manual_seed(1)
    problem = problems.load("digits-mlp")
    x, y = (torch.cat(parts) for parts in zip(problem.train.tensors, problem.test.tensors, strict=True))
    order, model = torch.randperm(len(x)), problem.model
    train, test, noise = order[:400], order[400:700], torch.rand(300, 64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(100):
        for i in torch.randperm(400).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[train[i]]), y[train[i]]).backward()
            optimizer.step()

    def quality(predict):
        p, q = predict(x[test]), predict(noise)
        scores = 1 - torch.cat([p, q]).amax(1)
        return nn.functional.nll_loss(p.log(), y[test]).item(), roc_auc_score([0] * 300 + [1] * 300, scores)

    with torch.no_grad():
        nll, auroc = quality(lambda x: model(x).softmax(1))
    posterior = laplace(model, nn.CrossEntropyLoss(), (x[train], y[train])).tune_prior("evidence", match=None)
    assert quality(posterior.predict)[0] > 2 * nll
    matched = quality(posterior.match_confidence().predict)
    assert matched[0] < nll + 0.02
    assert matched[1] > auroc + 0.04
    untouched = quality(laplace(model, nn.CrossEntropyLoss(), (x[train], y[train])).tune_prior("evidence").predict)
    assert untouched[0] < 1.02 * nll
    assert untouched[1] > 0.99
