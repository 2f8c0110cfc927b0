"""The stratified batch sampler: what a batch holds, unbiasedness, epochs, ranks, workers, allocation, resuming."""

import itertools

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from paraboloid.noise import StratifiedBatchSampler
from paraboloid.noise.sampler import allocate

SIZES = [7, 1, 0, 4, 12]  # the third cluster is empty
ASSIGNMENTS = torch.arange(5).repeat_interleave(torch.tensor(SIZES))[
    torch.randperm(24, generator=torch.Generator().manual_seed(3))
]
N = 24


def epochs(sampler, count):
    return [list(sampler) for _ in range(count)]


def test_a_batch_has_one_sample_from_each_cluster_that_has_any():
    sampler = StratifiedBatchSampler(ASSIGNMENTS)
    assert isinstance(sampler, torch.utils.data.Sampler) and len(sampler) == 6 and sampler.samples_per_batch == 4
    orders = set()
    for batch in itertools.chain(*epochs(sampler, 10)):
        clusters = ASSIGNMENTS[batch].tolist()
        assert sorted(clusters) == [0, 1, 3, 4]
        orders.add(tuple(clusters))
    assert len(orders) > 5  # clusters come in random order


def test_a_cluster_is_drawn_without_replacement_until_all_were_drawn():
    sampler = StratifiedBatchSampler(ASSIGNMENTS, batches=3)
    batches = list(itertools.chain(*epochs(sampler, 28)))  # 84 = 12 * 7 draws of each cluster, over many iterations
    for k, size in enumerate(SIZES):
        drawn = [i for batch in batches for i in batch if ASSIGNMENTS[i] == k]
        for start in range(0, len(drawn), size or 1):
            assert len(set(drawn[start : start + size])) == size
    assert len(batches) == 84


def test_iterating_again_gives_new_batches_and_an_epoch_is_reproducible():
    sampler = StratifiedBatchSampler(ASSIGNMENTS, seed=4)
    first, second = epochs(sampler, 2)
    assert first != second
    sampler.set_epoch(3)
    third = list(sampler)
    other = StratifiedBatchSampler(ASSIGNMENTS, seed=4)
    next(iter(other))
    other.set_epoch(3)
    assert list(other) == third != first
    other.set_epoch(0)
    assert list(other) == first
    assert list(StratifiedBatchSampler(ASSIGNMENTS, seed=5)) != first


def test_weights():
    sampler = StratifiedBatchSampler(ASSIGNMENTS)
    batch = next(iter(sampler))
    sizes = torch.tensor(SIZES)[ASSIGNMENTS[batch]]
    torch.testing.assert_close(sampler.weights(batch), 4 * sizes / N)
    assert sampler.weights(torch.tensor(batch)).dtype == torch.get_default_dtype()
    assert sampler.weights(batch).mean() == pytest.approx(1)


@pytest.mark.parametrize("allocation", ["one", "proportional", "neyman"])
def test_the_weighted_mean_is_unbiased(allocation):
    options = (
        {}
        if allocation == "one"
        else {"batch_size": 9, "allocation": allocation, "deviations": torch.tensor([0.5, 0.1, 0.0, 2.0, 1.0])}
    )
    value = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = StratifiedBatchSampler(ASSIGNMENTS, **options)
    found = []
    for e in range(3000):
        sampler.set_epoch(e)
        batch = next(iter(sampler))
        found.append((sampler.weights(batch).double()[:, None] * value[batch]).mean(0))
    found = torch.stack(found)
    z = (found.mean(0) - value.mean(0)) / (found.std(0) / len(found) ** 0.5)
    assert z.abs().max() < 3.5
    if allocation == "one":  # Proposition 3.1, for each coordinate
        exact = sum(
            n * (value[k == ASSIGNMENTS] - value[k == ASSIGNMENTS].mean(0)).square().sum(0)
            for k, n in enumerate(SIZES) if n
        ) / N**2  # fmt: skip
        torch.testing.assert_close(found.var(0), exact, rtol=5 * (2 / 3000) ** 0.5, atol=0)


