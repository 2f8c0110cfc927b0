"""The linearised posterior against dense matrices: evidence, mean, covariance, samples, densities."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tomography.characters import observed, scanned
from torch import nn

import paraboloid as pb
from paraboloid.problems.pictures import draw_characters
from paraboloid.tomography import (
    best_angles,
    deep_image_prior,
    image_posterior,
    linearised,
    measured_jacobian,
    sampled_evidence,
)
from paraboloid.tomography.evidence_ascent import Objective, ascend
from paraboloid.tomography.image_jacobian import ImageJacobian
from paraboloid.tomography.kernel_grams import packed_grams, unpacked
from paraboloid.tomography.kernel_prior import KernelPrior
from paraboloid.tomography.measured_jacobian import MeasuredJacobian
from paraboloid.tomography.sampled_evidence import Measurements, SampledEvidence
from paraboloid.tomography.u_net import UNet

SIZE = 6


class Network(nn.Module):
    """Small enough for dense matrices over its weights."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())
        self.last = nn.Conv2d(3, 1, 1)

    def forward(self, z):
        return self.last(self.first(z))[:, 0].exp()


@pytest.fixture(scope="module")
def fit():
    A, _, y, s2 = scanned(angles=4, size=SIZE)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, z = Network().double(), torch.rand(1, 1, SIZE, SIZE, dtype=torch.float64)
    return deep_image_prior(A, y, s2, iterations=60, model=model, input=z)


def some_prior(fit, kind="per_block"):
    prior = KernelPrior.of(fit.model, kind)
    steps = torch.arange(len(prior.blocks), dtype=torch.float64)
    return replace(prior, log_variance=steps / 3 - 1, log_length=steps / 2 - 0.3)


def dense(fit, prior, s2):
    """J, Sigma over the weights, A as a matrix, the prior covariance of images, and that of measurements."""
    weights = [dict(fit.model.named_parameters())[name] for name in prior.names]
    f = fit.model(fit.input)[0].flatten()
    J = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(e, weights, retain_graph=True)]) for e in f])
    blocks = []
    for C, w in zip(prior.covariances(), weights, strict=True):
        blocks += [C] * (w.numel() // len(C))
    Sigma = torch.block_diag(*blocks)
    A = torch.from_numpy(fit.A.to_scipy().toarray())
    K = J @ Sigma @ J.T
    w = torch.cat([w.detach().flatten() for w in weights])
    return J, Sigma, A, K, A @ K @ A.T + s2 * torch.eye(len(A)), w


def test_kernels_are_correlated_by_distance():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, (1, 3)))
    (big, small) = KernelPrior.of(model, "shared").blocks
    assert (big.size, small.size) == (3, 1) and big.parameters == ("0.weight",)
    prior = some_prior(type("Fit", (), {"model": model}), "shared")
    (C, c) = prior.covariances()
    v, l = prior.log_variance.exp(), prior.log_length.exp()
    assert C[0, 8] == pytest.approx(float(v[0] * math.exp(-math.sqrt(8) / l[0])), rel=1e-12)
    assert C[4, 5] == pytest.approx(float(v[0] * math.exp(-1 / l[0])), rel=1e-12)
    assert c.item() == pytest.approx(float(v[1]))
    u = [torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(1, 3, 1, 1, dtype=torch.float64)]
    w = [torch.randn_like(t) for t in u]
    expected = sum((a.flatten(2) @ D * b.flatten(2)).sum() for a, b, D in zip(u, w, prior.covariances(), strict=True))
    torch.testing.assert_close((prior.coefficients() * prior.forms(u, w)).sum(), expected)
    torch.testing.assert_close(sum((a * b).sum() for a, b in zip(u, prior.times(w), strict=True)), expected)
    torch.testing.assert_close(
        prior.square(prior.times(w)).sum(), sum((a * b).sum() for a, b in zip(w, prior.times(w), strict=True))
    )
    drawn = prior.draws(u, 4000, torch.Generator().manual_seed(0))[0].reshape(-1, 9)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), C, rtol=0.1, atol=0.05)


