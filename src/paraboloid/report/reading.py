"""What the numbers say, in plain words; each function reads one section of a record and nothing else.

A statement about a ratio or a difference says when the repeats cannot tell it from nothing (two standard errors).
"""

from __future__ import annotations

import math
from typing import Any

from paraboloid.report.numbers import count, number, percent, short, with_error

Section = dict[str, Any]
_UNTOLD = "the mean gradient cannot be told from its noise, even over all samples measured"


def training(section: Section) -> list[str]:
    """How far the training came."""
    if section["steps"] == 0:
        return ["The model was measured as it was given; it was not trained here."]
    first, last = section["curve"][0], section["curve"][-1]
    sentence = (
        f"{count(section['steps'])} steps of {section['optimizer']} ({short(section['epochs'])} epochs, batches of "
        f"{count(section['batch_size'])}) took the training loss from {number(first['train_loss'])} to "
        f"{number(last['train_loss'])}"
    )
    if last.get("test_loss") is not None:
        sentence += f"; the test loss is {number(last['test_loss'])}"
    if last.get("test_accuracy") is not None:
        sentence += f", the test accuracy {percent(last['test_accuracy'], 3)}"
    return [sentence + "."]


def noise(section: Section) -> list[str]:
    """Noise against signal at the start and at the end, and which layer is noisiest."""
    first, last = section["checkpoints"][0], section["checkpoints"][-1]
    when = "At the end of training" if last["step"] else "At these weights"
    batch, ratio, start = count(section["batch_size"]), *(p["total"]["noise_to_signal"] for p in (last, first))
    if ratio is None:
        sentences = [f"{when} {_UNTOLD}: how much noise a batch of {batch} carries cannot be told."]
    else:
        amount = f"{number(ratio)} times as much noise as signal"
        sentences = [f"{when} a gradient from {batch} samples carries {amount}."]
    if first["step"] != last["step"]:
        sentences.append(
            f"At the start {_UNTOLD}." if start is None else f"At the start the ratio was {number(start)}."
        )
    if ratio is not None:
        equal = f"batches of {number(last['total']['noise_scale'])} samples"
        sentences.append(f"Noise and signal would be equal in {equal}.")
    layers = [layer for layer in last["layers"] if layer["noise_to_signal"] is not None]
    untold = [layer["name"] for layer in last["layers"] if layer["noise_to_signal"] is None]
    if len(layers) > 1:
        top = max(layers, key=lambda layer: layer["noise_to_signal"])
        low = min(layers, key=lambda layer: layer["noise_to_signal"])
        sentences.append(
            f"By layer it runs from {number(low['noise_to_signal'])} in {low['name']} to "
            f"{number(top['noise_to_signal'])} in {top['name']}."
        )
    if untold and ratio is not None:
        sentences.append(f"It cannot be told in {', '.join(untold)}, where {_UNTOLD}.")
    if (clusters := section.get("clusters")) is not None and clusters["variance_ratio"] is not None:
        sentences.append(
            f"A batch of {count(clusters['batch_size'])} with one sample from each gradient cluster has "
            f"{number(clusters['variance_ratio'], 2)} times the variance of as many drawn at random."
        )
    return sentences


def curvature(section: Section) -> list[str]:
    """How much of the trace the largest eigenvalues hold, and where they lie."""
    values = [item["value"] for item in section["eigenvalues"]]
    trace, parameters = section["trace"]["value"], section["parameters"]
    sentences = []
    if section["operator"] == "Hessian":  # negative eigenvalues cancel in its trace: shares of it say nothing
        trace = None
        sentences.append(f"The largest of {count(parameters)} eigenvalues of the Hessian is {number(values[0])}.")
    if trace and 20 * (section["trace"]["standard_error"] or 0) > trace:  # two of them are a tenth of it
        stated = with_error(trace, section["trace"]["standard_error"])
        sentences.append(
            f"The largest of {count(parameters)} eigenvalues is {number(values[0])}; what share of the trace, "
            f"{stated}, it and each layer hold cannot be told."
        )
        trace = None
    if trace:
        sentences.append(
            f"The {len(values)} largest of {count(parameters)} eigenvalues hold {percent(sum(values) / trace)} of the "
            f"trace; the largest, {number(values[0])}, holds {percent(values[0] / trace)}."
        )
    shares = section["eigenvalues"][0]["layers"]
    if len(shares) > 1:
        name = max(shares, key=lambda layer: shares[layer])
        sentences.append(f"Of its eigenvector's squared norm {percent(shares[name])} lies in {name}.")
    layers = [layer for layer in section["layers"] if layer["trace"] is not None]
    if trace and len(layers) > 1:
        top, second = sorted(layers, key=lambda layer: -layer["trace"])[:2]
        error = math.hypot(top["standard_error"] or 0, second["standard_error"] or 0)
        told = top["trace"] - second["trace"] > 2 * error
        most = "more than in any other layer" if told else f"not told from the share of {second['name']}"
        sentences.append(f"Of the trace {percent(top['trace'] / trace)} lies in {top['name']}, {most}.")
    return sentences


