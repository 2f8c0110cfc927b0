"""The code of the README and of the documentation runs as it stands, and the gallery shows every quantity."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import paraboloid as pb
import paraboloid.layers
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
    pages = [(ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("reference", "extending")]
    names = [name for page in pages for name in re.findall(r"^::: (\S+)$", page, flags=re.M)]
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


BASES = [pb.quantities.Quantity, pb.Loss, pb.operators.LinearOperator, pb.layers.Use, pb.noise.estimators.Estimator]


@pytest.mark.parametrize("base", BASES, ids=lambda c: c.__name__)
def test_every_member_of_a_base_class_is_said_to_be_something(base):
    """On the page of the base classes all members are shown; a method has a docstring, and a field stands in some."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f".{base.__name__}\n    options:\n      show_if_no_docstring: true" in page
    tree = next(n for n in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(base))))
                if isinstance(n, ast.ClassDef) and n.name == base.__name__)  # fmt: skip
    said = ast.get_docstring(tree) + inspect.getmodule(base).__doc__
    for before, node in zip([None, *tree.body], tree.body, strict=False):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node) or re.search(rf"\b{node.name}\b", said), f"{base.__name__}.{node.name}"
        elif isinstance(before, ast.AnnAssign | ast.Assign):
            target = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
            if target.id.startswith("_"):
                continue
            described = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert described or re.search(rf"\b{target.id}\b", said), f"{base.__name__}.{target.id} has no docstring"
