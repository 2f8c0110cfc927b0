"""The algebra of one Kronecker-factored block against the dense matrix."""

import pytest
import torch

import paraboloid as pb
from paraboloid.linalg import eigenform
from paraboloid.linalg.kronecker import Kron, Side


def close(actual, expected):
    scale = max(expected.abs().max().item(), 1e-30)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10 * scale)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(p, *groups, rank=None, seed=0):
    rows = random(*groups, rank or p + 2, p, seed=seed)
    return rows.mT @ rows / (rank or p + 2)


def ones():
    return torch.ones(1, 1, dtype=torch.float64)


KRONS = {
    "weight": lambda: pb.Kron(factor(3), factor(4, seed=1)),
    "groups": lambda: pb.Kron(factor(3, 2), factor(4, 2, seed=1), 2),
    "many small groups": lambda: pb.Kron(factor(1, 12), factor(3, 12, seed=1), 12),
    "embedding": lambda: pb.Kron(random(5).abs(), factor(3, seed=1)),
    "bias": lambda: pb.Kron(factor(5), ones()),
    "long bias": lambda: pb.Kron(random(6).abs(), ones()),
}
THIN = {
    "rows": lambda: Kron(Side("rows", random(1, 2, 5)), Side("rows", random(1, 3, 4, seed=1))),
    "rows of groups": lambda: Kron(Side("rows", random(2, 2, 5)), Side("rows", random(2, 3, 4, seed=1))),
    "one side": lambda: Kron(Side("rows", random(1, 2, 5)), Side("matrix", factor(4, 1))),
    "more rows than columns": lambda: Kron(Side("rows", random(1, 7, 5)), Side("matrix", factor(4, 1))),
    "diagonal": lambda: Kron(Side("rows", random(1, 2, 5)), Side("diagonal", random(1, 4).abs())),
    "complement": lambda: Kron(few_rows(1).inverse(random(1).abs(), "rows"), Side("matrix", factor(4, 1))),
    "complement of groups": lambda: Kron(Side("matrix", factor(3, 2)), few_rows(2).inverse(random(2).abs(), "rows")),
    "repeated rows": lambda: Kron(Side("rows", ones().expand(1, 3, 5)), Side("matrix", factor(4, 1))),
}
BLOCKS = {**KRONS, **THIN}


def few_rows(*groups):
    return Side("rows", random(*groups, 2, 6, seed=3))


@pytest.mark.parametrize("groups", [1, 3])
def test_few_rows_are_inverted_by_a_matrix_of_their_number(groups):
    side, shift = few_rows(groups), torch.linspace(0.2, 0.5, groups).double()
    damped = side.dense() + shift.view(-1, 1, 1) * torch.eye(6).double()
    inverse = side.inverse(shift, "rows")
    assert (side.is_short, inverse.kind, inverse.is_short) == (True, "complement", True)
    close(inverse.dense(), torch.linalg.inv(damped))
    close(inverse.times(random(groups, 6, 2)), torch.linalg.inv(damped) @ random(groups, 6, 2))
    close(
        inverse.inverse(shift, "again").dense(), torch.linalg.inv(inverse.dense() + shift.view(-1, 1, 1) * torch.eye(6))
    )
    close(inverse.scaled(shift).dense(), shift.view(-1, 1, 1) * inverse.dense())
    close(inverse.norm(), inverse.dense().flatten(1).norm(dim=1))
    kron = Kron(inverse, Side("matrix", factor(2, groups)))
    close(Kron.of_state(kron.state()).to_dense(), kron.to_dense())
    single = kron.to(torch.float32)
    assert single.dtype == single.sides[0].rest.dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), kron.to_dense(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="rows, \\[6, 6\\], plus its share"):
        side.inverse(torch.zeros(groups).double(), "rows")