def bias(section: Section) -> list[str]:
    """The finding first, what to do about it second, then the second batch, the slope and the step's decrease."""
    row = reference_row(section)
    return [_finding(row, section), _advice(row, section), *_second_batch(row), *_slope(row), *_decrease(row)]


def reference_row(section: Section) -> dict[str, Any]:
    """The measured batch size nearest to the one of training (in ratio), of which the finding speaks."""
    wanted = section["training_batch_size"] or section["table"][0]["batch_size"]
    return min(section["table"], key=lambda row: max(row["batch_size"] / wanted, wanted / row["batch_size"]))


def top_ratio(
    row: dict[str, Any], which: str = "same", quantity: str = "curvature"
) -> tuple[float | None, float | None]:
    """The ratio to all data along the top direction, and its standard error."""
    ratio = row["ratios"][0][quantity][which]
    return ratio["value"], ratio["standard_error"]


def verdict(value: float | None, error: float | None, tolerance: float) -> str:
    """What a ratio says against 1: "over", "under" or "fair" (within the tolerance); "untold" where two standard errors
    do not tell, "undefined" without a ratio."""
    if value is None:
        return "undefined"
    if error is None:
        return "untold"
    if abs(value - 1) < tolerance:
        return "fair" if 2 * error <= tolerance else "untold"
    if abs(value - 1) < 2 * error:
        return "untold"
    return "over" if value > 1 else "under"


def sufficient_batch(section: Section) -> int | None:
    """The smallest measured batch size from which on the curvature is within the tolerance of that on all data."""
    enough = None
    for row in sorted(section["table"], key=lambda row: -row["batch_size"]):
        if verdict(*top_ratio(row), section["tolerance"]) != "fair":
            break
        enough = row["batch_size"]
    return enough


def largest_verdict(section: Section) -> str:
    """That of the largest measured batch size."""
    return verdict(*top_ratio(max(section["table"], key=lambda row: row["batch_size"])), section["tolerance"])


def _finding(row: dict[str, Any], section: Section) -> str:
    value, error = top_ratio(row)
    found, tolerance = verdict(value, error, section["tolerance"]), percent(section["tolerance"])
    where = f"With batches of {count(row['batch_size'])} the curvature along the top direction"
    if value is None:
        return f"{where} cannot be compared: it is zero on all data."
    if found == "fair":
        return f"{where} is within {tolerance} of that on all data: {with_error(value, error)} times."
    if found == "under":
        return f"{where} is understated: {number(value, 2)} of the curvature on all data."
    if found == "over":
        return f"{where} is overstated {number(value, 2)} times."
    if value - 1 >= section["tolerance"]:
        return f"{where} looks overstated {number(value, 2)} times, but the repeats do not tell this from no bias."
    return (
        f"{where} is {with_error(value, error)} times that on all data: the repeats do not tell whether it is within "
        f"{tolerance}."
    )


