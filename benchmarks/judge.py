"""python -m benchmarks.judge: which use of a budget of samples gives the best curvatures and Newton steps?

Over repeats, a batch of the budget is drawn and every rule proposes directions with slopes and curvatures along them.
The truth is the quadratic of all data along the same directions.  Reported are the roots of the mean squared errors of
curvatures and of step lengths, over the root mean square of the truth, and the decrease that the step really brings on
the quadratic of all data.  Rules with folds average over them before they are compared.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import paraboloid as pb
from benchmarks.harness import machine
from paraboloid import problems
from paraboloid.data.batches import take
from paraboloid.quadratics.cross_fitting import CrossFit, curvature_error
from paraboloid.quadratics.local_model import Quadratic

K, BETA, DAMPING = 5, 1e-3, 1e-2
REPEATS = {"digits-tanh": 15, "digits-mlp": 8, "digits-cnn": 8}
Batch = tuple[Tensor, Tensor]


@dataclass
class Proposal:
    """Directions [F, k, D] with slope and curvature [F, k] along each; the step is the mean of the folds' steps."""

    directions: Tensor
    slope: Tensor
    curvature: Tensor


def fit(problem: problems.Problem, batch: Batch) -> Quadratic:
    return pb.quadratic(problem.model, problem.loss_fn, batch, weight_decay=BETA)


def less_predicted(problem: problems.Problem, batch: Batch, p: Proposal) -> Proposal:
    """The same directions and slopes, with the curvatures less their predicted bias."""
    return Proposal(p.directions, p.slope, pb.shrunk_curvature(fit(problem, batch), p.directions[0])[None])


def folded(problem: problems.Problem, batch: Batch, seed: int, folds: int, chosen_by: str = "fold") -> CrossFit:
    return pb.cross_fit(
        problem.model, problem.loss_fn, batch, k=K, folds=folds, chosen_by=chosen_by, weight_decay=BETA, seed=seed
    )


def whole(problem: problems.Problem, batch: Batch) -> Proposal:
    q = fit(problem, batch)
    D = q.eigen_directions(K, tol=1e-4)
    slope, curvature = q.along(D)
    return Proposal(D[None], slope[None], curvature[None])


def first_fold(f: CrossFit) -> Proposal:
    return Proposal(f.directions[:1], f.slope[:1], f.curvature[:1])


def every_fold(f: CrossFit) -> Proposal:
    return Proposal(f.directions, f.slope, f.curvature)


def combined(problem: problems.Problem, batch: Batch, f: CrossFit, seed: int) -> Proposal:
    """c_other + w (c_same - predicted bias - c_other), with w of least estimated mean squared error.

    w = v_other / (v_other + v_same + b), v the squared standard errors from single samples, and b what the two
    values differ by beyond them, averaged over the directions: the square of what is wrong with the prediction.
    """
    assert f.standard_error is not None
    parts = torch.randperm(len(batch[1]), generator=torch.Generator().manual_seed(seed)).tensor_split(len(f.slope))
    found = []
    for i, part in enumerate(parts):
        q = fit(problem, (batch[0][part], batch[1][part]))
        corrected = pb.shrunk_curvature(q, f.directions[i])
        v_same, v_other = curvature_error(q, f.directions[i]).square(), f.standard_error[i].square()
        gap = ((corrected - f.curvature[i]).square() - v_same - v_other).mean().clamp(min=0)
        w = v_other / (v_other + v_same + gap)
        found.append(f.curvature[i] + w * (corrected - f.curvature[i]))
    return Proposal(f.directions, f.slope, torch.stack(found))


def rules(problem: problems.Problem, batch: Batch, seed: int) -> dict[str, Proposal]:
    two, four = (folded(problem, batch, seed, folds) for folds in (2, 4))
    one = whole(problem, batch)
    return {
        "one batch, all of it": one,
        "one batch, less the predicted bias": less_predicted(problem, batch, one),
        "one half chooses, the other measures": first_fold(two),
        "two folds": every_fold(two),
        "two folds, combined with the same half's": combined(problem, batch, two, seed),
        "four folds, one chooses": every_fold(four),
        "four folds, one chooses, combined": combined(problem, batch, four, seed),
        "four folds, three choose": every_fold(folded(problem, batch, seed, 4, "rest")),
    }


def score(p: Proposal, full: Quadratic) -> dict[str, float]:
    """Squared error and squared truth of curvatures and step lengths, and the decrease on all data."""
    slope, curvature = (v.view_as(p.slope) for v in full.along(p.directions.flatten(0, 1)))
    lengths = -p.slope / (p.curvature + DAMPING)
    step = torch.einsum("fk,fkd->d", lengths, p.directions) / len(p.directions)
    found = {"decrease": (full.value - full(step)).item()}
    pairs = {"curvature": (p.curvature, curvature), "step": (lengths, -slope / (curvature + DAMPING))}
    for name, (value, truth) in pairs.items():
        value, truth = value.mean(0), truth.mean(0)
        found[name], found[f"{name} truth"] = (value - truth).square().sum().item(), truth.square().sum().item()
    return found


def judge(name: str, budget: int, repeats: int) -> dict[str, dict[str, float]]:
    """Each rule's relative root mean squared errors and its mean decrease."""
    problem = problems.load(name)
    problems.train(problem, evaluations=1)
    N, cpu = len(problem.train), torch.device("cpu")
    full = pb.quadratic(
        problem.model, problem.loss_fn, [take(problem.train, i, cpu) for i in torch.arange(N).split(512)],
        weight_decay=BETA,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    scores: dict[str, list[dict[str, float]]] = {}
    for repeat in range(repeats):
        batch = take(problem.train, torch.randperm(N, generator=generator)[:budget], cpu)
        for rule, proposal in rules(problem, batch, repeat).items():
            scores.setdefault(rule, []).append(score(proposal, full))
    return {
        rule: {
            **{of: _root(found, of) for of in ("curvature", "step")},
            "decrease": sum(f["decrease"] for f in found) / repeats,
        }
        for rule, found in scores.items()
    }


def _root(found: list[dict[str, float]], of: str) -> float:
    return math.sqrt(sum(f[of] for f in found) / sum(f[f"{of} truth"] for f in found))


def markdown(record: dict[str, dict[str, dict[str, float]]]) -> str:
    titles = {"curvature": "Curvature", "step": "Step length", "decrease": "Decrease of the loss by the step"}
    lines: list[str] = []
    for of, title in titles.items():
        lines += [f"### {title}", "", f"| | {' | '.join(record)} |", "|---|" + "---|" * len(record)]
        for rule in next(iter(record.values())):
            lines.append(f"| {rule} | " + " | ".join(f"{case[rule][of]:.3g}" for case in record.values()) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", default=list(REPEATS), choices=list(REPEATS))
    parser.add_argument("--budgets", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--repeats", type=int, help="default: 15 for digits-tanh, 8 for the others")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {}
    for name in options.problems:
        for budget in options.budgets:
            record[f"{name} {budget}"] = judge(name, budget, options.repeats or REPEATS[name])
            print(name, budget, json.dumps(record[f"{name} {budget}"]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "judge.json").write_text(json.dumps({"machine": machine(), "cases": record}, indent=1) + "\n")
    (options.out / "judge.md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
