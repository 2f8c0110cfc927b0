"""Two processes (gloo) with unequal parts of the data, or with some of the samples each, find what one process finds."""

import pytest
import torch
from posteriors import sampled_rank
from ranks import run

import paraboloid as pb

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run(sampled_rank.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.filterwarnings("ignore:the relative")  # few epochs
@pytest.mark.parametrize("name", sampled_rank.OPTIONS)
def test_shared_work_finds_what_one_process_finds(ranks, name):
    model, loss, x, y = sampled_rank.problem_of(name)
    expected = pb.sampled_laplace(model, loss, (x, y), **sampled_rank.OPTIONS[name])
    for found in ranks:
        samples, precision, dimension, noise, confidence = found[name]
        for k, d in expected.samples.items():
            torch.testing.assert_close(samples[k], d, rtol=1e-5, atol=1e-6)
        assert (confidence is None) == (expected.confidence is None)
        if confidence is not None:
            assert confidence.usual == pytest.approx(expected.confidence.usual, rel=1e-4)
        assert dimension == pytest.approx(expected.effective_dimension, rel=1e-5)
        assert precision == pytest.approx(expected.prior_precision, rel=1e-5)
        assert noise == pytest.approx(expected.noise_variance, rel=1e-5)


def test_processes_with_different_numbers_of_batches(ranks):
    """They end, agree, and go on from checkpoints of their own."""
    (samples, history), (others, other_history) = (found["unequal"] for found in ranks)
    assert history == other_history and [step.step for step in history] == [0, 1, 2]
    for k, d in samples.items():
        assert d.isfinite().all() and torch.equal(d, others[k])


def test_each_process_has_a_sample(ranks):
    for found in ranks:
        assert "samples is 1 for 2 processes; expected at least one for each" in found["too few"]