def test_grams_and_products_are_those_of_the_dense_jacobian(fit):
    prior = some_prior(fit)
    J, _, _, K, _, _ = dense(fit, prior, 1.0)
    ours = ImageJacobian(fit, prior.names)
    torch.testing.assert_close(unpacked(prior.coefficients() @ packed_grams(ours.rows(), prior.blocks)), K)
    u = torch.randn(3, SIZE**2, dtype=torch.float64)
    pulled = ours.pull(u)
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in pulled], 1), u @ J)
    torch.testing.assert_close(ours.push(prior.times(pulled)), u @ K)
    assert all(p.requires_grad for p in fit.model.parameters())


@pytest.mark.parametrize("kept", [4, 1e12], ids=["formed", "by products"])
def test_the_jacobian_of_measurements_is_the_dense_one(fit, kept, monkeypatch):
    monkeypatch.setattr(measured_jacobian, "KEPT", kept)
    monkeypatch.setattr(measured_jacobian, "TOGETHER", 7)
    prior, s2 = some_prior(fit), 0.3
    J, _, A, K, S, _ = dense(fit, prior, s2)
    B = MeasuredJacobian(ImageJacobian(fit, prior.names), fit.A, fit.sinogram.shape)
    assert (B.rows is None) == (kept > 4)
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(3, *w.shape, dtype=torch.float64, generator=generator) for w in B.J.weights]
    u = torch.randn(3, B.size, dtype=torch.float64, generator=generator)
    flat = torch.cat([t.flatten(1) for t in v], 1)
    torch.testing.assert_close(B.forth(v), flat @ (A @ J).T)
    torch.testing.assert_close(B.forth(v, flat @ J.T), flat @ (A @ J).T)
    torch.testing.assert_close(torch.cat([t.flatten(1) for t in B.back(u)], 1), u @ A @ J)
    system = Measurements(B, prior, s2)
    torch.testing.assert_close(system @ u.T, S @ u.T)
    torch.testing.assert_close(system.images(u), u @ A @ K)
    inverse = system.preconditioner(0)
    if B.rows is not None:
        torch.testing.assert_close(inverse @ (S @ u.T), u.T)
    torch.testing.assert_close(system.solve(u.T, 1e-9, preconditioner=inverse), torch.linalg.solve(S, u.T))
    little = MeasuredJacobian(ImageJacobian(fit, prior.names, max_memory=1000), fit.A, fit.sinogram.shape)
    assert little.rows is None


@pytest.mark.parametrize("evidence", ["exact", "sampled"])
def test_evidence_mean_and_covariance_are_those_of_the_linear_model(fit, evidence):
    count = 2000 if evidence == "exact" else 500
    found = linearised(fit, evidence=evidence, steps=0, samples=count, mean="linearised")
    s2 = fit.noise_variance
    J, Sigma, A, K, S, w = dense(fit, found.prior, s2)
    residual = (fit.sinogram - fit.A @ fit.image).flatten() + A @ J @ w
    normal = torch.distributions.MultivariateNormal(torch.zeros(len(S), dtype=torch.float64), S)
    value = found.log_evidence()
    assert float(value) == pytest.approx(
        float(normal.log_prob(residual)), abs=1e-4 if found.exact else 4 * value.standard_error + 1e-3
    )
    mean = fit.image.flatten() - J @ w + K @ A.T @ torch.linalg.solve(S, residual)
    torch.testing.assert_close(found.mean.flatten(), mean, rtol=1e-3, atol=1e-3)
    covariance = J @ torch.linalg.inv(torch.linalg.inv(Sigma) + J.T @ A.T @ A @ J / s2) @ J.T  # in weight space
    off = (found.covariance - covariance).norm() / covariance.norm()
    assert off < (1e-8 if found.exact else 0.2)
    draws = found.sample(count, seed=5)
    assert draws.shape == (count, SIZE, SIZE) and found.samples.shape == (count, SIZE, SIZE)
    torch.testing.assert_close(draws.std(0), covariance.diagonal().sqrt().view(SIZE, SIZE), rtol=0.2, atol=0.01)
    deviations = (draws - found.mean).flatten(1)
    assert (deviations.T @ deviations / count - covariance).norm() / covariance.norm() < (0.1 if found.exact else 0.2)
    assert torch.equal(found.sample(3, seed=1), found.sample(3, seed=1))
    error = (fit.image - found.mean).flatten()
    if found.exact:
        torch.testing.assert_close(found.std.flatten(), covariance.diagonal().sqrt())
        floor = (1e-3 * float(found.mean.abs().max())) ** 2 * torch.eye(SIZE**2, dtype=torch.float64)
        whole = torch.distributions.MultivariateNormal(torch.zeros(SIZE**2, dtype=torch.float64), covariance + floor)
        assert found.log_likelihood(fit.image, patch=SIZE) == pytest.approx(float(whole.log_prob(error)) / SIZE**2)
        pixels = torch.distributions.Normal(0.0, (covariance + floor).diagonal().sqrt())
        assert found.log_likelihood(fit.image) == pytest.approx(float(pixels.log_prob(error).mean()))
        parts = [
            (covariance + floor).view(SIZE, SIZE, SIZE, SIZE)[a : a + 4, b : b + 4, a : a + 4, b : b + 4]
            for a in (0, 4)
            for b in (0, 4)
        ]
        errors = [error.view(SIZE, SIZE)[a : a + 4, b : b + 4].flatten() for a in (0, 4) for b in (0, 4)]
        total = sum(
            torch.distributions.MultivariateNormal(
                torch.zeros(len(e), dtype=torch.float64), P.reshape(len(e), len(e))
            ).log_prob(e)
            for P, e in zip(parts, errors, strict=True)
        )
        assert found.log_likelihood(fit.image.numpy(), patch=4) == pytest.approx(float(total) / SIZE**2)
    else:
        assert found.log_likelihood(fit.image, patch=2) == pytest.approx(
            linearised(fit, steps=0, mean="linearised").log_likelihood(fit.image, patch=2), rel=0.05
        )


