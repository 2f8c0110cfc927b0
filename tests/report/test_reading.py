import pytest

from paraboloid.report import reading


def set_top(record, values, error=0.02):
    for row, value in zip(record["bias"]["table"], values, strict=True):
        row["ratios"][0]["curvature"]["same"] = {"value": value, "standard_error": error}
    return record["bias"]


def test_the_finding_names_size_and_factor_and_the_advice_the_smallest_sufficient_size(record):
    finding, advice = reading.bias(set_top(record, [2.2, 1.74, 1.4, 1.06, 1.02]))[:2]
    assert finding == "With batches of 64 the curvature along the top direction is overstated 1.7 times."
    assert advice.startswith("Take directions and step lengths from different batches, or use at least 256 samples")


def test_a_size_suffices_only_if_all_larger_ones_do(record):
    assert reading.sufficient_batch(set_top(record, [2.2, 1.05, 1.4, 1.3, 1.02])) == 512
    assert reading.sufficient_batch(set_top(record, [1.0, 1.0, 1.0, 1.0, 1.0])) == 32
    assert reading.sufficient_batch(set_top(record, [1.0, 1.0, 1.0, 1.0, 1.11])) is None


def test_no_measured_size_suffices(record):
    advice = reading.bias(set_top(record, [2.2, 1.74, 1.4, 1.3, 1.2]))[1]
    assert "no measured batch size brings the overstatement below 10%" in advice
    assert "the largest, 512, still overstates 1.2 times" in advice


def test_no_overstatement_is_said_to_be_none(record):
    finding, advice = reading.bias(set_top(record, [1.3, 1.04, 1.0, 1.0, 1.0]))[:2]
    assert finding.endswith("is within 10% of that on all data: 1.04 ± 0.02 times.")
    assert advice == "A batch of this size may measure the directions that it found itself."


def test_noise_is_not_sold_as_bias(record):
    finding = reading.bias(set_top(record, [1.3, 1.4, 1.0, 1.0, 1.0], error=0.5))[0]
    assert "the repeats do not tell this from no bias" in finding


def test_an_understatement_is_said(record):
    assert "is understated: 0.70 of" in reading.bias(set_top(record, [0.7, 0.7, 0.8, 0.9, 1.0]))[0]


def test_a_flat_direction(record):
    finding, advice = reading.bias(set_top(record, [None] * 5, error=None))[:2]
    assert "cannot be compared: it is zero on all data" in finding
    assert "flat direction" in advice


