"""Whether autograd's second derivatives of a model are right: told by numbers, once for an operator.

They are wrong where an operation's backward pass was not written to be differentiated: it is cut off (a NumPy kernel,
`once_differentiable`), or has a formula of its own.  Nothing raises then.  The tests, on the first batch:

- J v and J^T w belong together, w . (J v) = (J^T w) . v; or H v and H w do
- zero is symmetric too: where the rows of a Hessian are zero, or the model has a custom `autograd.Function`, a product
  is compared with a difference of two gradients
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from paraboloid.passes.autograd_walks import custom_functions

STEPS = 1e-4, 3e-5  # of the differences, relative to the parameters; 100 times as long below float64
SAME = 0.05  # how much two differences that tell the same may differ: a kink lies between other gradients
ROUNDING = 50  # units of rounding of the gradient that a product with the Hessian may be off by (a saturated sigmoid)

Elsewhere = Callable[[Sequence[Tensor]], AbstractContextManager[Any]]  # the first batch's graph at other parameters


class Differenced:
    """A graph of gradients, whose products a difference of two gradients tells too: what those graphs derive from."""

    f: Tensor
    g: list[Tensor]
    curvature: list[Tensor]
    """v and H v of the last `adjoint_pair`."""
    direction: list[Tensor]

    def gradient(self) -> list[Tensor]:
        """The gradient of the unreduced loss, one tensor for each parameter."""
        raise NotImplementedError


class Certificate:
    """`check(graph)` raises RuntimeError where the second derivatives of a graph are wrong, until one was right.

    loose: whether part of the computation has half precision.
    """

    def __init__(self, name: str, parameters: Sequence[Tensor], loose: bool):
        self.name, self.parameters, self.given = name, parameters, False
        double = parameters[0].dtype == torch.float64
        self.tolerance = 1e-6 if double and not loose else 2e-2
        self.steps = tuple(step if double else 100 * step for step in STEPS)

    def check(self, graph: Any, elsewhere: Elsewhere) -> None:
        """Done once, on one batch.

        ``with elsewhere(values) as other`` gives the first batch's graph with the parameters at other values.
        """
        if self.given:
            return
        self.compare(graph, *_pair(graph))
        if isinstance(graph, Differenced):
            self._difference(graph, elsewhere)

    def compare(self, graph: Any, one: Tensor, other: Tensor, scale: Tensor) -> None:
        """Raise RuntimeError unless the two numbers are equal, but for rounding."""
        allowed = self.tolerance * scale
        if isinstance(graph, Differenced):
            gradient = torch.stack([g.detach().norm() for g in graph.g]).norm()
            allowed = allowed + ROUNDING * torch.finfo(gradient.dtype).eps * gradient
        self.given = bool(abs(one - other) <= allowed)
        if not self.given:
            raise self._wrong(f"two numbers that must be equal are {one.item():.10g} and {other.item():.10g}")

    def _difference(self, graph: Differenced, elsewhere: Elsewhere) -> None:
        """Compare a product of the Hessian with differences of two gradients, where symmetry does not tell."""
        custom = custom_functions(graph.f)
        doubtful = [i for i, h in enumerate(graph.curvature) if custom or not h.any()]
        if not doubtful:
            return
        first, second = (self._differences(graph, step, elsewhere) for step in self.steps)
        for i in doubtful:
            a, b, found = first[i], second[i], graph.curvature[i]
            size = max(float(b.norm()), float(found.norm()))
            told = float((a - b).norm()) <= SAME * float(b.norm()) and size > self._rounding(graph, i)
            if told and float((b - found).norm()) > 2 * SAME * size:
                self.given = False
                what = f" It has the custom functions {sorted(set(custom))}." if custom else ""
                numbers = f"{found.norm().item():.6g} in one parameter, and {b.norm().item():.6g}"
                raise self._wrong(f"the lengths of a product with the Hessian and of a difference of gradients are "
                                  f"{numbers}", what)  # fmt: skip

    def _step(self, relative: float) -> float:
        values = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        return relative * max(float(values.square().mean().sqrt()), 1e-3)

    def _differences(self, graph: Differenced, relative: float, elsewhere: Elsewhere) -> list[Tensor]:
        """(g(theta + h v) - g(theta - h v)) / 2 h, one tensor for each parameter."""
        h, sides = self._step(relative), []
        for sign in (1, -1):
            moved = [p.detach() + sign * h * v for p, v in zip(self.parameters, graph.direction, strict=True)]
            with elsewhere(moved) as other:
                sides.append(other.gradient())
        return [(a - b) / (2 * h) for a, b in zip(*sides, strict=True)]

    def _rounding(self, graph: Differenced, i: int) -> float:
        """What rounding may leave of a difference where there is none."""
        largest = max(float(g.detach().abs().max()) for g in graph.g if g.numel())
        eps = torch.finfo(self.parameters[i].dtype).eps
        return 1e3 * eps * largest * graph.g[i].numel() ** 0.5 / self._step(min(self.steps))

    def _wrong(self, numbers: str, what: str = "") -> RuntimeError:
        return RuntimeError(
            f"autograd's second derivative of {self.name} is wrong: {numbers}.{what} Some operation of the model has "
            "no correct double backward (a custom autograd.Function, a fused kernel); write it out in plain torch "
            "operations."
        )


def _pair(graph: Any) -> tuple[Tensor, Tensor, Tensor]:
    return graph.adjoint_pair(torch.Generator(graph.f.device).manual_seed(0))


def lacks_derivative(e: Exception) -> bool:
    """Whether the error says that an operation's backward pass cannot be differentiated."""
    text = str(e)
    missing = "derivative for" in text and "not implemented" in text
    return missing or "once_differentiable" in text or "Can't call numpy() on Tensor that requires grad" in text


def without_derivative(e: Exception) -> RuntimeError:
    """The same for those who need one."""
    missing = str(e).splitlines()[0].rstrip(".")
    return RuntimeError(
        f"an operation of the model has no second derivative in torch ({missing}), which the Hessian needs; expected "
        "operations that can be differentiated twice. pb.GGN, pb.Fisher and pb.EmpiricalFisher need first derivatives "
        "alone."
    )
