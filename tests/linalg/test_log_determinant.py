"""log det by stochastic Lanczos quadrature against the dense one."""

import pytest
import torch

import paraboloid as pb


def test_the_log_determinant_within_its_standard_error():
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    A = R @ R.T / 60 + 0.5 * torch.eye(60)
    found = pb.linalg.logdet(A, samples=60, steps=30)
    assert abs(found - float(torch.logdet(A))) < 4 * found.standard_error
    assert 0 < found.standard_error < 0.1 * abs(float(found))
    diagonal = torch.diag(torch.full((20,), 3.0, dtype=torch.float64))
    assert pb.linalg.logdet(diagonal, samples=2) == pytest.approx(float(torch.logdet(diagonal)))
    assert pb.linalg.logdet(A, seed=3) == pb.linalg.logdet(A, seed=3)


def test_what_is_not_positive_definite_is_refused():
    with pytest.raises(torch.linalg.LinAlgError, match="has the Ritz value -1; expected a positive definite"):
        pb.linalg.logdet(-torch.eye(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="samples is 0"):
        pb.linalg.logdet(torch.eye(4), samples=0)
