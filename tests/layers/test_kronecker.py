"""Kronecker factors of the layers against their definitions, written out."""

import oracle
import pytest
import torch
import torch.nn.functional as F
from layers.cases import CASES, Around, make
from layers.test_rules import SUM, target
from oracle import close
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call

WITHOUT = {  # case -> what its weight is to the parameter
    "rows of a grouped kernel": "a slice that cuts through groups",
    "joined tables": "a lookup in two tables at once",
    "stretched matrices and vectors": "one row used as three",
    "a turned and stretched matrix": "the same of the transposed one",
    "a copy, and a copy changed in place": "a product of two parameters",
}


def kflr(model, inputs, y, loss=SUM, sharing="expand"):
    return pb.statistics(model, loss, (inputs, y), pb.quantities.KFAC("exact", sharing=sharing))["kflr"]


def double(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def roots_at(f, zs):
    """Gradients of every output element of the sample at zs, for a squared error: [V *z] times sqrt 2."""
    cotangents = []
    for j in range(f[0].numel()):
        v = torch.zeros_like(f)
        v.flatten(1)[:, j] = 2**0.5
        cotangents.append(torch.autograd.grad(f, zs, v, retain_graph=True))
    return [torch.stack(column) for column in zip(*cotangents, strict=True)]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_every_layer_has_factors(name, sharing):
    model, inputs = make(name)
    y = target(model, inputs)
    if name in WITHOUT:
        with pytest.warns(UserWarning, match="no Kronecker factors"):
            kflr(model, inputs, y, sharing=sharing)
        return
    for (k, p), kron in zip(model.named_parameters(), kflr(model, inputs, y, sharing=sharing).values(), strict=True):
        block = kron.to_dense()
        assert block.shape == (p.numel(), p.numel()), k
        close(block, block.T, k)
        assert torch.linalg.eigvalsh(block)[0] > -1e-9 * block.trace() - 1e-12, k


@pytest.mark.parametrize(
    "name",
    ["rms_norm", "instance_norm2d", "instance_norm2d, running statistics", "batch_norm1d", "layer scale by view",
     "prelu", "prelu, a slope for each channel", "weight vector", "learned query",
     "attention, learned key and value", "lstm, learned state", "shift by a turned parameter"],
)  # fmt: skip
def test_blocks_of_bias_like_parameters_are_exact(name):
    model, inputs = make(name)
    y = target(model, inputs)
    params = dict(model.named_parameters())
    blocks = oracle.ggn_blocks(SUM, call(model, inputs), y, params)
    for k, kron in kflr(model, inputs, y).items():
        if kron.right.shape == (1, 1) and kron.left.shape[0] == params[k].numel():
            close(kron.to_dense(), blocks[k], k)


ONE_POSITION = {
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(3, 2, (2, 3), stride=2), draw(1, 3, 1, 1)),
    "conv_transpose1d, groups": (lambda: nn.ConvTranspose1d(4, 2, 2, groups=2), draw(1, 4, 1)),
    "bilinear": (lambda: nn.Bilinear(3, 3, 2), draw(1, 3)),
    "embedding_bag": (lambda: nn.EmbeddingBag(5, 3), torch.tensor([[2]])),
    "rnn": (lambda: nn.RNN(3, 2, batch_first=True), draw(1, 1, 3)),
    "gru": (lambda: nn.GRU(3, 2, batch_first=True), draw(1, 1, 3)),
    "lstm": (lambda: nn.LSTM(3, 2, batch_first=True, proj_size=1), draw(1, 1, 3)),
}


