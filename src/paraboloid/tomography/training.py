"""The training of a network on one sinogram: every step, and a checkpoint on the way."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.losses import MSE, Observed
from paraboloid.tomography.projector import Projector
from paraboloid.tomography.variation import variation

SAVE_EVERY = 100  # iterations


@dataclass(eq=False)
class Training:
    """The network and everything that decides its next step."""

    A: Projector
    y: Tensor
    noise_variance: float
    tv: float
    iterations: int
    lr: float
    model: nn.Module
    input: Tensor
    misfit: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loss = Observed(MSE("sum"), self.A)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(weights, self.lr, fused=True)

    def run(self, enough: float, checkpoint: str | Path | None, progress: Any) -> str:
        """Train to the end; why it ended."""
        while len(self.misfit) < self.iterations:
            i = len(self.misfit)
            for group in self.optimizer.param_groups:
                group["lr"] = rate(self.lr, i, self.iterations)
            self.optimizer.zero_grad()
            with torch.enable_grad():
                x = self.model(self.input)
                square = self.loss(x, self.y.unsqueeze(0))
                (square / (2 * self.noise_variance) + self.tv * variation(x)).backward()
            misfit = float(square.detach()) / self.y.numel()
            if not math.isfinite(misfit):
                raise RuntimeError(f"the misfit of iteration {i} is {misfit}; expected a finite number. Lower lr "
                                   f"(now {self.lr:g}).")  # fmt: skip
            if misfit <= enough:
                self.save(checkpoint)
                return "discrepancy"
            self.optimizer.step()
            self.misfit.append(misfit)
            if (i + 1) % SAVE_EVERY == 0 or i + 1 == self.iterations:
                self.save(checkpoint)
            if progress is not None:
                progress(i + 1, self.iterations)
        return "iterations"

    @property
    def problem(self) -> str:
        """A fingerprint of everything but the state."""
        seen = hashlib.sha256(repr((self.noise_variance, self.tv, self.iterations, self.lr, self.A.shape)).encode())
        for t in (self.y, self.input):
            seen.update(t.cpu().contiguous().numpy().tobytes())
        return seen.hexdigest()

    def save(self, path: str | Path | None) -> None:
        """Written beside the old file and then put in its place: never half a file."""
        if path is None:
            return
        state = {"problem": self.problem, "misfit": self.misfit, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict()}  # fmt: skip
        beside = Path(f"{path}.new")
        torch.save(state, beside)
        os.replace(beside, path)

    def resume(self, path: Path) -> None:
        if not path.exists():
            if not path.parent.is_dir():
                raise ValueError(
                    f"the checkpoint's folder {str(path.parent)!r} is missing; expected one to write into."
                )
            return
        try:
            state = torch.load(path, weights_only=True)
        except Exception as e:  # whatever torch says to a file that is none of its own
            raise ValueError(f"{str(path)!r} is no checkpoint of a reconstruction ({type(e).__name__}); expected one, "
                             "or no file there.") from e  # fmt: skip
        if not isinstance(state, dict) or state.get("problem") != self.problem:
            raise ValueError(f"the checkpoint {str(path)!r} is that of another sinogram, operator or options; expected "
                             "the call that wrote it. Remove the file to start anew.")  # fmt: skip
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.misfit = state["misfit"]


def rate(lr: float, i: int, iterations: int) -> float:
    """The learning rate of iteration i: half a period of a cosine, from lr to 0."""
    return lr * (1 + math.cos(math.pi * i / iterations)) / 2
