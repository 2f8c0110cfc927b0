"""What a step promised, what came of it, and going back."""

import pytest
import torch

from paraboloid.optim.acceptance import Trial, adapted, quadratic_step, reduction_ratio, total_damping
from paraboloid.optim.direction import Move

F64 = torch.float64


def test_a_trial_predicts_and_takes_back():
    g = torch.Generator().manual_seed(0)
    p, gradient, delta, buffer = torch.randn(4, 5, generator=g, dtype=F64)
    C, state = 3.0, {"momentum_buffer": buffer}
    m = Move({})
    m.add("w", p, state, gradient)
    before, kept = p.clone(), buffer.clone()
    trial = Trial([m])
    p += delta
    buffer += 1
    predicted = trial.predicted(lambda name, d: float(C * d @ d))
    assert predicted == pytest.approx(float(gradient @ delta + C * delta @ delta / 2), rel=1e-12)
    trial.take_back()
    assert torch.equal(p, before) and torch.equal(buffer, kept)


def test_ratio_and_damping():
    assert reduction_ratio(-0.5, -1.0) == 0.5
    assert reduction_ratio(1.0, 0.0) != reduction_ratio(1.0, 0.0)  # NaN
    assert [adapted(1.0, r, 0.5, 2.0) for r in (0.76, 0.75, 0.25, 0.24, -1.0, float("nan"))] == [0.5, 1, 1, 2, 2, 2]
    assert total_damping({"damping": 0.5, "weight_decay": 0.25}) == 0.75
    assert total_damping({"damping": 0.5, "weight_decay": 0.25, "decoupled": True}) == 0.5


@pytest.mark.parametrize("with_last", [False, True])
def test_the_quadratic_step_is_the_minimum_in_its_span(with_last):
    g = torch.Generator().manual_seed(1)
    B = torch.randn(6, 6, generator=g, dtype=F64)
    C, shift = B @ B.T, 0.3
    gradient, d, last = torch.randn(3, 6, generator=g, dtype=F64)
    alpha, mu, predicted = quadratic_step(
        lambda v: {"w": C @ v["w"]}, {"w": shift}, {"w": gradient}, {"w": d}, {"w": last} if with_last else None
    )
    S = torch.stack([d, last], 1) if with_last else d.unsqueeze(1)
    want = -torch.linalg.solve(S.T @ (C + shift * torch.eye(6, dtype=F64)) @ S, S.T @ gradient)
    found = torch.tensor([alpha, mu], dtype=F64)
    torch.testing.assert_close(found[: S.shape[1]], want, rtol=1e-10, atol=1e-12)
    assert with_last or mu == 0.0
    step = S @ want
    assert predicted == pytest.approx(float(gradient @ step + step @ C @ step / 2), rel=1e-10)