@pytest.mark.parametrize("name", ONE_POSITION)
def test_one_datum_at_one_position_is_exact(name):
    build, x = ONE_POSITION[name]

    def forward(m, x):
        z = m.layer(x, x) if name == "bilinear" else m.layer(x)
        return (z[0] if isinstance(z, tuple) else z).flatten(1)

    model = double(lambda: Around(build(), forward))
    params = dict(model.named_parameters())
    y = torch.zeros_like(model(x))
    blocks = oracle.ggn_blocks(SUM, model(x), y, params)
    for k, kron in kflr(model, x, y).items():
        close(kron.to_dense(), blocks[k], k)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_transposed_convolution(sharing):
    """left over `in` from the inputs; right over `out k` from the unfolded gradients: [in, out / groups, k]."""
    model = double(lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, (3, 2), 2, 1, groups=2), nn.Tanh()))
    x = draw(3, 4, 2, 3)
    z = model[0](x)
    f = z.tanh()
    (g,) = roots_at(f, (z,))
    V, N = g.shape[:2]
    left = F.unfold(g.flatten(0, 1), (3, 2), padding=1, stride=2).view(V, N, 2, 18, -1)  # [V N G p T]
    right = x.flatten(2).unflatten(1, (2, 2))  # [N G q T]
    if sharing == "reduce":
        left, right = left.sum(-1, keepdim=True), right.mean(-1, keepdim=True)
    kron = kflr(model, x, torch.zeros_like(f), sharing=sharing)["0.weight"]
    close(kron.left, torch.einsum("ngit,ngjt->gij", right, right) / (N * right.shape[-1]))
    close(kron.right, torch.einsum("vngit,vngjt->gij", left, left))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_ragged_bags(mode, sharing):
    model = double(lambda: Around(nn.EmbeddingBag(5, 2, mode=mode), lambda m, i, o: m.layer(i, o).tanh()))
    idx, offsets = torch.tensor([0, 3, 3, 1, 3, 0]), torch.tensor([0, 2, 2])  # bags of 2, 0 and 4
    bags = [[0, 3], [], [3, 1, 3, 0]]
    z = model.layer(idx, offsets)
    (g,) = roots_at(z.tanh(), (z,))  # [V N 2]
    kron = kflr(model, (idx, offsets), torch.zeros(3, 2).double(), sharing=sharing)["layer.weight"]
    left, right, count = torch.zeros(2, 2).double(), torch.zeros(5, 5).double(), 0
    for n, bag in enumerate(bags):
        share = 1 / max(len(bag), 1) if mode == "mean" else 1
        rows = F.one_hot(torch.tensor(bag, dtype=torch.long), 5).double()
        ls = [share * g[:, n]] * len(bag)
        if sharing == "reduce":
            rows, ls = rows.sum(0, keepdim=True) / max(len(bag), 1), [sum(ls)] if bag else []
        right += rows.T @ rows
        left += sum((v.T @ v for v in ls), torch.zeros(2, 2).double())
        count += len(bag) if sharing == "expand" else 1
    close(kron.left if kron.left.dim() == 2 else kron.left.diag(), right / count)
    close(kron.right, left)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_time_steps_of_a_recurrent_layer_are_positions(sharing):
    model = double(lambda: Around(nn.RNN(3, 4, batch_first=True), lambda m, x: m.layer(x)[0]))
    x, w = draw(2, 3, 3), dict(model.layer.named_parameters())
    h, zs, hs = torch.zeros(2, 4).double(), [], []
    for step in x.unbind(1):
        hs.append(h)
        zs.append(F.linear(step, w["weight_ih_l0"], w["bias_ih_l0"]) + F.linear(h, w["weight_hh_l0"], w["bias_hh_l0"]))
        h = zs[-1].tanh()
    f = torch.stack([z.tanh() for z in zs], 1)
    left = torch.stack(roots_at(f, zs), 2)  # [V N T p]
    inputs = {"weight_ih_l0": x, "weight_hh_l0": torch.stack(hs, 1).detach()}
    if sharing == "reduce":
        left = left.sum(2, keepdim=True)
        inputs = {k: r.mean(1, keepdim=True) for k, r in inputs.items()}
    found = kflr(model, x, torch.zeros_like(f), sharing=sharing)
    for k, right in inputs.items():
        close(found[f"layer.{k}"].left, torch.einsum("vnti,vntj->ij", left, left), k)
        close(found[f"layer.{k}"].right, torch.einsum("nti,ntj->ij", right, right) / (2 * right.shape[1]), k)


def test_slices_of_a_cross_attention_sit_in_the_rows_of_their_matrix():
    """Queries come from one input, keys and values from another: the gradient factor is block-diagonal, and the input
    factor the mean over all positions."""
    model, (q, k) = make("attention, cross, keys as values")
    y = target(model, (q, k))
    kron = kflr(model, (q, k), y)["layer.in_proj_weight"]
    assert kron.left.shape == (12, 12)
    assert kron.left[:4, 4:].abs().max() == 0 < kron.left[4:8, 8:].abs().max()
    positions = torch.cat([q.flatten(0, 1), k.flatten(0, 1)])
    close(kron.right, positions.T @ positions / len(positions))

    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            w, b = model.layer.in_proj_weight.detach(), model.layer.in_proj_bias.detach()
            self.w, self.kv, self.b = nn.Parameter(w[:4].clone()), nn.Parameter(w[4:].clone()), b

        def forward(self, q, k):
            heads = lambda t: t.unflatten(-1, (2, 2)).transpose(1, 2)  # noqa: E731
            k, v = F.linear(k, self.kv, self.b[4:]).chunk(2, -1)
            z = F.scaled_dot_product_attention(heads(F.linear(q, self.w, self.b[:4])), heads(k), heads(v))
            out = model.layer.out_proj
            return F.linear(z.transpose(1, 2).flatten(2), out.weight.detach(), out.bias.detach())

    apart = kflr(Apart(), (q, k), y)
    close(kron.left[:4, :4], apart["w"].left)
    close(kron.left[4:, 4:], apart["kv"].left)


def test_joined_matrices_have_their_rows_of_the_factor():
    class Joined(nn.Module):
        def __init__(self, whole):
            super().__init__()
            self.a, self.b = nn.Parameter(whole[:3].clone()), nn.Parameter(whole[3:].clone())

        def forward(self, x):
            return F.linear(x, torch.cat([self.a, self.b])).tanh()

    model = double(lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh()))
    x = draw(3, 2, 4)
    y = torch.zeros(3, 2, 5).double()
    whole, joined = kflr(model, x, y)["0.weight"], kflr(Joined(model[0].weight.detach()), x, y)
    close(joined["a"].left, whole.left[:3, :3])
    close(joined["b"].left, whole.left[3:, 3:])
    close(joined["a"].right, whole.right)
    close(joined["b"].right, whole.right)


def test_an_embedding_of_part_of_a_table_counts_in_the_whole_table():
    model = double(lambda: Around(None, lambda m, x: F.embedding(x, m.w[2:]), w=torch.randn(6, 3)))
    kron = kflr(model, torch.tensor([[0, 1], [1, 3]]), torch.zeros(2, 2, 3).double())["w"]
    close(kron.left, torch.tensor([0, 0, 1, 2, 0, 1]).double() / 4)
