"""What a kernel is: values that can be differentiated, tiles that are formed in place, random features; and algebra."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.buffers import Buffers, Placed

Features = Callable[[Tensor], Tensor]  # x [N, d] -> [N, F, p] with E[sum_fp phi(x)_fp phi(z)_fp] = k(x, z)


class Kernel(ABC):
    """A positive semi-definite function k(x, z) of inputs [N, d].

    `kernel(x, z)` is [N, M] and can be differentiated with respect to inputs and hyperparameters; `a + b`, `a * b`,
    `a + 1.0` and `2.0 * a` are kernels.  What a kernel of one's own must give: `__call__`, `diagonal`, `points`,
    `tile`; `features` where samples are wanted, and `hyperparameters` with `replaced` where these are to be learned.
    `threads` says whether several threads may form tiles at the same time.
    """

    threads = True

    @abstractmethod
    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """k(x, z), [N, M]; without z, k(x, x)."""

    @abstractmethod
    def diagonal(self, x: Tensor) -> Tensor:
        """k(x_n, x_n), [N]."""

    @abstractmethod
    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        """What tiles are made from: tensors with one row for each input.  `shift` [d] may be taken off every input
        where that changes no value (rounding is smallest around 0)."""

    @abstractmethod
    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        """k for rows of two lists of points, [B, C], in a matrix taken from the buffers: the first, which may be where
        the tile is kept."""

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        """Random features with `count` columns or a few less, in all."""
        raise ValueError(f"{type(self).__name__} has no random features, which samples are drawn with; condition with "
                         "samples=0 (variances are then exact, by a solve for each input), or use a kernel of "
                         "pb.gp.")  # fmt: skip

    def hyperparameters(self) -> dict[str, Tensor]:
        """Positive numbers that the kernel depends on, by name."""
        return {}

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        """The same kernel with other hyperparameters."""
        return self

    def __add__(self, other: Any) -> Kernel:
        if isinstance(other, Kernel):
            return Sum(self, other)
        return Sum(self, Constant(other)) if isinstance(other, int | float | Tensor) else NotImplemented

    def __mul__(self, other: Any) -> Kernel:
        if isinstance(other, Kernel):
            return Product(self, other)
        return Product(Constant(other), self) if isinstance(other, int | float | Tensor) else NotImplemented

    __radd__, __rmul__ = __add__, __mul__


class Constant(Kernel):
    """k(x, z) = outputscale."""

    def __init__(self, outputscale: float | Tensor = 1.0):
        self.outputscale = positive("outputscale", outputscale)

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.outputscale.to(x).expand(len(x), len(x if z is None else z))

    def diagonal(self, x: Tensor) -> Tensor:
        return self.outputscale.to(x).expand(len(x))

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        return [x.new_empty(len(x), 0)]

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        return buffers.take(len(left[0]), len(right[0])).fill_(float(self.outputscale))

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        root = self.outputscale.to(like).sqrt()
        return partial(_same, root)

    def hyperparameters(self) -> dict[str, Tensor]:
        return {"outputscale": self.outputscale}

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        return Constant(values.get("outputscale", self.outputscale))

    def __repr__(self) -> str:
        return f"Constant({float(self.outputscale):.4g})"


class _Pair(Kernel):
    """Two kernels put together."""

    symbol = "+"

    def __init__(self, first: Kernel, second: Kernel):
        self.first, self.second = first, second
        self.threads = first.threads and second.threads

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        mine = self.first.points(x, shift)
        self._split = len(mine)
        return mine + self.second.points(x, shift)

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        k = self._split
        tile = self.first.tile(left[:k], right[:k], buffers)
        other = self.second.tile(left[k:], right[k:], buffers)
        self._join(tile, other)
        buffers.give(other)
        return tile

    def _join(self, tile: Tensor, other: Tensor) -> None:
        raise NotImplementedError

    def hyperparameters(self) -> dict[str, Tensor]:
        parts = (("first", self.first), ("second", self.second))
        return {f"{side}.{name}": value for side, k in parts for name, value in k.hyperparameters().items()}

    def replaced(self, values: dict[str, Tensor]) -> Kernel:
        def of(side: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{side}."): v for name, v in values.items() if name.startswith(f"{side}.")}

        return type(self)(self.first.replaced(of("first")), self.second.replaced(of("second")))

    def __repr__(self) -> str:
        return f"({self.first} {self.symbol} {self.second})"


class Sum(_Pair):
    """k1(x, z) + k2(x, z)."""

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.first(x, z) + self.second(x, z)

    def diagonal(self, x: Tensor) -> Tensor:
        return self.first.diagonal(x) + self.second.diagonal(x)

    def _join(self, tile: Tensor, other: Tensor) -> None:
        tile.add_(other)

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        first = self.first.features(max(1, count // 2), d, generator, like)
        second = self.second.features(max(1, count // 2), d, generator, like)
        return partial(_beside, first, second)


class Product(_Pair):
    """k1(x, z) k2(x, z)."""

    symbol = "*"

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.first(x, z) * self.second(x, z)

    def diagonal(self, x: Tensor) -> Tensor:
        return self.first.diagonal(x) * self.second.diagonal(x)

    def _join(self, tile: Tensor, other: Tensor) -> None:
        tile.mul_(other)

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        """Those of the two side by side: independent ones f, E[phi1 phi1' phi2 phi2'] = k1 k2, F of them; a sum is
        multiplied out before."""
        for factor, other in ((self.first, self.second), (self.second, self.first)):
            if isinstance(factor, Sum):
                both = Product(factor.first, other) + Product(factor.second, other)
                return both.features(count, d, generator, like)
        first = self.first.features(count // 2, d, generator, like)
        second = self.second.features(count // 2, d, generator, like)
        return partial(_multiplied, first, second)


def _same(root: Tensor, x: Tensor) -> Tensor:
    return root.expand(len(x), 1, 1)


def _beside(first: Features, second: Features, x: Tensor) -> Tensor:
    return torch.cat([first(x).flatten(1), second(x).flatten(1)], 1).unsqueeze(2)


def _multiplied(first: Features, second: Features, x: Tensor) -> Tensor:
    a, b = first(x), second(x)
    if a.shape[1] > 1 and b.shape[1] > 1:  # one alone (a constant) goes with all of the other
        F = min(a.shape[1], b.shape[1])
        ratio = (a.shape[1] * b.shape[1] / F) ** 0.5
        a, b = a[:, :F] * ratio, b[:, :F]
    return (a.unsqueeze(3) * b.unsqueeze(2)).flatten(2)


def positive(name: str, value: float | Tensor, dim: int = 0) -> Tensor:
    """The value as a tensor of at most `dim` axes; ValueError unless it is positive and finite."""
    try:
        value = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}; expected a positive number.") from None
    if value.is_meta:
        raise ValueError(f"{name} is on the device 'meta', which holds no numbers; expected a positive number.")
    if not value.is_floating_point() and not value.is_complex():
        value = value.double()
    wrong = value.is_complex() or value.dim() > dim or not value.numel()
    if wrong or not bool((torch.isfinite(value) & (value > 0)).all()):
        expected = "a positive number" + (", or one for each input dimension" if dim else "")
        raise ValueError(f"{name} is {value.tolist()}; expected {expected}.")
    return value
