"""Submatrices of operators, and Jacobians, against the dense matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.operators import Jacobian, Submatrix

F64 = torch.float64
CE = nn.CrossEntropyLoss()


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 4, dtype=F64), torch.arange(7) % 3


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [pb.GGN, pb.Hessian, pb.KFAC])
def test_submatrices(make):
    model, x, y = problem()
    A = make(model, CE, (x, y))
    dense = A.to_dense()
    rows, columns = torch.tensor([3, 0, 40]), torch.tensor([7, 3])
    S = Submatrix(A, rows, columns)
    close(S.to_dense(), dense[rows][:, columns])
    close(S.T.to_dense(), dense[columns][:, rows])
    v = torch.randn(2, 3, dtype=F64)
    close(S @ v, dense[rows][:, columns] @ v)
    close(S @ v[:, 0], dense[rows][:, columns] @ v[:, 0])
    close(torch.from_numpy(S.to_scipy() @ v.numpy()), S @ v)
    named = Submatrix(A, ["2.bias"], ["0.bias", "2.bias"])
    close(named.to_dense(), dense[-3:][:, [*range(20, 25), *range(40, 43)]])
    own = Submatrix(A, ["0.weight"])
    close(pb.linalg.eigsh(own, 2)[0], torch.linalg.eigvalsh(dense[:20, :20]).flip(0)[:2])
    assert own.shape == (20, 20)
    for wrong, message in [(["bias"], r"has no parameters \['bias'\]"), ([0, 43], "different int64 numbers in 0..42"),
                           ([1, 1], "different int64"), (torch.tensor([0.5]), "different int64")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Submatrix(A, wrong)
    with pytest.raises(ValueError, match=r"the vector is \(3,\); expected a tensor \[2\] or \[2, K\]"):
        S @ v[0]
    for given in ([3, 0, 40], np.array([3, 0, 40]), (3, 0, 40), rows.int()):
        close(Submatrix(A, given).to_dense(), dense[rows][:, rows])
    for given, at in [(slice(0, 6, 2), [0, 2, 4]), (range(40, 43), [40, 41, 42]), ("2.bias", [40, 41, 42])]:
        close(Submatrix(A, given).to_dense(), dense[at][:, at])
    for wrong in ([], torch.ones(43, dtype=torch.bool), np.array([0.5]), [-1]):
        with pytest.raises(ValueError, match=r"expected different int64 numbers in 0\.\.42, or names of parameters"):
            Submatrix(A, wrong)
    with pytest.raises(ValueError, match=r"the operator is \[21, 43\]; expected a square one"):
        Submatrix(Jacobian(model, (x, y)), [0])


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("max_memory", [None, 0])
def test_jacobians(hard, max_memory):
    model, x, y = problem()
    if hard:  # first derivatives alone
        model[1] = nn.Hardsigmoid()
    f, params = model(x), list(model.parameters())
    rows = [torch.autograd.grad(e, params, retain_graph=True) for e in f.flatten()]
    dense = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]
    with (
        pytest.warns(UserWarning, match="take its rows|takes? its rows|rows")
        if hard and max_memory == 0
        else no_warning()
    ):
        J = Jacobian(model, batches, max_memory=max_memory)
        assert J.shape == (21, 43)
        v, u = torch.randn(43, 2, dtype=F64), torch.randn(21, 2, dtype=F64)
        close(J @ v, dense @ v)
        close(J.T @ u, dense.T @ u)
        close(J @ v[:, 0], dense @ v[:, 0])
        close(J.T @ u[:, 0], dense.T @ u[:, 0])
        close(J.to_dense(), dense)
        close(J.T.to_dense(), dense.T)
    named = {k: torch.ones_like(p) for k, p in model.named_parameters()}
    if not (hard and max_memory == 0):
        close(J @ named, dense.sum(1))
        close(torch.from_numpy(J.to_scipy().rmatvec(np.ones(21))), dense.sum(0))
    close(torch.cat(J.outputs), f.detach())
    with pytest.raises(ValueError, match=r"the vector is \(21,\); expected a tensor \[43\]"):
        J @ u[:, 0]


def no_warning():
    from contextlib import nullcontext

    return nullcontext()


def test_factors_of_forward_passes_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 2, 4, dtype=F64), torch.arange(6) % 3
    F = pb.operators.FOOF(model, CE, [(x[:4], y[:4]), (x[4:], y[4:])])
    K = pb.KFLR(model, CE, (x, y))
    for name, kron in F.krons.items():
        weight = name.endswith("weight")
        close(kron.right, K.krons[name].right if weight else torch.ones(1, 1, dtype=F64))
        p = kron.left.shape[-1]
        close(kron.left, torch.eye(p, dtype=F64).expand_as(kron.left))
    phi = model[1](model[0](x)).detach()
    close(F.krons["2.weight"].right, phi.T @ phi / 6)
    words = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    ids = torch.tensor([[0, 1], [1, 2], [3, 1]])
    kron = pb.operators.FOOF(words, CE, (ids, torch.tensor([0, 1, 0]))).krons["0.weight"]
    close(kron.left, torch.tensor([1, 3, 1, 1, 0], dtype=F64) / 6)
    close(kron.right, torch.eye(3, dtype=F64))


def test_factors_of_forward_passes_look_at_no_loss_and_no_target():
    model, x, y = problem()
    expected = pb.operators.FOOF(model, CE, (x, y)).to_dense()
    for loss_fn, target in [(CE, torch.full((7,), -100)), (lambda f, y: f.sum(), y), (nn.L1Loss(), x), (None, y)]:
        close(pb.operators.FOOF(model, loss_fn, (x, target)).to_dense(), expected)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_factors_of_outer_products_alone_are_the_nearest(fisher):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 2, 4, dtype=F64), torch.arange(6) % 3
    A = pb.operators.KFOC(model, CE, [(x[:4], y[:4]), (x[4:], y[4:])], fisher=fisher, iterations=500)
    whole = (pb.GGN if fisher == "exact" else pb.EmpiricalFisher)(model, CE, (x, y)).to_dense()
    start = 0
    for name, p in model.named_parameters():
        block = whole[start : start + p.numel(), start : start + p.numel()]
        start += p.numel()
        found = A.krons[name].to_dense()
        if p.dim() == 1:
            close(found, block)
            continue
        rows, columns = len(p), p[0].numel()
        table = block.view(rows, columns, rows, columns).transpose(1, 2).reshape(rows**2, columns**2)
        U, S, V = torch.linalg.svd(table)  # Van Loan and Pitsianis
        nearest = S[0] * torch.kron(U[:, 0].view(rows, rows), V[0].view(columns, columns))
        torch.testing.assert_close(found, nearest, rtol=1e-7, atol=1e-9)
        assert (found - block).norm() < (
            pb.KFAC(model, CE, (x, y), fisher=fisher).krons[name].to_dense() - block
        ).norm()
        assert torch.linalg.eigvalsh(found).min() > -1e-10
    one = pb.operators.KFOC(model[3:], CE, (model[:3](x[:1]).detach(), y[:1]), fisher="exact")
    one = one.krons["3.weight"]  # the names are those of the slice
    close(one.to_dense(), pb.GGN(model[3:], CE, (model[:3](x[:1]).detach(), y[:1])).to_dense()[:36, :36])
    close(A.inverse(0.1).to_dense(), torch.linalg.inv(A.to_dense() + 0.1 * torch.eye(A.shape[0], dtype=F64)))


def test_factors_of_outer_products_with_long_sides_unused_weights_and_wrong_options():
    model, x, y = problem()
    A = pb.operators.KFOC(model, CE, (x, y), samples=3, seed=1, max_factor=4)
    assert [kron.left.dim() for kron in A.krons.values()] == [1, 1, 2, 2]  # sides of 5, 5, 3, 3
    assert [kron.right.dim() for kron in A.krons.values()] == [2, 2, 1, 2]  # of 4, 1, 5, 1
    close(A.to_dense(), pb.operators.KFOC(model, CE, (x, y), samples=3, seed=1, max_factor=4).to_dense())
    with torch.no_grad():
        model[2].weight.zero_()
    A = pb.operators.KFOC(model, CE, (x, y))
    assert not A.to_dense()[:25, :25].any()
    assert A.inverse(0.5).diagonal()[:25].tolist() == [2.0] * 25
    half = pb.operators.KFOC(problem()[0].bfloat16(), CE, (x.bfloat16(), y))
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="iterations is 0; expected an integer of at least 1"):
        pb.operators.KFOC(model, CE, (x, y), iterations=0)
    with pytest.raises(ValueError, match="fisher is 'all'"):
        pb.operators.KFOC(model, CE, (x, y), fisher="all")


@pytest.mark.parametrize("kind", ["image", "sequence", "twice", "partly frozen"])
def test_joint_blocks_of_several_kinds(kind):
    torch.manual_seed(0)
    x = {"image": torch.randn(5, 2, 4, 4, dtype=F64), "sequence": torch.randn(5, 7, 4, dtype=F64)}.get(kind)
    x, y = torch.randn(5, 4, dtype=F64) if x is None else x, torch.arange(5) % 3
    model = Kinds(kind).double()
    if kind == "partly frozen":
        model.a.bias.requires_grad_(False)
    inputs = []
    watch = model.a.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    A = pb.operators.JointKFAC(model, CE, (x, y), fisher="exact")
    inputs.clear()
    model(x)
    watch.remove()
    K, joint = pb.KFLR(model, CE, (x, y)), [block.names for block in A.joint]
    assert (("a.weight",) if kind == "partly frozen" else ("a.weight", "a.bias")) in joint
    assert ("b.weight", "b.bias") in joint
    if kind == "partly frozen":
        close(A.to_dense()[:16, :16], K.to_dense()[:16, :16])
        return
    rows = torch.cat(inputs)
    if kind == "image":
        rows = nn.functional.unfold(rows, 2, stride=2).mT
    rows = torch.cat([rows.flatten(0, -2), torch.ones(rows.flatten(0, -2).shape[0], 1, dtype=F64)], 1)
    p, q = len(model.a.weight), rows.shape[1]
    block = torch.kron(K.krons["a.weight"].left, rows.T @ rows / len(rows))
    order = [*(i * q + j for i in range(p) for j in range(q - 1)), *(i * q + q - 1 for i in range(p))]
    close(A.to_dense()[: p * q, : p * q], block[order][:, order])
    close(A.eigsh(3)[0], torch.linalg.eigvalsh(A.to_dense()).flip(0)[:3])
    dense, v = A.to_dense(), torch.randn(A.shape[0], 2, dtype=F64)
    close(torch.as_tensor(A.trace(), dtype=F64), dense.trace())
    close(torch.as_tensor(A.traces()["a.weight + a.bias"], dtype=F64), dense[: p * q, : p * q].trace())
    close(A.frobenius_norm(), dense.norm())
    close(A.sqrt_matmul(A.sqrt_matmul(v)), dense @ v)
    with pytest.raises(NotImplementedError, match=r"a JointKronecker has no eigh\(\): its eigenvectors run through"):
        A.eigh()


class Kinds(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a = nn.Conv2d(2, 3, 2, stride=2) if kind == "image" else nn.Linear(4, 4)
        self.b = nn.Linear(12 if kind == "image" else 4, 3)

    def forward(self, x):
        x = torch.tanh(self.a(x))
        if self.kind == "twice":
            x = torch.tanh(self.a(x))
        return self.b(x.flatten(1) if self.kind == "image" else x.mean(1) if self.kind == "sequence" else x)


def test_weight_and_bias_in_one_kronecker_block():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 3, bias=False)
    ).double()
    x, y = torch.randn(6, 2, 4, dtype=F64), torch.arange(6) % 3
    A = pb.operators.JointKFAC(model, CE, [(x[:4], y[:4]), (x[4:], y[4:])], fisher="exact")
    K = pb.KFLR(model, CE, (x, y))
    dense, sizes = A.to_dense(), [p.numel() for p in model.parameters()]  # 16 + 4, 36 + 3, 9
    assert sizes == [16, 4, 36, 3, 9]
    phi = model[:3](x).detach()
    ones = torch.cat([phi, torch.ones(6, 1, dtype=F64)], 1)
    block = torch.kron(K.krons["3.weight"].left, ones.T @ ones / 6)
    order = [*(i * 13 + j for i in range(3) for j in range(12)), *(i * 13 + 12 for i in range(3))]
    close(dense[20:59, 20:59], block[order][:, order])
    patches = x.unfold(2, 2, 1).transpose(1, 2).flatten(2).flatten(0, 1)  # [N T, 4]
    ones = torch.cat([patches, torch.ones(len(patches), 1, dtype=F64)], 1)
    block = torch.kron(K.krons["0.weight"].left, ones.T @ ones / len(ones))
    order = [*(i * 5 + j for i in range(4) for j in range(4)), *(i * 5 + 4 for i in range(4))]
    close(dense[:20, :20], block[order][:, order])
    close(dense[59:, 59:], K.to_dense()[59:, 59:])
    assert not dense[:20, 20:].any()
    eye = torch.eye(len(dense), dtype=F64)
    close(A.inverse(0.1).to_dense(), torch.linalg.inv(dense + 0.1 * eye))
    close(A.logdet(0.1), torch.logdet(dense + 0.1 * eye))
    close(A.solve(eye[0], damping=0.1), torch.linalg.inv(dense + 0.1 * eye)[0])
    one = pb.operators.JointKFAC(model[3:4], CE, (phi[:1], y[:1]), fisher="exact").to_dense()
    close(one, pb.GGN(model[3:4], CE, (phi[:1], y[:1])).to_dense())  # weight and bias of one sample: the whole GGN
