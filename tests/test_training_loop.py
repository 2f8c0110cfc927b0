"""A citizen of the user's own loop: every ambient switch of torch around a recording, and everything between two."""

import shutil
import threading
import warnings

import models
import oracle
import pytest
import torch
from oracle import close
from torch import nn
from torch.utils.checkpoint import checkpoint

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.linalg.kronecker import Kron

FIRST = ["grad", "sample_grads", "square_norms", "gram", "second_moment", "variance"]
SUMS = ["grad", "second_moment", "variance", "diag_ggn", "kfac_empirical", "kflr"]
CE = nn.CrossEntropyLoss()


def mlp(width=5, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3)).double()


X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 2, 2, 1, 0])


def numbers(value):
    return value.to_dense() if isinstance(value, Kron) else value


def same(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        assert list(actual[name]) == list(expected[name])
        for k in expected[name]:
            close(numbers(actual[name][k]), numbers(expected[name][k]), f"{name} {k}")


# --- mixed precision ----------------------------------------------------------------------------------------------

AUTOCAST = ["mlp", "sequence mlp", "residual cnn", "gpt", "class token", "transformer layer", "flattened", "vit"]


def single(name, n=8):
    model, x = models.make(name, n)
    model, x = model.float(), x.float() if x.is_floating_point() else x
    f = call(model, x)
    y = torch.randint(f.shape[1], (n, *f.shape[2:]), generator=torch.Generator().manual_seed(1))
    return model, x, y


def distance(actual, expected):
    """Norm of the difference over all parameters, relative."""
    pairs = [(numbers(actual[k]), numbers(expected[k])) for k in expected]
    assert all(a.dtype == b.dtype == torch.float32 for a, b in pairs)
    wrong = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    return wrong / sum(float(b.square().sum()) for _, b in pairs) ** 0.5


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.06), (torch.float16, 0.006)])
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(name, dtype, tolerance):
    """Layers run in half precision, results come in the parameter's type and as accurate as the layers are."""
    model, x, y = single(name)
    wanted = [*FIRST, "diag_ggn", "sample_diag_ggn", "kfac_empirical", "kflr"]
    exact = pb.statistics(model, CE, (x, y), wanted)
    with torch.autocast("cpu", dtype):
        inside = pb.statistics(model, CE, (x, y), wanted)
        with pb.record(model) as tape:
            output = call(model, x)
    assert output.dtype == dtype or name == "vit"
    outside = tape.statistics(CE, output, y, wanted)
    for stats in (inside, outside):
        assert stats.loss.dtype == torch.float32 and abs(stats.loss / exact.loss - 1) < 0.02
        for q in wanted:
            assert distance(stats[q], exact[q]) < tolerance, q


