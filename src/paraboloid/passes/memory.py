"""Memory for large results on a CPU: in large pages, and used again when a result has gone."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from threading import Lock

import numpy as np
import torch
from torch import Tensor

LARGE_BYTES = 2 * 2**20
POOL_BYTES = 2**30  # of memory without a user that is kept at most
DEVICE_FACTOR = 64


class Pool:
    """Buffers whose tensors have gone, the latest last.  The first touch of fresh memory costs several times what is
    written to it (much more on a virtual machine, whose host has to find it first); that of a used one costs nothing.

    A tensor may go at any moment, in the middle of `take` too if the garbage collector says so: what it leaves is put
    into `returned`, which takes no lock, and sorted in when the lock is free.
    """

    def __init__(self, most: int):
        self.most, self.free = most, list[np.ndarray]()
        self.returned, self.lock = deque[np.ndarray](), Lock()

    def take(self, size: int) -> np.ndarray:
        """[size] bytes, uninitialised; they come back by themselves when nothing refers to them any more."""
        with self.lock:
            self._sort_in()
            fitting = [i for i, b in enumerate(self.free) if size <= b.nbytes <= 2 * size]
            best = min(fitting, key=lambda i: self.free[i].nbytes, default=None)
            buffer = np.empty(size, np.uint8) if best is None else self.free.pop(best)
        lent = buffer[:size]
        weakref.finalize(lent, self._give, buffer).atexit = False
        return lent

    def _give(self, buffer: np.ndarray) -> None:
        self.returned.append(buffer)
        if self.lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self) -> None:
        while self.returned:
            self.free.append(self.returned.popleft())
        while sum(b.nbytes for b in self.free) > self.most:
            self.free.pop(0)

    def clear(self) -> None:
        """Give what nobody uses back to the system."""
        with self.lock:
            self._sort_in()
            self.free.clear()


pool = Pool(POOL_BYTES)


def roomy(size: int, device: torch.device) -> int:
    """Bytes of a piece that is sized for a CPU's caches; elsewhere more, for there each piece costs launches."""
    return size if device.type == "cpu" else DEVICE_FACTOR * size


def pooled_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in such memory: an elementwise product where the inner axis has length one."""
    multiply = torch.mul if left.shape[-1] == 1 else torch.matmul
    if torch.is_grad_enabled():
        return multiply(left, right)
    shape = (*torch.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-1])
    return multiply(left, right, out=pooled(shape, left))


def pooled(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the type and on the device of `like`, from the pool where it is large and on a CPU.

    Linux gives pages of 2 MiB, of which few are to be touched, to those who ask for them; NumPy's allocator does,
    torch's does not by default.
    """
    size = torch.Size(shape).numel() * like.element_size()
    if like.device.type != "cpu" or size < LARGE_BYTES:
        return like.new_empty(shape)
    return torch.from_numpy(pool.take(size)).view(like.dtype).view(tuple(shape))
