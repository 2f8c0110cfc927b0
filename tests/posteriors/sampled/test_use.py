"""The door of sampled posteriors: checkpoints, progress, normalisation, the unweighted curvature, and bad input."""

import copy
import math
import warnings

import pytest
import torch
from posteriors.dense import jacobian
from posteriors.sampled.test_oracles import classifier, close_within_errors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paraboloid as pb
from paraboloid.posteriors.sampled.tangent_curvature import displaced

F64 = torch.float64


class Killed(Exception):
    pass


def kill_at(number):
    calls = []

    def callback(progress):
        calls.append(progress)
        if len(calls) == number:
            raise Killed

    return callback, calls


def same(one, two):
    assert one.prior_precision == two.prior_precision and one.history == two.history
    assert one.confidence == two.confidence and one.effective_dimension == two.effective_dimension
    assert all(torch.equal(one.samples[k], two.samples[k]) for k in one.samples)


RUNS = {
    "cg": {},
    "sgd": {},
    "dual": {"per": "layer"},
    "block": {"match": "exponent"},
    "auto": {"max_memory": 1, "match": None},  # streamed, and probed
    "sgd, noisy": {"objective": "noisy-targets", "match": None, "max_memory": 1},
    "cg, unweighted": {"curvature": "jacobian"},
    "cg, noise too": {"noise_variance": None, "g_prior": False, "em_steps": 2},
    "sgd, noise too": {"noise_variance": None, "em_steps": 2},
}


@pytest.mark.filterwarnings("ignore:the relative")  # few epochs
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_is_killed_anywhere_ends_as_the_uninterrupted_one(tmp_path, run, monkeypatch):
    monkeypatch.setattr("paraboloid.posteriors.sampled.solvers.APART", 0.0)  # within epochs too, after every step
    monkeypatch.setattr("paraboloid.posteriors.sampled.solvers.RARELY", 0.0)
    model, x, y = classifier(n=30)
    loss, y = (nn.MSELoss(), x[:, :3].sin()) if "noise too" in run else (nn.CrossEntropyLoss(), y)
    data, solver = [(x[:12], y[:12]), (x[12:], y[12:])], run.partition(",")[0]
    options = {"samples": 2, "em_steps": 1, "solver": solver, "epochs": 2, "seed": 3, **RUNS[run]}
    calls = []
    whole = pb.sampled_laplace(model, loss, data, callback=calls.append, **options)
    assert {c.doing for c in calls} >= {"samples"} | ({"optimum"} if solver == "sgd" else set())
    for number in range(1, len(calls) + 1, 1 if run in ("cg", "sgd") else 2):
        path = tmp_path / f"{solver}-{number}"
        callback, _ = kill_at(number)
        with pytest.raises(Killed):
            pb.sampled_laplace(model, loss, data, checkpoint=path, callback=callback, **options)
        resumed = pb.sampled_laplace(model, loss, data, checkpoint=path, **options)
        same(resumed, whole)
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_is_gone_on_from_to_more_steps(tmp_path):
    model, x, y = classifier()
    options = {"samples": 3, "checkpoint": tmp_path / "run"}
    pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), em_steps=1, **options)
    more = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), em_steps=3, **options)
    same(more, pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 3, em_steps=3))
    assert [step.step for step in more.history] == [0, 1, 2, 3]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    model, x, y = classifier()
    other, _, _ = classifier(1)
    path, loss = tmp_path / "run", nn.CrossEntropyLoss()
    pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
    with pytest.raises(ValueError, match=r"a checkpoint of another model, or of other weights of it: \['0.weight'"):
        pb.sampled_laplace(other, loss, (x, y), 2, em_steps=0, checkpoint=path)
    with pytest.raises(ValueError, match=r"a checkpoint of other data, of 40 samples .* \(here 39"):
        pb.sampled_laplace(model, loss, (x[1:], y[1:]), 2, em_steps=0, checkpoint=path)
    with pytest.raises(ValueError, match="other settings: samples was 2 and is 3"):
        pb.sampled_laplace(model, loss, (x, y), 3, em_steps=0, checkpoint=path)
    found = torch.load(path, weights_only=True)
    for part, name, change in (
        ("model", "0.bias", 1e-13),
        ("model", "0.bias", 1e-6),
        ("data", 1, 1e-8),
        ("data", 1, 1e-3),
    ):
        edited = copy.deepcopy(found)
        at = edited["belongs"][part] if part == "data" else edited["belongs"][part][name]
        at[1] += change * (abs(at[1]) if part == "data" else 1)
        torch.save(edited, path)
        if change in (1e-13, 1e-8):  # rounded otherwise
            pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
        else:
            with pytest.raises(ValueError, match=f"a checkpoint of (an)?other {part}"):
                pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
    torch.save(found, path)
    for content in (b"hello", b"", path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of sampled_laplace"):
            pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="is no checkpoint of sampled_laplace"):
        pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)


