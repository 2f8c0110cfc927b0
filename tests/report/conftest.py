"""The record that the page's tests draw: hand-made, in the shape `inspect` writes."""

import json
from pathlib import Path

import pytest

from paraboloid.report import render

TEXT = (Path(__file__).parent / "record.json").read_text(encoding="utf-8")


@pytest.fixture
def record():
    """A fresh copy, to be changed at will."""
    return json.loads(TEXT)


@pytest.fixture(scope="session")
def page():
    """The page of the record as it is."""
    return render(json.loads(TEXT))
