"""The guards: every way in which samples, calls or tensors can go wrong is right or refused, never silently wrong."""

import warnings

import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.engine.recorder import lowered
from paraboloid.engine.sample_independence import layouts_of, sample_weights


def samples(model, x, warning=None, verify="auto"):
    """(sample gradients by the tape, by the oracle) for a squared error, with the expected warning."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        y = torch.randn_like(call(model, x))
    if warning is None:
        stats = pb.statistics(model, nn.MSELoss(), (x, y), ["sample_grads", "variance"], verify=verify)
    else:
        with pytest.warns(UserWarning, match=warning):
            stats = pb.statistics(model, nn.MSELoss(), (x, y), ["sample_grads", "variance"], verify=verify)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    return stats["sample_grads"], oracle.sample_grads(nn.MSELoss(), call(model, x), y, params)


def agree(model, x, warning=None, verify="auto"):
    actual, expected = samples(model, x, warning, verify)
    for k in expected:
        close(actual[k], expected[k], k)


class Body(nn.Module):
    """A linear layer and a function of its weight and bias, for odd uses."""

    def __init__(self, function, p=4, q=4, **parameters):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(p, q)), nn.Parameter(torch.randn(p))
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def body(function, **parameters):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Body(function, **parameters).double()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).double()


# --- completeness -------------------------------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w * w

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_packed_sequences_take_the_net():
    """Their steps hold fewer and fewer samples, in sorted order; the layers before and after are recorded."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(3, 2)
            self.layer = nn.LSTM(4, 3, batch_first=True, num_layers=2)

        def forward(self, idx):
            x = nn.utils.rnn.pack_padded_sequence(self.table(idx), [2, 3, 1], batch_first=True, enforce_sorted=False)
            return self.head(self.layer(x)[1][0][-1])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Packed().double()
    with pytest.warns(UserWarning, match="could not be recorded") as caught:
        actual, expected = samples(model, torch.tensor([[1, 2, 0], [3, 1, 4], [2, 0, 0]]), verify="always")
    for k in expected:
        close(actual[k], expected[k], k)
    assert all("'layer." in str(w.message) and "3 backward passes" in str(w.message) for w in caught)


