"""What is wrong with data, kernels and settings: a clear error, or the right answer."""

import numpy as np
import pytest
import torch
from gp.test_conditioning import KERNEL, NEW, NOISE, data, exact

import paraboloid as pb
from paraboloid.gp import solvers

X, Y = data(60)
NAN = Y.clone()
NAN[7] = float("nan")
INF = X.clone()
INF[[3, 5]] = float("inf")
WRONG = [
    (X, NAN, {}, "y holds NaN or infinity in 1 of 60 rows, first in row 7; expected finite numbers"),
    (INF, Y, {}, "x holds NaN or infinity in 2 of 60 rows, first in row 3"),
    (X, Y[:50], {}, r"y has shape \(50,\) and dtype torch.float64; expected real targets \[60\] or \[60, C\]"),
    (X[:0], Y[:0], {}, r"x has shape \(0, 2\) .* expected real inputs \[N, d\], N and d at least 1"),
    (X[None], Y, {}, r"x has shape \(1, 60, 2\)"),
    (X + 1j, Y, {}, "expected real inputs"),
    (X, Y, {"noise_variance": -0.1}, "noise_variance is -0.1; expected variances of at least 0"),
    (X, Y, {"noise_variance": float("nan")}, "noise_variance is nan; expected variances of at least 0"),
    (X, Y, {"noise_variance": torch.ones(3)}, r"noise_variance has shape \(3,\); expected a number, or \[60\]"),
    (X, Y, {"noise_variance": torch.ones(60), "solver": "sgd"}, "solver 'sgd' expects a number: take 'sdd'"),
    (X, Y, {"noise_variance": 0.0, "solver": "cg"}, "noise_variance is 0.0; solver 'cg' expects a positive one"),
    (X, Y, {"solver": "magic"}, r"solver is 'magic'; expected one of \('auto', 'cholesky', 'cg'"),
    (X, Y, {"samples": -1}, "samples is -1; expected an integer of at least 0"),
    (X, Y, {"start": torch.zeros(3)}, r"start has shape \(3,\); expected \(60, 65\)"),
    (X, Y, {"start": torch.full((60, 65), float("nan"))}, r"expected \(60, 65\), finite"),
    (1e200 * X, Y, {}, r"the inputs reach .*, whose squares in lengthscales of Matern.* overflow in torch.float64"),
    (X, 1e200 * Y, {"solver": "cg"}, r"y reaches .*e\+200, whose square overflows in torch.float64"),
    ([[1, 2], [3]], [1, 2], {}, "x is a list that is no array of numbers"),
    (["a", "b"], [1, 2], {}, "x is a list that is no array of numbers"),
    (None, Y, {}, "x is a NoneType that is no array of numbers"),
    (X, Y, {"noise_variance": "a"}, "noise_variance is a ndarray that is no array of numbers"),
    (X, Y, {"noise_variance": 1j}, "noise_variance is 1j; expected variances of at least 0"),
    (X, Y, {"max_memory": "1 GB"}, "max_memory is '1 GB'; expected a number of bytes, or None"),
    (X, Y, {"seed": None}, "seed is None; expected an integer"),
    (X, Y, {"seed": "a"}, "seed is 'a'; expected an integer"),
    *((X, Y, {"solver": s, "steps": n}, f"steps is {n}; expected an integer of at least 0")
      for s in solvers.SOLVERS for n in (-1, 2.5)),
    *((X, Y, {"solver": s, "tol": t}, f"tol is {t}; expected a positive number, or None")
      for s in solvers.SOLVERS for t in (0, -1.0, float("nan"))),
    *((X, Y, {"solver": s, "batch_size": n}, f"batch_size is {n}; expected an integer of at least 1")
      for s in ("block", "sdd", "sgd") for n in (0, -1)),
    *((X, Y, {"solver": s, "step_size": n}, f"step_size is {n}; expected a positive number, or None")
      for s in ("sdd", "sgd") for n in (0.0, -1.0, float("nan"), float("inf"))),
    (X, Y, {"solver": "cg", "rank": 0}, "rank is 0; expected an integer of at least 1"),
    (X, Y, {"solver": "sgd", "rank": -1}, "rank is -1; expected an integer of at least 0"),
]  # fmt: skip


