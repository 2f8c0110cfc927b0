"""Passes over the data: what is kept, what is left untouched, what is the same each time, and what raises."""

import copy
import gc

import pytest
import torch
from operators.oracle import LOSSES, Attention, classes, dense_ggn, dense_hessian, make_inputs, make_model
from operators.oracle import outputs as outputs_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import paraboloid as pb
from paraboloid.losses import NoTargets
from paraboloid.operators import GGN, Hessian
from paraboloid.operators.matrix_free.replay import Footprint

OPERATORS = [GGN, Hessian]
KEPT, ANEW = {"max_memory": None}, {"max_memory": 0}
CE = nn.CrossEntropyLoss()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dropout_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


def batch_norm_net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()


class Counting:
    """A list of batches that counts how often it is read."""

    def __init__(self, batches):
        self.batches, self.reads = batches, 0

    def __iter__(self):
        self.reads += 1
        return iter(self.batches)


def two_batches():
    return [(make_inputs("mlp", n, n), classes(n, n)) for n in (5, 3)]


# --- what is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Operator", OPERATORS)
def test_kept_graphs_are_read_once_and_others_on_each_product(Operator):
    model, v = make_model("mlp"), random(57)
    data = Counting(two_batches())
    kept = Operator(model, CE, data)
    for _ in range(3):
        product = kept @ v
    assert data.reads == 1
    data = Counting(two_batches())
    anew = Operator(model, CE, data, max_memory=0)
    for _ in range(3):
        torch.testing.assert_close(anew @ v, product, rtol=1e-12, atol=1e-15)
    assert data.reads == 4


@pytest.mark.parametrize("Operator", OPERATORS)
def test_many_columns_take_one_pass(Operator):
    data = Counting(two_batches())
    A = Operator(make_model("mlp"), CE, data, max_memory=0)
    A @ random(57, 10)
    A.quadratic_forms(random(10, 57))
    assert data.reads == 3


def test_memory_is_what_autograd_keeps():
    """A tanh keeps its output: 8 bytes for each of 10 x 100 values, whatever else was allocated on the way."""
    weight = torch.randn(100, 100, dtype=torch.float64, requires_grad=True)
    x = torch.randn(10, 100, dtype=torch.float64)
    with Footprint([weight]) as kept:
        h = torch.tanh(x @ weight.t())
        h.detach().clone().exp()
        s = h.sum()
        del h
    assert kept.bytes_kept() == 8000 + 8
    del s
    assert kept.bytes_kept() == 0


@pytest.mark.parametrize("Operator", OPERATORS)
def test_a_limit_between_one_graph_and_all_keeps_none(Operator):
    model, batches = make_model("mlp"), two_batches()
    with Footprint(model.parameters()) as kept:
        one = Operator(model, CE, batches[0])
    size = kept.bytes_kept()
    assert size > 0
    assert one.replay.kept is not None
    assert Operator(model, CE, batches, max_memory=size).replay.kept is None
    assert Operator(model, CE, batches, max_memory=3 * size).replay.kept is not None


def test_graphs_are_released_with_the_operator():
    model, batches = make_model("attention"), two_batches()
    with Footprint([*model.parameters(), *(x for x, _ in batches)]) as kept:
        G, H = GGN(model, CE, batches), Hessian(model, CE, batches)
        G @ random(G.shape[0])
        H @ random(H.shape[0])
    gc.disable()  # no reference cycles: they go at once
    try:
        del G, H
        assert kept.bytes_kept() == 0
    finally:
        gc.enable()


# --- what is left untouched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [KEPT, ANEW], ids=["kept", "anew"])
@pytest.mark.parametrize("Operator", OPERATORS)
@pytest.mark.parametrize("make", [dropout_net, batch_norm_net])
def test_nothing_is_touched(Operator, memory, make):
    model = make()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, mode = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    versions = [p._version for p in model.parameters()]
    buffers = {k: id(b) for k, b in model.named_buffers()}
    random_state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(*two_batches()[0]), batch_size=3, shuffle=True)
    with torch.no_grad():
        A = Operator(model, CE, loader, **memory)
        A @ random(A.shape[0])
        A.trace(samples=2)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))
    assert [m.training for m in model.modules()] == mode
    assert [p._version for p in model.parameters()] == versions
    assert {k: id(b) for k, b in model.named_buffers()} == buffers
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert torch.is_grad_enabled()