@pytest.mark.parametrize("evidence", ["exact", "sampled"])
def test_three_quarters_of_a_step_are_a_mixture_of_it_and_none(fit, evidence):
    count = 2000 if evidence == "exact" else 500
    bounded = replace(fit, bounds=(0.0, 0.9 * float(fit.image.max())))
    found = linearised(bounded, evidence=evidence, steps=0, samples=count)
    whole = linearised(bounded, evidence="exact", steps=0, mean="linearised")
    step = whole.optimum.clamp(*bounded.bounds) - fit.image
    assert not whole.undecided.any()
    torch.testing.assert_close(found.mean, fit.image + 0.75 * step, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole.mean, fit.image + step)
    parts = [(0.75, 0.25 * step.flatten()), (0.25, -0.75 * step.flatten())]  # how far each is from the mixture's mean
    covariance = whole.covariance + sum(p * torch.outer(d, d) for p, d in parts)
    draws = (found.sample(count, seed=5) - found.mean).flatten(1)
    assert (draws.T @ draws / count - covariance).norm() / covariance.norm() < 0.2
    assert (found.covariance - covariance).norm() / covariance.norm() < (1e-10 if found.exact else 0.2)
    assert (found.root().T @ found.root() - covariance).norm() / covariance.norm() < (1e-10 if found.exact else 0.2)


def test_with_independent_weights_it_is_the_functional_posterior_behind_the_measurement(fit):
    first = linearised(fit, "shared", steps=0)
    prior = replace(
        first.prior,
        log_variance=torch.full((2,), math.log(0.7), dtype=torch.float64),
        log_length=torch.full((2,), -9.0, dtype=torch.float64),
    )
    found = pb.tomography.ImagePosterior(fit, first.J, first.evidence, prior, 0.2, 8, 0, "network")
    assert torch.equal(found.mean, fit.image)
    batch = (fit.input, fit.sinogram.unsqueeze(0))
    other = pb.laplace(
        fit.model, fit.loss, batch, "functional", weights=prior.names, prior_precision=1 / 0.7, noise_variance=0.2
    )
    _, covariance = other.functional(fit.input)
    torch.testing.assert_close(found.covariance, covariance[0])