def test_autocast_sums_in_float32():
    """What is summed over 4,096 samples or positions keeps its small terms, and squares do not vanish in float16."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    loss, x = nn.MSELoss(reduction="sum"), torch.full((4096, 2), 2.0**-7)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            stats = pb.statistics(model, loss, (x, torch.zeros(4096, 1)), ["grad", "second_moment", "diag_ggn", "kflr"])
        g = 2 * 2.0**-7 * 2.0**-7  # of one sample: its square, 2^-26, is below float16's smallest number
        close(stats["grad"]["weight"], torch.full((1, 2), 4096 * g))
        close(stats["second_moment"]["weight"], torch.full((1, 2), g * g))
        curvature = torch.full((2,), 4096 * 2 * 2.0**-14)  # the loss's root, sqrt(2), is rounded
        torch.testing.assert_close(stats["diag_ggn"]["weight"][0], curvature, rtol=0.01, atol=0)
        torch.testing.assert_close(stats["kflr"]["weight"].to_dense().diag(), curvature, rtol=0.01, atol=0)


def test_autocast_of_a_call_without_a_rule_and_of_a_derived_weight():
    """The fallback runs a call again with the types it had; a product of weights is in half precision itself."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)
            self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            x = torch.einsum("ni,oi->no", self.inner(x), self.inner.weight)
            return self.outer(torch.tanh(nn.functional.linear(x, self.b @ self.a)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Odd(), torch.randn(8, 4), torch.randint(2, (8,))
    wanted = ["sample_grads", "variance", "diag_ggn"]
    with torch.autocast("cpu", torch.bfloat16), pb.record(model) as tape:
        output = model(x)
    with pytest.warns(UserWarning, match="einsum"):
        stats = tape.statistics(CE, output, y, wanted)
    with pytest.warns(UserWarning, match="einsum"):
        exact = pb.statistics(model, CE, (x, y), wanted)
    for q in wanted:
        assert distance(stats[q], exact[q]) < 0.05, q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_sums_in_float32(dtype):
    """Half of 4,096 equal terms would be lost in a bfloat16 sum; the result is rounded once, to the parameter's type."""
    model = nn.Linear(2, 1, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(0.5)
    x, y = torch.ones(4096, 2, dtype=dtype), torch.zeros(4096, 1, dtype=dtype)
    stats = pb.statistics(model, nn.MSELoss(), (x, y), ["grad", "second_moment", "diag_ggn", "kflr"])
    for q, value in [("grad", 2.0), ("second_moment", 4.0), ("diag_ggn", 2.0)]:
        assert stats[q]["weight"].dtype == dtype
        torch.testing.assert_close(stats[q]["weight"], torch.full((1, 2), value, dtype=dtype))
    assert stats["kflr"]["weight"].left.dtype == dtype


def test_mixing_samples_is_refused_in_half_precision_too():
    model = mlp().float()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), pb.record(model) as tape:
            output = model(X.float()).flip(0)
        with pytest.raises(ValueError, match="does not separate"):
            tape.statistics(CE, output, Y, "sample_grads")


def test_a_gradient_scaler_in_the_loop():
    """Quantities are those of the loss that is passed: unscaled. With `scale * loss` and accumulate_grad the `.grad`
    is what the scaler expects."""
    model, reference = mlp().float(), mlp().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
    x = X.float()
    for _ in range(3):
        plain = pb.statistics(reference, CE, (x, Y), ["grad", "variance"], accumulate_grad=True)
        optimizers[1].step()
        optimizers[1].zero_grad()
        with pb.record(model) as tape:
            output = model(x)
        stats = tape.statistics(CE, output, Y, ["grad", "variance"])
        scaled = scaler.scale(torch.ones(())).item() * pb.Loss.from_torch(CE)
        tape.statistics(scaled, output, Y, "grad", accumulate_grad=True)
        scaler.step(optimizers[0])
        scaler.update()
        optimizers[0].zero_grad()
        for q in ("grad", "variance"):
            for k in plain[q]:
                torch.testing.assert_close(stats[q][k], plain[q][k], rtol=1e-4, atol=1e-6)
    for p, r in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-6)


# --- gradient accumulation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_accumulate_the_gradient_of_the_big_batch(reduction):
    model, loss = mlp(), pb.losses.CrossEntropy(reduction=reduction)
    params = dict(model.named_parameters())
    expected = oracle.grads(loss(model(X), Y), params)
    before = {k: torch.randn_like(p) for k, p in params.items()}
    for k, p in params.items():
        p.grad = before[k].clone()
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):  # weighted by their share, as the user would
        share = (rows.stop - rows.start) / len(X) if reduction == "mean" else 1
        pb.statistics(model, share * loss, (X[rows], Y[rows]), "square_norms", accumulate_grad=True)
    for k, p in params.items():
        close(p.grad - before[k], expected[k], k)


# --- activation checkpointing -------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A shared layer and dropout, batch norm in training mode where asked for, inside a checkpoint."""

    def __init__(self, reentrant=None, norm=False):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.dropout, self.norm = nn.Dropout(0.3), nn.BatchNorm1d(5) if norm else nn.Identity()
        self.reentrant = reentrant

    def block(self, x):
        return self.norm(self.dropout(torch.tanh(self.shared(torch.tanh(self.shared(x))))))

    def forward(self, x):
        x = self.first(x)
        return self.head(
            self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        )


def checkpointed(*args):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Checkpointed(*args).double()


def test_checkpointing_changes_nothing():
    expected = pb.statistics(checkpointed(), CE, (X, Y), SUMS + ["sample_grads"], seed=3)
    model = checkpointed(False)
    same(pb.statistics(model, CE, (X, Y), SUMS + ["sample_grads"], seed=3), expected)
    state = torch.get_rng_state()
    with pb.record(model) as tape:
        output = model(X)
        drawn = torch.get_rng_state()
        before = tape.statistics(CE, output, Y, ["sample_grads"])
        CE(output, Y).backward(retain_graph=True)  # computes the block again, inside the recording
        after = tape.statistics(CE, output, Y, ["sample_grads"])
    assert torch.equal(drawn, torch.get_rng_state()) and not torch.equal(state, drawn)
    same(after, before)
    for k, p in model.named_parameters():
        close(p.grad, before["sample_grads"][k].mean(0), k)


