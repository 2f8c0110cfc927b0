"""The untouched path: fit, tune, predict; never less likely than the network, and aware of what it has not seen."""

import math

import pytest
import torch
from posteriors.dense import close, jacobian
from posteriors.test_against_dense import problem
from torch import nn

from paraboloid.passes.memory import HELD
from paraboloid.posteriors import Posterior, laplace, load_posterior

F64 = torch.float64
STRUCTURES = ["full", "functional", "lowrank", "diag", "kron", "ekfac"]


def classes(n=30, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    return model, torch.randn(n, 3, dtype=F64), torch.randint(4, (n,))


@pytest.mark.parametrize("name", ["mlp", "residual cnn", "conv1d", "shared", "tagger"])
def test_the_unweighted_matrix_is_the_jacobians(name):
    model, x, loss_fn, y = problem(name)
    _, J = jacobian(model, x)
    posterior = laplace(model, loss_fn, (x, y), "full", curvature="jacobian")
    close(posterior.curvature.to_dense(), torch.einsum("nkd,nke->de", J, J))
    diagonal = laplace(model, loss_fn, (x, y), "diag", curvature="jacobian").curvature.diagonal()
    close(diagonal, J.square().sum((0, 1)))
    rows = laplace(model, loss_fn, (x, y), "functional", curvature="jacobian").curvature.A
    close(rows.T @ rows, torch.einsum("nkd,nke->de", J, J))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_no_target_enters_and_a_squared_error_is_the_same(structure):
    model, x, y = classes()
    first = laplace(model, nn.CrossEntropyLoss(), (x, y), structure, curvature="jacobian", rank=44)
    other = laplace(model, nn.CrossEntropyLoss(), (x, y.flip(0)), structure, curvature="jacobian", rank=44)
    squared = [
        laplace(model, nn.MSELoss(), (x, torch.randn(30, 4, dtype=F64)), structure, curvature=c, rank=44, noise_variance=0.5)
        for c in ("ggn", "jacobian")
    ]  # fmt: skip
    for posterior in (other, *squared):
        close(posterior.curvature.to_dense(), first.curvature.to_dense())
    close(squared[0].functional(x)[1], squared[1].functional(x)[1])
    close(laplace(model, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])], structure, curvature="jacobian",
                  rank=44).functional(x)[1], first.functional(x)[1])  # fmt: skip


def test_ignored_targets_count_nothing():
    model, x, y = classes()
    _, J = jacobian(model, x[4:])
    y = torch.cat([torch.full((4,), -100), y[4:]])
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "full", curvature="jacobian")
    close(posterior.curvature.to_dense(), torch.einsum("nkd,nke->de", J, J))


def test_sampled_columns_have_the_right_mean():
    model, x, y = classes(8)
    _, J = jacobian(model, x)
    drawn = laplace(model, nn.CrossEntropyLoss(), (x, y), "diag", curvature="jacobian", fisher="mc", samples=4000)
    torch.testing.assert_close(drawn.curvature.diagonal(), J.square().sum((0, 1)), rtol=0.1, atol=1e-3)
    with pytest.raises(ValueError, match="curvature='jacobian' with fisher='empirical'"):
        laplace(model, nn.CrossEntropyLoss(), (x, y), curvature="jacobian", fisher="empirical")
    with pytest.raises(ValueError, match="curvature is 'hessian'"):
        laplace(model, nn.CrossEntropyLoss(), (x, y), curvature="hessian")


def unit(model, x):
    """lambda by parameter, from the Jacobians."""
    J = jacobian(model, x)[1].square().sum((0, 1))
    parts = J.split([p.numel() for p in model.parameters()])
    return {k: part.mean().item() / len(x) for (k, _), part in zip(model.named_parameters(), parts, strict=True)}


