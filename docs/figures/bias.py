"""Draw the figures of the page on the bias: what theory says, next to what this library measures.

    python docs/figures/bias.py [equal_partition weights slopes wishart prediction]

Everything is on one CPU thread and fixed seeds; about three minutes.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import paraboloid as pb
from paraboloid import problems

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "gallery"))
from make import STYLE, save  # noqa: E402 - of the gallery

SAME, OTHER, FULL = "#d55e00", "#0072b2", "0.35"
BETA, SIZES = 1e-3, (32, 64, 128, 256, 512)


def trained(name: str = "digits-tanh") -> problems.Problem:
    problem = problems.load(name)
    problems.train(problem, evaluations=1)
    return problem


def fit(problem: problems.Problem, indices: Tensor) -> pb.Quadratic:
    return pb.quadratic(problem.model, problem.loss_fn, problem.train[indices], weight_decay=BETA)


def shuffled(n: int, seed: int = 0) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def axes(width: float, count: int, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def batch_axis(ax: Axes, sizes: tuple[int, ...]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(m) for m in sizes])
    ax.set_xlabel("batch size m")


def equal_partition() -> Figure:
    """Sums of top eigenvalues over an equal partition of 1408 samples."""
    problem, N, most = trained(), 1408, 20
    order = shuffled(N)
    full = fit(problem, order)
    top = full.curvature.eigsh(most)[0].cumsum(0)
    own, seen = {}, {}
    for m in SIZES[:4] + (704,):
        batches = [fit(problem, part) for part in order[: N - N % m].split(m)]
        rows = [q.eigen_directions(most) for q in batches]
        own[m] = torch.stack([q.along(U)[1] for q, U in zip(batches, rows, strict=True)]).mean(0).cumsum(0)
        curvatures = full.along(torch.cat(rows))[1].view(len(rows), most)
        seen[m] = curvatures.mean(0).cumsum(0)
    figure, (left, right) = axes(7.5, 2)
    ks = range(1, most + 1)
    left.plot(ks, own[64], "o-", color=SAME, label="batches' own")
    left.plot(ks, top, color=FULL, label="all data's own")
    left.plot(ks, seen[64], "s-", color=OTHER, label="batches' directions, on all data")
    left.set(xlabel="k", ylabel="sum of k curvatures", title="22 batches of 64", xlim=(0, most + 1), ylim=(0, None))
    left.legend(loc="lower right")
    sizes = tuple(own)
    for found, color, marker in ((own, SAME, "o"), (seen, OTHER, "s")):
        right.plot(sizes, [found[m][4] for m in sizes], marker + "-", color=color)
    right.axhline(float(top[4]), color=FULL)
    batch_axis(right, sizes)
    right.set(title="k = 5", ylabel="sum of 5 curvatures", ylim=(0, 1.08 * max(float(v[4]) for v in own.values())))
    return figure


def weights() -> Figure:
    """u.C u on the batch, on the rest, on all data and on a disjoint batch, along the batch's eigenvectors."""
    problem, m, k, repeats = trained(), 128, 10, 40
    N = len(problem.train)
    full, found = fit(problem, torch.arange(N)), {"batch": [], "other": [], "rest": [], "all": []}
    for repeat in range(repeats):
        batch, other, rest = shuffled(N, repeat).tensor_split([m, 2 * m])
        q = fit(problem, batch)
        U = q.eigen_directions(k)
        rest = torch.cat([other, rest])
        fits = {"batch": q, "other": fit(problem, other), "rest": fit(problem, rest), "all": full}
        for name, measured in fits.items():
            found[name].append(measured.along(U)[1])
    values = {name: torch.stack(v).double() for name, v in found.items()}
    truth = values["all"].mean(0)
    ks = range(1, k + 1)
    figure, (left, right) = axes(7.5, 2)
    for name, label, style in (
        ("batch", "the batch B", {"color": SAME, "marker": "o"}), ("rest", "the rest D \\ B", {"color": "#009e73"}),
        ("other", "a second batch of 128", {"color": OTHER, "marker": "s", "linestyle": "none"}),
    ):  # fmt: skip
        error = (values[name] - values[name].mean(0) / truth * values["all"]).std(0) / math.sqrt(repeats) / truth
        left.errorbar(ks, values[name].mean(0) / truth, error if name == "other" else None, label=label, **style)
    left.axhline(1, color=FULL, linewidth=0.8)
    left.set(xlabel="direction of B, top first", ylabel="curvature / that on all data", xticks=list(ks))
    left.legend()
    combined = m / N * values["batch"] + (1 - m / N) * values["rest"]
    most = float(values["all"].max())
    right.plot([0, most], [0, most], color=FULL, linewidth=0.8)
    right.plot(values["all"].flatten(), values["batch"].flatten(), ".", color=SAME, markersize=3, label="u·C_B u")
    right.plot(values["all"].flatten(), combined.flatten(), ".", color="k", markersize=3,
               label="weighted with u·C_rest u")  # fmt: skip
    right.set(xlabel="u·C_D u", ylabel="estimate of it", xlim=(0, 1.15 * most), ylim=(0, None))
    right.legend(loc="upper left")
    return figure


