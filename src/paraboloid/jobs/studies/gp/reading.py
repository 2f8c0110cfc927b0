"""What the study says in words: the papers' findings, seen or not."""

from __future__ import annotations

from typing import Any

from paraboloid.jobs.studies.gp.gpytorch_models import MISSING

Claim = tuple[str, bool | None, str]  # finding, seen (None: not run), what was measured


def at_end(results: dict[str, Any], system: str, solver: str) -> dict[str, Any]:
    """The last row of a solver on a system."""
    return [r for r in results["convergence"] if r["system"] == system and r["solver"] == solver][-1]


def claims(results: dict[str, Any]) -> list[Claim]:
    """Findings of arXiv:2306.11589, 2310.20581 and 2505.13723 that can be looked at here."""
    hard, easy = "ill conditioned", "well conditioned"
    sgd, sdd, published = (at_end(results, hard, s) for s in ("sgd", "sdd", "sgd, as published"))
    block, conjugate = (at_end(results, hard, s)["interpolation"] for s in ("block", "cg"))
    quick, slow = (at_end(results, easy, s)["interpolation"] for s in ("sdd", "sgd, as published"))
    between, edges, far = (published[region] for region in ("interpolation", "extrapolation", "prior"))
    dual, mended = sdd["interpolation"], sgd["interpolation"]
    found: list[Claim] = [
        ("Stochastic gradients err most where data ends, less between data, and not at all far away",
         far < between < edges, f"ill conditioned: {edges:.1e} at the edges, {between:.1e} between, {far:.1e} far"),
        ("Dual descent converges faster than stochastic gradients",
         quick < slow, f"well conditioned: {quick:.1e} against {slow:.1e}"),
        ("Exact solves on blocks converge faster than dual descent",
         block < dual, f"ill conditioned: {block:.1e} against {dual:.1e}"),
        ("Conjugate gradients lose on ill-conditioned systems",
         conjugate > dual, f"with a preconditioner: {conjugate:.1e} against {dual:.1e}"),
        ("(ours) A preconditioner of eigenvectors mends stochastic gradients",
         mended < between / 10, f"ill conditioned: {mended:.1e} against {between:.1e}"),
    ]  # fmt: skip
    for name in dict.fromkeys(r["set"] for r in results["regression"]):
        rows = {r["method"]: r for r in results["regression"] if r["set"] == name}
        exact, solver, few = (rows[f"paraboloid, {m}"] for m in ("cholesky", "cg", "100 inducing"))
        told = f"NLL {solver['nll']:.3f} against {exact['nll']:.3f}"
        close = abs(solver["nll"] - exact["nll"]) < 0.01
        found.append((f"{name}: iterative solvers predict as a Cholesky factor does", close, told))
        told = f"NLL {solver['nll']:.3f} against {few['nll']:.3f}"
        found.append((f"{name}: all data is better than inducing inputs", solver["nll"] < few["nll"], told))
        if "GPyTorch" in rows:
            sparse, theirs = rows["GPyTorch, sparse variational, 100"], rows["GPyTorch"]
            told = f"NLL {solver['nll']:.3f} against {sparse['nll']:.3f}"
            found.append((f"{name}: all data is better than sparse variational regression",
                          solver["nll"] < sparse["nll"], told))  # fmt: skip
            told = (f"NLL {solver['nll']:.3f} in {solver['seconds']:.2g} s against {theirs['nll']:.3f} in "
                    f"{theirs['seconds']:.2g} s")  # fmt: skip
            found.append((f"{name}: no worse than GPyTorch's exact regression as it comes (within .01)",
                          solver["nll"] < theirs["nll"] + 0.01, told))  # fmt: skip
    last = results["thompson"][-1]
    found.append(("Parallel Thompson sampling beats random search", last["thompson"] > last["random"],
                  f"best value {last['thompson']:.2f} against {last['random']:.2f}"))  # fmt: skip
    return found


def findings(results: dict[str, Any]) -> list[str]:
    """Sentences, the count first."""
    every = claims(results)
    seen = sum(bool(c[1]) for c in every)
    missing = [] if any(r["method"].startswith("GPyTorch") for r in results["regression"]) else [MISSING]
    return [f"{seen} of {len(every)} findings on Gaussian processes were seen here.",
            *(f"{claim}: {'seen' if ok else 'not seen here'} ({what})." for claim, ok, what in every),
            *missing]  # fmt: skip