def test_an_error_in_the_model_leaves_nothing_behind():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            self.norm(torch.rand_like(x))
            raise ZeroDivisionError

    model = Failing()
    state, mean = torch.get_rng_state(), model.norm.running_mean
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        GGN(model, CE, (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), classes(3, 0)))
    assert model.norm.running_mean is mean
    assert torch.equal(mean, torch.zeros(5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("Operator, dense", [(GGN, dense_ggn), (Hessian, dense_hessian)])
def test_batch_norm_in_training_mode_is_the_curvature_of_the_whole_batch(Operator, dense, checkpointed):
    model = batch_norm_net()
    if checkpointed:
        from torch.utils.checkpoint import checkpoint

        inner = model

        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return checkpoint(self.inner, x, use_reentrant=False)

        model = Checkpointed()
    batch = two_batches()[0]
    expected = dense(copy.deepcopy(model), CE, [batch])
    state = copy.deepcopy(model.state_dict())
    A = Operator(model, CE, batch)
    scale = expected.abs().max().item()
    torch.testing.assert_close(A.to_dense(), expected, rtol=1e-9, atol=1e-10 * scale)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), state.values(), strict=True))


def test_no_grad_and_inference_mode_do_not_matter():
    model, batch, v = make_model("mlp"), two_batches()[0], random(57)
    expected = GGN(model, CE, batch) @ v
    with torch.no_grad():
        torch.testing.assert_close(GGN(model, CE, batch) @ v, expected)
    with torch.inference_mode():
        found = GGN(model, CE, batch) @ v
    torch.testing.assert_close(found, expected)


# --- what is the same each time ----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [KEPT, ANEW], ids=["kept", "anew"])
@pytest.mark.parametrize("Operator", OPERATORS)
def test_masks_are_drawn_once_and_follow_the_seed(Operator, memory):
    model, batches = dropout_net(), two_batches()
    A, same, other = (Operator(model, CE, batches, seed=seed, **memory) for seed in (0, 0, 1))
    v = random(A.shape[0])
    first = A @ v
    torch.manual_seed(5)
    assert torch.equal(A @ v, first)
    assert torch.equal(same @ v, first)
    assert not torch.allclose(other @ v, first)
    torch.testing.assert_close(A.to_dense(), A.to_dense().T)


def test_kept_or_not_the_masks_are_the_same():
    model, batches = dropout_net(), two_batches()
    torch.testing.assert_close(GGN(model, CE, batches).to_dense(), GGN(model, CE, batches, max_memory=0).to_dense())


@pytest.mark.parametrize("memory", [KEPT, ANEW], ids=["kept", "anew"])
def test_a_shuffling_loader_is_one_big_batch(memory):
    model = make_model("mlp")
    x, y = make_inputs("mlp", 11, 0), classes(11, 0)
    expected = GGN(model, CE, (x, y)).to_dense()
    data = TensorDataset(x, y)
    own = torch.Generator().manual_seed(3)  # its order differs on each pass; the sum over samples does not
    for loader in (
        DataLoader(data, batch_size=4, shuffle=True),
        DataLoader(data, batch_size=4, shuffle=True, generator=own),
    ):
        A = GGN(model, CE, loader, **memory)
        for _ in range(2):
            torch.testing.assert_close(A.to_dense(), expected, rtol=1e-10, atol=1e-12)


def test_loaders_are_weighted_by_what_the_loss_divides_by():
    """Batches with different shares of ignored targets, one of them with nothing else."""
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64), ignore_index=-1)
    model = make_model("mlp")
    x, y = make_inputs("mlp", 9, 0), torch.tensor([0, -1, -1, -1, -1, -1, 2, 1, 2])
    expected_ggn, expected_hessian = (dense(model, loss_fn, [(x, y)]) for dense in (dense_ggn, dense_hessian))
    batches = [(x[i : i + 3], y[i : i + 3]) for i in (0, 3, 6)]
    for memory in (KEPT, ANEW):
        torch.testing.assert_close(GGN(model, loss_fn, batches, **memory).to_dense(), expected_ggn)
        torch.testing.assert_close(Hessian(model, loss_fn, batches, **memory).to_dense(), expected_hessian)
    with pytest.raises(NoTargets, match="every target of every batch is ignored"):
        GGN(model, loss_fn, batches[1:2])


