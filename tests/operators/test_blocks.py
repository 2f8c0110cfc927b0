"""Block-diagonal curvature against dense blocks: what a mask keeps, and the positive-curvature Hessian."""

import pytest
import torch
import torch.nn.functional as F
from operators.oracle import LOSSES, dense_ggn, dense_hessian, make_inputs, make_model
from torch import nn

import paraboloid as pb
from paraboloid.operators import Identity
from paraboloid.operators.matrix_free import pch
from paraboloid.operators.partition import resolve_blocks

DENSE = {pb.GGN: dense_ggn, pb.Hessian: dense_hessian}
MODELS = ["mlp", "residual", "attention", "tied", "partly", "weight norm"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def masked(dense, model, blocks):
    """The dense matrix with zeros between different blocks; `blocks` maps a parameter's name to its block."""
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    label = torch.cat([torch.full((p.numel(),), hash(blocks(k)) % 2**31) for k, p in params.items()])
    return dense * (label[:, None] == label)


LABELS = {"all": lambda k: "", "parameter": lambda k: k, "layer": lambda k: k.split(".parametrizations.")[0].rpartition(".")[0] if "parametriz" not in k else k.split(".parametrizations.")[0]}  # fmt: skip


@pytest.mark.parametrize("blocks", ["parameter", "layer", "all"])
@pytest.mark.parametrize("Operator", DENSE)
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_masked_matrix(name, Operator, blocks):
    model = make_model(name)
    loss_fn, targets = LOSSES["cross-entropy weights"]
    batches = [(make_inputs(name, n, n), targets(n, n)) for n in (4, 2)]
    expected = masked(DENSE[Operator](model, loss_fn, batches), model, LABELS[blocks])
    for memory in (None, 0):
        A = Operator(model, loss_fn, batches, blocks=blocks, max_memory=memory)
        V = torch.randn(len(expected), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        close(A @ V, expected @ V)
        close(A.quadratic_forms(V.T), (V * (expected @ V)).sum(0))
    close(A.to_dense(), expected)
    close(A.diagonal(), expected.diagonal())
    v = {k: torch.randn_like(p) for k, p in A.parameters.items()}
    flat = torch.cat([t.flatten() for t in v.values()])
    close(torch.cat([t.flatten() for t in (A @ v).values()]), expected @ flat)


def test_lists_of_names():
    model = make_model("mlp")
    loss_fn, targets = LOSSES["squared error"]
    batch = make_inputs("mlp", 4, 4), targets(4, 4)
    blocks = [["0.weight", "2.bias"], ["2.weight"], ["0.bias"]]
    expected = masked(
        dense_ggn(model, loss_fn, [batch]),
        model,
        lambda k: str([k in b for b in blocks].index(True)),
    )
    G = pb.GGN(model, loss_fn, batch, blocks=blocks)
    close(G.to_dense(), expected)
    V = torch.randn(len(expected), 3, dtype=torch.float64)
    for _ in range(40):  # until the root takes over, where it does
        close(G @ V, expected @ V)


def test_the_root_of_a_convolutional_network_keeps_to_the_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 3, padding=1), nn.Flatten(), nn.Linear(128, 3)
    ).double()
    batch = torch.randn(3, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    G = pb.GGN(model, nn.CrossEntropyLoss(), batch, blocks="parameter")
    V = torch.randn(G.shape[0], 4, dtype=torch.float64)
    first = G @ V
    for _ in range(6):
        later = G @ V
    assert G.root.rows is not None
    close(later, first)


@pytest.mark.parametrize("Operator", [pb.GGN, pb.Hessian])
def test_structure_of_blocks(Operator):
    model = make_model("mlp")
    loss_fn, targets = LOSSES["squared error"]
    batch = make_inputs("mlp", 7, 4), targets(7, 4)
    A = Operator(model, loss_fn, batch, blocks="layer")
    dense, size = A.to_dense(), A.shape[0]
    damping = 1.0 - min(0.0, float(torch.linalg.eigvalsh(dense).min()))
    damped = dense + damping * torch.eye(size).double()
    v = torch.randn(size, dtype=torch.float64)
    close(A.inverse(damping) @ v, torch.linalg.solve(damped, v))
    close(A.inverse(damping).to_dense(), torch.linalg.inv(damped))
    close(A.inverse(damping).diagonal(), torch.linalg.inv(damped).diagonal())
    close(A.logdet(damping), torch.logdet(damped))
    close(A.solve(v, damping), torch.linalg.solve(damped, v))
    values, _ = A.eigsh(3)
    close(values, torch.linalg.eigvalsh(dense).flip(0)[:3])
    if Operator is pb.GGN:
        close(A.sqrt_matmul(A.sqrt_matmul(v)), dense @ v)
        named = {k: torch.ones_like(p) for k, p in A.parameters.items()}
        assert A.sqrt_matmul(named).keys() == named.keys()
    else:
        with pytest.raises(
            ValueError, match=r"the smallest eigenvalue is -.*; expected a positive semi-definite matrix"
        ):
            A.sqrt_matmul(v)
    with pytest.raises(
        ValueError,
        match=r"the smallest eigenvalue plus damping is .*; expected a positive definite matrix. Increase damping",
    ):
        A.inverse(0.0)


def test_dense_blocks_are_made_once_and_have_everything():
    model = make_model("mlp")
    loss_fn, targets = LOSSES["cross-entropy"]
    A = pb.GGN(model, loss_fn, (make_inputs("mlp", 7, 4), targets(7, 4)), blocks="layer")
    dense = A.to_dense()
    B = A.dense_blocks()
    assert B is A.dense_blocks()
    close(B.to_dense(), dense)
    eye = torch.eye(len(dense)).double()
    shifted = A + 0.5 * Identity(A.parameters)
    close(shifted.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.6 * eye))
    assert shifted.traces() == pytest.approx(
        {k: t + 0.5 * n for (k, t), n in zip(A.traces().items(), (36, 21), strict=True)}
    )
    assert A.top_eigenvalues(1)[0][0] == pytest.approx(A.eigsh(1)[0].item())
    with torch.no_grad():
        model[0].weight.add_(1.0)
    for call in (A.inverse, A.logdet, shifted.inverse):
        with pytest.raises(RuntimeError, match=r"parameter '0.weight' has changed since"):
            call(1.0)
    with pytest.raises(ValueError, match="GGN was made with blocks='all'; expected 'parameter'"):
        pb.GGN(model, loss_fn, (make_inputs("mlp", 7, 4), targets(7, 4))).dense_blocks()


