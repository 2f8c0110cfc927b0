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
