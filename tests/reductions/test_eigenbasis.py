"""The eigenvalues of EKFAC: the diagonal of every exact block in its Kronecker eigenbasis."""

import losses_table
import models
import oracle
import pytest
import torch
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call
from paraboloid.passes.memory import GRADIENTS

WITHOUT_FACTORS = {"low rank", "reparametrised", "old style"}
CE = nn.CrossEntropyLoss()


def in_basis(form, block):
    """The diagonal of a dense block in the basis of an eigenform."""
    units = torch.eye(len(block), dtype=block.dtype)[: form.values.numel()]
    Q = form.restored(units[:, : form.values.numel()].reshape(-1, *form.values.shape))
    return (Q @ block * Q).sum(1).view(form.values.shape)


@pytest.mark.parametrize("name", [name for name in models.MODELS if name not in WITHOUT_FACTORS])
def test_the_scale_is_the_diagonal_of_the_exact_block(name):
    model, inputs = models.make(name)
    f = call(model, inputs)
    loss_fn, y = losses_table.make("ce", f)
    sharing = "expand" if len(name) % 2 else "reduce"
    krons = pb.statistics(model, loss_fn, (inputs, y), pb.quantities.KFAC("exact", sharing=sharing))["kflr"]
    forms = {k: kron.eigenform(k) for k, kron in krons.items()}
    quantity = pb.quantities.EigenScale(forms, "exact")
    params = dict(model.named_parameters())
    blocks = oracle.ggn_blocks(loss_fn, f, y, {k: params[k] for k in krons})
    size = max(b.abs().max().item() for b in blocks.values())
    for memory in (None, 1):
        scale = pb.statistics(model, loss_fn, (inputs, y), quantity, max_memory=memory)["eigen_scale"]
        for k, form in forms.items():
            torch.testing.assert_close(scale[k], in_basis(form, blocks[k]), rtol=1e-10, atol=1e-12 * size)
            assert scale[k].sum().item() == pytest.approx(blocks[k].trace().item(), rel=1e-10, abs=1e-12 * size)


@pytest.mark.parametrize("shape", [(3, 4, 40), (6, 3, 2), (2, 2, 9)])
def test_positions_first_or_last_and_groups(shape):
    """Many positions or few, against the block's size: each side is rotated before or after they are summed."""
    torch.manual_seed(0)
    out, channels, length = shape
    for groups in {1, channels if out % channels == 0 else 1}:
        model = nn.Sequential(nn.Conv1d(channels, out, 2, groups=groups), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        x, y = torch.randn(4, channels, length).double(), torch.tensor([0, 1, 2, 0])
        model.double()(x)
        krons = pb.statistics(model, CE, (x, y), "kflr")["kflr"]
        forms = {k: kron.eigenform(k) for k, kron in krons.items()}
        scale = pb.statistics(model, CE, (x, y), pb.quantities.EigenScale(forms, "exact"))["eigen_scale"]["0.weight"]
        block = oracle.ggn_blocks(CE, model(x), y, {"0.weight": model[0].weight})["0.weight"]
        torch.testing.assert_close(scale, in_basis(forms["0.weight"], block), rtol=1e-10, atol=1e-14)


def test_monte_carlo_and_empirical_scales():
    model, x = models.make("mlp")
    y = torch.tensor([0, 1, 2])
    krons = pb.statistics(model, CE, (x, y), "kflr")["kflr"]
    forms = {k: kron.eigenform(k) for k, kron in krons.items()}
    exact = pb.statistics(model, CE, (x, y), pb.quantities.EigenScale(forms, "exact"))["eigen_scale"]
    for samples in (1, 4):
        quantity = pb.quantities.EigenScale(forms, "mc", samples)
        draws = [pb.statistics(model, CE, (x, y), quantity, seed=s)["eigen_scale"] for s in range(200 // samples)]
        for k in forms:
            found = torch.stack([d[k] for d in draws])
            error = found.std(0) / len(found) ** 0.5
            assert ((found.mean(0) - exact[k]).abs() <= 5 * error + 1e-12).all(), (k, samples)
    g = oracle.sample_grads(CE, model(x), y, dict(model.named_parameters()))
    empirical = pb.statistics(model, CE, (x, y), pb.quantities.EigenScale(forms, "empirical"))["eigen_scale"]
    for k, form in forms.items():
        rows = g[k].flatten(1)
        torch.testing.assert_close(empirical[k], in_basis(form, rows.T @ rows / 3), rtol=1e-10, atol=1e-14)


def test_wrong_options():
    model, x = models.make("mlp")
    with pytest.raises(ValueError, match="fisher is 'true'; expected one of"):
        pb.quantities.EigenScale({}, "true")
    with pytest.raises(
        ValueError, match=r"parameter '0.weight' has no eigenbasis; expected one in forms, which has \[\]"
    ):
        pb.statistics(model, CE, (x, torch.tensor([0, 1, 2])), pb.quantities.EigenScale({}))
    model, x = models.make("low rank")
    one = torch.eye(1).double()
    forms = {
        k: pb.Kron(torch.eye(len(p)).double(), torch.eye(p[0].numel()).double() if p.dim() > 1 else one).eigenform()
        for k, p in model.named_parameters()
    }
    with pytest.raises(NotImplementedError, match="'eigen_scale': parameter 'a' has uses without Kronecker factors"):
        pb.statistics(model, nn.MSELoss(), (x, torch.zeros_like(model(x))), pb.quantities.EigenScale(forms, "exact"))


def test_rotated_inputs_are_kept_while_they_fit(monkeypatch):
    """Groups of single vectors on one recording: the inputs are rotated once, or anew where there is no room."""
    from paraboloid.reductions import eigenbasis

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(4 * 4, 3)).double()
    x, y = torch.randn(5, 2, 6).double(), torch.tensor([0, 1, 2, 0, 1])
    expected = pb.EKFAC(model, CE, (x, y), fisher="exact").to_dense()
    kept, original = [], eigenbasis.Turned.keep

    def counted(self, name, place, right, size):
        result = original(self, name, place, right, size)
        kept.append(result._kept is not None)
        assert self.room >= 0
        return result

    monkeypatch.setattr(eigenbasis.Turned, "keep", counted)
    monkeypatch.setattr(GRADIENTS, "default", 1)
    loader = [(x[:2], y[:2]), (x[2:], y[2:])]
    for data, memory, fits in (
        ((x, y), None, {True}), ((x, y), 4000, {True, False}), ((x, y), 1, {False}),
        (loader, None, {True}), (loader, 1, {False}),
    ):  # fmt: skip
        kept.clear()
        found = pb.EKFAC(model, CE, data, fisher="exact", max_memory=memory).to_dense()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
        assert set(kept) == fits
