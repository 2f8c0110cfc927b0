"""Certify that samples do not mix between the output and every recorded call, and find where the samples lie there.

Pull a random u and w * u, where w_n = +-2^k differs from sample to sample.  The map from output to call is linear, so
the samples are independent if and only if some layout of the call's axes gives g(w u) = w g(u).  Powers of two commute
with rounding, so the comparison is nearly exact, and their spread (2^-12 to 2^12) magnifies a leak between samples.

Samples that are apart but along no axis (shuffled inside the model, one expert's rows, the nodes of graphs of unequal
sizes, a loop over samples) are told by the ratio h / g itself: each element has the weight of the sample that owns it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from paraboloid.passes.memory import COMPARED
from paraboloid.passes.modes import largest_entry, rounding

DRAWN = 1_000_003  # random numbers
WIDE, NARROW = 12, 3  # largest k; the narrow spread is for float16, which ends at 2^16


class Layout(NamedTuple):
    """Axis `axis` of a call's output unflattens into (a, N, b): N the samples, a and b positions."""

    axis: int
    sizes: tuple[int, int, int]


class Owned(NamedTuple):
    """No axis of a call's output holds the samples, but each element belongs to one: `owner` of z's shape, int64; -1
    for elements that no gradient reaches.  It follows from this batch's numbers alone."""

    owner: Tensor
    samples: int


Layouts = list[Layout | Owned | None]  # one for each call; None: nothing flows back to it


