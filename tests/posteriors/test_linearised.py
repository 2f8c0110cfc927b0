"""The linearised model's loss, densely; its outputs are computed once for each place."""

import torch
from posteriors.dense import close, jacobian
from torch import nn

from paraboloid.losses import Loss
from paraboloid.operators.matrix_free.output_graph import OutputGraph
from paraboloid.posteriors.prior_tuning.linearised import LinearisedModel


def test_loss_gradient_and_curvature_push_each_place_once(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.arange(9) % 3
    loss = Loss.from_torch(nn.CrossEntropyLoss())
    linear = LinearisedModel.of(model, loss, [(x[:5], y[:5]), (x[5:], y[5:])], None, None)
    f, J = jacobian(model, x)
    pushes, push = [], OutputGraph.push
    monkeypatch.setattr(linear.replay, "certify", lambda graph: None)  # which pushes at times, too
    monkeypatch.setattr(OutputGraph, "push", lambda self, v: pushes.append(1) or push(self, v))
    for _ in range(2):
        delta, v = torch.randn(2, J.shape[2], dtype=torch.float64)
        g = f + J @ delta
        p = g.softmax(1)
        residual = p - nn.functional.one_hot(y, 3)
        H = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
        pushes.clear()
        close(linear.value(delta), nn.functional.cross_entropy(g, y, reduction="sum"))
        assert len(pushes) == 2  # one for each batch
        close(linear.gradient(delta), torch.einsum("nkd,nk->d", J, residual))
        assert len(pushes) == 2
        close(linear.curvature(delta, v), torch.einsum("nkd,nkl,nle,e->d", J, H, J, v))
        assert len(pushes) == 4  # v itself
