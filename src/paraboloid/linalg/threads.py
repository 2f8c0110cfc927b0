"""How many threads torch's operations take, and work that is dealt out to threads of our own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import TypeVar

import torch

Part = TypeVar("Part")
MOST = 16  # threads of our own: each may need a result as large as the whole one
LEAST = 2**22  # entries that are worth one: some milliseconds, where starting a thread takes a tenth of one


class _Count:
    """The number of threads belongs to the process: those who change it at the same time share one change."""

    def __init__(self):
        self.lock, self.depth, self.before = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        with self.lock:
            if self.depth == 0:
                self.before = torch.get_num_threads()
                torch.set_num_threads(1)
            self.depth += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.depth -= 1
            if self.depth == 0:
                torch.set_num_threads(self.before)


_count = _Count()


def one_thread() -> AbstractContextManager[None]:
    """Inside, an operation of torch takes one thread, in this thread and in those that are started."""
    return _count


def workers(entries: int, device: torch.device) -> int:
    """How many threads of our own so many entries of a matrix are worth: at most as many as torch's operations take."""
    if device.type != "cpu":
        return 1
    return max(1, min(torch.get_num_threads(), MOST, entries // LEAST))


def side_by_side(work: Callable[[int], Part], count: int) -> list[Part]:
    """[work(0), ..., work(count - 1)], each on a thread of its own, with one thread for its operations.

    Small operations one after the other gain little from threads that share each of them, and lose much where
    something else runs on the machine, because they wait for each other after every one.
    """
    if count == 1:
        return [work(0)]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alike(i: int) -> Part:  # modes are a thread's own
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return work(i)

    with one_thread(), ThreadPoolExecutor(count - 1) as pool:
        others = [pool.submit(alike, i) for i in range(1, count)]
        return [work(0), *(other.result() for other in others)]
