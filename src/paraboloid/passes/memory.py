"""How much memory a piece of work may take, the pool that large results come from, and how to give it all back."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass
class Limit:
    """An upper aim in bytes for what is held at a time for one purpose: `bounds` says what.

    Where the caller gives `max_memory` the limit is its part 1 / `share`, or stays as it is where no share is stated.
    Else it is `default` on a CPU, often sized for its caches, and `device` times that elsewhere, where every further
    piece costs launches.
    """

    bounds: str
    default: int
    share: int | None = None
    device: int = 1

    def of(self, max_memory: int | None = None, device: torch.device | None = None, least: int = 0) -> int:
        """The limit; at least `least` unless `max_memory` decides."""
        if max_memory is not None and self.share is not None:
            return max_memory // self.share
        return max(least, self.default if device is None or device.type == "cpu" else self.device * self.default)

    def count(
        self, size: int, max_memory: int | None = None, device: torch.device | None = None, least: int = 0
    ) -> int:
        """How many things of `size` bytes to hold at a time: one, if the limit is smaller."""
        return max(1, self.of(max_memory, device, least) // max(1, size))


GRADIENTS = Limit("gradients at the layers' outputs, of the vectors that are pulled together", 8 * MIB, 2, device=64)
COPIES = Limit("outputs of the layers of copies of samples, of which some need many", 256 * MIB, 4, device=16)
PIECES = Limit("pulled-back vectors that a reduction forms: much for BLAS, little for caches", 4 * MIB, 4, device=64)
FACTORS = Limit("positions side by side whose products are added to a factor", 4 * MIB, 8, device=64)
UNFOLDED = Limit("unfolded inputs that are used at once, from the cache", 2 * MIB, 4)
INPUTS = Limit("inputs, unfolded or rotated, that are kept for the vectors that follow", 256 * MIB, 4)
ASSIGNED = Limit("unfolded inputs that are kept from the assignment to clusters to their update", 256 * MIB, 2)
RECORDINGS = Limit("recordings, and what was pulled back, kept from pass to pass and product to product", GIB, 1)
SECOND_DERIVATIVES = Limit("columns that are pulled back together, or one whole matrix of KFRA", 64 * MIB, 4)
JACOBIANS = Limit("what a prediction makes of a chunk of inputs", 128 * MIB, 2, device=16)
ROWS = Limit("rows of the root of a curvature that are formed at a time", 256 * MIB, 2, device=16)
DENSE = Limit("a dense matrix or rows of a posterior; above it an error says what fits", 8 * GIB)
COVARIANCES = Limit("covariances of all elements of outputs; above it draws of weights take their place", 256 * MIB)
CACHED = Limit("what is formed and used at once, to stay in the cache", MIB, device=64)
COMPARED = Limit("gradients that are compared to certify sample independence", 4 * MIB)
PROBES = Limit("random vectors that are multiplied together", 64 * MIB)
RESIDUALS = Limit("residuals against which the next one is orthogonalised", 256 * MIB)
KERNEL_POOLED = Limit(
    "a kept kernel matrix whose memory is the pool's: a larger one leaves half of its pages untouched", 256 * MIB
)
KERNEL_TILES = Limit("tiles of a kernel matrix that are kept from product to product", 2 * GIB)
HASHED = Limit("inputs times random features that are hashed at a time", 32 * MIB)
MEASURED = Limit("directions that are collected before they are measured on the full data", 256 * MIB)
LEFT_OUT = Limit("sums over groups of draws, for a jackknife", 512 * MIB)
JOINED = Limit("inputs of small batches that are joined", 512 * KIB)
HELD = Limit("batches of a loader that are kept from pass to pass", 256 * MIB)
BUCKETS = Limit("what ranks sum by one message", 64 * MIB)
POOLED = Limit("memory of results that have gone, kept for those to come", GIB)
LARGE = Limit("results below it take torch's own memory, not the pool's", 256 * KIB)


def available(device: torch.device) -> int | None:
    """Bytes that are free on the device now; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * KIB
    except (OSError, KeyError, ValueError):
        return None


