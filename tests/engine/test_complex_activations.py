"""Complex activations between real parameters: Fourier layers, state-space kernels, phases."""

import warnings

import oracle
import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb

CE = nn.CrossEntropyLoss()


class Filter(nn.Module):
    """A convolution by the Fourier transform, with a kernel and gains of its own."""

    def __init__(self, size=6):
        super().__init__()
        self.first = nn.Linear(size, size)
        self.kernel = nn.Parameter(torch.randn(size))
        self.gain = nn.Parameter(torch.rand(size // 2 + 1) + 0.5)
        self.last = nn.Linear(size, 3)

    def forward(self, x):
        z = torch.fft.rfft(self.first(x)) * torch.fft.rfft(self.kernel) * self.gain
        return self.last(torch.fft.irfft(z, n=x.shape[-1]).tanh())


class Phases(nn.Module):
    """exp(i theta) times the inputs, mixed by a real matrix that is cast."""

    def __init__(self, size=5):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(size))
        self.mix = nn.Parameter(torch.randn(4, size))
        self.shift = nn.Parameter(torch.randn(4))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        z = x * torch.polar(torch.ones_like(self.theta), self.theta)
        z = z @ self.mix.to(z.dtype).T + self.shift
        return self.last(z.abs())


class Recurrence(nn.Module):
    """A diagonal state-space model: a kernel exp(t (-exp(a) + i b)), applied by the Fourier transform over time."""

    def __init__(self, length=5, states=3):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(states)) for _ in range(3))
        self.last = nn.Linear(length, 3)

    def forward(self, x):
        t = torch.arange(x.shape[-1], dtype=x.dtype).unsqueeze(1)
        kernel = (torch.exp(t * torch.complex(-self.a.exp(), self.b)) * self.c).real.sum(1)
        n = 2 * len(t)
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., : len(t)]
        return self.last(y)


class Pairs(nn.Module):
    """S4D as it is commonly written: complex weights are pairs of real ones, read by a view behind an odd offset."""

    def __init__(self, channels=3, states=2):
        super().__init__()
        self.log_step = nn.Parameter(torch.rand(channels) - 2)
        self.c = nn.Parameter(torch.randn(channels, states, 2))
        self.log_decay = nn.Parameter(torch.randn(channels, states))
        self.last = nn.Linear(channels, 3)

    def forward(self, u):
        u = u.unflatten(1, (3, -1))  # [N, channels, T]
        A = -self.log_decay.exp() + 1j * torch.arange(2).double()
        steps = A * self.log_step.exp().unsqueeze(1)
        c = torch.view_as_complex(self.c) * (steps.exp() - 1) / A
        kernel = 2 * torch.einsum("hn,hnl->hl", c, (steps.unsqueeze(2) * torch.arange(u.shape[2])).exp()).real
        n = 2 * u.shape[2]
        y = torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(kernel, n=n), n=n)[..., : u.shape[2]]
        return self.last(y.tanh().mean(2))


CASES = {"filter": (Filter, 6), "phases": (Phases, 5), "state space": (Recurrence, 5), "pairs": (Pairs, 9)}


def make(name, N=4):
    kind, size = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double(), torch.randn(N, size).double(), torch.randint(3, (N,))


pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{said}") for said in ("falling back", "no Kronecker factors")]


