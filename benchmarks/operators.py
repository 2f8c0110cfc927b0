"""python -m benchmarks.operators: what curvature operators cost, against a plain gradient and against the peers.

The column "bare torch" has no operator around it: autograd's own calls for the same product, nothing checked, counted
or copied.  It is the floor of the method (double backward through a kept graph), not of all methods.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import paraboloid as pb
from benchmarks import nets
from benchmarks.harness import Table, compare, write
from benchmarks.peers import installed

SETTINGS = {"mlp": 128, "3c3d": 64, "transformer": 32}
Run = Callable[[], object]
DAMPING = 1e-2


def ours(model: nn.Module, loss_fn: nn.Module, data: list) -> dict[str, Run]:
    size = sum(p.numel() for p in model.parameters())
    v, V = torch.randn(size), torch.randn(size, 10)
    batch = data[0]
    kept: dict[str, Any] = {}

    def operator(name: str, build: Callable[[], Any]) -> Any:
        if name not in kept:
            kept[name] = build()
        return kept[name]

    def ggn():
        return pb.GGN(model, loss_fn, batch)

    def hessian():
        return pb.Hessian(model, loss_fn, batch)

    def kfac(**options):
        return lambda: pb.KFAC(model, loss_fn, batch, **options)

    def ekfac(**options):
        return lambda: pb.EKFAC(model, loss_fn, batch, **options)

    return {
        "GGN product, the first": lambda: ggn() @ v,
        "GGN product, repeated": lambda: operator("ggn", ggn) @ v,
        "GGN times 10 vectors": lambda: operator("ggn", ggn) @ V,
        "Hessian product, repeated": lambda: operator("hessian", hessian) @ v,
        "Fisher product, repeated": lambda: operator("fisher", lambda: pb.Fisher(model, loss_fn, batch)) @ v,
        "KFAC, Monte Carlo": kfac(),
        "KFAC, exact": kfac(fisher="exact"),
        "KFAC, empirical": kfac(fisher="empirical"),
        "EKFAC, Monte Carlo": ekfac(),
        "EKFAC, exact": ekfac(fisher="exact"),
        "KFAC inverse product, repeated": lambda: operator("inverse", lambda: kfac()().inverse(DAMPING)) @ v,
        "top eigenvalue to 1e-3": lambda: ggn().eigsh(1, tol=1e-3),
        "top Hessian eigenvalue to 1e-3": lambda: hessian().eigsh(1, tol=1e-3),
    }


def bare(model: nn.Module, loss_fn: nn.Module, data: list) -> dict[str, Run]:
    """The calls of autograd that a product cannot do without."""
    x, y = data[0]
    parameters = list(model.parameters())
    v = [torch.randn_like(p) for p in parameters]

    def record() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        with sdpa_kernel(SDPBackend.MATH):
            f = model(x)
            u = torch.zeros_like(f, requires_grad=True)
            return f, u, torch.autograd.grad(f, parameters, u, create_graph=True)

    def product(f: Tensor, u: Tensor, g: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (jv,) = torch.autograd.grad(g, u, v, retain_graph=True)
        p = f.detach().softmax(1)
        hjv = p * jv - p * (p * jv).sum(1, keepdim=True)
        return torch.autograd.grad(f, parameters, hjv / len(f), retain_graph=True)

    kept = record()
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(loss_fn(model(x), y), parameters, create_graph=True)
    return {
        "GGN product, the first": lambda: product(*record()),
        "GGN product, repeated": lambda: product(*kept),
        "GGN times 10 vectors": lambda: [product(*kept) for _ in range(10)],
        "Hessian product, repeated": lambda: torch.autograd.grad(gradient, parameters, v, retain_graph=True),
    }


def pyhessian(model: nn.Module, loss_fn: nn.Module, data: list) -> dict[str, Run]:
    """PyHessian: a kept gradient, power iteration."""
    if not installed("pyhessian"):
        return {}
    hessian: Any = importlib.import_module("pyhessian").hessian
    multiply: Any = importlib.import_module("pyhessian.utils").hessian_vector_product
    model = copy.deepcopy(model)
    kept: list[Any] = []

    def made(fresh: bool) -> Any:
        if fresh or not kept:
            with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
                warnings.simplefilter("ignore")  # it calls backward(create_graph=True)
                kept[:] = [hessian(model, loss_fn, data=data[0], cuda=False)]
        return kept[0]

    v = [torch.randn_like(p) for p in model.parameters()]

    def product() -> object:
        h = made(fresh=False)
        return multiply(h.gradsH, h.params, v)

    return {
        "Hessian product, repeated": product,
        "top Hessian eigenvalue to 1e-3": lambda: made(fresh=True).eigenvalues(maxIter=100, tol=1e-3, top_n=1),
    }


def curvlinops(model: nn.Module, loss_fn: nn.Module, data: list) -> dict[str, Run]:
    """curvlinops, each operator as its documentation builds it."""
    if not installed("curvlinops"):
        return {}
    import curvlinops as peer
    from scipy.sparse.linalg import eigsh

    model = copy.deepcopy(model)
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    v, V = torch.randn(size), torch.randn(size, 10)
    kept: dict[str, Any] = {}

    def build(kind: str, **options: Any) -> Callable[[], Any]:
        def make():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(peer, kind)(model, loss_fn, params, data, **options)

        return make

    def operator(name: str, make: Callable[[], Any]) -> Any:
        if name not in kept:
            kept[name] = make()
        return kept[name]

    ggn = build("GGNLinearOperator")
    unchecked = build("GGNLinearOperator", check_deterministic=False)

    def factors(kind: str, fisher: str) -> Callable[[], Any]:
        """Made, and computed: both are lazy."""
        make = build(kind, fisher_type=fisher, check_deterministic=False, separate_weight_and_bias=True)

        def run():
            K = make()
            K.compute_kronecker_factors()
            if kind == "EKFACLinearOperator":
                K.compute_eigenvalue_correction()
            return K

        return run

    def inverse():
        return peer.KFACInverseLinearOperator(factors("KFACLinearOperator", "mc")(), damping=DAMPING)

    def top():
        options: dict[str, Any] = {"k": 1, "tol": 1e-3}
        return eigsh(unchecked().to_scipy(), **options)

    runs: dict[str, Run] = {
        "GGN product, the first": lambda: ggn() @ v,
        "GGN product, repeated": lambda: operator("ggn", ggn) @ v,
        "GGN times 10 vectors": lambda: operator("ggn", ggn) @ V,
        "Hessian product, repeated": lambda: operator("hessian", build("HessianLinearOperator")) @ v,
        "KFAC, Monte Carlo": factors("KFACLinearOperator", "mc"),
        "KFAC, exact": factors("KFACLinearOperator", "type-2"),
        "KFAC, empirical": factors("KFACLinearOperator", "empirical"),
        "EKFAC, Monte Carlo": factors("EKFACLinearOperator", "mc"),
        "EKFAC, exact": factors("EKFACLinearOperator", "type-2"),
        "KFAC inverse product, repeated": lambda: operator("inverse", inverse) @ v,
        "top eigenvalue to 1e-3": top,
    }

    def with_math(run: Run) -> Run:
        """Fused attention has no rule for its products."""

        def inside():
            with sdpa_kernel(SDPBackend.MATH):
                return run()

        return inside

    return {name: with_math(run) for name, run in runs.items()}


def table(net: str, batch: int, only: list[str] | None, budget: float, peers: bool) -> Table:
    model, x, y = nets.make(net, batch)
    loss_fn = nn.CrossEntropyLoss()
    data = [(x, y)]

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))

    columns = {"paraboloid": ours(model, loss_fn, data), "bare torch": bare(model, loss_fn, data)}
    if peers:
        columns |= {"curvlinops": curvlinops(model, loss_fn, data), "PyHessian": pyhessian(model, loss_fn, data)}
    names = [name for name in columns["paraboloid"] if not only or name in only]
    rows = {name: {label: runs[name] for label, runs in columns.items() if name in runs} for name in names}
    return compare(f"{net}, batch {batch}", gradient, rows, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds for each row")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--stem", default="operators", help="name of the files that are written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = [table(net, SETTINGS[net], args.only, args.budget, not args.no_peers) for net in args.nets]
    write(tables, args.out, args.stem)


if __name__ == "__main__":
    main()
