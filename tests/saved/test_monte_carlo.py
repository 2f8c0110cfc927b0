"""What is random follows its seed, from build to build; see `monte_carlo.py`.  New values: `make.py --monte-carlo`."""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from saved import files, monte_carlo
from saved.comparing import check_close, tolerances

kept = lru_cache(lambda: files.read(Path(__file__).with_name("monte_carlo.pt.xz")))


def test_every_case_has_values():
    assert set(kept()) == set(monte_carlo.CASES)


@pytest.mark.parametrize("name", monte_carlo.CASES)
def test_todays_numbers_come_back(name):
    state = torch.get_rng_state()
    check_close(monte_carlo.value(name), kept()[name], tolerances(name, 1e-12, 1e-6))
    assert torch.equal(torch.get_rng_state(), state)
