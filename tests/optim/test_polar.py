"""Steps along polar factors, as long as Adam's, against singular value decompositions and torch's Adam."""

import pytest
import torch
from torch import nn

import paraboloid as pb

LOSS = nn.CrossEntropyLoss()
FREE = {"rise_factor": None}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5),
                         nn.Tanh(), nn.Linear(5, 4, bias=False), nn.Linear(4, 1), nn.Linear(1, 3)).double()  # fmt: skip


def gradients(model, steps=4):
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model.zero_grad()
        x = torch.randn(8, 2, 4, 4, generator=g, dtype=torch.float64)
        LOSS(model(x), torch.randint(3, (8,), generator=g)).backward()
        yield [p.grad.clone() for p in model.parameters()]


def adams(gradients, lr, mu):
    """Adam's last step after these gradients."""
    p = nn.Parameter(torch.zeros_like(gradients[0]))
    adam = torch.optim.Adam([p], lr=lr, betas=(mu, 0.999))
    for g in gradients:
        before, p.grad = p.detach().clone(), g
        adam.step()
    return p.detach() - before


def turned(gradients, mu, nesterov):
    M = torch.zeros_like(gradients[0])
    for g in gradients:
        M = mu * M + (1 - mu) * g
    U, S, V = torch.linalg.svd(mu * M + (1 - mu) * gradients[-1] if nesterov else M, full_matrices=False)
    return (U * (S / (S.square() + 1e-7 * S[0].square()).sqrt())) @ V


MATRICES = {"0.weight": "0.bias", "4.weight": "4.bias", "6.weight": None}


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("graft", ["adam", None])
@pytest.mark.parametrize("mu", [0.95, 0.6])
def test_a_step(nesterov, graft, mu):
    model = net()
    opt = pb.optim.Polar(model, LOSS, lr=0.1, momentum=mu, nesterov=nesterov, graft=graft, **FREE)
    names, seen = [name for name, _ in model.named_parameters()], []
    for each in gradients(model):
        seen.append(each)
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
    moved = {n: p.detach() - b for n, p, b in zip(names, model.parameters(), before, strict=True)}
    history = {n: [each[i] for each in seen] for i, n in enumerate(names)}
    for weight, bias in MATRICES.items():
        both = [weight] if bias is None else [weight, bias]
        joined = [torch.cat([history[n][t].flatten(1) if n == weight else history[n][t][:, None] for n in both], 1)
                  for t in range(len(seen))]  # fmt: skip
        D = turned(joined, mu, nesterov)
        length = torch.cat([adams(history[n], 0.1, mu).flatten() for n in both]).norm()
        want = -D * (length / D.norm() if graft else 0.1 * 0.2 * (D.numel() ** 0.5) / D.norm())
        got = torch.cat([moved[weight].flatten(1), *([] if bias is None else [moved[bias][:, None]])], 1)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    for name in set(names) - {*MATRICES, *MATRICES.values()}:  # norms, and matrices with a side of one
        torch.testing.assert_close(moved[name], adams(history[name], 0.1, mu), rtol=1e-6, atol=1e-10)
    kinds = {n: layer["structure"] for n, layer in opt.diagnostics()["layers"].items()}
    polar = {*MATRICES, *MATRICES.values()}
    assert kinds == {n: "polar" if n in polar else "adam" for n in names}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.words(tokens)))).transpose(1, 2)


def test_embeddings_and_what_is_tied_to_them_take_adams_step():
    torch.manual_seed(0)
    model = Tied()
    opt = pb.optim.Polar(model, LOSS, lr=0.01, **FREE)
    tokens = torch.randint(9, (5, 7), generator=torch.Generator().manual_seed(0))
    LOSS(model(tokens), tokens).backward()
    before, g = model.words.weight.detach().clone(), model.words.weight.grad.clone()
    opt.step()
    torch.testing.assert_close(model.words.weight.detach() - before, adams([g], 0.01, 0.95), rtol=1e-4, atol=1e-7)
    assert {k: v["structure"] for k, v in opt.diagnostics()["layers"].items()} == {
        "words.weight": "adam", "mix.weight": "polar", "mix.bias": "polar",
    }  # fmt: skip


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay(decoupled):
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    opt = pb.optim.Polar(model, LOSS, lr=0.1, weight_decay=0.3, decoupled=decoupled, **FREE)
    plain = pb.optim.Polar(twin, LOSS, lr=0.1, **FREE)
    for grads in gradients(model, 2):
        start = [p.detach().clone() for p in model.parameters()]
        for p, q, g in zip(model.parameters(), twin.parameters(), grads, strict=True):
            q.data.copy_(p.detach())
            q.grad = g if decoupled else g + 0.3 * p.detach()
        opt.step()
        plain.step()
        for p, q, s in zip(model.parameters(), twin.parameters(), start, strict=True):
            want = q.detach() - (0.1 * 0.3 * s if decoupled else 0)
            torch.testing.assert_close(p.detach(), want, rtol=1e-9, atol=1e-12)


def test_the_papers_step_is_one_argument_away():
    ends = []
    for options in ({"paper": True}, {"lr": 0.02, "graft": None, **FREE}, {}):
        model = net()
        opt = pb.optim.Polar(model, LOSS, **options)
        for _ in gradients(model, 3):
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_long_sides_and_what_is_refused():
    with pytest.warns(UserWarning, match=r"weights \['4.weight'\] have no side of at most max_factor=4 rows"):
        opt = pb.optim.Polar(net(), LOSS, max_factor=4)
    assert opt.diagnostics()["layers"]["4.weight"]["structure"] == "adam"
    with pytest.raises(ValueError, match="graft is 'sgd'"):
        pb.optim.Polar(net(), LOSS, graft="sgd")
    with pytest.raises(ValueError, match="lr is -1"):
        pb.optim.Polar(net(), LOSS, lr=-1)


def test_gradients_of_any_size_and_none():
    """A layer that nothing reaches stays; one whose gradient is tiny moves as far as Adam would."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    opt = pb.optim.Polar(model, LOSS, lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    for p, scale in zip(model.parameters(), (0.0, 0.0, 1e-25, 1e-25), strict=True):
        p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model[0].weight, before[0])
    model[2].weight.grad = model[2].bias.grad = None
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
