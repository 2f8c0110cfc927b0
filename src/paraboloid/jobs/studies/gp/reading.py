"""What the study says in words: the papers' findings, seen or not."""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.studies.claims import Claim
from paraboloid.jobs.studies.gp.gpytorch_models import MISSING
from paraboloid.jobs.studies.gp.regression import SWEEPS
from paraboloid.report.numbers import fixed, number

CLOSE = 0.01  # of two likelihoods that are alike
MARGIN = f"(by more than {CLOSE})"


def at_end(results: dict[str, Any], system: str, solver: str) -> dict[str, Any]:
    """The last row of a solver on a system."""
    return [r for r in results["convergence"] if r["system"] == system and r["solver"] == solver][-1]


def claims(results: dict[str, Any]) -> list[Claim]:
    """Findings of arXiv:2306.11589, 2310.20581 and 2505.13723 that can be looked at here."""
    found = _of_solvers(results)
    for name in dict.fromkeys(r["set"] for r in results["regression"]):
        rows = {r["method"]: r for r in results["regression"] if r["set"] == name}
        found += [(f"{name}: {claim}", seen, told) for claim, seen, told in _of_predictions(rows)]
    last = results["thompson"][-1]
    told = f"best value {last['thompson']:.2f} against {last['random']:.2f}"
    return [*found, ("Parallel Thompson sampling beats random search", last["thompson"] > last["random"], told)]


def _of_solvers(results: dict[str, Any]) -> list[Claim]:
    hard, easy = "ill conditioned", "well conditioned"
    sgd, sdd, published = (at_end(results, hard, s) for s in ("sgd", "sdd", "sgd, as published"))
    block, conjugate = (at_end(results, hard, s)["interpolation"] for s in ("block", "cg"))
    quick, slow = (at_end(results, easy, s)["interpolation"] for s in ("sdd", "sgd, as published"))
    between, edges, far = (published[region] for region in ("interpolation", "extrapolation", "prior"))
    dual, mended = sdd["interpolation"], sgd["interpolation"]
    places = f"{number(edges, 2)} at the edges, {number(between, 2)} between, {number(far, 2)} far"
    return [
        ("Stochastic gradients err most where data ends, less between data, and not at all far away",
         far < between < edges, f"ill conditioned: {places}"),
        ("Dual descent converges faster than stochastic gradients",
         quick < slow, f"well conditioned: {number(quick, 2)} against {number(slow, 2)}"),
        ("Exact solves on blocks converge faster than dual descent",
         block < dual, f"ill conditioned: {number(block, 2)} against {number(dual, 2)}"),
        ("Conjugate gradients lose on ill-conditioned systems",
         conjugate > dual, f"with a preconditioner: {number(conjugate, 2)} against {number(dual, 2)}"),
        ("(ours) A preconditioner of eigenvectors mends stochastic gradients",
         mended < between / 10, f"ill conditioned: {number(mended, 2)} against {number(between, 2)}"),
    ]  # fmt: skip


def _of_predictions(rows: dict[str, dict[str, Any]]) -> list[Claim]:
    """Of one set, by method: our conjugate gradients against the others."""
    exact, mine, dual, few = (rows[f"paraboloid, {m}"] for m in ("cholesky", "cg", "sdd", "100 inducing"))
    found: list[Claim] = [
        ("conjugate gradients predict as a Cholesky factor does", _alike(mine, exact), _likelihoods(mine, exact)),
        (f"dual descent does so after {SWEEPS} passes", _alike(dual, exact), _likelihoods(dual, exact)),
        (f"all data is better than inducing inputs {MARGIN}", _better(mine, few), _likelihoods(mine, few)),
    ]
    if "GPyTorch" in rows:
        sparse, theirs = rows["GPyTorch, sparse variational, 100"], rows["GPyTorch"]
        times = f", {number(mine['seconds'], 2)} s against {number(theirs['seconds'], 2)} s"
        found += [
            (f"all data is better than sparse variational regression {MARGIN}",
             _better(mine, sparse), _likelihoods(mine, sparse)),
            (f"no worse than GPyTorch's exact regression as it comes (within {CLOSE})",
             not _better(theirs, mine), _likelihoods(mine, theirs) + times),
        ]  # fmt: skip
    return found


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return abs(one["nll"] - other["nll"]) < CLOSE


def _better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["nll"] < other["nll"] - CLOSE


def _likelihoods(one: dict[str, Any], other: dict[str, Any]) -> str:
    return f"NLL {fixed(one['nll'], None, 3)} against {fixed(other['nll'], None, 3)}"


def findings(results: dict[str, Any]) -> list[str]:
    """Sentences, the count first."""
    every = claims(results)
    seen = sum(bool(c[1]) for c in every)
    missing = [] if any(r["method"].startswith("GPyTorch") for r in results["regression"]) else [MISSING]
    return [f"{seen} of {len(every)} findings on Gaussian processes were seen here.",
            *(f"{claim}: {'seen' if ok else 'not seen here'} ({what})." for claim, ok, what in every),
            *missing]  # fmt: skip
