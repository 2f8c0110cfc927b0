"""The curvature that an optimiser keeps: a block for every parameter, measured, averaged over steps, inverted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from paraboloid.distributed import collectives
from paraboloid.engine.tape import doubling
from paraboloid.linalg.kronecker import Kron
from paraboloid.linalg.operand import check_count
from paraboloid.optim.direction import Move
from paraboloid.optim.fisher_factors import Eigenvalues, FisherFactors, Held
from paraboloid.optim.kl_factors import KLFactors
from paraboloid.optim.measurement import Measurement
from paraboloid.optim.options import check_share
from paraboloid.optim.preconditioner import Block


class Curvature:
    """A `Block` for every parameter, by name.

    decay  of their running averages
    """

    def __init__(self, names: Iterable[str], decay: float):
        self.blocks = {name: Block(name) for name in names}
        self.decay = decay

    def add(self, names: Iterable[str]) -> None:
        """Parameters that came later; they take their plain gradient until they are measured."""
        self.blocks |= {name: Block(name) for name in names}

    def precondition(self, m: Move) -> None:
        """(C + damping I)^-1 d, block by block."""
        m.direction = [self.blocks[name].apply(d) for name, d in zip(m.names, m.direction, strict=True)]

    def quadratic(self, name: str, d: Tensor) -> float:
        """d . C d of one block, undamped; 0 where nothing was measured."""
        block = self.blocks[name]
        return 0.0 if block.kron is None else float(block.quadratic(d))

    def state(self) -> dict[str, Any]:
        return {name: block.state() for name, block in self.blocks.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, block in self.blocks.items():
            block.load(state[name])

    def diagnostics(self, sizes: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Structure, damping, curvature (the mean eigenvalue) and failed inversions of each block."""
        return {
            name: {"structure": b.structure, "damping": b.damping, "curvature": b.trace() / sizes[name],
                   "failures": b.failures} for name, b in self.blocks.items()
        }  # fmt: skip