def test_the_prior_knows_as_much_as_one_sample():
    model, x, y = classes()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "full", curvature="jacobian").tune_prior()
    expected = unit(model, x)
    assert posterior.prior_precision == pytest.approx(expected, rel=1e-9)
    posterior.tune_prior("unit", per="layer")
    n = {k: p.numel() for k, p in model.named_parameters()}
    layer = (expected["0.weight"] * n["0.weight"] + expected["0.bias"] * n["0.bias"]) / (n["0.weight"] + n["0.bias"])
    assert posterior.prior_precision["0.bias"] == pytest.approx(layer, rel=1e-9)
    dead = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    with torch.no_grad():
        dead[0].bias.fill_(-100)
    found = laplace(dead, nn.CrossEntropyLoss(), (x, y), "diag", curvature="jacobian").tune_prior().prior_precision
    assert found["0.weight"] == found["0.bias"] == found["2.bias"] == 1.0  # the only one that the data reaches


OUT = torch.arange(0, 30, 5)  # the fold of thirty samples that is left out


@pytest.mark.parametrize(
    ("structure", "curvature"),
    [("full", "jacobian"), ("functional", "jacobian"), ("diag", "jacobian"), *((s, "ggn") for s in STRUCTURES)],
)
@pytest.mark.parametrize("match", ["auto", "early"])
def test_predictions_are_the_networks_with_lowered_log_odds(structure, curvature, match):
    """By the posterior's own variances where it has this curvature, and else by those of Kronecker factors."""
    model, x, y = classes()
    new = torch.cat([x, 9 * torch.randn(40, 3, dtype=F64)])
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    fit = lambda: laplace(model, nn.CrossEntropyLoss(), batches, structure, curvature=curvature)  # noqa: E731
    bayesian, posterior = fit().tune_prior(match=None), fit().tune_prior(match=match)
    plain = bayesian.predict(new)
    f, J = jacobian(model, new)
    exact = curvature == "jacobian" and structure != "diag"
    kept = torch.tensor([n for n in range(30) if n not in OUT.tolist()])

    def H(at):
        if curvature == "ggn":
            return laplace(model, nn.CrossEntropyLoss(), (x[at], y[at]), curvature="jacobian").curvature.to_dense()
        whole = torch.einsum("nkd,nke->de", J[at], J[at])
        return whole.diagonal().diag() if structure == "diag" else whole

    whole = H(torch.arange(30))
    prior = torch.cat([torch.full((p.numel(),), unit(model, x)[k], dtype=F64) for k, p in model.named_parameters()])
    if curvature == "ggn":  # that of the factors
        sizes = [p.numel() for p in model.parameters()]
        prior = torch.cat([part.mean().expand(len(part)) / 30 for part in whole.diagonal().split(sizes)])
    u = (J @ torch.linalg.inv(whole + prior.diag()) @ J.mT).diagonal(dim1=1, dim2=2).mean(1)
    seen = u[:30]
    if exact:  # without the sample itself
        without = [J[n] @ torch.linalg.inv(whole - J[n].T @ J[n] + prior.diag()) @ J[n].T for n in range(30)]
        seen = torch.stack([S.diagonal().mean() for S in without])
    usual, rare = seen.quantile(0.5), seen.quantile(0.95 if exact else 0.99)
    if not exact:  # times what every fifth sample holds its own variances down by
        apart = (J[OUT] @ torch.linalg.inv(H(kept) + prior.diag()) @ J[OUT].mT).diagonal(dim1=1, dim2=2).mean(1)
        held = max(1.0, 0.8 * (apart.quantile(0.5) / u[OUT].quantile(0.5)).item())
        usual, rare = held * usual, max(held * rare, 0.8 * apart.quantile(0.95))
    steps = (u / rare).log() / (rare / usual).log()
    c = 2 ** -steps.clamp(min=0) if match == "early" else 4 ** -(steps - 1).clamp(min=0)
    assert (c < 0.9).any() and (c == 1).sum() >= (28 if match == "early" else 30)
    close(posterior.predict(new), (c.unsqueeze(1) * f).softmax(1), 1e-7)
    assert not torch.allclose(plain, posterior.predict(new), rtol=1e-2)
    # The Bayesian part is what it was.
    assert torch.equal(posterior.log_evidence(), bayesian.log_evidence())
    assert torch.equal(posterior.functional(x)[1], bayesian.functional(x)[1])
    assert all(torch.equal(w, bayesian.sample(2)[k]) for k, w in posterior.sample(2).items())
    close(posterior.tune_prior(match=None, steps=1).predict(new), bayesian.tune_prior(match=None, steps=1).predict(new))