def test_running_averages_keep_rows_while_these_are_few():
    one, two, three = (Side("rows", random(1, 2, 8, seed=i)) for i in range(3))
    pair = one.mixed(two, 0.25)
    assert (pair.kind, pair.data.shape[1]) == ("rows", 4)
    close(pair.dense(), 0.75 * one.dense() + 0.25 * two.dense())
    expected = 0.9 * pair.dense() + 0.1 * three.dense()
    full = pair.mixed(three, 0.1)
    assert full.kind == "matrix"
    close(full.dense(), expected)
    expected = 0.9 * full.dense() + 0.1 * one.dense()
    close(full.mixed(one, 0.1).dense(), expected)
    expected = 0.9 * one.dense() + 0.1 * full.dense()
    close(one.mixed(full, 0.1).dense(), expected)
    expected = 0.5 * full.data + 0.5 * factor(8, 1)
    close(full.mixed(Side("matrix", factor(8, 1)), 0.5).dense(), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_answer_is_that_of_the_dense_matrix(name):
    kron = BLOCKS[name]()
    dense = kron.to_dense()
    size = len(dense)
    V, damped = random(size, 3), dense + 0.1 * torch.eye(size).double()
    inverse = torch.linalg.inv(damped)
    form = kron.eigenform("w")
    for block in (kron, form, form.completed()):
        close(block @ V, dense @ V)
        close(block @ V[:, 0], dense @ V[:, 0])
        close((block @ V[:, 0].view(1, size)).flatten(), dense @ V[:, 0])
        close(block.to_dense(), dense)
        close(block.diagonal(), dense.diagonal())
        close(block.trace(), dense.trace())
        close(block.frobenius_norm(), dense.norm())
    for f in (form, form.completed()):
        close(f.inverse(0.1).to_dense(), inverse)
        close(f.inverse(0.1) @ V, inverse @ V)
        close(f.inverse(0.1).diagonal(), inverse.diagonal())
        close(f.inverse(0.1).frobenius_norm(), inverse.norm())
        close(f.inverse(0.1).trace(), inverse.trace())
        close(f.logdet(0.1), torch.logdet(damped))
        close(f.sqrt().to_dense() @ f.sqrt().to_dense(), dense)
    values = form.completed().values.flatten().sort().values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", KRONS)
def test_the_methods_of_bare_factors(name):
    kron = KRONS[name]()
    dense = kron.to_dense()
    damped = dense + 0.1 * torch.eye(len(dense)).double()
    assert kron.shape == dense.shape
    close(kron.inverse(0.1).to_dense(), torch.linalg.inv(damped))
    close(kron.logdet(0.1), torch.logdet(damped))
    close(kron.sqrt().to_dense() @ kron.sqrt().to_dense(), dense)
    # without damping the split inverse is the inverse
    if name != "long bias":
        close(kron.inverse(0.0, split="pi").to_dense(), torch.linalg.inv(dense))


def test_the_split_inverse_is_the_papers():
    kron, damping = pb.Kron(factor(3), factor(4, seed=1)), 0.3
    pi = ((kron.left.trace() / 3) / (kron.right.trace() / 4)).sqrt()
    left = kron.left + pi * damping**0.5 * torch.eye(3).double()
    right = kron.right + damping**0.5 / pi * torch.eye(4).double()
    close(kron.inverse(damping, split="pi").to_dense(), torch.linalg.inv(torch.kron(left, right)))
    groups = pb.Kron(torch.stack([kron.left] * 2), torch.stack([kron.right] * 2), 2).inverse(damping, split="pi")
    close(groups.to_dense()[:12, :12], torch.linalg.inv(torch.kron(left, right)))
    zero = pb.Kron(torch.zeros(3, 3), torch.eye(2)).inverse(0.04, split="pi")  # pi is 1 then
    torch.testing.assert_close(zero.to_dense(), torch.eye(6) / (0.2 * 1.2))


def test_both_factors_damped_alike():
    kron, eyes = pb.Kron(factor(3), factor(4, seed=1)), [torch.eye(n).double() for n in (3, 4)]
    expected = torch.kron(torch.linalg.inv(kron.left + 0.3 * eyes[0]), torch.linalg.inv(kron.right + 0.3 * eyes[1]))
    close(kron.inverse(0.3, split="same").to_dense(), expected)


def test_a_factor_beside_a_number_is_inverted_exactly():
    """A bias's block is number * left: damping it as a whole costs the same as splitting it."""
    eye = torch.eye(3).double()
    for number in (2.5, 0.0):
        one = torch.full((1, 1), number).double()
        rows = pb.Kron(Side("rows", torch.ones(1, 2, 3).double()), Side("matrix", one[None]))
        diagonal = pb.Kron(torch.ones(3).double(), one)
        for kron in (pb.Kron(factor(3), one), pb.Kron(one, factor(3)), diagonal, rows):
            close(kron.inverse(0.3, split="pi").to_dense(), torch.linalg.inv(kron.to_dense() + 0.3 * eye))


def test_single_precision_factors():
    kron = KRONS["weight"]()
    single = pb.Kron(kron.left.float(), kron.right.float())
    assert single.eigenform().values.dtype == torch.float32
    torch.testing.assert_close(
        single.inverse(0.1).to_dense().double(), kron.inverse(0.1).to_dense(), rtol=1e-4, atol=1e-4
    )


def test_what_rounding_makes_negative_is_zero():
    kron = pb.Kron(factor(6, rank=2), factor(4, rank=1, seed=1))
    values = kron.eigenform().values
    assert (values >= 0).all()
    close(kron.sqrt().to_dense() @ kron.sqrt().to_dense(), kron.to_dense())


def test_singular_blocks_raise_with_their_name():
    kron = pb.Kron(factor(6, rank=2), factor(4))
    with pytest.raises(
        ValueError,
        match=r"conv1: the smallest eigenvalue plus damping is .* largest of all .*; expected a positive definite matrix. Increase damping \(now 0.0\)",
    ):
        eigenform.check_positive({"conv1": kron.eigenform()}, 0.0)
    for damping in (0.0, 1e-20, -1.0):
        with pytest.raises(ValueError, match="the block: the smallest eigenvalue plus damping"):
            kron.inverse(damping)
        with pytest.raises(ValueError, match="the block: the smallest eigenvalue plus damping"):
            kron.logdet(damping)
    with pytest.raises(
        ValueError, match=r"w: the left factor, \[6, 6\], plus its share .* of the damping is singular; expected"
    ):
        kron.inverse(0.0, split="pi", name="w")
    with pytest.raises(ValueError, match="the left factor plus its share of the damping has the smallest entry 0"):
        pb.Kron(torch.zeros(3), torch.eye(2)).inverse(0.0, split="pi")
    with pytest.raises(ValueError, match="the smallest eigenvalue is -1; expected a positive semi-definite matrix"):
        pb.Kron(-torch.eye(2), torch.eye(2)).sqrt()


def test_wrong_arguments():
    kron = KRONS["weight"]()
    with pytest.raises(ValueError, match=r"split is 'half'; expected None \(damping is exact\), or 'pi' or 'same'"):
        kron.inverse(0.1, split="half")
    with pytest.raises(ValueError, match="damping is -1; expected a number of at least 0 to split"):
        kron.inverse(-1, split="pi")
    for product in (kron, kron.eigenform()):
        with pytest.raises(
            ValueError, match=r"the vector has shape \(3, 5\); expected 12 numbers in any shape, or \[12, K\]"
        ):
            product @ torch.zeros(3, 5)


def test_a_failing_decomposition_names_the_layer_and_the_condition(monkeypatch):
    broken = pb.Kron(torch.full((3, 3), float("nan")), torch.eye(2))
    with pytest.raises(
        torch.linalg.LinAlgError,
        match=r"fc.weight: the left factor, \[3, 3\], has no eigendecomposition: .* holds NaN .* condition number is undefined",
    ):
        broken.eigenform("fc.weight")

    def fails(matrix):
        raise torch.linalg.LinAlgError("no convergence.")

    monkeypatch.setattr(eigenform, "eigh", fails)
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"the right factor, \[2, 2\].*no convergence. Its condition number is 4"
    ):
        Kron(Side("diagonal", torch.ones(1, 3)), Side("matrix", torch.tensor([[[4.0, 0], [0, 1]]]))).eigenform()


