"""Everything random in the public API by its seed: draws, and what is computed from them, on tiny networks.

A case is a function of no arguments whose values come back the same from every call and every later build.  What an
eigenvector's sign decides is not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from saved import clusterings, optimisers, settings
from saved.comparing import plain
from saved.operators import V
from saved.settings import load
from torch import Tensor

import paraboloid as pb

F32 = torch.float32
SAMPLED = ("classes", "regression", "binary", "counts", "spread", "uneven", "images", "words", "dropout")


def setting(name: str, dtype: torch.dtype = settings.F64) -> settings.Setting:
    s = load(name, dtype)
    s.model.train(name == "dropout")
    return s


# --- statistics ------------------------------------------------------------------------------------------------------


def sampled(name: str, dtype: torch.dtype = settings.F64, seed: int = 3) -> dict[str, Any]:
    """Every quantity that draws labels, in one call and alone."""
    s = setting(name, dtype)
    q = pb.quantities
    together = pb.statistics(s.model, s.loss_fn, s.batch, ["grad", "diag_ggn_mc", "kfac"], seed=seed)
    twice = pb.statistics(s.model, s.loss_fn, s.batch, [q.DiagGGN(samples=2), q.KFAC(samples=2)], seed=seed)
    alone = pb.statistics(s.model, s.loss_fn, s.batch, [q.SqrtGGN(samples=2)], seed=seed)
    return {
        "together": {k: together[k] for k in ("grad", "diag_ggn_mc", "kfac")},
        "two samples": {k: twice[k] for k in ("diag_ggn_mc", "kfac")},
        "root": alone["sqrt_ggn"],
    }


def other_ways() -> dict[str, Any]:
    """By a generator, for every sample, and from a recorded pass."""
    s = setting("classes")
    generator = torch.Generator().manual_seed(9)
    drawn = pb.statistics(s.model, s.loss_fn, s.batch, ["diag_ggn_mc"], generator=generator)
    each = pb.statistics(s.model, s.loss_fn, s.batch, [pb.quantities.SampleDiagGGN(samples=2)], seed=3)
    with pb.record(s.model) as tape:
        output = s.model(s.x)
    recorded = tape.statistics(s.loss_fn, output, s.y, ["diag_ggn_mc"], seed=3)
    return {"generator": drawn["diag_ggn_mc"], "each": each["sample_diag_ggn"], "recorded": recorded["diag_ggn_mc"]}


# --- operators and linear algebra ------------------------------------------------------------------------------------


def fisher(name: str, dtype: torch.dtype = settings.F64) -> dict[str, Any]:
    s = setting(name, dtype)
    F = pb.Fisher(s.model, s.loss_fn, s.batch, samples=2, seed=3)
    streamed = pb.Fisher(s.model, s.loss_fn, s.batches(len(s.x) // 2), seed=3, max_memory=0)
    return {"products": F @ V(s), "diagonal": F.diagonal(), "streamed": streamed @ V(s)}


def factored(name: str, dtype: torch.dtype = settings.F64) -> dict[str, Any]:
    s, found = setting(name, dtype), {}
    half = (s.x[::2], s.y[::2])
    for make in (pb.KFAC, pb.EKFAC):
        for label, options in {
            "one sample": {}, "three samples": {"samples": 3, "seed": 3}, "loader": {"data": s.batches(len(s.x) // 2)},
            "reduce": {"sharing": "reduce"}, "measured": {"measure_on": half, "seed": 3},
        }.items():  # fmt: skip
            A = make(s.model, s.loss_fn, options.pop("data", s.batch), **options)
            found[f"{make.__name__}, {label}"] = {"products": A @ V(s), "inverse": A.inverse(0.1) @ V(s)}
    found["DiagonalGGN"] = pb.DiagonalGGN(s.model, s.loss_fn, s.batch, samples=2, seed=3).diagonal()
    return found


def matrix() -> Tensor:
    """[20, 20], with a spectrum that falls; the eigenvectors by a reflection, which every processor forms alike."""
    u = (torch.arange(20.0, dtype=settings.F64) * 0.7).sin().unsqueeze(1)
    Q = torch.eye(20, dtype=settings.F64) - 2 / u.square().sum() * u @ u.T
    return Q @ torch.diag(0.6 ** torch.arange(20.0, dtype=settings.F64)) @ Q.T


def estimators() -> dict[str, Any]:
    A, lin = matrix(), pb.linalg
    nystrom = lin.nystrom(A, 6, seed=3)
    T, Q = lin.lanczos(A, 6, seed=3)
    grid, density = lin.spectral_density(A, samples=2, seed=3, steps=8, points=16)
    return {
        "hutchinson": lin.hutchinson_trace(A, 9, seed=3), "hutch++": lin.hutchpp_trace(A, 9, seed=3),
        "xtrace": lin.xtrace(A, 9, seed=3), "generator": lin.xtrace(A, 8, torch.Generator().manual_seed(5)),
        "diagonal": lin.diagonal(A, 9, seed=3), "xdiag": lin.xdiag(A, 9, seed=3),
        "lanczos": [T.diagonal(), Q.abs()], "density": [grid, density],
        "nystrom": nystrom @ V_of(20), "eigsh": lin.eigsh(A, 2, 1e-3, seed=3)[0],
        "lobpcg": lin.lobpcg(A, 2, 1e-3, seed=3)[0],
    }  # fmt: skip


def V_of(size: int) -> Tensor:
    return (torch.arange(1.0, 2 * size + 1, dtype=settings.F64) * 1.7).sin().view(size, 2)


def operator_estimates() -> dict[str, Any]:
    s = setting("classes")
    G, H = pb.GGN(s.model, s.loss_fn, s.batch), pb.Hessian(s.model, s.loss_fn, s.batch)
    d = setting("dropout")
    masked = pb.GGN(d.model, d.loss_fn, d.batch, seed=3)
    return {"trace": G.trace(samples=7, seed=3), "diagonal": H.diagonal(samples=7, seed=3), "masked": masked @ V(d),
            "PCH": pb.PCH(s.model, s.loss_fn, s.batch) @ V(s)}  # fmt: skip


# --- quadratics ------------------------------------------------------------------------------------------------------


def biases() -> Iterator[tuple[str, dict[str, Any]]]:
    cases = {f"{d}, {c}": {"directions": d, "curvature": c}
             for d, c in (("eigen", "ggn"), ("cg", "hessian"), ("kfac", "fisher"), ("ekfac", "ggn"))}  # fmt: skip
    cases["part of the data"] = {"full_samples": 20, "overlap": True}
    for label, options in cases.items():
        s = setting("many")
        found = pb.bias(
            s.model, s.loss_fn, s.batch, batch_size=12, k=2, repeats=2, seed=3, weight_decay=0.01, **options
        )
        yield label, {"curvature": dict(found.curvature), "slope": {k: v.abs() for k, v in found.slope.items()}}


def cross_fits() -> dict[str, Any]:
    s, found = setting("many"), {}
    for label, options in {
        "eigen": {}, "cg": {"directions": "cg", "damping": 0.1}, "kfac": {"directions": "kfac"},
        "rest": {"chosen_by": "rest", "folds": 3, "curvature": "fisher"},
    }.items():  # fmt: skip
        fit = pb.cross_fit(s.model, s.loss_fn, s.batch, k=2, seed=3, **options)
        found[label] = {"curvature": fit.curvature, "same": fit.same_curvature, "step": fit.step(0.1)}
    q = pb.quadratic(s.model, s.loss_fn, s.batch)
    spectrum = 0.5 ** torch.arange(12.0, dtype=settings.F64)
    return found | {
        "shrunk": pb.shrunk_curvature(q, q.eigen_directions(3), samples=4, seed=3),
        "predicted": pb.predicted_bias(spectrum, 8, 40, k=3, draws=3, seed=3),
        "Fisher": pb.quadratic(s.model, s.loss_fn, s.batch, "fisher", seed=3)(V(s, 1)[:, 0]),
    }


# --- posteriors ------------------------------------------------------------------------------------------------------


def posterior(name: str, structure: str, **options: Any) -> dict[str, Any]:
    s = setting(name)
    found = pb.laplace(s.model, s.loss_fn, s.batch, structure, seed=3, **options)
    return {
        "samples": found.sample(3, seed=5), "more": found.sample(2, torch.Generator().manual_seed(5)),
        "functions": found.functional_samples(s.new, 2, seed=5),
        "outputs": found.predict(s.new, "mc", samples=6, seed=5),
        "weights": found.predict(s.new, "weights", samples=6, seed=5),
        "evidence": found.log_evidence(), "updated": found.update(s.batch).log_evidence(),
    }  # fmt: skip


# --- noise -----------------------------------------------------------------------------------------------------------


def comparison(dtype: torch.dtype = settings.F64, **options: Any) -> Any:
    s = setting("many", dtype)
    return pb.noise.compare(s.model, s.loss_fn, s.batch, batch_size=6, draws=3, seed=3, **options)


def average_variances() -> dict[str, float]:
    """Of float32 the variances alone: their errors are differences of nearly equal numbers."""
    return {name: m.average_variance for name, m in comparison(F32, estimators=["sgb", "gc"]).items()}


def snapshots() -> list[Any]:
    s = setting("many")
    snapshot = pb.noise.Snapshots(s.model, s.loss_fn, s.batch, batch_size=6, draws=3, seed=3)
    found = [snapshot().to_json()]
    with torch.no_grad():
        s.model[0].bias.add_(0.1)
    return [*found, snapshot().to_json()]


def orders() -> dict[str, Any]:
    """What samplers draw, from the start and in a later epoch."""
    found = {}
    for name in clusterings.SAMPLERS:
        sampler = clusterings.sampler(name)
        first = list(sampler)
        sampler.set_epoch(5)
        found[name] = [first, list(sampler)]
    return found


def twins() -> list[list[int]]:
    s = setting("many")
    x, y = torch.cat([s.x, s.x[3:5]]), torch.cat([s.y, s.y[3:5]])
    return pb.noise.duplicates(s.model, s.loss_fn, (x, y), seed=3)


# --- optimisers ------------------------------------------------------------------------------------------------------


def first_steps(name: str) -> Tensor:
    s, opt = optimisers.begin(name)
    return optimisers.steps(s, opt, 0, 3)


CASES: dict[str, Callable[[], Any]] = {
    **{f"statistics, {name}": lambda name=name: sampled(name) for name in SAMPLED},
    "statistics, float32": lambda: sampled("classes", F32),
    "statistics, float32 images": lambda: sampled("images", F32, seed=0),
    "statistics, other ways": other_ways,
    **{f"Fisher, {name}": lambda name=name: fisher(name) for name in SAMPLED},
    "Fisher, float32": lambda: fisher("classes", F32),
    **{f"factors, {name}": lambda name=name: factored(name) for name in ("classes", "regression", "images", "words")},
    "factors, float32": lambda: factored("classes", F32),
    "linear algebra": estimators,
    "estimates of operators": operator_estimates,
    "bias": lambda: dict(biases()),
    "cross-fitting": cross_fits,
    **{f"posterior, {s}": lambda s=s: posterior("classes", s) for s in ("full", "diag", "kron", "ekfac", "lowrank", "functional")},
    "posterior, debiased": lambda: posterior("classes", "kron", debias=True),
    "posterior, sampled": lambda: posterior("classes", "ekfac", fisher="mc", samples=2),
    "posterior, subset": lambda: posterior("regression", "functional", subset=5),
    "posterior, regression": lambda: posterior("regression", "kron", weights="last_layer"),
    **{f"clustering, {name}": lambda name=name: clusterings.go_on(clusterings.clustering(name)) for name in clusterings.CLUSTERINGS},
    "noise": lambda: comparison().to_json(),
    "noise, float32": average_variances,
    "noise around the full gradient": lambda: comparison(reference="full").to_json(),
    "noise of snapshots": snapshots,
    "samplers": orders,
    "duplicates": twins,
    **{f"steps, {name}": lambda name=name: first_steps(name) for name in ("KFAC", "EKFAC", "KFAC of images", "Preconditioned, diag_ggn_mc", "Preconditioned, kfac", "HessianFree, Fisher")},
}  # fmt: skip


def value(name: str) -> Any:
    return plain(CASES[name]())


def values() -> dict[str, Any]:
    return {name: value(name) for name in CASES}
