"""The net under everything: a backward pass per sample, for the parameters that no recorded call covers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from paraboloid.reductions.outer import EVERYTHING, Outer, known


def pull_one_by_one(
    f: Tensor, v: Tensor, parameters: Mapping[str, Tensor], said: set[str], some: slice = EVERYTHING
) -> dict[str, list[Outer]]:
    """J_n^T v_n [V, N, *shape] of the named parameters, exactly: V N backward passes, with a warning unless `said`;
    of some of the samples."""
    N = len(f)
    samples = range(N)[some]
    for name in parameters:
        if name not in said:
            warnings.warn(
                f"parameter {name!r} is used by an operation that could not be recorded (a fused recurrent layer, "
                f"a custom autograd.Function, a scripted module); falling back to {N} backward passes for it: "
                "exact but slow, and without Kronecker factors.", stacklevel=5,
            )  # fmt: skip
    J = [p.new_zeros(len(v), len(samples), *p.shape) for p in parameters.values()]
    for i, u in enumerate(v):
        for at, n in enumerate(samples):
            alone = torch.zeros_like(u)
            alone[n] = u[n]
            found = torch.autograd.grad(f, list(parameters.values()), alone, retain_graph=True, allow_unused=True)
            for each, g in zip(J, found, strict=True):
                if g is not None:
                    each[i, at] = g
    return {name: [known(each)] for name, each in zip(parameters, J, strict=True)}
