"""Further loss modules of torch: probabilities, log-probabilities, and whatever sums losses of elements."""

import copy

import pytest
import torch
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.losses import BCE, Loss

N, C = 5, 3
WEIGHT = torch.tensor([0.5, 1.5, 3.0]).double()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y = torch.tensor([0, 2, 1, 2, 0])
IGNORED = torch.tensor([0, -100, 1, 2, 0])
# name -> (module of a reduction, last layer, targets)
MODULES = {
    "l1": (nn.L1Loss, nn.Identity, draw(N, C, seed=1)),
    "smooth l1": (nn.SmoothL1Loss, nn.Identity, draw(N, C, seed=1)),
    "huber": (lambda **o: nn.HuberLoss(delta=0.7, **o), nn.Identity, draw(N, C, seed=1)),
    "soft margin": (nn.SoftMarginLoss, nn.Identity, draw(N, C, seed=1).sign()),
    "multi-label": (nn.MultiLabelSoftMarginLoss, nn.Identity, (draw(N, C, seed=1) > 0).double()),
    "bce": (nn.BCELoss, nn.Sigmoid, draw(N, C, seed=1).sigmoid()),
    "bce weighted": (lambda **o: nn.BCELoss(WEIGHT, **o), nn.Sigmoid, (draw(N, C, seed=1) > 0).double()),
    "nll": (nn.NLLLoss, lambda: nn.LogSoftmax(1), Y),
    "nll weighted, ignored": (lambda **o: nn.NLLLoss(WEIGHT, **o), lambda: nn.LogSoftmax(1), IGNORED),
    "kl": (nn.KLDivLoss, lambda: nn.LogSoftmax(1), draw(N, C, seed=1).softmax(1)),
    "kl logarithms": (
        lambda **o: nn.KLDivLoss(log_target=True, **o), lambda: nn.LogSoftmax(1), draw(N, C, seed=1).log_softmax(1)
    ),
}  # fmt: skip


def network(last):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, C), last()).double()


def unreduced(module, f, y):
    each = copy.copy(module)
    each.reduction = "none"
    return each(f, y).reshape(len(f), -1).sum(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODULES)
def test_first_order_quantities_and_the_hessian(name, reduction):
    build, last, y = MODULES[name]
    reduction = "batchmean" if (name.startswith("kl"), reduction) == (True, "mean") else reduction
    module, model, x = build(reduction=reduction), network(last), draw(N, 4, seed=2)
    f, params = model(x), dict(model.named_parameters())
    stats = pb.statistics(model, module, (x, y), ["grad", "sample_grads", "variance", "diag_hessian"])
    close(stats.loss, module(f, y).detach())
    each = unreduced(module, f, y)
    for k, p in params.items():
        close(stats["grad"][k], torch.autograd.grad(module(f, y), p, retain_graph=True)[0], k)
        for n in range(N):
            close(stats["sample_grads"][k][n], torch.autograd.grad(each[n], p, retain_graph=True)[0], k)
    flat = torch.autograd.grad(module(model(x), y), list(params.values()), create_graph=True)
    H = torch.stack([
        torch.cat([t.reshape(-1) for t in torch.autograd.grad(e, list(params.values()), retain_graph=True)])
        for g in flat for e in g.reshape(-1)
    ])  # fmt: skip
    close(pb.Hessian(model, module, (x, y)).to_dense(), H)
    close(torch.cat([t.reshape(-1) for t in stats["diag_hessian"].values()]), H.diagonal())


def pairs(weight=None):
    return [
        (network(lambda: nn.LogSoftmax(1)), nn.NLLLoss(weight, reduction=r), network(nn.Identity),
         nn.CrossEntropyLoss(weight, reduction=r))
        for r in ("mean", "sum")
    ]  # fmt: skip