ORDERS = {
    "reversed": (lambda x, y: (x.flip(0), y.flip(0)), "from data point 0 on"),
    "two exchanged": (lambda x, y: (x[[*range(30), 31, 30, *range(32, 40)]], y[[*range(30), 31, 30, *range(32, 40)]]),
                      "from data point 30 on"),
    "batches exchanged": (lambda x, y: [(x[20:], y[20:]), (x[:20], y[:20])], "from data point 0 on"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_a_checkpoint_of_the_same_data_in_another_order_is_refused(tmp_path, name):
    model, x, y = classifier()
    changed, where = ORDERS[name]
    options = {"samples": 2, "em_steps": 0, "checkpoint": tmp_path / "run"}
    pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    with pytest.raises(ValueError, match=f"a checkpoint of the same data in another order, {where}"):
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), changed(x, y), **options)
    pb.sampled_laplace(model, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])], **options)  # otherwise cut


def test_loaders_that_shuffle(tmp_path):
    """By torch's generator the order is that of every pass and run; by one of their own it never is."""
    model, x, y = classifier()
    data, loss, options = TensorDataset(x, y), nn.CrossEntropyLoss(), {"samples": 2, "em_steps": 1}
    plain = DataLoader(data, 8, shuffle=True)
    whole = pb.sampled_laplace(model, loss, plain, **options)
    torch.randn(3)
    callback, _ = kill_at(2)
    with pytest.raises(Killed):
        pb.sampled_laplace(model, loss, plain, checkpoint=tmp_path / "run", callback=callback, **options)
    same(pb.sampled_laplace(model, loss, plain, checkpoint=tmp_path / "run", **options), whole)
    own = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(0))
    for solver in ("dual", "cg"):
        with pytest.raises(
            RuntimeError, match=r"data point \d+ is another one than in the first pass.*no generator of its"
        ):
            pb.sampled_laplace(model, loss, own, solver=solver, **options)
    kernel = pb.sampled_laplace(model, loss, own, solver="dual", match=None, **options)  # of the graphs that are kept
    assert kernel.residual < 1e-6
    options["solver"] = "cg"
    for match in ("exponent", None):
        pb.sampled_laplace(model, loss, own, match=match, checkpoint=tmp_path / "own", **options)
        with pytest.raises(ValueError, match=r"in another order.*by a generator of its own"):
            pb.sampled_laplace(model, loss, own, match=match, checkpoint=tmp_path / "own", **options)
        (tmp_path / "own").unlink()


def test_two_points_change_places_beside_a_far_larger_one():
    marks = torch.tensor([1.0, 1.001, 1e6, 1.1, 1.2], dtype=torch.float64)
    assert displaced(marks * (1 + 1e-7), marks) is None
    assert displaced(marks[[1, 0, 2, 3, 4]], marks) == 0


