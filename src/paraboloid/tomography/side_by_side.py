"""The deep image priors of many sinograms at once: networks of their own, trained side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_count
from paraboloid.passes.modes import in_own_arithmetic
from paraboloid.passes.random_state import seeded
from paraboloid.tomography.measurement import as_projector
from paraboloid.tomography.reconstruction import HEADROOM, Reconstruction, iterations_for
from paraboloid.tomography.sinograms import as_sinogram
from paraboloid.tomography.training import Training, rate
from paraboloid.tomography.u_net import UNet
from paraboloid.tomography.variation import SHARE, scale_of, total_variation, variation


@dataclass(eq=False)
class SideBySide:
    """Networks that were trained together.

    fits      a `Reconstruction` of each sinogram
    network   all of them as one, of `copies`; its input, [1, copies, H, W]
    """

    fits: list[Reconstruction]
    network: UNet
    input: Tensor

    @torch.no_grad()
    def masked(self, count: int, seed: int) -> Tensor:
        """Images under random masks of dropout, [copies, count, H, W]."""
        self.network.train()
        with seeded(seed):
            found = torch.stack([self.network(self.input)[0] for _ in range(count)], 1)
        return torch.stack([fit.model.image(h) for fit, h in zip(self.fits, found, strict=True)])  # pyright: ignore


@in_own_arithmetic
def deep_image_priors(
    A: Sequence[Any], y: Sequence[Tensor], noise_variances: Sequence[float], seeds: Sequence[int], *,
    iterations: int | None = None, lr: float = 1e-2, stop: bool = True, dropout: float = 0.0,
) -> SideBySide:  # fmt: skip
    """`deep_image_prior` of each sinogram [angles, detectors], for images of one size: to rounding what it gives alone.

    All convolutions of one place are one grouped convolution, which takes half of the time on a processor.  A network
    that reached its noise keeps the weights of that iterate while the others go on (stop=True); dropout is of channels,
    with masks from the first of the seeds.
    """
    if iterations is not None:
        check_count("iterations", iterations)
    y = [as_sinogram(one) for one in y]
    alone = [
        _training(as_projector(B, one), one, s2, seed, iterations, lr)
        for B, one, s2, seed in zip(A, y, noise_variances, seeds, strict=True)
    ]
    z = torch.cat([t.input for t in alone], 1)
    with seeded(seeds[0]):
        network = UNet(1, (), (-math.inf, math.inf), dropout=dropout, copies=len(alone)).to(z)
        _put(network, alone)
        stopped = _trained(network, z, alone, stop)
    network.eval()
    with torch.no_grad():
        fits = [_finished(t, why) for t, why in zip(alone, stopped, strict=True)]
    return SideBySide(fits, network, z)


def _training(A: Any, y: Tensor, s2: float, seed: int, iterations: int | None, lr: float) -> Training:
    scale = scale_of(A, y)
    z = total_variation(A, y, SHARE * s2 / scale).reshape(1, 1, *A.takes)
    with seeded(seed):
        model = UNet(1, (), (0.0, HEADROOM * float(z.max())), scale, float(z.mean())).to(z)
    iterations = iterations_for(A) if iterations is None else iterations
    return Training(A, y, s2, SHARE / scale, iterations, lr, model, z)


def _finished(t: Training, why: str) -> Reconstruction:
    bounds = (0.0, HEADROOM * float(t.input.max()))
    return Reconstruction(t.model(t.input)[0], t.model, t.input, t.A, t.y, t.noise_variance, t.misfit, why, bounds)


def _put(network: UNet, alone: Sequence[Training]) -> None:
    """The weights of all networks into the one."""
    states = [t.model.state_dict() for t in alone]
    network.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})


def _taken(network: UNet, k: int, copies: int) -> dict[str, Tensor]:
    """The weights of the copy k."""
    return {name: p.chunk(copies)[k].detach().clone() for name, p in network.state_dict().items()}


def _trained(network: UNet, z: Tensor, alone: Sequence[Training], stop: bool) -> list[str]:
    """Train to the end, each network's weights into its own model; why each ended."""
    iterations, lr = alone[0].iterations, alone[0].lr
    optimizer = torch.optim.Adam(network.parameters(), lr, fused=True)
    found: dict[int, str] = {}
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = rate(lr, i, iterations)
        optimizer.zero_grad()
        with torch.enable_grad():
            squares, loss = _losses(network, z, alone)
            loss.backward()
        for k, t in enumerate(alone):
            misfit = squares[k] / t.y.numel()
            if not math.isfinite(misfit):
                raise RuntimeError(f"the misfit of network {k} in iteration {i} is {misfit}; expected a finite number. "
                                   f"Lower lr (now {lr:g}).")  # fmt: skip
            if k in found:
                continue
            if stop and misfit <= t.noise_variance:
                found[k] = "discrepancy"
                t.model.load_state_dict(_taken(network, k, len(alone)))
            else:
                t.misfit.append(misfit)
        if len(found) == len(alone):
            break
        optimizer.step()
    for k, t in enumerate(alone):
        if k not in found:
            t.model.load_state_dict(_taken(network, k, len(alone)))
    return [found.get(k, "iterations") for k in range(len(alone))]


def _losses(network: UNet, z: Tensor, alone: Sequence[Training]) -> tuple[list[float], Tensor]:
    """Squared misfits, and the sum of what each network minimises."""
    h, squares, total = network(z), [], z.new_zeros(())
    for k, t in enumerate(alone):
        x = t.model.image(h[:, k])  # pyright: ignore
        square = t.loss(x, t.y.unsqueeze(0))
        total = total + square / (2 * t.noise_variance) + t.tv * variation(x)
        squares.append(square.detach())
    return torch.stack(squares).tolist(), total
