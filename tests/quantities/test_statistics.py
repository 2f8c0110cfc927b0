"""Models x losses x quantities, each against loops of autograd in float64."""

import warnings

import losses_table
import models
import oracle
import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.engine import tape

FIRST = ["grad", "sample_grads", "square_norms", "gram", "second_moment", "variance"]
SECOND = ["diag_ggn", "sample_diag_ggn", "sqrt_ggn"]


def truth(model, inputs, loss_name):
    f = call(model, inputs)
    loss_fn, y = losses_table.make(loss_name, f)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return f, loss_fn, y, params


@pytest.mark.parametrize("loss_name", losses_table.LOSSES)
@pytest.mark.parametrize("model_name", models.MODELS)
def test_first_order(model_name, loss_name):
    model, inputs = models.make(model_name)
    f, loss_fn, y, params = truth(model, inputs, loss_name)
    g = oracle.sample_grads(loss_fn, f, y, params)
    stats = pb.statistics(model, loss_fn, (inputs, y), FIRST)
    close(stats.loss, loss_fn(f, y).detach())
    close(stats.output, f.detach())
    full = oracle.grads(loss_fn(f, y), params)
    for k in params:
        flat = g[k].flatten(1)
        close(stats["grad"][k], full[k], k)
        close(stats["sample_grads"][k], g[k], k)
        close(stats["square_norms"][k], flat.square().sum(1), k)
        close(stats["gram"][k], flat @ flat.T, k)
        close(stats["second_moment"][k], g[k].square().mean(0), k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
    flat = torch.cat([v.flatten(1) for v in g.values()], 1)
    close(stats.total("square_norms"), flat.square().sum(1))
    close(stats.total("gram"), flat @ flat.T)


@pytest.mark.parametrize("loss_name", losses_table.LOSSES)
@pytest.mark.parametrize("model_name", models.MODELS)
def test_second_order(model_name, loss_name):
    model, inputs = models.make(model_name)
    f, loss_fn, y, params = truth(model, inputs, loss_name)
    each = oracle.sample_diag_ggn(loss_fn, f, y, params)
    a = oracle.factor(loss_fn, f, y)
    stats = pb.statistics(model, loss_fn, (inputs, y), SECOND)
    for k in params:
        close(stats["sample_diag_ggn"][k], each[k], k)
        close(stats["diag_ggn"][k], a * each[k].sum(0), k)
        root = stats["sqrt_ggn"][k]
        close(root.square().sum(0), each[k], k)


@pytest.mark.parametrize("loss_name", ["ce weights, ignored, smoothed", "mse sum", "bce"])
def test_root_gives_whole_ggn_blocks(loss_name):
    model, inputs = models.make("residual cnn")
    f, loss_fn, y, params = truth(model, inputs, loss_name)
    blocks, a = oracle.ggn_blocks(loss_fn, f, y, params), oracle.factor(loss_fn, f, y)
    stats = pb.statistics(model, loss_fn, (inputs, y), "sqrt_ggn")
    for k, block in blocks.items():
        root = stats["sqrt_ggn"][k].flatten(0, 1).flatten(1)
        close(a * root.T @ root, block, k)


@pytest.mark.parametrize("model_name", ["mlp", "residual cnn", "gpt", "class token", "shared"])
def test_small_memory_changes_nothing(model_name):
    model, inputs = models.make(model_name, n=5)
    _, loss_fn, y, params = truth(model, inputs, "mse")
    large = pb.statistics(model, loss_fn, (inputs, y), FIRST + SECOND)
    small = pb.statistics(model, loss_fn, (inputs, y), FIRST + SECOND, max_memory=1)
    for name in large:
        for k in params:
            close(small[name][k], large[name][k], f"{name} {k}")


@pytest.mark.parametrize("loss_name", losses_table.LOSSES)
@pytest.mark.parametrize("model_name", ["mlp", "residual cnn", "gpt"])
def test_monte_carlo_diagonal_is_unbiased(model_name, loss_name):
    model, inputs = models.make(model_name)
    _, loss_fn, y, params = truth(model, inputs, loss_name)
    exact = pb.statistics(model, loss_fn, (inputs, y), "diag_ggn")["diag_ggn"]
    draws = [
        pb.statistics(model, loss_fn, (inputs, y), pb.quantities.DiagGGN(samples=4), seed=s)["diag_ggn_mc"]
        for s in range(40)
    ]
    for k in params:
        values = torch.stack([d[k] for d in draws])
        error = values.std(0) / len(draws) ** 0.5 + 1e-12 * exact[k].max() + 1e-15
        z = (values.mean(0) - exact[k]) / error
        assert z.square().mean() < 4, k  # averaged over coordinates; 1 in expectation
        trace = values.flatten(1).sum(1)
        assert (trace.mean() - exact[k].sum()).abs() < 5 * trace.std() / len(draws) ** 0.5 + 1e-12, k


def test_the_same_seed_gives_the_same_labels_and_torchs_own_state_is_untouched():
    model, inputs = models.make("mlp")
    _, loss_fn, y, _ = truth(model, inputs, "ce")
    state = torch.get_rng_state()
    one, two, other = (
        pb.statistics(model, loss_fn, (inputs, y), ["diag_ggn_mc", "kfac"], seed=s)["diag_ggn_mc"]["0.weight"]
        for s in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(
        one, pb.statistics(model, loss_fn, (inputs, y), "diag_ggn_mc", generator=generator)["diag_ggn_mc"]["0.weight"]
    )


def test_accumulate_grad_adds_what_backward_would():
    model, inputs = models.make("residual cnn")
    f, loss_fn, y, params = truth(model, inputs, "ce")
    expected = oracle.grads(loss_fn(f, y), params)
    for times in (1, 2):
        pb.statistics(model, loss_fn, (inputs, y), ["variance"], accumulate_grad=True)
        for k, p in params.items():
            close(p.grad, times * expected[k], k)
    before = {k: p.grad.clone() for k, p in params.items()}
    pb.statistics(model, loss_fn, (inputs, y), ["variance"])
    assert all(torch.equal(before[k], p.grad) for k, p in params.items())


def counted_pulls(patch):
    """An entry for each backward pass that is asked for, by the engine's own door or by torch's."""
    pulls = []
    for where, name in ((tape, "gradients_at"), (torch.autograd, "grad")):
        inner = getattr(where, name)
        patch.setattr(where, name, lambda *a, inner=inner, **k: pulls.append(1) or inner(*a, **k))
    return pulls


def test_one_forward_and_one_pull_give_all_first_order_quantities(monkeypatch):
    model, inputs = models.make("residual cnn")
    _, loss_fn, y, _ = truth(model, inputs, "ce")
    pb.statistics(model, loss_fn, (inputs, y), FIRST)  # the first two calls of a shape are certified
    pb.statistics(model, loss_fn, (inputs, y), FIRST)
    forwards, pulls = [], counted_pulls(monkeypatch)
    model.register_forward_hook(lambda *_: forwards.append(1))
    pb.statistics(model, loss_fn, (inputs, y), [*FIRST, "kfac_empirical"], accumulate_grad=True)
    assert (len(forwards), len(pulls)) == (1, 1)


def test_quantities_of_one_source_share_its_pulls(monkeypatch):
    """Sampled labels are pulled once for all that use them, the root's columns too; nothing runs forward again."""
    model, inputs = models.make("residual cnn")
    _, loss_fn, y, _ = truth(model, inputs, "ce")
    for wanted, expected in ((["kfac", "diag_ggn_mc"], 1), (["kflr", "diag_ggn", "sample_diag_ggn", "sqrt_ggn"], 2)):
        for _ in range(2):
            pb.statistics(model, loss_fn, (inputs, y), wanted)
        forwards = []
        hook = model.register_forward_hook(lambda *_, seen=forwards: seen.append(1))
        with monkeypatch.context() as patch:
            pulls = counted_pulls(patch)
            pb.statistics(model, loss_fn, (inputs, y), wanted)
        hook.remove()
        assert (len(forwards), len(pulls)) == (1, expected)  # three classes: a root of two columns


def test_inside_a_training_step_before_and_after_backward():
    model, inputs = models.make("gpt")
    f, loss_fn, y, params = truth(model, inputs, "ce")
    expected = oracle.sample_grads(loss_fn, f, y, params)
    with pb.record(model) as tape:
        output = model(inputs)
        before = tape.statistics(loss_fn, output, y, ["sample_grads"])
    loss_fn(output, y).backward(retain_graph=True)
    after = tape.statistics(loss_fn, output, y, "sample_grads")
    for k in params:
        close(before["sample_grads"][k], expected[k])
        close(after["sample_grads"][k], expected[k])


def test_dropout_follows_the_seed_and_leaves_the_global_state():
    model = torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 3)).double()
    batch = torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    state = torch.get_rng_state()
    losses = [pb.statistics(model, torch.nn.CrossEntropyLoss(), batch, "grad", seed=s).loss for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(state, torch.get_rng_state()) and model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_keep_the_dtype(dtype):
    model, inputs = models.make("residual cnn")
    model, inputs = model.to(dtype), inputs.to(dtype)
    stats = pb.statistics(
        model, torch.nn.CrossEntropyLoss(), (inputs, torch.tensor([0, 1, 2])), FIRST + SECOND + ["kfac"]
    )
    for name in FIRST + SECOND:
        assert all(v.dtype == dtype and not v.requires_grad for v in stats[name].values()), name
    assert all(k.left.dtype == k.right.dtype == dtype for k in stats["kfac"].values())


def test_structured_inputs_and_outputs():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x, scale):
            return {"logits": self.layer(x) * scale}

    model, x, y = Model().double(), torch.randn(3, 4).double(), torch.tensor([0, 1, 2])
    batch = {"x": x, "scale": 2.0, "labels": y}
    stats = pb.statistics(model, torch.nn.CrossEntropyLoss(), batch, "grad", output=lambda o: o["logits"])
    pair = pb.statistics(model, torch.nn.CrossEntropyLoss(), ((x, 2.0), y), "grad", output=lambda o: o["logits"])
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(model.layer(x) * 2, y), model.layer.weight)[0]
    close(stats["grad"]["layer.weight"], expected)
    close(pair["grad"]["layer.weight"], expected)
    with pytest.raises(ValueError, match="returned a dict; expected a tensor"):
        pb.statistics(model, torch.nn.CrossEntropyLoss(), batch, "grad")


