"""Operations whose backward pass cannot be differentiated: right where first derivatives are enough, else refused."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paraboloid as pb

F64 = torch.float64
CE = nn.CrossEntropyLoss()
FIRST_ORDER = [pb.GGN, pb.Fisher, pb.EmpiricalFisher]


class NumpyTanh(torch.autograd.Function):
    """A kernel of another library: its backward pass is cut off."""

    @staticmethod
    def forward(ctx, x):
        y = torch.from_numpy(np.tanh(x.detach().numpy()))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.from_numpy(g.detach().numpy() * (1 - y.detach().numpy() ** 2))


class Undetached(NumpyTanh):
    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return torch.from_numpy(g.numpy() * (1 - y.detach().numpy() ** 2))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y**2)


class ConstantSlope(Once):
    """Differentiable in the gradient, not in its input: right for a GGN, wrong for a Hessian that stays symmetric."""

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y.detach() ** 2)


class Op(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x)


class Distances(nn.Module):
    def __init__(self):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 5))

    def forward(self, x):
        return torch.cdist(x, self.centres)


class Segments(nn.Module):
    def forward(self, x):
        return torch.segment_reduce(
            x.repeat_interleave(2, 0), "mean", lengths=torch.full((len(x),), 2, device=x.device), axis=0
        )


def data(N=6):
    torch.manual_seed(3)
    return torch.randn(N, 4, dtype=F64), torch.arange(N) % 3


def behind(op):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), Op(op)).double()


def between(op):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), Op(op), nn.Linear(5, 3)).double()


CUT = {"numpy": NumpyTanh.apply, "numpy undetached": Undetached.apply, "once": Once.apply}


@pytest.mark.parametrize("make", [behind, between])
@pytest.mark.parametrize("op", CUT)
@pytest.mark.parametrize("Operator", FIRST_ORDER)
def test_matrices_of_first_derivatives_are_right_behind_a_kernel_that_cannot_be_differentiated(Operator, op, make):
    batch, model = data(), make(CUT[op])
    dense = Operator(make(torch.tanh), CE, batch).to_dense()
    blocks = Operator(make(torch.tanh), CE, batch, blocks="parameter").to_dense()
    v = torch.randn(len(dense), generator=torch.Generator().manual_seed(0), dtype=F64)
    unit = torch.eye(len(dense), dtype=F64)[:1]
    eye = torch.eye(len(dense), dtype=F64)
    for found, expected in [
        (Operator(model, CE, batch) @ v, dense @ v),
        (Operator(model, CE, [batch, batch]) @ v, dense @ v if Operator is not pb.Fisher else None),
        (Operator(model, CE, batch) @ unit[0], dense[0]),
        (Operator(model, CE, batch).to_dense(), dense),
        (Operator(model, CE, batch).quadratic_forms(v[None]), (v @ dense @ v)[None]),
        (Operator(model, CE, batch).solve(v, damping=1.0), torch.linalg.solve(dense + eye, v)),
        (Operator(model, CE, batch).eigsh(2)[0], torch.linalg.eigvalsh(dense).flip(0)[:2]),
        (Operator(model, CE, batch, blocks="parameter") @ v, blocks @ v),
        (Operator(model, CE, batch).sample_quadratic_forms(v[None]).mean(1), (v @ dense @ v)[None]),
    ]:
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    with pytest.warns(UserWarning, match="one backward pass for each of 18 outputs"):  # graphs that are not kept
        found = Operator(model, CE, batch, max_memory=0) @ v
    torch.testing.assert_close(found, dense @ v, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("make", [behind, between])
@pytest.mark.parametrize("op", [*CUT, "constant slope"])
def test_a_hessian_behind_such_a_kernel_is_refused(op, make):
    model, batch = make(CUT.get(op, ConstantSlope.apply)), data()
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=F64)
    uses = [
        lambda H: H @ v, lambda H: H.to_dense(), lambda H: H.quadratic_forms(v[None]), lambda H: H.eigsh(1),
        lambda H: H.solve(v, damping=10.0), lambda H: H.diagonal(samples=4),
    ]  # fmt: skip
    message = "autograd's second derivative of Sequential is wrong|has no second derivative in torch"
    for blocks in ("all", "parameter"):
        for use in uses:
            with pytest.raises(RuntimeError, match=message):
                use(pb.Hessian(model, CE, batch, blocks=blocks))
    if op != "constant slope":
        with pytest.raises(RuntimeError, match=r"diag_hessian: the backward pass of .* cannot be differentiated"):
            pb.statistics(model, CE, batch, "diag_hessian")


def test_a_custom_function_with_a_right_second_derivative_is_accepted():
    class Good(ConstantSlope):
        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (1 - x.tanh() ** 2)

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.tanh()

    for make in (behind, between):
        found, expected = (pb.Hessian(make(op), CE, data()).to_dense() for op in (Good.apply, torch.tanh))
        torch.testing.assert_close(found, expected)
        found = pb.statistics(make(Good.apply), CE, data(), "diag_hessian")["diag_hessian"]
        torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), expected.diagonal())


def first_derivatives_only(name):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), *{
        "hardsigmoid": [nn.Hardsigmoid(), nn.Linear(5, 3)], "cdist": [Distances()],
        "segment_reduce": [Segments(), nn.Linear(5, 3)],
    }[name]).double()  # fmt: skip


@pytest.mark.filterwarnings("ignore:cdist on 1.centres has no rule")
@pytest.mark.parametrize("name", ["hardsigmoid", "cdist", "segment_reduce"])
def test_operations_with_first_derivatives_alone(name):
    model, (x, y) = first_derivatives_only(name), data()
    f = model(x)
    params = list(model.parameters())
    J = torch.stack([
        torch.cat([g.flatten() for g in torch.autograd.grad(e, params, retain_graph=True, materialize_grads=True)])
        for e in f.flatten()
    ]).view(6, 3, -1)  # fmt: skip
    p = f.softmax(1).detach()
    H = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    dense = torch.einsum("nkd,nkl,nle->de", J, H, J) / 6
    g = torch.einsum("nkd,nk->nd", J, p - nn.functional.one_hot(y, 3))
    v = torch.randn(len(dense), generator=torch.Generator().manual_seed(0), dtype=F64)
    torch.testing.assert_close(pb.GGN(model, CE, (x, y)) @ v, dense @ v)
    torch.testing.assert_close(pb.GGN(model, CE, (x, y)).to_dense(), dense)
    torch.testing.assert_close(pb.GGN(model, lambda f, y: CE(f, y), (x, y)) @ v, dense @ v)
    torch.testing.assert_close(pb.EmpiricalFisher(model, CE, (x, y)).to_dense(), g.T @ g / 6)
    torch.testing.assert_close(pb.quadratic(model, CE, (x, y)).along(v[None])[1], (v @ dense @ v / (v @ v))[None])
    assert pb.Fisher(model, CE, (x, y), samples=3).to_dense().isfinite().all()
    with pytest.raises(RuntimeError, match=r"no second derivative in torch \(.*\), which the Hessian needs; .* pb.GGN"):
        pb.Hessian(model, CE, (x, y)) @ v
    before = CE(model(x), y).item()
    trained = copy.deepcopy(model)
    pb.optim.HessianFree(trained, CE).step((x, y))
    assert CE(trained(x), y) < before
    bias = pb.bias(model, CE, TensorDataset(x, y), batch_size=2, k=2, repeats=2)
    assert torch.as_tensor(bias.curvature["other"]).isfinite().all()


def test_what_would_not_fit_says_so():
    model = first_derivatives_only("hardsigmoid")
    with pytest.raises(RuntimeError, match=r"take its rows, 18 of them in .* expected at most .* max_memory"):
        from paraboloid.operators.matrix_free.jacobian_rows import check_rows

        check_rows(18, list(model.parameters()), 100)


@pytest.mark.parametrize("bias", [5.0, 28.0, 31.0, 34.0, 37.0])
@pytest.mark.parametrize("loss_fn", [nn.BCELoss(), nn.MSELoss(), lambda f, y: (f.exp() * (f - y)).square().mean()])
def test_a_saturated_sigmoid_differs_by_rounding_alone(bias, loss_fn):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()
    model[0].bias.data.fill_(bias)
    y = torch.rand(6, 3, dtype=F64).round()
    for Operator in (pb.Hessian, pb.GGN):
        assert (Operator(model, loss_fn, (data()[0], y)) @ torch.randn(15, dtype=F64)).isfinite().all()


class Elsewhere(nn.Module):
    """Uses another module's parameters, as a model whose whole weights lie elsewhere does."""

    def __init__(self):
        super().__init__()
        self.own, self.others = nn.Linear(4, 3).double(), [nn.Linear(4, 3).double()]

    def forward(self, x):
        return self.others[0](x)


