"""What a piece of work costs: the bytes that it leaves behind, and its floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from paraboloid.passes.torch_internals import (
    StorageWeakRef,
    TorchDispatchMode,
    flop_registry,
    packet_of,
    storage_place,
    tree_leaves,
)


class Footprint(TorchDispatchMode):
    """Notes every storage that operations inside the block produce, and counts operations.

    `bytes_kept` sums up the storages that still live.  What lives after a forward pass is what autograd saved, however
    it was saved: hooks, checkpoints and in-place operations need no special care.  Storages of `besides` (the
    parameters, whose views are outputs too) do not count.  `flops` is that of matrix products and convolutions so far,
    while `counts` is True.
    """

    def __init__(self, besides: Iterable[Tensor]):
        super().__init__()
        self.counts = True
        self.besides = {storage_place(t.untyped_storage()) for t in besides}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for t in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                place = storage_place(storage)
                if place not in self.besides and place not in self.seen:
                    self.seen[place] = (StorageWeakRef(storage), storage.nbytes())
        if self.counts and (count := flop_registry.get(packet_of(func))) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result

    def bytes_kept(self) -> int:
        return sum(size for reference, size in self.seen.values() if not reference.expired())