CE = torch.nn.CrossEntropyLoss()


def bad(change=lambda m, x, y: (m, x, y), loss=CE, quantities="grad", **options):
    model, x = models.make("mlp")
    model, x, y = change(model, x, torch.tensor([0, 1, 2]))
    return lambda: pb.statistics(model, loss, (x, y), quantities, **options)


ERRORS = {
    "unknown quantity 'grads'; expected one of": bad(quantities="grads"),
    "no quantity is asked for": bad(quantities=[]),
    "'diag_ggn_mc' is asked for twice": bad(quantities=[pb.quantities.DiagGGN(2), pb.quantities.DiagGGN(3)]),
    "target 3 at index 1 is out of range; expected class indices 0..2": bad(lambda m, x, y: (m, x, y + torch.tensor([0, 2, 0]))),
    "has 3 samples but the targets have shape": bad(lambda m, x, y: (m, x, y[:2])),
    "'variance' needs a batch of at least 2 samples; found 1": bad(lambda m, x, y: (m, x[:1], y[:1]), quantities="variance"),
    "the loss is nan; expected a finite number": bad(lambda m, x, y: (m, x * float("nan"), y)),
    "has no parameter with requires_grad=True": bad(lambda m, x, y: (m.requires_grad_(False), x, y)),
    "Identity has no parameter": bad(lambda m, x, y: (torch.nn.Identity(), x, y)),
    "verify is 'sometimes'; expected": bad(verify="sometimes"),
    "every target is ignored": bad(lambda m, x, y: (m, x, torch.full((3,), -100))),
    "reduction is 'none'; expected one of": bad(loss=torch.nn.CrossEntropyLoss(reduction="none")),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(".", r"\.")):
        ERRORS[message]()


