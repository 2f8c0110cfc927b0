"""The truth, slowly and in plain view: loops of autograd in float64, one sample and one output at a time."""

import torch
import torch.nn.functional as F
from torch import nn

from paraboloid.data.batches import call


def unreduced(loss_fn, f, y):
    """l_n, one scalar per sample: the sum of the sample's elements under reduction="none"."""
    scale = getattr(loss_fn, "scale", 1.0)
    module = getattr(loss_fn, "module", loss_fn)
    kept = module.reduction
    module.reduction = "none"
    try:
        return [scale * module(f[n : n + 1], y[n : n + 1]).sum() for n in range(len(f))]
    finally:
        module.reduction = kept


def grads(value, params):
    found = torch.autograd.grad(value, list(params.values()), retain_graph=True, allow_unused=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in zip(params.items(), found, strict=True)}


def sample_grads(loss_fn, f, y, params):
    each = [grads(value, params) for value in unreduced(loss_fn, f, y)]
    return {k: torch.stack([g[k] for g in each]) for k in params}


def jacobians(f, params):
    """name -> [N, outputs of a sample, *shape]."""
    rows = [[grads(e, params) for e in f[n].flatten()] for n in range(len(f))]
    return {k: torch.stack([torch.stack([g[k] for g in row]) for row in rows]) for k in params}


def output_hessians(loss_fn, f, y):
    """[N, outputs, outputs], of the unreduced loss, by double backward."""
    result = []
    for n in range(len(f)):
        fn = f[n : n + 1].detach().requires_grad_()
        value = unreduced(loss_fn, fn, y[n : n + 1])[0]
        (g,) = torch.autograd.grad(value, fn, create_graph=True)
        rows = [torch.autograd.grad(e, fn, retain_graph=True, allow_unused=True)[0] for e in g.flatten()]
        zero = torch.zeros_like(fn)
        result.append(torch.stack([(zero if r is None else r).flatten() for r in rows]))
    return torch.stack(result)


def factor(loss_fn, f, y):
    """a = reduced loss / total of the unreduced loss."""
    total = sum(unreduced(loss_fn, f, y))
    return (loss_fn(f, y) / total).item()


def ggn_blocks(loss_fn, f, y, params):
    """name -> [D, D]: the GGN's diagonal block of each parameter, of the loss as reduced."""
    J, H, a = jacobians(f, params), output_hessians(loss_fn, f, y), factor(loss_fn, f, y)
    return {
        k: a * torch.einsum("nop,nor,nrq->pq", j.reshape(*j.shape[:2], -1), H, j.reshape(*j.shape[:2], -1))
        for k, j in J.items()
    }


def sample_diag_ggn(loss_fn, f, y, params):
    J, H = jacobians(f, params), output_hessians(loss_fn, f, y)
    return {
        k: torch.einsum("nop,nor,nrp->np", j.reshape(*j.shape[:2], -1), H, j.reshape(*j.shape[:2], -1)).view(
            len(f), *params[k].shape
        )
        for k, j in J.items()
    }


class Times(nn.Module):
    """scale * module, as a user would write it."""

    def __init__(self, scale, module):
        super().__init__()
        self.scale, self.module = scale, module

    def forward(self, f, y):
        return self.scale * self.module(f, y)


def close(actual, expected, what=""):
    """The bound of all tests against the oracle: relative 1e-10 in float64."""
    scale = expected.abs().max() + 1e-3  # entries that cancel to zero keep rounding errors
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=float(1e-11 * scale), msg=lambda m: f"{what}: {m}")


def positions(model, inputs, loss_fn, y, empirical=False):
    """module name -> (layer inputs [N T q] per group, pulled-back exact roots [V N T p] per group), by hooks.

    `empirical`: instead of the roots, the gradients of the unreduced losses at the given labels, V = 1.
    """
    seen = {}
    hooks = [
        m.register_forward_hook(lambda _, x, z, k=k: seen.update({k: (x[0].detach(), z)}))
        for k, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)
    ]  # fmt: skip
    f = call(model, inputs)
    for h in hooks:
        h.remove()
    H = output_hessians(loss_fn, f, y)
    values, vectors = torch.linalg.eigh(H)
    roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1)  # [N O V]
    if empirical:
        (g,) = torch.autograd.grad(sum(unreduced(loss_fn, f, y)), f, retain_graph=True)
        roots = g.flatten(1).unsqueeze(2)
    found = {}
    for k, m in model.named_modules():
        if k not in seen:
            continue
        x, z = seen[k]
        left = torch.stack([torch.autograd.grad(f, z, s.view_as(f), retain_graph=True)[0] for s in roots.unbind(2)])
        if isinstance(m, nn.Linear):
            right = x.reshape(len(x), 1, -1, x.shape[-1])
            left = left.reshape(len(left), len(x), 1, -1, left.shape[-1])
        else:
            assert m.padding_mode == "zeros"
            assert m.padding != "same"
            right = F.unfold(x, m.kernel_size, m.dilation, m.padding, m.stride).unflatten(1, (m.groups, -1)).mT
            left = left.flatten(3).unflatten(2, (m.groups, -1)).mT
        found[k] = right, left
    return found


def trainable(model):
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def dense_diagonal(value, params):
    """d^2 value / d p_i^2, one double backward pass for each element (torch.func.hessian is wrong through LayerNorm)."""
    grads = torch.autograd.grad(value, list(params.values()), create_graph=True, allow_unused=True)
    found = {}
    for (k, p), g in zip(params.items(), grads, strict=True):
        found[k] = torch.zeros_like(p)
        if g is not None and g.requires_grad:
            rows = [torch.autograd.grad(e, p, retain_graph=True, allow_unused=True)[0] for e in g.flatten()]
            found[k] = torch.stack(
                [
                    e.new_zeros(()) if r is None else r.flatten()[i]
                    for i, (e, r) in enumerate(zip(g.flatten(), rows, strict=True))
                ]
            ).view_as(p)
        found[k] = found[k].detach()
    return found