GRADIENTS = {
    **{name: (block, ()) for name, block in BLOCKS.items()},
    "a number beside a diagonal": (lambda: pb.Kron(random(5).abs(), 2 * ones()), (5,)),
    "a number beside a matrix": (lambda: pb.Kron(factor(5), 2 * ones()), (5,)),
    "a number and a trailing axis": (lambda: pb.Kron(factor(5), 2 * ones()), (5, 1)),
    "a number on the left": (lambda: pb.Kron(2 * ones(), factor(4)), (1, 4)),
    "images": (lambda: pb.Kron(factor(3), factor(8, seed=1)), (3, 2, 2, 2)),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_one_gradient_takes_the_product_of_any_vector(name):
    """`applied`, as optimisers call it, again and again, against `@`: for the block and for its eigenvalues."""
    make, shape = GRADIENTS[name]
    block = make()
    dense = block.to_dense()
    g = random(len(dense), seed=4).reshape(shape or (-1,))
    forms = [g, g.to(memory_format=torch.channels_last) if g.dim() == 4 else g, g.float()]
    for kind in (block, block.eigenform()):
        for v in (*forms, *forms):
            before, found = v.clone(), kind.applied(v)
            assert (found.shape, found.dtype) == (v.shape, v.dtype) and torch.equal(v, before)
            expected = (dense @ v.double().flatten()).view(v.shape).to(v.dtype)
            bound = 1e-9 if v.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(found, expected, rtol=bound, atol=bound * float(expected.abs().max()))