class FisherCurvature(Curvature):
    """Kronecker-factored Fisher information: factors every `factor_interval` steps, inverses every `inverse_interval`.

    split   damping is split between two factors, which are inverted; else eigenbases, in which it is exact
    half    factors from the first half of a batch, eigenvalues from the second
    alone   measured on this rank only
    exact   eigenvalues of their own (EKFAC): averages of sum_{v,n} (u . (J_n^T v) w)^2 in the present eigenbasis
    kl      factors nearest in Kullback-Leibler divergence, see `KLFactors`
    """

    def __init__(
        self, names: Iterable[str], *, fisher: str, samples: int, sharing: str, decay: float, factor_interval: int,
        inverse_interval: int, split: bool, half: bool, exact: bool, max_factor: int, alone: bool = True,
        kl: bool = False,
    ):  # fmt: skip
        super().__init__(names, check_share("factor_decay", decay))
        self.factor_interval = check_count("factor_interval", factor_interval)
        self.inverse_interval = check_count("inverse_interval", inverse_interval)
        self.split, self.half, self.exact = split, half, exact
        self.new = self.stale = False  # parameters came; steps went wrong: to be measured in the next pass
        self._sampling: dict[str, Any] = {"fisher": fisher, "samples": samples}
        kept: dict[str, Any] = {**self._sampling, "sharing": sharing, "max_factor": max_factor}
        # a factor of few rows is these: exact, and its inverse and eigenvectors are the cheaper the fewer they are
        self._kl = (
            KLFactors(self.blocks.keys(), lambda name: self.blocks[name].metric, **kept, thin=alone) if kl else None
        )
        self._factors = self._kl or FisherFactors(self.blocks.keys(), **kept, halves=half, thin=alone)
        self._whole = FisherFactors(self.blocks.keys(), **kept)

    def add(self, names: Iterable[str]) -> None:
        super().add(names)
        self.new = True

    def _metric(self, name: str) -> Kron | None:
        return self.blocks[name].metric

    def factors_due(self, t: int) -> bool:
        return self.new or self.stale or due(t, self.factor_interval)

    def _inverse_due(self, t: int) -> bool:
        return self.stale or due(t, self.inverse_interval) or any(b.kron is None for b in self.blocks.values())

    @property
    def _forms(self) -> dict[str, Any]:
        return {name: b.form for name, b in self.blocks.items() if b.form is not None}

    def quantities(self, t: int) -> list[Any]:
        """What a pass of step t is to measure."""
        if not self.factors_due(t):
            return []
        if not self.exact:
            return [self._factors]
        if self._inverse_due(t):  # the eigenbasis is not there yet
            return [self._factors, Held(self.blocks.keys(), **self._sampling, half=self.half)]
        return [self._factors, Eigenvalues(self._forms, **self._sampling, half=self.half)]

    def warm_start(self, measured: Measurement, batches: Iterable[Any]) -> None:
        """The plain mean over batches, with which the averages begin."""
        for batch in batches:
            found = measured.elsewhere(batch, [self._factors])["fisher_factors"]
            self._average(found, None, decay=1.0)

    def update(self, t: int, measured: Measurement, dampings: Mapping[str, float], measure_on: Any = None) -> None:
        """Average what step t measured (eigenvalues: of the batch measure_on), and invert what is due."""
        expected = self.factors_due(t) if measured.passes else due(t, self.factor_interval)  # new ones may come later
        if expected and (found := measured.found()) is not None:
            renew = self._inverse_due(t)
            if self.stale:  # what is to come counts as much as all that was
                for block in self.blocks.values():
                    block.updates = dict.fromkeys(block.updates, 1)
            other = None if measure_on is None else measured.elsewhere(measure_on, [self._whole])["fisher_factors"]
            self._average(found["fisher_factors"], other, self.decay)
            self.new = self.stale = False
            if renew and not self.split:
                for block in self.blocks.values():
                    if block.kron is not None:
                        block.decompose(carried=self.exact)
            if self.exact:
                self._average_values(found, measured, measure_on)
            if renew or not self.split:
                self._invert(dampings)
            for name in self._kl.sided if renew and self._kl is not None else ():
                if self.blocks[name].kron is not None:
                    self.blocks[name].weigh(dampings[name])
        # an eigendecomposition serves every damping; the split inverses wait for their interval
        if not self.split and any(b.damping not in (0.0, dampings[name]) for name, b in self.blocks.items()):
            self._invert(dampings)

    def _average(self, found: Mapping[str, Any], other: Mapping[str, Any] | None, decay: float) -> None:
        for name, block in self.blocks.items():
            if found.get(name) is None:
                continue
            first, second = found[name] if self.half else (found[name], None)
            block.average(first, decay)
            second = second if other is None else other[name]
            if second is not None:
                block.average(second, decay, other=True)

    def _average_values(self, found: Mapping[str, Any], measured: Measurement, measure_on: Any) -> None:
        forms, held, values = self._forms, found.get("held", {}), found.get("eigenvalues", {})
        if measure_on is not None:
            held, values = {}, measured.elsewhere(measure_on, [Eigenvalues(forms, **self._sampling)])["eigenvalues"]
        for name, form in forms.items():
            vectors = held.get(name)
            value = values.get(name) if vectors is None else vectors.eigenvalues(form)
            if vectors is not None and measured.group is not None:
                value = collectives.summed(value, measured.group, form.values.device)
            if value is not None:
                self.blocks[name].average_values(value, self.decay, other=self.half or measure_on is not None)

    def _invert(self, dampings: Mapping[str, float]) -> None:
        for name, block in self.blocks.items():
            if block.kron is not None:
                block.invert(dampings[name], self.split)


def due(t: int, interval: int) -> bool:
    """Whether step t, from 0, is one of every `interval`; before the first interval is over also 1, 2, 4, 8, ..."""
    return t % interval == 0 or (t < interval and doubling(t))