def test_an_unknown_loss_and_a_wrong_batch_are_refused():
    model, x = models.make("mlp")
    with pytest.raises(TypeError, match="is not one that paraboloid knows; expected one of"):
        pb.statistics(model, lambda f, y: f.sum(), (x, torch.tensor([0, 1, 2])), "grad")
    with pytest.raises(ValueError, match=r"data is a int; expected a batch \(inputs, targets\)"):
        pb.statistics(model, torch.nn.CrossEntropyLoss(), 3, "grad")


def test_complex_parameters_are_refused():
    model = torch.nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"parameter 'weight' has dtype torch.complex64; expected a real"):
        pb.statistics(model, torch.nn.MSELoss(), (torch.randn(2, 2), torch.randn(2, 2)), "grad")


def test_a_total_needs_values_of_one_shape():
    model, x = models.make("mlp")
    stats = pb.statistics(model, torch.nn.CrossEntropyLoss(), (x, torch.tensor([0, 1, 2])), ["grad", "gram"])
    with pytest.raises(ValueError, match="'grad' has a value of its own shape"):
        stats.total("grad")
    with pytest.raises(KeyError, match="'variance' was not asked for; available"):
        stats["variance"]


def test_no_warning_on_the_table_of_models():
    """Every layer of the table has a rule: nothing takes the slow fallback unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in models.MODELS:
            model, inputs = models.make(name)
            y = torch.randn_like(call(model, inputs))
            pb.statistics(model, torch.nn.MSELoss(), (inputs, y), "grad")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_kronecker_factors_have_the_parameters_type(dtype):
    model = nn.Linear(4, 3).to(dtype)
    batch = torch.ones(5, 4, dtype=dtype), torch.zeros(5, dtype=torch.long)
    for kron in pb.statistics(model, nn.CrossEntropyLoss(), batch, "kflr")["kflr"].values():
        assert kron.left.dtype == kron.right.dtype == dtype