@pytest.mark.parametrize("link", [None, "probit", "mc", "bridge", "bridge_norm", "weights"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_prediction_is_its_inputs_alone(structure, link):
    model, x, y = classes()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), structure).tune_prior()
    new = 4 * torch.randn(9, 3, dtype=F64)
    together = posterior.predict(new, link, samples=50)
    close(torch.cat([posterior.predict(new[i : i + 1], link, samples=50) for i in range(9)]), together)
    close(together.sum(1), torch.ones(9, dtype=F64))
    own = model(new).softmax(1).detach()
    if link in (None, "probit"):
        assert (together.amax(1) <= own.amax(1) + 1e-9).all()
        assert torch.equal(together.argmax(1), own.argmax(1))


def test_links_agree_where_the_variance_is_small():
    """Matched draws have the spread that the probit approximation stands for."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(60, 3, dtype=F64)
    posterior = laplace(model, nn.BCEWithLogitsLoss(), (x, torch.randint(2, (60, 1)).to(F64)), "full").tune_prior()
    new = 3 * torch.randn(50, 3, dtype=F64)
    own = model(new).sigmoid().detach()
    matched = posterior.predict(new)
    assert ((own - 0.5).abs() - (matched - 0.5).abs()).max() > 0.05
    assert (posterior.predict(new, "mc", samples=20_000) - matched).abs().max() < 0.03


def normalised(kind):
    torch.manual_seed(0)
    norm = {"layer": nn.LayerNorm(6), "batch": nn.BatchNorm1d(6), "group": nn.GroupNorm(2, 6)}[kind]
    model = nn.Sequential(nn.Linear(3, 6, bias=False), norm, nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(40, 3)
    model(x), model.double().eval()
    norm.eps = 0.0
    return model, x.double(), torch.randint(4, (40,))


@pytest.mark.parametrize("structure", ["full", "functional", "kron", "ekfac", "diag"])
@pytest.mark.parametrize("kind", ["layer", "batch", "group"])
def test_rescaling_normalised_weights_changes_nothing(structure, kind):
    """W -> c W in front of a normalisation is the same network; matched predictions do not see it."""
    model, x, y = normalised(kind)
    new, c = 3 * torch.randn(20, 3, dtype=F64), 7.0
    predict = lambda: laplace(model, nn.CrossEntropyLoss(), (x, y), structure).tune_prior().predict(new)  # noqa: E731
    before = predict()
    with torch.no_grad():
        model[0].weight.mul_(c)
        if kind == "batch":
            model[1].running_mean.mul_(c), model[1].running_var.mul_(c * c)
    torch.testing.assert_close(predict(), before, rtol=1e-5, atol=1e-7)
    if kind == "batch":  # the others take the size of an input away
        assert (before - model(new).softmax(1).detach()).abs().max() > 1e-2


@pytest.mark.parametrize("curvature", ["ggn", "jacobian"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_files_keep_everything(structure, curvature, tmp_path):
    model, x, y = classes()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), structure, curvature=curvature).tune_prior()
    posterior.save(tmp_path / "p.pt")
    loaded = load_posterior(tmp_path / "p.pt", model, nn.CrossEntropyLoss())
    new = 4 * torch.randn(9, 3, dtype=F64)
    for link in (None, "mc", "weights"):
        assert torch.equal(loaded.predict(new, link, samples=5), posterior.predict(new, link, samples=5))
    matched = loaded.predict(new)
    loaded.tune_prior("evidence" if curvature == "ggn" else "unit")  # without the data, the prior alone
    assert torch.equal(loaded.predict(new), matched)
    close(loaded.update((x, y)).predict(new), posterior.update((x, y)).predict(new))
    loaded.prior_precision = 1.0
    plain = laplace(model, nn.CrossEntropyLoss(), (x, y), structure, curvature=curvature).update((x, y))
    close(loaded.predict(new), plain.predict(new))


def test_files_of_before_are_lowered_early():
    """Those of version 4 know neither where lowering starts nor how fast it goes: as they were predicted with."""
    model, x, y = classes()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y)).tune_prior(match="early")
    new = 4 * torch.randn(9, 3, dtype=F64)
    early = posterior.predict(new)
    later = posterior.tune_prior().state_dict()
    known = {k: later["confidence"][k] for k in ("usual", "rare", "left_out")}
    loaded = Posterior.of_state({**later, "version": 4, "confidence": known}, model, nn.CrossEntropyLoss())
    close(loaded.predict(new), early)
    close(Posterior.of_state(later, model, nn.CrossEntropyLoss()).predict(new), posterior.predict(new))
    assert (posterior.predict(new) - early).abs().max() > 1e-3


def test_choices_are_checked_and_failures_leave_it_as_it_was():
    model, x, y = classes()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "diag").tune_prior()
    before = posterior.predict(4 * x)
    with pytest.raises(ValueError, match="match is 'all'; expected one of"):
        posterior.tune_prior(match="all")
    with pytest.raises(ValueError, match="needs validation="):
        posterior.tune_prior("grid")
    assert torch.equal(posterior.predict(4 * x), before)
    exponent = posterior.tune_prior(match="exponent").sharpness
    assert exponent == pytest.approx(posterior.tune_prior(match=None).match_confidence().sharpness, rel=1e-4)
    assert exponent != 1
    assert posterior.confidence is None


def test_a_regressions_noise_is_tuned_along():
    torch.manual_seed(0)
    x = torch.randn(200, 3, dtype=F64)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(200, 1, dtype=F64)
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        w = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1), y).solution[:, 0]
        model.weight.copy_(w[:3]), model.bias.copy_(w[3])
    for method in ("adapted", "evidence", "unit"):
        posterior = laplace(model, nn.MSELoss(), (x, y), "full").tune_prior(method)
        residual = (y - model(x)).square().sum().item()
        assert posterior.noise_variance == pytest.approx(residual / (200 - posterior.effective_dimension()), rel=1e-3)
        assert math.isclose(posterior.noise_variance, 0.09, rel_tol=0.2)
    fixed = laplace(model, nn.MSELoss(), (x, y), "full", noise_variance=0.5)
    assert fixed.tune_prior(noise=False).noise_variance == 0.5


@pytest.mark.parametrize("structure", ["kron", "functional"])
def test_cross_validation_leaves_each_fold_to_the_others(structure):
    model, x, y = classes(40)
    grid = [0.01, 0.3, 3.0, 1e4]
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    posterior = laplace(model, nn.CrossEntropyLoss(), batches, structure)
    with pytest.warns(UserWarning, match=r"is the (lowest|highest) of the grid from 0.01 to 1e\+04"):
        posterior.tune_prior("cross_validation", grid=grid, match=None)
    folds = torch.arange(40) % 5  # twenty is a multiple of five

    def score(value):
        total = 0.0
        for k in range(5):
            out = folds == k
            rest = laplace(model, nn.CrossEntropyLoss(), (x[~out], y[~out]), structure, prior_precision=value)
            total += nn.functional.nll_loss(rest.predict(x[out]).log(), y[out], reduction="sum").item()
        return total

    assert posterior.prior_precision == min(grid, key=score)
    assert posterior.confidence is None


def test_float32_is_tuned_to_some_percent():
    """The quick form ends near the fixed point that float64 is taken to."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3))
    x = torch.randn(150, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] * x[:, 2] > 0.3).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    quick = laplace(model, nn.CrossEntropyLoss(), (x, y)).tune_prior(match=None).prior_precision
    exact = laplace(model.double(), nn.CrossEntropyLoss(), (x.double(), y)).tune_prior(match=None).prior_precision
    assert quick == pytest.approx(exact, rel=0.25)


