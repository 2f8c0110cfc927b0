"""Whole architectures: Kronecker factors by hooks on residual nets and transformers; Hugging Face's ways; adapters."""

from dataclasses import dataclass

import losses_table
import models
import oracle
import pytest
import torch
import torch.nn.functional as F
from layers.test_kronecker import double, draw
from oracle import close, positions
from torch import nn

import paraboloid as pb
from paraboloid.data.batches import call

CE = nn.CrossEntropyLoss()
DERIVED = {"reparametrised", "old style", "low rank"}  # weights that are computed: no factors


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["resnet", "vit", "encoder decoder", "transformer layer", "class token"])
def test_factors_of_residual_nets_and_transformers(name, sharing):
    model, inputs = models.make(name)
    f = call(model, inputs)
    loss_fn, y = losses_table.make("ce", f)
    a, N = oracle.factor(loss_fn, f, y), len(f)
    found = pb.statistics(model, loss_fn, (inputs, y), [pb.quantities.KFAC("exact", sharing=sharing), "kfac"])
    params, checked = dict(model.named_parameters()), 0
    for k, (right, left) in positions(model, inputs, loss_fn, y).items():
        if f"{k}.weight" not in params or k == "decoder":  # tied, tested elsewhere
            continue
        T = right.shape[2]
        if sharing == "reduce":
            right, left, T = right.mean(2, keepdim=True), left.sum(3, keepdim=True), 1
        kron, sampled = found["kflr"][f"{k}.weight"], found["kfac"][f"{k}.weight"]
        close(kron.left, a * torch.einsum("vngti,vngtj->ij", left, left), k)
        close(kron.right, torch.einsum("ngti,ngtj->ij", right, right) / (N * T), k)
        assert sampled.left.shape == kron.left.shape and torch.isfinite(sampled.left).all(), k
        checked += 1
    assert checked >= 2


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", models.MODELS)
def test_every_model_has_factors_or_says_whose_diagonal_is_kept(name, sharing):
    model, inputs = models.make(name)
    f = call(model, inputs)
    loss_fn, y = losses_table.make("mse", f)
    wanted = [pb.quantities.KFAC("exact", sharing=sharing), pb.quantities.KFAC("mc", sharing=sharing)]
    if name in DERIVED:
        with pytest.warns(UserWarning, match=r"parameter.* no Kronecker factors"):
            stats = pb.statistics(model, loss_fn, (inputs, y), wanted)
    else:
        stats = pb.statistics(model, loss_fn, (inputs, y), wanted)
    for krons in stats.values():
        for k, p in ((k, p) for k, p in model.named_parameters() if p.requires_grad):
            assert krons[k].to_dense().shape == (p.numel(), p.numel()), k


# --- Hugging Face's ways --------------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """Hugging Face's: a linear layer stored transposed, by addmm on [N T, D]."""

    def __init__(self, out, inside):
        super().__init__()
        self.weight, self.bias, self.out = nn.Parameter(torch.randn(inside, out)), nn.Parameter(torch.randn(out)), out

    def forward(self, x):
        z = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return z.view(*x.size()[:-1], self.out)


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None
    hidden_states: tuple = ()


class GPT2(nn.Module):
    def __init__(self, vocabulary=5, dim=4, heads=2, length=3):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.ln_1, self.ln_2, self.ln_f = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.c_attn, self.c_proj = Conv1D(3 * dim, dim), Conv1D(dim, dim)
        self.c_fc, self.c_out = Conv1D(6, dim), Conv1D(dim, 6)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("causal", torch.tril(torch.ones(length, length, dtype=torch.bool)))
        self.heads = heads

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        N, T = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(T).unsqueeze(0)
        x = self.wte(input_ids) + self.wpe(position_ids)
        q, k, v = self.c_attn(self.ln_1(x)).split(x.shape[-1], dim=2)
        q, k, v = (t.view(N, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.causal[:T, :T], torch.finfo(x.dtype).min)
        if attention_mask is not None:
            scores = scores + (1 - attention_mask[:, None, None].to(x)) * torch.finfo(x.dtype).min
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(N, T, -1))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return Output(self.lm_head(self.ln_f(x)), hidden_states=(x,))


def hf_batch(positions=False):
    torch.manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, (4, 3)),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]),
        "labels": torch.randint(5, (4, 3)),
    }
    batch["labels"][batch["attention_mask"] == 0] = -100
    return batch | ({"position_ids": torch.tensor([[0, 1, 2]] * 4)} if positions else {})


def logits(o):
    return o.logits.transpose(1, 2)  # [N, vocabulary, T], as CrossEntropyLoss wants


@pytest.mark.parametrize("given_positions", [False, True])
def test_a_hugging_face_language_model(given_positions):
    model, batch = double(GPT2), hf_batch(given_positions)
    stats = pb.statistics(model, CE, batch, ["sample_grads", "diag_ggn", "kfac"], output=logits)
    f = logits(model(**{k: v for k, v in batch.items() if k != "labels"}))
    params = dict(model.named_parameters())
    g = oracle.sample_grads(CE, f, batch["labels"], params)
    d = oracle.sample_diag_ggn(CE, f, batch["labels"], params)
    a = oracle.factor(CE, f, batch["labels"])
    for k in params:
        close(stats["sample_grads"][k], g[k], k)
        close(stats["diag_ggn"][k], a * d[k].sum(0), k)
    assert stats["kfac"]["c_fc.weight"].left.shape == (4, 4)  # stored [in, out]: left is the input factor
    assert stats["kfac"]["c_fc.weight"].right.shape == (6, 6)
    assert stats["kfac"]["wte.weight"].left.shape == (
        5,
        5,
    )  # tied: input factor of one use, gradient factor of the other


class Adapted(nn.Module):
    """A frozen layer with a low-rank path beside it, as adapters are usually written."""

    def __init__(self, base, rank=2, alpha=4.0):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.lora_A), self.lora_B) * self.scale


def test_adapters_on_a_frozen_model():
    def build():
        model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True), nn.Linear(4, 3))
        model.requires_grad_(False)
        model[0].linear1, model[0].linear2 = Adapted(model[0].linear1), Adapted(model[0].linear2)
        model[1] = Adapted(model[1])
        return model

    model, x = double(build), draw(4, 3, 4)
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert len(params) == 6
    y = torch.randint(3, (4, 3), generator=torch.Generator().manual_seed(0))
    loss = nn.CrossEntropyLoss()

    def classes_first(z):
        return z.transpose(1, 2)

    stats = pb.statistics(model, loss, (x, y), ["sample_grads", "variance", "diag_ggn", "kflr"], output=classes_first)
    g = oracle.sample_grads(loss, classes_first(model(x)), y, params)
    assert list(stats["sample_grads"]) == list(params)
    for k in params:
        close(stats["sample_grads"][k], g[k], k)
        kron = stats["kflr"][k]
        assert kron.left.shape == (params[k].shape[0],) * 2
        assert kron.right.shape == (params[k].shape[1],) * 2
    assert all(p.grad is None for p in model.parameters())