@pytest.mark.parametrize("name", CASES)
def test_quantities(name):
    model, x, y = make(name)
    stats = pb.statistics(
        model, CE, (x, y), ["grad", "sample_grads", "square_norms", "gram", "variance", "diag_ggn", "sqrt_ggn", "kflr"]
    )
    parameters = dict(model.named_parameters())
    g = oracle.sample_grads(CE, model(x), y, parameters)
    for k, p in parameters.items():
        assert stats["sample_grads"][k].dtype == p.dtype
        close(stats["sample_grads"][k], g[k], k)
        close(stats["grad"][k], g[k].mean(0), k)
        close(stats["square_norms"][k], g[k].flatten(1).square().sum(1), k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
        root = stats["sqrt_ggn"][k]
        close(stats["diag_ggn"][k], root.square().sum((0, 1)) / len(x), k)
    G = pb.GGN(model, CE, (x, y))
    roots = torch.cat([r.flatten(2) for r in stats["sqrt_ggn"].values()], 2).flatten(0, 1)
    close(G.to_dense(), roots.T @ roots / len(x))


@pytest.mark.parametrize("name", CASES)
def test_second_order_products(name):
    """Wherever the vectors lie in memory: torch reads pairs as complex numbers from even places only."""
    model, x, y = make(name)
    parameters = list(model.parameters())
    g = torch.autograd.grad(CE(model(x), y), parameters, create_graph=True)
    D = sum(p.numel() for p in parameters)
    rows = []
    for unit in torch.eye(D).double():
        pieces = unit.split([p.numel() for p in parameters])
        slope = sum((a * v.clone().view_as(a)).sum() for a, v in zip(g, pieces, strict=True))
        rows.append(torch.cat([t.flatten() for t in torch.autograd.grad(slope, parameters, retain_graph=True)]))
    H = torch.stack(rows)
    close(pb.Hessian(model, CE, (x, y)).to_dense(), H)
    found = pb.statistics(model, CE, (x, y), ["diag_hessian"])["diag_hessian"]
    close(torch.cat([d.flatten() for d in found.values()]), H.diagonal())
    G, v = pb.GGN(model, CE, (x, y)), torch.randn(D).double()
    close(G @ v, G.to_dense() @ v)
    assert pb.EmpiricalFisher(model, CE, (x, y)).to_dense().isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = [pb.laplace(model, CE, (x, y), s, rank=D).functional(x)[1] for s in ("lowrank",)]
        covariances.append(pb.laplace(model, CE, (x, y), "full").functional(x)[1])
    close(*covariances)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("verify", ["auto", "always"])
def test_samples_that_mix_are_refused(name, verify):
    model, x, y = make(name)

    class Leaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            f = self.inner(x)
            return torch.fft.ifft(torch.fft.fft(f, dim=0) * torch.fft.fft(torch.ones_like(f), dim=0), dim=0).real

    with pytest.raises(ValueError, match="does not separate into the 4 samples"):
        pb.statistics(Leaky(), CE, (x, y), ["variance"], verify=verify)


@pytest.mark.parametrize("make_optimiser", [pb.optim.KFAC, pb.optim.EKFAC, pb.optim.Preconditioned, pb.optim.KBFGS])
@pytest.mark.parametrize("name", CASES)
def test_optimisers_and_posteriors(name, make_optimiser):
    model, x, y = make(name, 12)
    opt, losses = make_optimiser(model, CE, lr=0.05, damping=0.1), []

    def closure():
        opt.zero_grad()
        loss = CE(model(x), y)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(8):
            losses.append(float(opt.step(closure)))
        predicted = pb.laplace(model, CE, (x, y), "kron").predict(x)
    assert losses[-1] < losses[0]
    assert torch.isfinite(predicted).all()


class RealWeights(nn.Module):
    """Real weights in complex calls, one operation each."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.last, self.operation = nn.Linear(5, 6), nn.Linear(4, 3), operation
        self.w, self.W, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((6,), (4, 6), (4,)))
        self.K = nn.Parameter(torch.randn(4, 1, 3))

    def forward(self, x):
        z = torch.fft.fft(self.first(x))
        W, b, K = (t.to(z.dtype) for t in (self.W, self.b, self.K))
        found = {
            "product": lambda: (z * self.w) @ W.T,
            "quotient": lambda: (z / (2 + self.w.cos())) @ W.T,
            "sum": lambda: (z + self.w - 2 * self.w) @ W.T,
            "linear": lambda: nn.functional.linear(z, W, b),
            "convolution": lambda: nn.functional.conv1d(z.unsqueeze(1), K, b).abs().mean(2),
        }
        return self.last(found[self.operation]().abs())


@pytest.mark.parametrize("operation", ["product", "quotient", "sum", "linear", "convolution"])
def test_real_weights_take_their_rules(operation):
    torch.manual_seed(0)
    model, x, y = RealWeights(operation).double(), torch.randn(7, 5).double(), torch.randint(3, (7,))
    parameters = dict(model.named_parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*falling back")
        warnings.filterwarnings("ignore", ".*no Kronecker factors")
        stats = pb.statistics(model, CE, (x, y), ["sample_grads", "square_norms", "variance", "diag_ggn", "kflr"])
    g, d = (f(CE, model(x), y, parameters) for f in (oracle.sample_grads, oracle.sample_diag_ggn))
    for k in parameters:
        close(stats["sample_grads"][k], g[k], k)
        close(stats["square_norms"][k], g[k].flatten(1).square().sum(1), k)
        close(stats["variance"][k], g[k].var(0, unbiased=False), k)
        close(stats["diag_ggn"][k], d[k].mean(0), k)
    if operation == "linear":  # real and imaginary parts are positions of the weight that was cast
        assert stats["kflr"]["W"].left.shape == (4, 4)
