"""Figures of the quantities that come from curvature."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

BLUE, RED, GREEN, GREY = "#2a6fb0", "#c8442f", "#3d8c40", "#777777"


def diag_ggn(slope_only: Tensor, predicted: Tensor, measured: Tensor) -> Figure:
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    axes = figure.subplots()
    ends = [measured.min().item(), measured.max().item()]
    axes.plot(ends, ends, color=GREY, linewidth=0.8, label="equal")
    for values, colour, label in ((slope_only, RED, "by the slope alone"), (predicted, BLUE, "by the parabola")):
        axes.plot(measured, values, "o", markersize=3, alpha=0.5, color=colour, markeredgewidth=0, rasterized=True)
        axes.plot([], [], "o", color=colour, label=label)
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("symlog", linthresh=1e-4)
    axes.set_xlabel("measured change of the loss")
    axes.set_ylabel("predicted change of the loss")
    axes.legend(loc="upper left")
    return figure


def diag_ggn_mc(exact: Tensor, estimates: list[Tensor], counts: list[int], errors: list[Tensor]) -> Figure:
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    shown = exact > 1e-8
    ends = [exact[shown].min().item(), exact.max().item()]
    generator = torch.Generator().manual_seed(0)
    some = shown.nonzero().flatten()
    some = some[torch.randperm(len(some), generator=generator)[:800]]
    for axes, estimate, count, error in zip(
        figure.subplots(1, 3, sharex=True, sharey=True), estimates, counts, errors, strict=True
    ):
        axes.plot(
            exact[some], estimate[some], ".", markersize=3, alpha=0.5, color=BLUE, markeredgewidth=0, rasterized=True
        )
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_title(f"{count} sample{'s' * (count > 1)}: relative error {100 * error:.0f} %")
        axes.set_xlabel("exact, loss / weight²")
    figure.axes[0].set_ylabel("Monte Carlo, loss / weight²")
    return figure


def sample_diag_ggn(traces: Tensor, norms: Tensor, wrong: Tensor) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for mine, colour, label in ((~wrong, BLUE, "right label"), (wrong, RED, "wrong label")):
        axes.plot(
            norms[mine], traces[mine], "o", markersize=3.5, alpha=0.7, color=colour, markeredgewidth=0, rasterized=True
        )
        axes.plot([], [], "o", color=colour, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("squared norm of the digit's gradient, (loss / weight)²")
    axes.set_ylabel("trace of the digit's GGN, loss / weight²")
    axes.legend(loc="upper left")
    return figure


def sample_diag_hessian(hessians: Tensor, ggns: Tensor, wrong: Tensor) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for mine, colour, label in ((~wrong, BLUE, "right"), (wrong, RED, "taken for another digit")):
        axes.plot(
            ggns[mine], hessians[mine], "o", markersize=3.5, alpha=0.7, color=colour, markeredgewidth=0, rasterized=True
        )
        axes.plot([], [], "o", color=colour, label=label)
    ends = [ggns.min().item(), ggns.max().item()]
    axes.plot(ends, ends, color=GREY, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xlabel("trace of the digit's GGN, loss / weight²")
    axes.set_ylabel("trace of the digit's Hessian, loss / weight²")
    axes.legend(loc="upper left")
    return figure


def sqrt_ggn(eigenvalues: Tensor, lanczos: Tensor) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(eigenvalues) + 1), eigenvalues.clamp(min=1e-12), color=BLUE, label="from sqrt_ggn, all 288")
    axes.plot(range(1, len(lanczos) + 1), lanczos, "x", color=RED, label="by Lanczos, the first 12")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-7)
    axes.set_xlabel("index, largest first")
    axes.set_ylabel("eigenvalue, loss / weight²")
    axes.legend(loc="lower left")
    return figure


def kfac(left: Tensor, right: Tensor, values_left: Tensor, values_right: Tensor, spectrum: Tensor) -> Figure:
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=[1, 1, 1.2])
    for axes, matrix, title, label in (
        (first, left, "left: output channels", "loss / activation²"),
        (second, right, "right: input channels × kernel", "activation²"),
    ):
        bound = matrix.abs().max().item()
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-bound, vmax=bound)
        axes.set_title(title)
        figure.colorbar(image, ax=axes, shrink=0.75, label=label)
    second.set_xticks(range(0, 72, 9))
    second.set_yticks(range(0, 72, 9))
    second.tick_params(labelsize=7)
    largest_first = {"block, 1152": spectrum, "right, 72": values_right.flip(0), "left, 16": values_left.flip(0)}
    for (label, values), colour in zip(largest_first.items(), (GREY, RED, BLUE), strict=True):
        values = values[values > 1e-7 * values[0]] / values[0]  # units that are never active give zeros
        third.plot(torch.arange(1, len(values) + 1), values, color=colour, label=label)
    third.set_xscale("log")
    third.set_yscale("log")
    third.set_ylim(1e-7, 2)
    third.set_xlabel("index, largest first")
    third.set_ylabel("eigenvalue / the largest")
    third.legend(loc="lower left")
    return figure


def kflr(exact: Tensor, approximate: Tensor, error: Tensor) -> Figure:
    figure = Figure(figsize=(8.4, 3.1), layout="constrained")
    bound = exact.abs().max().item()
    norm = SymLogNorm(bound / 30, vmin=-bound, vmax=bound)
    titles = ("exact block", "left ⊗ right", f"difference: {100 * error:.0f} % of the norm")
    for axes, matrix, title in zip(
        figure.subplots(1, 3), (exact, approximate, approximate - exact), titles, strict=True
    ):
        image = axes.imshow(matrix, cmap="RdBu_r", norm=norm)
        axes.set_title(title)
        axes.set_xticks(range(4, 80, 8), [str(c) for c in range(10)])
        axes.set_yticks(range(4, 80, 8), [str(c) for c in range(10)])
        axes.tick_params(length=0)
        axes.set_xlabel("output unit (8 weights each)")
    figure.axes[0].set_ylabel("output unit (8 weights each)")
    figure.colorbar(image, ax=figure.axes, shrink=0.8, label="loss / weight²", ticks=[-0.1, -0.01, 0, 0.01, 0.1])
    return figure


def kfac_empirical(epochs: list[int], traces: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    styles = {"kfac_empirical": (RED, "o", "given labels"), "kfac": (BLUE, "s", "one sampled label")}
    styles["kflr"] = (GREY, "", "exact")
    for name, (colour, marker, label) in styles.items():
        axes.plot(epochs, traces[name], color=colour, marker=marker, label=f"{name}: {label}")
    axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xticks(epochs, [str(e) for e in epochs])
    axes.set_yscale("log")
    axes.set_yticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("epochs of training")
    axes.set_ylabel("trace of all blocks, loss / weight²")
    axes.legend()
    return figure


def diag_hessian(before: list[Tensor], after: list[Tensor]) -> Figure:
    figure = Figure(figsize=(7.2, 3.5), layout="constrained")
    bound = max(float(t.abs().max()) for t in (*before, *after))
    for axes, (ggn, hessian), title in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), (before, after), ("initial weights", "trained"), strict=True
    ):
        negative = hessian < 0
        for mine, colour in ((~negative, BLUE), (negative, RED)):
            axes.plot(
                ggn[mine], hessian[mine], "o", markersize=3, alpha=0.5, color=colour, markeredgewidth=0, rasterized=True
            )
        axes.plot([0, bound], [0, bound], color=GREY, linewidth=0.8)
        axes.axhline(0, color=GREY, linewidth=0.5, linestyle=":")
        axes.set_xscale("symlog", linthresh=1e-3)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_title(f"{title}: {int(negative.sum())} of {len(ggn)} curve down")
        axes.set_xlabel("diag_ggn, loss / weight²")
    figure.axes[0].set_ylabel("diag_hessian, loss / weight²")
    return figure


def kfra(names: list[str], errors: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    styles = {"kfac": (BLUE, "s", -0.06, "one sampled label"), "kflr": (GREY, "o", 0.0, "exact")}
    styles["kfra"] = (RED, "D", 0.06, "recursion")
    for quantity, (colour, marker, shift, label) in styles.items():
        at = [i + shift for i in range(len(names))]
        axes.plot(at, errors[quantity], marker, color=colour, label=f"{quantity}: {label}")
    axes.set_xticks(range(len(names)), [f"layer {i + 1}" for i in range(len(names))])
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("error of the weight's block / its norm")
    axes.legend(loc="lower right")
    return figure


def which_curvature(exact: Tensor, blocks: dict[str, Tensor], errors: dict[str, float]) -> Figure:
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    bound = exact.abs().max().item()
    norm = SymLogNorm(bound / 30, vmin=-bound, vmax=bound)
    titles = {"exact": exact, **blocks}
    for axes, (name, matrix) in zip(above.subplots(1, 4), titles.items(), strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", norm=norm)
        axes.set_title(name if name == "exact" else f"{name}: error {100 * errors[name]:.0f} %")
        axes.set_xticks(range(4, 72, 9), [str(c) for c in range(8)])
        axes.set_yticks(range(4, 72, 9), [str(c) for c in range(8)])
        axes.tick_params(length=0, labelsize=7)
        axes.set_xlabel("output channel (9 weights each)")
    above.axes[0].set_ylabel("output channel (9 weights each)")
    above.colorbar(image, ax=above.axes, shrink=0.8, label="loss / weight²", ticks=[-0.1, -0.01, 0, 0.01, 0.1])
    axes = below.subplots()
    colours = {"exact": GREY, "KFAC": RED, "EKFAC": BLUE, "diagonal": GREEN}
    for name, matrix in titles.items():
        values = torch.linalg.eigvalsh(matrix).flip(0)
        label = f"{name}, trace {matrix.trace().item():.1f}"
        axes.plot(range(1, len(values) + 1), values.clamp(min=1e-9), color=colours[name], label=label)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-6)
    axes.set_xlabel("index, largest first")
    axes.set_ylabel("eigenvalue, loss / weight²")
    axes.legend(loc="lower left")
    return figure


def tomography(truth: Tensor, posterior: Any, error: Tensor) -> Figure:
    figure = Figure(figsize=(7.2, 1.9), layout="constrained")
    wide = max(error.max().item(), posterior.std.max().item())
    shown = [
        ("true image", truth, "gray", truth.max().item()),
        ("reconstruction", posterior.mean, "gray", truth.max().item()),
        ("absolute error", error, "magma", wide),
        ("standard deviation", posterior.std, "magma", wide),
    ]
    for axes, (title, image, look, most) in zip(figure.subplots(1, 4), shown, strict=True):
        axes.imshow(image.numpy(), cmap=look, vmin=0, vmax=most)
        axes.set_title(title)
        axes.set_axis_off()
    return figure
