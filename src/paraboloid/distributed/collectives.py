"""Sums over the processes (ranks) of a data-parallel job, with `torch.distributed`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paraboloid.passes import trees, wrappers
from paraboloid.passes.memory import BUCKETS

SEED_STEP = 1_000_003  # between the seeds of consecutive ranks
T = TypeVar("T")
if TYPE_CHECKING:
    Group = dist.ProcessGroup | None  # None: this process alone
    AllReduce = bool | str | dist.ProcessGroup | None  # True: the default group
else:
    Group = AllReduce = Any  # torch may have been built without


def group_of(all_reduce: AllReduce) -> Group:
    """The process group that `all_reduce=` stands for: None for False, the default group for True, or the one given.

    Raises ValueError where there is no default group, and for anything else.
    """
    if all_reduce is False or all_reduce is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(f"all_reduce is {all_reduce!r}, but torch.distributed has no process group; call "
                         "torch.distributed.init_process_group first, or pass all_reduce=False.")  # fmt: skip
    if all_reduce is True:
        return dist.group.WORLD
    if not isinstance(all_reduce, dist.ProcessGroup):
        raise ValueError(f"all_reduce is {all_reduce!r}; expected True, False or a torch.distributed.ProcessGroup.")
    return all_reduce


def rank(group: Group) -> int:
    """This process's place in the group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def rank_seed(seed: int, group: Group) -> int:
    """A seed of this rank's own, so that no two ranks draw the same labels and dropout masks; rank 0 keeps `seed`."""
    return seed if group is None else seed + SEED_STEP * dist.get_rank(group)


def wrapper_group(model: nn.Module) -> Any:
    """The group over which backward() would average the gradients of a DistributedDataParallel model; None for others,
    and inside its `no_sync()`."""
    wrapper = wrappers.distributed(model)
    return wrapper.process_group if wrapper is not None and wrapper.require_backward_grad_sync else None


def rank_of(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def gathered(item: T, group: Group) -> list[T]:
    """The (small, picklable) items of all ranks, in their order."""
    items: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(items, item, group=group)
    return items


def summed(tree: T, group: Group, device: torch.device) -> T:
    """The tree (see `trees.mapped`) with every tensor replaced by its sum over the ranks, added up on `device`.

    All ranks must hold the same structure, shapes and types.
    """
    found: list[Tensor] = []
    trees.mapped(found.append, tree)
    sums: list[Tensor] = [*found]
    for bucket in _buckets(found):
        flat = torch.cat([found[i].reshape(-1).to(device) for i in bucket])
        dist.all_reduce(flat, group=group)
        pieces = flat.split([found[i].numel() for i in bucket])
        for i, piece in zip(bucket, pieces, strict=True):
            sums[i] = piece.view(found[i].shape).to(found[i].device, copy=True)  # does not keep the whole bucket alive
    remaining: Iterator[Tensor] = iter(sums)
    take: Callable[[Tensor], Tensor] = lambda _: next(remaining)  # noqa: E731
    return trees.mapped(take, tree)


def everywhere(flag: Tensor, group: Group) -> bool:
    """Whether it is true on all ranks; without a group, here."""
    if group is not None:
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=group)
    return bool(flag)


def mean(value: float, group: Group, device: torch.device) -> float:
    """Over the ranks; without a group, the value itself."""
    if group is None:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total, group=group)
    return float(total) / dist.get_world_size(group)


def filled(
    gradient: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]
) -> tuple[list[bool], dict[str, Tensor]]:
    """Which parameters have a gradient here, and gradients for all of them: zeros where there is none."""
    found = {k: gradient.get(k) for k in parameters}
    used = [g is not None for g in found.values()]
    return used, {k: torch.zeros_like(parameters[k]) if g is None else g for k, g in found.items()}


def used_anywhere(flags: Sequence[Sequence[bool]]) -> list[bool]:
    return [any(each) for each in zip(*flags, strict=True)]


def averaged(
    gradient: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor], a: float, group: Group
) -> dict[str, Tensor | None]:
    """Mean over ranks of a times the gradient, as backward() of a data-parallel wrapper; None where no rank has any."""
    flags, grads = filled(gradient, parameters)
    used = used_anywhere(gathered(flags, group))
    weight = a / dist.get_world_size(group)
    device = next(iter(grads.values())).device
    sums = summed({k: weight * g for k, g in grads.items()}, group, device)
    return {k: g if there else None for there, (k, g) in zip(used, sums.items(), strict=True)}


def _buckets(tensors: list[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors of one type that make up a message."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket, size = [], 0
        for i, t in enumerate(tensors):
            if t.dtype == dtype:
                if bucket and size + t.nbytes > BUCKETS.of():
                    yield bucket
                    bucket, size = [], 0
                bucket.append(i)
                size += t.nbytes
        yield bucket