def test_value_and_gradient_of_a_loader():
    model, batches = make_model("mlp"), two_batches()
    f, y = outputs_of(model, batches)
    for Operator in OPERATORS:
        for memory in (KEPT, ANEW):
            replay = Operator(model, CE, batches, **memory).replay
            assert replay.value == pytest.approx(CE(f, y).item(), rel=1e-12)
            assert replay.samples == 8
            expected = torch.autograd.grad(CE(f, y), list(model.parameters()), retain_graph=True)
            for a, b in zip(replay.gradient(), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- what raises -------------------------------------------------------------------------------------------------


class Augmented(Dataset):
    """Noise from a source that no seed of torch reaches."""

    def __init__(self):
        self.x, self.y = two_batches()[0]
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(5, generator=self.generator, dtype=torch.float64), self.y[i]


@pytest.mark.parametrize("Operator", OPERATORS)
def test_data_that_moves_between_passes_raises(Operator):
    model = make_model("mlp")
    loader = DataLoader(Augmented(), batch_size=2)
    A = Operator(model, CE, loader, max_memory=0)
    for call in (lambda: A @ random(57), lambda: A.quadratic_forms(random(1, 57)), A.replay.gradient):
        with pytest.raises(
            RuntimeError, match=r"the summed loss moved from \d.* to \d.* between two passes over the data"
        ):
            call()
    kept = Operator(model, CE, loader)  # one pass is enough, and fixes the samples
    assert torch.equal(kept @ random(57), kept @ random(57))


def test_drop_last_with_an_order_of_its_own_raises():
    model, (x, y) = make_model("mlp"), two_batches()[0]
    loader = DataLoader(
        TensorDataset(x, y), batch_size=2, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(0)
    )
    A = GGN(model, CE, loader, max_memory=0)
    with pytest.raises(RuntimeError, match="the summed loss moved"):
        for _ in range(5):
            A @ random(57)


@pytest.mark.parametrize("memory", [KEPT, ANEW], ids=["kept", "anew"])
def test_parameters_that_changed_raise(memory):
    model = make_model("mlp")
    A = GGN(model, CE, two_batches(), **memory)
    with torch.no_grad():
        model[2].bias.add_(1)
    with pytest.raises(RuntimeError, match=r"parameter '2.bias' has changed since this operator was made"):
        A @ random(57)


def test_a_change_of_mode_raises_when_the_data_is_read_again():
    model = dropout_net()
    A = GGN(model, CE, two_batches(), max_memory=0)
    model.eval()
    with pytest.raises(RuntimeError, match="changes of mode"):
        A @ random(A.shape[0])


class ConstantFactor(torch.autograd.Function):
    """a b whose backward takes b for a constant in the gradient of a."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        return g * b.detach(), g * a


class UntransposedBackward(torch.autograd.Function):
    """An identity whose backward has a second derivative that is not its transpose."""

    @staticmethod
    def forward(ctx, a, b):
        return a.clone()

    @staticmethod
    def backward(ctx, g):
        return Doubled.apply(g), None


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g):
        return g.clone()

    @staticmethod
    def backward(ctx, h):
        return 2 * h


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(5, 3).double(), nn.Linear(5, 3).double(), function

    def forward(self, x):
        return self.function.apply(torch.tanh(self.first(x)), self.second(x))


@pytest.mark.parametrize("Operator, function", [(Hessian, ConstantFactor), (GGN, UntransposedBackward)])
def test_a_wrong_second_derivative_raises(Operator, function):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Applied(function)
    A = Operator(model, CE, two_batches())
    generic = torch.randn(A.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.zeros_like(generic)
    first[0] = 1  # tells nothing about the other parameters
    uses = [lambda: A @ generic, lambda: A @ first, lambda: A.quadratic_forms(first[None]), A.to_dense]
    for use in uses:
        with pytest.raises(RuntimeError, match="autograd's second derivative of Applied is wrong"):
            use()


def test_weight_norm_is_spelled_out_because_its_kernel_is_wrong():
    """torch's fused weight norm has a Hessian that is not symmetric; should it be mended, drop our own."""
    torch.manual_seed(0)
    v, g = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.ones(2, 1, dtype=torch.float64)

    def hessian():
        (d,) = torch.autograd.grad((torch._weight_norm(v, g, 0) ** 3).sum(), v, create_graph=True)
        return torch.stack([torch.autograd.grad(e, v, retain_graph=True)[0].reshape(-1) for e in d.reshape(-1)])

    assert (hessian() - hessian().T).abs().max() > 0.1


ARGUMENTS = [
    (lambda m: GGN(m, CE, iter(two_batches())), ValueError, "data is a list_iterator, which can be read only once"),
    (lambda m: GGN(m, CE, (b for b in two_batches())), ValueError, "data is a generator, which can be read only once"),
    (lambda m: GGN(m, CE, []), ValueError, "the data is empty"),
    (lambda m: GGN(m, CE, torch.zeros(3)), ValueError, "data is a Tensor; expected a batch"),
    (lambda m: GGN(m, CE, [torch.zeros(3)]), ValueError, "the data yielded a Tensor; expected batches"),
    (lambda m: GGN(m, CE, (random(4, 5), classes(3, 0))), ValueError, "the output has 4 samples but the targets have"),
    (lambda m: GGN(m, CE, (random(4, 5), classes(4, 0) + 5)), ValueError, "is out of range; expected class indices"),
    (lambda m: GGN(m, CE, (random(4, 5) * torch.nan, classes(4, 0))), ValueError, "the loss is nan; expected a finite"),
    (lambda m: GGN(m, nn.CrossEntropyLoss(reduction="none"), two_batches()), ValueError, "reduction is 'none'"),
    (lambda m: GGN(m, "mse", two_batches()), TypeError, "loss_fn is a str; expected"),
    (
        lambda m: GGN(m, lambda f, y: (f - y).abs(), (random(4, 5), random(4, 3))),
        ValueError,
        "the loss returned a tensor",
    ),
    (lambda m: GGN(m, CE, two_batches(), output=lambda o: o.detach()), ValueError, "does not depend on any parameter"),
    (
        lambda m: GGN(m, CE, two_batches(), output=lambda o: (o,)),
        ValueError,
        "the model returned a tuple; expected a tensor",
    ),
    (lambda m: GGN(m.requires_grad_(False), CE, two_batches()), ValueError, "has no parameter with requires_grad=True"),
]


@pytest.mark.parametrize("make, error, message", ARGUMENTS, ids=[a[2][:40] for a in ARGUMENTS])
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make(make_model("mlp"))


# --- any loss ----------------------------------------------------------------------------------------------------


def contrast(f, y):
    """A loss that couples samples, and is convex in the output."""
    return (f.T @ f).square().sum() / len(f)


@pytest.mark.parametrize("Operator, dense", [(GGN, dense_ggn), (Hessian, dense_hessian)])
def test_any_callable_is_a_loss_on_one_batch(Operator, dense):
    model, batch = make_model("mlp"), two_batches()[0]
    A = Operator(model, contrast, batch)
    expected = dense(model, contrast, [batch])
    torch.testing.assert_close(A.to_dense(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(A.diagonal(), expected.diagonal(), rtol=1e-9, atol=1e-12)
    with pytest.raises(
        ValueError, match="a plain callable, which does not tell how it divides, and the data has several"
    ):
        Operator(model, contrast, two_batches())


@pytest.mark.parametrize("Operator, dense", [(GGN, dense_ggn), (Hessian, dense_hessian)])
def test_unknown_torch_losses_that_sum_work_on_loaders(Operator, dense):
    loss_fn = nn.SmoothL1Loss(reduction="sum")
    model = make_model("mlp")
    batches = [(make_inputs("mlp", n, n), random(n, 3, seed=n)) for n in (4, 2)]
    torch.testing.assert_close(Operator(model, loss_fn, batches).to_dense(), dense(model, loss_fn, batches))


@pytest.mark.parametrize("Operator, dense", [(GGN, dense_ggn), (Hessian, dense_hessian)])
def test_multiples_sums_and_losses_of_ones_own(Operator, dense):
    class Quartic(pb.Loss):
        def sample_losses(self, f, y):
            return (f - y).square().sum(1).square()

    loss = 2 * pb.losses.MSE(reduction="batchmean") + Quartic()
    model = make_model("mlp")
    batches = [(make_inputs("mlp", n, n), random(n, 3, seed=n)) for n in (4, 2)]

    def plainly(f, y):
        squares = (f - y).square().sum(1)
        return (2 * squares + squares**2).sum() / len(f)

    torch.testing.assert_close(Operator(model, loss, batches).to_dense(), dense(model, plainly, batches))


# --- ways to call a model ----------------------------------------------------------------------------------------


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_model("mlp")

    def forward(self, left, right):
        return {"logits": self.net(left + right)}


def test_structured_inputs_and_outputs():
    model = Structured()
    x, y = two_batches()[0]
    expected = GGN(model.net, CE, (3 * x, y)).to_dense()
    for batch in (((x, 2 * x), y), ({"left": x, "right": 2 * x}, y), {"left": x, "right": 2 * x, "labels": y}):
        A = GGN(model, CE, batch, output=lambda o: o["logits"])
        torch.testing.assert_close(A.to_dense(), expected)


@pytest.mark.parametrize("Operator", OPERATORS)
def test_wrapped_models_are_unwrapped(Operator):
    model, batch = make_model("mlp"), two_batches()[0]
    expected = Operator(model, CE, batch).to_dense()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        A = Operator(wrapped, CE, batch)
        assert list(A.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
        torch.testing.assert_close(A.to_dense(), expected)


def test_compiled_modules_inside_run_eagerly():
    model, batch = make_model("mlp"), two_batches()[0]
    expected = Hessian(model, CE, batch).to_dense()
    model[0].compile(backend="aot_eager")
    model[2] = torch.compile(model[2], backend="aot_eager")
    torch.testing.assert_close(Hessian(model, CE, batch).to_dense(), expected)


def test_a_callable_with_parameters_is_a_model():
    inner = make_model("mlp")

    class Plain:
        def named_parameters(self):
            return inner.named_parameters()

        def __call__(self, x):
            return inner(x)

    batch = two_batches()[0]
    torch.testing.assert_close(GGN(Plain(), CE, batch).to_dense(), GGN(inner, CE, batch).to_dense())


@pytest.mark.parametrize("Operator", OPERATORS)
def test_scripted_modules(Operator):
    import warnings

    model, batch = make_model("mlp"), two_batches()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(model)
    torch.testing.assert_close(Operator(scripted, CE, batch).to_dense(), Operator(model, CE, batch).to_dense())


@pytest.mark.parametrize("Operator", OPERATORS)
def test_autocast_is_that_of_the_making(Operator):
    """Made under autocast, the forward pass runs in bfloat16 each time; results have the parameters' dtype."""
    model, (x, y) = make_model("mlp").float(), two_batches()[0]
    exact = Operator(model, CE, (x.float(), y)).to_dense()
    for memory in (KEPT, ANEW):
        with torch.autocast("cpu", torch.bfloat16):
            A = Operator(model, CE, (x.float(), y), **memory)
        found = A.to_dense()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, exact, rtol=0, atol=0.05 * exact.abs().max().item())
        assert not torch.equal(found, exact)


def test_attention_without_asking_for_the_math_kernel():
    """The fused kernel has no double backward; the user's choice of kernels is back afterwards."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, batch = make_model("attention"), two_batches()[0]
    assert isinstance(model, Attention)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        A = Hessian(model, LOSSES["cross-entropy"][0], batch)
        A @ random(A.shape[0])
        assert torch.backends.cuda.flash_sdp_enabled()
