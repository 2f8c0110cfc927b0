"""Two processes (gloo) hold unequal parts of a batch; together they give what one process gives for all of it."""

import one_rank
import oracle
import pytest
import torch
from oracle import close
from ranks import run
from torch import nn

import paraboloid as pb
from paraboloid.linalg.kronecker import Kron
from paraboloid.passes.memory import BUCKETS

WORLD = 2
pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without gloo",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found."""
    return run(one_rank.__file__, tmp_path_factory.mktemp("ranks"))


def same(actual, expected, what):
    if isinstance(expected, Kron):
        close(actual.left, expected.left, what)
        close(actual.right, expected.right, what)
    else:
        close(actual, expected, what)


CASES = one_rank.cases()


@pytest.mark.parametrize("case", CASES)
def test_unequal_parts_add_up_to_the_big_batch(ranks, case):
    model, loss, x, y = CASES[case]
    model.zero_grad()
    expected = pb.statistics(model, loss, (x, y), one_rank.sums(case) + one_rank.LOCAL, accumulate_grad=True)
    reduced = pb.statistics(model, loss, (x, y), one_rank.REDUCED)["kfac_empirical"]
    starts = [sum(one_rank.SIZES[:r]) for r in range(WORLD + 1)]
    for r in range(WORLD):
        found, mine = ranks[r][case], slice(starts[r], starts[r + 1])
        close(found["loss"], expected.loss)
        close(found["listed loss"], expected.loss)
        assert found["samples"] == expected.samples == len(y)
        assert found["normalizer"] == pytest.approx(expected.normalizer, rel=1e-12)
        for k, p in model.named_parameters():
            close(found["grad"][k], p.grad, f"accumulated {k}")
            same(found["values"]["reduce"][k], reduced[k], f"reduce {k}")
            for q in one_rank.sums(case):
                same(found["values"][q][k], expected[q][k], f"{q} {k}")
                same(found["listed"][q][k], expected[q][k], f"{q} {k} of two batches on each rank")
            for q in one_rank.LOCAL:
                value = expected[q][k][mine]
                close(found["values"][q][k], value[:, mine] if q == "gram" else value, f"{q} {k}")


def test_every_rank_draws_labels_and_masks_of_its_own(ranks):
    first, again, other = ranks[0]["seeds"]["pulls"]
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, ranks[1]["seeds"]["pulls"][0])  # of the sum over ranks
    masks = [ranks[r]["seeds"]["masks"] == 0 for r in range(WORLD)]
    assert not torch.equal(*masks)


def test_what_does_not_add_up_is_refused_on_every_rank(ranks):
    for r in range(WORLD):
        found = ranks[r]["errors"]
        assert set(found) == {"mute", "mixed", "different", "frozen", "no targets"}
        assert "['mute'] cannot be combined over ranks" in found["mute"]
        assert "whose terms have the weights" in found["mixed"]
        for name in ("different", "frozen"):
            assert "the ranks do not hold the same quantities of the same parameters" in found[name]
        assert "every target of every rank is ignored" in found["no targets"]


def test_a_data_parallel_wrapper(ranks):
    """Quantities are those of the rank; `.grad` is what backward() leaves there."""
    model, x = one_rank.models.make("mlp", 7)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    params, loss = dict(model.named_parameters()), nn.CrossEntropyLoss()
    parts = slice(0, 2), slice(2, 7)
    own = [pb.statistics(model, loss, (x[n], y[n]), ["grad", "variance"]) for n in parts]
    exact = [oracle.grads(loss(model(x[n]), y[n]), params) for n in parts]
    for r in range(WORLD):
        found = ranks[r]["wrapped"]
        for k in params:
            mean = (exact[0][k] + exact[1][k]) / 2  # of the ranks, as the wrapper defines it
            for q in ("grad", "variance"):
                close(found["local"][q][k], own[r][q][k], k)
                close(found["recorded"][q][k], own[r][q][k], k)
            close(found["backward"][k], mean, k)
            close(found["accumulated"][k], mean, k)
            close(found["instead of backward"][k], mean, k)
            close(found["not synchronised"][k], exact[r][k], k)


def test_without_a_process_group_it_is_refused():
    model, x = one_rank.models.make("mlp")
    batch = x, torch.zeros(3, 3).double()
    with pytest.raises(ValueError, match=r"torch\.distributed has no process group; call torch\.distributed\.init"):
        pb.statistics(model, nn.MSELoss(), batch, "grad", all_reduce=True)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_one_rank_is_an_ordinary_batch(alone, monkeypatch):
    """Also when the sums take several messages."""
    monkeypatch.setattr(BUCKETS, "default", 100)
    model, x = one_rank.models.make("gpt", 4)
    batch = x, torch.randint(6, (4, 3), generator=torch.Generator().manual_seed(0))
    wanted = [*one_rank.SUMS, *one_rank.LOCAL, "diag_ggn_mc", "kfac"]
    stats = pb.statistics(model, nn.CrossEntropyLoss(), batch, wanted, all_reduce=True)
    expected = pb.statistics(model, nn.CrossEntropyLoss(), batch, wanted)
    assert list(stats) == list(expected)
    for q in expected:
        for k in expected[q]:
            same(stats[q][k], expected[q][k], f"{q} {k}")
    with pytest.raises(ValueError, match="all_reduce is 'yes'; expected True, False or a"):
        pb.statistics(model, nn.CrossEntropyLoss(), batch, "grad", all_reduce="yes")
    with pytest.raises(ValueError, match="'variance' needs a batch of at least 2 samples; found 1"):
        pb.statistics(model, nn.CrossEntropyLoss(), (x[:1], batch[1][:1]), "variance", all_reduce=True)
