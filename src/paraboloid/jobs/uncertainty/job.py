"""The job: train, fit and tune a posterior, and measure what its predictions are worth."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import paraboloid
from paraboloid import problems
from paraboloid.data.batches import Chunks, call, take
from paraboloid.jobs.pictures import picture
from paraboloid.jobs.uncertainty import scores
from paraboloid.jobs.uncertainty.methods import METHODS, TITLES
from paraboloid.jobs.uncertainty.reading import findings
from paraboloid.jobs.uncertainty.unseen import unseen
from paraboloid.linalg.operand import check_choice
from paraboloid.passes import trees
from paraboloid.passes.parameter_layers import layers_of
from paraboloid.posteriors import Prediction
from paraboloid.problems import Problem
from paraboloid.report import plain

Progress = Callable[[str, int, int], None]  # stage, done, total

FITTED, TESTED = 2048, 1000  # samples, at most
QUICK_FITTED, QUICK_TESTED, QUICK_STEPS = 512, 200, 300
OUTPUTS = 50_000  # whose variances are measured, at most: fewer test samples where each has many
BATCH = 256
LEAST_SURE = 18
GRID, MARGIN = 200, 0.35  # points of a band, and how far beyond the data it goes, in parts of the data's range


def uncertainty(
    problem: Problem, method: str = "kron", *, seed: int = 0, samples: int | None = None, quick: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the problem's model in place, fit a posterior and tune it; a record of plain data for the page.

    method   "kron", "last-layer", "functional" or "sampled"
    samples  training samples that the posterior is fitted on, at most
    The record says what was measured on test samples, all drawn by `seed`. Raises ValueError for a loss that is no
    likelihood of classes, binary targets or real numbers.
    """
    check_choice("method", method, list(METHODS))
    report, start = progress or (lambda stage, done, total: None), time.perf_counter()
    steps = min(problems.step_count(problem), QUICK_STEPS) if quick else problems.step_count(problem)
    curve = problems.train(problem, seed, steps=steps, callback=lambda step, *_: report("training", step, steps))
    trained = time.perf_counter() - start
    device = next(iter(trees.parameters(problem.model).values())).device
    x, _ = take(problem.train, torch.arange(1), device)
    with torch.no_grad():
        outputs = call(problem.model, x)[0].numel()
    fitted = samples or (QUICK_FITTED if quick else FITTED)
    tested = max(20, min(QUICK_TESTED if quick else TESTED, OUTPUTS // outputs))
    data = Chunks(problem.train, BATCH, device, chosen(len(problem.train), fitted, seed))
    report("posterior", 0, 1)
    posterior = METHODS[method](problem, data, outputs, seed)
    report("posterior", 1, 1)
    spent = time.perf_counter() - start - trained
    x, y = take(problem.test, chosen(len(problem.test), tested, seed), device)
    results = {
        "problem": problem.name, "title": problem.title or problem.name, "description": problem.description,
        "method": method, "what": TITLES[method], "kind": posterior.likelihood.kind, "outputs": outputs,
        "training": {"steps": curve[-1]["step"], "test_loss": curve[-1]["test_loss"], "seconds": trained},
        "posterior": {
            "samples": len(data.indices), "seconds": spent, "prior_precision": posterior.prior_precision,
            "noise_variance": posterior.noise_variance, **_determined(posterior),
        },
        **_measured(posterior, problem, x, y, data, seed, report),
    }  # fmt: skip
    command = f"paraboloid uncertainty {problem.name} --method {method} --seed {seed}"
    command += f" --samples {samples}" * (samples is not None) + " --quick" * quick
    return plain({
        "full": not quick, "seed": seed, "command": command,
        "versions": {"paraboloid": paraboloid.__version__, "torch": torch.__version__,
                     "python": platform.python_version()},
        "threads": torch.get_num_threads(), "seconds": time.perf_counter() - start,
        "findings": findings(results), "results": results,
    })  # fmt: skip


def chosen(size: int, most: int, seed: int) -> Tensor:
    """At most so many of the indices, drawn without replacement, in order."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _determined(posterior: Any) -> dict[str, Any]:
    """How many weights the data determines, in all and by layer."""
    groups = layers_of(posterior.weights)
    sizes = {name: sum(posterior.weights[k].numel() for k in members) for name, members in groups.items()}
    if not hasattr(posterior, "precision"):  # known by samples
        return {"effective_dimension": float(posterior.effective_dimension), "parameters": sum(sizes.values()),
                "layers": []}  # fmt: skip
    found = [gamma.item() for gamma in posterior.precision().effective_dimension(list(groups.values()))]
    layers = [
        {"name": name, "parameters": sizes[name], "determined": gamma}
        for name, gamma in zip(groups, found, strict=True)
    ]
    return {"effective_dimension": sum(found), "parameters": sum(sizes.values()), "layers": layers}


def _measured(
    posterior: Any, problem: Problem, x: Any, y: Tensor, data: Chunks, seed: int, report: Progress
) -> dict[str, Any]:
    kind = posterior.likelihood.kind
    others = unseen(x, seed)
    report("predictions", 0, 1 + len(others))
    found = posterior.predict(x)
    report("predictions", 1, 1 + len(others))
    if isinstance(found, Prediction):
        predictions = {}
        for i, (name, z) in enumerate(others.items()):
            predictions[name] = posterior.predict(z)
            report("predictions", i + 2, 1 + len(others))
        return _of_numbers(posterior, x, y, found, predictions, data)
    if kind not in ("categorical", "bernoulli"):
        raise ValueError(f"the loss {type(problem.loss_fn).__name__} says no probabilities or moments of what it "
                         "predicts; expected one of classes, binary targets or real numbers.")  # fmt: skip
    rows, usual = [], _novelty(posterior, x)
    for i, (name, z) in enumerate(others.items()):
        there = _novelty(posterior, z)
        rows.append({"name": name, "ours": _confidence(posterior.predict(z), kind),
                     "own": _confidence(_own(problem, z, kind), kind),
                     "novelty_area": scores.area(usual, there) if usual is not None and there is not None else None,
                     })  # fmt: skip
        report("predictions", i + 2, 1 + len(others))
    return _of_classes(posterior, problem, x, y, found, rows)


@torch.no_grad()
def _own(problem: Problem, x: Any, kind: str) -> Tensor:
    f = call(problem.model, x)
    return f.softmax(1) if kind == "categorical" else f.sigmoid()


def _novelty(posterior: Any, x: Any) -> Tensor | None:
    """Of each sample, [N], on the mean over its positions or binary outputs; None where the posterior has none."""
    if not hasattr(posterior, "novelty") or posterior.confidence is None:
        return None
    return posterior.novelty(x).reshape(len(x), -1).double().mean(1)


def _confidence(p: Tensor, kind: str) -> Tensor:
    """Of each sample, [N]: its largest probability, on the mean over its positions or its binary outputs."""
    largest = p.amax(1) if kind == "categorical" else torch.maximum(p, 1 - p)
    return largest.reshape(len(p), -1).double().mean(1)


def _of_classes(
    posterior: Any, problem: Problem, x: Any, y: Tensor, found: Tensor, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    kind, own = posterior.likelihood.kind, _own(problem, x, posterior.likelihood.kind)
    ignored = getattr(posterior.likelihood.given, "ignore_index", -100)
    indices = kind == "categorical" and not y.is_floating_point()
    score = (
        (lambda p: scores.of_classes(p, y, ignored)) if indices else (lambda p: scores.of_bernoullis(p, _share(p, y)))
    )
    ours, networks = _confidence(found, kind), _confidence(own, kind)
    for row in rows:
        a, b = row.pop("ours"), row.pop("own")
        row |= {
            "area": scores.area(-ours, -a), "network_area": scores.area(-networks, -b),
            "confidence": a.mean().item(), "network_confidence": b.mean().item(), "histogram": _histogram(a),
            "network_histogram": _histogram(b),
        }  # fmt: skip
    order = ours.argsort()[:LEAST_SURE].tolist()
    chosen = found.argmax(1) if indices and found.dim() == 2 else None
    return {
        "network": score(own), "matched": score(found), "histogram": _histogram(ours),
        "network_histogram": _histogram(networks), "unseen": rows,
        "least_sure": [
            {
                "index": i, "target": y[i].item() if y.dim() == 1 and indices else None,
                "predicted": None if chosen is None else int(chosen[i]), "confidence": ours[i].item(),
                "network": networks[i].item(), "image": _picture(x, i),
            }
            for i in order
        ],
    }  # fmt: skip


def _share(p: Tensor, y: Tensor) -> Tensor:
    """Targets of p's shape."""
    return y.to(p) if y.shape == p.shape else torch.nn.functional.one_hot(y, p.shape[1]).movedim(-1, 1).to(p)


def _picture(x: Any, index: int) -> Any:
    return picture(x[index], vectors=True) if isinstance(x, Tensor) else None


def _histogram(values: Tensor, bins: int = 20) -> list[float]:
    """Shares of values in [0, 1] in bins of equal width."""
    return (torch.histc(values.float().cpu(), bins, 0.0, 1.0) / len(values)).tolist()


def _of_numbers(
    posterior: Any, x: Any, y: Tensor, found: Prediction, others: dict[str, Prediction], data: Chunks
) -> dict[str, Any]:
    y = y.view_as(found.mean) if y.numel() == found.mean.numel() else y
    spread = found.model_variance.reshape(len(y), -1).double().mean(1)
    order = spread.argsort(descending=True)[:LEAST_SURE].tolist()
    return {
        "network": scores.of_gaussians(found.mean, found.noise_variance, y),
        "matched": scores.of_gaussians(found.mean, found.variance, y),
        "model_variance": spread.mean().item(), "test_noise_variance": found.noise_variance.double().mean().item(),
        "unseen": [
            {
                "name": name, "area": scores.area(spread, p.model_variance.reshape(len(y), -1).double().mean(1)),
                "ratio": (p.model_variance.double().mean() / found.model_variance.double().mean()).sqrt().item(),
            }
            for name, p in others.items()
        ],
        "least_sure": [
            {"index": i, "spread": spread[i].sqrt().item(), "image": _picture(x, i)} for i in order
        ],
        "band": _band(posterior, x, y, data),
    }  # fmt: skip


def _band(posterior: Any, x: Any, y: Tensor, data: Chunks) -> dict[str, Any] | None:
    """Mean and standard deviations over a grid, where input and output are one number."""
    if not isinstance(x, Tensor) or x[0].numel() != 1 or y[0].numel() != 1:
        return None
    seen_x, seen_y = (torch.cat([pair[i].flatten() for pair in data]).double() for i in (0, 1))
    low, high = seen_x.min(), seen_x.max()
    grid = torch.linspace(float(low - MARGIN * (high - low)), float(high + MARGIN * (high - low)), GRID)
    found = posterior.predict(grid.to(x).view(-1, *x.shape[1:]))
    return {
        "x": grid.tolist(), "mean": found.mean.flatten().tolist(), "std": found.stddev.flatten().tolist(),
        "model_std": found.model_variance.sqrt().flatten().tolist(), "seen_x": seen_x[:400].tolist(),
        "seen_y": seen_y[:400].tolist(),
    }  # fmt: skip
