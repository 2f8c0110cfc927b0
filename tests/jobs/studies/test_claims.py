"""Claims in words."""

import pytest

from paraboloid.jobs.studies.claims import inside


@pytest.mark.parametrize(("claim", "expected"), [
    ("The last layer is enough", "the last layer is enough"), ("EM by samples finds it", "EM by samples finds it"),
    ("KFAC is fast", "KFAC is fast"), ("Adam is slower", "Adam is slower"), ("and so on", "and so on"), ("", ""),
])  # fmt: skip
def test_names_keep_their_capitals(claim, expected):
    assert inside(claim) == expected