@pytest.mark.parametrize("weight, y", [(None, Y), (WEIGHT, Y), (WEIGHT, IGNORED)])
def test_log_softmax_and_nll_are_cross_entropy(weight, y):
    """Every curvature: the GGN of the pair would be zero if the loss alone were asked."""
    x = draw(N, 4, seed=2)
    for model, nll, plain, ce in pairs(weight):
        names = ["diag_ggn", "kflr", "sqrt_ggn", "diag_hessian"]
        ours, theirs = (pb.statistics(m, loss, (x, y), names) for m, loss in ((model, nll), (plain, ce)))
        for k in dict(plain.named_parameters()):
            close(ours["diag_ggn"][k], theirs["diag_ggn"][k], k)
            close(ours["diag_hessian"][k], theirs["diag_hessian"][k], k)
            close(ours["kflr"][k].left, theirs["kflr"][k].left, k)
        close(pb.GGN(model, nll, (x, y)).to_dense(), pb.GGN(plain, ce, (x, y)).to_dense())
        close(pb.Hessian(model, nll, (x, y)).to_dense(), pb.Hessian(plain, ce, (x, y)).to_dense())
        close(pb.DiagonalGGN(model, nll, (x, y)).diagonal(), pb.DiagonalGGN(plain, ce, (x, y)).diagonal())
        labels = [pb.Fisher(m, loss, (x, y), samples=2, seed=3).to_dense() for m, loss in ((model, nll), (plain, ce))]
        close(*labels)