@pytest.mark.parametrize("weights", ["both", "optimum", "trained"])
def test_the_objective_rises_to_a_stationary_point(fit, weights):
    start = linearised(fit, weights=weights, steps=0)
    found = linearised(fit, weights=weights, steps=60)
    misfit = float((fit.sinogram - fit.A @ fit.image).square().sum())
    objective = Objective(weights, start.J.weights, misfit)

    def value(prior, s2):
        return float(objective.dense(start.evidence, prior, torch.tensor(s2, dtype=torch.float64)))

    best = value(found.prior, found.noise_variance)
    assert best > value(start.prior, start.noise_variance)
    for b in range(len(found.prior.blocks)):
        for step in (-0.3, 0.3):
            variance = found.prior.log_variance.clone()
            variance[b] += step
            assert value(replace(found.prior, log_variance=variance), found.noise_variance) < best + 1e-2
    for factor in (0.8, 1.25):
        assert value(found.prior, factor * found.noise_variance) < best + 1e-3
    J, Sigma, A, _, S, w = dense(fit, found.prior, found.noise_variance)
    inner = {"optimum": 0.0, "trained": 1.0, "both": 1.0}[weights] * w @ torch.linalg.solve(Sigma, w)
    residual = (fit.sinogram - fit.A @ fit.image).flatten() + (0 if weights == "trained" else A @ J @ w)
    data = misfit / found.noise_variance if weights == "trained" else residual @ torch.linalg.solve(S, residual)
    expected = -(data + inner + torch.logdet(S) + (0 if weights == "trained" else len(S) * math.log(2 * math.pi))) / 2
    assert best == pytest.approx(float(expected))


@pytest.mark.parametrize("weights", ["both", "trained"])
def test_products_alone_find_the_same_prior(fit, weights):
    """With every unit vector as a probe the gradient has no noise."""
    exact = linearised(fit, weights=weights, steps=100)
    sampled = SampledEvidence(exact.J, fit.A, exact.evidence.residual.view_as(fit.sinogram), tol=1e-3)
    m = fit.sinogram.numel()
    sampled.probes = m**0.5 * torch.eye(m, dtype=torch.float64)
    misfit = float((fit.sinogram - fit.A @ fit.image).square().sum())
    objective = Objective(weights, exact.J.weights, misfit)
    prior, s2 = ascend(sampled, objective, KernelPrior.of(fit.model, "per_block"), fit.noise_variance, True, 15)

    def value(prior, s2):
        return float(objective.dense(exact.evidence, prior, torch.tensor(s2, dtype=torch.float64)))

    first = value(KernelPrior.of(fit.model, "per_block"), fit.noise_variance)
    best = value(exact.prior, exact.noise_variance)
    assert value(prior, s2) > best - 0.05 * (best - first)


@pytest.mark.parametrize("weights", ["both", "trained", "optimum"])
def test_beyond_small_images_the_evidence_is_exact_as_long_as_its_measurements_fit(fit, weights, monkeypatch):
    """By matrices of the measurements alone: the same prior and noise, posterior images by products."""
    exact = linearised(fit, weights=weights, steps=40)
    monkeypatch.setattr(image_posterior, "LARGEST", 1e9)  # no matrix of pixels fits
    found = linearised(fit, weights=weights, steps=40, samples=3)
    assert exact.exact and not found.exact
    torch.testing.assert_close(found.prior.log_variance, exact.prior.log_variance, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.prior.log_length, exact.prior.log_length, rtol=1e-3, atol=1e-3)
    assert found.noise_variance == pytest.approx(exact.noise_variance, rel=1e-4)
    torch.testing.assert_close(found.mean, exact.mean, rtol=1e-2, atol=1e-3)
    monkeypatch.setattr(sampled_evidence, "KEPT", 1e9)  # nor one of measurements: the probes' ascent
    fewer = linearised(fit, weights=weights, steps=2, samples=3)
    assert not torch.equal(fewer.prior.log_variance, exact.prior.log_variance)


def test_the_true_image_is_likelier_than_under_equal_variances():
    A, x, y, s2 = scanned(angles=6, size=12, dtype=torch.float32)
    fit = deep_image_prior(A, y, s2, iterations=60)
    found = linearised(fit, samples=4, steps=15)
    assert found.exact and found.std.shape == found.mean.shape == (12, 12)
    isotropic = torch.distributions.Normal(0.0, (x - found.mean).square().mean().sqrt()).log_prob(x - found.mean).mean()
    assert found.log_likelihood(x) > float(isotropic)
    assert (x - found.mean).norm() < 1.1 * (x - fit.image).norm()
    assert 0.3 < found.noise_variance / s2 < 3
    exact, sampled = (linearised(fit, samples=30, steps=0, evidence=e) for e in ("exact", "sampled"))
    assert sampled.mean.dtype == sampled.std.dtype == torch.float32  # products are of float64 all the same
    assert (sampled.mean - exact.mean).abs().max() < 0.1 * exact.std.mean()
    assert 0.8 < float(sampled.std.mean() / exact.std.mean()) < 1.25
    kept = linearised(fit, samples=4, learn_noise=False, steps=1, mean="network", evidence="sampled", probes=2)
    assert kept.noise_variance == s2 and torch.equal(kept.mean, fit.image) and kept.std.shape == (12, 12)