def _advice(row: dict[str, Any], section: Section) -> str:
    """What follows from the ratio, from what the steps of either kind deliver, and from the other batch sizes."""
    found, sizes = verdict(*top_ratio(row), section["tolerance"]), _sizes(section)
    if found == "undefined":
        return "There is nothing to correct along a flat direction."
    if found == "untold":
        return f"Whether such a batch may measure the directions that it found itself cannot be told; {sizes}."
    if found == "fair":
        advice = "A batch of this size may measure the directions that it found itself."
        if _sign(row["decrease"]["same"]["delivered"]) < 0:
            advice += (
                " Its Newton step along the top one raises the loss on all data all the same: the slope is its own."
            )
        return advice
    if found == "under":
        return f"A batch of this size measures the directions that it found itself too low; {sizes}."
    gain, other = row["second_batch_gain"], row["decrease"]["other"]["delivered"]
    if gain["value"] is None:
        return f"A batch of this size should not measure the directions that it found itself; {sizes}."
    if _sign(gain) > 0 and _sign(other) > 0:
        joined = ", or" if sizes.startswith("use") else ":"
        return f"Take directions and step lengths from different batches{joined} {sizes}."
    amount = with_error(abs(gain["value"]), gain["standard_error"])
    if _sign(gain) > 0:
        return (
            f"A step length from a second batch serves better, by {amount} of loss, but is not seen to lower the loss; "
            f"{sizes}."
        )
    if _sign(gain) < 0:
        return (
            f"Do not take the step length from a second batch of this size: the loss on all data is {amount} higher "
            f"after it than after the batch's own step; {sizes}."
        )
    return f"Whether a step length from a second batch serves better cannot be told; {sizes}."


def _sizes(section: Section) -> str:
    """Which batch size suffices, as the end of a sentence."""
    enough, last, tolerance = sufficient_batch(section), largest_verdict(section), percent(section["tolerance"])
    if enough is not None:
        return (
            f"use at least {count(enough)} samples: the smallest measured size that overstates by less than {tolerance}"
        )
    row = max(section["table"], key=lambda row: row["batch_size"])
    value, size = number(top_ratio(row)[0], 2), count(row["batch_size"])
    if last == "over":
        return (
            f"no measured batch size brings the overstatement below {tolerance} (the largest, {size}, still overstates "
            f"{value} times)"
        )
    if last == "under":
        return (
            f"no measured batch size comes within {tolerance} (the largest, {size}, measures {value} of the curvature)"
        )
    return f"from which batch size on the bias is below {tolerance} cannot be told from these repeats"


def _sign(entry: dict[str, Any]) -> int:
    """Of a value, 0 where it is within two standard errors of nothing or they are not known."""
    value, error = entry["value"], entry["standard_error"]
    return 0 if value is None or error is None or abs(value) < 2 * error else (value > 0) - (value < 0)


def _second_batch(row: dict[str, Any]) -> list[str]:
    value, error = top_ratio(row, "other")
    if value is None:
        return []
    sentence = (
        f"A second batch of {count(row['batch_size'])} measures {with_error(value, error)} of the curvature on all "
        "data along the same direction"
    )
    if error is None:
        return [sentence + "."]
    agrees = abs(value - 1) <= 2 * error
    return [sentence + (", no bias within two standard errors." if agrees else ", more than two standard errors off.")]


def _slope(row: dict[str, Any]) -> list[str]:
    same, full = row["slope"]["same"], row["slope"]["full"]
    if same["mean"][0] is None or full["mean"][0] is None:
        return []
    start = f"Along that direction the batch sees a slope of {number(same['mean'][0], 2)}"
    error = full["standard_error"][0]
    if error is not None and abs(full["mean"][0]) < 2 * error:
        return [f"{start}; on all data the slope, {with_error(full['mean'][0], error)}, cannot be told from zero."]
    value, spread = top_ratio(row, "same", "slope")
    return [f"{start}, {with_error(value, spread)} times that on all data."] if value is not None else []


def _decrease(row: dict[str, Any]) -> list[str]:
    same, other = row["decrease"]["same"], row["decrease"]["other"]
    if same["promised"]["value"] is None or same["delivered"]["value"] is None:
        return []
    sentence = (
        f"A Newton step along it promises to lower the loss by {number(same['promised']['value'], 2)}; on the "
        f"quadratic of all data it {_outcome(same['delivered'])}"
    )
    if other["delivered"]["value"] is not None:
        sentence += f", while the step with its length from a second batch {_outcome(other['delivered'])}"
    return [sentence + "."]


def _outcome(decrease: dict[str, Any]) -> str:
    value, error = decrease["value"], decrease["standard_error"]
    if error is not None and abs(value) < 2 * error:
        return f"changes it by {with_error(-value, error)}, within two standard errors of nothing"
    return f"{'lowers' if value >= 0 else 'raises'} it by {with_error(abs(value), error)}"
