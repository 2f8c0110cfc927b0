"""The same numbers on a CUDA device as on the CPU, in float64; skipped where there is none."""

import copy

import models
import pytest
import torch
from torch import nn

import paraboloid as pb

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

NETS = [
    "mlp",
    "residual cnn",
    "conv1d",
    "conv3d",
    "class token",
    "shared",
    "low rank",
    "reparametrised",
    "vit",
    "resnet",
]
EXACT = [
    "grad", "sample_grads", "square_norms", "gram", "second_moment", "variance", "diag_ggn", "sqrt_ggn", "diag_hessian",
]  # fmt: skip
CE = nn.CrossEntropyLoss()


def problem(name="mlp", n=6):
    """(model, x, y) on the CPU and on the device."""
    model, x = models.make(name, n)
    y = torch.arange(n) % 2
    return (model, x, y), (copy.deepcopy(model).cuda(), x.cuda(), y.cuda())


def close(actual, expected, tolerance=1e-8):
    assert actual.is_cuda
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def dataset(n=60):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.arange(n) % 3


@pytest.mark.filterwarnings("ignore:diag_hessian")  # falls back for some of them
@pytest.mark.parametrize("name", NETS)
def test_statistics(name):
    (model, x, y), (there, x2, y2) = problem(name)
    expected, found = pb.statistics(model, CE, (x, y), EXACT), pb.statistics(there, CE, (x2, y2), EXACT)
    for quantity in EXACT:
        for k, t in expected[quantity].items():
            close(found[quantity][k], t)


@pytest.mark.parametrize("name", ["mlp", "residual cnn", "conv1d", "class token"])
def test_kronecker_factors_and_sampled_quantities(name):
    (model, x, y), (there, x2, y2) = problem(name)
    expected, found = pb.statistics(model, CE, (x, y), "kflr"), pb.statistics(there, CE, (x2, y2), "kflr")
    for k, block in expected["kflr"].items():
        close(found["kflr"][k].to_dense(), block.to_dense())
    sampled = [pb.statistics(there, CE, (x2, y2), ["diag_ggn_mc", "kfac"], seed=s) for s in (3, 3, 4)]
    first, same, other = (
        s["diag_ggn_mc"]["0.weight" if name == "mlp" else next(iter(s["diag_ggn_mc"]))] for s in sampled
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("build", [pb.GGN, pb.Hessian, pb.EmpiricalFisher, pb.DiagonalGGN])
@pytest.mark.parametrize("name", ["mlp", "residual cnn", "class token"])
def test_operators(build, name):
    (model, x, y), (there, x2, y2) = problem(name)
    A, B = build(model, CE, (x, y)), build(there, CE, (x2, y2))
    v = torch.randn(A.shape[0], 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    close(B @ v.cuda(), A @ v)
    close(B.diagonal(), A.diagonal())
    if build is pb.GGN:
        close(B.eigsh(3)[0], A.eigsh(3)[0])
        close(B.solve(v[:, 0].cuda(), damping=0.1), A.solve(v[:, 0], damping=0.1), 1e-4)


@pytest.mark.parametrize("build", [pb.KFAC, pb.EKFAC])
@pytest.mark.parametrize("name", ["mlp", "residual cnn"])
def test_kronecker_operators(build, name):
    (model, x, y), (there, x2, y2) = problem(name)
    A, B = build(model, CE, (x, y), fisher="exact"), build(there, CE, (x2, y2), fisher="exact")
    close(B.to_dense(), A.to_dense())
    v = torch.ones(A.shape[0], dtype=torch.float64)
    close(B.inverse(0.1) @ v.cuda(), A.inverse(0.1) @ v)
    close(torch.as_tensor(B.logdet(0.1)).cuda(), torch.as_tensor(A.logdet(0.1)).cpu())


def test_quadratics_and_their_bias():
    (model, x, y), (there, x2, y2) = problem("mlp", 12)
    q, q2 = pb.quadratic(model, CE, (x, y)), pb.quadratic(there, CE, (x2, y2))
    directions = q.eigen_directions(3)
    for found, expected in zip(q2.along(directions.cuda()), q.along(directions), strict=True):
        close(found, expected)
    x, y = dataset()
    found = pb.bias(there, CE, torch.utils.data.TensorDataset(x.cuda(), y.cuda()), batch_size=8, k=2, repeats=3)
    assert torch.isfinite(torch.as_tensor(found.ratio("same"))).all()


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "ekfac", "lowrank", "functional"])
def test_posteriors(structure, tmp_path):
    (model, x, y), (there, x2, y2) = problem("residual cnn")
    expected = pb.laplace(model, CE, (x, y), structure, rank=4, prior_precision=0.5)
    found = pb.laplace(there, CE, (x2, y2), structure, rank=4, prior_precision=0.5)
    close(found.functional(x2)[1], expected.functional(x)[1], 1e-7)
    close(found.predict(x2), expected.predict(x), 1e-7)
    close(found.log_evidence(), expected.log_evidence())
    assert all(t.is_cuda and len(t) == 5 for t in found.sample(5).values())
    found.tune_prior("evidence").match_confidence()
    expected.tune_prior("evidence").match_confidence()
    assert found.prior_precision == pytest.approx(expected.prior_precision, rel=1e-5)
    found.save(tmp_path / "p.pt")
    assert torch.equal(pb.load_posterior(tmp_path / "p.pt", there, CE).predict(x2), found.predict(x2))