def test_of_a_character_products_alone_give_the_exact_evidence():
    """Of 28 x 28 pixels, as published: within five per cent, and within four standard errors."""
    truth = torch.from_numpy(draw_characters(1, 0))[0]
    A = pb.tomography.ParallelBeam(28, 5)
    y, s2 = observed(A, truth)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(1, (), (0.0, 1.2), channels=4)  # so that J is quick to form
    z = pb.tomography.total_variation(A, y, noise_variance=s2)
    fit = deep_image_prior(A, y, s2, iterations=20, model=model, input=z[None, None])
    exact = linearised(fit, evidence="exact", steps=3)
    sampled = SampledEvidence(
        ImageJacobian(fit, exact.prior.names, dtype=torch.float64), A, exact.evidence.residual.view_as(y)
    )
    found = sampled.value(exact.prior, exact.noise_variance, samples=4, steps=8, rank=50)
    assert abs(found - exact.log_evidence()) < 0.05 * abs(exact.log_evidence())
    assert abs(found - exact.log_evidence()) < 4 * found.standard_error + 1


def test_the_mean_is_three_quarters_of_a_step_within_the_bounds():
    A, x, y, s2 = scanned(angles=4)
    fit = deep_image_prior(A, y, s2, iterations=40)
    assert fit.bounds == fit.model.bounds and fit.bounds[0] == 0
    whole, damped = (linearised(fit, steps=1, mean=mean) for mean in ("linearised", "damped"))
    assert float(whole.optimum.min()) < 0
    assert torch.equal(whole.mean, whole.optimum.clamp(*fit.bounds))
    torch.testing.assert_close(damped.mean, 0.75 * whole.mean + 0.25 * fit.image)
    assert (whole.mean - x).norm() < (whole.optimum - x).norm()


def test_a_float32_fit_has_the_mean_and_samples_of_the_same_fit_in_float64():
    """Where A sees little, S is far below the rounding of A K A^T in float32."""
    A, _, y, s2 = scanned(angles=16, size=12, level=0.002)
    fit = deep_image_prior(A, y.float(), s2, iterations=40)
    doubled = replace(
        fit, image=fit.image.double(), model=copy.deepcopy(fit.model).double(), input=fit.input.double(), sinogram=y
    )
    one, two = (linearised(f, steps=2, samples=200) for f in (fit, doubled))
    assert one.mean.dtype == torch.float32
    assert (one.mean - two.mean).abs().max() < 0.05 * two.std.mean()
    torch.testing.assert_close(one.std.double(), two.std, rtol=0.02, atol=1e-5)
    torch.testing.assert_close(one.samples.std(0), one.std, rtol=0.3, atol=1e-5)


def test_a_stack_of_slices():
    A, x, y, s2 = scanned(angles=4, size=6)
    fit = deep_image_prior(A, torch.stack([y, y / 2]), s2, iterations=3)
    exact, sampled = linearised(fit, steps=1), linearised(fit, steps=1, evidence="sampled", samples=3, probes=2)
    assert exact.mean.shape == exact.std.shape == (2, 6, 6) and exact.sample(3).shape == (3, 2, 6, 6)
    assert isinstance(exact.log_likelihood(torch.stack([x, x / 2]), patch=3), float)
    assert sampled.std.shape == (2, 6, 6)