def sample_weights(N: int, generator: torch.Generator, spread: int = WIDE) -> Tensor:
    """w_n = +-2^k, k in -12..12, [N]; all different while N <= 50, so that no two axes can be confused."""
    powers = 2 * spread + 1
    draws = range(-(-N // (2 * powers)))
    order = torch.cat([torch.randperm(2 * powers, generator=generator, device="cpu") for _ in draws])[:N]
    return 2.0 ** (order % powers - spread) * (1 - 2 * (order // powers))


def vanishing(dtype: torch.dtype, spread: int = WIDE) -> float:
    """Up to where gradients underflow once they are weighted: numbers of this size say nothing about samples.

    Not in float16, whose ordinary gradients are as small: there the narrow spread and a loss scale have to do.
    """
    return 0.0 if dtype == torch.float16 else 2.0**spread * torch.finfo(dtype).tiny


def layouts_of(shape: Sequence[int], N: int) -> Iterator[Layout]:
    """The ways in which an axis can hold the samples: as [N b] or as [a N]."""
    for axis, d in enumerate(shape):
        if d and d % N == 0:
            for a in sorted({1, d // N}):
                yield Layout(axis, (a, N, d // N // a))


def _random_like(f: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers in float32 in the shape and the memory order of f, so that the pull copies nothing; of a large f
    the same `DRAWN` again and again, a prime number, so that no axis repeats."""
    drawn = torch.empty(f.numel(), dtype=torch.float32, device="cpu")
    first, *others = drawn.split(DRAWN) if len(drawn) else (drawn,)
    first.normal_(generator=generator)
    for part in others:
        part.copy_(first[: len(part)])
    order = sorted(range(f.dim()), key=f.stride, reverse=True)
    return drawn.view([f.shape[axis] for axis in order]).permute([order.index(axis) for axis in range(f.dim())])


def certify(
    f: Tensor, calls: Sequence[Any], parameters: Sequence[Tensor], where: Callable[[Any], str], spread: int = WIDE
) -> tuple[Layouts, tuple[list[Tensor | None], list[Tensor | None]]]:
    """The layout of the samples at every call (None where nothing flows back), and one pull to check the rules with:
    of a random vector the gradients at the calls, and autograd's own gradients of the parameters.

    Costs two pulls and one parameter gradient.  Raises ValueError, naming the call, where the samples mix.
    """
    N, edges = len(f), [c.edge for c in calls]
    generator = torch.Generator().manual_seed(0)
    w = sample_weights(N, generator, spread)
    u = _random_like(f, generator).to(f)
    scaled = u * w.to(u).view(-1, *[1] * (f.dim() - 1))
    hs: list[Tensor | None] = [None] * len(calls)
    if edges:
        hs = list(torch.autograd.grad(f, edges, scaled, retain_graph=True, allow_unused=True))
    gs: list[Tensor | None] = [None] * len(calls)
    layouts: list[Layout | Owned | None] = [None] * len(calls)
    mixing: list[int] = []
    apart: dict[int, Tensor] = {}  # call -> owners of its elements, modulo the number of different weights
    vanished: list[tuple[int, float]] = []
    half = f.dtype == torch.float16  # powers of two commute with rounding, but float16 has few of them

    def compare(i: int, grads: tuple[Tensor | None, ...]) -> None:
        """Compare as the gradient arrives, so that only one of the two pulls is held in memory."""
        nonlocal half
        g, h, hs[i] = grads[edges[i].output_nr], hs[i], None
        if g is None or h is None or not g.numel():  # an expert or an exit that no sample takes
            return
        gs[i] = g.detach()
        half = half or g.dtype == torch.float16
        largest = largest_entry(g)
        floor = vanishing(g.dtype, spread)
        tolerance = rounding(torch.float16 if half else g.dtype, g.device) ** 0.6 * largest + floor
        if 0 < largest <= floor:
            vanished.append((i, float(largest)))
        fitting = (layout for layout in layouts_of(calls[i].shape, N) if _fits(g, h, w, layout, tolerance))
        layouts[i] = next(fitting, None)
        if layouts[i] is None:
            short = half or min(f.element_size(), g.element_size()) < 4  # a leak may be rounded away
            codes = None if short else _codes(g, h, spread)
            if codes is None:
                mixing.append(i)
            else:
                apart[i] = codes

    hooks = [e.node.register_prehook(lambda grads, i=i: compare(i, grads)) for i, e in enumerate(edges)]
    try:
        truth: list[Tensor | None] = [
            *torch.autograd.grad(f, list(parameters), u, retain_graph=True, allow_unused=True)
        ]
    finally:
        for hook in hooks:
            hook.remove()
    if mixing and half and spread > NARROW:
        return certify(f, calls, parameters, where, NARROW)  # what overflowed or vanished looks like a leak
    if apart and not mixing:
        layouts, mixing = _owners(f, edges, u, layouts, apart, generator, spread)
    if mixing:
        call, g = calls[min(mixing)], gs[min(mixing)]
        raise mixes(where(call), call.shape, N, half or min(t.element_size() for t in (f, g) if t is not None) < 4)
    if vanished:
        i, size = min(vanished)
        warnings.warn(
            f"the gradients at {len(vanished)} of {len(calls)} calls have vanished: at {where(calls[i])} the largest "
            f"entry is {size:.2g}, where {f.dtype} has few digits left. What such calls add is zero up to rounding.",
            stacklevel=2,
        )
    return layouts, (gs, truth)


class Mixing(ValueError):
    """The samples do not separate at a call."""


def mixes(where: str, shape: Sequence[int], N: int, short: bool = False) -> Mixing:
    """short: whether the gradients are in half precision, which leaves open which sample owns a row."""
    hint = " In half precision (autocast too) samples that the model shuffles or routes are refused: use float32."
    return Mixing(
        f"{where}: its output {tuple(shape)} does not separate into the {N} samples along any axis, so there are no "
        "per-sample gradients here. Something above it mixes or reorders the samples: BatchNorm in training mode (call "
        "model.eval()), a mean over the batch, a shared input that is no buffer (one of "
        f"{N} rows may come as [1, {N}, ...]). Nodes may see each other by indices or an adjacency matrix among the "
        "inputs; for other mixing take output[indices] or pb.GGN." + (hint if short else "")
    )


def check_agreement(calls: Sequence[Any], layouts: Layouts, where: Callable[[Any], str]) -> None:
    """Raise ValueError where calls on the same data give its rows to different samples: these see each other's data."""
    seen: dict[int, Tensor] = {}
    for call, layout in zip(calls, layouts, strict=True):
        if isinstance(layout, Owned):
            rows, N = layout.owner.reshape(call.shape[0] if call.shape else 1, -1).max(1).values, layout.samples
        elif layout is not None and layout.axis == 0 and layout.sizes[0] == 1:
            _, N, b = layout.sizes
            rows = torch.arange(N, device=call.held[0][0].device if call.held else None).repeat_interleave(b)
        else:
            continue
        for t, _ in call.held:
            if not any(t is w for w in call.weights):
                known = seen.setdefault(id(t), rows)
                if known.shape == rows.shape and ((known != rows) & (known >= 0) & (rows >= 0)).any():
                    raise mixes(where(call), call.shape, N)


def _codes(g: Tensor, h: Tensor, spread: int) -> Tensor | None:
    """Which weight each element of h = w g has, numbered as `sample_weights` numbers them; -1 where g is zero.  None
    where some element has none of them."""
    reached = g.abs() > vanishing(g.dtype, spread)
    ratio = torch.where(reached, h / torch.where(reached, g, 1), 1)
    if ratio.is_complex():
        ratio = ratio.real.where(ratio.imag.abs() <= rounding(g.dtype, g.device) ** 0.6 * ratio.abs(), 0)
    ratio = ratio.double()
    k = ratio.abs().log2().round()
    exact = ratio.sign() * 2.0**k
    near = (ratio - exact).abs() <= rounding(g.dtype, g.device) ** 0.6 * exact.abs()
    if not bool((near & (k.abs() <= spread)).all()):
        return None
    codes = (k + spread).long() + (2 * spread + 1) * (ratio < 0)
    return torch.where(reached, codes, -1)


def _owners(
    f: Tensor, edges: Sequence[Any], u: Tensor, layouts: Layouts, apart: dict[int, Tensor], generator, spread: int
) -> tuple[Layouts, list[int]]:
    """The samples that own the elements of the calls in `apart`, from further pulls in which the weights are the digits
    of the sample's number; and the calls where the pulls contradict each other."""
    N, different = len(f), 2 * (2 * spread + 1)
    at = sorted(apart)
    found: dict[int, Tensor] = {i: torch.zeros_like(apart[i]) for i in at}
    mixing: list[int] = []
    digit = 1
    while digit < N and not mixing:
        code = (torch.arange(N, device="cpu") // digit) % different
        w = 2.0 ** (code % (different // 2) - spread) * (1 - 2 * (code // (different // 2)))
        scaled = u * w.to(u).view(-1, *[1] * (f.dim() - 1))
        pulls = [
            torch.autograd.grad(f, [edges[i] for i in at], v, retain_graph=True, allow_unused=True) for v in (u, scaled)
        ]
        for i, g, h in zip(at, *pulls, strict=True):
            codes = None if g is None or h is None else _codes(g, h, spread)
            if codes is None:
                mixing.append(i)
            else:
                found[i] = torch.where(codes < 0, -1, found[i] + digit * codes)
        digit *= different
    layouts = list(layouts)
    for i, owner in found.items():
        if (owner >= N).any():
            mixing.append(i)
        layouts[i] = Owned(owner, N)
    return layouts, mixing


def _fits(g: Tensor, h: Tensor, w: Tensor, layout: Layout, tolerance: Tensor) -> bool:
    """Whether h = w g with the samples laid out so; a few samples at a time, so that nothing large is allocated."""
    axis, sizes = layout
    g, h = g.unflatten(axis, sizes).movedim(axis + 1, 0), h.unflatten(axis, sizes).movedim(axis + 1, 0)
    column = w.to(g).view(-1, *[1] * (g.dim() - 1))
    step = max(1, COMPARED.of() * len(g) // g.nbytes)
    ranges = [slice(i, i + step) for i in range(0, len(g), step)]
    worst = [largest_entry((h[n] / column[n]).sub_(g[n])) for n in ranges]
    return bool(torch.stack(worst).max() <= tolerance)
