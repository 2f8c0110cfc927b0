"""Limits and what changes them; memory in large pages, which behaves as any tensor; and how to give it back."""

import io
import pickle
import re
from pathlib import Path

import pytest
import torch

import paraboloid as pb
from paraboloid.engine import tape
from paraboloid.passes import memory

CPU, DEVICE = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("given", "device", "least", "expected"),
    [
        (None, None, 0, 100), (None, CPU, 0, 100), (None, DEVICE, 0, 6400), (None, CPU, 300, 300),
        (80, CPU, 0, 20), (80, DEVICE, 300, 20), (0, CPU, 0, 0), (3, None, 0, 0),
    ],
)  # fmt: skip
def test_what_changes_a_limit(given, device, least, expected):
    limit = memory.Limit("what a test holds", 100, share=4, device=64)
    assert limit.of(given, device, least) == expected
    assert limit.count(30, given, device, least) == max(1, expected // 30)
    assert limit.count(0, given, device, least) == max(1, expected)


def test_a_limit_without_a_share_is_not_changed_by_the_user():
    assert memory.Limit("what a test holds", 100).of(8) == 100


def test_every_limit_says_what_it_bounds():
    limits = {name: value for name, value in vars(memory).items() if isinstance(value, memory.Limit)}
    assert len(limits) > 15 and all(value.bounds and value.default > 0 for value in limits.values())
    assert len({value.bounds for value in limits.values()}) == len(limits)


def test_limits_are_stated_nowhere_else():
    package = Path(memory.__file__).parents[1]
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py")) if path != Path(memory.__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"_BYTES\b|\* 2 ?\*\* ?[1-4]0\b|= 2 ?\*\* ?[1-4][0-9]  # .*bytes|max_memory //? \d", line)
    ]  # fmt: skip
    assert not found, "name these limits in passes/memory.py:\n" + "\n".join(found)


def test_memory_is_given_back_and_results_stay_the_same():
    torch.manual_seed(0)
    model = torch.nn.Linear(600, 200)
    batch = torch.randn(8, 600), torch.arange(8)
    wanted = ["sample_grads", "variance", "kfac"]

    def found():
        return pb.statistics(model, torch.nn.CrossEntropyLoss(), batch, wanted)

    first = found()
    kept = {q: {k: torch.as_tensor(v).clone() for k, v in first[q].items()} for q in wanted[:2]}
    assert kept["sample_grads"]["weight"].nbytes > memory.LARGE.default
    del first
    assert memory.pool.free and model in tape._certified
    pb.free_memory()
    assert not memory.pool.free and not memory.pool.returned and not len(tape._certified)
    again = found()
    assert all(torch.equal(again[q][k], v) for q, values in kept.items() for k, v in values.items())
    sample_grads = again["sample_grads"]["weight"]
    pb.free_memory()  # what somebody holds stays
    assert torch.equal(sample_grads, kept["sample_grads"]["weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_large_tensor_is_as_good_as_any(dtype):
    like = torch.zeros(1, dtype=dtype)
    count = memory.LARGE.default // like.element_size()
    t = memory.pooled((2, count // 2, 1), like)
    assert (t.shape, t.dtype, t.is_contiguous(), t.requires_grad) == ((2, count // 2, 1), dtype, True, False)
    t.fill_(1)
    assert t.numpy().shape == t.shape
    buffer = io.BytesIO()
    torch.save(t[:, :3], buffer)
    buffer.seek(0)
    for copy in (pickle.loads(pickle.dumps(t[:, :3])), torch.load(buffer), t[:, :3].clone()):
        assert torch.equal(copy, t[:, :3])
    t.add_(1).share_memory_()
    assert t[1, -1, 0] == 2


def test_small_ones_are_torchs_own():
    assert memory.pooled((3,), torch.zeros(1)).shape == (3,)


@pytest.mark.parametrize("inner", [1, 5])
def test_products(inner):
    left, right = torch.randn(4, 1, 3, inner), torch.randn(2, inner, 6)
    torch.testing.assert_close(memory.pooled_product(left, right), left @ right)
    left.requires_grad_()
    assert memory.pooled_product(left, right).requires_grad
    with torch.no_grad():
        assert torch.equal(memory.pooled_product(left, right), memory.pooled_product(left.detach(), right))


def test_used_memory_is_used_again_and_never_while_in_use():
    pool = memory.Pool(most=100)
    first, second = pool.take(40), pool.take(40)
    where = first.ctypes.data
    view = torch.from_numpy(first)[3:]
    del first
    assert not pool.free  # a view still needs it
    del view
    assert [b.nbytes for b in pool.free] == [40]
    again = pool.take(30)  # what is less than twice as large fits
    assert again.ctypes.data == where and again.nbytes == 30 and not pool.free
    assert pool.take(15).nbytes == 15
    del again, second
    pool.take(90)
    assert sum(b.nbytes for b in pool.free) <= 100
    pool.clear()
    assert not pool.free


def test_a_tensor_that_goes_while_the_pool_is_busy():
    pool = memory.Pool(most=100)
    lent = pool.take(40)
    with pool.lock:
        del lent  # as the garbage collector might do in the middle of `take`
        assert not pool.free and len(pool.returned) == 1
    assert pool.take(40).nbytes == 40
    assert not pool.returned
