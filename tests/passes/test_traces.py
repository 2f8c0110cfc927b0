"""Nothing is left behind: not on the model, not in torch, not in memory; after errors neither."""

import gc
import resource
import warnings
import weakref

import models
import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.engine import tape as tape_module
from paraboloid.passes.memory import GRADIENTS

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


class Normed(nn.Module):
    """Batch norm in training mode, a derived weight, an operation without a rule."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.centres = nn.Parameter(torch.randn(2, 3))

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x.unsqueeze(1))))
        return torch.cdist(self.head(x.sum(2)), self.centres)


def normed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Normed()


# --- memory -------------------------------------------------------------------------------------------------------


def live_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def resident_bytes():
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak has to do
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def steps(count, model):
    """Training steps that use every way in, on other models too, as a long job with many of them would."""
    x, y = torch.randn(4, 4), torch.randint(2, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the fallback
        for step in range(count):
            model.train(step % 2 == 0)
            wanted = "grad" if model.training else "variance"
            if step % 4 < 2:
                pb.statistics(model, CE, (x, y), wanted, accumulate_grad=True)
            else:
                with pb.record(model) as tape:
                    output = model(x)
                tape.statistics(CE, output, y, wanted)
                CE(output, y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 4 == 0:
                pb.statistics(nn.Linear(4, 2), MSE, (x, torch.ones(4, 2)), "variance")


def test_a_thousand_steps_leak_nothing():
    """A step's graph goes with its tape, at once: the garbage collector is not needed."""
    model = normed()
    steps(40, model)  # caches fill
    gc.collect()
    gc.disable()
    try:
        tensors = live_tensors()
        steps(60, model)
        assert live_tensors() <= tensors
    finally:
        gc.enable()
    gc.collect()
    memory = resident_bytes()
    steps(900, model)
    gc.collect()
    assert live_tensors() <= tensors
    assert resident_bytes() - memory < 4 * 2**20  # the 900 graphs, kept, would take 30 MB


def test_what_is_remembered_of_a_model_does_not_keep_it():
    model, x = models.make("gpt")
    pb.statistics(model, MSE, (x, torch.zeros_like(call(model, x))), "variance")
    assert model in tape_module._certified
    reference, known = weakref.ref(model), len(tape_module._certified)
    del model
    gc.collect()
    assert reference() is None and len(tape_module._certified) < known


def test_a_tape_frees_its_graph():
    model, x = models.make("residual cnn")
    with pb.record(model) as tape:
        output = model(x)
    stats = tape.statistics(MSE, output, torch.zeros_like(output), "variance")
    node = weakref.ref(tape.calls[0].args[0])
    del tape, output, x
    assert node() is None
    assert not stats.output.requires_grad


# --- errors -------------------------------------------------------------------------------------------------------


class Fails(RuntimeError):
    pass


def state(model):
    return (
        {
            k: (set(vars(m)), m.training, len(m._forward_hooks), len(m._backward_hooks))
            for k, m in model.named_modules()
        },
        {k: (set(dir(p)), p.grad is None, p._version) for k, p in model.named_parameters()},
        {k: (id(b), b.clone()) for k, b in model.named_buffers()},
        torch.get_rng_state(),
        len(_get_current_function_mode_stack()),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


def equal(a, b):
    """Equality of nested structures with tensors in them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


class Failing(nn.Module):
    """Fails in its forward pass (also inside an unrolled layer or an attention), or in its backward pass."""

    def __init__(self, where):
        super().__init__()
        self.first, self.norm, self.dropout = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.where = where

    def forward(self, x):
        x = self.dropout(self.norm(self.first(x)))
        if self.where == "forward":
            raise Fails
        if self.where == "attention":
            self.attention(x[:, None], x[:, None, :3], x[:, None])
        if self.where == "backward":
            x.register_hook(self.fail)
        return x

    def fail(self, g):
        raise Fails


@pytest.mark.parametrize(
    "where, error", [("forward", Fails), ("attention", AssertionError), ("backward", Fails), ("mixing", ValueError)]
)
def test_an_error_leaves_nothing_behind(where, error):
    model, x, y = Failing(where), torch.randn(5, 4), torch.randint(4, (5,))
    nothing = state(model)
    for quantity in ("variance", "kfac_empirical") if where != "mixing" else ("variance",):
        with pytest.raises(error):
            pb.statistics(model, CE, (x, y), quantity, accumulate_grad=True)
        assert equal(state(model), nothing)
    if where in ("forward", "attention"):
        rng = torch.get_rng_state()
        with pytest.raises(error), pb.record(model):
            model(x)
        torch.set_rng_state(rng)  # the user's own forward pass draws as ever
        assert len(_get_current_function_mode_stack()) == 0


def test_an_error_in_a_pull_leaves_no_hook_on_the_graph():
    """Hooks on graph nodes live for one certification: later backward passes do not see them."""
    model, x = Failing("nowhere"), torch.randn(5, 4)
    fails = [True]

    def sometimes(g):
        if fails[0]:
            raise Fails

    with pb.record(model) as tape:
        output = model(x)
    output.register_hook(sometimes)
    v = torch.randn(1, 5, 4)
    for accepts in (False, True):
        with pytest.raises(Fails):
            tape.pull(output * 1, v, batch_statistics=accepts)
    fails[0] = False
    (g,) = torch.autograd.grad(output, model.first.weight, v[0], retain_graph=True)
    outers = tape.pull(output, v, batch_statistics=True)
    (again,) = torch.autograd.grad(output, model.first.weight, v[0], retain_graph=True)
    assert torch.equal(g, again)
    torch.testing.assert_close(outers["first.weight"][0].total()[0], g)


@pytest.mark.parametrize("name", ["gpt", "resnet", "reparametrised"])
def test_success_leaves_nothing_behind_either(name):
    model, x = models.make(name)
    model.train()
    nothing = state(model)
    f = call(model.eval(), x)
    model.train()
    pb.statistics(model, MSE, (x, torch.zeros_like(f)), ["grad", "kfac"] if name == "resnet" else "grad")
    assert equal(state(model), nothing)


def test_inputs_are_unfolded_once_for_all_vectors(monkeypatch):
    """Exact roots of several groups of vectors: each convolution's input is copied out once, and not kept afterwards."""
    from paraboloid.reductions.right import Right

    kept = []
    keep, forget = Right.keep, Right.forget
    monkeypatch.setattr(Right, "keep", lambda self: (kept.append(self), keep(self)))
    monkeypatch.setattr(Right, "forget", lambda self: (forget(self), kept.append(None)))
    monkeypatch.setattr(GRADIENTS, "default", 1)  # one vector at a time
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(27, 4)).double()
    x, y = torch.randn(5, 1, 6, 6, dtype=torch.float64), torch.arange(5) % 4
    found = pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "diag_ggn")["diag_ggn"]
    assert len([right for right in kept if right is not None]) == 2
    assert kept.count(None) == 2
    assert all(right._kept is None for right in kept if right is not None)
    monkeypatch.setattr(GRADIENTS, "default", 2**24)
    for name, value in pb.statistics(model, nn.CrossEntropyLoss(), (x, y), "diag_ggn")["diag_ggn"].items():
        torch.testing.assert_close(found[name], value)
