"""The rows S_n^T J_n whose squares add up to the curvature of the data, a bounded number of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import torch
from torch import Tensor

from paraboloid.losses.leading_root import LeadingRoot
from paraboloid.passes.memory import DENSE, GIB, ROWS
from paraboloid.passes.modes import own_arithmetic
from paraboloid.passes.torch_internals import DisableTorchFunction
from paraboloid.posteriors.structures.rows import compressed
from paraboloid.quantities.curvature import SqrtGGN
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.quantity import Quantity, Scale
from paraboloid.quantities.recording import output_vectors
from paraboloid.quantities.result import finished
from paraboloid.quantities.sums import Sums


def check_memory(what: str, size: int, instead: str) -> None:
    """Raise ValueError for tensors that would not fit; say how large they are, and what would."""
    if size > DENSE.of():
        raise ValueError(f"{what} would take {size / GIB:.1f} GiB; expected at most {DENSE.of() / GIB:.0f}. "
                         f"{instead}")  # fmt: skip


def rows(
    passes: OverData, quantity: Quantity, generator: torch.Generator, leave: Callable[[Sums], None],
    batch: Callable[[int, int], None] = lambda V, N: None,
) -> Iterator[Tensor]:  # fmt: skip
    """[v N, D] of a batch's N samples and v of its V columns of the root, one after the other.

    `batch` is told V and N of each, where they are known before anything is pulled back; `leave` sees what a tolerance
    left out.
    """
    source, D = quantity.source, sum(p.numel() for p in passes.parameters.values())
    if not isinstance(quantity, SqrtGGN) or source.tol:  # each sample's own number of columns; or one: gradients
        for sums, f, _ in passes.by_batch([quantity], generator):
            leave(sums)
            found = finished(quantity, sums.values[quantity.name], passes.parameters, Scale(sums.N, 1.0))
            joined = _joined(list(found.values()), isinstance(quantity, SqrtGGN))
            batch(len(joined) // len(f), len(f))
            yield joined
        return
    for tape, f, y in passes:
        batch(passes.loss.root_columns(f) if source.kind == "root" else source.samples, len(f))
        step = ROWS.count(len(f) * D * f.element_size(), passes.max_memory, f.device)
        with DisableTorchFunction(), own_arithmetic(passes.device):
            vectors = output_vectors(passes.loss, f, y, source, generator)
            assert not isinstance(vectors, LeadingRoot)
            first = next(vectors, None)
        while first is not None:
            some = chain((first,), islice(vectors, step - 1))
            yield _joined(list(tape.of_vectors(f, some, quantity, passes.max_memory).values()), True)
            with DisableTorchFunction(), own_arithmetic(passes.device):
                first = next(vectors, None)
        del tape, f, y, vectors, first


def all_rows(
    passes: OverData, quantity: Quantity, generator: torch.Generator, leave: Callable[[Sums], None]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """(rows [R, D], (V, N) of each batch): where there are more than D they are compressed to D on the way, with the
    same squares, and no batches' own any more.

    Raises ValueError where a posterior of them would not fit, before they are formed where their number is known.
    """
    D, held, batches = sum(p.numel() for p in passes.parameters.values()), list[Tensor](), list[tuple[int, int]]()
    size = next(iter(passes.parameters.values())).element_size()

    def batch(V: int, N: int) -> None:
        batches.append((V, N))
        R, n = min(D, sum(V * N for V, N in batches)), sum(N for _, N in batches)
        check_memory(
            f"structure='functional' with the {R} rows of {n} samples ({V} for each) for {D} weights, their inner "
            "products and what they determine", 2 * (R * D + R * R) * size,
            f"{_fewer(n, V, D, size)} fewer weights (weights='last_layer'), or structure='kron', 'diag' or 'lowrank'.",
        )  # fmt: skip

    for found in rows(passes, quantity, generator, leave, batch):
        held.append(found)
        del found
        if sum(map(len, held)) > 2 * D:
            held = [compressed(torch.cat(held))]
    A = torch.cat(held) if len(held) > 1 else held.pop()
    held.clear()
    as_they_came = len(A) == sum(V * N for V, N in batches) <= D
    return compressed(A), batches if as_they_came else []


def _fewer(samples: int, V: int, D: int, size: int) -> str:
    """How many samples would fit."""
    half = DENSE.of() / (2 * size)
    most = int(((D * D + 4 * half) ** 0.5 - D) / 2 / V)  # R D + R^2 = half
    return f"Give subset={most}," if 0 < most < samples else "One sample alone would not fit: take"


def _joined(parts: list[Tensor], columns: bool) -> Tensor:
    """[V N, D] of the parameters' [V, N, *shape], or [N, *shape] without columns."""
    lead = 2 if columns else 1
    flat = [t.reshape(t.shape[:lead].numel(), -1) for t in parts]
    parts.clear()
    return torch.cat(flat, 1) if len(flat) > 1 else flat[0]
