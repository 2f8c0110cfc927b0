"""The diagonal of the Hessian against loops of double backward passes in float64, and what it costs."""

import re
import warnings
from itertools import pairwise, product

import losses_table
import models
import pytest
import torch
import torch.nn.functional as F
from oracle import close, dense_diagonal, trainable
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.engine.twice_differentiable import twice_differentiable
from paraboloid.graph import hessian_diagonal
from paraboloid.graph.nodes import Graph
from paraboloid.graph.single_use import Recorded, single_uses
from paraboloid.layers import RULES, rule, spread

SLOW = r"used several times, through other tensors or by an operation without a rule"


def check(model, inputs, loss_fn, y, **options):
    with twice_differentiable():
        expected = dense_diagonal(loss_fn(call(model, inputs), y), trainable(model))
    stats = pb.statistics(model, loss_fn, (inputs, y), "diag_hessian", **options)
    for k, value in stats["diag_hessian"].items():
        assert not value.requires_grad
        close(value, expected[k], k)
    return stats["diag_hessian"]


def method(model, inputs, loss_fn, y):
    """(calls that go the signed way, calls that take columns, names that no single call uses)."""
    with pb.record(model) as tape, twice_differentiable():
        f = call(model, inputs)
    loss = pb.Loss.from_torch(loss_fn)
    recorded = Recorded(tape, tape.plan(f), loss, f, y, None)
    parts, entangled = single_uses(recorded)
    signed, _ = hessian_diagonal.choose(recorded, Graph(f, [c.edge for c in recorded.calls]), parts, False)
    return sorted(signed), sorted(set(parts) - signed), entangled


@pytest.mark.parametrize("loss_name", ["ce weights, ignored, smoothed", "mse", "bce sum"])
@pytest.mark.parametrize("model_name", models.MODELS)
def test_every_model(model_name, loss_name):
    model, inputs = models.make(model_name)
    loss_fn, y = losses_table.make(loss_name, call(model, inputs))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*" + SLOW)
        check(model, inputs, loss_fn, y)


