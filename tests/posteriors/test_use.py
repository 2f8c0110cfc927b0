"""Streaming, saving, tuning, and what is refused."""

import pytest
import torch
from posteriors.dense import close
from torch import nn

from paraboloid.posteriors import laplace, load_posterior

F64 = torch.float64
STRUCTURES = ["full", "diag", "functional", "lowrank", "kron", "ekfac"]
STREAMED = ["full", "diag", "functional", "lowrank", "kron"]  # ekfac keeps the eigenvectors of what came first


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.fixture
def setting():
    model = build()
    g = torch.Generator().manual_seed(1)
    return model, torch.randn(20, 3, generator=g, dtype=F64), torch.randint(3, (20,), generator=g)


@pytest.mark.parametrize("structure", STREAMED)
def test_two_streamed_halves_are_one_pass(setting, structure):
    model, x, y = setting
    whole = laplace(model, nn.CrossEntropyLoss(), (x, y), structure, rank=31)
    streamed = laplace(model, nn.CrossEntropyLoss(), (x[:8], y[:8]), structure, rank=31).update((x[8:], y[8:]))
    close(streamed.functional(x)[1], whole.functional(x)[1])
    close(streamed.log_evidence(), whole.log_evidence())
    assert (streamed.count, streamed.elements) == (20, 20)
    with pytest.raises(ValueError, match="needs the training data"):
        streamed.tune_prior()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_saving_is_bit_for_bit(setting, structure, tmp_path):
    model, x, y = setting
    posterior = laplace(
        model, nn.CrossEntropyLoss(), (x, y), structure, prior_precision={k: 2.0 for k, _ in model.named_parameters()}
    )
    posterior.save(tmp_path / "posterior.pt")
    loaded = load_posterior(tmp_path / "posterior.pt", model, nn.CrossEntropyLoss())
    assert torch.equal(loaded.predict(x), posterior.predict(x))
    assert torch.equal(loaded.sample(3)["0.weight"], posterior.sample(3)["0.weight"])
    assert torch.equal(loaded.log_evidence(), posterior.log_evidence())
    assert loaded.prior_precision == posterior.prior_precision
    assert torch.equal(loaded.update((x, y)).log_evidence(), posterior.update((x, y)).log_evidence())


def test_loading_refuses_another_model(setting, tmp_path):
    model, x, y = setting
    path = tmp_path / "posterior.pt"
    laplace(model, nn.CrossEntropyLoss(), (x, y), "diag").save(path)
    with pytest.raises(ValueError, match=r"other parameters than the model has.*\(5, 3\)"):
        load_posterior(path, nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="have other values than those that the posterior was fitted"):
        load_posterior(path, build(1), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="fitted with a categorical likelihood, but loss_fn is a gaussian one"):
        load_posterior(path, model, nn.MSELoss())
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="holds no posterior of version 2"):
        load_posterior(path, model, nn.CrossEntropyLoss())


def test_a_trained_on_model_is_refused(setting):
    model, x, y = setting
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "diag")
    with torch.no_grad():
        model[0].bias.add_(1)
    for use in (posterior.predict, posterior.functional, lambda x: posterior.update((x, y))):
        with pytest.raises(RuntimeError, match=r"parameter '0.bias' is not what it was when the posterior was fitted"):
            use(x)


def test_the_model_is_left_as_it_was(setting):
    model, x, y = setting
    model[0].bias.requires_grad_(False)
    model.train()
    state, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "full", weights="last_layer")
    posterior.predict(x, "mc", samples=5), posterior.predict(x, "weights", samples=5), posterior.sample(3)
    posterior.tune_prior(steps=2)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert model.training


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("per", ["all", "layer", "parameter"])
def test_evidence_tuning_reaches_a_stationary_point(setting, structure, per):
    """MacKay's fixed point at the trained weights is where the evidence's gradient vanishes."""
    model, x, y = setting
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), structure, rank=20)
    before = posterior.log_evidence()
    posterior.tune_prior("evidence", per=per, steps=2000)
    assert posterior.log_evidence() > before
    names = list(posterior.weights)
    found = posterior.prior_precision
    values = {"all": [found] * 4, "layer": None, "parameter": None}[per] or [found[k] for k in names]
    at = [torch.tensor(v, dtype=F64, requires_grad=True) for v in ([values[0]] if per == "all" else values)]
    prior = at[0] if per == "all" else dict(zip(names, at, strict=True))
    gradients = torch.autograd.grad(posterior.log_evidence(prior), at)
    slopes = [g * v for g, v in zip(gradients, at, strict=True)]  # in the logarithm
    if per == "layer":
        assert found["0.weight"] == found["0.bias"]
        slopes = [slopes[0] + slopes[1], slopes[2] + slopes[3]]
    assert max(abs(s.item()) for s in slopes) < 1e-3


