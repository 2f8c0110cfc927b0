"""Operators with structure: what each of them offers, against the dense matrix."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.linalg import eigenform
from paraboloid.operators import BlockDiagonal, Diagonalised, Identity, KroneckerFactored, LowRank, load
from paraboloid.passes import trees


def close(actual, expected):
    scale = max(expected.abs().max().item(), 1e-30)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * scale)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(p, *groups, seed=0, rank=None):
    rows = random(*groups, rank or p + 2, p, seed=seed)
    return rows.mT @ rows


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.Embedding(3, 2), nn.Linear(4, 3)).double()


def krons():
    one = torch.ones(1, 1).double()
    return {
        "0.weight": pb.Kron(factor(2, 2, seed=1), factor(2, 2, seed=2), 2),
        "0.bias": pb.Kron(factor(4, rank=2), one),
        "1.weight": pb.Kron(random(3).abs(), factor(2, seed=3)),
        "2.weight": pb.Kron(factor(3, seed=4), factor(4, rank=2)),
        "2.bias": pb.Kron(random(3).abs(), one),
    }


def kronecker_factored():
    return KroneckerFactored(dict(net().named_parameters()), krons())


def block_diagonal():
    parameters = dict(net().named_parameters())
    blocks = [[0, 3], [1, 2], [4]]  # not beside each other
    sizes = [sum(list(parameters.values())[i].numel() for i in b) for b in blocks]
    return BlockDiagonal(parameters, blocks, [factor(n, seed=n) for n in sizes])


def low_rank(diagonal=0.2):
    parameters = dict(net().named_parameters())
    return LowRank(parameters, random(33, 4), torch.tensor([3.0, 2, 1, 0.5]).double(), diagonal)


MAKE = {
    "kronecker": kronecker_factored,
    "eigenvalues": lambda: kronecker_factored().eigenform,
    "inverse": lambda: kronecker_factored().inverse(0.1),
    "blocks": block_diagonal,
    "inverse of blocks": lambda: block_diagonal().inverse(0.1),
    "multiple": lambda: 3 * kronecker_factored(),
    "shifted": lambda: kronecker_factored() + 0.5 * Identity(dict(net().named_parameters())),
    "shifted blocks": lambda: 0.5 * Identity(dict(net().named_parameters())) + block_diagonal(),
    "identity": lambda: Identity(dict(net().named_parameters())),
    "diagonal": lambda: Diagonalised(
        dict(net().named_parameters()), [eigenform.diagonal_form(random(n).abs()) for n in (8, 4, 6, 12, 3)]
    ),
    "low rank": low_rank,
    "low rank alone": lambda: low_rank(0.0),
    "shifted low rank": lambda: low_rank() + 0.5 * Identity(dict(net().named_parameters())),
    "inverse of low rank": lambda: low_rank().inverse(0.1),
    "one basis": lambda: kronecker_factored().eigenform + kronecker_factored().inverse(0.1),
}


@pytest.mark.parametrize("name", MAKE)
def test_every_method_is_that_of_the_dense_matrix(name):
    A = MAKE[name]()
    dense = A.to_dense()
    size = A.shape[0]
    assert dense.shape == (size, size)
    V, damped = random(size, 3), dense + 0.3 * torch.eye(size).double()
    inverse = torch.linalg.inv(damped)
    close(A @ V, dense @ V)
    close(A @ V[:, 1], dense @ V[:, 1])
    tree = {k: random(*p.shape) for k, p in A.parameters.items()}
    flat = torch.cat([t.flatten() for t in tree.values()])
    for found, expected in ((A @ tree, dense @ flat), (A.solve(tree, 0.3), inverse @ flat)):
        assert {k: t.shape for k, t in found.items()} == {k: p.shape for k, p in A.parameters.items()}
        torch.testing.assert_close(torch.cat([t.flatten() for t in found.values()]), expected, rtol=1e-8, atol=1e-9)
    close(A.diagonal(), dense.diagonal())
    assert A.trace() == pytest.approx(dense.trace().item(), rel=1e-12)
    assert type(A.trace()) is float
    close(A.frobenius_norm(), dense.norm())
    close(A.inverse(0.3) @ V, inverse @ V)
    close(A.inverse(0.3).to_dense(), inverse)
    close(A.inverse(0.3).diagonal(), inverse.diagonal())
    close(A.logdet(0.3), torch.logdet(damped))
    close(A.sqrt_matmul(A.sqrt_matmul(V)), dense @ V)
    close(A.quadratic_forms(V.T), (V * (dense @ V)).sum(0))
    np.testing.assert_allclose(A.to_scipy() @ V.numpy(), (dense @ V).numpy(), rtol=1e-10, atol=1e-10)
    assert A.trace(samples=50, seed=1) == pytest.approx(dense.trace().item(), rel=0.5)
    truth = torch.linalg.eigvalsh(dense).flip(0)
    for k in (1, 4, size):
        values, vectors = A.eigsh(k)
        torch.testing.assert_close(values, truth[:k], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(dense @ vectors, vectors * values, rtol=0, atol=1e-8)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(k).double(), rtol=0, atol=1e-10)
    values, vectors = A.eigh()
    torch.testing.assert_close(values, truth, rtol=1e-8, atol=1e-9)
    Q = vectors.to_dense()
    torch.testing.assert_close(Q @ values.diag() @ Q.T, dense, rtol=1e-9, atol=1e-10)
    close(vectors @ V, Q @ V)
    close(vectors.T @ V[:, 0], Q.T @ V[:, 0])
    close(vectors.T.to_dense(), Q.T)


@pytest.mark.parametrize("name", ["kronecker", "eigenvalues", "blocks"])
def test_layers_of_traces_and_eigenvalues(name):
    A = MAKE[name]()
    traces = A.traces()
    assert sum(traces.values()) == pytest.approx(A.trace())
    if name != "blocks":
        assert list(traces) == list(A.parameters)
    (value, label), (second, _) = A.top_eigenvalues(2)
    assert [value, second] == pytest.approx(A.eigsh(2)[0].tolist())
    vector = A.eigsh(1)[1][:, 0]
    found = {k: t.abs().max() for k, t in trees.unflatten(vector, A.parameters).items() if t.abs().max() > 1e-9}
    assert set(found) <= set(label.split(" + "))


def test_the_split_inverse_of_all_parameters():
    K = kronecker_factored()
    found = K.inverse(0.2, split="pi").to_dense()
    expected = torch.block_diag(*(k.inverse(0.2, split="pi").to_dense() for k in krons().values()))
    close(found, expected)
    exact = K.inverse(0.2).to_dense()
    for at in (slice(8, 12), slice(30, 33)):  # blocks with one factor alone: nothing to split
        close(found[at, at], exact[at, at])
    with pytest.raises(ValueError, match="split is 'half'"):
        K.inverse(0.2, split="half")


def test_the_decomposition_is_made_once_and_only_when_needed(monkeypatch):
    calls = []
    original = eigenform.eigh
    monkeypatch.setattr(eigenform, "eigh", lambda m: calls.append(len(m)) or original(m))
    K = kronecker_factored()
    K @ random(K.shape[0])
    K.trace()
    assert not calls
    K.inverse(0.1)
    K.inverse(0.2)
    K.logdet(0.3)
    assert len(calls) == 5  # two of groups twice; two of five are equal; diagonals and [[1]] need none


def test_singular_operators_name_the_layer():
    K = kronecker_factored()
    for call in (K.inverse, K.logdet):
        with pytest.raises(
            ValueError,
            match=r"parameter '0.bias': the smallest eigenvalue plus damping is .* Increase damping \(now 0.0\)",
        ):
            call(0.0)
    with pytest.raises(ValueError, match=r"parameter '0.bias': the left factor, .* is singular"):
        K.inverse(0.0, split="pi")
    B = BlockDiagonal(dict(net().named_parameters()), [[0, 1, 2, 3, 4]], [torch.zeros(K.shape).double()])
    with pytest.raises(
        ValueError, match=r"the block of parameters \['0.weight', .*\]: the smallest eigenvalue plus damping is 0"
    ):
        B.inverse(0.0)


def test_sums_of_different_bases_have_no_inverse():
    K, B = kronecker_factored(), block_diagonal()
    A = K + B
    close(A @ random(A.shape[0]), K.to_dense() @ random(A.shape[0]) + B.to_dense() @ random(A.shape[0]))
    with pytest.raises(
        NotImplementedError,
        match=r"the sum of KroneckerFactored and BlockDiagonal has no inverse.*different eigenvectors; expected summands",
    ):
        A.inverse(1.0)
    with pytest.raises(NotImplementedError, match="has no logdet"):
        (K + 2 * KroneckerFactored(K.parameters, {**krons(), "2.weight": pb.Kron(factor(3), factor(4))})).logdet(1.0)


def test_wrong_factors():
    parameters = dict(net().named_parameters())
    with pytest.raises(ValueError, match=r"the factors' names are \['0.weight'\]; expected the parameters'"):
        KroneckerFactored(parameters, {"0.weight": krons()["0.weight"]})
    with pytest.raises(
        ValueError, match=r"parameter '2.weight' of shape .* has 12 elements, but its factors are for 1 x 3 x 2"
    ):
        KroneckerFactored(parameters, {**krons(), "2.weight": pb.Kron(factor(3), factor(2))})
    forms = [k.eigenform() for k in krons().values()]
    with pytest.raises(
        ValueError, match=r"the blocks have the sizes \[4, 8, 6, 12, 3\]; expected those of .*: \[8, 4, 6, 12, 3\]"
    ):
        Diagonalised(parameters, [forms[1], forms[0], *forms[2:]])
    with pytest.raises(ValueError, match=r"the vector has shape \(3,\); expected \[33\]"):
        kronecker_factored().eigh().vectors @ torch.zeros(3)


@pytest.mark.parametrize("name", MAKE)
def test_a_saved_operator_is_the_same(name, tmp_path):
    A = MAKE[name]()
    torch.save(A.state_dict(), tmp_path / "operator.pt")
    state = torch.load(tmp_path / "operator.pt", weights_only=True)
    B = load(state, net())
    assert type(B) is type(A)
    close(B.to_dense(), A.to_dense())
    close(B.inverse(0.3).to_dense(), A.inverse(0.3).to_dense())
    C = A if name == "identity" else 2 * A
    with pytest.raises(
        ValueError, match=f"the state is that of a {type(A).__name__}; expected one of a|expected the model's"
    ):
        (2 * C if type(A).__name__ != "Scaled" else low_rank()).load_state_dict(state)
    A.load_state_dict(state)
    close(A.to_dense(), B.to_dense())


def test_states_that_do_not_fit():
    K = kronecker_factored()
    K.inverse(0.1)
    other = KroneckerFactored(K.parameters, {**krons(), "2.weight": pb.Kron(factor(3), factor(4))})
    K.load_state_dict(other.state_dict())
    close(K.inverse(0.1).to_dense(), other.inverse(0.1).to_dense())  # nothing cached is left
    with pytest.raises(
        ValueError, match=r"the state is that of an operator over .*; expected the model's parameters \{'weight'"
    ):
        load(K.state_dict(), nn.Linear(2, 3))
    with pytest.raises(ValueError, match="the state is of kind 'Circulant', which is not known"):
        load({**K.state_dict(), "kind": "Circulant"}, net())
    with pytest.raises(ValueError, match=r"the state is of version 99; expected at most 1\. Update paraboloid"):
        load({**K.state_dict(), "version": 99}, net())
    close(load({k: v for k, v in K.state_dict().items() if k != "version"}, net()).to_dense(), K.to_dense())
    model = nn.Linear(2, 3).double()
    G = pb.GGN(model, nn.MSELoss(), (random(4, 2), random(4, 3)))
    with pytest.raises(NotImplementedError, match="GGN is known by its products alone, so it has no state"):
        G.state_dict()


@pytest.mark.parametrize("signs", [1.0, -1.0])
def test_low_rank_plus_a_diagonal_vector(signs):
    diagonal = random(33, seed=5).abs() + 0.2
    values = torch.tensor([3.0, 2, 1, 0.5]).double() * (1 if signs > 0 else -1e-3)
    A = LowRank(dict(net().named_parameters()), random(33, 4), values, diagonal)
    dense, V = A.to_dense(), random(33, 2)
    close(dense, random(33, 4) @ values.diag() @ random(33, 4).T + diagonal.diag())
    damped = dense + 0.3 * torch.eye(33).double()
    close(A @ V, dense @ V)
    close(A.diagonal(), dense.diagonal())
    assert A.trace() == pytest.approx(dense.trace().item())
    close(A.frobenius_norm(), dense.norm())
    close(A.inverse(0.3).to_dense(), torch.linalg.inv(damped))
    close(A.inverse(0.3).inverse().to_dense(), damped)
    close(A.solve(V, 0.3), torch.linalg.solve(damped, V))
    close(A.logdet(0.3), torch.logdet(damped))
    B = A.sqrt_matmul(torch.eye(33).double())
    close(B @ B.T, dense)
    close(A.sqrt_matmul(V[:, 0]), B @ V[:, 0])
    close(A.eigsh(3)[0], torch.linalg.eigvalsh(dense).flip(0)[:3])
    close(load(A.state_dict(), net()).to_dense(), dense)
    with pytest.raises(NotImplementedError, match="low rank plus a diagonal vector has no eigenvectors in closed form"):
        A.eigh()


def test_low_rank_of_an_operator_and_of_a_root():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = random(3, 4), torch.tensor([0, 1, 2])
    G = pb.GGN(model, nn.CrossEntropyLoss(), batch)
    dense = G.to_dense()
    values, vectors = torch.linalg.eigh(dense)
    A = pb.LowRank.from_operator(G, 3, diagonal=0.1)
    close(A.to_dense(), (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T + 0.1 * torch.eye(len(dense)).double())
    rest = pb.LowRank.from_operator(G, 3)
    close(rest.diagonal(), dense.diagonal())
    close(rest.inverse(0.1).to_dense(), torch.linalg.inv(rest.to_dense() + 0.1 * torch.eye(len(dense)).double()))
    stats = pb.statistics(model, nn.CrossEntropyLoss(), batch, "sqrt_ggn")
    root = torch.cat([t.flatten(2).flatten(0, 1) for t in stats["sqrt_ggn"].values()], 1) / stats.normalizer**0.5
    close(pb.LowRank.from_root(G.parameters, root).to_dense(), dense)
    close(pb.LowRank.from_operator(rest, 2, diagonal=0.0).eigsh(1)[0], rest.eigsh(1)[0])


def test_wrong_low_rank():
    parameters = dict(net().named_parameters())
    with pytest.raises(ValueError, match=r"the vectors have shape \(32, 2\); expected \[33, k\]"):
        LowRank(parameters, random(32, 2), random(2))
    with pytest.raises(ValueError, match=r"the values have shape \(3,\); expected \[2\] or \[2, 2\]"):
        LowRank(parameters, random(33, 2), random(3))
    with pytest.raises(ValueError, match=r"the diagonal has shape \(2,\); expected a number or \[33\]"):
        LowRank(parameters, random(33, 2), random(2), random(2))
    with pytest.raises(ValueError, match=r"the root has shape \(3,\); expected \[R, D\]"):
        LowRank.from_root(parameters, random(3))
    with pytest.raises(ValueError, match="diagonal is 'all'; expected 'rest'"):
        LowRank.from_operator(low_rank(), 1, diagonal="all")
    with pytest.raises(ValueError, match="the smallest eigenvalue plus damping may be as small as 0"):
        LowRank(parameters, random(33, 2), random(2), torch.zeros(33).double()).inverse()
    with pytest.raises(ValueError, match="may be as small as -"):
        LowRank(parameters, random(33, 2), torch.tensor([1.0, -5.0]).double(), torch.ones(33).double()).inverse()
    with pytest.raises(ValueError, match=r"the block of parameters .*: the smallest eigenvalue plus damping is 0"):
        low_rank(0.0).inverse()


@pytest.mark.parametrize("name", MAKE)
def test_autocast_and_inference_mode_change_nothing(name):
    expected = MAKE[name]().to_dense()
    v = random(len(expected))
    solved = torch.linalg.solve(expected + 0.3 * torch.eye(len(v)).double(), v)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        A = MAKE[name]()
        close(A @ v, expected @ v)
        close(A.solve(v, 0.3), solved)
        close(A.inverse(0.3) @ v, solved)
        close(A.diagonal(), expected.diagonal())
        close(A.sqrt_matmul(A.sqrt_matmul(v)), expected @ v)
        values, vectors = A.eigsh(2)
        torch.testing.assert_close(expected @ vectors, vectors * values, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [4, 4.0, np.float32(4), np.array(4.0), torch.tensor(4.0)])
def test_multiples_by_numbers_of_any_kind(scale):
    K = kronecker_factored()
    for A in (K, K @ K):
        close((A / scale).to_dense(), A.to_dense() / 4)
        close((A * scale).to_dense(), 4 * A.to_dense())


def test_multiples_by_arrays_are_refused():
    K = kronecker_factored()
    for A in (K, K @ K):
        for wrong in (np.ones(3), np.ones((1, 1)), "4"):
            with pytest.raises(TypeError, match=r"unsupported operand|does not support ufuncs"):
                A / wrong
            with pytest.raises(TypeError, match=r"unsupported operand|does not support ufuncs|can.t multiply"):
                A * wrong


ROOM = {
    "GGN": lambda p: pb.GGN(*p),
    "Hessian": lambda p: pb.Hessian(*p),
    "Fisher": lambda p: pb.Fisher(*p, samples=2),
    "EmpiricalFisher": lambda p: pb.EmpiricalFisher(*p),
    "PCH": lambda p: pb.PCH(*p),
    "GGN blocks": lambda p: pb.GGN(*p, blocks="layer"),
    "DiagonalGGN": lambda p: pb.DiagonalGGN(*p),
    "KFAC": lambda p: pb.KFAC(*p),
    "KFAC elsewhere": lambda p: pb.KFAC(*p, measure_on=p[2]),
    "KFLR": lambda p: pb.KFLR(*p),
    "EKFAC": lambda p: pb.EKFAC(*p),
    "FOOF": lambda p: pb.operators.FOOF(*p),
    "JointKFAC": lambda p: pb.operators.JointKFAC(*p),
    "low rank": lambda p: LowRank.from_operator(pb.GGN(*p), 4),
    "multiple": lambda p: 2 * pb.KFAC(*p),
    "shifted": lambda p: pb.KFAC(*p) + 0.3 * Identity(dict(p[0].named_parameters())),
    "sum": lambda p: pb.KFAC(*p) + pb.GGN(*p),
    "inverse": lambda p: pb.KFAC(*p).inverse(0.1),
    "split inverse": lambda p: pb.KFAC(*p).inverse(0.1, split="pi"),
    "joint inverse": lambda p: pb.operators.JointKFAC(*p).inverse(0.1),
}
FACTORED = ("KFAC", "KFLR", "FOOF", "split inverse", "JointKFAC")
HAVE_NO_INVERSE = ("GGN", "Hessian", "Fisher", "EmpiricalFisher", "sum")


def small_problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, nn.CrossEntropyLoss(), (random(9, 4), torch.arange(9) % 3)


@pytest.mark.parametrize("name", ROOM)
def test_every_option_of_an_inverse_is_right_or_a_sentence(name):
    A = ROOM[name](small_problem())
    dense, v = A @ torch.eye(43).double(), random(43)
    damped = dense + 0.2 * torch.eye(43).double()
    if name == "Hessian":
        with pytest.raises(torch.linalg.LinAlgError, match="A is not positive definite: add damping"):
            A.solve(v, damping=0.2)
    else:
        for given in (0.2, torch.tensor(0.2, dtype=torch.float64)):
            torch.testing.assert_close(
                A.solve(v, given, 1e-12, 500), torch.linalg.solve(damped, v), rtol=1e-8, atol=1e-9
            )
    if name in HAVE_NO_INVERSE:
        for ask in (lambda: A.inverse(0.2), lambda: A.inverse(0.2, split=None), lambda: A.logdet(damping=0.2)):
            with pytest.raises(NotImplementedError, match=r"Use solve\(b, damping=\.\.\.\)"):
                ask()
    else:
        close(A.inverse(0.2, split=None).to_dense(), torch.linalg.inv(damped))
        close(A.inverse(torch.tensor(0.2, dtype=torch.float64)).to_dense(), torch.linalg.inv(damped))
        close(A.logdet(0.2), torch.logdet(damped))
    for split in ("pi", "same"):
        if name in FACTORED:
            assert (A.inverse(0.2, split=split) @ v).isfinite().all()
        else:
            with pytest.raises(ValueError, match=f"split is '{split}', which shares damping between the two Kronecker"):
                A.inverse(0.2, split=split)
    with pytest.raises(ValueError, match=r"split is 'exact'; expected None .damping is exact., or 'pi' or 'same'"):
        A.inverse(0.2, split="exact")
    for damping in ("0.2", float("nan"), True):
        for method in ("solve", "inverse", "logdet"):
            if method == "solve" or name not in HAVE_NO_INVERSE:
                with pytest.raises(ValueError, match=r"damping is .*; expected a finite number"):
                    getattr(A, method)(*([v] if method == "solve" else []), damping=damping)


def test_joint_blocks_split_their_damping_as_their_factors_say():
    problem = small_problem()
    A = pb.operators.JointKFAC(*problem, fisher="exact")
    found = A.inverse(0.2, split="pi").to_dense()
    for (weight, bias), p, q in ((("0.weight", "0.bias"), 5, 4), (("2.weight", "2.bias"), 3, 5)):
        kron = next(b.block for b in A.joint if b.names == (weight, bias))
        pi = ((kron.left.trace() / p) / (kron.right.trace() / (q + 1))).sqrt()
        L = torch.linalg.inv(kron.left + pi * 0.2**0.5 * torch.eye(p).double())
        R = torch.linalg.inv(kron.right + 0.2**0.5 / pi * torch.eye(q + 1).double())
        at = 0 if weight[0] == "0" else 25
        order = torch.tensor([i * q + j if j < q else p * q + i for i in range(p) for j in range(q + 1)])
        close(found[at : at + p * (q + 1), at : at + p * (q + 1)][order][:, order], torch.kron(L, R))


@pytest.mark.parametrize("name", ROOM)
def test_operators_are_copied_and_pickled_or_say_why_not(name):
    A = ROOM[name](small_problem())
    if name in (*HAVE_NO_INVERSE, "PCH", "GGN blocks"):
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            if not (name == "sum" and copied is copy.copy):
                with pytest.raises(TypeError, match="holds the recorded graph of its model, so it is neither copied"):
                    copied(A)
    else:
        close(copy.deepcopy(A).to_dense(), A.to_dense())
        close(pickle.loads(pickle.dumps(A)).to_dense(), A.to_dense())
