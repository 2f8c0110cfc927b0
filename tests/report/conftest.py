"""The record that the page's tests draw: hand-made, in the shape `inspect` writes."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def record():
    return json.loads((Path(__file__).parent / "record.json").read_text(encoding="utf-8"))