def test_custom_functions_and_scripted_modules_are_right():
    with pytest.warns(UserWarning) as caught:
        agree(body(lambda m, x: Scale.apply(F.linear(x, m.weight), m.bias)), X)
    assert all("bias" in str(w.message) and "falling back" in str(w.message) for w in caught)
    agree(body(lambda m, x: F.linear(x, Square.apply(m.weight), m.bias)), X)  # a function of weights only is derived

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.outer = nn.Linear(4, 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch.jit is deprecated, and still in use
                self.inner = torch.jit.script(nn.Linear(4, 4))

        def forward(self, x):
            return self.outer(self.inner(x).tanh())

    with pytest.warns(UserWarning) as caught:
        agree(Scripted().double(), X)
    assert all("inner" in str(w.message) and "falling back" in str(w.message) for w in caught)


FALLBACK = {
    "einsum": lambda m, x: torch.einsum("ni,oi->no", x, m.weight) + m.bias,
    "distances to centres": lambda m, x: torch.cdist(x, m.weight),
    "where": lambda m, x: torch.where(x > 0, x * 2, m.bias),
    "power": lambda m, x: x.abs() ** m.bias,
    "the weight on the left": lambda m, x: (m.weight @ x.unsqueeze(-1)).squeeze(-1),
    "one sample at a time": lambda m, x: torch.stack([F.linear(row, m.weight, m.bias) for row in x]),
}


@pytest.mark.parametrize("name", FALLBACK)
def test_calls_without_a_rule_fall_back_with_one_warning(name):
    model = body(FALLBACK[name])
    if name == "one sample at a time":  # each call belongs to one sample
        agree(model, X, "the samples lie along no axis of the outputs of 3 of 3 calls")
        return
    agree(model, X, "has no rule for these arguments; falling back to one pull-back of this call per sample")


def test_the_fallback_names_parameter_and_operation_once():
    model = body(FALLBACK["einsum"])
    with pytest.warns(UserWarning) as caught:
        pb.statistics(model, nn.MSELoss(), (X, X), ["sample_grads", "diag_ggn"])
    assert [str(w.message)[:24] for w in caught] == ["torch.einsum on weight h"] or len(caught) == 1
    assert "einsum" in str(caught[0].message) and "weight" in str(caught[0].message)


RIGHT = {
    "in-place add and a view of the result": lambda m, x: F.linear(x, m.weight).add_(m.bias).view(-1, 2, 2).flatten(1),
    "in-place activation": lambda m, x: F.relu_(F.linear(x, m.weight, m.bias)),
    "in-place product": lambda m, x: F.linear(x, m.weight) * m.bias,
    "a permuted weight": lambda m, x: F.linear(x, m.weight.t().contiguous().t(), m.bias),
    "half of the weight": lambda m, x: F.linear(x, m.weight[:2], m.bias[:2]),
    "a stacked weight": lambda m, x: F.linear(x, torch.cat([m.weight, 2 * m.weight]), torch.cat([m.bias, m.bias])),
    "subtraction and division": lambda m, x: (m.bias - F.linear(x, m.weight)) / (2 + m.bias.square()) - m.bias,
    "the same layer three times": lambda m, x: F.linear(F.linear(x, m.weight, m.bias).tanh() + x, m.weight, m.bias),
    "a sequence in front": lambda m, x: F.linear(x.expand(5, 3, 4), m.weight, m.bias).tanh().sum(0),
    "sequence flattened": lambda m, x: F.linear(x.expand(5, 3, 4).reshape(15, 4), m.weight, m.bias).view(5, 3, 4).prod(0),
    "samples flattened": lambda m, x: F.linear(x[:, None].expand(3, 3, 4).flatten(0, 1), m.weight).view(3, 3, 4).sum(1),
    "data dependent branch": lambda m, x: F.linear(x, m.weight) if x.sum() > 99 else F.linear(x, m.weight, m.bias).exp(),
    "a constant computed inside": lambda m, x: F.linear(x, m.weight * torch.arange(4), m.bias + torch.ones(4)),
    "fixed positions with a padding row": lambda m, x: x + F.embedding(torch.tensor([1]), m.weight, padding_idx=1)
    + F.embedding(torch.tensor([2]), m.weight) + F.linear(x, m.weight, m.bias),
    "in-place activation on a view": lambda m, x: F.relu_(F.linear(x.unsqueeze(1), m.weight, m.bias)).squeeze(1),
    "norm of the weight": lambda m, x: F.linear(x, m.weight / m.weight.norm(), m.bias),
    "checkpointed": lambda m, x: torch.utils.checkpoint.checkpoint(
        lambda t: F.linear(F.linear(t, m.weight, m.bias).tanh(), m.weight, m.bias), x, use_reentrant=False
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_odd_uses_are_right_without_a_warning(name):
    agree(body(RIGHT[name]), X)


def test_a_slice_changed_in_place_takes_the_net():
    def forward(m, x):
        z = F.linear(x, m.weight)
        z[:, :2] += m.bias[:2]
        return z

    agree(body(forward), X, "'bias' is used by an operation that could not be recorded")


def test_a_parameter_without_influence_has_zero_gradients_and_factors():
    model = body(lambda m, x: F.linear(x, m.weight), unused=torch.ones(2, 3))
    stats = pb.statistics(model, nn.MSELoss(), (X, X), ["sample_grads", "kfac", "square_norms", "gram"])
    assert stats["sample_grads"]["unused"].shape == (3, 2, 3) and not stats["sample_grads"]["unused"].any()
    assert stats["kfac"]["unused"].left.shape == (2, 2) and stats["kfac"]["unused"].right.shape == (3, 3)
    assert stats["kfac"]["bias"].left.shape == (4, 4) and not stats["kfac"]["bias"].left.any()


def test_functional_call_with_other_tensors_is_refused():
    model = models.make("mlp")[0]
    others = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    with pb.record(model) as tape:
        output = torch.func.functional_call(model, others, (X,))
    with pytest.raises(ValueError, match="depends on none of the model's 4 trainable parameters"):
        tape.pull(output, torch.ones_like(output)[None])
    with pb.record(model) as tape:  # with its own parameters it is an ordinary call
        output = torch.func.functional_call(model, dict(model.named_parameters()), (X,))
    assert tape.pull(output, torch.ones_like(output)[None])["0.weight"][0].samples().any()


def test_an_output_without_a_graph_is_refused():
    model = models.make("mlp")[0]
    with pb.record(model) as tape, torch.no_grad():
        output = model(X)
    with pytest.raises(ValueError, match="does not require grad"):
        tape.pull(output, torch.ones_like(output)[None])
    with pytest.raises(ValueError, match=r"v has shape \(3, 3\); expected \[V, \*output shape\]"):
        tape.pull(output, torch.ones_like(output))


@pytest.mark.parametrize("integers", [False, True])
def test_a_module_that_keeps_its_input_is_right_when_the_same_tensor_comes_again(integers):
    def forward(m, x):
        m.last = x
        return F.linear(F.embedding(x, m.weight).tanh(), m.weight) if integers else F.linear(x, m.weight, m.bias).tanh()

    model, x = body(forward), torch.tensor([1, 0, 3]) if integers else X
    with torch.no_grad():
        model(x)
    if integers:  # kept token indices look like fixed positions: right all the same, by the slow net
        agree(model, x, "'weight' is used by an operation that could not be recorded")
        with pytest.raises(
            NotImplementedError, match=r"\['weight'\] are used by operations that could not be recorded"
        ):
            pb.PCH(model, nn.MSELoss(), (x, X)) @ torch.zeros(20).double()
        return
    agree(model, x)
    kept = pb.PCH(model, nn.MSELoss(), (x, X)).to_dense()
    close(kept, pb.PCH(model, nn.MSELoss(), (x.clone(), X)).to_dense())


# --- sample independence ------------------------------------------------------------------------------------------

MIXING = {
    "a flip that is added": lambda m, x: (z := F.linear(x, m.weight, m.bias)) + z.flip(0),
    "softmax over the batch": lambda m, x: F.linear(x, m.weight, m.bias).softmax(0),
    "mean over the batch": lambda m, x: F.linear(x, m.weight, m.bias) - F.linear(x, m.weight).mean(0),
    "a small leak": lambda m, x: F.linear(x, m.weight) + 1e-6 * F.linear(x, m.weight).roll(1, 0),
    "a transposed layer": lambda m, x: F.linear(F.linear(x, m.weight)[:, :3].t(), m.weight[:, :3]),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_samples_is_refused(name):
    with pytest.raises(ValueError, match=r"(?s)does not separate into the 3 samples.*mixes or reorders"):
        samples(body(MIXING[name]), X)


def test_batch_norm_in_training_mode_is_refused_and_its_statistics_are_restored():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    before = {k: b.clone() for k, b in model.named_buffers()}
    with pytest.raises(ValueError, match=r"does not separate|training mode.*model\.eval\(\)"):
        pb.statistics(model, nn.MSELoss(), (X, X[:, :2]), "sample_grads")
    assert all(torch.equal(before[k], b) for k, b in model.named_buffers()) and model.training


def test_a_permutation_that_changes_later_cannot_stay():
    """A cache keyed by shapes alone would let this through for ever; a sample is a row of the output."""
    model, moved = body(lambda m, x: F.linear(x, m.weight, m.bias)[m.order]), "the samples lie along no axis"
    for verify in ("auto", "always"):
        model.order = torch.arange(3)
        for _ in range(3):
            agree(model, X, verify=verify)
        model.order = torch.tensor([2, 0, 1])
        for _ in range(2):
            agree(model, X, moved, verify)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["gpt", "transformer layer", "sequence first", "class token", "flattened", "shared"])
def test_layouts_are_found_whatever_the_number_of_samples(name, n):
    """Sequence length, width or heads equal to the number of samples must not confuse the axes."""
    model, x = models.make(name, n)
    if n > 1:
        agree(model, x)
    else:
        y = torch.zeros_like(call(model, x))
        g = pb.statistics(model, nn.MSELoss(reduction="sum"), (x, y), "sample_grads")["sample_grads"]
        params = dict(model.named_parameters())
        expected = oracle.sample_grads(nn.MSELoss(), call(model, x), y, params)
        for k in params:
            close(g[k], expected[k], k)


def test_sample_weights_differ_and_layouts_cover_both_orders():
    generator = torch.Generator().manual_seed(0)
    for N in (1, 2, 50):
        w = sample_weights(N, generator)
        assert len(w.unique()) == N and (w.abs().log2() % 1 == 0).all()
    assert sample_weights(128, generator).shape == (128,)
    assert [tuple(layout) for layout in layouts_of((6, 3), 3)] == [(0, (1, 3, 2)), (0, (2, 3, 1)), (1, (1, 3, 1))]


# --- freshness ----------------------------------------------------------------------------------------------------


def test_a_tensor_modified_after_the_forward_pass_is_refused():
    for change in ("input", "parameter"):
        model, x = body(RIGHT["the same layer three times"]), X.clone()
        with pb.record(model) as tape:
            output = model(x)
        with torch.no_grad():
            x.mul_(2) if change == "input" else model.weight.sub_(1)
        with pytest.raises(RuntimeError, match=r"modified in place after the forward pass"):
            tape.pull(output, torch.ones_like(output)[None])


# --- a wrong rule -------------------------------------------------------------------------------------------------


def test_a_wrong_rule_is_caught(monkeypatch):
    from paraboloid.layers import RULES, spread

    monkeypatch.setitem(RULES, torch.mul, lambda x, y: [spread(x, lambda g: g), spread(y, lambda g: g)])
    with pytest.raises(RuntimeError, match="'bias': the recorded calls add up to a gradient that differs"):
        samples(body(lambda m, x: torch.mul(F.linear(x, m.weight), m.bias)), X)


def test_a_random_call_without_a_rule_is_caught():
    """The fallback runs the call again; other random numbers would give other samples."""

    def forward(m, x):
        keys = m.weight[None]
        return F.scaled_dot_product_attention(x[:, None], keys, keys, dropout_p=0.5)[:, 0]

    with (
        pytest.warns(UserWarning, match="scaled_dot_product_attention"),
        pytest.raises(RuntimeError, match=r"'weight': the recorded calls add up .* or a call is random"),
    ):
        pb.statistics(body(forward), nn.MSELoss(), (X, X), "grad")


# --- the recorder -------------------------------------------------------------------------------------------------


def test_composite_functions_are_lowered_and_others_are_not():
    assert lowered(F.multi_head_attention_forward) is not None
    assert lowered(torch.mul) is None and lowered(lambda x: x) is None


def test_pulls_inside_the_block_and_repeated_pulls_agree():
    model, x = models.make("class token")
    with pb.record(model) as tape:
        output = model(x)
        inside = tape.pull(output, torch.ones_like(output)[None])
    outside = tape.pull(output, torch.ones_like(output)[None])
    double = tape.pull(output, torch.stack([torch.ones_like(output), 2 * torch.ones_like(output)]))
    for k in inside:
        close(sum(o.samples() for o in outside[k]).detach(), sum(o.samples() for o in inside[k]).detach(), k)
        J = sum(o.samples() for o in double[k]).detach()
        close(J[1], 2 * J[0], k)
        close(sum(o.total() for o in double[k]).detach(), J.sum(1), k)


def test_nothing_is_left_on_the_model():
    model, x = models.make("gpt")
    before = {k: set(vars(m)) for k, m in model.named_modules()}
    attributes = {k: set(dir(p)) for k, p in model.named_parameters()}
    samples(model, x)
    assert before == {k: set(vars(m)) for k, m in model.named_modules()}
    assert attributes == {k: set(dir(p)) for k, p in model.named_parameters()}


def test_autocast_gives_results_in_the_parameters_type():
    model, x = models.make("residual cnn")
    model, x = model.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16), pb.record(model) as tape:
        output = model(x)
    assert output.dtype == torch.bfloat16
    y = torch.tensor([0, 1, 2])
    stats = tape.statistics(nn.CrossEntropyLoss(), output, y, ["sample_grads", "diag_ggn", "kfac"])
    exact = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "sample_grads")["sample_grads"]
    for k, g in stats["sample_grads"].items():
        assert g.dtype == torch.float32
        assert (g - exact[k]).norm() < 0.2 * exact[k].norm() + 1e-3, k


def test_a_compiled_model_and_a_wrapper_keep_the_plain_names():
    model, x = models.make("mlp")
    compiled = torch.compile(model, backend="eager")
    y = torch.zeros(3, 3).double()
    expected = pb.statistics(model, nn.MSELoss(), (x, y), "sample_grads")["sample_grads"]
    actual = pb.statistics(compiled, nn.MSELoss(), (x, y), "sample_grads")["sample_grads"]
    assert list(actual) == list(expected)
    for k in expected:
        close(actual[k], expected[k], k)
