"""Losses against autograd of torch's own: value, gradient, Hessian, its root and sampled gradients, and every error."""

import pytest
import torch
from torch import nn

from paraboloid.losses import MSE, BCEWithLogits, CrossEntropy, Loss, NoTargets, Opaque, PoissonNLL

N, C = 4, 3
WEIGHT = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def indices(*shape, ignored=False):
    y = torch.randint(C, shape, generator=torch.Generator().manual_seed(1))
    if ignored:
        y.view(-1)[1] = -100
    return y


def counts(*shape):
    return torch.randint(5, shape, generator=torch.Generator().manual_seed(1))


CASES = {
    "ce": (nn.CrossEntropyLoss, {}, (N, C), indices(N)),
    "ce ignored": (nn.CrossEntropyLoss, {}, (N, C), indices(N, ignored=True)),
    "ce weights": (nn.CrossEntropyLoss, {"weight": WEIGHT}, (N, C), indices(N)),
    "ce weights ignored": (nn.CrossEntropyLoss, {"weight": WEIGHT}, (N, C), indices(N, ignored=True)),
    "ce smoothing": (nn.CrossEntropyLoss, {"label_smoothing": 0.3}, (N, C), indices(N)),
    "ce smoothing ignored": (nn.CrossEntropyLoss, {"label_smoothing": 0.3}, (N, C), indices(N, ignored=True)),
    "ce all": (
        nn.CrossEntropyLoss,
        {"label_smoothing": 0.3, "weight": WEIGHT, "ignore_index": 2},
        (N, C),
        torch.tensor([0, 2, 1, 0]),
    ),
    "ce sequence": (nn.CrossEntropyLoss, {"weight": WEIGHT}, (N, C, 2), indices(N, 2, ignored=True)),
    "ce pixels": (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, (N, C, 2, 2), indices(N, 2, 2, ignored=True)),
    "ce soft": (nn.CrossEntropyLoss, {}, (N, C), draw(N, C).softmax(1)),
    "ce soft weights smoothing": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.2},
        (N, C),
        draw(N, C).softmax(1),
    ),
    "ce soft sequence": (nn.CrossEntropyLoss, {"weight": WEIGHT}, (N, C, 2), draw(N, C, 2).softmax(1)),
    "mse": (nn.MSELoss, {}, (N, C), draw(N, C, seed=2)),
    "mse vector": (nn.MSELoss, {}, (N,), draw(N, seed=2)),
    "mse images": (nn.MSELoss, {}, (N, C, 2), draw(N, C, 2, seed=2)),
    "bce": (nn.BCEWithLogitsLoss, {}, (N, C), draw(N, C).sigmoid()),
    "bce hard": (nn.BCEWithLogitsLoss, {}, (N, C), (draw(N, C) > 0).double()),
    "bce weights": (
        nn.BCEWithLogitsLoss,
        {"weight": WEIGHT, "pos_weight": WEIGHT.flip(0)},
        (N, C),
        draw(N, C).sigmoid(),
    ),
    "poisson": (nn.PoissonNLLLoss, {}, (N, C), counts(N, C)),
    "poisson full": (nn.PoissonNLLLoss, {"full": True}, (N, C, 2), counts(N, C, 2).double()),
    "poisson vector": (nn.PoissonNLLLoss, {}, (N,), counts(N)),
}


@pytest.fixture(params=CASES)
def case(request):
    """(torch class, options, output, targets)"""
    cls, options, shape, y = CASES[request.param]
    return cls, options, draw(*shape, seed=5), y


def hessian(loss_fn, f, y):
    """d^2 loss / d f^2 by double backward, [f.numel(), f.numel()]."""
    f = f.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss_fn(f, y), f, create_graph=True)
    return torch.stack([torch.autograd.grad(e, f, retain_graph=True)[0].reshape(-1) for e in g.reshape(-1)])