def test_too_large_a_block_is_not_made_dense(monkeypatch):
    monkeypatch.setattr("paraboloid.operators.matrix_free.recorded.MOST_ELEMENTS", 20)
    loss_fn, targets = LOSSES["squared error"]
    G = pb.GGN(make_model("mlp"), loss_fn, (make_inputs("mlp", 4, 4), targets(4, 4)), blocks="parameter")
    with pytest.raises(
        ValueError, match="a block of GGN has 30 elements, too many for a dense matrix; expected at most 20"
    ):
        G.inverse(1.0)


def test_wrong_blocks():
    model = make_model("mlp")
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    parameters = dict(model.named_parameters())
    assert resolve_blocks(parameters, "layer") == [[0, 1], [2, 3]]
    assert resolve_blocks(parameters, [names[:3], names[3:]]) == [[0, 1, 2], [3]]
    with pytest.raises(ValueError, match="blocks is 'module'; expected 'all', 'parameter', 'layer'"):
        resolve_blocks(parameters, "module")
    with pytest.raises(ValueError, match=r"unknown \['3.bias'\], missing \['2.bias'\], repeated \['0.weight'\]"):
        resolve_blocks(parameters, [["0.weight", "0.bias", "2.weight"], ["0.weight", "3.bias"]])


# --- the positive-curvature Hessian ----------------------------------------------------------------------------------


def chain(*layers):
    torch.manual_seed(1)
    return nn.Sequential(*layers).double()


PCH_MODELS = {
    "sigmoid": (lambda: chain(nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)), (5,)),
    "convolutions": (lambda: chain(nn.Conv2d(1, 2, 2), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 1), nn.SiLU(), nn.Flatten()), (1, 3, 3)),
    "residual": (lambda: Residual().double(), (5,)),
    "piecewise linear": (lambda: chain(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (5,)),
}  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x = x + torch.tanh(self.one(x))
        return self.head(x + F.softplus(self.two(x)))


def dense_pch(model, loss_fn, x, y, positive):
    """GGN plus, for every activation, J^T P(d) J with its input's Jacobian; written out with hooks and loops."""
    seen = []
    patched = {}
    for name in ("tanh", "sigmoid"):
        patched[(torch, name)] = getattr(torch, name)
    for name in ("gelu", "silu", "softplus", "tanh", "sigmoid"):
        patched[(F, name)] = getattr(F, name)

    def watch(op):
        def inner(z, *args, **kwargs):
            out = op(z, *args, **kwargs)
            seen.append((op, z, args, kwargs, out))
            return out

        return inner

    for (module, name), op in patched.items():
        setattr(module, name, watch(op))
    try:
        f = model(x)
    finally:
        for (module, name), op in patched.items():
            setattr(module, name, op)
    params = [p for p in model.parameters() if p.requires_grad]
    value = loss_fn(f, y)
    total = dense_ggn(model, loss_fn, [(x, y)])
    for op, z, args, kwargs, out in seen:
        (g,) = torch.autograd.grad(value, out, retain_graph=True)
        leaf = z.detach().requires_grad_()
        (first,) = torch.autograd.grad(op(leaf, *args, **kwargs), leaf, g, create_graph=True)
        (d,) = torch.autograd.grad(first.sum(), leaf)
        rows = []
        for e in z.flatten():
            row = torch.autograd.grad(e, params, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if r is None else r.flatten()
                        for p, r in zip(params, row, strict=True)
                    ]
                )
            )
        J = torch.stack(rows)
        total = total + J.T @ (positive(d.flatten())[:, None] * J)
    return total