def test_grid_finds_the_best_on_validation_data(setting):
    model, x, y = setting
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "diag")
    with pytest.warns(UserWarning, match="0.01, is the lowest of the grid from 0.01 to 100: a better one may lie"):
        posterior.tune_prior("grid", validation=(x, y), grid=[0.01, 1.0, 100.0])

    def score(value):
        posterior.prior_precision = value
        return nn.functional.nll_loss(posterior.predict(x).log(), y).item()

    best = posterior.prior_precision
    assert best == min([0.01, 1.0, 100.0], key=score)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"structure": "block"}, "structure is 'block'; expected one of"),
        ({"fisher": "true"}, "fisher is 'true'; expected one of"),
        ({"noise_variance": 0.0}, "noise_variance is 0.0; expected a positive number"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a positive number"),
        ({"prior_precision": 0.0}, "prior_precision of '0.weight' is 0; expected positive finite numbers"),
        ({"prior_precision": torch.ones(7)}, r"prior_precision has shape \(7,\); expected a number, \[31\]"),
        ({"prior_precision": {"0.weight": 1.0}}, r"misses \['0.bias', '2.weight', '2.bias'\]"),
        (
            {"prior_precision": {"0.weight": torch.ones(2), "0.bias": 1.0, "2.weight": 1.0, "2.bias": 1.0}},
            r"has shape \(2,\); expected a number or \(4, 3\)",
        ),
        ({"prior_precision": "high"}, "prior_precision is a str; expected a number"),
        ({"weights": "first"}, "weights is 'first'; expected 'all', 'last_layer'"),
        ({"weights": ["1.weight"]}, r"weights names \['1.weight'\], which is no trainable parameter"),
        ({"weights": lambda name: False}, "the predicate `weights` chose none"),
        ({"structure": "functional", "subset": 21}, r"subset is 21; expected an integer in 1..20"),
        ({"structure": "lowrank", "fisher": "mc"}, "fisher is 'mc' with structure='lowrank'"),
        ({"rank": 0}, "rank is 0; expected an integer of at least 1"),
    ],
)
def test_what_is_refused(setting, options, message):
    model, x, y = setting
    with pytest.raises(ValueError, match=message):
        laplace(model, nn.CrossEntropyLoss(), (x, y), **{"structure": "diag", **options})


def test_what_does_not_fit_says_how_large_it_is():
    model = nn.Sequential(nn.Linear(3000, 300), nn.Linear(300, 2))
    with pytest.raises(
        ValueError, match=r"structure='full' over 900902 weights would take 6047.1 GiB.*structure='kron'"
    ):
        laplace(model, nn.CrossEntropyLoss(), (torch.zeros(2, 3000), torch.zeros(2, dtype=torch.long)), "full")


def test_weights_that_are_not_finite(setting):
    model, x, y = setting
    with torch.no_grad():
        model[2].bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"parameter '2.bias' holds NaN or infinity"):
        laplace(model, nn.CrossEntropyLoss(), (x, y), "diag")


def test_tuning_refuses(setting):
    model, x, y = setting
    posterior = laplace(model, nn.CrossEntropyLoss(), (x, y), "diag")
    for arguments, message in [
        ({"method": "cv"}, "method is 'cv'; expected one of"),
        ({"noise": True}, "noise=True with a categorical likelihood"),
        ({"method": "grid"}, "method='grid' needs validation="),
        ({"per": "neuron"}, "per is 'neuron'; expected 'all', 'layer' or 'parameter'"),
    ]:
        with pytest.raises(ValueError, match=message):
            posterior.tune_prior(**arguments)


def test_a_subset_stands_for_all(setting):
    model, x, y = setting
    full = laplace(model, nn.CrossEntropyLoss(), [(x[:9], y[:9]), (x[9:], y[9:])], "functional")
    part = laplace(model, nn.CrossEntropyLoss(), [(x[:9], y[:9]), (x[9:], y[9:])], "functional", subset=20)
    close(part.functional(x)[1], full.functional(x)[1])
    seeds = [laplace(model, nn.CrossEntropyLoss(), (x, y), "functional", subset=5, seed=s) for s in range(200)]
    assert all(len(p.curvature.A) == 10 and p.count == 20 for p in seeds)
    mean = torch.stack([p.curvature.A.T @ p.curvature.A for p in seeds])
    expected = full.curvature.A.T @ full.curvature.A
    error = mean.std(0) / 200**0.5
    assert ((mean.mean(0) - expected).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("structure", ["full", "diag", "functional"])
def test_sampled_and_empirical_fisher(setting, structure):
    model, x, y = setting
    exact = laplace(model, nn.CrossEntropyLoss(), (x, y), structure)

    def precision(posterior):
        c = posterior.curvature
        return c.A.square().sum(0) if structure in ("lowrank", "functional") else c.diagonal()

    drawn = torch.stack(
        [
            precision(laplace(model, nn.CrossEntropyLoss(), (x, y), structure, fisher="mc", samples=4, seed=s))
            for s in range(60)
        ]
    )
    error = drawn.std(0) / 60**0.5
    assert ((drawn.mean(0) - precision(exact)).abs() < 4.5 * error + 1e-9).all()
    empirical = laplace(model, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])], structure, fisher="empirical")
    from paraboloid import statistics

    g = statistics(model, nn.CrossEntropyLoss(), (x, y), "sample_grads")["sample_grads"]
    close(precision(empirical), torch.cat([t.square().sum(0).flatten() for t in g.values()]))
