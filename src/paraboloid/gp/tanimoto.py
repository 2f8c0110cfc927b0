"""The Tanimoto (Jaccard, min-max) kernel of counts and fingerprints, with features by weighted min-wise hashing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from paraboloid.gp.buffers import Buffers, Placed
from paraboloid.gp.kernel import Features, Kernel, positive
from paraboloid.passes.memory import HASHED


class Tanimoto(Kernel):
    """outputscale * sum_i min(x_i, z_i) / sum_i max(x_i, z_i), inputs not negative; 1 where both are all 0.

    For fingerprints of zeros and ones it is the Jaccard index, also written x.z / (|x|^2 + |z|^2 - x.z).
    Source: Ralaivola et al. 2005; features: Tripp et al. 2023, arXiv:2306.14809.
    """

    def __init__(self, outputscale: float | Tensor = 1.0):
        self.outputscale = positive("outputscale", outputscale)

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        z = x if z is None else z
        total = _checked(x).sum(1, keepdim=True) + _checked(z).sum(1)
        lower = (total - torch.cdist(x, z, p=1)) / 2
        return self.outputscale.to(x) * torch.where(total > 0, lower / (total - lower).clamp(min=1e-30), 1)

    def diagonal(self, x: Tensor) -> Tensor:
        return self.outputscale.to(x).expand(len(x))

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        return [_checked(x), x.sum(1)]

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        (x, a), (z, b) = left, right
        lower, total = buffers.take(len(x), len(z)), buffers.take(len(x), len(z))
        torch.add(a.unsqueeze(1), b, out=total)
        if _binary(x) and _binary(z):
            torch.mm(x, z.T, out=lower)  # the smaller of two bits is their product
        else:
            torch.sub(total, torch.cdist(x, z, p=1), out=lower).mul_(0.5)
        total.sub_(lower)
        lower.masked_fill_(total == 0, 1)
        lower.div_(total.masked_fill_(total == 0, 1)).mul_(float(self.outputscale))
        buffers.give(total)
        return lower

    def hyperparameters(self) -> dict[str, Tensor]:
        return {"outputscale": self.outputscale}

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        return Tanimoto(values.get("outputscale", self.outputscale))

    def __repr__(self) -> str:
        return f"Tanimoto({float(self.outputscale):.4g})"

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        """Random signs of `count` hashes of each input that two inputs share with probability k: consistent weighted
        sampling (Ioffe 2010)."""

        def draw(scale: int) -> Tensor:
            """Gamma(2, 1) for 2, uniform for 1."""
            u = torch.rand(scale, count, d, generator=generator, device=generator.device, dtype=torch.float64)
            u = u.to(like.device)
            return -u.clamp(min=1e-300).log().sum(0) if scale == 2 else u[0]

        r, c, beta = draw(2), draw(2), draw(1)
        key = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
        scale = (self.outputscale.to(like) / count).sqrt()
        return partial(_hashes, r, c, beta, key, scale)


def _hashes(r: Tensor, c: Tensor, beta: Tensor, key: int, scale: Tensor, x: Tensor) -> Tensor:
    """[N, F, 1]."""
    rows = [_signs(part.double(), r, c, beta, key) for part in _checked(x).split(HASHED.count(8 * r.numel()))]
    return (torch.cat(rows).to(x) * scale.to(x)).unsqueeze(2)


def _signs(x: Tensor, r: Tensor, c: Tensor, beta: Tensor, key: int) -> Tensor:
    """[N, F] of +1 and -1, the same for two inputs whose f-th hashes agree."""
    N, F = len(x), len(r)
    levels = torch.floor(x.log().unsqueeze(1) / r + beta)  # [N, F, d]; -inf where an entry is 0
    cost = torch.where(x.unsqueeze(1) > 0, c * torch.exp(-r - r * (levels - beta)), torch.inf)
    best = cost.argmin(2, keepdim=True)
    level = levels.gather(2, best).squeeze(2).nan_to_num(neginf=-1e6).long()
    return 1 - 2 * (_mixed(best.view(N, F) + 7919 * _mixed(level) + _mixed(torch.arange(F, device=x.device) + key)) & 1)


def _mixed(h: Tensor) -> Tensor:
    """A pseudo-random 31-bit number of an integer (xorshift and multiply)."""
    mask = 2**31 - 1
    h = h & mask
    h = ((h ^ (h >> 15)) * 0x2C1B3C6D) & mask
    h = ((h ^ (h >> 12)) * 0x297A2D39) & mask
    return (h ^ (h >> 15)) & mask


def _binary(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _checked(x: Tensor) -> Tensor:
    if bool((x < 0).any()):
        raise ValueError(f"the inputs of Tanimoto go down to {x.min().item():.4g}; expected counts or fingerprints: no "
                         "negative entries.")  # fmt: skip
    return x