@pytest.mark.parametrize("x, y, options, message", WRONG, ids=[m[:40] for *_, m in WRONG])
def test_wrong_data_and_settings(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        pb.gp.condition(KERNEL, x, y, **{"noise_variance": NOISE, **options})


@pytest.mark.parametrize("samples", [0, 2])
def test_kernels_that_do_not_fit_the_data(samples):
    for kernel, message in (
        (pb.gp.RBF(torch.ones(3)), "lengthscale has 3 entries and the inputs have 2 dimensions"),
        (pb.gp.RBF(dims=[5]), r"dims is \[5\] and the inputs have 2 dimensions; expected numbers in 0\.\.1"),
        (pb.gp.RBF() + pb.gp.Matern(1.5, torch.ones(2), dims=[0]), "lengthscale has 2 entries and the inputs have 1"),
    ):
        with pytest.raises(ValueError, match=message):
            pb.gp.condition(kernel, X, Y, NOISE, samples=samples)
    with pytest.raises(ValueError, match=r"dims is \[\]; expected the numbers of one or more input dimensions"):
        pb.gp.RBF(dims=[])
    with pytest.raises(ValueError, match="lengthscale is 'a'; expected a positive number"):
        pb.gp.RBF("a")
    with pytest.raises(ValueError, match=r"alpha is 0\.0; expected a positive number"):
        pb.gp.RationalQuadratic(0.0)
    torch.testing.assert_close((1 + pb.gp.RBF())(X), pb.gp.RBF()(X) + 1)


def test_wrong_labels_and_starts():
    with pytest.raises(ValueError, match="labels is a list that is no array of numbers"):
        pb.gp.classify(KERNEL, X, ["a", "b"] * 30)
    with pytest.raises(ValueError, match=r"labels have dtype torch\.complex128; expected integers"):
        pb.gp.classify(KERNEL, X, Y + 1j)
    with pytest.raises(ValueError, match="every one of the 60 labels is a class of its own; expected classes"):
        pb.gp.classify(KERNEL, X, Y)
    with pytest.raises(ValueError, match="labels hold 60 that are not finite"):
        pb.gp.classify(KERNEL, X, torch.full((60,), float("nan")), likelihood="softmax")
    with pytest.raises(ValueError, match=r"noise_variance is tensor[^;]*; expected a positive number to start from"):
        pb.gp.fit_hyperparameters(KERNEL, X, Y, torch.ones(60))


def test_wrong_inputs_to_predict():
    gp = pb.gp.condition(KERNEL, X, Y, NOISE, samples=0)
    with pytest.raises(ValueError, match="x has 3 dimensions; expected 2, as the data has"):
        gp.mean(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="x holds NaN"):
        gp.variance(torch.full((4, 2), float("nan")))
    with pytest.raises(ValueError, match=r"y has shape \(3,\) .* expected real targets \[60\]"):
        gp.nll(NEW, torch.zeros(3))
    with pytest.raises(ValueError, match=r"y has shape \(60, 1\); expected that of the mean, \(60,\)"):
        gp.nll(NEW, torch.zeros(60, 1))
    assert pb.gp.condition(KERNEL, X, Y, NOISE, solver="cg", samples=0).mean(NEW).shape == (60,)
    with pytest.raises(ValueError, match="solver 'cg' keeps no factor for the determinant"):
        pb.gp.condition(KERNEL, X, Y, NOISE, solver="cg", samples=0).log_evidence()


def test_tensors_without_values_are_refused_at_every_door():
    meta, gp = torch.zeros(60, device="meta"), pb.gp.condition(KERNEL, X, Y, NOISE, samples=0)
    for wrong in (
        lambda: pb.gp.condition(KERNEL, X, Y, meta),
        lambda: pb.gp.condition(KERNEL, X, Y, NOISE, "cg", 0, start=meta[:, None]),
        lambda: pb.gp.condition(KERNEL, X, Y, NOISE, inducing=meta[:, None]),
        lambda: pb.gp.RBF(meta[0]),
        lambda: pb.gp.classify(KERNEL, X, meta),
        lambda: pb.gp.fit_hyperparameters(KERNEL, X, meta),
        lambda: gp.mean(meta),
        lambda: gp.append(X, meta),
        lambda: gp.append(X, Y, meta),
        lambda: gp.nll(X, meta),
    ):
        with pytest.raises(ValueError, match="on the device 'meta', which holds no numbers"):
            wrong()


def test_more_data_and_targets_are_checked_like_the_first():
    gp = pb.gp.condition(KERNEL, X, Y, NOISE, samples=0)
    for y, message in ((Y + 1j, "dtype torch.complex128; expected real targets"), (NAN, "y holds NaN"),
                       (["a"] * 60, "y is a list that is no array of numbers"), (Y[:4], r"y has shape \(4,\)")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            gp.append(X, y)
        with pytest.raises(ValueError, match=message):
            gp.nll(X, y)
    assert gp.append(X.float(), (10 * Y).int()).mean(NEW).dtype == torch.float64
    with pytest.raises(ValueError, match="start is a str that is no array"):
        pb.gp.condition(KERNEL, X, Y, NOISE, start="a")
    with pytest.raises(ValueError, match=r"expected .*, finite"):
        pb.gp.condition(KERNEL, X, Y, NOISE, samples=0, start=Y[:, None] + 1j)
    with pytest.raises(ValueError, match=r"lengthscale is \(1\+1j\); expected a positive number"):
        pb.gp.RBF(torch.tensor(1 + 1j))
    model = pb.gp.GPRegressor(optimize=False).fit(X, Y)
    for count in (2.5, -1):
        with pytest.raises(ValueError, match=f"n_samples is {count}; expected an integer of at least 0"):
            model.sample_y(X, count)


def test_arrays_that_torch_does_not_share_are_copied():
    x, y = X.numpy()[::-1], Y.numpy()[::-1]
    torch.testing.assert_close(
        pb.gp.condition(KERNEL, x, y, NOISE).mean(NEW), pb.gp.condition(KERNEL, X, Y, NOISE).mean(NEW)
    )
    constant = np.broadcast_to(2.0, (60,))  # read-only
    assert pb.gp.condition(KERNEL, X, constant, NOISE).y.tolist() == [2.0] * 60


def test_duplicate_inputs_are_answered_with_noise_and_refused_without():
    x, y = torch.cat([X, X]), torch.cat([Y, Y + 0.1])
    mean, _ = exact(KERNEL, x, y, NEW)
    for solver in ("cholesky", "cg", "block", "sdd"):
        gp = pb.gp.condition(KERNEL, x, y, NOISE, solver=solver, samples=1)
        assert (gp.mean(NEW) - mean).norm() < 1e-3 * mean.norm()
    with pytest.raises(torch.linalg.LinAlgError, match=r"expected a positive definite matrix\. Raise noise_variance"):
        pb.gp.condition(pb.gp.RBF(), x, y, 0.0)
    with pytest.raises(torch.linalg.LinAlgError, match="take out duplicate"):  # its pivots are tiny, and positive
        pb.gp.condition(pb.gp.Matern(0.5, 1.2, 0.7), torch.cat([X, X, X[:5]]), torch.cat([Y, Y + 0.1, Y[:5]]), 0.0)


def test_without_noise_the_data_is_interpolated():
    gp = pb.gp.condition(pb.gp.Matern(0.5), X, Y, 0.0, samples=3)
    torch.testing.assert_close(gp.mean(X), Y, rtol=1e-6, atol=1e-6)
    assert gp.variance(X).max() < 1e-6


class Indefinite(pb.gp.RBF):
    def __call__(self, x, z=None):
        return -super().__call__(x, z)

    def tile(self, left, right, buffers):
        return super().tile(left, right, buffers).neg_()


class Negative(pb.gp.RBF):
    def diagonal(self, x):
        return -super().diagonal(x)


@pytest.mark.parametrize("solver", ["cholesky", "cg", "block", "sdd", "sgd"])
def test_a_kernel_that_is_not_positive_definite_is_refused(solver):
    with pytest.raises((ValueError, torch.linalg.LinAlgError), match="expected a positive"):
        pb.gp.condition(Indefinite(), X, Y, NOISE, solver=solver, samples=0)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"K \+ noise of Indefinite.* has no Cholesky factor at the start"
    ):
        pb.gp.fit_hyperparameters(Indefinite(), X, Y, NOISE)
    with pytest.raises(torch.linalg.LinAlgError, match=r"a block of 60 rows of K .* has the eigenvalue -"):
        pb.gp.condition(Indefinite(), X, Y, NOISE, samples=0, inducing=10)
    with pytest.raises(ValueError, match="the kernel Negative is -1 at input 0 with itself; expected"):
        pb.gp.condition(Negative(), X, Y, NOISE, solver=solver, samples=0)


def test_numbers_of_a_kernel_may_have_a_graph_and_inputs_must_have_values():
    lengthscale = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    gp = pb.gp.condition(pb.gp.Matern(1.5, lengthscale) + pb.gp.RBF(), X, Y, NOISE, samples=2)
    plain = pb.gp.condition(pb.gp.Matern(1.5, lengthscale.detach()) + pb.gp.RBF(), X, Y, NOISE, samples=2)
    assert torch.equal(gp.sample(NEW), plain.sample(NEW)) and not gp.mean(NEW).requires_grad
    with pytest.raises(ValueError, match="x is on the device 'meta', which holds no numbers"):
        pb.gp.condition(KERNEL, X.to("meta"), Y, NOISE)


def test_one_point_constant_targets_integers_and_mixed_types():
    one = pb.gp.condition(KERNEL, X[:1], Y[:1], NOISE)
    torch.testing.assert_close(one.mean(X[:1]), Y[:1] * 1.7 / 1.8)
    torch.testing.assert_close(one.variance(X[:1]), torch.tensor([1.7 - 1.7**2 / 1.8], dtype=X.dtype))
    for solver in ("cg", "block", "sdd"):
        torch.testing.assert_close(
            pb.gp.condition(KERNEL, X[:1], Y[:1], NOISE, solver=solver).mean(X[:1]),
            one.mean(X[:1]),
            rtol=1e-3,
            atol=1e-3,
        )
    for level in (0.0, 3.0):
        gp = pb.gp.condition(KERNEL, X, torch.full((60,), level), NOISE, solver="cg")
        mean, _ = exact(KERNEL, X, torch.full_like(Y, level), NEW)
        assert (gp.mean(NEW) - mean).norm() <= 1e-3 * mean.norm()
    whole = torch.arange(30)
    gp = pb.gp.condition(pb.gp.RBF(3.0), whole, whole, NOISE)
    assert gp.mean(whole).dtype == torch.float64
    torch.testing.assert_close(
        gp.mean(whole), exact(pb.gp.RBF(3.0), whole[:, None].double(), whole.double(), whole[:, None].double())[0]
    )
    mixed = pb.gp.condition(KERNEL, X.float(), Y, NOISE)
    assert mixed.mean(NEW.float()).dtype == torch.float64
    assert pb.gp.condition(KERNEL, X.numpy(), Y.numpy(), NOISE).mean(NEW.numpy()).shape == (60,)


def test_what_would_not_fit_is_said_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(solvers.DENSE, "default", 10_000)
    with pytest.raises(
        ValueError, match=r"a Cholesky factor of 60 inputs takes 0\.0 GiB with its matrix; expected at most"
    ):
        pb.gp.condition(KERNEL, X, Y, NOISE, solver="cholesky")


@pytest.mark.parametrize("options, what", [
    ({"samples": 10**9}, "2048 random features of 1000000000 functions"),
    ({"features": 10**9}, "1000000000 random features of 64 functions"),
    ({"inducing": 10**6}, "1000000 inducing inputs"),
])  # fmt: skip
def test_more_than_there_is_is_said_before_it_is_tried(options, what):
    with pytest.raises(ValueError, match=rf"conditioning would take .* GiB, most of it for {what}; .* that are free"):
        pb.gp.condition(KERNEL, X, Y, NOISE, **options)


def test_hardly_any_noise_is_answered():
    exactly = pb.gp.condition(KERNEL, X, Y, 1e-300, "cholesky", 0).mean(NEW)
    for solver in ("cg", "block", "auto"):
        torch.testing.assert_close(
            pb.gp.condition(KERNEL, X, Y, 1e-300, solver, 0, tol=1e-8).mean(NEW), exactly, rtol=1e-3, atol=1e-3
        )


def test_a_tolerance_that_is_not_met_is_told():
    x, y = data(400)
    with pytest.warns(UserWarning, match="at a relative residual of .*; expected 1e-30"):
        pb.gp.condition(KERNEL, x, y, NOISE, solver="cg", samples=0, tol=1e-30)
