"""Fresh memory in large pages behaves as any tensor."""

import io
import pickle

import pytest
import torch

from paraboloid.passes import memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_large_tensor_is_as_good_as_any(dtype):
    like = torch.zeros(1, dtype=dtype)
    count = memory.LARGE_BYTES // like.element_size()
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