OVER = [2.2, 1.74, 1.4, 1.06, 1.02]
STEPS = {
    "better": ((0.004, 0.001), (0.003, 0.001), "Take directions and step lengths from different batches, or use at least"),
    "better, but no good": ((0.004, 0.001), (-0.001, 0.001), "serves better, by 0.0040 ± 0.0010 of loss, but is not seen"),
    "worse": ((-0.004, 0.001), (-0.005, 0.002), "second batch of this size: the loss on all data is 0.0040 ± 0.0010 higher"),
    "no different": ((0.001, 0.001), (0.003, 0.001), "Whether a step length from a second batch serves better cannot be"),
    "a single repeat": ((0.004, None), (0.003, None), "Whether a step length from a second batch serves better cannot be"),
    "no step": ((None, None), (None, None), "A batch of this size should not measure the directions that it found itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_the_advice_about_steps_is_what_they_delivered(record, case):
    gain, other, words = STEPS[case]
    row = record["bias"]["table"][1]
    row["second_batch_gain"] = dict(zip(("value", "standard_error"), gain, strict=True))
    row["decrease"]["other"]["delivered"] = dict(zip(("value", "standard_error"), other, strict=True))
    advice = reading.bias(set_top(record, OVER))[1]
    assert words in advice and "overstates by less than 10%" in advice
    assert ("Take directions" in advice) == (case == "better")


def test_sizes_whose_bias_is_within_its_noise_are_not_recommended(record):
    section = set_top(record, OVER)
    for row in section["table"][3:]:
        row["ratios"][0]["curvature"]["same"]["standard_error"] = 0.08
    assert reading.sufficient_batch(section) is None
    advice = reading.bias(section)[1]
    assert advice.endswith("from which batch size on the bias is below 10% cannot be told from these repeats.")


def test_a_ratio_near_one_with_a_large_error_is_no_clearance(record):
    finding, advice = reading.bias(set_top(record, [1.0] * 5, error=0.5))[:2]
    assert finding.endswith("is 1.00 ± 0.50 times that on all data: the repeats do not tell whether it is within 10%.")
    assert advice.startswith("Whether such a batch may measure the directions that it found itself cannot be told; ")
    finding, advice = reading.bias(set_top(record, [1.3] * 5, error=None))[:2]  # a single repeat
    assert "do not tell this from no bias" in finding and "cannot be told" in advice


def test_what_a_batch_understates_it_may_not_measure(record):
    advice = reading.bias(set_top(record, [0.7, 0.7, 0.8, 1.0, 1.0]))[1]
    assert advice.startswith(
        "A batch of this size measures the directions that it found itself too low; use at least 256"
    )
    advice = reading.bias(set_top(record, [0.7, 0.7, 0.8, 0.8, 0.8]))[1]
    assert "no measured batch size comes within 10% (the largest, 512, measures 0.80 of the curvature)" in advice


def test_an_unbiased_curvature_does_not_make_a_step_good(record):
    record["bias"]["table"][1]["decrease"]["same"]["delivered"] = {"value": -0.004, "standard_error": 0.001}
    advice = reading.bias(set_top(record, [1.0] * 5))[1]
    assert advice.endswith(
        "Its Newton step along the top one raises the loss on all data all the same: the slope is its own."
    )


def test_shares_of_a_trace_that_is_not_known_are_not_given(record):
    section = record["curvature"]
    section["trace"]["standard_error"] = 0.06 * section["trace"]["value"]
    found = reading.curvature(section)
    assert "it and each layer hold cannot be told." in found[0]
    assert not any("of the trace;" in sentence or "Of the trace" in sentence for sentence in found)


def test_the_largest_layer_is_named_only_where_it_is_told_from_the_next(record):
    section = record["curvature"]
    top, second, *_ = sorted(section["layers"], key=lambda layer: -layer["trace"])
    assert reading.curvature(section)[-1].endswith(f"lies in {top['name']}, more than in any other layer.")
    second["standard_error"] = top["trace"] - second["trace"]
    assert reading.curvature(section)[-1].endswith(
        f"lies in {top['name']}, not told from the share of {second['name']}."
    )


def test_a_model_that_was_not_trained_has_no_end_of_training(record):
    record["noise"]["checkpoints"] = [{**record["noise"]["checkpoints"][0], "step": 0}]
    assert reading.noise(record["noise"])[0].startswith("At these weights a gradient from 64 samples carries")


def test_the_row_nearest_to_the_training_batch_is_the_reference(record):
    record["bias"]["training_batch_size"] = 100
    assert reading.reference_row(record["bias"])["batch_size"] == 128
    record["bias"]["training_batch_size"] = 1000
    assert reading.reference_row(record["bias"])["batch_size"] == 512


def test_a_slope_within_its_noise_is_not_divided_by(record):
    row = record["bias"]["table"][1]
    row["slope"]["full"] = {"mean": [0.001] * 10, "standard_error": [0.002] * 10}
    assert any("cannot be told from zero" in sentence for sentence in reading.bias(record["bias"]))


def test_a_step_whose_effect_is_within_its_error_is_not_given_a_direction(record):
    record["bias"]["table"][1]["decrease"]["same"]["delivered"] = {"value": 0.001, "standard_error": 0.001}
    assert any("changes it by −0.0010 ± 0.0010, within two" in s for s in reading.bias(record["bias"]))


def test_a_step_that_raises_the_loss_is_said_to(record):
    record["bias"]["table"][1]["decrease"]["same"]["delivered"] = {"value": -0.004, "standard_error": 0.001}
    assert any("raises it by 0.0040 ± 0.0010" in sentence for sentence in reading.bias(record["bias"]))


@pytest.mark.parametrize("ratio, words", [(28.7, "28.7 times as much noise as signal"), (0.25, "0.250 times as much")])
def test_noise(record, ratio, words):
    record["noise"]["checkpoints"][-1]["total"]["noise_to_signal"] = ratio
    assert words in reading.noise(record["noise"])[0]


UNTOLD = "the mean gradient cannot be told from its noise, even over all samples measured"


def test_a_signal_within_its_noise_is_said_to_be(record):
    last = record["noise"]["checkpoints"][-1]["total"]
    last["noise_to_signal"] = last["noise_scale"] = None
    first, *others = reading.noise(record["noise"])
    assert first == f"At the end of training {UNTOLD}: how much noise a batch of 64 carries cannot be told."
    assert not any("would be equal" in sentence for sentence in others)


def test_a_signal_within_its_noise_at_the_start_or_in_a_layer(record):
    record["noise"]["checkpoints"][0]["total"]["noise_to_signal"] = None
    record["noise"]["checkpoints"][-1]["layers"][1]["noise_to_signal"] = None
    found = reading.noise(record["noise"])
    assert f"At the start {UNTOLD}." in found
    assert f"It cannot be told in conv2, where {UNTOLD}." in found


def test_a_model_taken_as_given(record):
    record["training"]["steps"] = 0
    assert reading.training(record["training"]) == ["The model was measured as it was given; it was not trained here."]


def test_the_fixture_says_what_its_numbers_say(record):
    for name in ("training", "noise", "curvature", "bias"):
        assert record[name]["reading"] == getattr(reading, name)(record[name])
