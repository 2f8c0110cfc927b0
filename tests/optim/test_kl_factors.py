"""KL factors: their fixed point is the dense minimiser of the divergence, and each step is the written-out one."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.optim.curvature import due
from paraboloid.reductions.products import merge

LOSS = nn.CrossEntropyLoss()
OPTIMISERS = [pb.optim.KFAC, pb.optim.EKFAC]


def mlp(seed=0, inputs=5, hidden=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 3)).double()


def batch(N=24, seed=0, shape=(5,)):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, *shape, generator=g, dtype=torch.float64), torch.randint(3, (N,), generator=g)


def step(model, opt, x, y, loss=LOSS):
    opt.zero_grad()
    loss(model(x), y).backward()
    opt.step()


def standing(optimiser, model, loss=LOSS, **options):
    """An optimiser that measures and inverts in every step, keeps the last measurement alone, and does not move."""
    settings = {"lr": 0.0, "momentum": 0.0, "fisher": "empirical", "factor_decay": 0.0,
                "factor_interval": 1, "inverse_interval": 1, "kl_clip": None, "factors": "kl"}  # fmt: skip
    return optimiser(model, loss, **(settings | options))


def divergence(left, right, block):
    """tr((L (x) R)^-1 F) + log det (L (x) R): twice the Kullback-Leibler divergence, but for a constant."""
    whole = torch.kron(left.contiguous(), right.contiguous())
    return torch.linalg.solve(whole, block).trace() + torch.linalg.slogdet(whole).logabsdet


def nearest(block, p, q):
    """The Kronecker product of least divergence, by a general minimiser over Cholesky factors."""
    a, b = torch.eye(p, dtype=torch.float64), torch.eye(q, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    descent = torch.optim.LBFGS([a, b], max_iter=3000, tolerance_grad=1e-12, tolerance_change=0, history_size=60,
                                line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        descent.zero_grad()
        A, B = (t.tril() @ t.tril().T for t in (a, b))
        value = divergence(A, B, block)
        value.backward()
        return value

    descent.step(closure)
    return torch.kron(*(t.detach().tril() @ t.detach().tril().T for t in (a, b)))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_the_fixed_point_is_the_nearest_kronecker_product(optimiser):
    model, (x, _), loss = mlp(), batch(40), nn.MSELoss()
    y = x[:, :3].square()
    opt = standing(optimiser, model, loss, damping=1e-20)
    g = pb.statistics(model, loss, (x, y), ["sample_grads"])["sample_grads"]["0.weight"].flatten(1)
    for _ in range(40):
        step(model, opt, x, y, loss)
    block = g.T @ g / y.numel()
    kron = opt._blocks["0.weight"].kron
    want = nearest(block, 4, 5)
    torch.testing.assert_close(kron.to_dense(), want, rtol=1e-6, atol=1e-7 * float(want.abs().max()))
    plain = pb.statistics(model, loss, (x, y), ["kfac_empirical"])["kfac_empirical"]["0.weight"]
    assert divergence(kron.left, kron.right, block) < divergence(plain.left, plain.right, block) - 0.1


def sides(left, right, damping):
    """What weighs the next measurement: damped inverses with an average weight of one, written out."""
    pi = ((left.trace() / len(left)) / (right.trace() / len(right))).sqrt()
    inverses = [torch.linalg.inv(S + shift * torch.eye(len(S)).double()) for S, shift in
                ((left, pi * damping**0.5), (right, damping**0.5 / pi))]  # fmt: skip
    return [M / (M * S).sum() for M, S in zip(inverses, (left, right), strict=True)]


def vectors(model, x, y):
    """Layer inputs and the gradients of each sample's loss at the layers' outputs, [N q] and [N p]; plain autograd."""
    inputs, outputs = [], []
    hooks = [m.register_forward_hook(lambda m, a, z: (inputs.append(a[0]), outputs.append(z), z.retain_grad())[2])
             for m in model if isinstance(m, nn.Linear)]  # fmt: skip
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return [(z.grad.clone(), a.detach()) for z, a in zip(outputs, inputs, strict=True)]


def test_running_factors_by_hand():
    model = mlp()
    opt = pb.optim.KFAC(model, LOSS, lr=0.05, damping=0.1, momentum=0.0, fisher="empirical", factors="kl",
                        factor_decay=0.7, factor_interval=2, inverse_interval=4, kl_clip=None)  # fmt: skip
    kept, metric, count = {}, {}, 0
    for t in range(9):
        x, y = batch(seed=t)
        if due(t, 2):
            count += 1
            w = max(1 / count, 0.3)
            for name, (l, r) in zip(("0.weight", "2.weight"), vectors(model, x, y), strict=True):
                left_weight = right_weight = torch.ones(len(x), dtype=torch.float64)
                if name in metric:
                    left_weight = ((r @ metric[name][1]) * r).sum(1)
                    right_weight = ((l @ metric[name][0]) * l).sum(1)
                left = (left_weight[:, None] * l).T @ l / len(x)
                right = (right_weight[:, None] * r).T @ r / right_weight.sum()
                before = kept.get(name, (left, right))
                kept[name] = tuple(torch.lerp(b, n, w) for b, n in zip(before, (left, right), strict=True))
        if due(t, 4):
            metric = {name: sides(*pair, 0.1) for name, pair in kept.items()}
        step(model, opt, x, y)
        for name, (left, right) in kept.items():
            torch.testing.assert_close(opt._blocks[name].kron.left, left, rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(opt._blocks[name].kron.right, right, rtol=1e-9, atol=1e-13)


class Shared(nn.Module):
    """Convolutions with groups, a weight used at several positions and twice, a table that is looked up."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.conv = nn.Conv1d(4, 4, 3, groups=2, padding=1)
        self.one, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.conv(self.table(x).mT).mT
        h = torch.tanh(self.one(torch.tanh(self.one(h))))
        return self.last(h.mean(1))


