"""Slopes and curvatures on the batch that chose the directions, on another and on all data: ratios, table, figure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from paraboloid.linalg.operand import check_choice, check_count
from paraboloid.quadratics.bias_prediction import predicted_bias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHICH = ("same", "other", "full")
OF = ("curvature", "slope", "step")
LABELS = {
    "eigen": "direction (top first)", "cg": "direction (CG iteration)",
    "kfac": "direction (KFAC's eigenvalues, top first)", "ekfac": "direction (EKFAC's eigenvalues, top first)",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Bias:
    """Slopes and curvatures along directions from a batch, on that batch ("same"), another one, and all data.

    `curvature[which]` and `slope[which]` are [repeats, k] in float64.  Every direction is turned downhill on its own
    batch, so that slopes can be added over repeats.

    full_samples  of how many samples "full" is the mean; `samples` unless a subset stood for all data
    full_error    then the standard error of "full" that comes from the subset: {"curvature", "slope"}, [repeats, k]
    overlap       [repeats] tr(U^T V V^T U) / k of the batch's directions U and those of all data V, where measured: 1
                  for equal spaces, k / D on average for a random one
    """

    curvature: dict[str, Tensor]
    slope: dict[str, Tensor]
    batch_size: int
    samples: int
    directions: str
    curvature_kind: str
    weight_decay: float
    seed: int
    full_samples: int | None = None
    full_error: dict[str, Tensor] | None = None
    overlap: Tensor | None = None

    @property
    def repeats(self) -> int:
        return len(self.curvature["full"])

    @property
    def k(self) -> int:
        return self.curvature["full"].shape[1]

    def step(self, which: str) -> Tensor:
        """Lengths of the Newton steps, -slope / curvature along each direction: [repeats, k]; NaN for 0 / 0."""
        self._check(which)
        return -self.slope[which] / self.curvature[which]

    def predicted(self, spectrum: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
        """The ratios "same" and "other" [k] that `predicted_bias` expects of random samples with that full spectrum.

        For batches' eigenvectors alone: ValueError for other directions.
        """
        if self.directions != "eigen":
            raise ValueError(f"the directions are {self.directions!r}; the prediction is for 'eigen' directions.")
        return predicted_bias(
            spectrum, self.batch_size, self.samples, self.k, weights=weights, weight_decay=self.weight_decay
        )

    def ratio(self, which: str, of: str = "curvature") -> Tensor:
        """Sum over repeats divided by the same sum for "full", for each direction: [k].

        of  "curvature", "slope" or "step", the length of the Newton step
        """
        part, full = self._pair(which, of)
        return part.sum(0) / full.sum(0)

    def standard_error(self, which: str, of: str = "curvature") -> Tensor:
        """Standard error of `ratio` over the repeats, [k]; NaN for a single repeat."""
        return _ratio_error(*self._pair(which, of))

    def total_ratio(self, which: str, k: int | None = None, of: str = "curvature") -> float:
        """Sum over repeats and the first k directions (default: all), divided by the same sum for "full"."""
        part, full = (values[:, : self._first(k)].sum() for values in self._pair(which, of))
        return (part / full).item()

    def total_standard_error(self, which: str, k: int | None = None, of: str = "curvature") -> float:
        """Standard error of `total_ratio` over the repeats; NaN for a single repeat."""
        part, full = (values[:, : self._first(k)].sum(1, keepdim=True) for values in self._pair(which, of))
        return _ratio_error(part, full).item()

    def table(self, predicted: dict[str, Tensor] | None = None) -> str:
        """Ratios to the full data with their standard errors, a row for each direction, as Markdown.

        Of curvatures, slopes and the lengths of Newton steps; what `predicted` returned stands beside them, and the
        overlap below where it was measured.  A dash is undefined: a ratio to 0, an error of a single repeat.
        """
        kinds = [(which, of) for of in OF for which in ("same", "other")]
        expected = {} if predicted is None else self._expected(predicted)
        names = [f"{of} {which}/full" for which, of in kinds] + [
            f"curvature {which}/full, predicted" for which in expected
        ]
        lines = ["| direction | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
        columns = [(self.ratio(which, of), self.standard_error(which, of)) for which, of in kinds]
        for i in range(self.k):
            cells = [_with_error(ratio[i].item(), error[i].item()) for ratio, error in columns]
            cells += [_three_decimals(values[i].item()) for values in expected.values()]
            lines.append(f"| {i + 1} | " + " | ".join(cells) + " |")
        totals = [
            _with_error(self.total_ratio(which, of=of), self.total_standard_error(which, of=of)) for which, of in kinds
        ]
        full = self.curvature["full"].mean(0)
        totals += [_three_decimals((values @ full / full.sum()).item()) for values in expected.values()]
        lines.append("| all | " + " | ".join(totals) + " |")
        if self.overlap is not None:
            lines += ["", f"Overlap with the directions of all data: {_with_error(*mean_error(self.overlap))}."]
        return "\n".join(lines)

    def to_json(self, predicted: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Everything as plain data for strict JSON: undefined numbers are None.

        "predicted" holds what `predicted` returned, where it is given.
        """
        return {
            "batch_size": self.batch_size,
            "samples": self.samples,
            "k": self.k,
            "repeats": self.repeats,
            "directions": self.directions,
            "curvature_kind": self.curvature_kind,
            "weight_decay": self.weight_decay,
            "seed": self.seed,
            "full_samples": self.samples if self.full_samples is None else self.full_samples,
            "full_error": None if self.full_error is None else {k: plain(v) for k, v in self.full_error.items()},
            "overlap": None if self.overlap is None else plain(self.overlap),
            "step": {which: plain(self.step(which)) for which in WHICH},
            "curvature": {which: plain(self.curvature[which]) for which in WHICH},
            "slope": {which: plain(self.slope[which]) for which in WHICH},
            "ratio": {
                of: {
                    which: {
                        "value": plain(self.ratio(which, of)),
                        "standard_error": plain(self.standard_error(which, of)),
                    }
                    for which in ("same", "other")
                }
                for of in OF
            },
            "predicted": None if predicted is None else {w: plain(v) for w, v in self._expected(predicted).items()},
        }

    def plot(self, predicted: dict[str, Tensor] | None = None) -> Figure:
        """A figure: curvature, slope and length of the Newton step along each direction, mean ± standard error.

        What `predicted` returned is drawn dashed, as those ratios times the mean curvature on all data.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 3.8), layout="constrained")
        labels = {"same": "the same batch", "other": "another batch", "full": "all data"}
        styles = {"same": ("C3", "o"), "other": ("C0", "s"), "full": ("0.35", "D")}
        index = list(range(1, self.k + 1))
        panels = {
            "directional curvature": self.curvature, "directional slope": self.slope,
            "length of the Newton step": {which: self.step(which) for which in WHICH},
        }  # fmt: skip
        every = figure.subplots(1, 3)
        for axes, (name, values) in zip(every, panels.items(), strict=True):
            for shift, which in zip((-0.1, 0.1, 0.0), WHICH, strict=True):
                mean, error = mean_error(values[which])
                color, marker = styles[which]
                axes.errorbar(
                    [i + shift for i in index], mean.tolist(), error.nan_to_num().tolist(),
                    color=color, marker=marker, markersize=4, linewidth=1, label=labels[which],
                )  # fmt: skip
            axes.set_xlabel(LABELS[self.directions])
            axes.set_ylabel(name)
            axes.set_xticks(index if self.k <= 12 else [1, *range(5, self.k + 1, 5)])
        for which, ratio in {} if predicted is None else self._expected(predicted).items():
            expected = (ratio * self.curvature["full"].mean(0)).tolist()
            label = f"{labels[which]}, predicted"
            every[0].plot(index, expected, color=styles[which][0], linestyle="--", linewidth=1.2, label=label)
        figure.legend(*every[0].get_legend_handles_labels(), frameon=False, ncols=5, loc="outside lower center")
        title = f"Directions from batches of {self.batch_size}, measured on the same batch, another one and all data"
        if self.overlap is not None:
            title += f"; overlap with those of all data {_with_error(*mean_error(self.overlap))}"
        figure.suptitle(title, fontsize="medium")
        return figure

    def _pair(self, which: str, of: str) -> tuple[Tensor, Tensor]:
        self._check(which)
        check_choice("of", of, OF)
        if of == "step":
            return self.step(which), self.step("full")
        values = self.curvature if of == "curvature" else self.slope
        return values[which], values["full"]

    def _expected(self, predicted: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {which: tuple(v.shape) for which, v in predicted.items()}
        if found != {"same": (self.k,), "other": (self.k,)}:
            raise ValueError(f"the prediction has the shapes {found}; expected 'same' and 'other' of shape [{self.k}], "
                             "as `predicted` gives them.")  # fmt: skip
        return {which: predicted[which].double().cpu() for which in ("same", "other")}

    def _check(self, which: str) -> None:
        check_choice("which", which, WHICH)

    def _first(self, k: int | None) -> int:
        return self.k if k is None else check_count("k", k, most=self.k)


def _ratio_error(part: Tensor, full: Tensor) -> Tensor:
    """Standard error of sum(part) / sum(full) over axis 0, by linearisation."""
    n = len(part)
    ratio = part.sum(0) / full.sum(0)
    if n < 2:
        return torch.full_like(ratio, math.nan)
    return (part - ratio * full).square().sum(0).mul(n / (n - 1)).sqrt() / full.sum(0).abs()


def mean_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over repeats and its standard error, NaN for a single repeat."""
    n = len(values)
    return values.mean(0), values.std(0) / n**0.5 if n > 1 else torch.full_like(values[0], math.nan)


def _with_error(value: float | Tensor, error: float | Tensor) -> str:
    return f"{_three_decimals(float(value))} ± {_three_decimals(float(error))}"


def _three_decimals(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "–"


def plain(values: Any) -> Any:
    """A tensor or number as nested lists, with None for what is not finite."""
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, list):
        return [plain(v) for v in values]
    return values if math.isfinite(values) else None
