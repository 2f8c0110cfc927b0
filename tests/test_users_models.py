"""What users' models hold that torch allows: hooks, renormalised and padded embeddings, frozen encoders, own functions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import paraboloid as pb

F64 = torch.float64
CE = nn.CrossEntropyLoss()


class Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.words, self.head = nn.Embedding(5, 3, **options), nn.Linear(3, 2)

    def forward(self, ids):
        return self.head(torch.tanh(self.words(ids)).mean(1))


def words(**options):
    torch.manual_seed(1)
    return Words(**options).double(), torch.tensor([[1, 2, 0, 0], [3, 0, 0, 0], [4, 4, 1, 0]]), torch.tensor([0, 1, 1])


@pytest.mark.parametrize("padding", [0, -5])
def test_padding_is_no_position_of_either_kronecker_factor(padding):
    model, ids, y = words(padding_idx=padding)
    kron = pb.statistics(model, CE, (ids, y), "kflr")["kflr"]["words.weight"]
    counts = torch.tensor([0, 2, 1, 1, 2], dtype=F64)  # of six words, the padding apart
    torch.testing.assert_close(kron.left, counts / 6)
    e = model.words(ids).detach().requires_grad_()
    p = model.head(torch.tanh(e).mean(1)).softmax(1)
    total = torch.zeros(3, 3, dtype=F64)
    for n in range(3):
        for c in range(2):  # s_c = sqrt(p_c) (e_c - p), so that sum_c s_c s_c^T = diag(p) - p p^T
            s = p[n, c].detach().sqrt() * (torch.eye(2, dtype=F64)[c] - p[n].detach())
            (g,) = torch.autograd.grad((model.head(torch.tanh(e).mean(1))[n] * s).sum(), e, retain_graph=True)
            rows = g[n][ids[n] != 0]
            total += rows.T @ rows
    torch.testing.assert_close(kron.right, total / 3)


def test_an_embedding_with_max_norm_is_not_changed():
    """Its rows count as shortened, as in the model's own passes, which write that to the weight."""
    model, ids, y = words(max_norm=0.5)
    before = model.words.weight.detach().clone()

    def all_of_it(model):
        stats = pb.statistics(model, CE, (ids, y), ["grad", "sample_grads", "diag_ggn", "diag_hessian"])
        dense = [Operator(model, CE, (ids, y)).to_dense() for Operator in (pb.GGN, pb.Hessian, pb.EmpiricalFisher)]
        return [*(t for values in stats.values() for t in values.values()), *dense]

    found = all_of_it(model)
    assert torch.equal(model.words.weight, before)
    own = copy.deepcopy(model)
    own(ids)  # shortens the words that it meets
    assert not torch.equal(own.words.weight, before)
    plain, _, _ = words()
    plain.load_state_dict(own.state_dict())
    for a, b, c in zip(found, all_of_it(own), all_of_it(plain), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(b, c, rtol=1e-5, atol=1e-7)
    for make in (lambda m: pb.KFLR(m, CE, (ids, y)).to_dense(), lambda m: pb.laplace(m, CE, (ids, y)).predict(ids)):
        torch.testing.assert_close(make(own), make(plain), rtol=1e-5, atol=1e-7)


def linear():
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), torch.randn(5, 4, dtype=F64), torch.arange(5) % 3


def test_hooks_of_parameters_change_gradients_and_not_curvature():
    model, x, y = linear()

    def all_of_it():
        stats = pb.statistics(model, CE, (x, y), ["grad", "sample_grads", "kflr", "diag_hessian"])
        tensors = [*stats["grad"].values(), *stats["sample_grads"].values(), *stats["diag_hessian"].values()]
        operators = [Operator(model, CE, (x, y)).to_dense() for Operator in (pb.GGN, pb.Hessian, pb.KFLR)]
        q = pb.quadratic(model, CE, (x, y))
        return [*tensors, *operators, q.gradient["weight"], pb.laplace(model, CE, (x, y)).functional(x)[1]]

    expected = all_of_it()
    hook = model.weight.register_hook(lambda g: 2 * g)
    for found, value in zip(all_of_it(), expected, strict=True):
        torch.testing.assert_close(found, value)
    seen = []
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    CE(model(x), y).backward()
    backward = model.weight.grad.clone()
    model.zero_grad()
    pb.statistics(model, CE, (x, y), "variance", accumulate_grad=True)
    torch.testing.assert_close(model.weight.grad, backward)  # as backward() leaves it: hooks included
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], backward)
    hook.remove()
    model.zero_grad()
    CE(model(x), y).backward()
    torch.testing.assert_close(model.weight.grad, backward / 2)


