"""Figures of the quantities that come from the loss gradient."""

from __future__ import annotations

from itertools import pairwise

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

BLUE, RED, GREY = "#2a6fb0", "#c8442f", "#777777"
DIGITS = [f"C{i}" for i in range(10)]


def _sizes(axes, sizes: list[int], label: str = "samples in the batch") -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _bare(axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def grad(sizes: list[int], before: Tensor, after: Tensor) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    for values, colour, label in ((before, BLUE, "initial weights"), (after, RED, "after 20 epochs")):
        axes.errorbar(sizes, values.mean(1), values.std(1), color=colour, marker="o", capsize=2, label=label)
    _sizes(axes, sizes)
    axes.set_ylabel("cosine to the gradient of all data\n(mean, deviation of 20 draws)")
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set_ylim(top=1.04)
    axes.legend(loc="lower right")
    return figure


def sample_grads(components: Tensor, share: Tensor, targets: Tensor) -> Figure:
    figure = Figure(figsize=(5.6, 4.6), layout="constrained")
    axes = figure.subplots()
    for (x, y), label in zip(components.tolist(), targets.tolist(), strict=True):
        axes.text(x, y, str(label), color=DIGITS[label], ha="center", va="center", fontsize=8, fontweight="bold")
    low, high = components.amin(0), components.amax(0)
    margin = 0.05 * (high - low)
    axes.set_xlim((low - margin)[0].item(), (high + margin)[0].item())
    axes.set_ylim((low - margin)[1].item(), (high + margin)[1].item())
    for set_label, part, which in ((axes.set_xlabel, share[0], "first"), (axes.set_ylabel, share[1], "second")):
        set_label(f"{which} principal component ({100 * part:.0f} % of the variance), loss / weight")
    return figure


def square_norms(norms: Tensor, order: Tensor, inputs: Tensor, targets: Tensor, predictions: Tensor) -> Figure:
    figure = Figure(figsize=(7.2, 3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.15])
    axes = left.subplots()
    edges = torch.logspace(norms.min().log10().floor().item(), norms.max().log10().ceil().item(), 41)
    axes.hist(norms.numpy(), edges.numpy(), color=BLUE)
    axes.axvline(norms[order[7]].item(), color=RED, linewidth=0.8)
    axes.text(norms[order[7]].item(), axes.get_ylim()[1], " the 8\n at right", color=RED, va="top")
    axes.set_xscale("log")
    axes.set_xlabel("norm of a digit's gradient, loss / weight")
    axes.set_ylabel("digits")
    for axes, n in zip(right.subplots(2, 4).flat, order[:8].tolist(), strict=True):
        axes.imshow(inputs[n].view(8, 8), cmap="gray_r")
        axes.set_title(f"label {targets[n]}\nmodel {predictions[n]}", fontsize=8)
        _bare(axes)
    return figure


def gram(before: Tensor, after: Tensor, targets: Tensor) -> Figure:
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    starts = [int((targets < c).sum()) for c in range(11)]
    middles = [(a + b - 1) / 2 for a, b in pairwise(starts)]
    for axes, values, title in zip(
        figure.subplots(1, 2), (before, after), ("initial weights", "after 20 epochs"), strict=True
    ):
        image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(title)
        axes.set_xticks(middles, [str(c) for c in range(10)])
        axes.set_yticks(middles, [str(c) for c in range(10)])
        axes.tick_params(length=0)
        axes.set_xlabel("label of sample m")
    figure.axes[0].set_ylabel("label of sample n")
    figure.colorbar(image, ax=figure.axes, shrink=0.85, label="cosine between $g_n$ and $g_m$")
    return figure


def second_moment(sizes: list[int], predicted: list[Tensor], measured: list[Tensor], signal: Tensor) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(sizes, predicted, color=BLUE, label="predicted from one call")
    axes.errorbar(
        sizes, [m.mean() for m in measured], [m.std() / len(m) ** 0.5 for m in measured],
        color=RED, marker="o", linestyle="none", capsize=2, label="mean of 50 batches, standard error",
    )  # fmt: skip
    axes.axhline(float(signal), color=GREY, linewidth=0.8, linestyle="--", label="squared norm of the mean gradient")
    _sizes(axes, sizes)
    axes.set_yscale("log")
    axes.set_ylabel("squared norm of the batch's gradient,\n(loss / weight)²")
    axes.legend()
    return figure


def variance(epochs: list[int], ratios: list[Tensor]) -> Figure:
    figure = Figure(figsize=(7.2, 2.5), layout="constrained")
    finite = torch.cat([r[r.isfinite()] for r in ratios])
    norm = LogNorm(finite.quantile(0.01).item(), finite.quantile(0.99).item())
    for axes, epoch, ratio in zip(figure.subplots(1, 3), epochs, ratios, strict=True):
        image = axes.imshow(ratio, norm=norm, cmap="viridis")
        median = ratio[ratio.isfinite()].median()
        axes.set_title(f"after {epoch} epochs: median {median:.0f}" if epoch else f"initial: median {median:.0f}")
        _bare(axes)
    figure.colorbar(image, ax=figure.axes, shrink=0.9, label="variance / squared mean\n(pixel of the input)")
    return figure
