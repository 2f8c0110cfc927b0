import json
import math

import pytest

from paraboloid.report import KEYS, from_json, to_json
from paraboloid.report.record import plain


def test_undefined_numbers_are_null(record):
    record["noise"]["checkpoints"][0]["total"]["noise_scale"] = math.inf
    record["curvature"]["trace"]["standard_error"] = math.nan
    text = to_json(record)

    def refuse(constant):
        raise AssertionError(constant)

    parsed = json.loads(text, parse_constant=refuse)
    assert parsed["noise"]["checkpoints"][0]["total"]["noise_scale"] is None
    assert parsed["curvature"]["trace"]["standard_error"] is None


def test_round_trip_keeps_the_sections_in_order(record):
    assert list(from_json(to_json(record))) == list(KEYS)
    assert from_json(to_json(record)) == record


@pytest.mark.parametrize("broken", [{}, {"problem": {}}, [], {key: {} for key in (*KEYS, "extra")}])
def test_sections_are_exactly_the_five(broken):
    with pytest.raises(ValueError, match="expected exactly the sections"):
        to_json(broken)


def test_nan_is_refused_on_reading(record):
    with pytest.raises(ValueError, match="holds the number NaN"):
        from_json(to_json(record).replace('"seed": 0', '"seed": NaN'))


def test_what_is_not_plain_is_named():
    with pytest.raises(TypeError, match=r"record\.a\[1\] is a set; expected plain data"):
        plain({"a": [0, set()]})
    with pytest.raises(TypeError, match="key 3 of type int"):
        plain({3: 0})