@pytest.fixture(params=PCH_MODELS)
def problem(request):
    build, shape = PCH_MODELS[request.param]
    model = build()
    x = torch.randn(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return model, x, torch.tensor([0, 2, 1, 1]), request.param


@pytest.mark.parametrize("blocks", ["parameter", "layer"])
@pytest.mark.parametrize("modify, positive", [("abs", torch.abs), ("clip", lambda d: d.clamp(min=0))])
def test_pch_is_its_definition(problem, modify, positive, blocks):
    model, x, y, name = problem
    loss_fn = nn.CrossEntropyLoss()
    expected = masked(dense_pch(model, loss_fn, x, y, positive), model, LABELS[blocks])
    P = pb.PCH(model, loss_fn, (x, y), blocks=blocks, modify=modify)
    close(P.to_dense(), expected)
    assert torch.linalg.eigvalsh(expected).min() > -1e-12
    V = torch.randn(len(expected), 2, dtype=torch.float64)
    close(P @ V, expected @ V)
    split = pb.PCH(model, loss_fn, [(x[:3], y[:3]), (x[3:], y[3:])], blocks=blocks, modify=modify, max_memory=0)
    close(split @ V, expected @ V)
    if name == "piecewise linear":
        close(expected, pb.GGN(model, loss_fn, (x, y), blocks=blocks).to_dense())


@pytest.mark.parametrize("blocks", ["parameter", "layer"])
def test_with_nothing_modified_the_blocks_are_the_hessians(problem, blocks, monkeypatch):
    model, x, y, _ = problem
    monkeypatch.setitem(pch.MODIFIED, "abs", lambda d: d)
    expected = pb.Hessian(model, nn.CrossEntropyLoss(), (x, y), blocks=blocks).to_dense()
    close(pb.PCH(model, nn.CrossEntropyLoss(), (x, y), blocks=blocks).to_dense(), expected)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_pch_and_kfra_through_frozen_layers_hooks_and_functional_calls():
    loss_fn, x, y = nn.CrossEntropyLoss(), torch.randn(4, 5).double(), torch.tensor([0, 2, 1, 0])
    model = chain(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3))
    model[2].requires_grad_(False)

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), (x,))

    want = pb.PCH(model, loss_fn, (x, y)).to_dense()
    factors = pb.statistics(model, loss_fn, (x, y), ["kfra"])["kfra"]
    hooks = [layer.register_full_backward_hook(lambda module, inputs, outputs: None) for layer in model]
    for it in (model, Outside()):
        close(pb.PCH(it, loss_fn, (x, y)).to_dense(), want)
        found = pb.statistics(it, loss_fn, (x, y), ["kfra"])["kfra"]
        for a, b in zip(found.values(), factors.values(), strict=True):
            close(a.to_dense(), b.to_dense())
    for hook in hooks:
        hook.remove()


def test_pch_refuses_what_it_is_not_defined_for():
    loss_fn, targets = LOSSES["cross-entropy"]
    batch = make_inputs("attention", 4, 4), targets(4, 4)
    with pytest.raises(NotImplementedError, match=r"is defined for elementwise activations; found \[.*Softmax"):
        pb.PCH(make_model("attention"), loss_fn, batch)
    with pytest.raises(ValueError, match="blocks is 'all'; expected 'parameter' or 'layer'"):
        pb.PCH(make_model("mlp"), loss_fn, batch, blocks="all")
    with pytest.raises(ValueError, match=r"modify is 'square'; expected one of \['abs', 'clip'\]"):
        pb.PCH(make_model("mlp"), loss_fn, batch, modify="square")


def test_pch_says_what_has_no_second_derivative():
    model = nn.Sequential(nn.Linear(4, 3), nn.Hardsigmoid()).double()
    x, y = torch.linspace(-1, 1, 20).view(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(RuntimeError, match="an operation of the model has no second derivative in torch"):
        pb.PCH(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
