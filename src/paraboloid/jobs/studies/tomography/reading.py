"""What the study says, in words."""

from __future__ import annotations

import math
from typing import Any

from paraboloid.jobs.studies.tomography.choices import RULES
from paraboloid.jobs.studies.tomography.scores import isotropic
from paraboloid.report.numbers import fixed, percent

SHORT = 0.05  # of a decibel, that counts as no worse


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def cells(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The means over images of each (noise, angles), in order."""
    rows = results["cells"]
    found = []
    for noise, angles in dict.fromkeys((r["noise"], r["angles"]) for r in rows):
        mine = [r for r in rows if (r["noise"], r["angles"]) == (noise, angles)]
        squares = [r["posterior"]["mse"] for r in mine]
        own = [isotropic(mse, squares[:i] + squares[i + 1 :]) for i, mse in enumerate(squares)]
        found.append({
            "noise": noise, "angles": angles, "images": len(mine),
            "posterior": mean([r["posterior"]["psnr"] for r in mine]), "tv": mean([r["tv"] for r in mine]),
            "network": mean([r["network"] for r in mine]), "density": mean([r["posterior"]["density"] for r in mine]),
            "patches": mean([r["posterior"]["patches 4"] for r in mine]), "isotropic": mean(own),
            "best isotropic": mean([isotropic(mse, []) for mse in squares]),
            "dropout": mean([r["dropout"]["density"] for r in mine]),
            "50": mean([r["posterior"]["inside"]["50"] for r in mine]),
            "90": mean([r["posterior"]["inside"]["90"] for r in mine]),
            "correlation": mean([r["posterior"]["correlation"] for r in mine]),
            "noise ratio": math.exp(mean([math.log(r["noise_variance"] / r["true_noise_variance"]) for r in mine])),
        })  # fmt: skip
    return found


def findings(results: dict[str, Any]) -> list[str]:
    """Sentences, the most important first."""
    table = cells(results)
    better = [c for c in table if c["posterior"] >= max(c["tv"], c["network"]) - SHORT]
    denser = [c for c in table if c["density"] > max(c["best isotropic"], c["isotropic"], c["dropout"])]
    over = {key: fixed(mean([c[key] for c in table]), None, 1) for key in ("posterior", "tv", "network")}
    ratios = [c["noise ratio"] for c in table]
    likelier = (
        "The true image is likelier under the posterior than under one variance for all pixels (the mean squared error "
        f"itself, so the best there is) and under Monte Carlo dropout in {len(denser)} of {len(table)} cells of angles "
        f"and noise{_but(table, denser)}."
    )
    nearer = (
        "The posterior's mean is no worse than total variation and the network's own image in "
        f"{len(better)} of {len(table)} cells{_but(table, better)}; over all, {over['posterior']} dB against "
        f"{over['tv']} and {over['network']}."
    )
    sure = (
        f"Intervals meant to cover 50 and 90 per cent of the pixels cover {percent(mean([c['50'] for c in table]))} "
        f"and {percent(mean([c['90'] for c in table]))}; standard deviation and absolute error correlate by "
        f"{fixed(mean([c['correlation'] for c in table]), None)}; the learned noise variance is between "
        f"{fixed(min(ratios), None)} and {fixed(max(ratios), None)} times the true one."
    )
    said = [likelier, nearer, sure]
    for row in results["maps"]:
        found = row["posterior"]
        said.append(
            f"Phantom, {row['case']} ({row['angles']} angles, {percent(row['noise'])} noise, {row['size']} x "
            f"{row['size']}): {fixed(found['psnr'], None, 1)} dB (total variation {fixed(row['tv'], None, 1)}, network "
            f"{fixed(row['network'], None, 1)}), log density {fixed(found['density'], None)} per pixel against "
            f"{fixed(row['isotropic'], None)} for the best one variance and "
            f"{fixed(row['dropout']['density'], None)} for dropout."
        )
    return [*said, _chosen(results["choices"]), _agrees(results["agreement"][0])]


def _but(table: list[dict[str, Any]], good: list[dict[str, Any]]) -> str:
    bad = [f"{c['angles']} angles with {percent(c['noise'])}" for c in table if c not in good]
    return f" (not: {', '.join(bad)})" if bad else ""


def gains(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Mean PSNR at each number of angles, by rule."""
    return {rule: [mean(list(at)) for at in zip(*(r[rule] for r in rows), strict=True)] for rule in RULES}


def _chosen(rows: list[dict[str, Any]]) -> str:
    by_rule, total = gains(rows), rows[0]["angles"]
    last = ", ".join(f"{rule} {fixed(by_rule[rule][-1], None, 1)} dB" for rule in RULES)
    return f"From {total[0]} angles to {total[-1]} (from {fixed(by_rule[RULES[0]][0], None, 1)} dB): {last}."


def _agrees(row: dict[str, Any]) -> str:
    off = abs(row["sampled"] - row["exact"]) / abs(row["exact"])
    return (
        f"By products alone the log evidence is {fixed(row['sampled'], row['error'], 1)} where it is "
        f"{fixed(row['exact'], None, 1)} exactly ({percent(off)} off), and standard deviations are "
        f"{fixed(row['std'], None)} times the exact ones."
    )