def test_the_last_layer_in_closed_form():
    (model, x, y), (there, x2, y2) = problem("mlp")
    for structure in ("diag", "kron"):
        options = {"structure": structure, "weights": "last_layer"}
        close(
            pb.laplace(there, CE, (x2, y2), **options).predict(x2), pb.laplace(model, CE, (x, y), **options).predict(x)
        )


@pytest.mark.parametrize("name", ["KFAC", "EKFAC", "Preconditioned", "KBFGS", "KBFGSL", "HessianFree", "Polar"])
def test_optimisers(name):
    """The loss falls; where no label is sampled, the steps are those on the CPU."""
    losses = {}
    for device in ("cpu", "cuda"):
        model, (x, y) = models.make("mlp", 3)[0].to(device), (t.to(device) for t in dataset())
        options = {"curvature": "diag_ggn"} if name == "Preconditioned" else {}
        optimizer = getattr(pb.optim, name)(model, CE, **options)
        if name.startswith("KBFGS"):
            optimizer.warm_start([(x, y)])
        losses[device] = []
        for _ in range(8):

            def closure(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                loss = CE(model(x), y)
                loss.backward()
                return loss

            losses[device].append(CE(model(x), y).item())
            if name == "HessianFree":
                optimizer.step((x, y))
            else:
                closure()
                optimizer.step(closure) if name.startswith("KBFGS") else optimizer.step()
    assert losses["cuda"][-1] < losses["cuda"][0]
    if name not in ("KFAC", "EKFAC"):
        assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-6)


def test_noise():
    x, y = dataset()
    there, data = problem("mlp")[1][0], torch.utils.data.TensorDataset(x.cuda(), y.cuda())
    noise = pb.noise.compare(there, CE, data, batch_size=6, estimators=["sgb", "sg2b", "svrg", "gc"], draws=4)
    assert noise["svrg"].average_variance < noise["sgb"].average_variance
    clusters = pb.noise.GradientClustering(there, CE, num_clusters=4, seed=0).fit(data, batch_size=10, passes=2)
    assert sorted(set(clusters.assignments.tolist())) == list(range(len(clusters.sizes)))


def test_autocast_and_the_global_random_state():
    _, (there, x, y) = problem("mlp")
    there, x = there.float(), x.float()
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    exact = pb.statistics(there, CE, (x, y), ["variance", "kfac", "diag_ggn_mc"])
    with torch.autocast("cuda", torch.bfloat16):
        rough = pb.statistics(there, CE, (x, y), ["variance", "kfac", "diag_ggn_mc"])
    for k, t in exact["variance"].items():
        assert rough["variance"][k].dtype == torch.float32
        assert (rough["variance"][k] - t).norm() < 0.1 * t.norm()
    pb.laplace(there, CE, (x, y)).sample(2)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.filterwarnings("ignore:diag_hessian")
@pytest.mark.parametrize("name", ["residual cnn", "conv3d", "class token", "resnet"])
def test_float32_with_the_devices_own_products(name):
    """Convolutions take TF32 by default: no check of ours may mistake its rounding for a fault."""
    (model, x, y), (there, x2, y2) = problem(name)
    model, there, x, x2 = model.float(), there.float(), x.float(), x2.float()
    wanted = ["grad", "variance", "diag_ggn", "diag_hessian"]
    expected, found = pb.statistics(model, CE, (x, y), wanted), pb.statistics(there, CE, (x2, y2), wanted)
    for quantity in wanted:  # a bias before batch norm has no gradient, but rounding
        largest = max(float(t.abs().max()) for t in expected[quantity].values())
        for k, t in expected[quantity].items():
            assert (found[quantity][k].cpu() - t).abs().max() < 0.05 * largest
    size = pb.GGN(model, CE, (x, y)).shape[0]
    v = torch.randn(size, generator=torch.Generator().manual_seed(2))
    for build in (pb.GGN, pb.Hessian, pb.KFAC):
        A, B = build(model, CE, (x, y)), build(there, CE, (x2, y2))
        if build is not pb.KFAC:
            close(B @ v.cuda(), A @ v, 0.05)
    assert torch.isfinite(pb.laplace(there, CE, (x2, y2)).predict(x2)).all()
