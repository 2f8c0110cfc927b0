"""K-BFGS and K-BFGS(L) next to the algorithm written out: dense, slow, in plain view."""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paraboloid as pb

torch_lr, torch_damping = 0.2, 0.3


def autoencoder(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), activation(), nn.Linear(5, 3), nn.Linear(3, 5), activation(), nn.Linear(5, 6)
    ).double()  # fmt: skip


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.Flatten(), nn.Linear(3, 6)
    ).double()  # fmt: skip


def batches(count=6, shape=(6,), N=9):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.rand(N, *shape, generator=g, dtype=torch.float64), torch.rand(N, 6, generator=g, dtype=torch.float64))
        for _ in range(count)
    ]


LOSSES = {
    "bce": lambda f, y: F.binary_cross_entropy_with_logits(f, y, reduction="sum") / len(f),
    "mse": lambda f, y: 0.5 * (f - y).square().sum() / len(f),
}


class Reference:
    """Section by section the published algorithm, with dense matrices and autograd alone."""

    def __init__(self, model, loss, lr, damping, weight_decay=1e-5, memory=None):
        self.model, self.loss, self.lr, self.damping, self.tau = model, loss, lr, damping, weight_decay
        self.layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
        self.memory, self.t = memory, 0
        self.M = [None] * len(self.layers)
        self.pairs = [[] for _ in self.layers]
        self.s = [torch.zeros(len(m.weight), dtype=torch.float64) for m in self.layers]
        self.y = [torch.zeros(len(m.weight), dtype=torch.float64) for m in self.layers]
        self.Hg = [torch.eye(len(m.weight), dtype=torch.float64) for m in self.layers]
        self.A, self.Ha = None, None

    def forward(self, x):
        """Inputs abar [N T q] and pre-activations h of every layer."""
        inputs, outputs = [], []
        for module in self.model:
            if isinstance(module, nn.Conv2d):
                a = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride).mT
            elif isinstance(module, nn.Linear):
                a = x.unsqueeze(1)
            x = module(x)
            if isinstance(module, nn.Linear | nn.Conv2d):
                if module.bias is not None:
                    a = torch.cat([a, torch.ones_like(a[..., :1])], 2)
                inputs.append(a.detach())
                x.retain_grad()
                outputs.append(x)
        return inputs, outputs, x

    def evaluate(self, x, y):
        for p in self.model.parameters():
            p.grad = None
        inputs, outputs, f = self.forward(x)
        self.loss(f, y).backward()
        h = [self.rows(o) for o in outputs]
        g = [self.rows(o.grad) for o in outputs]
        T = [len(r) / len(x) for r in h]
        return inputs, [r.mean(0).detach() for r in h], [r.sum(0) / t for r, t in zip(g, T, strict=True)], T

    @staticmethod
    def rows(o):
        return o if o.dim() == 2 else o.flatten(2).mT.flatten(0, 1)

    def moments(self, inputs):
        rows = [a.flatten(0, 1) for a in inputs]
        return [r.T @ r / len(r) for r in rows], [r.mean(0) for r in rows]

    def inverse(self, A, T):
        return torch.linalg.inv(A + (self.damping * T) ** 0.5 * torch.eye(len(A), dtype=A.dtype))

    def warm_start(self, data):
        found = []
        for x, y in data:
            inputs, _, _, T = self.evaluate(x, y)
            found.append(self.moments(inputs)[0])
        self.A = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
        self.Ha = [self.inverse(A, t) for A, t in zip(self.A, T, strict=True)]

    def matrix(self, tensors, module):
        W = tensors[0].flatten(1)
        return W if module.bias is None else torch.cat([W, tensors[1].unsqueeze(1)], 1)

    def step(self, x, y):
        inputs, h, g, T = self.evaluate(x, y)
        A, abar = self.moments(inputs)
        if self.t > 0:
            self.A = [0.9 * old + 0.1 * new for old, new in zip(self.A, A, strict=True)]
        with torch.no_grad():
            for i, module in enumerate(self.layers):
                parts = [p for p in (module.weight, module.bias) if p is not None]
                G = self.matrix([p.grad for p in parts], module) + self.tau * self.matrix(parts, module)
                self.M[i] = 0.1 * G if self.M[i] is None else 0.9 * self.M[i] + 0.1 * G
                D = self.lr * self.Hg[i] @ self.M[i] @ self.Ha[i]
                if module.bias is not None:
                    module.bias -= D[:, -1]
                    D = D[:, :-1]
                module.weight -= D.reshape(module.weight.shape)
        _, h2, g2, _ = self.evaluate(x, y)
        for i in range(len(self.layers)):
            self.s[i] = 0.9 * self.s[i] + 0.1 * (h2[i] - h[i])
            self.y[i] = 0.9 * self.y[i] + 0.1 * (g2[i] - g[i])
            s, change, H = self.s[i], self.y[i], self.Hg[i]
            mu = (self.damping / T[i]) ** 0.5
            Hy = H @ change
            if s @ change <= 0.2 * change @ Hy:
                theta = 0.8 * (change @ Hy) / (change @ Hy - s @ change)
                s = theta * s + (1 - theta) * Hy
            if s @ change <= mu * s @ s:
                theta = min(1.0, max(0.0, float((1 - mu) * (s @ s) / (s @ s - s @ change))))
                change = theta * change + (1 - theta) * s
            if s @ change > 0 and s @ change > 1e-4 * (s @ s) * g[i].norm():
                self.pairs[i].append((s, change))
                self.Hg[i] = self.bfgs(H, s, change) if self.memory is None else self.from_pairs(i)
            s = self.Ha[i] @ abar[i]
            change = self.A[i] @ s + (self.damping * T[i]) ** 0.5 * s
            if s @ change > 0 and s @ change > 1e-4 * (s @ s) * abar[i].norm():
                self.Ha[i] = self.bfgs(self.Ha[i], s, change)
        self.t += 1

    def from_pairs(self, i):
        H = torch.eye(len(self.s[i]), dtype=torch.float64)
        for s, y in self.pairs[i][-self.memory :]:
            H = self.bfgs(H, s, y)
        return H

    @staticmethod
    def bfgs(H, s, y):
        rho = 1 / (s @ y)
        V = torch.eye(len(s), dtype=s.dtype) - rho * torch.outer(s, y)
        return V @ H @ V.T + rho * torch.outer(s, s)