def outer(vectors, n):
    """sum_v s_v[n] s_v[n]^T as a matrix over all elements of the output: block-diagonal in the samples."""
    rows = torch.stack(vectors).reshape(len(vectors), n, -1).transpose(0, 1)  # [N, V, elements]
    return torch.block_diag(*(r.T @ r for r in rows)) if n > 1 else rows[0].T @ rows[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_gradient_and_hessian_are_torchs(case, reduction):
    cls, options, f, y = case
    module = cls(reduction=reduction, **options)
    loss = Loss.from_torch(module)
    a = 1 / loss.normalizer(f, y)
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(leaf, y), leaf)
    torch.testing.assert_close(loss(f, y), module(f, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(a * loss.sample_losses(f, y).sum(), module(f, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(a * loss.gradient(f, y), gradient, rtol=1e-10, atol=1e-14)
    H = hessian(module, f, y)
    u = draw(2, *f.shape, seed=9)
    product = a * loss.hessian_product(f, y, u).flatten(1)
    torch.testing.assert_close(product, u.flatten(1) @ H, rtol=1e-10, atol=1e-14)
    root = list(loss.hessian_root(f, y))
    assert len(root) == loss.root_columns(f)
    torch.testing.assert_close(a * outer(root, len(f)), H, rtol=1e-10, atol=1e-14)


def test_sample_losses_are_the_unreduced_sums(case):
    cls, options, f, y = case
    unreduced = cls(reduction="none", **options)(f, y)
    expected = unreduced.reshape(len(f), -1).sum(1)
    torch.testing.assert_close(Loss.from_torch(cls(**options)).sample_losses(f, y), expected, rtol=1e-12, atol=0)


def test_batchmean_divides_by_the_number_of_samples(case):
    cls, options, f, y = case
    ours = {
        nn.CrossEntropyLoss: CrossEntropy,
        nn.MSELoss: MSE,
        nn.BCEWithLogitsLoss: BCEWithLogits,
        nn.PoissonNLLLoss: PoissonNLL,
    }[cls]
    loss = ours(reduction="batchmean", **options)
    torch.testing.assert_close(loss(f, y), loss.sample_losses(f, y).sum() / len(f), rtol=1e-12, atol=0)
    assert loss.normalizer(f, y) == len(f)


def test_sampled_gradients_estimate_the_hessian(case):
    """The mean over draws is H within five standard errors, element by element; one call's samples carry the 1 / V."""
    cls, options, f, y = case
    if f.dim() > 2:
        f, y = f[:2], y[:2]  # fewer elements, as many draws
    loss = Loss.from_torch(cls(**options))
    expected = hessian(cls(reduction="sum", **options), f, y)
    blocks = torch.block_diag(*[torch.ones(f[0].numel(), f[0].numel())] * len(f)).bool()
    generator = torch.Generator().manual_seed(0)
    draws = 6000
    rows = torch.stack(list(loss.sampled_gradients(f, y, draws, generator))).flatten(1) * draws**0.5
    products = rows.unsqueeze(2) * rows.unsqueeze(1)
    error = products.std(0) / draws**0.5
    off = (products.mean(0) - expected).abs()
    assert (off <= 5 * error + 1e-12)[blocks].all()


def test_sampled_gradients_follow_the_generator(case):
    cls, options, f, y = case
    loss = Loss.from_torch(cls(**options))
    before = torch.get_rng_state()
    one, two = (list(loss.sampled_gradients(f, y, 2, torch.Generator().manual_seed(3))) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_multiples_and_sums(reduction):
    f, y = draw(N, C), draw(N, C, seed=1).sigmoid()
    squares, bits = nn.MSELoss(reduction=reduction), nn.BCEWithLogitsLoss(reduction=reduction)
    loss = 2 * Loss.from_torch(squares) + Loss.from_torch(bits) * 0.5

    def both(f, y):
        return 2 * squares(f, y) + 0.5 * bits(f, y)

    a = 1 / loss.normalizer(f, y)
    leaf = f.clone().requires_grad_()
    torch.testing.assert_close(loss(f, y), both(f, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(a * loss.gradient(f, y), torch.autograd.grad(both(leaf, y), leaf)[0], rtol=1e-12, atol=0)
    H = hessian(both, f, y)
    torch.testing.assert_close(a * outer(list(loss.hessian_root(f, y)), N), H, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(a * loss.hessian_product(f, y, f).reshape(-1), H @ f.reshape(-1), rtol=1e-12, atol=1e-14)
    assert len(list(loss.hessian_root(f, y))) == loss.root_columns(f)
    loss.check(f, y)


def test_sampled_gradients_of_a_sum_have_no_cross_terms():
    f, y = draw(2, C), draw(2, C, seed=1).sigmoid()
    loss = MSE(reduction="sum") + BCEWithLogits(reduction="sum")
    draws = 6000
    rows = torch.stack(list(loss.sampled_gradients(f, y, draws, torch.Generator().manual_seed(0)))) * draws**0.5
    products = rows[:, 0].unsqueeze(2) * rows[:, 0].unsqueeze(1)
    expected = hessian(loss, f, y)[:C, :C]
    assert ((products.mean(0) - expected).abs() <= 5 * products.std(0) / draws**0.5).all()


class Cubic(Loss):
    """A user's own loss, given by its values alone; it couples the elements of a sample."""

    def sample_losses(self, f, y):
        return (f - y).square().sum(1).square()


def test_a_loss_given_by_its_values_alone():
    f, y = draw(N, C), draw(N, C, seed=1)
    loss = Cubic()
    H = N * hessian(loss, f, y)
    leaf = f.clone().requires_grad_()
    torch.testing.assert_close(loss.gradient(f, y), N * torch.autograd.grad(loss(leaf, y), leaf)[0])
    u = draw(2, N, C, seed=3)
    torch.testing.assert_close(loss.hessian_product(f, y, u).flatten(1), u.flatten(1) @ H)
    root = list(loss.hessian_root(f, y))
    assert len(root) == loss.root_columns(f)
    torch.testing.assert_close(outer(root, N), H)
    assert loss.normalizer(f, y) == N
    with pytest.raises(NotImplementedError, match="Cubic does not say how to draw labels"):
        loss.sampled_gradients(f, y, 1, torch.Generator())


def test_a_loss_linear_in_the_output_has_no_curvature():
    class Linear(Loss):
        def sample_losses(self, f, y):
            return (f * y).sum(1)

    f = draw(N, C)
    assert torch.equal(Linear().hessian_product(f, f, f), torch.zeros_like(f))


def test_a_loss_that_is_not_convex_has_no_root():
    class Concave(Loss):
        def sample_losses(self, f, y):
            return -(f - y).square().sum(1)

    with pytest.raises(ValueError, match="the output-Hessian has the eigenvalue -2; expected a loss that is convex"):
        Concave().hessian_root(draw(N, C), draw(N, C))


def test_an_opaque_loss_is_one_coupled_sample():
    f, y = draw(N, C), draw(N, C, seed=1)
    loss = Opaque(lambda f, y: (f - y).square().sum().sqrt())
    torch.testing.assert_close(loss.hessian_product(f, y, y).reshape(-1), hessian(loss, f, y) @ y.reshape(-1))
    assert loss.normalizer(f, y) == 1
    for method in (loss.root_columns, lambda f: loss.hessian_root(f, y)):
        with pytest.raises(NotImplementedError, match="may couple samples"):
            method(f)
    with pytest.raises(ValueError, match=r"the loss returned a tensor of shape \(4, 3\); expected a tensor with one"):
        Opaque(lambda f, y: f - y)(f, y)
    with pytest.raises(ValueError, match="the loss returned float"):
        Opaque(lambda f, y: 1.0)(f, y)
    with pytest.raises(TypeError, match="loss_fn is a int; expected"):
        Opaque(3)


def test_the_root_of_a_confident_softmax_is_finite_and_exact():
    """Probabilities down to underflow: products of tails vanish long before their quotients do."""
    f = torch.tensor([[0.0, -40.0, -60.0, -95.0], [200.0, 0.0, -200.0, 0.0]])
    y = torch.zeros(2, dtype=torch.int64)
    loss = CrossEntropy()
    rows = torch.stack(list(loss.hessian_root(f, y)))
    p = f.double().softmax(1)
    others = p @ (1 - torch.eye(4, dtype=p.dtype))  # 1 - p without the cancellation
    expected = -p.unsqueeze(2) * p.unsqueeze(1)
    expected.diagonal(dim1=1, dim2=2).copy_(p * others)
    found = torch.einsum("vnc,vnd->ncd", rows.double(), rows.double())
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-30)


def test_half_precision_outputs_are_taken_in_single():
    f, y = draw(N, C).bfloat16(), indices(N)
    loss = CrossEntropy()
    assert loss.gradient(f, y).dtype == torch.float32
    assert next(iter(loss.hessian_root(f, y))).dtype == torch.float32


def test_from_torch_keeps_a_loss_and_every_option():
    loss = CrossEntropy()
    assert Loss.from_torch(loss) is loss
    found = Loss.from_torch(nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.2, reduction="sum"))
    assert (found.ignore_index, found.label_smoothing, found.reduction) == (1, 0.2, "sum")


def test_unknown_losses_are_refused():
    class Changed(nn.MSELoss):
        def forward(self, f, y):
            return super().forward(f, y) + f.mean()

    for unknown in (nn.CTCLoss(), Changed(), lambda f, y: f.sum()):
        with pytest.raises(TypeError, match="is not one that paraboloid knows; expected one of"):
            Loss.from_torch(unknown)
    with pytest.raises(ValueError, match="reduction is 'none'; expected one of"):
        Loss.from_torch(nn.MSELoss(reduction="none"))


F, Y = draw(N, C), indices(N)
ERRORS = [
    (CrossEntropy(), torch.zeros(()), Y, "axis 0 to be the N >= 1 samples"),
    (CrossEntropy(), F[:0], Y[:0], "axis 0 to be the N >= 1 samples"),
    (CrossEntropy(), F, Y[:3], "the output has 4 samples but the targets have shape"),
    (CrossEntropy(), F[:, 0], Y, r"needs outputs \[N, classes, ...\]; found shape \(4,\)"),
    (CrossEntropy(), F, F[:, :2], "targets have dtype torch.float64"),
    (CrossEntropy(), F, Y > 0, "targets have dtype torch.bool"),
    (CrossEntropy(), F, Y.unsqueeze(1), r"targets have shape \(4, 1\) for outputs \(4, 3\); expected \(4,\)"),
    (CrossEntropy(), F, Y + 10, "target 1[0-2] at index 0 is out of range; expected class indices 0..2 for 3 outputs"),
    (CrossEntropy(), draw(N, C, 2), indices(N, 2) - 5, r"target -\d at index \[0, 0\] is out of range"),
    (CrossEntropy(WEIGHT[:2]), F, Y, "class weights have length 2; expected 3"),
    (MSE(), F, F[:, :2], r"MSE needs targets of the output's shape \(4, 3\); found \(4, 2\)"),
    (MSE(), F, F.long(), "MSE needs floating-point targets; found torch.int64"),
    (BCEWithLogits(), F, F.abs() + 1, r"needs targets in \[0, 1\]; found"),
    (CrossEntropy(-WEIGHT), F, Y, "weight has the entry -3; expected none below zero"),
    (CrossEntropy(), F, F, "are probabilities; found -.*, expected none below zero"),
    (BCEWithLogits(pos_weight=-WEIGHT), F, F.sigmoid(), "pos_weight has the entry -3; expected none below zero"),
    (PoissonNLL(), F, F[:, :2], r"needs counts of the output's shape \(4, 3\); found \(4, 2\)"),
    (PoissonNLL(), F, -F.abs(), "needs counts >= 0; found -"),
    (PoissonNLL(log_input=False), F, counts(N, C), "needs positive rates; found the output -"),
    (2 * MSE(), F, F[:, :2], "MSE needs targets of the output's shape"),
    (MSE() + MSE(), F, F[:, :2], "MSE needs targets of the output's shape"),
]


@pytest.mark.parametrize("loss, f, y, message", ERRORS, ids=[e[3][:30] for e in ERRORS])
def test_targets_that_do_not_fit(loss, f, y, message):
    with pytest.raises(ValueError, match=message):
        loss.check(f, y)


def test_ignored_targets_may_be_out_of_range():
    CrossEntropy(ignore_index=255).check(F, torch.tensor([0, 255, 1, 2]))


def test_a_batch_without_targets():
    with pytest.raises(NoTargets, match="every target is ignored"):
        CrossEntropy().normalizer(F, torch.full((N,), -100))
    with pytest.raises(NoTargets, match="every target is ignored"):
        CrossEntropy(torch.tensor([0.0, 0.0, 1.0])).normalizer(F, torch.tensor([0, 1, 0, 1]))


def test_algebra_errors():
    with pytest.raises(ValueError, match=r"a loss is multiplied by -1\.0; expected a positive number"):
        -1 * MSE()
    with pytest.raises(TypeError):
        MSE() + 1


def test_curvature_keeps_its_digits_where_a_prediction_is_sure():
    """float32 against float64: 1 - p has none left where p rounds to 1."""
    f = torch.tensor([[30.0, 0.0, -3.0, 2.0], [-1.0, 0.0, 25.0, 1.0], [0.5, 0.0, 0.3, 1.0]], dtype=torch.float64)
    u = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 2, 1])
    for loss, target in ((CrossEntropy(), y), (BCEWithLogits(), (f > 0).to(f))):
        want = loss.curvature_product(f, target, u)
        single = target if target.dtype == torch.int64 else target.float()
        again = loss.curvature_at(f.float(), single)
        for found in (loss.curvature_product(f.float(), single, u.float()), again(u.float())):
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


def test_curvature_of_what_a_subclass_overrides():
    """What is kept for many products is what one product would take: of the subclass's own definition."""

    class Doubled(CrossEntropy):
        def hessian_product(self, f, y, u):
            return 2 * super().hessian_product(f, y, u)

    class Damped(CrossEntropy):
        def curvature_product(self, f, y, u):
            return super().curvature_product(f, y, u) + u

    generator = torch.Generator().manual_seed(0)
    f, u = (torch.randn(*shape, 4, generator=generator, dtype=torch.float64) for shape in ((3,), (5, 3)))
    y = torch.tensor([0, 2, -100])
    weighted = CrossEntropy(weight=torch.tensor([0.5, 2.0, 1.0, 0.0]).double(), label_smoothing=0.1)
    for loss in (Doubled(), Damped(), 3 * CrossEntropy(), CrossEntropy() + CrossEntropy(), weighted):
        torch.testing.assert_close(loss.curvature_at(f, y)(u), loss.curvature_product(f, y, u))
        torch.testing.assert_close(loss.curvature_at(f, y)(u[0]), loss.curvature_product(f, y, u[:1])[0])
