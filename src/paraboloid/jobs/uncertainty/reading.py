"""Whether to trust the numbers, in plain words: each sentence follows from the record and nothing else."""

from __future__ import annotations

from typing import Any

from paraboloid.report.numbers import count, fixed, number, percent

INTERVALS = {0.5: 0.05, 0.9: 0.04}  # level: how far off its coverage may be, however many targets there are
TOLERATED = 0.02  # of the likelihood, and of a calibration error, that count as none
GOOD_AREA, POOR_AREA = 0.9, 0.7


def findings(results: dict[str, Any]) -> list[str]:
    """The headline, then what it rests on."""
    words = _numbers(results) if "coverage" in results["matched"] else _classes(results)
    return [*words, _determined(results)]


def _classes(results: dict[str, Any]) -> list[str]:
    network, ours = results["network"], results["matched"]
    told = {row["name"]: row for row in results["unseen"]}
    worst = min(told.values(), key=lambda row: row["area"], default=None)
    calibrated = ours["ece"] < 0.05
    sure = (
        f"When it says {percent(_mean(ours), 2)}, about {percent(ours['accuracy'], 3)} are right: calibration error "
        f"{percent(ours['ece'])}"
    )
    if calibrated:
        headline = "On inputs like its training data, these probabilities can be taken at their word."
    elif ours["accuracy"] > _mean(ours):
        headline = "These probabilities are too modest: more predictions are right than they say."
    else:
        headline = "These probabilities are too sure: fewer predictions are right than they say."
    sentences = [headline, sure + (f" (the network's own: {percent(network['ece'])})." if network else ".")]
    change = ours["nll"] - network["nll"]
    verdict = (
        "as likely as under the network" if abs(change) <= TOLERATED * max(abs(network["nll"]), 1e-3)
        else "more likely than under the network" if change < 0 else "less likely than under the network"
    )  # fmt: skip
    sentences.append(
        f"Test targets are {verdict}: negative log-likelihood {fixed(ours['nll'], None, 3)} against "
        f"{fixed(network['nll'], None, 3)}."
    )
    if worst is not None:
        sentences += _unseen(told, worst)
    return sentences


def _mean(scores: dict[str, Any]) -> float:
    return sum(row["count"] * row["confidence"] for row in scores["bins"]) / scores["count"]


def _unseen(told: dict[str, Any], worst: dict[str, Any]) -> list[str]:
    listed = ", ".join(
        f"{row['name']} {fixed(row['area'], None)} (network {fixed(row['network_area'], None)})"
        for row in told.values()
    )
    sentences = [f"How well low confidence tells unlike inputs from test inputs (1 is always, .5 by chance): {listed}."]
    if worst["novelty_area"] is not None:
        listed = ", ".join(f"{row['name']} {fixed(row['novelty_area'], None)}" for row in told.values())
        sentences.append(f"Told by how far they are from the training data (posterior.novelty): {listed}.")
    if worst["area"] >= GOOD_AREA:
        sentences.append("On everything unlike the training data that was tried, low confidence is a reliable warning.")
    elif worst["area"] >= POOR_AREA:
        sentences.append(f"The warning is weakest for '{worst['name']}': do not rely on it alone there.")
    else:
        sentences.append(
            f"For '{worst['name']}' the confidence is no warning: such inputs look familiar to this network."
        )
    return sentences


def _allowed(level: float, count: int) -> float:
    """Two standard errors of a coverage that is right, at least what `INTERVALS` says."""
    return max(INTERVALS[level], 2 * (level * (1 - level) / count) ** 0.5)


def _numbers(results: dict[str, Any]) -> list[str]:
    ours, network = results["matched"], results["network"]
    covered = {row["level"]: row["covered"] for row in ours["coverage"]}
    half, most = covered[0.5], covered[0.9]
    off = {
        covered[level] > level for level in INTERVALS if abs(covered[level] - level) > _allowed(level, ours["count"])
    }
    if not off:
        headline = "On inputs like its training data, these intervals hold what they promise."
    elif off == {False}:
        headline = "These intervals are too narrow: the truth lies outside more often than they say."
    elif off == {True}:
        headline = "These intervals are too wide: the truth lies inside more often than they say."
    else:
        headline = "These intervals have another shape than the errors: some hold more than they say, others less."
    likely, alone = fixed(ours["nll"], None, 3), fixed(network["nll"], None, 3)
    sentences = [
        headline,
        f"The 50% interval holds {percent(half)} of the test targets, the 90% interval {percent(most)}.",
        f"Negative log-likelihood of a target: {likely}, against {alone} with the noise alone.",
    ]
    share = results["model_variance"] / max(results["model_variance"] + results["test_noise_variance"], 1e-300)
    sentences.append(
        f"Of the predicted variance {percent(share)} is the model's, which more data would lower; the rest is noise."
    )
    if results["unseen"]:
        listed = ", ".join(f"{row['name']} {number(row['ratio'], 2)} times" for row in results["unseen"])
        sentences.append(f"The model's own standard deviation on unlike inputs, over that on test inputs: {listed}.")
    return sentences


def _determined(results: dict[str, Any]) -> str:
    posterior = results["posterior"]
    gamma, size = posterior["effective_dimension"], posterior["parameters"]
    sentence = f"{count(posterior['samples'])} training samples determine {number(gamma)} of {count(size)} weights"
    if posterior["layers"]:
        shares = {row["name"]: row["determined"] / row["parameters"] for row in posterior["layers"]}
        first = max(shares, key=lambda name: shares[name])
        sentence += f", the largest part ({percent(shares[first])}) in {first}"
    return sentence + "; the prior holds the rest."