@pytest.mark.parametrize(
    "model_name, names",
    [
        ("mlp", []),
        ("resnet", []),
        ("transformer layer", []),
        ("gpt", ["tokens.weight"]),
        ("low rank", ["a", "b"]),
        ("shared", ["inner.weight", "inner.bias", "outer.weight"]),
    ],
)
def test_parameters_that_no_single_call_uses_are_named_in_a_warning(model_name, names):
    model, inputs = models.make(model_name)
    loss_fn, y = losses_table.make("ce", call(model, inputs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pb.statistics(model, loss_fn, (inputs, y), "diag_hessian")
    assert len(caught) == bool(names)
    assert not names or str(caught[0].message).startswith(
        f"diag_hessian: the parameters {names} are used several times"
    )


def linear_chain(*widths, activation=nn.Sigmoid):
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


class Sum(nn.Module):
    """One linear layer's output through two activations, added; a scale and a shift behind."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.shift, self.head = (
            nn.Linear(4, 5),
            nn.Parameter(torch.randn(5)),
            nn.Parameter(torch.randn(5)),
            nn.Linear(5, 3),
        )

    def forward(self, x):
        z = self.inner(x)
        return self.head(torch.tanh((torch.tanh(z) + F.gelu(z)) * self.scale + self.shift))


class Gated(nn.Module):
    """A product of two activations of one input."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Divided(nn.Module):
    """A parameter that the output is not affine in."""

    def __init__(self):
        super().__init__()
        self.inner, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor([1.3, 0.7, 2.0]))

    def forward(self, x):
        return self.inner(x) / self.temperature


class Positions(nn.Module):
    """Learned positions, tokens with padding, and a normalised sequence."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(20, 4, padding_idx=0), nn.Parameter(torch.randn(5, 4))
        self.norm, self.mix, self.head = nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, idx):
        return self.head(F.silu(self.mix(self.norm(self.tokens(idx) + self.positions)))).mean(1)


CASES = {  # build, draw inputs: networks that take every way there is
    "deep sigmoid": (lambda: linear_chain(4, 6, 5, 3), lambda: torch.randn(3, 4)),
    "bottleneck": (lambda: linear_chain(6, 5, 2, 5, 6, activation=nn.Tanh), lambda: torch.randn(3, 6)),
    "two activations of one layer": (Sum, lambda: torch.randn(3, 4)),
    "gate": (Gated, lambda: torch.randn(3, 4)),
    "divided": (Divided, lambda: torch.randn(3, 4)),
    "sequence": (Positions, lambda: torch.tensor([[1, 2, 2, 0, 3], [4, 4, 19, 1, 7], [5, 0, 0, 6, 5]])),
    "smooth convolutions": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=2), nn.GELU(), nn.Conv2d(3, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(2, 3)),
        lambda: torch.randn(3, 2, 5, 5),
    ),
    "smooth pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.SiLU(), nn.Flatten(), nn.Linear(3, 3)),
        lambda: torch.randn(3, 2, 5, 5),
    ),
    "softmax over positions": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 2, padding_mode="circular", padding=1), nn.Softmax(2), nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(8, 3)),
        lambda: torch.randn(3, 2, 4),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2), nn.GroupNorm(1, 2), nn.ConvTranspose2d(2, 1, 2), nn.SiLU(), nn.Flatten(), nn.Linear(25, 3)),
        lambda: torch.randn(3, 2, 2, 2),
    ),
    "wide input, normalised": (lambda: nn.Sequential(nn.Linear(20, 4), nn.LayerNorm(4), nn.Linear(4, 3)), lambda: torch.randn(3, 20)),
    "long input, normalised": (lambda: nn.Sequential(nn.Linear(20, 3), nn.LayerNorm(3), nn.Linear(3, 3), nn.Flatten(), nn.Linear(6, 3)), lambda: torch.randn(3, 2, 20)),
    "batch norm between": (lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval(), lambda: torch.randn(3, 4)),
    "piecewise linear": (lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 8), nn.LeakyReLU(), nn.Linear(8, 3)), lambda: torch.randn(3, 4)),
}  # fmt: skip


def make(case):
    torch.manual_seed(0)
    build, draw = CASES[case]
    model, x = build().double(), draw()
    return model, x.double() if x.is_floating_point() else x


@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("case", CASES)
def test_every_way(case, max_memory):
    model, x = make(case)
    y = torch.tensor([0, 2, 1]) if call(model, x).shape[1] == 3 else None
    with warnings.catch_warnings():
        if case == "divided":
            warnings.filterwarnings("ignore", message=".*" + SLOW)
        if y is None:
            check(model, x, nn.MSELoss(), torch.randn(3, 6).double(), max_memory=max_memory)
        else:
            check(model, x, nn.CrossEntropyLoss(), y, max_memory=max_memory)


@pytest.mark.parametrize(
    "case, signed, columns",
    [
        ("piecewise linear", [0, 1, 2], []),
        ("deep sigmoid", [0, 1, 2], []),
        ("two activations of one layer", [0, 1, 2, 3], []),
        ("gate", [2], [0, 1]),
        ("batch norm between", [0, 1, 2], []),
        ("wide input, normalised", [1, 2], [0]),
    ],
)
def test_which_way_is_taken(case, signed, columns):
    model, x = make(case)
    assert method(model, x, nn.CrossEntropyLoss(), torch.tensor([0, 2, 1])) == (signed, columns, [])


@pytest.mark.parametrize("model_name", ["residual cnn", "conv1d", "resnet"])
def test_piecewise_linear_networks_share_the_pulls_of_the_ggn(model_name, monkeypatch):
    """ReLU, pooling, batch norm in eval mode: the Hessian's diagonal is the GGN's, and costs no pull of its own."""
    model, inputs = models.make(model_name)
    model = (
        nn.Sequential(*[m for m in model if not isinstance(m, nn.GroupNorm)])
        if isinstance(model, nn.Sequential)
        else model
    )
    if model_name == "residual cnn":
        model.norm = nn.Identity()
    loss_fn, y = losses_table.make("ce", call(model, inputs))
    counts = []
    grad = torch.autograd.grad
    for wanted in (["diag_ggn"], ["diag_ggn", "diag_hessian"]):
        for _ in range(2):  # the first calls are certified
            pb.statistics(model, loss_fn, (inputs, y), wanted)
        pulls = []
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, pulls=pulls, **k: pulls.append(1) or grad(*a, **k))
        stats = pb.statistics(model, loss_fn, (inputs, y), wanted)
        monkeypatch.setattr(torch.autograd, "grad", grad)
        counts.append(len(pulls))
    assert counts[0] == counts[1]
    for k, value in stats["diag_hessian"].items():
        assert torch.equal(value, stats["diag_ggn"][k]), k


def test_the_cost_of_a_smooth_network_does_not_grow_with_its_width(monkeypatch):
    grad, counts = torch.autograd.grad, []
    for width in (5, 50):
        torch.manual_seed(0)
        model, x = linear_chain(8, 2 * width, width, 4), torch.randn(6, 8)
        y = torch.randint(4, (6,))
        for _ in range(2):
            pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "diag_hessian")
        pulls = []
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, pulls=pulls, **k: pulls.append(1) or grad(*a, **k))
        pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "diag_hessian")
        monkeypatch.setattr(torch.autograd, "grad", grad)
        counts.append(len(pulls))
    assert counts[0] == counts[1] < 20


class Overlap(pb.Loss):
    """A loss that is not convex in the output."""

    def sample_losses(self, f, y):
        p = f.sigmoid()
        return 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)


@pytest.mark.parametrize("case", ["deep sigmoid", "piecewise linear", "wide input, normalised", "smooth convolutions"])
def test_losses_that_are_not_convex(case):
    """The exact Hessian is taken, whatever curvature the loss gives to Gauss-Newton."""
    model, x = make(case)
    y = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double()
    found = check(model, x, Overlap(), y)
    assert any((d < 0).any() for d in found.values())
    check(model, x, 2 * Overlap() + pb.losses.MSE("sum"), y)
    model[-1] = nn.Linear(model[-1].in_features, 4).double()
    check(model, x, pb.losses.GaussianNLL(log_variance=True), torch.randn(3, 2).double())


def test_multiples_and_other_losses():
    model, x = make("deep sigmoid")
    once = check(model, x, nn.PoissonNLLLoss(), torch.tensor([[1.0, 0, 2], [0, 3, 1], [2, 2, 0]]).double())
    twice = check(model, x, 2 * pb.losses.PoissonNLL(), torch.tensor([[1.0, 0, 2], [0, 3, 1], [2, 2, 0]]).double())
    for k, value in once.items():
        close(twice[k], 2 * value)


def test_together_with_other_quantities_in_small_groups():
    model, x = make("deep sigmoid")
    y = torch.tensor([0, 2, 1])
    alone = check(model, x, nn.CrossEntropyLoss(), y)
    for wanted in (["diag_ggn", "diag_hessian", "variance"], ["diag_hessian", "diag_ggn", "kflr"]):
        stats = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), wanted, max_memory=1)
        ggn = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "diag_ggn")["diag_ggn"]
        for k, value in alone.items():
            close(stats["diag_hessian"][k], value)
            close(stats["diag_ggn"][k], ggn[k])


class Linear2(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x.square()


@pytest.mark.parametrize("function", [Linear2, Cube])
def test_custom_functions_between_layers(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.two(function.apply(self.one(x)))

    torch.manual_seed(0)
    check(Model().double(), torch.randn(3, 4).double(), nn.CrossEntropyLoss(), torch.tensor([0, 2, 1]))


def test_a_rule_of_ones_own_is_asked_whether_it_is_affine():
    def rescale(x, w):
        return x * w.exp()

    def twice(x, w):
        return 2 * x * w

    class Model(nn.Module):
        def __init__(self, op):
            super().__init__()
            self.op, self.w, self.inner, self.head = op, nn.Parameter(torch.randn(5)), nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            z = self.inner(x)
            return self.head(
                torch.overrides.handle_torch_function(self.op, (z, self.w), z, self.w)
                if torch.overrides.has_torch_function((z, self.w))
                else self.op(z, self.w)
            )

    for op, left in ((rescale, lambda x, w, g: g * x * w.exp()), (twice, lambda x, w, g: 2 * g * x)):
        rule(op)(lambda x, w, left=left: iter([spread(w, lambda g: left(x, w, g))]))
        try:
            torch.manual_seed(0)
            model, x, y = Model(op).double(), torch.randn(3, 4).double(), torch.tensor([0, 2, 1])
            if op is rescale:
                with pytest.warns(UserWarning, match=re.escape("the parameters ['w'] are used several times")):
                    check(model, x, nn.CrossEntropyLoss(), y)
            else:
                check(model, x, nn.CrossEntropyLoss(), y)
        finally:
            del RULES[op]


def test_inside_ones_own_step():
    model, inputs = models.make("gpt")
    y = torch.randint(6, (3, 3), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=SLOW):
        expected = pb.statistics(model, nn.CrossEntropyLoss(), (inputs, y), "diag_hessian")["diag_hessian"]
    with pb.record(model) as tape, twice_differentiable():
        f = model(inputs)
    with pytest.warns(UserWarning, match=SLOW):
        found = tape.statistics(nn.CrossEntropyLoss(), f, y, "diag_hessian")["diag_hessian"]
    for k, value in expected.items():
        close(found[k], value)


def test_operations_without_a_second_derivative_say_what_to_do():
    model, inputs = models.make("gpt")
    y = torch.zeros(3, 3, dtype=torch.int64)
    with pb.record(model) as tape:
        f = model(inputs)
    with (
        pytest.raises(
            RuntimeError, match=r"without a second derivative in torch .* run the forward pass under .*sdpa_kernel"
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        tape.statistics(nn.CrossEntropyLoss(), f, y, "diag_hessian")
    model, x = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)).double(), torch.randn(3, 4).double()
    with pb.record(model) as tape:
        f = model(x)
    with pytest.raises(
        RuntimeError, match="weight_norm ran as a fused operation, whose second derivative is wrong in torch"
    ):
        tape.statistics(nn.CrossEntropyLoss(), f, torch.tensor([0, 2, 1]), "diag_hessian")


def test_a_wrong_entry_is_caught(monkeypatch):
    model, x = make("deep sigmoid")
    monkeypatch.setattr(hessian_diagonal, "add_bends", lambda *_: None)
    with pytest.raises(
        RuntimeError, match=r"diag_hessian of parameter '.*' at element \d+ is .*, but autograd's second derivative is"
    ):
        pb.statistics(model, nn.CrossEntropyLoss(), (x, torch.tensor([0, 2, 1])), "diag_hessian")
    pb.statistics(model, nn.CrossEntropyLoss(), (x, torch.tensor([0, 2, 1])), "diag_hessian", verify=False)


def test_a_long_computation_is_announced(monkeypatch):
    model, x = make("smooth convolutions")
    monkeypatch.setattr(hessian_diagonal, "MANY", 3)
    with pytest.warns(UserWarning, match=r"diag_hessian takes about \d+ backward passes for this network"):
        check(model, x, nn.CrossEntropyLoss(), torch.tensor([0, 2, 1]))


def test_samples_must_be_independent():
    model, x = make("batch norm between")
    with pytest.raises(ValueError, match="mixes or reorders the samples"):
        pb.statistics(model.train(), nn.CrossEntropyLoss(), (x, torch.tensor([0, 2, 1])), "diag_hessian")


def test_single_precision_and_autocast():
    model, x = make("deep sigmoid")
    y = torch.tensor([0, 2, 1])
    exact = check(model, x, nn.CrossEntropyLoss(), y)
    single = pb.statistics(model.float(), nn.CrossEntropyLoss(), (x.float(), y), "diag_hessian")["diag_hessian"]
    with torch.autocast("cpu", torch.bfloat16):
        half = pb.statistics(model, nn.CrossEntropyLoss(), (x.float(), y), "diag_hessian", verify="always")[
            "diag_hessian"
        ]
    for k, value in exact.items():
        assert single[k].dtype == half[k].dtype == torch.float32
        torch.testing.assert_close(single[k].double(), value, rtol=1e-3, atol=1e-5)
        assert (half[k].double() - value).abs().max() < 0.1 * value.abs().max()


@pytest.mark.parametrize("middle", [nn.ReLU, nn.GELU])
@pytest.mark.parametrize("seed", range(8))
def test_autocast_rounds_what_the_certificate_compares(middle, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), middle(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 2)
    x, y = torch.randn(6, 4, generator=generator), torch.tensor([0, 2, 1, 1, 0, 2])
    with torch.autocast("cpu", torch.bfloat16):
        half = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "diag_hessian", verify="always")["diag_hessian"]
    exact = pb.Hessian(model.double(), nn.CrossEntropyLoss(), (x.double(), y)).to_dense().diagonal()
    found = torch.cat([t.flatten() for t in half.values()]).double()
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()


class Tokens(nn.Module):
    """An embedding far below the only activation."""

    def __init__(self):
        super().__init__()
        self.below, self.hidden, self.last = nn.Embedding(7, 4), nn.Conv1d(4, 5, 3, padding=1), nn.Conv1d(5, 3, 1)

    def forward(self, x):
        return self.last(self.hidden(self.below(x).transpose(1, 2)).tanh())


@pytest.mark.parametrize("ignored", [0, 1, 2, 3])
def test_samples_whose_targets_are_all_ignored(ignored):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Tokens().double(), torch.randint(0, 7, (3, 4)), torch.randint(0, 3, (3, 4))
    y[:ignored] = -100
    loss = nn.CrossEntropyLoss(reduction="sum")
    exact = pb.Hessian(model, loss, (x, y)).to_dense().diagonal()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    for data, verify in product(((x, y), batches), (False, "always")):
        found = pb.statistics(model, loss, data, "diag_hessian", verify=verify)["diag_hessian"]
        close(torch.cat([t.flatten() for t in found.values()]), exact)


def test_unused_and_frozen_parameters():
    model, x = make("deep sigmoid")
    model.extra = nn.Parameter(torch.randn(2).double())
    model[2].weight.requires_grad_(False)
    stats = pb.statistics(
        nn.Sequential(*model[:5]), nn.CrossEntropyLoss(), (x, torch.tensor([0, 2, 1])), "diag_hessian"
    )
    assert "2.weight" not in stats["diag_hessian"]

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3).double(), nn.Parameter(torch.randn(2).double())

        def forward(self, x):
            return self.used(x)

    found = check(Unused(), x, nn.CrossEntropyLoss(), torch.tensor([0, 2, 1]))
    assert not found["unused"].any()
