"""Certify that samples do not mix between the output and every recorded call, and find where the samples lie there.

Pull a random u and w * u, where w_n = +-2^k differs from sample to sample.  The map from output to call is linear, so
the samples are independent if and only if some layout of the call's axes gives g(w u) = w g(u).  Powers of two commute
with rounding, so the comparison is nearly exact, and their spread (2^-12 to 2^12) magnifies a leak between samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Axis `axis` of a call's output unflattens into (a, N, b): N the samples, a and b positions."""

    axis: int
    sizes: tuple[int, int, int]


def sample_weights(N: int, generator: torch.Generator) -> Tensor:
    """w_n = +-2^k, k in -12..12, [N]; all different while N <= 50, so that no two axes can be confused."""
    order = torch.cat([torch.randperm(50, generator=generator) for _ in range(-(-N // 50))])[:N]
    return 2.0 ** (order % 25 - 12) * (1 - 2 * (order // 25))


def layouts_of(shape: Sequence[int], N: int) -> Iterator[Layout]:
    """The ways in which an axis can hold the samples: as [N b] or as [a N]."""
    for axis, d in enumerate(shape):
        if d and d % N == 0:
            for a in sorted({1, d // N}):
                yield Layout(axis, (a, N, d // N // a))


def certify(
    f: Tensor, calls: Sequence[Any], parameters: Sequence[Tensor], where: Callable[[Any], str]
) -> tuple[list[Layout | None], tuple[Tensor, list[Tensor | None], list[Tensor | None]]]:
    """The layout of the samples at every call (None where nothing flows back), and one pull to check the rules with:
    the random vector, its gradients at the calls, and autograd's own gradients of the parameters.

    Costs two pulls and one parameter gradient.  Raises ValueError, naming the call, where the samples mix.
    """
    N, edges = len(f), [c.edge for c in calls]
    generator = torch.Generator().manual_seed(0)
    w = sample_weights(N, generator)
    u = torch.randn(f.shape, generator=generator, dtype=torch.float32).to(f)
    grads = torch.autograd.grad(f, [*edges, *parameters], u, retain_graph=True, allow_unused=True)
    gs, truth = list(grads[: len(edges)]), list(grads[len(edges) :])
    scaled = u * w.to(u).view(-1, *[1] * (f.dim() - 1))
    hs = torch.autograd.grad(f, edges, scaled, retain_graph=True, allow_unused=True) if edges else ()
    layouts: list[Layout | None] = []
    for call, g, h in zip(calls, gs, hs, strict=True):
        if g is None or h is None:
            layouts.append(None)
            continue
        tolerance = torch.finfo(g.dtype).eps ** 0.6 * g.abs().max()
        fitting = (layout for layout in layouts_of(call.shape, N) if _fits(g, h, w, layout, tolerance))
        layout = next(fitting, None)
        if layout is None:
            raise ValueError(
                f"{where(call)}: its output {tuple(call.shape)} does not separate into the {N} samples along any "
                "axis, so there are no per-sample gradients here. Something between it and the output mixes or "
                "reorders the samples: BatchNorm in training mode (call model.eval()), a softmax or mean over the "
                "batch, a flip."
            )
        layouts.append(layout)
    return layouts, (u, gs, truth)


def _fits(g: Tensor, h: Tensor, w: Tensor, layout: Layout, tolerance: Tensor) -> bool:
    axis, sizes = layout
    column = w.to(g).view(-1, *[1] * (g.dim() - axis))
    return bool((h.unflatten(axis, sizes) / column - g.unflatten(axis, sizes)).abs_().max() <= tolerance)