def test_ranks_share_one_order_and_draw_different_samples():
    samplers = [StratifiedBatchSampler(ASSIGNMENTS, seed=1, num_replicas=2, rank=r) for r in range(2)]
    assert len(samplers[0]) == 3
    for a, b in zip(*(itertools.chain(*epochs(s, 4)) for s in samplers), strict=True):
        assert ASSIGNMENTS[a].tolist() == ASSIGNMENTS[b].tolist()
    for s in samplers:
        s.set_epoch(1)
    first, second = (next(iter(s)) for s in samplers)
    for i, j in zip(first, second, strict=True):
        assert i != j or SIZES[ASSIGNMENTS[i]] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_in_a_data_loader(workers):
    dataset = TensorDataset(torch.arange(N), ASSIGNMENTS)
    sampler = StratifiedBatchSampler(ASSIGNMENTS)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 6
    seen = [x.tolist() for x, _ in loader]
    sampler.set_epoch(0)
    assert seen == list(sampler)


def test_resuming_goes_on_with_the_next_batch():
    whole, first = (StratifiedBatchSampler(ASSIGNMENTS, seed=2) for _ in range(2))
    batches = list(itertools.chain(*epochs(whole, 3)))
    part = list(first)
    second = StratifiedBatchSampler(torch.zeros(3, dtype=torch.int64))
    second.load_state_dict(first.state_dict())
    assert part + list(second) + list(second) == batches


def test_resuming_with_an_allocation():
    options = {"batch_size": 9, "allocation": "neyman", "deviations": torch.tensor([0.5, 0.1, 0.0, 2.0, 1.0])}
    whole, first, second = (StratifiedBatchSampler(ASSIGNMENTS, seed=2, **options) for _ in range(3))
    batches = list(itertools.chain(*epochs(whole, 2)))
    part = list(first)
    second.load_state_dict(first.state_dict())
    assert part + list(second) == batches
    assert torch.equal(second.weights(batches[0]), whole.weights(batches[0]))


def test_other_clusters_from_the_next_batch_on():
    sampler = StratifiedBatchSampler(ASSIGNMENTS)
    batches = iter(sampler)
    next(batches)
    sampler.update(torch.arange(N) % 3)
    batch = next(batches)
    assert sorted(i % 3 for i in batch) == [0, 1, 2] and sampler.weights(batch).tolist() == [1, 1, 1]


def test_allocation():
    sizes, deviations = torch.tensor([10, 10, 20, 60]), torch.tensor([0.0, 6.0, 1.0, 1.0]).double()
    assert allocate("proportional", sizes, 10).tolist() == [1, 1, 2, 6]
    assert allocate("neyman", sizes, 14, deviations).tolist() == [1, 5, 2, 6]
    assert allocate("neyman", sizes, 8, torch.zeros(4).double()).tolist() == [2, 2, 2, 2]
    best = min(
        (m for m in itertools.product(range(1, 12), repeat=4) if sum(m) == 14),
        key=lambda m: sum((n * s) ** 2 / k for n, s, k in zip(sizes.tolist(), deviations.tolist(), m, strict=True)),
    )
    assert allocate("neyman", sizes, 14, deviations).tolist() == list(best)


def test_batches_of_a_torch_sampler_are_batches_of_this_one():
    assert [len(b) for b in BatchSampler(range(10), 4, False)] == [4, 4, 2]  # the interface that DataLoader expects


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((torch.zeros(2, 2).long(),), "assignments have shape"),
        ((torch.zeros(3),), "expected the cluster of each sample, int64"),
        ((torch.tensor([0, -1]),), "assignments hold -1"),
        ((ASSIGNMENTS, 0, {"rank": 2, "num_replicas": 2}), "rank is 2 of num_replicas 2"),
        ((ASSIGNMENTS, 0, {"batches": 0}), "batches is 0"),
        ((ASSIGNMENTS, 0, {"batch_size": 8}), "batch_size is 8 with allocation='one'"),
        ((ASSIGNMENTS, 0, {"allocation": "equal"}), "allocation is 'equal'"),
        ((ASSIGNMENTS, 0, {"allocation": "neyman", "batch_size": 3}), "and 4 non-empty clusters; expected at least 4"),
        ((ASSIGNMENTS, 0, {"allocation": "neyman", "batch_size": 8}), "needs deviations"),
        ((ASSIGNMENTS, 0, {"allocation": "neyman", "batch_size": 8, "deviations": torch.ones(2)}), "length 2 for 5"),
        (
            (ASSIGNMENTS, 0, {"allocation": "neyman", "batch_size": 8, "deviations": -torch.ones(5)}),
            "negative or infinite",
        ),
    ],
)
def test_errors(arguments, words):
    *plain, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=words):
        StratifiedBatchSampler(*plain, **options)


def test_indices_out_of_range():
    with pytest.raises(ValueError, match="indices reach from 0 to 24; expected 0 to 23"):
        StratifiedBatchSampler(ASSIGNMENTS).weights([0, 24])
