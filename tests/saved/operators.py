"""Operators with structure to save, and what is asked of them once they are loaded again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from saved import settings
from saved.comparing import Tolerances, check_close, plain
from torch import Tensor

import paraboloid as pb

DAMPING = 0.1


def parameters(s: settings.Setting) -> dict[str, Tensor]:
    return dict(s.model.named_parameters())


def vector(size: int) -> Tensor:
    """Numbers without an order, the same everywhere."""
    return (torch.arange(1.0, size + 1, dtype=settings.F64) * 1.7).sin()


def V(s: settings.Setting, columns: int = 2) -> Tensor:
    """[D, columns]."""
    size = sum(p.numel() for p in parameters(s).values())
    return vector(size * columns).view(size, columns).to(next(iter(parameters(s).values())))


def kfac(s: settings.Setting, **options: Any) -> Any:
    return pb.KFAC(s.model, s.loss_fn, s.batch, **{"fisher": "exact"} | options)


def ekfac(s: settings.Setting, **options: Any) -> Any:
    return pb.EKFAC(s.model, s.loss_fn, s.batch, **{"fisher": "exact"} | options)


def bare(s: settings.Setting) -> Any:
    """Bare factors, and diagonals as factors: of a large bias, and of an embedding."""
    krons = {}
    for name, p in parameters(s).items():
        p = p.detach()
        left = vector(len(p)).abs() + 1
        right = torch.ones(1, 1, dtype=p.dtype) if p.dim() == 1 else (p.T @ p).contiguous()
        krons[name] = pb.Kron(left, right)
    return pb.operators.KroneckerFactored(parameters(s), krons)


def layers(s: settings.Setting) -> Any:
    return pb.GGN(s.model, s.loss_fn, s.batch, blocks="layer").dense_blocks()


def scattered(s: settings.Setting) -> Any:
    """Blocks of parameters that do not lie next to each other."""
    blocks = [["0.weight", "2.bias"], ["0.bias", "2.weight"]]
    return pb.GGN(s.model, s.loss_fn, s.batch, blocks=blocks).dense_blocks()


def low_rank(s: settings.Setting, diagonal: float | Tensor | str) -> Any:
    return pb.LowRank.from_operator(pb.GGN(s.model, s.loss_fn, s.batch), 4, diagonal)


def nested(s: settings.Setting) -> Any:
    K = kfac(s)
    identity = pb.operators.Identity(parameters(s))
    return 0.5 * (K + 2 * identity) + (-3) * (0.1 * low_rank(s, 0.0) + K)


# name -> setting, how it is made
CASES: dict[str, tuple[str, Callable[[settings.Setting], Any]]] = {
    "KFAC": ("classes", kfac),
    "KFAC, sampled": ("regression", lambda s: kfac(s, fisher="mc", samples=2, seed=3)),
    "KFAC, reduce": ("images", lambda s: kfac(s, sharing="reduce")),
    "KFAC of images": ("images", kfac),
    "KFAC of words": ("words", kfac),
    "KFAC of few samples": ("few", kfac),
    "KFAC of few samples, empirical": ("few", lambda s: kfac(s, fisher="empirical")),
    "KFAC, float32": ("classes", kfac),
    "KFAC, split inverse": ("classes", lambda s: kfac(s).inverse(DAMPING, split="pi")),
    "KFAC, inverse": ("images", lambda s: kfac(s).inverse(DAMPING)),
    "KFAC, measured on others": ("classes", lambda s: kfac(s, measure_on=(s.x[:5], s.y[:5]))),
    "bare factors": ("classes", bare),
    "EKFAC": ("classes", ekfac),
    "EKFAC of images": ("images", ekfac),
    "EKFAC of words": ("words", ekfac),
    "EKFAC of few samples": ("few", ekfac),
    "EKFAC, root": ("classes", lambda s: ekfac(s).sqrt()),
    "diagonal": ("classes", lambda s: pb.DiagonalGGN(s.model, s.loss_fn, s.batch)),
    "blocks of layers": ("classes", layers),
    "scattered blocks": ("classes", scattered),
    "scattered blocks, inverse": ("classes", lambda s: scattered(s).inverse(DAMPING)),
    "low rank": ("classes", lambda s: low_rank(s, 0.2)),
    "low rank, inverse": ("classes", lambda s: low_rank(s, 0.2).inverse(DAMPING)),
    "low rank and diagonal": ("classes", lambda s: low_rank(s, "rest")),
    "low rank and diagonal, inverse": ("classes", lambda s: low_rank(s, vector(31).abs() + 0.1).inverse(DAMPING)),
    "identity": ("classes", lambda s: pb.operators.Identity(parameters(s))),
    "scaled": ("classes", lambda s: 0.3 * kfac(s)),
    "sum": ("classes", lambda s: ekfac(s) + 0.5 * pb.operators.Identity(parameters(s))),
    "sum of two bases": ("classes", lambda s: kfac(s) + layers(s)),
    "nested": ("classes", nested),
}


def setting_of(name: str) -> settings.Setting:
    return settings.load(CASES[name][0], torch.float32 if "float32" in name else settings.F64)


def make(name: str) -> Any:
    return CASES[name][1](setting_of(name))


def answers(name: str, A: Any) -> dict[str, Any]:
    """All that a user may ask of a loaded operator; what it does not know is left out."""
    s = setting_of(name)
    v = V(s)
    asked = {
        "products": lambda: A @ v,
        "product by name": lambda: torch.cat([t.flatten() for t in (A @ parameters(s)).values()]),
        "quadratic forms": lambda: A.quadratic_forms(v.T),
        "diagonal": A.diagonal,
        "trace": A.trace,
        "norm": A.frobenius_norm,
        "inverse": lambda: A.inverse(DAMPING) @ v,
        "logdet": lambda: A.logdet(DAMPING),
        "root": lambda: A.sqrt_matmul(v),
        "solution": lambda: A.solve(v, DAMPING),
        "eigenvalues": lambda: A.eigsh(3)[0],
        "traces": A.traces,
        "largest": lambda: A.top_eigenvalues(2),
    }
    found = {}
    for what, ask in asked.items():
        try:
            found[what] = ask()
        except (NotImplementedError, ValueError):  # for one without structure; of one that is not definite
            continue
    return plain(found)


def check_answers(name: str, A: Any, expected: dict[str, Any], within: Tolerances) -> None:
    """AssertionError where an operator's answers are not those expected.

    Rounding makes of an eigenvalue 0 one of its own size, as each processor does, and of its root one of the root of that:
    roots are compared to that, and as their products with A, which takes it back, to what all the others are.
    """
    found = answers(name, A)
    if "root" in expected:
        expected = {**expected, "product of the root": A @ expected["root"]}
        found["product of the root"] = A @ found["root"]
        roots = {kind: torch.finfo(kind).eps ** 0.5 for kind in (torch.float64, torch.float32)}
        check_close({"root": found["root"]}, {"root": expected.pop("root")}, roots)
    check_close(found, expected, within)