def test_a_factor_that_overflowed_is_not_left_out_without_a_word():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(6, 4) * 1e20
    model[0].weight.data.mul_(1e-20)
    batch = x, torch.arange(6) % 2
    for structure in ("kron", "ekfac", "diag", "full", "functional"):
        with pytest.raises((ValueError, RuntimeError), match=r"beyond torch.float32|no eigendecomposition"):
            pb.laplace(model, CE, batch, structure).log_evidence()
    for use in (lambda K: K.inverse(1e-3), lambda K: K.logdet(1e-3), lambda K: K.inverse(1e-3, split="pi")):
        with pytest.raises((ValueError, RuntimeError), match=r"no eigendecomposition|is singular"):
            use(pb.KFAC(model, CE, batch))
    large = torch.eye(2) * 1e30
    for use in (lambda k: k.inverse(1.0), lambda k: k.logdet(1.0), lambda k: k.sqrt()):
        with pytest.raises(
            RuntimeError, match=r"w: its factors have eigenvalues up to 1e\+30 and 1e\+30, whose product"
        ):
            use(Named(pb.Kron(large, large)))


class Named:
    """A block with its name, for messages."""

    def __init__(self, kron):
        self.inverse = lambda d: kron.inverse(d, name="w")
        self.logdet, self.sqrt = lambda d: kron.logdet(d, name="w"), lambda: kron.sqrt(name="w")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_frozen_encoder_takes_torchs_fused_path_with_a_padding_mask():
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            self.head = nn.Linear(8, 3)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))

    model, x, y = Classifier().eval(), torch.randn(4, 5, 8), torch.arange(4) % 3
    model.encoder.requires_grad_(False)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 2:] = mask[:, 4] = True
    batch = (x, mask), y
    with torch.no_grad():
        own = CE(model(x, mask), y)
    torch.testing.assert_close(pb.statistics(model, CE, batch, "variance").loss, own)
    torch.testing.assert_close(pb.quadratic(model, CE, batch).value, own)
    torch.testing.assert_close(-pb.laplace(model, CE, batch).log_likelihood() / 4, own)
    assert "forward" not in model.encoder.__dict__
    model.encoder.requires_grad_(True)  # the plain path, for us and for the user
    torch.testing.assert_close(pb.statistics(model, CE, batch, "variance").loss, CE(model(x, mask), y).detach())


def test_nested_tensors_are_refused_with_what_to_do():
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    for use in (pb.laplace, pb.GGN, pb.KFAC, lambda *given: pb.statistics(*given, "variance")):
        with pytest.raises(ValueError, match=r"nested \(jagged\) tensor, .* torch.nested.to_padded_tensor"):
            use(nn.Linear(4, 3), CE, (x, torch.tensor([0, 1])))


def test_weights_normed_as_a_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3), dim=None)).double()
    x, y = torch.randn(5, 4, dtype=F64), torch.arange(5) % 3
    g, v = (getattr(model[0].parametrizations.weight, k) for k in ("original0", "original1"))

    def loss(g, v, b):
        return CE(F.linear(x, g * v / v.norm(), b), y)

    parts = torch.autograd.functional.hessian(loss, (g, v, model[0].bias))
    H = pb.Hessian(model, CE, (x, y)).to_dense()
    torch.testing.assert_close(H[4:, 4:], parts[1][1].reshape(12, 12))
    torch.testing.assert_close(H[3, 3], parts[0][0].flatten()[0])
    with pytest.warns(UserWarning, match="diag_hessian"):
        diagonal = pb.statistics(model, CE, (x, y), "diag_hessian")["diag_hessian"]
    torch.testing.assert_close(torch.cat([t.flatten() for t in diagonal.values()]), H.diagonal())


class Relu(torch.autograd.Function):
    """A smooth function under the name of a piecewise linear one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


Clamp, Tanh, Sum = (type(name, (Relu,), {}) for name in ("Clamp", "Tanh", "Sum"))


@pytest.mark.parametrize("function", [Relu, Clamp, Tanh, Sum])
def test_a_users_function_is_not_taken_for_torchs_of_its_name(function):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(function.apply(self.first(x)))

    model, x, y = Net().double(), torch.randn(5, 4, dtype=F64), torch.arange(5) % 3
    H = pb.Hessian(model, CE, (x, y)).to_dense()
    found = pb.statistics(model, CE, (x, y), "diag_hessian")["diag_hessian"]
    torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), H.diagonal())
    assert (H.diagonal() - pb.GGN(model, CE, (x, y)).diagonal()).abs().max() > 1e-4
    with pytest.raises(NotImplementedError, match="which bend otherwise"):
        pb.PCH(model, CE, (x, y))
    with pytest.raises(NotImplementedError, match="kfra"):
        pb.statistics(model, CE, (x, y), "kfra")