def test_kl_is_cross_entropy_with_soft_targets():
    x, y = draw(N, 4, seed=2), draw(N, C, seed=1).softmax(1)
    ours = pb.GGN(network(lambda: nn.LogSoftmax(1)), nn.KLDivLoss(reduction="batchmean"), (x, y)).to_dense()
    close(ours, pb.GGN(network(nn.Identity), nn.CrossEntropyLoss(), (x, y)).to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_second_derivative_of_bce_has_the_right_sign_near_its_ends(dtype):
    """torch 2.13's own is negative from a logit of 14 on in single precision."""
    logits = torch.tensor([-30.0, -17, -15, -3, 0, 3, 15, 17, 30], dtype=dtype).unsqueeze(1)
    f = logits.sigmoid()
    for y in (torch.zeros_like(f), torch.ones_like(f)):
        loss = BCE(reduction="sum")
        H = loss.hessian_product(f, y, torch.ones_like(f))
        assert torch.isfinite(H).all() and (H >= 0).all()
        torch.testing.assert_close(loss(f, y), nn.BCELoss(reduction="sum")(f, y))
        torch.testing.assert_close(loss.sample_losses(f, y).sum(), nn.BCELoss(reduction="sum")(f, y))
        inner = f[2:-2]
        exact = inner.double().square().reciprocal() if y[0] else (1 - inner.double()).square().reciprocal()
        torch.testing.assert_close(H[2:-2].double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("logit", [8.0, 16.0])
def test_the_hessian_of_bce_behind_a_saturated_sigmoid(logit):
    """p (1 - p) x x^T for either label, as with BCEWithLogitsLoss."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    nn.init.constant_(model[0].weight, logit)
    nn.init.zeros_(model[0].bias)
    x, p = torch.ones(1, 1).double(), torch.tensor(logit).double().sigmoid()
    found = pb.Hessian(model, nn.BCELoss(), (x, torch.ones_like(x))).to_dense()
    torch.testing.assert_close(found, torch.full((2, 2), float(p * (1 - p))).double(), rtol=1e-3, atol=1e-15)
    found = pb.Hessian(model, nn.BCELoss(), (x, torch.zeros_like(x))).to_dense()
    assert (found.diagonal() > -1e-12).all()  # a difference of numbers near one


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [8.0, 28.0, 31.0, 35.0, 60.0, 200.0, 800.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_of_bce_behind_any_sigmoid(dtype, bias, reduction, weight):
    """Those of the logits' loss, up to the rounding of numbers near one: from a logit of 28 on torch guards its
    gradient, which is no derivative of its loss any more, and from 37 on (float32: 17) f is one."""
    torch.manual_seed(0)
    model, options = nn.Sequential(nn.Linear(4, C), nn.Sigmoid()).to(dtype), {"reduction": reduction}
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([bias, -bias, 0]))
    x, y = 0.3 * draw(N, 4), (draw(N, C, seed=1) > 0).double()
    y[0] = torch.tensor([0.3, 1, 0.6])
    w = weight
    want = pb.Hessian(copy.deepcopy(model[0]).double(), nn.BCEWithLogitsLoss(w, **options), (x, y)).to_dense()
    loss, batch = nn.BCELoss(None if w is None else w.to(dtype), **options), (x.to(dtype), y.to(dtype))
    close_to = {"atol": 300 * torch.finfo(dtype).eps * float(want.abs().max()), "rtol": 0, "check_dtype": False}
    torch.testing.assert_close(pb.Hessian(model, loss, batch).to_dense(), want, **close_to)
    diagonal = pb.statistics(model, loss, batch, ["diag_hessian"])["diag_hessian"]
    torch.testing.assert_close(torch.cat([d.flatten() for d in diagonal.values()]), want.diagonal(), **close_to)
    f = model(batch[0]).detach()  # J^T H J with H = w (y / f^2 + (1 - y) / (1 - f)^2) and J = f (1 - f)
    inside = (f >= torch.finfo(dtype).tiny) & (f < 1)
    curved = inside * (y * (1 - f).square() + (1 - y) * f.square()) * (1 if w is None else w)
    ggn = pb.statistics(model, loss, batch, ["diag_ggn"])["diag_ggn"]["0.bias"]
    a = 1 if reduction == "sum" else 1 / f.numel()
    torch.testing.assert_close(ggn.double(), a * curved.double().sum(0), rtol=1e-5, atol=1e-7)


def test_bce_samples_labels_from_its_output():
    f = draw(N, C).sigmoid()
    loss, generator = BCE(WEIGHT), torch.Generator().manual_seed(0)
    rows = torch.stack(list(loss.sampled_gradients(f, f, 8000, generator))) * 8000**0.5
    square = rows.square()
    expected = WEIGHT / (f * (1 - f))
    assert ((square.mean(0) - expected).abs() < 5 * square.std(0) / 8000**0.5).all()


def test_a_piecewise_linear_loss_has_no_gauss_newton_matrix():
    model, x, y = network(nn.Identity), draw(N, 4), draw(N, C, seed=1)
    for make in (
        lambda: pb.statistics(model, nn.L1Loss(), (x, y), ["diag_ggn"]),
        lambda: pb.statistics(model, nn.L1Loss(), (x, y), ["kflr"]),
        lambda: pb.GGN(model, nn.L1Loss(), (x, y)) @ torch.ones(51).double(),
    ):
        with pytest.raises(NotImplementedError, match="L1Loss is piecewise linear, so that its curvature"):
            make()


def test_labels_cannot_be_sampled_without_a_predictive_distribution():
    with pytest.raises(NotImplementedError, match="TorchElementwise does not say how to draw labels"):
        pb.statistics(network(nn.Identity), nn.HuberLoss(), (draw(N, 4), draw(N, C, seed=1)), ["kfac"])


@pytest.mark.parametrize(
    "module, f, y, message",
    [
        (nn.NLLLoss(), draw(N, C), Y, r"NLL takes log-probabilities, .* found sums up to exp\(.*End the model with"),
        (nn.KLDivLoss(), draw(N, C), draw(N, C).softmax(1), "KLDiv takes log-probabilities"),
        (nn.NLLLoss(), draw(N, C).log_softmax(1), draw(N, C).softmax(1), "NLL needs int64 class indices; found"),
        (nn.NLLLoss(), draw(N, C).log_softmax(1), Y + 10, "is out of range; expected class indices 0..2"),
        (nn.BCELoss(), draw(N, C), draw(N, C).sigmoid(), r"BCE needs outputs in \[0, 1\]; found .* Logits belong to"),
        (nn.BCELoss(), draw(N, C).sigmoid(), draw(N, C), r"BCE needs targets in \[0, 1\]"),
        (nn.KLDivLoss(), draw(N, C).log_softmax(1), -draw(N, C).softmax(1), "KLDiv targets are probabilities; found -"),
        (nn.HuberLoss(), draw(N, C), draw(N, 1), "needs targets of the output's shape"),
    ],
)
def test_what_does_not_fit_is_refused(module, f, y, message):
    with pytest.raises(ValueError, match=message):
        Loss.from_torch(module).check(f, y)


CLASSES = [
    ("cross-entropy", nn.Identity, nn.CrossEntropyLoss), ("nll", lambda: nn.LogSoftmax(1), nn.NLLLoss),
]  # fmt: skip


@pytest.mark.parametrize("last, module", [c[1:] for c in CLASSES], ids=[c[0] for c in CLASSES])
def test_class_targets_of_uint8_are_indices_and_of_int32_refused(last, module):
    """torch's loss takes uint8, which as an index of the class weights would be a mask."""
    model, x, loss = network(last), draw(N, 4), module(weight=WEIGHT, ignore_index=1)
    wanted = ["grad", "diag_ggn", "diag_hessian"]
    short, long = (pb.statistics(model, loss, (x, y), wanted) for y in (Y.to(torch.uint8), Y))
    for quantity in wanted:
        for name, value in long[quantity].items():
            close(short[quantity][name], value)
    close(pb.GGN(model, loss, (x, Y.to(torch.uint8))).to_dense(), pb.GGN(model, loss, (x, Y)).to_dense())
    for call in (
        lambda y: pb.statistics(model, loss, (x, y), ["variance"]),
        lambda y: pb.GGN(model, loss, (x, y)).trace(),
        lambda y: pb.Hessian(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])]).diagonal(),
        lambda y: pb.laplace(model, loss, (x, y)),
    ):
        with pytest.raises(ValueError, match=r"class targets have dtype torch.int32; .*Convert them by `targets.long"):
            call(Y.int())


