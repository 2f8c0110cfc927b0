"""The code of the README and of the documentation runs as it stands, and the gallery shows every quantity."""

import ast
import re
from pathlib import Path

import pytest
import torch

from paraboloid.quantities.named import QUANTITIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GALLERY = ROOT / "docs" / "gallery"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_examples_run(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        namespace: dict = {}
        for block in blocks:
            exec(compile(block, str(page), "exec"), namespace)
    assert blocks or page.name != "README.md"


@pytest.mark.parametrize("name", QUANTITIES)
def test_every_quantity_has_a_page_and_a_figure(name):
    page = (GALLERY / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    assert f'"{name}"' in page or "pb.quantities." in page
    assert f"](figures/{name}.svg)" in page
    assert (GALLERY / "figures" / f"{name}.svg").is_file()
    for place in (GALLERY / "index.md", ROOT / "mkdocs.yml", ROOT / "docs" / "statistics.md"):
        assert name in place.read_text(encoding="utf-8")


def test_every_figure_is_drawn_from_a_page():
    """`make figures` runs the code of page NAME and draws it with the function NAME."""
    drawn = {
        name
        for script in ("first_order.py", "second_order.py")
        for name in re.findall(r"^def ([a-z]\w*)\(", (GALLERY / script).read_text(encoding="utf-8"), flags=re.M)
    }
    assert drawn == {path.stem for path in (GALLERY / "figures").iterdir()}
    assert drawn == {path.stem for path in GALLERY.glob("*.md")} - {"index"}


def test_the_reference_names_what_the_builder_of_the_documentation_finds():
    """It reads the code without running it: a name that a module makes when asked for is not there for it."""
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(names) > 50
    for name in names:
        module, _, attribute = name.rpartition(".")
        path = ROOT / "src" / module.replace(".", "/")
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        found = {child.stem for child in path.glob("*") if path.is_dir()}
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name for alias in node.names}
        assert attribute in found, name
