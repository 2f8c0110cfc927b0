"""The Jacobian of recorded outputs row by row: for operations that have first derivatives alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from paraboloid.quantities.curvature import SqrtGGN
from paraboloid.quantities.recording import record

Recorded = Callable[[Callable[[], Any]], AbstractContextManager[Iterator[tuple[Any, Tensor, Any]]]]


def check_rows(outputs: int, parameters: Sequence[Tensor], most: int) -> None:
    """Raise RuntimeError where so many rows do not fit into `most` bytes."""
    size = outputs * sum(p.numel() * p.element_size() for p in parameters)
    if size > most:
        raise RuntimeError(
            "an operation of the model has no second derivative in torch, so that products with the Jacobian take its "
            f"rows, {outputs} of them in {size / 2**30:.3g} GiB; expected at most {most / 2**30:.3g} GiB. Give a "
            "larger max_memory, or write the operation out in plain torch operations."
        )


def by_engine(model: Any, recorded: Recorded, counts: Sequence[int], max_memory: int) -> list[Tensor] | None:
    """J of every batch, [N K, D], from a pass of its own with one backward pass for each element of an output.

    `counts` are the batches' output elements.  None where the samples are not separate.
    """
    found = []
    try:
        with warnings.catch_warnings(), recorded(lambda: record(model)) as tapes:
            warnings.simplefilter("ignore")  # a fallback for one call is cheaper than what it replaces
            for tape, f, _ in tapes:
                check_rows(sum(counts), list(tape.parameters.values()), max_memory)
                units = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device).view(-1, 1, *f.shape[1:])
                parts = tape.of_vectors(f, iter(units.expand(-1, *f.shape)), SqrtGGN(), max_memory)
                rows = torch.cat([t.flatten(2) for t in parts.values()], 2)  # [K, N, D]
                found.append(rows.transpose(0, 1).flatten(0, 1).to(next(iter(tape.parameters.values())).dtype))
    except (ValueError, NotImplementedError):
        return None
    return found


def by_pulls(f: Tensor, parameters: Sequence[Tensor], max_memory: int) -> Tensor:
    """J of one batch, [f.numel(), D], with a backward pass for each row."""
    check_rows(f.numel(), parameters, max_memory)
    warnings.warn(
        "an operation of the model has no second derivative in torch: products with the Jacobian take its rows, one "
        f"backward pass for each of {f.numel()} outputs.", stacklevel=2,
    )  # fmt: skip
    size = sum(p.numel() for p in parameters)
    rows = torch.zeros(f.numel(), size, dtype=parameters[0].dtype, device=f.device)
    for i, row in enumerate(rows):
        unit = torch.zeros(f.numel(), dtype=f.dtype, device=f.device)
        unit[i] = 1
        grads = torch.autograd.grad(f, parameters, unit.view_as(f), retain_graph=True, allow_unused=True)
        pieces = row.split([p.numel() for p in parameters])
        for piece, g in zip(pieces, grads, strict=True):
            if g is not None:
                piece.copy_(g.reshape(-1))
    return rows