def test_hooks_on_the_module_are_not_called_by_its_loss():
    module, calls = nn.HuberLoss(), []
    module.register_forward_hook(lambda *a: calls.append(1))
    stats = pb.statistics(network(nn.Identity), module, (draw(N, 4), draw(N, C)), ["variance"])
    assert not calls and stats.loss > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_outputs_in_half_precision(name, dtype):
    build, last, y = MODULES[name]
    module, model, x = build(), network(last).to(dtype), draw(N, 4, seed=2).to(dtype)
    half = y.to(dtype) if y.is_floating_point() else y
    exact, wide = (lambda t: t.double() if t.is_floating_point() else t), copy.deepcopy(model).double()
    found = pb.statistics(model, module, (x, half), ["grad", "sample_grads"])
    expected = pb.statistics(wide, module, (exact(x), exact(half)), ["grad", "sample_grads"])
    for quantity in expected:
        for k, t in expected[quantity].items():
            error = (found[quantity][k].double() - t).norm()
            assert error < 20 * torch.finfo(dtype).eps * t.norm(), (quantity, k)


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_class_indices_of_bytes_are_class_indices(weight):
    torch.manual_seed(0)
    model, x = nn.Linear(4, C).double(), draw(N, 4)
    loss, quantities = nn.CrossEntropyLoss(weight), ["sample_grads", "diag_ggn", "kflr"]
    bytes_, longs = (pb.statistics(model, loss, (x, y), quantities) for y in (Y.byte(), Y))
    for name in ("weight", "bias"):
        close(bytes_["sample_grads"][name], longs["sample_grads"][name])
        close(bytes_["diag_ggn"][name], longs["diag_ggn"][name])
        close(bytes_["kflr"][name].left, longs["kflr"][name].left)
