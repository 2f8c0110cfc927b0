"""python -m benchmarks.operators: what curvature operators cost, against a plain gradient and against the peers."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

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
    kept: dict[str, object] = {}

    def operator(name: str, build: Callable[[], object]):
        if name not in kept:
            kept[name] = build()
        return kept[name]

    def ggn():
        return pb.GGN(model, loss_fn, batch)

    def top():
        return pb.GGN(model, loss_fn, batch).eigsh(1, tol=1e-3)

    def kfac(**options):
        return lambda: pb.KFAC(model, loss_fn, batch, **options)

    def ekfac(**options):
        return lambda: pb.EKFAC(model, loss_fn, batch, **options)

    return {
        "GGN product, the first": lambda: ggn() @ v,
        "GGN product, repeated": lambda: operator("ggn", ggn) @ v,
        "GGN times 10 vectors": lambda: operator("ggn", ggn) @ V,
        "Hessian product, repeated": lambda: operator("hessian", lambda: pb.Hessian(model, loss_fn, batch)) @ v,
        "KFAC, Monte Carlo": kfac(),
        "KFAC, exact": kfac(fisher="exact"),
        "KFAC, empirical": kfac(fisher="empirical"),
        "EKFAC, Monte Carlo": ekfac(),
        "EKFAC, exact": ekfac(fisher="exact"),
        "KFAC inverse product, repeated": lambda: operator("inverse", lambda: kfac()().inverse(DAMPING)) @ v,
        "top eigenvalue to 1e-3": top,
    }


def curvlinops(model: nn.Module, loss_fn: nn.Module, data: list) -> dict[str, Run]:
    """curvlinops, each operator as its documentation builds it."""
    if not installed("curvlinops"):
        return {}
    import curvlinops as peer
    from scipy.sparse.linalg import eigsh

    model = copy.deepcopy(model)
    params = dict(model.named_parameters())
    size = sum(p.numel() for p in params.values())
    v, V = torch.randn(size), torch.randn(size, 10)
    kept: dict[str, object] = {}

    def build(kind: str, **options) -> Callable[[], object]:
        def make():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(peer, kind)(model, loss_fn, params, data, **options)

        return make

    def operator(name: str, make: Callable[[], object]):
        if name not in kept:
            kept[name] = make()
        return kept[name]

    ggn = build("GGNLinearOperator")
    unchecked = build("GGNLinearOperator", check_deterministic=False)

    def factors(kind: str, fisher: str) -> Run:
        return build(kind, fisher_type=fisher, check_deterministic=False, separate_weight_and_bias=True)

    def inverse():
        return factors("KFACLinearOperator", "mc")().inverse(damping=DAMPING)

    def top():
        return eigsh(unchecked().to_scipy(), k=1, tol=1e-3)

    return {
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


def table(net: str, batch: int, only: list[str] | None, budget: float, peers: bool) -> Table:
    model, x, y = nets.make(net, batch)
    loss_fn = nn.CrossEntropyLoss()
    data = [(x, y)]

    def gradient() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_fn(model(x), y), list(model.parameters()))

    columns = {"paraboloid": ours(model, loss_fn, data)} | (
        {"curvlinops": curvlinops(model, loss_fn, data)} if peers else {}
    )
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
