"""Weight matrices step along the polar factors of their averaged gradients, as far as Adam would."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Output
from paraboloid.linalg.operand import check_choice
from paraboloid.linalg.polar import polar_factors
from paraboloid.losses import Loss
from paraboloid.optim import direction, foreach
from paraboloid.optim.adam_length import AdamLength
from paraboloid.optim.base import Frame
from paraboloid.optim.closures import Closure
from paraboloid.optim.direction import Move, Part
from paraboloid.optim.options import check_made, check_number, check_share
from paraboloid.optim.trust import check_rise
from paraboloid.reductions.kronecker_factors import MAX_FACTOR, check_max_factor

KEPT = 0.8  # of the promised change, on the next batch: steps of Adam's length may be far too short
RMS = 0.2  # of an entry of Adam's step at lr 1, as the paper has it
JOINED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose bias is one more column of the weight
TABLES = (nn.Embedding, nn.EmbeddingBag)  # whose rows are words, of which few have a gradient


class Polar(Frame):
    """Each weight matrix [p, q], its bias as another column, takes a step with equal singular values:

        M <- momentum M + (1 - momentum) g,   N = momentum M + (1 - momentum) g
        theta <- theta - lr ||m / (sqrt(v) + eps)|| D / ||D||,   D = (N N^T + 1e-7 ||N||_2^2 I)^-1/2 N

        opt = pb.optim.Polar(model, loss_fn)
        loss_fn(model(x), y).backward()
        opt.step()

    lr          Adam's learning rate: the step of a weight, and that of a bias, is as long as Adam's (graft="adam",
                betas momentum and .999)
    momentum    of the running average M; nesterov=False: N = M
    graft       None: the paper's length, lr .2 sqrt(max(p, q)) D
    paper       True: the paper's length and lr .02, and nothing is watched (graft=None, rise_factor=None)
    rise_factor, weight_decay, decoupled, params, all_reduce: as in `KFAC`
    max_factor  a matrix whose shorter side is longer takes Adam's step, which is said once

    Kernels of convolutions are matrices [out, in * positions].  Everything else (norms, embeddings and what is tied to
    them, matrices with a side of one) takes Adam's step.  Only gradients are used, so nothing is hooked; loss_fn and
    output are of the other optimisers' interface.  A step with NaN or infinite gradients is skipped, see `KFAC`.

    Raises ValueError for options out of range.
    Sources: Jordan et al. 2024 (Muon) for the direction, here by eigenvectors of N N^T instead of Newton-Schulz
    iterations; Liu et al. 2025, arXiv:2502.16982, for the paper's length; Agarwal et al. 2020, arXiv:2002.11803, for
    Adam's.
    """

    OPTIONS = ("graft", "nesterov", "rise_factor", "max_factor", "paper")
    PAPER: Mapping[str, Any] = {"lr": 0.02, "graft": None}
    OURS: Mapping[str, Any] = {"lr": 5e-3, "graft": "adam"}

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module | Loss | None = None,
        *,
        lr: float | None = None,
        params: Iterable[Any] | None = None,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        momentum: float = 0.95,
        nesterov: bool = True,
        graft: str | None = "auto",
        rise_factor: float | None = 2.0,
        paper: bool = False,
        max_factor: int = MAX_FACTOR,
        all_reduce: Any = "auto",
        output: Output | None = None,
        **options: Any,
    ):
        check_made(type(self).__name__, model, loss_fn, options)
        check_choice("graft", graft, ("auto", "adam", None))
        chosen = self.PAPER if paper else self.OURS
        self.graft: str | None = chosen["graft"] if graft == "auto" else graft
        self.nesterov, self.paper, self.max_factor = nesterov, paper, check_max_factor(max_factor)
        self.rise_factor = None if paper else check_rise(rise_factor)
        defaults = {"lr": check_number("lr", chosen["lr"] if lr is None else lr, 0),
                    "momentum": check_share("momentum", momentum), "decoupled": decoupled,
                    "weight_decay": check_number("weight_decay", weight_decay, 0)}  # fmt: skip
        super().__init__(model, defaults, params, 0, all_reduce)
        self._said = False
        self._compose()

    def _compose(self) -> None:
        super()._compose()
        self._adam = AdamLength(1.0)
        around = [direction.coupled_decay, direction.averaged, self._turn]
        self._parts: list[Part] = [*around, direction.decoupled_decay, direction.descend]
        self._biases = self._matrices()

    def _short(self) -> float | None:
        return None if self.graft is None else KEPT

    def _added(self, names: Iterable[str]) -> None:
        self._biases = self._matrices()

    def _matrices(self) -> dict[str, str | None]:
        """The weights that are turned, each with the bias that is its last column."""
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, TABLES)}
        shapes = {name: (len(p), p[0].numel()) for p, name in self.names.items() if p.dim() > 1 and id(p) not in tables}
        long = [name for name, shape in shapes.items() if min(shape) > self.max_factor]
        if long and not self._said:
            self._said = True
            warnings.warn(f"the weights {long} have no side of at most max_factor={self.max_factor} rows: they take "
                          "Adam's step.", stacklevel=5)  # fmt: skip
        found: dict[str, str | None] = {
            name: None for name, shape in shapes.items() if min(shape) > 1 and name not in long
        }
        names: dict[Any, str] = dict(self.names)
        for m in self.model.modules():
            if isinstance(m, JOINED) and m.bias is not None and names.get(m.weight) in found:
                found[names[m.weight]] = names.get(m.bias)
        return found

    def _turn(self, m: Move) -> None:
        """Polar factors as long as they should be; Adam's steps of what is no matrix."""
        steps, corrections = self._adam.steps(m)
        ahead = _ahead(m) if self.nesterov else m.direction
        place: dict[str | None, int] = {name: i for i, name in enumerate(m.names)}
        pairs = [(place[w], place.get(b)) for w, b in self._biases.items() if w in place]
        factors = polar_factors([_matrix(ahead[w], None if b is None else ahead[b]) for w, b in pairs])
        if self.graft is None:
            lengths = [RMS * (D.shape[0] * D.shape[1]) ** 0.5 for D in factors]
        else:
            norms = [n * c for n, c in zip(foreach.norms(steps), corrections, strict=True)]
            lengths = [norms[w] if b is None else math.hypot(norms[w], norms[b]) for w, b in pairs]
        sizes = foreach.norms(factors) if factors else []
        shares = [n / size if size > 0 else 1.0 for n, size in zip(lengths, sizes, strict=True)]
        turned = [step.mul_(c) for step, c in zip(steps, corrections, strict=True)]
        for (w, b), D in zip(pairs, foreach.scaled(factors, shares) if factors else [], strict=True):
            turned[w] = (D if b is None else D[:, :-1]).reshape(m.params[w].shape)
            if b is not None:
                turned[b] = D[:, -1]
        m.direction = [d.to(p.dtype) for d, p in zip(turned, m.params, strict=True)]

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; returns the closure's loss, if one was given."""
        first = self._judged(evaluated := self._evaluated(closure), None if evaluated is None else evaluated.value)
        if (moves := self._moves()) is None:
            self._lose()
        elif self._begin(moves):
            for m in moves:
                for part in self._parts:
                    part(m)
            self._end(moves)
            self.counters["steps"] += 1
        return None if first is None else first.loss

    def diagnostics(self) -> dict[str, Any]:
        """Counters, and for each parameter its structure: "polar", or "adam" for what is no matrix."""
        polar = {*self._biases, *self._biases.values()}
        layers = {name: {"structure": "polar" if name in polar else "adam"} for name in self.names.values()}
        return {**super().diagnostics(), "layers": layers}


def _ahead(m: Move) -> list[Tensor]:
    """Nesterov's: the averages as they would be after one more gradient like this one."""
    mu = m.group["momentum"]
    return foreach.added(foreach.scaled(m.direction, mu), m.gradient, alpha=1 - mu)


def _matrix(weight: Tensor, bias: Tensor | None) -> Tensor:
    """[p, q] in at least float32, the bias its last column."""
    M = weight.flatten(1)
    M = M if bias is None else torch.cat([M, bias.unsqueeze(1)], 1)
    return M.float() if M.dtype in (torch.float16, torch.bfloat16) else M
