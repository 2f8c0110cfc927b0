"""Two processes (gloo) with a DistributedDataParallel model take the steps of one process with the whole batch."""

import optimiser_rank
import pytest
import torch
from ranks import run

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found."""
    return run(optimiser_rank.__file__, tmp_path_factory.mktemp("optimiser_ranks"))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("name", optimiser_rank.OPTIMISERS)
def test_ranks_together_take_the_step_of_the_whole_batch(ranks, name, accumulate):
    model = optimiser_rank.model()
    opt = optimiser_rank.OPTIMISERS[name](model)
    for t in range(optimiser_rank.STEPS):
        x, y = optimiser_rank.batch(t)
        opt.zero_grad()
        optimiser_rank.LOSS(model(x), y).backward()
        opt.step()
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    for found in ranks:
        torch.testing.assert_close(found[name, accumulate], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(ranks[0][name, accumulate], ranks[1][name, accumulate])


@pytest.mark.parametrize("name", optimiser_rank.QUASI_NEWTON)
def test_ranks_together_take_the_quasi_newton_step_of_the_whole_batch(ranks, name):
    make = optimiser_rank.QUASI_NEWTON[name]
    expected = optimiser_rank.train_with_closures(optimiser_rank.model(), make, slice(None))
    for found in ranks:
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(ranks[0][name], ranks[1][name])


def test_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(ranks):
    assert [found["skipped"] for found in ranks] == [(1, True), (1, True)]


def test_an_optimiser_of_the_bare_model_is_refused_inside_the_wrapper(ranks):
    assert all("Give it the wrapped model, or all_reduce=True" in found["bare"] for found in ranks)


def test_a_distributed_checkpoint_keeps_each_rank_s_own_draws(ranks):
    for found in ranks:
        assert torch.equal(*found["resumed"])
    assert torch.equal(ranks[0]["resumed"][0], ranks[1]["resumed"][0])