@pytest.mark.parametrize(
    "make",
    [pb.GGN, pb.Hessian, pb.Fisher, pb.EmpiricalFisher, pb.KFAC, pb.EKFAC, pb.DiagonalGGN, pb.PCH, pb.laplace,
     pb.quadratic, lambda *given: pb.statistics(*given, "grad"), lambda m, *given: pb.optim.HessianFree(m, CE).step(given[1])],
)  # fmt: skip
def test_an_output_that_does_not_depend_on_the_models_own_parameters_is_refused(make):
    with pytest.raises(ValueError, match=r"does not depend on any of its own 2|depends on none of the model's 2"):
        make(Elsewhere(), CE, data())


def test_certificates_leave_the_model_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(between(ConstantSlope.apply), nn.Dropout(0.1))
    state, versions = copy.deepcopy(model.state_dict()), [p._version for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(RuntimeError), warnings.catch_warnings():
        pb.Hessian(model, CE, [data(), data()], max_memory=0) @ torch.randn(43, dtype=F64)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [p._version for p in model.parameters()] == versions
    assert [p.data_ptr() for p in model.parameters()] == places


class Residual(nn.Module):
    """Cut off in one of two branches: neither zero nor right."""

    def __init__(self, op):
        super().__init__()
        self.first, self.second, self.op = nn.Linear(4, 5), nn.Linear(5, 3), op

    def forward(self, x):
        h = self.first(x)
        return self.second(h + self.op(h))


@pytest.mark.parametrize("op", CUT)
def test_a_branch_that_is_cut_off_is_refused_by_what_pushes_vectors_forward(op):
    torch.manual_seed(0)
    model, batch = Residual(CUT[op]).double(), data()
    uses = [
        lambda: pb.GGN(model, CE, batch) @ torch.ones(43, dtype=F64), lambda: pb.GGN(model, CE, batch).to_dense(),
        lambda: pb.operators.Jacobian(model, batch) @ torch.ones(43, dtype=F64),
        lambda: pb.laplace(model, CE, batch).tune_prior("adapted", match=None),
    ]  # fmt: skip
    for use in uses[: 1 if op == "numpy undetached" else None]:
        if op == "numpy undetached":  # which says so itself: rows of the Jacobian
            use()
            continue
        with pytest.raises(RuntimeError, match="autograd's second derivative of Residual is wrong"):
            use()
    plain = copy.deepcopy(model)
    plain.op = torch.tanh
    found, expected = (pb.laplace(m, CE, batch, "full").functional(batch[0])[1] for m in (model, plain))
    torch.testing.assert_close(found, expected)  # first derivatives alone
