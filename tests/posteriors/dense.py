"""The truth, densely and in plain view: GGN of the summed negative log-likelihood, and what follows from it."""

import math

import oracle
import torch


def jacobian(model, x):
    """f and d f / d theta, [N, K, D]."""
    params = {k: p for k, p in model.named_parameters() if p.requires_grad}
    f = model(*x) if isinstance(x, tuple) else model(x)
    J = oracle.jacobians(f, params)
    return f.detach(), torch.cat([j.flatten(2) for j in J.values()], 2)


def curvature(model, loss_fn, x, y, scale=1.0):
    """sum_n J_n^T H_n J_n of the unreduced loss, [D, D]."""
    f, J = jacobian(model, x)
    return scale * torch.einsum("nkd,nkl,nle->de", J, oracle.output_hessians(loss_fn, f, y), J)


def theta(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def log_evidence(log_likelihood, H, precision, w):
    """log p(D | w) + log p(w) + D/2 log 2 pi - log det(H + Lambda) / 2."""
    D = len(w)
    log_prior = (precision.log().sum() - (precision * w.square()).sum() - D * math.log(2 * math.pi)) / 2
    return log_likelihood + log_prior + D / 2 * math.log(2 * math.pi) - torch.logdet(H + precision.diag()) / 2


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
