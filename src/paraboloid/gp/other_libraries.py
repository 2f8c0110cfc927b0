"""Kernels of GPyTorch and scikit-learn, told apart by their names: neither library is imported here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paraboloid.gp.buffers import Buffers, Placed
from paraboloid.gp.kernel import Constant, Features, Kernel, Product, Sum
from paraboloid.gp.rational_quadratic import RationalQuadratic
from paraboloid.gp.stationary import RBF, Matern


def kernel_of(kernel: Any) -> Kernel:
    """The kernel itself, or one of GPyTorch or scikit-learn as ours: RBF, Matern, rational quadratic, constants,
    scalings, sums, products.

    Any other kernel of theirs is called as it is; linear ones and scikit-learn's Matern of any nu have random features
    too, others none (no samples).  ValueError for anything else, and for scikit-learn's WhiteKernel, whose noise
    belongs into `noise_variance`.
    """
    if isinstance(kernel, Kernel):
        values = kernel.hyperparameters()
        graphs = any(v.requires_grad for v in values.values())  # tiles are formed in place
        return kernel.replaced({name: v.detach() for name, v in values.items()}) if graphs else kernel
    origin = [c.__module__.split(".")[0] for c in type(kernel).__mro__]
    if "gpytorch" in origin:
        return _of_gpytorch(kernel)
    if "sklearn" in origin and callable(kernel) and hasattr(kernel, "diag"):
        return _of_sklearn(kernel)
    raise ValueError(f"kernel is a {type(kernel).__name__}; expected one of pb.gp, such as pb.gp.RBF(), or a kernel of "
                     "GPyTorch or scikit-learn.")  # fmt: skip


STATIONARY = ("RBFKernel", "MaternKernel", "RQKernel")


def _of_gpytorch(kernel: Any) -> Kernel:
    if len(kernel.batch_shape):
        raise ValueError(f"the {type(kernel).__name__} has the batch shape {tuple(kernel.batch_shape)}; expected one "
                         "kernel, without a batch.")  # fmt: skip
    return _in_dims(kernel, None if kernel.active_dims is None else kernel.active_dims.tolist())


def _in_dims(kernel: Any, dims: list[int] | None) -> Kernel:
    """The kernel at these dimensions of the inputs, instead of its own active ones."""
    name = type(kernel).__name__
    if name == "ScaleKernel":
        base, scale = kernel.base_kernel, Constant(kernel.outputscale.detach().clone())
        if dims is None:
            return Product(scale, _of_gpytorch(base))
        if type(base).__name__ in STATIONARY:  # it has taken over the dimensions of what it scales
            return Product(scale, _in_dims(base, dims))
        return Foreign(_values(kernel), name=name)
    if name in STATIONARY and kernel.lengthscale.numel() == kernel.lengthscale.shape[-1]:
        lengthscale = kernel.lengthscale.detach().reshape(-1).clone()
        lengthscale = lengthscale if len(lengthscale) > 1 else lengthscale[0]
        if name == "RQKernel":
            return RationalQuadratic(kernel.alpha.detach().reshape(()).clone(), lengthscale, dims=dims)
        return RBF(lengthscale, dims=dims) if name == "RBFKernel" else Matern(kernel.nu, lengthscale, dims=dims)
    if name == "LinearKernel" and dims is None and kernel.variance.numel() == 1:
        return Foreign(_values(kernel), partial(_linear, float(kernel.variance.detach()), 0.0), name)
    if name in ("AdditiveKernel", "ProductKernel"):
        parts, join = [_of_gpytorch(k) for k in kernel.kernels], Sum if name == "AdditiveKernel" else Product
        found = parts[0]
        for part in parts[1:]:
            found = join(found, part)
        return found
    return Foreign(_values(kernel), name=name)


def _values(kernel: Any) -> Any:
    return partial(_gpytorchs_values, kernel)


def _gpytorchs_values(kernel: Any, x: Tensor, z: Tensor) -> Tensor:
    with torch.no_grad():
        return kernel.to(x.dtype)(x, z).to_dense()


def _of_sklearn(kernel: Any) -> Kernel:
    name = type(kernel).__name__
    if name in ("Sum", "Product"):
        return (Sum if name == "Sum" else Product)(_of_sklearn(kernel.k1), _of_sklearn(kernel.k2))
    if name == "ConstantKernel":
        return Constant(float(kernel.constant_value))
    if name == "WhiteKernel":
        raise ValueError(f"kernel holds WhiteKernel(noise_level={kernel.noise_level}); leave it out, and give "
                         f"noise_variance={kernel.noise_level}.")  # fmt: skip
    if name == "RBF" or (name == "Matern" and kernel.nu in (0.5, 1.5, 2.5)):
        lengthscale = torch.as_tensor(np.asarray(kernel.length_scale, dtype=float))
        return RBF(lengthscale) if name == "RBF" else Matern(kernel.nu, lengthscale)
    if name == "RationalQuadratic":
        return RationalQuadratic(float(kernel.alpha), float(kernel.length_scale))
    features = partial(_linear, 1.0, float(kernel.sigma_0)) if name == "DotProduct" else None
    if name == "Matern":
        spectrum = Matern(1.5, torch.as_tensor(np.asarray(kernel.length_scale, dtype=float)))
        spectrum.nu = float(kernel.nu)  # whose frequencies have a distribution for every nu
        features = RBF(spectrum.lengthscale).features if np.isinf(kernel.nu) else spectrum.features

    return Foreign(partial(_sklearns_values, kernel), features, name)


def _sklearns_values(kernel: Any, x: Tensor, z: Tensor) -> Tensor:
    return torch.from_numpy(np.asarray(kernel(x.cpu().numpy(), z.cpu().numpy()))).to(x)


def _linear(variance: float, offset: float, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
    """The inputs themselves and a constant: exact, whatever `count` is."""
    return partial(_inputs_and_one, variance**0.5, offset)


def _inputs_and_one(root: float, offset: float, x: Tensor) -> Tensor:
    return torch.cat([root * x, torch.full_like(x[:, :1], offset)], 1).unsqueeze(2)


class Foreign(Kernel):
    """A kernel known by its values, values(x, z) [N, M], and by its features where it has them."""

    threads = False  # what another library keeps between calls is not known

    def __init__(self, values: Any, features: Any = None, name: str = "another library"):
        self.values, self.own_features, self.name = values, features, name

    def __repr__(self) -> str:
        return f"Foreign({self.name})"

    def features(self, count: int, d: int, generator: torch.Generator, like: Tensor) -> Features:
        if self.own_features is None:
            return super().features(count, d, generator, like)
        return self.own_features(count, d, generator, like)

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.values(x, x if z is None else z)

    def diagonal(self, x: Tensor) -> Tensor:
        return torch.cat([self.values(row, row).reshape(1) for row in x.split(1)])

    def points(self, x: Tensor, shift: Tensor) -> list[Tensor]:
        return [x]

    def tile(self, left: Sequence[Tensor], right: Sequence[Tensor], buffers: Buffers | Placed) -> Tensor:
        return buffers.take(len(left[0]), len(right[0])).copy_(self.values(left[0], right[0]))