ERRORS = [
    (lambda fit: linearised(fit, prior="flat"), "prior is 'flat'; expected one of"),
    (lambda fit: linearised(fit, mean="median"), "mean is 'median'"),
    (lambda fit: linearised(fit, weights="none"), "weights is 'none'"),
    (lambda fit: linearised(fit, evidence="some"), "evidence is 'some'"),
    (lambda fit: linearised(fit, samples=0), "samples is 0"),
    (lambda fit: linearised(fit, probes=0), "probes is 0"),
    (lambda fit: linearised(fit, probes=2.5, evidence="sampled"), "probes is 2.5"),
    (lambda fit: linearised(fit, seed="a"), "seed is 'a'; expected an integer"),
    (lambda fit: linearised(fit, max_memory="a"), "max_memory is 'a'; expected a number of bytes"),
    (lambda fit: linearised(fit, learn_noise="a"), "learn_noise is 'a'"),
    (lambda fit: linearised(fit, mean=torch.zeros(2)), r"mean is tensor.*; expected one of"),
    *((lambda fit, v=v: linearised(fit, steps=0).log_likelihood(v), "the image (is|has)") for v in ("a", None, [1, "a"], 1j, [])),
    *((lambda fit, v=v: linearised(fit, steps=0).sample(2, v), "seed is .*; expected an integer") for v in ("a", None, 1.5, True)),
    *((lambda fit, v=v: linearised(fit, steps=0).sample(v), "k is ") for v in ("a", None, 0, 1.5)),
    *((lambda fit, v=v: best_angles(linearised(fit, steps=0), v), "the candidates (are|is|has)") for v in ("a", None, {}, 1j, [])),
    (lambda fit: best_angles(fit, [0.1]), "posterior is a Reconstruction; expected what linearised returns"),
    (lambda fit: linearised(fit.image), "fit is a Tensor; expected what deep_image_prior returns"),
    (lambda fit: linearised(fit, steps=0).log_likelihood(math.nan * fit.image), "the image has shape .*; expected finite numbers"),
    (lambda fit: linearised(replace_model(fit, nn.Flatten())), "has no nn.Conv2d with a square kernel"),
    (lambda fit: linearised(fit, steps=0).log_likelihood(torch.zeros(3, 3)), r"the image has shape \[3, 3\]; expected finite numbers of shape \[6, 6\]"),
    (lambda fit: linearised(fit, steps=0).log_likelihood(fit.image, patch=7), "patch is 7"),
    (lambda fit: linearised(fit, steps=0).sample(0), "k is 0"),
]  # fmt: skip


def replace_model(fit, model):
    return replace(fit, model=model)


@pytest.mark.parametrize("call, message", ERRORS, ids=[m for _, m in ERRORS])
def test_errors(fit, call, message):
    with pytest.raises(ValueError, match=message):
        call(fit)


def test_what_does_not_fit_is_refused(fit, monkeypatch):
    from paraboloid.passes.memory import DENSE

    monkeypatch.setattr(DENSE, "default", 1000)
    with pytest.raises(ValueError, match=r"evidence='exact' over 36 pixels would take .* Use evidence='sampled'"):
        linearised(fit, evidence="exact")
    assert not linearised(fit, steps=0).exact


def test_the_next_angle_is_the_one_that_tells_most(fit):
    found = linearised(fit, steps=5)
    candidates = torch.linspace(0.1, 3.0, 5, dtype=torch.float64)
    chosen, gains = pb.tomography.best_angles(found, candidates, count=3)
    P, s2, told = found.covariance, found.noise_variance, []
    for step in range(3):
        views = [torch.from_numpy(fit.A.at(a.view(1)).to_scipy().toarray()) for a in candidates]
        gain = [float(torch.logdet(torch.eye(len(V)) + V @ P @ V.T / s2)) / 2 for V in views]
        told.append(max((g, i) for i, g in enumerate(gain) if i not in chosen[:step]))
        V = views[chosen[step]]
        P = P - P @ V.T @ torch.linalg.solve(V @ P @ V.T + s2 * torch.eye(len(V)), V @ P)
    assert chosen == [i for _, i in told]
    torch.testing.assert_close(
        gains.double(), torch.tensor([g for g, _ in told], dtype=torch.float64), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="count is 6"):
        pb.tomography.best_angles(found, candidates, count=6)
    other = replace(fit, A=pb.tomography.as_projector(fit.A.to_scipy(), fit.sinogram))
    with pytest.raises(ValueError, match="expected a ParallelBeam or a FanBeam"):
        pb.tomography.best_angles(linearised(other, steps=0), candidates)
    few = linearised(fit, steps=0, evidence="sampled", samples=8)
    assert few.root().shape == (8, SIZE**2)


@pytest.mark.parametrize("evidence", ["exact", "sampled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_measurements_without_noise(dtype, evidence):
    A = pb.tomography.ParallelBeam(8, 4)
    x = torch.ones(8, 8, dtype=dtype).tril()
    fit = deep_image_prior(A, A @ x, 0.1, iterations=15)
    found = linearised(fit, samples=3, evidence=evidence, steps=15 if evidence == "exact" else 3, probes=2)
    assert found.std.isfinite().all() and found.mean.isfinite().all() and math.isfinite(found.log_likelihood(x))
