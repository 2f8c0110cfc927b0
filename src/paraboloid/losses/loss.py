"""What a loss is: the class that every loss, and a user's own, derives from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

REDUCTIONS = ("mean", "sum", "batchmean")
FROM_TORCH: dict[type[nn.Module], Callable[[Any], Loss]] = {}  # torch class -> the Loss of such a module


TOLERANCE = 1e-6  # relative size of negative eigenvalues of an output-Hessian that count as rounding


class NoTargets(ValueError):
    """Every target of a batch is ignored: its mean is 0/0, though it adds nothing to the sum over several batches."""


class Loss:
    """A loss that separates over samples (axis 0 of the output); the class to derive your own from.

        class Huberised(pb.Loss):
            def sample_losses(self, f, y):
                return ((f - y).square() + 1).sqrt().flatten(1).sum(1)

    `sample_losses` is all that is needed: gradient, Hessian and its root come from autograd in output space (the root
    by an eigen-decomposition of each sample's Hessian).  Give any of them in closed form to be faster.  What else may
    be given:

    sample_targets   draws labels from the model's predictive distribution; without it, quantities that sample labels
                     ("kfac", "diag_ggn_mc") raise NotImplementedError
    normalizer       what the reduction divides by, if not by the number of samples
    psd              what `hessian_root` does where the output-Hessian is indefinite (the loss is not convex in the
                     output): "raise" a ValueError, or "clip" the negative eigenvalues to zero
    check            raises ValueError for targets that do not fit

    With ``loss(f, y)``, the differentiable reduced value, a `Loss` trains a model as a torch loss does; ``2 * loss``
    and ``loss + other`` are losses too.

    Two matrices belong to a loss.  `hessian_product` is its exact second derivative.  `curvature_product` is the
    positive semi-definite one that `hessian_root` is a root of, from which the generalised Gauss-Newton matrix is made:
    the same for a convex loss; else the clipped Hessian, or the Fisher information where a loss says so
    (`GaussianNLL`).
    """

    reduction: str = "mean"  # "sum" divides by nothing however many batches there are; else normalizers add up
    psd: str = "raise"
    exact_root: bool = False  # whether `hessian_root` is known to be a root of the exact Hessian, whatever f and y are

    def __call__(self, f: Tensor, y: Tensor) -> Tensor:
        value = self.value(f, y)
        for hook in tuple(self._hooks.values()):
            hook(f, y, value)
        return value

    @property
    def _hooks(self) -> dict[int, Callable[[Tensor, Tensor, Tensor], None]]:
        return self.__dict__.get("_called", {})

    def register_hook(self, hook: Callable[[Tensor, Tensor, Tensor], None]) -> RemovableHandle:
        """``hook(f, y, value)`` after every call ``loss(f, y)``; the handle's `remove()` takes it off."""
        self.__dict__.setdefault("_called", OrderedDict())
        handle = RemovableHandle(self.__dict__["_called"])
        self.__dict__["_called"][handle.id] = hook
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_called"}

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss as reduced, a differentiable scalar."""
        return self.sample_losses(f, y).sum() / self.normalizer(f, y)

    def sample_losses(self, f: Tensor, y: Tensor) -> Tensor:
        """Unreduced loss of each sample, [N]: the sum of its elements, ignored elements counting zero."""
        raise NotImplementedError(f"{type(self).__name__} has no `sample_losses`; expected a method that returns the "
                                  "loss of each sample, [N].")  # fmt: skip

    def normalizer(self, f: Tensor, y: Tensor) -> float:
        """What the reduction divides the summed loss by: 1 for "sum", else a number that adds up over batches.

        The number of samples, unless a subclass counts otherwise.
        """
        return 1.0 if self.reduction == "sum" else float(len(f))

    @property
    def terms(self) -> list[Loss]:
        """The losses that this one is a sum of, each with a normalizer of its own; most are a single term."""
        return [self]

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """Gradient of sum_n l_n in the output, shape of f."""
        with torch.enable_grad():
            f = full(f).requires_grad_()
            return torch.autograd.grad(self.sample_losses(f, y).sum(), f)[0]

    def hessian_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """H u for the output-Hessian H of sum_n l_n; u has the shape of f, with any leading axes."""
        with torch.enable_grad():
            f = full(f).requires_grad_()
            (g,) = torch.autograd.grad(self.sample_losses(f, y).sum(), f, create_graph=True)
            if not g.requires_grad:  # linear in f
                return torch.zeros_like(u, dtype=f.dtype)
            columns = u.to(f.dtype).reshape(-1, *f.shape)
            products = [torch.autograd.grad(g, f, c, retain_graph=True, materialize_grads=True)[0] for c in columns]
        return torch.stack(products).view(u.shape)

    def curvature_product(self, f: Tensor, y: Tensor, u: Tensor) -> Tensor:
        """sum_v s_v (s_v . u) per sample, for the vectors s_v of `hessian_root`; H u itself unless psd is "clip"."""
        if self.psd == "raise":
            return self.hessian_product(f, y, u)
        root = torch.stack(list(self.hessian_root(f, y))).flatten(2)  # [V N C]
        flat = u.to(root).reshape(-1, len(f), root.shape[2])
        return torch.einsum("vnc,vnd,knd->knc", root, root, flat).reshape(u.shape)

    def root_columns(self, f: Tensor) -> int:
        """Number of vectors that `hessian_root` yields."""
        return f[0].numel()

    def hessian_root(self, f: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Vectors s_v of f's shape with sum_v s_v[n] s_v[n]^T = H_n, exactly (see `psd`), for every sample n."""
        if self.psd not in ("raise", "clip"):
            raise ValueError(f"{type(self).__name__}.psd is {self.psd!r}; expected 'raise' or 'clip'.")
        f = full(f)
        units = torch.eye(f[0].numel(), dtype=f.dtype, device=f.device).view(-1, 1, *f.shape[1:]).expand(-1, *f.shape)
        hessians = self.hessian_product(f, y, units).reshape(len(units), len(f), -1).transpose(0, 1)  # [N, C, C]
        values, vectors = torch.linalg.eigh((hessians + hessians.mT) / 2)
        if self.psd == "raise":
            scale = values.abs().amax(1, keepdim=True)
            if (values < -TOLERANCE * (scale + TOLERANCE * scale.max())).any():
                raise ValueError(
                    f"the output-Hessian has the eigenvalue {values.min():.4g}; expected a loss that is convex in the "
                    f"output, which alone has a real root. Set psd = 'clip' on {type(self).__name__} to replace "
                    "negative eigenvalues by zero, or take a quantity of the exact Hessian (diag_hessian, pb.Hessian)."
                )
        root = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
        return iter(root.permute(2, 0, 1).reshape(-1, *f.shape))

    def sample_targets(self, f: Tensor, generator: torch.Generator) -> Tensor:
        """Labels drawn from the predictive distribution that the output f stands for, as targets of this loss."""
        raise NotImplementedError(
            f"{type(self).__name__} does not say how to draw labels from the model's predictive distribution; expected "
            "a `sample_targets` method. Use a quantity that takes the exact output-Hessian instead."
        )

    def sampled_gradients(self, f: Tensor, y: Tensor, samples: int, generator: torch.Generator) -> Iterator[Tensor]:
        """`samples` random vectors of f's shape with E[sum_v s_v[n] s_v[n]^T] the curvature of sample n: the output
        gradients at labels from `sample_targets`, divided by sqrt(samples) (Monte Carlo Fisher)."""
        targets = [self.sample_targets(full(f), generator) for _ in range(samples)]
        return (self.gradient(f, drawn) / samples**0.5 for drawn in targets)

    def check(self, f: Tensor, y: Tensor) -> None:
        """Raise ValueError where output and target do not fit this loss, or its samples are not separate."""
        check_lengths(f, y)
        with torch.no_grad():
            each, first = self.sample_losses(full(f), y), self.sample_losses(full(f[:1]), y[:1])
        if each.shape != (len(f),):
            raise ValueError(f"{type(self).__name__}.sample_losses returned shape {tuple(each.shape)} for outputs "
                             f"{tuple(f.shape)}; expected one number per sample, [{len(f)}].")  # fmt: skip
        if not torch.allclose(each[:1], first, rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(f"{type(self).__name__}: the loss of sample 0 is {float(each[0]):.6g} in the batch and "
                             f"{float(first[0]):.6g} alone; expected a loss that separates over samples and leaves "
                             "the division by their number to `normalizer`.")  # fmt: skip

    def __mul__(self, scale: float) -> Loss:
        from paraboloid.losses.algebra import Scaled

        return Scaled(self, float(scale))

    __rmul__ = __mul__

    def __add__(self, other: Loss) -> Loss:
        from paraboloid.losses.algebra import Sum

        return Sum(self, other) if isinstance(other, Loss) else NotImplemented

    @staticmethod
    def from_torch(module: object) -> Loss:
        """The `Loss` that equals a torch loss module, with all its options; a `Loss` is returned as it is.

        Raises ValueError for ``reduction="none"`` and TypeError for anything without a known output-Hessian.
        """
        if isinstance(module, Loss):
            return module
        for torch_class, build in FROM_TORCH.items():
            if isinstance(module, torch_class) and type(module).forward is torch_class.forward:
                return build(module)
        raise TypeError(
            f"the loss {_name(module)} is not one that paraboloid knows; expected one of "
            f"{[c.__name__ for c in FROM_TORCH]} or a pb.Loss. Subclass pb.Loss to add your own."
        )


def _name(thing: object) -> str:
    return getattr(thing, "__name__", None) or type(thing).__name__


def check_reduction(reduction: str) -> str:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {REDUCTIONS} (per-sample values come from "
                         "pb.statistics, not from reduction='none').")  # fmt: skip
    return reduction


def check_lengths(f: Tensor, y: Tensor) -> None:
    if f.dim() == 0 or len(f) == 0:
        raise ValueError(f"the model's output has shape {tuple(f.shape)}; expected axis 0 to be the N >= 1 samples.")
    if y.dim() == 0 or len(y) != len(f):
        raise ValueError(f"the output has {len(f)} samples but the targets have shape {tuple(y.shape)}; expected the "
                         "same length along axis 0.")  # fmt: skip
    if y.device != f.device:
        raise ValueError(f"the output is on {f.device} but the targets are on {y.device}; move the batch to the model.")


def full(f: Tensor) -> Tensor:
    """Detached output in at least float32: softmax and sums of a half-precision output are taken in float32."""
    f = f.detach()
    return f.float() if f.dtype in (torch.float16, torch.bfloat16) else f