def test_checkpointed_batch_norm_moves_its_statistics_once():
    """Each pull runs the checkpointed block again, on copies of its buffers."""
    model, plain = checkpointed(False, True), checkpointed(None, True)
    model.dropout.p = plain.dropout.p = 0.0
    with pb.record(model) as tape:
        output = model(X)
    stats = tape.statistics(CE, output, Y, ["grad", "kfac_empirical"])
    with pb.record(plain) as tape:
        output = plain(X)
    same(stats, tape.statistics(CE, output, Y, ["grad", "kfac_empirical"]))
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        close(a, b)


def test_reentrant_checkpointing_is_refused():
    model = checkpointed(True)
    with pytest.raises(RuntimeError, match=r"use_reentrant=True.*pass use_reentrant=False"):
        pb.statistics(model, CE, (X, Y), "sample_grads")


# --- between two recordings ---------------------------------------------------------------------------------------


def test_optimiser_steps_and_evaluation_between_recordings():
    """Every step equals the plain loop's; freshness is about what the output depends on, not about what came before."""
    model, reference = mlp(), mlp()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, reference)]
    for step in range(5):
        with pb.record(model) as tape:
            output = model(X)
        loss = CE(output, Y)
        stats = tape.statistics(CE, output, Y, ["grad", "variance"])
        loss.backward()
        expected = oracle.grads(CE(reference(X), Y), dict(reference.named_parameters()))
        for k, p in reference.named_parameters():
            p.grad = expected[k]
            close(stats["grad"][k], expected[k], f"step {step} {k}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert torch.equal(model(X), reference(X))


def test_one_recording_may_span_several_steps():
    """An optimiser's step inside the block makes neither data of the parameters nor a stale tape of what follows."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pb.record(model) as tape:
        for _ in range(3):
            output = model(X)
            expected = oracle.sample_grads(CE, model(X), Y, dict(model.named_parameters()))
            stats = tape.statistics(CE, output, Y, "sample_grads")
            for k in expected:
                close(stats["sample_grads"][k], expected[k], k)
            CE(output, Y).backward(retain_graph=True)
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="modified in place after the forward pass"):
        tape.statistics(CE, output, Y, "sample_grads")


def test_evaluation_inside_a_recording():
    model = mlp()
    with pb.record(model) as tape:
        with torch.inference_mode():
            model(X.clone())
        with torch.no_grad():
            model(X)
        output = model(X)
        with torch.inference_mode():
            model(output.detach()[:, :1].expand(-1, 4))
    assert len(tape.calls) == 2
    same(tape.statistics(CE, output, Y, FIRST), pb.statistics(model, CE, (X, Y), FIRST))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_statistics_under_no_grad_and_inference_mode(context):
    model = mlp()
    expected = pb.statistics(model, CE, (X, Y), SUMS)
    with pb.record(model) as tape:
        output = model(X)
    with context():
        inside, later = pb.statistics(model, CE, (X, Y), SUMS), tape.statistics(CE, output, Y, SUMS)
    for stats in (inside, later):
        same(stats, expected)
        assert not any(numbers(v).is_inference() for q in SUMS for v in stats[q].values())


def test_frozen_parameters_may_change_from_step_to_step():
    model = mlp()
    params = dict(model.named_parameters())
    for frozen in ([], ["0.weight"], ["0.weight", "0.bias"], ["2.bias"], []):
        for k, p in params.items():
            p.requires_grad_(k not in frozen)
        trained = {k: p for k, p in params.items() if k not in frozen}
        stats = pb.statistics(model, CE, (X, Y), "sample_grads")["sample_grads"]
        expected = oracle.sample_grads(CE, model(X), Y, trained)
        assert list(stats) == list(trained)
        for k in trained:
            close(stats[k], expected[k], k)


# --- several models, several threads ------------------------------------------------------------------------------


def test_nested_recordings_of_two_models():
    """Each sees its own parameters only, whichever is inside, and the outer one sees through the inner model."""
    first, second = mlp(5), mlp(4, seed=1)
    chain = nn.Linear(3, 4).double()
    expected = [pb.statistics(m, CE, (X, Y), FIRST) for m in (first, second)]
    with pb.record(first) as outer:
        one = first(X)
        with pb.record(second) as inner:
            two = second(X)
            chained = second(chain(one))
    same(outer.statistics(CE, one, Y, FIRST), expected[0])
    same(inner.statistics(CE, two, Y, FIRST), expected[1])
    both = nn.ModuleList([first, second])
    truth = oracle.sample_grads(CE, chained, Y, dict(both.named_parameters()))
    for prefix, tape in (("0.", outer), ("1.", inner)):
        for k, g in tape.statistics(CE, chained, Y, "sample_grads")["sample_grads"].items():
            close(g, truth[prefix + k], prefix + k)


def test_nested_recordings_of_one_model():
    model, x = models.make("transformer layer", 4)
    with pb.record(model) as outer, pb.record(model) as inner:
        output = model(x)
    y = torch.zeros_like(output)
    same(outer.statistics(nn.MSELoss(), output, y, FIRST), inner.statistics(nn.MSELoss(), output, y, FIRST))
    same(outer.statistics(nn.MSELoss(), output, y, FIRST), pb.statistics(model, nn.MSELoss(), (x, y), FIRST))


def test_a_recording_sees_its_own_thread_only():
    """Two threads record and run plain forward passes of two models at the same time, step by step."""
    nets = [mlp(5), mlp(6, seed=1)]
    expected = [pb.statistics(m, CE, (X, Y), FIRST) for m in nets]
    barrier, found, errors = threading.Barrier(2), {}, []

    def work(i):
        try:
            with pb.record(nets[i]) as tape:
                barrier.wait()
                output = nets[i](X)
                nets[1 - i](X)  # the other model, while it is being recorded over there
                barrier.wait()
            found[i] = len(tape.calls), tape.statistics(CE, output, Y, FIRST)
        except Exception as e:  # shown below, in the main thread
            errors.append(e)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for i in range(2):
        assert found[i][0] == 2
        same(found[i][1], expected[i])


# --- torch.compile ------------------------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.inner(self.inner(torch.tanh(self.first(x)))))


def compiled(how, backend):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Layers().double()
    if how == "whole":
        return torch.compile(model, backend=backend)
    if how == "in place":
        model.compile(backend=backend)
    elif how == "submodule":
        model.inner = torch.compile(model.inner, backend=backend)
    elif how == "method":
        model.forward = torch.compile(model.forward, backend=backend)
    return model


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("how", ["whole", "in place", "submodule", "method"])
def test_compiled_models(how, backend):
    """Right, before the model was ever compiled and after; and its own compiled code goes on as if nothing was."""
    plain = compiled("plain", None)
    expected = pb.statistics(plain, CE, (X, Y), SUMS)
    with torch.no_grad():
        f = plain(X)
    for warm in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own: compiling imports deprecated modules
            torch._dynamo.reset()
            model = compiled(how, backend)
            if warm:
                CE(model(X), Y).backward()
                model.zero_grad()
            before = graphs()
            same(pb.statistics(model, CE, (X, Y), SUMS), expected)
            assert graphs() == before
            outputs, counts = [], []
            for _ in range(4):
                outputs.append(model(X))
                counts.append(graphs())
                with pb.record(model) as tape:
                    recorded = model(X)
                same(tape.statistics(CE, recorded, Y, SUMS), expected)
            assert len(set(counts)) == 1  # compiled at most once, at its own first call
            assert counts[0] > before or warm
            for output in outputs:
                close(output.detach(), f)
            params = {k.replace("_orig_mod.", ""): p for k, p in model.named_parameters()}
            CE(outputs[-1], Y).backward()
            for k, p in params.items():
                close(p.grad, expected["grad"][k], k)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="found no C++ compiler")
def test_a_model_compiled_by_inductor(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch._inductor.config

        monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
        model = compiled("whole", "inductor")
        expected = pb.statistics(compiled("plain", None), CE, (X, Y), SUMS)
        output = model(X)
        CE(output, Y).backward()
        same(pb.statistics(model, CE, (X, Y), SUMS), expected)
        count = graphs()
        close(model(X).detach(), output.detach())
        assert graphs() == count
    torch._dynamo.reset()


def test_a_compiled_training_step_is_refused_and_can_be_exempted():
    model = mlp()
    expected = pb.statistics(model, CE, (X, Y), "variance")

    def step():
        return pb.statistics(model, CE, (X, Y), "variance")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"inside a function that torch\.compile compiles; expected it outside"):
            torch.compile(step, backend="eager")()
        exempted = torch.compiler.disable(step)
        same(torch.compile(lambda: exempted(), backend="eager")(), expected)
    torch._dynamo.reset()


def test_recordings_that_overlap_leave_the_compiler_as_it_was():
    import torch._dynamo

    stance = torch._dynamo.eval_frame._stance
    model, steps = mlp(), [threading.Event() for _ in range(3)]

    def other():
        with pb.record(mlp()):
            steps[0].set()
            steps[1].wait()
        steps[2].set()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    steps[0].wait()
    with pb.record(model):
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        steps[1].set()
        steps[2].wait()  # the one that began first ends first
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    thread.join()
    assert torch._dynamo.eval_frame._stance is stance
