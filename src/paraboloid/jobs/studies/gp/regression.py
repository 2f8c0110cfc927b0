"""Regression sets: test error, likelihood, coverage and time of our solvers and of other libraries."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from sklearn import datasets
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as sk

from paraboloid import gp
from paraboloid.jobs.studies.gp import gpytorch_models
from paraboloid.jobs.studies.gp.plan import Plan
from paraboloid.passes.random_state import seeded

COVERED = 1.96  # standard deviations: 95 percent
SWEEPS = 100  # passes of dual descent
Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # training inputs and targets, test inputs and targets


def _friedman() -> Any:
    return datasets.make_friedman1(2000, noise=1.0, random_state=0)


def _waves() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (1200, 2))
    return x, np.sin(3 * x[:, 0]) * np.cos(2 * x[:, 1]) + 0.1 * rng.standard_normal(1200)


SETS: dict[str, Callable[[], Any]] = {
    "diabetes": lambda: datasets.load_diabetes(return_X_y=True), "friedman": _friedman, "waves": _waves,
}  # fmt: skip

# Mean test NLL as published in arXiv:2505.13723: ADASAP, and dual descent at the step size that was best for it there.
PUBLISHED = {"song": {"ADASAP": 1.121, "SDD": 1.149}, "houseelectric": {"ADASAP": -2.346, "SDD": -1.804}}


def uci_names(folder: str) -> list[str]:
    """The sets in a folder: subfolders with data.txt, their own or in `data/`."""
    return sorted(p.name for p in Path(folder).iterdir() if p.is_dir() and _uci_path(p).joinpath("data.txt").is_file())


def _uci_path(place: Path) -> Path:
    return place / "data" if (place / "data" / "data.txt").is_file() else place


def uci(folder: str, name: str, splits: int) -> Iterator[Split]:
    """Splits as the papers' repositories keep them: data.txt, index_features.txt, index_target.txt, and for each split
    index_train_K.txt and index_test_K.txt of rows; ValueError for what is missing or does not fit."""
    place = _uci_path(Path(folder) / name)

    def read(file: str, dtype: type = int) -> np.ndarray:
        if not (place / file).is_file():
            raise ValueError(f"{place / file} is missing; a UCI set has data.txt, index_features.txt, index_target.txt "
                             "and, for each split K, index_train_K.txt and index_test_K.txt.")  # fmt: skip
        return np.loadtxt(place / file, dtype=float, ndmin=1).astype(dtype)

    table = np.atleast_2d(read("data.txt", float))
    features, target = read("index_features.txt"), read("index_target.txt")
    for k in range(splits):
        if k and not (place / f"index_train_{k}.txt").is_file():
            return
        train, test = read(f"index_train_{k}.txt"), read(f"index_test_{k}.txt")
        if max(train.max(), test.max()) >= len(table) or np.intersect1d(train, test).size:
            raise ValueError(f"split {k} of {name} names row {max(train.max(), test.max())} of {len(table)}, or a row "
                             "for training and test; expected disjoint rows of data.txt.")  # fmt: skip
        x, y = table[:, features], table[:, target[0]]
        yield x[train], y[train], x[test], y[test]


def split(name: str, splits: int, seed: int) -> Iterator[Split]:
    """Random splits of nine to one."""
    x, y = SETS[name]()
    for k in range(splits):
        order = np.random.default_rng([seed, k]).permutation(len(x))
        train, test = order[len(x) // 10 :], order[: len(x) // 10]
        yield x[train], y[train], x[test], y[test]


def methods() -> dict[str, Callable[[Split, gp.Hyperparameters], tuple[np.ndarray, np.ndarray]]]:
    """Name -> means and standard deviations of the test targets, from a split and the hyperparameters."""
    ours = {f"paraboloid, {solver}": partial(_ours, {"solver": solver}) for solver in ("cholesky", "cg")}
    ours["paraboloid, sdd"] = partial(_ours, {"solver": "sdd"})
    few = partial(_ours, {"inducing": 100, "samples": 0})
    theirs = {"GPyTorch": partial(_gpytorchs, gpytorch_models.exact),
              "GPyTorch, sparse variational, 100": partial(_gpytorchs, gpytorch_models.sparse)}  # fmt: skip
    return {**ours, "paraboloid, 100 inducing": few, "scikit-learn": _sklearn,
            **(theirs if gpytorch_models.installed() else {})}  # fmt: skip


def _hyperparameters(data: Split) -> gp.Hyperparameters:
    x, y = torch.from_numpy(data[0]), torch.from_numpy(data[1])
    start = gp.Matern(1.5, torch.full((x.shape[1],), x.shape[1] ** 0.5, dtype=x.dtype))
    return gp.fit_hyperparameters(start, x, y, 0.2, subset=500, steps=50)


def _ours(options: dict[str, Any], data: Split, found: gp.Hyperparameters) -> tuple[np.ndarray, np.ndarray]:
    options = {**options, "inducing": min(options["inducing"], len(data[0]))} if "inducing" in options else options
    if options.get("solver") == "sdd":  # which would go on for thousands of passes on some of these systems
        options = {**options, "batch_size": 64, "steps": -(-SWEEPS * len(data[0]) // 64)}
    process = gp.condition(found.kernel, data[0], data[1], found.noise_variance, **options)
    mean, variance = process.predict(data[2])
    return mean.numpy(), (variance + found.noise_variance).sqrt().numpy()


def _sklearn(data: Split, found: gp.Hyperparameters) -> tuple[np.ndarray, np.ndarray]:
    """Hyperparameters by its own optimiser, on 500 samples too; then all data."""
    x, y, new, _ = data
    few = np.random.default_rng(0).permutation(len(x))[:500]
    lengths: Any = np.full(x.shape[1], x.shape[1] ** 0.5)
    start = 1.0 * sk.Matern(lengths, nu=1.5) + sk.WhiteKernel(0.2)
    kernel = GaussianProcessRegressor(start).fit(x[few], y[few]).kernel_
    model: Any = GaussianProcessRegressor(kernel, optimizer=cast(Any, None)).fit(x, y)
    mean, std = model.predict(new, return_std=True)
    return mean, std


def _gpytorchs(run: Any, data: Split, found: gp.Hyperparameters) -> tuple[np.ndarray, np.ndarray]:
    with seeded(0):
        return run(*data[:3])


def regress(plan: Plan, seed: int, tick: Callable[[], None]) -> list[dict[str, Any]]:
    """Means over splits of RMSE, NLL (of standardised targets), coverage of 95 percent intervals, and seconds."""
    rows = []
    for name in plan.sets:
        found: dict[str, list[list[float]]] = {}
        source = split(name, plan.splits, seed) if plan.data is None else uci(plan.data, name, plan.splits)
        for data in source:
            data = _standardised(data)
            start = time.perf_counter()
            hyperparameters = _hyperparameters(data)
            shared = time.perf_counter() - start
            for method, run in methods().items():
                start = time.perf_counter() - (shared if method.startswith("paraboloid") else 0)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # optima at scikit-learn's bounds
                    mean, std = run(data, hyperparameters)
                error = (data[3] - mean) / std
                nll = 0.5 * error**2 + np.log(std) + 0.5 * np.log(2 * np.pi)
                found.setdefault(method, []).append([
                    float(np.sqrt(((data[3] - mean) ** 2).mean())), float(nll.mean()),
                    float((np.abs(error) < COVERED).mean()), time.perf_counter() - start,
                ])  # fmt: skip
        for method, values in found.items():
            rmse, nll_mean, coverage, seconds = np.mean(values, 0).tolist()
            rows.append({"set": name, "method": method, "rmse": rmse, "nll": nll_mean, "coverage": coverage,
                         "seconds": seconds, "splits": len(values)})  # fmt: skip
        tick()
    return rows


def _standardised(data: Split) -> Split:
    x, y, new, target = data
    mean, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
    middle, spread = y.mean(), y.std() or 1.0
    return (x - mean) / scale, (y - middle) / spread, (new - mean) / scale, (target - middle) / spread
