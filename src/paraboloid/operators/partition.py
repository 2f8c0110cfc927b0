"""Which parameters form one block of a block-diagonal matrix, and where a block's elements lie in a flat vector.

blocks: "all" (one block), "parameter" (a block for each), "layer" (the parameters of one module together), or a list of
lists of names that holds each parameter once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from paraboloid.passes.parameter_layers import layers_of

Blocks = str | Sequence[Sequence[str]]


def resolve_blocks(parameters: Mapping[str, Tensor], blocks: Blocks) -> list[list[int]] | None:
    """The places of each block's parameters in the order of `parameters`; None for "all".

    Raises ValueError for wrong names.
    """
    names = list(parameters)
    if blocks == "all":
        return None
    if blocks == "parameter":
        return [[i] for i in range(len(names))]
    if blocks == "layer":
        blocks = list(layers_of(names).values())
    if isinstance(blocks, str):
        raise ValueError(f"blocks is {blocks!r}; expected 'all', 'parameter', 'layer' or a list of lists of names.")
    given = [list(block) for block in blocks]
    flat = [name for block in given for name in block]
    unknown, missing = sorted(set(flat) - set(names)), [name for name in names if name not in flat]
    repeated = sorted({name for name in flat if flat.count(name) > 1})
    if unknown or missing or repeated or not all(given):
        raise ValueError(
            f"blocks does not hold every parameter once: unknown {unknown}, missing {missing}, repeated {repeated}; "
            f"expected lists with the names {names}."
        )
    at = {name: i for i, name in enumerate(names)}
    return [sorted(at[name] for name in block) for block in given]


def places(parameters: Mapping[str, Tensor], block: Sequence[int]) -> Tensor:
    """Where the elements of a block's parameters lie in a flat vector, [D_b]."""
    sizes = [p.numel() for p in parameters.values()]
    ends = torch.tensor(sizes, device="cpu").cumsum(0).tolist()
    device = next(iter(parameters.values())).device
    return torch.cat([torch.arange(ends[i] - sizes[i], ends[i], device=device) for i in block])


def spans(parameters: Mapping[str, Tensor], blocks: Sequence[Sequence[int]]) -> list[slice | Tensor]:
    """`places` of each block; as a slice where its parameters follow each other."""
    ends = [0, *accumulate(p.numel() for p in parameters.values())]
    return [
        slice(ends[b[0]], ends[b[-1] + 1]) if list(b) == list(range(b[0], b[-1] + 1)) else places(parameters, b)
        for b in blocks
    ]  # fmt: skip


def block_names(parameters: Mapping[str, Tensor], blocks: Sequence[Sequence[int]]) -> list[str]:
    names = list(parameters)
    return [
        f"parameter {names[b[0]]!r}" if len(b) == 1 else f"the block of parameters {[names[i] for i in b]}"
        for b in blocks
    ]