def test_a_checkpoint_of_another_type_batch_or_number_of_processes_is_refused(tmp_path):
    model, x, y = classifier()
    loss, path = nn.CrossEntropyLoss(), tmp_path / "run"
    pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
    with pytest.raises(
        ValueError, match=r"other settings: dtype was 'torch\.float64' and is 'torch\.float32'|other model"
    ):
        pb.sampled_laplace(copy.deepcopy(model).float(), loss, (x.float(), y), 2, em_steps=0, checkpoint=path)
    path.rename(tmp_path / "run.0-of-2")
    with pytest.raises(ValueError, match="is a checkpoint of 2 processes, and these are 1"):
        pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
    (tmp_path / "run.0-of-2").rename(tmp_path / "run.float64.0-of-2")
    with pytest.raises(ValueError, match=r"run\.float64 is a checkpoint of 2 processes, and these are 1"):
        pb.sampled_laplace(model, loss, (x, y), 2, em_steps=0, checkpoint=path)
    options = {
        "samples": 2,
        "em_steps": 0,
        "solver": "sgd",
        "checkpoint": tmp_path / "descent",
        "epochs": 20,
        "lr": 1e-3,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pb.sampled_laplace(model, loss, (x, y), batch_size=8, **options)
        with pytest.raises(ValueError, match="other settings: batches was 5 and is 10"):
            pb.sampled_laplace(model, loss, (x, y), batch_size=4, **options)


def normalised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 4, generator=g, dtype=F64), torch.randint(3, (40,), generator=g)
    model(x)
    return model.eval(), x, y


def test_normalisation_layers_are_held():
    model, x, y = normalised()
    options = {"em_steps": 0, "g_prior": False, "tol": 1e-8}
    held = pb.sampled_laplace(model.train(), nn.CrossEntropyLoss(), (x, y), 256, **options)
    assert model.training
    assert not held.samples["1.weight"].any() and not held.samples["1.bias"].any() and held.samples["0.weight"].any()
    model.eval()
    reference = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "full", ["0", "3"])
    close_within_errors(held.functional(x, diagonal=True)[1], reference.functional(x, diagonal=True)[1], 256)
    free = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 2, normalisation="free", **options)
    named = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 2, weights=["1"], **options)
    assert free.samples["1.weight"].any() and list(named.weights) == ["1.weight", "1.bias"]


def test_the_unweighted_curvature():
    model, x, y = classifier()
    posterior = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), (x, y), 256, curvature="jacobian", g_prior=False, em_steps=0, tol=1e-8
    )
    _, J = jacobian(model, x)
    S = torch.linalg.inv(torch.einsum("nkd,nke->de", J, J) + torch.eye(J.shape[2], dtype=F64))
    close_within_errors(posterior.functional(x, diagonal=True)[1], torch.einsum("nkd,de,nke->nk", J, S, J), 256)
    assert posterior.prior_precision == 1.0 and posterior.confidence is None
    tuned = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 2, curvature="jacobian", g_prior=False)
    reference = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "diag", curvature="jacobian").tune_prior()
    assert tuned.prior_precision == pytest.approx(reference.prior_precision)  # what one sample tells
    assert tuned.unweighted is tuned and tuned.confidence is not None


