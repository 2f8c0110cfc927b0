"""Embedding tables: the input side is a lookup, never a dense one-hot of the vocabulary."""

from __future__ import annotations

import torch.nn.functional as F

from paraboloid.layers import Use, rule


@rule(F.embedding)
def embedding(idx, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False):
    if max_norm is not None or scale_grad_by_freq:
        return  # renormalised in place, or scaled by counts over the whole batch: no rule of one sample
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)

    def left(g):
        if padding_idx is not None:
            g = g.masked_fill((idx == padding_idx).unsqueeze(-1), 0)
        return g.reshape(len(g), -1, 1, 1, weight.shape[1])

    yield Use(
        weight, tuple(range(idx.dim())), left, lambda rows: idx.reshape(-1, 1, 1)[rows], flip=True, q=len(weight),
        lookup=True,
    )  # fmt: skip