def closure_of(model, opt, loss, x, y):
    def closure():
        opt.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    return closure


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compared(model, make, loss, data, memory=None, damping=torch_damping, steps=None):
    reference = Reference(copy.deepcopy(model), loss, torch_lr, damping, memory=memory)
    opt = make(model, nn.MSELoss(), lr=torch_lr, damping=damping)
    opt.warm_start(data)
    reference.warm_start(data)
    for x, y in data if steps is None else (data * steps)[:steps]:
        opt.step(closure_of(model, opt, loss, x, y))
        reference.step(x, y)
        torch.testing.assert_close(flat(model), flat(reference.model), rtol=1e-9, atol=1e-11)
    return opt, reference


@pytest.mark.parametrize("damping", [0.05, 0.3, 2.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_kbfgs_is_the_written_out_algorithm(loss, damping):
    opt, reference = compared(autoencoder(), pb.optim.KBFGS, LOSSES[loss], batches(), damping=damping)
    for state, H, Ha in zip(opt._layers_found.values(), reference.Hg, reference.Ha, strict=True):
        torch.testing.assert_close(state.Hg.H, H, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(state.Ha, Ha, rtol=1e-8, atol=1e-10)
        assert state.counts["updates"] > 0


@pytest.mark.parametrize("memory", [2, 100])
def test_kbfgs_l_is_the_written_out_algorithm(memory):
    make = lambda *args, **options: pb.optim.KBFGSL(*args, memory=memory, **options)  # noqa: E731
    opt, reference = compared(autoencoder(), make, LOSSES["bce"], batches(), memory=memory, steps=8)
    for state, H in zip(opt._layers_found.values(), reference.Hg, strict=True):
        torch.testing.assert_close(state.Hg.times(torch.eye(len(H), dtype=H.dtype)), H, rtol=1e-8, atol=1e-10)
        assert state.Hg.pairs <= memory and not hasattr(state.Hg, "H")


@pytest.mark.parametrize("make", [pb.optim.KBFGS, pb.optim.KBFGSL])
def test_convolutions(make):
    compared(cnn(), make, LOSSES["mse"], batches(shape=(2, 6, 6)), memory=None if make is pb.optim.KBFGS else 100)


def test_sequences_are_positions():
    """A linear layer on [N T q] is a convolution with kernel 1 on [N q T]."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)).double()
    conv = nn.Sequential(nn.Conv1d(4, 3, 1), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)).double()
    with torch.no_grad():
        conv[0].weight.copy_(linear[0].weight.unsqueeze(2))
        conv[0].bias.copy_(linear[0].bias)
        conv[3].bias.copy_(linear[3].bias)
        conv[3].weight.copy_(linear[3].weight.unflatten(1, (5, 3)).mT.flatten(1))
    x, y = torch.randn(7, 5, 4, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    for model, inputs in ((linear, x), (conv, x.mT)):
        opt = pb.optim.KBFGS(model, nn.MSELoss())
        opt.warm_start([(inputs, y)])
        for _ in range(4):
            opt.step(closure_of(model, opt, F.mse_loss, inputs, y))
    torch.testing.assert_close(linear[0].weight, conv[0].weight.squeeze(2), rtol=1e-9, atol=1e-12)


def test_any_multiple_or_sum_of_losses_is_read_from_the_closure():
    model, twin, (x, y) = autoencoder(nn.Tanh), autoencoder(nn.Tanh), batches()[0]
    opt, rival = pb.optim.KBFGS(model, nn.MSELoss()), pb.optim.KBFGS(twin, nn.MSELoss())
    double = lambda f, y: LOSSES["mse"](f, y) + LOSSES["bce"](f, y)  # noqa: E731
    for o in (opt, rival):
        o.warm_start([(x, y)])
    for _ in range(3):
        opt.step(closure_of(model, opt, double, x, y))

        def parts():
            rival.zero_grad()
            f = twin(x)
            first, second = LOSSES["mse"](f, y), LOSSES["bce"](f, y)
            first.backward(retain_graph=True)
            second.backward()
            return first + second

        rival.step(parts)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [pb.optim.KBFGS, lambda *a, **o: pb.optim.KBFGSL(*a, memory=3, **o)])
@pytest.mark.parametrize("warm", [True, False])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make, warm):
    data = batches(9)
    model = autoencoder()
    opt = make(model, nn.MSELoss())
    if warm:
        opt.warm_start(data)
    saved = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t, (x, y) in enumerate(data):
            if t == 5:
                file = io.BytesIO()
                torch.save((model.state_dict(), opt.state_dict()), file)
                saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            opt.step(closure_of(model, opt, LOSSES["bce"], x, y))
        other = autoencoder()
        fresh = make(other, nn.MSELoss())
        other.load_state_dict(saved[0])
        fresh.load_state_dict(saved[1])
        for x, y in data[5:]:
            fresh.step(closure_of(other, fresh, LOSSES["bce"], x, y))
    assert torch.equal(flat(model), flat(other))
    assert fresh.diagnostics() == opt.diagnostics()


def test_without_a_warm_start_the_first_batches_make_A_and_it_says_so_once():
    model, data = autoencoder(), batches(3)
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    with pytest.warns(UserWarning, match="was not warmed up; its first 10 batches make A"):
        opt.step(closure_of(model, opt, LOSSES["mse"], *data[0]))
    for x, y in data[1:]:
        opt.step(closure_of(model, opt, LOSSES["mse"], x, y))  # once
    rows = torch.cat([torch.cat([x, torch.ones_like(x[:, :1])], 1) for x, _ in data])
    torch.testing.assert_close(opt._layers_found["0.weight"].A, rows.T @ rows / len(rows))


def test_dropout_masks_are_replayed_and_statistics_move_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6)).double()
    x, y = batches()[0]
    opt = pb.optim.KBFGS(model, nn.MSELoss(), lr=0.0)
    opt.warm_start([(x, y)])
    assert int(model[1].num_batches_tracked) == 0
    for _ in range(3):
        opt.step(closure_of(model, opt, LOSSES["mse"], x, y))
    assert int(model[1].num_batches_tracked) == 3
    for state in opt._layers_found.values():  # nothing moved, so nothing changed: s = y = 0 skips the update
        assert not state.s.any() and not state.y.any()
        assert torch.equal(state.Hg.H, torch.eye(len(state.s), dtype=torch.float64))
        assert state.counts["updates"] == state.counts["skipped_g"] == 0
    assert opt.diagnostics()["layers"]["1.weight"] == {"structure": "identity"}


def test_other_parameters_take_the_momentum_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6)).double()
    x, y = batches()[0]
    opt = pb.optim.KBFGS(model, nn.MSELoss(), lr=0.1, weight_decay=0.0)
    opt.warm_start([(x, y)])
    (g,) = torch.autograd.grad(LOSSES["mse"](model(x), y), model[1].weight)
    before = model[1].weight.detach().clone()
    opt.step(closure_of(model, opt, LOSSES["mse"], x, y))
    torch.testing.assert_close(before - model[1].weight.detach(), 0.1 * 0.1 * g)


def test_activation_checkpoints_are_read_once():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = autoencoder()

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

    model, twin, (x, y) = Checkpointed(), autoencoder(), batches()[0]
    opts = pb.optim.KBFGS(model, nn.MSELoss()), pb.optim.KBFGS(twin, nn.MSELoss())
    for o in opts:
        o.warm_start([(x, y)])
    for _ in range(3):
        opts[0].step(closure_of(model, opts[0], LOSSES["bce"], x, y))
        opts[1].step(closure_of(twin, opts[1], LOSSES["bce"], x, y))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


def test_nan_skips_the_step():
    model, (x, y) = autoencoder(), batches()[0]
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    opt.warm_start([(x, y)])
    opt.step(closure_of(model, opt, LOSSES["mse"], x, y))
    before, state = flat(model), copy.deepcopy(opt.state_dict())
    with pytest.warns(UserWarning, match="step 2 was skipped: the loss is NaN or infinite"):
        opt.step(closure_of(model, opt, LOSSES["mse"], x * float("nan"), y))
    assert torch.equal(flat(model), before)
    after = opt.state_dict()
    assert torch.equal(
        state["paraboloid"]["layers"]["0.weight"]["Hg"]["H"], after["paraboloid"]["layers"]["0.weight"]["Hg"]["H"]
    )
    assert opt.diagnostics()["skipped"] == 1


def test_errors():
    model, (x, y) = autoencoder(), batches()[0]
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    with pytest.raises(ValueError, match=r"KBFGS evaluates the loss twice.*expected step\(closure\)"):
        opt.step()
    with pytest.raises(RuntimeError, match="the closure left no gradient"):
        opt.step(lambda: LOSSES["mse"](model(x), y))
    opt.zero_grad()
    LOSSES["mse"](model(x), y).backward()
    with pytest.raises(RuntimeError, match="reached none of the model's layers"):
        opt.step(lambda: LOSSES["mse"](model(x), y))
    with pytest.raises(ValueError, match="memory is 0; expected an integer of at least 1"):
        pb.optim.KBFGSL(model, nn.MSELoss(), memory=0)
    with pytest.raises(ValueError, match=r"decay is 1\.0"):
        pb.optim.KBFGS(model, nn.MSELoss(), decay=1.0)
    with pytest.raises(ValueError, match="the data is empty"):
        opt.warm_start([])
    model[0] = nn.Linear(6, 5).double()
    with pytest.raises(RuntimeError, match="the model changed"):
        opt.step(closure_of(model, opt, LOSSES["mse"], x, y))


def test_hooks_are_gone_after_every_step():
    model, (x, y) = autoencoder(), batches()[0]
    opt = pb.optim.KBFGS(model, nn.MSELoss())
    opt.warm_start([(x, y)])
    opt.step(closure_of(model, opt, LOSSES["mse"], x, y))
    with pytest.raises(KeyError):
        opt.step(lambda: {}["nothing"])
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_layers_without_a_batch_axis_or_called_by_keyword_take_the_momentum_gradient():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6).double()

        def forward(self, x):
            return F.linear(input=x, weight=self.inner.weight, bias=self.inner.bias)

    x, y = batches()[0]
    for model, inputs, targets in ((ByKeyword(), x, y), (nn.Linear(6, 6).double(), x[0], y[0])):
        opt = pb.optim.KBFGS(model, nn.MSELoss(), lr=0.1, weight_decay=0.0)
        parameters = list(model.parameters())
        grads = torch.autograd.grad(F.mse_loss(model(inputs), targets), parameters)
        before = [p.detach().clone() for p in parameters]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt.step(closure_of(model, opt, F.mse_loss, inputs, targets))
        for p, b, g in zip(parameters, before, grads, strict=True):
            torch.testing.assert_close(b - p.detach(), 0.1 * 0.1 * g)


@pytest.mark.parametrize("make", [pb.optim.KBFGS, pb.optim.KBFGSL])
def test_a_layer_with_a_side_too_long_takes_the_momentum_gradient(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 9)).double()
    loss, x, y = nn.CrossEntropyLoss(), torch.randn(12, 6).double(), torch.arange(12) % 9
    opt = make(model, loss, lr=0.1, momentum=0.0, weight_decay=0.0, max_factor=7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.warm_start([(x, y)])
        for _ in range(2):
            before = [p.detach().clone() for p in model.parameters()]
            opt.step(closure_of(model, opt, loss, x, y))
    said = [str(w.message) for w in caught if "max_factor" in str(w.message)]
    assert len(said) == 1
    assert "['2.weight'] have a side of 9 rows, longer than max_factor=7" in said[0]
    structures = {k: layer["structure"] for k, layer in opt.diagnostics()["layers"].items()}
    assert structures == {
        "0.weight": "quasi-newton",
        "0.bias": "quasi-newton",
        "2.weight": "identity",
        "2.bias": "identity",
    }
    after = [p.detach().clone() for p in model.parameters()]
    for p, value in zip(model.parameters(), before, strict=True):
        p.data.copy_(value)
    g = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    for i in (2, 3):
        torch.testing.assert_close(after[i], before[i] - 0.1 * g[i])


@pytest.mark.parametrize("optimiser", [pb.optim.KBFGS, pb.optim.KBFGSL])
def test_resumed_runs_are_the_uninterrupted_ones_in_the_last_digit(optimiser):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 13), nn.ReLU(), nn.Linear(13, 11), nn.Tanh(), nn.Linear(11, 3))

    def steps(model, opt, first, last):
        for step in range(first, last):
            g = torch.Generator().manual_seed(step)
            x, y = torch.randn(19, 7, generator=g), torch.randint(3, (19,), generator=g)

            def closure(x=x, y=y):
                opt.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)

    options = {"memory": 6} if optimiser is pb.optim.KBFGSL else {}
    model, g = make(), torch.Generator().manual_seed(0)
    opt = optimiser(model, nn.CrossEntropyLoss(), **options)
    opt.warm_start([(torch.randn(19, 7, generator=g), torch.zeros(19, dtype=torch.int64))])
    steps(model, opt, 0, 5)
    for saved in range(5, 19, 2):
        other = make()
        other.load_state_dict(model.state_dict())
        resumed = optimiser(other, nn.CrossEntropyLoss(), lr=3.0)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        for each in ((model, opt), (other, resumed)):
            steps(*each, saved, saved + 2)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_into_nan_is_told_where_nothing_takes_it_back():
    torch.manual_seed(0)
    x, y = batches()[0]
    for rise_factor in (None, 2.0):
        model = autoencoder()
        opt = pb.optim.KBFGS(model, nn.MSELoss(), lr=1e300, rise_factor=rise_factor)
        opt.warm_start([(x, y)])
        before = [p.detach().clone() for p in model.parameters()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            opt.step(closure_of(model, opt, LOSSES["mse"], x, y))
        assert opt.diagnostics()["second_not_finite"] == 1
        assert len(caught) == (rise_factor is None)
        if rise_factor is None:
            assert "rise_factor is None. Give a rise_factor, or a smaller lr" in str(caught[0].message)
        else:  # taken back, and told by the diagnostics
            assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
            assert opt.diagnostics()["trust"]["taken_back"] == 1