@pytest.mark.parametrize("structure", ["kron", "full", "functional"])
def test_more_weights_than_samples(structure):
    """Variances on the training data are held down by that data; new inputs of the same kind are still familiar."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 60, generator=g, dtype=F64)
    features = (x @ torch.randn(60, 100, generator=g, dtype=F64)).relu()
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    model = nn.Linear(100, 2).double()
    posterior = laplace(model, nn.CrossEntropyLoss(), (features[:80], y[:80]), structure).tune_prior("evidence")
    own, matched = model(features[80:]).softmax(1).detach().amax(1), posterior.predict(features[80:]).amax(1)
    assert ((own - 0.5) * 0.5 < matched - 0.5).double().mean() > 0.6


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_what_counts_as_rare_is_no_less_than_what_a_fold_left_out_has(structure):
    """A feature that few samples have: their own variances, held down by themselves, say little of the next one's."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(60, 3, generator=g, dtype=F64)
    x[:, 2] *= 0.01
    x[:6:5, 2] = torch.tensor([20.0, -30.0], dtype=F64)
    y = (x[:, 0] > 0).long()
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), structure).tune_prior()
    left = torch.arange(60) % 5 == 0
    prior = {name: torch.as_tensor(p) for name, p in posterior.unweighted.prior().items()}
    rest = laplace(model, nn.CrossEntropyLoss(), (x[~left], y[~left]), "kron", curvature="jacobian")
    rest.prior_precision = {name: float(p.flatten()[0]) for name, p in prior.items()}
    apart = rest.functional(x[left])[1].diagonal(dim1=1, dim2=2).mean(1)
    within = posterior.unweighted.functional(x[left])[1].diagonal(dim1=1, dim2=2).mean(1)
    seen = posterior.unweighted.functional(x)[1].diagonal(dim1=1, dim2=2).mean(1)
    held = max(1.0, 0.8 * (apart.quantile(0.5) / within.quantile(0.5)).item())
    usual, rare = (held * seen.quantile(q).item() for q in (0.5, 0.99))
    tail = 0.8 * apart.quantile(0.95).item()
    assert tail > rare  # or this tests nothing
    assert posterior.confidence.usual == pytest.approx(usual) and posterior.confidence.rare == pytest.approx(tail)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_data_is_gone_through_in_any_order(structure):
    """A loader that shuffles, batches of one sample, and data that is never held in memory give the same."""
    model, x, y = classes()
    new = 4 * torch.randn(9, 3, dtype=F64)
    whole = laplace(model, nn.CrossEntropyLoss(), (x, y), structure).tune_prior(steps=1)
    dataset = torch.utils.data.TensorDataset(x, y)
    ones = laplace(model, nn.CrossEntropyLoss(), torch.utils.data.DataLoader(dataset), structure).tune_prior(steps=1)
    close(ones.predict(new), whole.predict(new))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HELD, "default", 0)
        loader = torch.utils.data.DataLoader(dataset, batch_size=7)
        passes = laplace(model, nn.CrossEntropyLoss(), loader, structure).tune_prior(steps=1)
    close(passes.predict(new), whole.predict(new))
    torch.manual_seed(0)
    shuffled = torch.utils.data.DataLoader(dataset, batch_size=7, shuffle=True)
    mixed = laplace(model, nn.CrossEntropyLoss(), shuffled, structure).tune_prior(steps=1)
    close(mixed.unweighted.curvature.to_dense(), whole.unweighted.curvature.to_dense())  # each sample once


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_novelty_is_counted_in_steps_beyond_the_training_data(structure):
    model, x, y = classes()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), structure).tune_prior()
    new = 4 * torch.randn(20, 3, dtype=F64)
    u = posterior.unweighted.functional(new)[1].diagonal(dim1=1, dim2=2).mean(1)
    usual, rare = posterior.confidence.usual, posterior.confidence.rare
    found = posterior.novelty(new)
    close(found, (u / rare).log() / math.log(rare / usual))
    assert (found > 1).any()
    f = model(new).detach()
    close(posterior.predict(new), (f * 4 ** -(found - 1).clamp(min=0).unsqueeze(1)).softmax(1))
    early = posterior.tune_prior(match="early")
    close(early.novelty(new), found)
    close(early.predict(new), (f * 2 ** -found.clamp(min=0).unsqueeze(1)).softmax(1))
    with pytest.raises(ValueError, match="novelty needs a posterior of class probabilities that was matched"):
        posterior.tune_prior(match=None).novelty(new)


def test_novelty_of_binary_outputs_is_each_its_own():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), torch.randn(40, 3, dtype=F64)
    posterior = laplace(model, nn.BCEWithLogitsLoss(), (x, torch.randint(2, (40, 2)).to(F64)), "full").tune_prior()
    assert posterior.novelty(x).shape == (40, 2)