def test_predictions():
    model, x, y = classifier()
    posterior = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 64, em_steps=0, g_prior=False)
    for link in (None, "probit", "bridge", "bridge_norm", "mc", "weights"):
        p = posterior.predict(x, link)
        torch.testing.assert_close(p.sum(1), torch.ones(40, dtype=F64))
    full = pb.laplace(model, nn.CrossEntropyLoss(), (x, y), "full").predict(x)
    assert (posterior.predict(x) - full).abs().max() < 0.1
    torch.testing.assert_close(posterior.predict(x[:5]), posterior.predict(x)[:5])
    posterior.match_confidence()
    entropy = lambda p: -(p * p.log()).sum(1).mean()  # noqa: E731
    torch.testing.assert_close(entropy(posterior.predict(x)), entropy(model(x).softmax(1)), rtol=1e-4, atol=0)
    matched = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 4, em_steps=1)
    assert matched.confidence is not None and matched.sharpness == 1.0
    assert set(matched.unweighted.prior_precision) == set(matched.weights)
    sure = model(x).softmax(1).amax(1)
    for link in ("probit", "mc", "bridge", "weights"):
        p = matched.predict(x, link)
        assert p.shape == (40, 3) and p.amax(1).mean() < sure.mean() + 0.01
    known = matched.predict(x).amax(1) / sure  # much of the training data is left alone, nothing is made surer
    assert known.max() < 1 + 1e-6 and (known > 1 - 1e-6).double().mean() > 0.5
    early = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 4, em_steps=1, match="early")
    assert (early.predict(30 * x).amax(1) < model(30 * x).softmax(1).amax(1)).all()
    assert matched.confidence.rare < early.confidence.rare and matched.confidence.usual == early.confidence.usual
    steps = matched.confidence.steps(matched.unweighted.functional(30 * x, diagonal=True)[1].mean(1, keepdim=True))
    assert (steps > 1).double().mean() > 0.3
    torch.testing.assert_close(matched.predict(30 * x), (model(30 * x) * 4 ** -(steps - 1).clamp(min=0)).softmax(1))
    single = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 4, em_steps=1, match="exponent")
    assert single.sharpness != 1.0 and single.confidence is None
    assert pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 4, em_steps=0).confidence is None
    regression = nn.Linear(4, 2).double()
    fitted = pb.sampled_laplace(regression, nn.MSELoss(), (x, x[:, :2]), 4, em_steps=0, noise_variance=0.3)
    assert fitted.predict(x).variance.min() > 0.3 and fitted.predict(x).mean.shape == (40, 2)
    with pytest.raises(ValueError, match="match_confidence with a gaussian likelihood"):
        fitted.match_confidence()
    with pytest.raises(ValueError, match=r"samples is 5; expected a number in 1\.\.4"):
        fitted.sample(5)
    with torch.no_grad():
        regression.weight.add_(1)
    with pytest.raises(RuntimeError, match="is not what it was when the posterior was fitted"):
        fitted.predict(x)