def slopes() -> Figure:
    """E||g_B||^2 / ||g||^2 against the formula, for batches of growing size."""
    problem = trained()
    N, sizes = len(problem.train), (8, 16, *SIZES, 1024)
    found = pb.statistics(problem.model, problem.loss_fn, problem.train[:], ["sample_grads"])["sample_grads"]
    decay = torch.cat([p.detach().flatten() for p in problem.model.parameters()]) * BETA
    g_n = torch.cat([g.flatten(1) for g in found.values()], 1) + decay
    g = g_n.mean(0)
    S = (g_n - g).square().sum() / (N - 1)
    figure, (ax,) = axes(4.2, 1)
    means, errors = [], []
    for m in sizes:
        squares = torch.stack([g_n[shuffled(N, s)[:m]].mean(0).square().sum() for s in range(200)]) / g.square().sum()
        means.append(squares.mean())
        errors.append(2 * squares.std() / math.sqrt(200))
    ax.errorbar(sizes, means, errors, fmt="o", color=SAME, label="200 batches, ± 2 standard errors")
    line = torch.logspace(3, math.log2(N), 100, base=2)
    ax.plot(line, 1 + (1 - line / N) * S / line / g.square().sum(), color=FULL, label="1 + (1 − m/N) S / (m ‖g‖²)")
    ax.axhline(1, color=FULL, linewidth=0.6, linestyle=":")
    batch_axis(ax, sizes)
    ax.set(yscale="log", ylabel="‖g_B‖² / ‖g‖²", yticks=[1, 3, 10, 30])
    ax.set_yticklabels(["1", "3", "10", "30"])
    ax.legend()
    return figure


def wishart() -> Figure:
    """Top curvature of linear regression on white inputs, where the truth is 1."""
    d, N, sizes = 60, 12_000, (15, 30, 60, 120, 240, 480, 960)
    x = torch.randn(N, d, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(d, 1, bias=False)
    data = (x, torch.zeros(N, 1))
    found = {m: pb.bias(model, nn.MSELoss(), data, m, k=1, repeats=20).curvature for m in sizes}
    figure, (ax,) = axes(4.2, 1)
    line = torch.logspace(math.log10(15), 3, 100)
    ax.plot(line, (1 + (d / line).sqrt()).square(), color=FULL, label="(1 + √(d/m))²")
    for which, color, marker, label in (("same", SAME, "o", "the same batch"), ("other", OTHER, "s", "another batch")):
        values = [found[m][which].flatten() / 2 for m in sizes]  # the squared error's second derivative is 2
        ax.errorbar(sizes, [v.mean() for v in values], [v.std() for v in values], fmt=marker, color=color, label=label)
    ax.axhline(1, color=FULL, linewidth=0.6, linestyle=":")
    batch_axis(ax, sizes)
    ax.set(ylabel="curvature, where the truth is 1", ylim=(0, None))
    ax.legend()
    return figure


def prediction() -> Figure:
    """Measured and predicted overstatement along the top direction, on three problems."""
    names = ("digits-tanh", "digits-mlp", "digits-cnn")
    figure, panels = axes(9, len(names), 3.2)
    for ax, name in zip(panels, names, strict=True):
        problem = trained(name)
        full = pb.GGN(problem.model, problem.loss_fn, problem.train[:])
        spectrum, U = full.eigsh(100, tol=1e-2)
        w = full.sample_quadratic_forms(U.T[:10]).sum(0)
        ratios, errors, plain, weighed, other = [], [], [], [], []
        for m in SIZES:
            found = pb.bias(
                problem.model, problem.loss_fn, problem.train, m, k=2, repeats=60, weight_decay=BETA, seed=m
            )
            ratios.append(found.ratio("same")[0])
            errors.append(found.standard_error("same")[0])
            other.append((found.ratio("other")[0].item(), found.standard_error("other")[0].item()))
            plain.append(found.predicted(spectrum)["same"][0])
            weighed.append(found.predicted(spectrum, w)["same"][0])
        ax.errorbar(SIZES, ratios, errors, fmt="o", color=SAME, label="same batch, measured")
        ax.plot(SIZES, plain, color=SAME, linestyle="--", label="predicted from the spectrum")
        ax.plot(SIZES, weighed, color=SAME, linestyle=":", label="with the samples' weights")
        ax.errorbar(SIZES, *zip(*other, strict=True), fmt="s", color=OTHER, label="another batch, measured")
        ax.axhline(1, color=FULL, linewidth=0.6)
        batch_axis(ax, SIZES)
        ax.set(title=name, ylim=(0, None))
    panels[0].set_ylabel("top curvature / that on all data")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


DRAWINGS = {f.__name__: f for f in (equal_partition, weights, slopes, wishart, prediction)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if unknown := [name for name in sys.argv[1:] if name not in DRAWINGS]:
        raise SystemExit(f"no drawing for {unknown}; expected some of {sorted(DRAWINGS)}")
    for chosen in sys.argv[1:] or DRAWINGS:
        with rc_context(STYLE):
            drawn = DRAWINGS[chosen]()
        save(drawn, HERE / f"bias_{chosen}.svg")
