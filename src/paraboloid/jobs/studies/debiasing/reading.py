"""What the study's numbers say, in sentences; differences within two standard errors are called none."""

from __future__ import annotations

from typing import Any

from paraboloid.report.numbers import count, fixed, percent

Rows = list[dict[str, Any]]
AT = 5  # the iteration of conjugate gradients that sentences speak of


def where(rows: Rows, **wanted: Any) -> Rows:
    """Those with the wanted values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def distinct(rows: Rows, key: str) -> list[Any]:
    """The values of a key, each once, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def findings(results: dict[str, Any]) -> list[str]:
    """The most important ones, the first first; the sections have them all."""
    return [
        *table(results), training(results)[-1], *grid(results), *factors(results)[:2], *steps(results),
        *posteriors(results),
    ]  # fmt: skip


def table(results: dict[str, Any]) -> list[str]:
    rows, start = (where(results["table"]["rows"], moment=moment) for moment in (1, 0))
    first, last = rows[0], rows[-1]
    return [
        (
            f"On {results['table']['problem']} a batch of {count(first['batch_size'])} overstates its own top "
            f"curvature {times(first['same']['top'])}, one of {count(last['batch_size'])} {times(last['same']['top'])}."
        ),
        (
            f"A second batch measures {times(first['other']['sum'])} and {times(last['other']['sum'])} the curvature "
            f"on all data along the top {results['table']['k']} directions."
        ),
        (
            f"At initialisation the overstatement is {times(start[0]['same']['top'])} and "
            f"{times(start[-1]['same']['top'])}: the bias comes with training."
        ),
    ]


def training(results: dict[str, Any]) -> list[str]:
    sentences, rows = [], results["training"]["rows"]
    for name in distinct(rows, "problem"):
        mine = where(rows, problem=name)
        smallest = min(distinct(mine, "batch_size"))
        path = where(mine, batch_size=smallest)
        values, moments = (
            ", ".join(fixed(row["same"]["top"]["value"], None) for row in path),
            ", ".join(percent(row["moment"]) for row in path),
        )
        sentences.append(
            f"{name}: with batches of {count(smallest)} the top curvature is overstated {values} times after {moments} "
            "of the training."
        )
    off = [row for row in rows if abs(deviations(row["other"]["sum"], 1)) > 2]
    sentences.append(
        f"Along the top {results['training']['k']} directions a second batch is within two standard errors of all data "
        f"in {len(rows) - len(off)} of {len(rows)} cases; 95 % would be expected without any bias."
    )
    return sentences


def grid(results: dict[str, Any]) -> list[str]:
    """Whether the bias grows with the model: the smallest against the largest network, at every batch size."""
    sentences, rows = [], results["grid"]["rows"]
    for m in distinct(rows, "batch_size"):
        mine = sorted(where(rows, batch_size=m), key=lambda row: row["parameters"])
        small, large = mine[0]["same"]["top"], mine[-1]["same"]["top"]
        gap = large["value"] - small["value"]
        error = (large["standard_error"] ** 2 + small["standard_error"] ** 2) ** 0.5
        if abs(gap) <= 2 * error:
            verdict = "the difference is within two standard errors"
        else:
            verdict = f"the bias {'grows' if gap > 0 else 'shrinks'} with the network"
        sentences.append(
            f"shapes-cnn, batches of {count(m)}: {times(small)} with {count(mine[0]['parameters'])} parameters and "
            f"{times(large)} with {count(mine[-1]['parameters'])}; {verdict}."
        )
    return sentences


def factors(results: dict[str, Any]) -> list[str]:
    sentences, rows = [], results["factors"]["rows"]
    smallest = min(distinct(rows, "batch_size"))
    for row in where(rows, batch_size=smallest):
        kind = "Kronecker eigenvalues" if row["eigenvalue"] == "kronecker" else "exact eigenvalues (EKFAC's)"
        sentences.append(
            f"{row['problem']}, batches of {count(smallest)}: the largest of the {kind} of a batch's own Kronecker "
            f"eigenvectors is {times(row['same']['top'])} that of all data, on a second batch "
            f"{times(row['other']['top'])}."
        )
    return sentences


def steps(results: dict[str, Any]) -> list[str]:
    """How often debiased steps lower the loss more than those of one batch of m, and of 2m."""
    rows, iterations = results["steps"]["rows"], results["steps"]["iterations"]
    at = place(iterations)
    sentences = []
    for key, rule, other in (
        ("debiased_minus_single", "steps with lengths from a second batch", "those of the first batch alone"),
        (
            "debiased_minus_double",
            "steps with lengths from a second batch",
            "those of one batch of 2m, the same budget,",
        ),
        ("folds_minus_double", "steps averaged over both roles", "those of one batch of 2m"),
    ):
        scores = [score(row[key], at) for row in rows]
        better, worse = sum(s > 2 for s in scores), sum(s < -2 for s in scores)
        sentences.append(
            f"Conjugate gradients, iteration {iterations[at]}: {rule} lower the loss on all data more than {other} "
            f"in {better} of {len(rows)} cases, less in {worse}; in {len(rows) - better - worse} two standard errors "
            "do not tell."
        )
    return sentences


def posteriors(results: dict[str, Any]) -> list[str]:
    rows = results["posteriors"]["rows"]
    scores = [deviations(row["debiased_minus_single"], 0) for row in rows]
    better, worse = sum(s < -2 for s in scores), sum(s > 2 for s in scores)
    nearer = sum(
        abs(row["debiased"]["value"] - row["full"]) < abs(row["single"]["value"] - row["full"]) for row in rows
    )
    beaten = sum(row["map"] < min(row["debiased"]["value"], row["single"]["value"], row["full"]) for row in rows)
    return [
        (
            f"Laplace posteriors of 2m samples: the debiased Kronecker one has a lower test NLL than the plain one in "
            f"{better} of {len(rows)} cases, a higher one in {worse}, and lies nearer to that of all data in {nearer}."
        ),
        (
            f"In {beaten} of {len(rows)} cases the trained weights alone have a lower test NLL than any of these "
            "posteriors, that of all data included: with these priors the posterior is too wide."
        ),
    ]


def place(iterations: list[int]) -> int:
    """Where iteration `AT` stands, or the last one."""
    return iterations.index(AT) if AT in iterations else len(iterations) - 1


def times(entry: dict[str, Any]) -> str:
    return f"{fixed(entry['value'], entry['standard_error'])} times"


def deviations(entry: dict[str, Any], truth: float) -> float:
    """How many standard errors the value is above the truth; 0 where there is no error."""
    error = entry["standard_error"]
    return (entry["value"] - truth) / error if error else 0.0


def score(entry: dict[str, Any], at: int) -> float:
    return deviations({"value": entry["mean"][at], "standard_error": entry["standard_error"][at]}, 0)


def cell(entry: dict[str, Any], decimals: int = 2) -> str:
    return fixed(entry["value"], entry["standard_error"], decimals)


def at_iteration(entry: dict[str, Any], at: int) -> str:
    """In units of 1/1000."""
    return fixed(1e3 * entry["mean"][at], 1e3 * entry["standard_error"][at], 1)