def test_the_same_seed_gives_the_same_samples_whatever_the_batches():
    model, x, y = classifier()
    state = torch.get_rng_state()
    options = {"samples": 3, "em_steps": 0, "tol": 1e-10}
    one = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    two = pb.sampled_laplace(model, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])], **options)
    few = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **{**options, "samples": 2})
    streamed = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), [(x[:7], y[:7]), (x[7:], y[7:])], max_memory=1, solver="cg", **options
    )
    for k in one.samples:
        torch.testing.assert_close(two.samples[k], one.samples[k], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(streamed.samples[k], one.samples[k], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(few.samples[k], one.samples[k][:2], rtol=1e-6, atol=1e-8)
    assert not torch.equal(
        pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), seed=1, **options).samples[k], one.samples[k]
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_bad_input(monkeypatch):
    model, x, y = classifier()
    loss, data = nn.CrossEntropyLoss(), (x, y)
    frozen, _, _ = classifier()
    frozen.requires_grad_(False)
    for options, message in [
        ({"samples": 0}, "samples is 0; expected an integer of at least 1"),
        ({"em_steps": -1}, "em_steps is -1; expected an integer of at least 0"),
        ({"prior_precision": 0.0}, "prior_precision is 0.0; expected a positive number"),
        ({"noise_variance": -1.0}, "noise_variance is -1.0; expected a positive number"),
        ({"noise_variance": None}, "noise_variance is None with a categorical likelihood"),
        ({"lr": 0.0}, "lr is 0.0; expected a positive number"),
        ({"samples": 1.5}, "samples is 1.5; expected an integer of at least 1"),
        ({"prior_precision": math.inf}, "prior_precision is inf; expected a positive number"),
        ({"prior_precision": None}, "prior_precision is None; expected a positive number"),
        ({"noise_variance": math.inf}, "noise_variance is inf; expected a positive number, or None to have EM find it"),
        ({"tol": math.nan}, "tol is nan; expected a positive number"),
        ({"tol": 2.0}, "tol is 2.0; expected a residual below 1"),
        ({"lr": 0.1, "solver": "cg"}, "lr is 0.1 with solver='cg', which has no learning rate; expected 'sgd'"),
        ({"g_prior": "yes"}, "g_prior is 'yes'; expected one of"),
        ({"max_memory": "4GB"}, "max_memory is '4GB'; expected an integer of at least 1"),
        ({"callback": 3}, "callback is 3; expected a function of a Progress"),
        ({"lr": "big"}, "lr is 'big'; expected a positive number, or None to have it measured"),
        ({"seed": "a"}, "seed is 'a'; expected an integer"),
        ({"checkpoint": "/nowhere/run"}, "checkpoint is '/nowhere/run'; expected the path of a file in a folder that"),
        ({"checkpoint": "/"}, "checkpoint is '/'; expected the path of a file"),
        ({"solver": "adam"}, "solver is 'adam'; expected one of"),
        ({"curvature": "hessian"}, "curvature is 'hessian'; expected one of"),
        ({"objective": "noisy-targets"}, "objective='noisy-targets' with solver='auto'; expected 'sgd'"),
        ({"per": "row"}, "per is 'row'; expected 'all', 'layer' or 'parameter'"),
        ({"samples": 10**9}, r"1000000000 samples of 51 weights would take \d+\.\d GiB.*enough for \d+"),
    ]:
        with pytest.raises(ValueError, match=message):
            pb.sampled_laplace(model, loss, data, **{"samples": 2, **options})
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        pb.sampled_laplace(frozen, loss, data)
    with pytest.raises(TypeError, match="is not one that paraboloid knows"):
        pb.sampled_laplace(model, lambda f, y: f.sin().sum(), data)

    class Concave(pb.Loss):
        def sample_losses(self, f, y):
            return -f.square().sum(1)

    with pytest.raises(ValueError, match=r"convex in the output, which alone has a real root"):
        pb.sampled_laplace(model, Concave(), data, 2)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'0.weight' holds NaN"):
        pb.sampled_laplace(model, loss, data, 2)


@pytest.mark.parametrize("max_memory", [None, 1])
def test_a_loader_that_shuffles(max_memory):
    """Each data point's variance without it is found with the noise that it had, in whatever order it came."""
    model, x, y = classifier(n=20)
    options = {"samples": 128, "em_steps": 1, "solver": "cg", "seed": 4}
    generator_state = torch.get_rng_state()
    plain = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), **options)
    loader = DataLoader(TensorDataset(x, y), 10, shuffle=True)
    shuffled = pb.sampled_laplace(model, nn.CrossEntropyLoss(), loader, max_memory=max_memory, **options)
    assert torch.equal(torch.get_rng_state(), generator_state)
    again = pb.sampled_laplace(model, nn.CrossEntropyLoss(), loader, max_memory=max_memory, **options)
    assert again.confidence == shuffled.confidence
    assert abs(shuffled.confidence.usual / plain.confidence.usual - 1) < 0.1


def test_nothing_is_predicted_of_no_inputs_and_half_precision_is_widened():
    model, x, y = classifier()
    posterior = pb.sampled_laplace(model, nn.CrossEntropyLoss(), (x, y), 4, em_steps=1)
    for link in ("probit", "mc", "bridge", "weights"):
        assert posterior.predict(x[:0], link, samples=3).shape == (0, 3)
    assert [tuple(t.shape) for t in posterior.functional(x[:0])] == [(0, 3), (0, 3, 3)]
    assert posterior.functional_samples(x[:0]).shape == (4, 0, 3)
    half = pb.sampled_laplace(model.half(), nn.CrossEntropyLoss(), (x.half(), y), 4, em_steps=1)
    same = pb.sampled_laplace(model.float(), nn.CrossEntropyLoss(), (x.half().float(), y), 4, em_steps=1)
    torch.testing.assert_close(half.predict(9 * x.half()), same.predict((9 * x.half()).float()))