class Pool:
    """Buffers whose tensors have gone, the latest last.  The first touch of fresh memory costs several times what is
    written to it (much more on a virtual machine, whose host has to find it first); that of a used one costs nothing.

    A tensor may go at any moment, in the middle of `take` too if the garbage collector says so: what it leaves is put
    into `returned`, which takes no lock, and sorted in when the lock is free.
    """

    def __init__(self, most: int):
        self.most, self.free, self.kept = most, list[np.ndarray](), 0  # bytes that are free
        self.returned, self.lock = deque[np.ndarray](), Lock()
        self.lent: dict[int, tuple[weakref.ref[np.ndarray], np.ndarray]] = {}  # by the reference's id

    def take(self, size: int) -> np.ndarray:
        """[size] bytes, uninitialised; they come back by themselves when nothing refers to them any more."""
        best, least = -1, 2 * size + 1
        with self.lock:
            if self.returned:
                self._sort_in()
            for i, b in enumerate(self.free):
                if size <= b.nbytes < least:
                    best, least = i, b.nbytes
            if best < 0:
                buffer = np.empty(size, np.uint8)
            else:
                buffer = self.free.pop(best)
                self.kept -= least
        lent = buffer[:size]
        reference = weakref.ref(lent, self._give)
        self.lent[id(reference)] = reference, buffer
        return lent

    def _give(self, gone: weakref.ref[np.ndarray]) -> None:
        self.returned.append(self.lent.pop(id(gone))[1])
        if self.lock.acquire(blocking=False):
            try:
                self._sort_in()
            finally:
                self.lock.release()

    def _sort_in(self) -> None:
        while self.returned:
            self.free.append(buffer := self.returned.popleft())
            self.kept += buffer.nbytes
        while self.kept > self.most:
            self.kept -= self.free.pop(0).nbytes

    def clear(self) -> None:
        """Give what nobody uses back to the system."""
        with self.lock:
            self._sort_in()
            self.free.clear()
            self.kept = 0


pool = Pool(POOLED.default)
_given_back: list[Callable[[], object]] = [pool.clear]


def gives_back(clear: Callable[[], object]) -> None:
    """`free_memory` shall call this: it empties something that the library keeps for later."""
    _given_back.append(clear)


def free_memory() -> None:
    """Give back the memory that the library keeps without a user: it asks for it again when there is work.

    Large results on a CPU come from a pool that keeps up to 1 GiB of what has gone, because fresh memory is slow; this
    empties it.  It also forgets what was found out about models on earlier calls, so that sample independence and rules
    are checked again on the next one.  No result changes, and what objects hold stays theirs: an operator's recordings
    go with the operator.  What torch keeps on a GPU goes by `torch.cuda.empty_cache()`.
    """
    for clear in _given_back:
        clear()


def pooled_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in such memory: an elementwise product where the inner axis has length one."""
    multiply = torch.mul if left.shape[-1] == 1 else torch.matmul
    if torch.is_grad_enabled():
        return multiply(left, right)
    if left.dim() == right.dim() == 2:
        return multiply(left, right, out=pooled((left.shape[0], right.shape[1]), left))
    lead, other = left.shape[:-2], right.shape[:-2]
    if other and lead[len(lead) - len(other) :] != other:  # what is asked takes longer than a small product
        lead = torch.broadcast_shapes(lead, other)
    return multiply(left, right, out=pooled((*lead, left.shape[-2], right.shape[-1]), left))


def pooled(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of the type and on the device of `like`, from the pool where it is large and on a CPU.

    Linux gives pages of 2 MiB, of which few are to be touched, to those who ask for them; NumPy's allocator does,
    torch's does not by default.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < LARGE.default:
        return like.new_empty(shape)
    return torch.from_numpy(pool.take(size)).view(like.dtype).view(tuple(shape))
