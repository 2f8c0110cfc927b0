"""The code of the README and of the documentation runs as it stands, top to bottom."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        namespace: dict = {}
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)
    assert blocks or page.name != "README.md"
