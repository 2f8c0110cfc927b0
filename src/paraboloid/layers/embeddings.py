"""Embedding tables: the input side is a lookup, never a dense one-hot of the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers.registry import EMPTY, Use, lowering, rule


@rule(F.embedding)
def embedding(idx, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None or scale_grad_by_freq:
        return  # renormalised in place, or scaled by counts over the whole batch: no rule of one sample
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)

    factor = None if padding_idx is None else lambda: (idx != padding_idx).reshape(-1, 1, 1, 1)
    looked_up = idx if padding_idx is None else idx.masked_fill(idx == padding_idx, EMPTY)  # padding is no position
    yield Use(
        weight, tuple(range(idx.dim())), right=lambda rows: looked_up.reshape(-1, 1, 1)[rows], flip=True, q=len(weight),
        lookup=True, arrange=lambda g: g.reshape(len(g), -1, 1, 1, weight.shape[1]), factor=factor, affine=True,
    )  # fmt: skip


@lowering(F.embedding)
def unchanged_embedding(
    idx, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False
):  # fmt: skip
    """The same where `max_norm` shortens rows, without writing to the weight; and with dense gradients.

    torch shortens the rows that are looked up in place and takes the gradient at the shortened ones, of which it is the
    identity: so what is looked up plus a constant, if there is one.
    """
    if max_norm is None:
        if not sparse:
            return NotImplemented
        return F.embedding(idx, weight, padding_idx, None, norm_type, scale_grad_by_freq)
    with torch.no_grad():
        norms = torch.linalg.vector_norm(weight, norm_type, dim=1, keepdim=True)
        looked_up = torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, idx.reshape(-1), True)
        change = torch.where((norms > max_norm) & looked_up, max_norm / (norms + 1e-7) - 1, 0) * weight
        change = F.embedding(idx, change) if change.any() else None
    found = F.embedding(idx, weight, padding_idx, None, norm_type, scale_grad_by_freq)
    return found if change is None else found + change


@lowering(F.embedding_bag)
def dense_embedding_bag(*args, **kwargs):
    """The same with dense gradients."""
    if len(args) > 7 and args[7]:
        return F.embedding_bag(*args[:7], False, *args[8:], **kwargs)
    if kwargs.get("sparse"):
        return F.embedding_bag(*args, **{**kwargs, "sparse": False})
    return NotImplemented


@rule(F.embedding_bag)
def embedding_bag(idx, weight, *args, **kwargs):
    """Every entry of a bag is a position; ragged bags are filled up with empty ones.

    left is the bag's gradient, times the entry's weight, over the bag's count for a mean.
    """
    if (found := bags(idx, weight, *args, **kwargs)) is not None:
        idx, factor = found
        yield Use(
            weight, (0,), right=lambda rows: idx[rows].unsqueeze(1), flip=True, q=len(weight), lookup=True,
            arrange=lambda g: g[:, :, None, None].expand(-1, -1, 1, idx.shape[1], -1),
            factor=factor.detach()[:, None, :, None], affine=True,
        )  # fmt: skip


def bags(
    idx, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """The entries of every bag of `F.embedding_bag`, [bags, T], EMPTY where there is none; and the factor that each is
    summed with.  None where the result is no such sum of one bag."""
    if max_norm is not None or scale_grad_by_freq or mode == "max":
        return None  # as above; the largest entry of a bag is found by the operation itself
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    factor = torch.ones_like(idx, dtype=weight.dtype) if per_sample_weights is None else per_sample_weights
    if offsets is not None:
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(idx)])])
        starts = offsets[: len(ends)]
        idx, factor = _filled(idx, starts, ends, EMPTY), _filled(factor, starts, ends, 0)
    if padding_idx is not None:
        idx = idx.masked_fill(idx == padding_idx, EMPTY)
    present = idx != EMPTY
    factor = factor.masked_fill(~present, 0)
    if mode == "mean":
        factor = factor / present.sum(1, keepdim=True).clamp(min=1)
    return idx, factor


def _filled(t: Tensor, starts: Tensor, ends: Tensor, empty: float) -> Tensor:
    """The pieces starts..ends of t [M] as rows, filled up with `empty` to the longest, [B T]."""
    longest = max(1, int((ends - starts).max()))
    at = starts[:, None] + torch.arange(longest, device=t.device)
    return t[at.clamp(max=len(t) - 1)].masked_fill(at >= ends[:, None], empty)
