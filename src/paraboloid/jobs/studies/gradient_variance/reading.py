"""What the study says, in words: the paper's findings with what was measured here."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from paraboloid.jobs.studies.claims import Claim, inside
from paraboloid.report.numbers import fixed, number, percent

AVERAGE, NORMALISED = "average_variance", "normalized_variance"


def ratio(points: list[dict[str, Any]], name: str, late: bool = True) -> float | None:
    """Sum of the estimator's average variance over that of SG-B, over the points between renewals: of the second half
    of the training (`late`), or of the first."""
    between = [p for p in points if p["between"]]
    half = (len(between) + 1) // 2
    chosen = between[-half:] if late else between[:half]
    below = sum(p["sgb"][AVERAGE] or 0.0 for p in chosen)
    return sum(p[name][AVERAGE] or 0.0 for p in chosen) / below if below else None


def mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def claims(results: dict[str, Any]) -> list[Claim]:
    """Every finding of the paper that can be looked at here."""
    features, images = results["features"], results["images"]
    shares = sorted({row["duplicated"] for row in features})
    gc = {share: mean([ratio(r["points"], "gc") for r in features if r["duplicated"] == share]) for share in shares}
    double = mean([ratio(r["points"], "sg2b") for r in features])
    found: list[Claim] = [
        ("Clustering lowers the variance of random-feature models without duplicates",
         _below(gc.get(0.0), 1), f"GC / SG-B {fixed(gc.get(0.0), None)}"),
        ("It lowers it more where many samples are duplicates, and more so the more are",
         _falling([gc[s] for s in shares if s == 0 or s >= 0.5]),
         ", ".join(f"{percent(s)}: {fixed(gc[s], None)}" for s in shares)),
        ("Twice the batch halves the variance", None if double is None else 0.4 < double < 0.6,
         f"SG-2B / SG-B {fixed(double, None)}"),
    ]  # fmt: skip
    late = [ratio(r["points"], "svrg") for r in features]
    early = [ratio(r["points"], "svrg", late=False) for r in features]
    found.append(("SVRG is good late in training and bad early", _and(_below(mean(late), 1), _above(mean(early), 1)),
                  f"SVRG / SG-B early {fixed(mean(early), None)}, late {fixed(mean(late), None)}"))  # fmt: skip
    plain = [row for row in images if row["variant"] == "plain"]
    found += [_along(row) for row in plain] + [_normalised(row) for row in plain]
    for row in images:
        if row["variant"] == "learning-rate drop":
            found.append(_drop(row))
    for row in plain:
        other = [r for r in images if r["problem"] == row["problem"]]
        found += _variants(row, {r["variant"]: r for r in other})
    (counts,) = results["counts"]
    fixed_, running = counts["fixed"]["ratio"], counts["running"]["ratio"]
    measured = f"variance / SG-B: fixed {fixed(fixed_, None)}, running {fixed(running, None)}"
    claim = "Fixed cluster sizes (the text's rule) fail, running ones (the code's) do not"
    found.append((claim, fixed_ > 1 > running, measured))
    return found


def _along(row: dict[str, Any]) -> Claim:
    first, last = (row["points"][i]["sgb"][AVERAGE] for i in (1, -1))
    return (f"The variance falls along the training ({row['problem']}; in the paper on MNIST)", last < first,
            f"SG-B {number(first)} after {row['points'][1]['step']} steps, {number(last)} at the end")  # fmt: skip


def _normalised(row: dict[str, Any]) -> Claim:
    values = [p["sgb"][NORMALISED] for p in row["points"]]
    claim = f"Normalised variance stays below 1 ({row['problem']}; in the paper on MNIST and CIFAR-10)"
    return claim, max(values) < 1, f"{fixed(min(values), None)} to {fixed(max(values), None)}"


def _drop(row: dict[str, Any]) -> Claim:
    points = row["points"]
    half = len(points) // 2
    before, after = points[half]["sgb"][AVERAGE], points[half + 1]["sgb"][AVERAGE]
    return (f"The variance rises after a learning-rate drop ({row['problem']}; in the paper on CIFAR-10 and ImageNet)",
            after > before, f"SG-B {number(before)} before, {number(after)} after")  # fmt: skip


def _variants(plain: dict[str, Any], other: dict[str, Any]) -> list[Claim]:
    name, found = plain["problem"], []
    base = ratio(plain["points"], "gc")
    if "duplicates" in other:
        copies = ratio(other["duplicates"]["points"], "gc")
        found.append((f"Duplicates make clustering better ({name})", _below(copies, base or 0.0),
                      f"GC / SG-B {fixed(copies, None)} with, {fixed(base, None)} without"))  # fmt: skip
    if "corrupted labels" in other:
        noisy, calm = _fluctuation(other["corrupted labels"]["points"]), _fluctuation(plain["points"])
        found.append((f"Wrong labels remove the fluctuations of clustering ({name})",
                      None if noisy is None or calm is None else noisy < calm,
                      f"spread of log GC / SG-B over points {fixed(noisy, None)} with, {fixed(calm, None)} without")
                     )  # fmt: skip
    return found


def _fluctuation(points: list[dict[str, Any]]) -> float | None:
    """Standard deviation of log GC / SG-B over the points between renewals."""
    logs = [math.log(p["gc"][AVERAGE] / p["sgb"][AVERAGE]) for p in points
            if p["between"] and p["gc"][AVERAGE] and p["sgb"][AVERAGE]]  # fmt: skip
    if len(logs) < 2:
        return None
    centre = sum(logs) / len(logs)
    return (sum((v - centre) ** 2 for v in logs) / (len(logs) - 1)) ** 0.5


def _below(value: float | None, bound: float) -> bool | None:
    return None if value is None else value < bound


def _above(value: float | None, bound: float) -> bool | None:
    return None if value is None else value > bound


def _and(a: bool | None, b: bool | None) -> bool | None:
    return None if a is None or b is None else a and b


def _falling(values: list[float | None]) -> bool | None:
    if len(values) < 2 or any(v is None for v in values):
        return None
    known = [v for v in values if v is not None]
    return all(b < a for a, b in pairwise(known))


def findings(results: dict[str, Any]) -> list[str]:
    """The claims as sentences, those that were not seen here as plainly as the others."""
    found = claims(results)
    seen, judged = sum(s is True for _, s, _ in found), sum(s is not None for _, s, _ in found)
    words = {True: "Seen", False: "Not seen here", None: "Not run"}
    first = f"{seen} of {judged} findings of the paper were seen here."
    return [first, *(f"{words[s]}: {inside(claim)} ({measured})." for claim, s, measured in found)]