def shared_batch(N=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(7, (N, 5), generator=g), torch.randint(3, (N,), generator=g)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_convolutions_and_shared_weights_are_further_vectors(sharing):
    """Written out from the outer products themselves."""
    torch.manual_seed(0)
    model, (x, y) = Shared().double(), shared_batch()
    opt = standing(pb.optim.KFAC, model, damping=0.05, sharing=sharing)
    step(model, opt, x, y)
    metrics = {name: block.metric for name, block in opt._blocks.items()}
    seen = {}
    with pb.record(model) as tape:
        output = model(x)
    gradient = torch.autograd.grad(nn.functional.cross_entropy(output, y, reduction="sum"), output, retain_graph=True)[
        0
    ]
    for name, o in tape.pull(output, gradient[None]).items():
        seen[name] = o
    step(model, opt, x, y)
    for name in ("table.weight", "conv.weight", "one.weight", "last.weight"):
        (use,) = merge(seen[name]).products
        left, right = use.left[0], use.inputs()  # [N G T p], [N G T q]
        if sharing == "reduce":
            left, right = left.sum(2, keepdim=True), use.mean_inputs().unsqueeze(2)
        rows, columns = (side.dense() for side in metrics[name].sides)
        of_left, of_right = (columns, rows) if use.flip else (rows, columns)
        by_left = torch.einsum("ngtp,gpr,ngtr->ngt", left, of_left, left)
        by_right = torch.einsum("ngtq,gqr,ngtr->ngt", right, of_right, right)
        want = [torch.einsum("ngt,ngtp,ngtr->gpr", by_right, left, left) / len(x),
                torch.einsum("ngt,ngtp,ngtr->gpr", by_left, right, right) / by_left.sum((0, 2))[:, None, None]]  # fmt: skip
        found = opt._blocks[name].kron.sides
        for side, expected in zip(found, want[::-1] if use.flip else want, strict=True):
            got = side.dense()
            expected = expected * torch.eye(len(expected[0])) if side.kind == "diagonal" else expected
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_accumulation_is_one_big_batch(optimiser, fisher):
    x, y = batch(24)
    one = mlp()
    parts = copy.deepcopy(one)
    options = {"factors": "kl", "fisher": fisher, "factor_interval": 1, "inverse_interval": 1, "lr": 0.05}
    a, b = optimiser(one, LOSS, **options), optimiser(parts, LOSS, **options)
    for _ in range(3):
        step(one, a, x, y)
        b.zero_grad()
        for part in (slice(0, 6), slice(6, 24)):
            (LOSS(parts(x[part]), y[part]) * (len(y[part]) / len(y))).backward()
        b.step()
    for p, q in zip(one.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_resumed_run_is_the_uninterrupted_one(optimiser):
    def make():
        model = mlp()
        return model, optimiser(model, LOSS, factors="kl", factor_interval=2, inverse_interval=3)

    (one, a), (other, b) = make(), make()
    for t in range(8):
        step(one, a, *batch(seed=t))
        if t == 4:
            file = io.BytesIO()
            torch.save({"opt": a.state_dict(), "model": one.state_dict()}, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
            other.load_state_dict(state["model"])
            b.load_state_dict(state["opt"])
        elif t > 4:
            step(other, b, *batch(seed=t))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_few_samples_in_wide_layers_are_weighted_by_their_rows():
    """Factors by fewer rows than they have columns agree with the matrices."""
    x, y = batch(3, shape=(40,))
    model = mlp(inputs=40, hidden=30)
    opt = standing(pb.optim.KFAC, model, damping=0.1)
    for _ in range(2):
        step(model, opt, x, y)
    block = opt._blocks["0.weight"]
    assert block.kron.sides[1].kind == "rows"
    (l, r), _ = vectors(model, x, y)
    plain = pb.statistics(model, LOSS, (x, y), ["kfac_empirical"])["kfac_empirical"]["0.weight"]
    M, R = sides(plain.left, plain.right, 0.1)
    w = ((l @ M) * l).sum(1)
    torch.testing.assert_close(block.kron.right, (w[:, None] * r).T @ r / w.sum(), rtol=1e-8, atol=1e-12)
    w = ((r @ R) * r).sum(1)
    torch.testing.assert_close(block.kron.left, (w[:, None] * l).T @ l / len(l), rtol=1e-8, atol=1e-14)


def test_other_eigenvalues_are_refused():
    for options in ({"measure_on": "half"}, {"factors": "near"}):
        with pytest.raises(ValueError, match="expected"):
            pb.optim.KFAC(mlp(), LOSS, **({"factors": "kl"} | options))
    model, (x, y) = mlp(), batch()
    opt = pb.optim.EKFAC(model, LOSS, factors="kl")
    LOSS(model(x), y).backward()
    with pytest.raises(ValueError, match="plain factors"):
        opt.step(measure_on=batch(seed=1))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_it_trains_untouched(optimiser):
    torch.manual_seed(0)
    model, (x, y) = Shared(), shared_batch(64)
    y = (x.float().mean(1) > 3).long()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = optimiser(model, LOSS, factors="kl")
        for _ in range(60):
            step(model, opt, x, y)
    assert float(LOSS(model(x), y).detach()) < 0.3
