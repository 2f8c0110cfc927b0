"""The plan of the house: which folders may import each other, no circle of files, no file too long to read."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "paraboloid"

# folder -> the folders that it may import from.  `""` is the root: the public face and the command line.
MAY_IMPORT = {
    "passes": set(),
    "layers": {"passes"},
    "distributed": {"passes"},
    "data": {"passes"},
    "losses": {"passes"},
    "linalg": {"passes"},
    "reductions": {"passes", "linalg"},
    "engine": {"passes", "layers", "reductions"},
    "graph": {"passes", "layers", "losses", "engine", "reductions"},
    "quantities": {"passes", "distributed", "data", "losses", "linalg", "engine", "reductions", "graph"},
    "operators": {"passes", "data", "losses", "linalg", "engine", "reductions", "graph", "quantities"},
    "quadratics": {"passes", "data", "losses", "linalg", "operators"},
    "noise": {"passes", "data", "losses", "linalg", "reductions", "quantities"},
    "optim": {
        "passes", "layers", "distributed", "data", "losses", "linalg", "engine", "reductions", "quantities",
        "operators", "quadratics",
    },
    "posteriors": {
        "passes", "distributed", "data", "losses", "linalg", "engine", "reductions", "graph", "quantities", "operators",
    },
    "tomography": {"passes", "losses", "linalg", "operators", "posteriors"},
    "logging": {"passes", "data", "losses", "linalg", "quantities", "noise"},
    "testing": {"passes", "data", "layers", "engine", "losses", "linalg", "quantities", "optim"},
    "problems": {"passes", "data", "losses"},
    "gp": {"passes", "linalg"},
    "report": set(),
    "jobs": {
        "passes", "data", "gp", "losses", "linalg", "quantities", "operators", "quadratics", "noise", "optim",
        "posteriors", "problems", "report", "tomography",
    },
    "": {
        "passes", "gp", "linalg", "logging", "losses", "noise", "operators", "optim", "posteriors", "problems", "quadratics",
        "quantities", "testing", "tomography", "jobs", "report",
    },
}  # fmt: skip
FACE = {"__init__", "__main__", "cli"}
# (file, file) whose arrow only a type needs, under TYPE_CHECKING
FOR_A_TYPE = {("operators.saving", "operators.linear_operator")} | {
    (f"posteriors.{name}", "posteriors.posterior")
    for name in (
        "saving",
        "prior_tuning.matching",
        "prior_tuning.spread",
        "prior_tuning.tuning",
        "prior_tuning.unit_information",
        "prediction.confidence",
        "prediction.last_layer",
        "prediction.predictive",
        "prediction.sharpness",
        "prediction.through_head",
    )
}
HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 400


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a folder's `__init__.py` is the folder, "" the root's."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, known: dict[str, Path]) -> dict[str, int]:
    """File -> line of every import of the package in a file, wherever it stands: in functions, under TYPE_CHECKING."""
    path, found = known[name], {}
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                above = package.split(".") if package else []
                base = ["paraboloid", *above[: len(above) - node.level + 1], *base]
            # `from paraboloid.engine import tape` names the module last; `from paraboloid.engine.tape import Tape` not.
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] != "paraboloid":
                continue
            inner = ".".join(target[1:])
            while inner and inner not in known:
                inner = inner.rpartition(".")[0]
            if inner != name:
                found.setdefault(inner, node.lineno)
    return found


def folder(name: str) -> str:
    return "" if name in FACE or not name else name.split(".")[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of files that reach each other (Tarjan's strongly connected components of more than one)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(v: str) -> None:
        order[v] = low[v] = len(order)
        stack.append(v)
        for w in sorted(arrows.get(v, ())):
            if w not in order:
                visit(w)
                low[v] = min(low[v], low[w])
            elif w in stack:
                low[v] = min(low[v], order[w])
        if low[v] == order[v]:
            group = []
            while not group or group[-1] != v:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for v in sorted(arrows):
        if v not in order:
            visit(v)
    return found


MODULES = modules(PACKAGE)
ARROWS = {name: imported(name, MODULES) for name in MODULES}


def test_the_root_holds_the_public_face_and_folders():
    loose = {path.stem for path in PACKAGE.glob("*.py")} - FACE
    assert not loose, f"give these modules a room: {sorted(loose)}"
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(MAY_IMPORT) - {""}
    assert not [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__" and p.name not in folders]


def test_every_folder_says_what_lives_there_and_what_it_may_import():
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name and "." not in name:
            said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert "import" in said.split("\n\n")[0], f"{path.relative_to(ROOT)} does not say what it may import"


def test_folders_import_what_the_table_allows():
    offences = []
    for name, arrows in ARROWS.items():
        for target, line in arrows.items():
            here, there = folder(name), folder(target)
            if here != there and there not in MAY_IMPORT[here] and not (there == "" and not target):
                offences.append(f"{MODULES[name].relative_to(ROOT)}:{line} imports {target}; {here!r} may import from "
                                f"{sorted(MAY_IMPORT[here])}")  # fmt: skip
    assert not offences, "\n".join(offences)


def test_the_table_has_no_circle_and_no_arrow_that_is_not_used():
    assert not circles({k: set(v) for k, v in MAY_IMPORT.items()})
    used = {(folder(a), folder(b)) for a, arrows in ARROWS.items() for b in arrows}
    unused = {(a, b) for a, allowed in MAY_IMPORT.items() for b in allowed} - used
    assert not unused, f"these arrows of the table are not used any more; take them out: {sorted(unused)}"


def test_only_the_version_is_taken_from_the_public_face():
    for name in ARROWS:
        if folder(name):
            for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "paraboloid":
                    taken = {alias.name for alias in node.names} - set(MODULES) - {"__version__"}
                    assert not taken, f"{MODULES[name].relative_to(ROOT)} imports {taken} through the public face"


def test_no_circle_of_files():
    arrows = {a: {b for b in found if b and (a, b) not in FOR_A_TYPE} for a, found in ARROWS.items() if a}
    # A folder's own __init__ names its files for users; the files do not go through it.
    assert not (found := circles(arrows)), f"files that import each other in a circle: {found}"


def test_no_module_is_hidden_by_a_function_of_its_name():
    hidden = []
    for name, path in MODULES.items():
        if path.name != "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    inner = f"{name}.{alias.asname or alias.name}".lstrip(".")
                    if inner in MODULES and node.module != f"paraboloid.{name}".rstrip("."):
                        hidden.append(inner)
    assert not hidden, f"these modules cannot be reached as attributes: {hidden}; rename them"


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_imports_are_found_in_every_form(tmp_path):
    (tmp_path / "linalg").mkdir()
    (tmp_path / "report").mkdir()
    for file in ("__init__", "cli", "linalg/__init__", "linalg/lanczos", "report/page", "report/__init__"):
        (tmp_path / f"{file}.py").write_text("")
    (tmp_path / "linalg" / "cg.py").write_text(
        "import torch\nimport paraboloid.cli\nfrom paraboloid import __version__\nfrom .lanczos import lanczos\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from paraboloid.report.page import Page\n"
        "def f():\n    from ..report import page\n    from .. import report\n    from . import lanczos\n"
    )
    found = imported("linalg.cg", modules(tmp_path))
    assert found == {"cli": 2, "": 3, "linalg.lanczos": 4, "report.page": 7, "report": 10}


def test_no_homeless_names():
    found = [name for name in MODULES if HOMELESS & set(name.split("."))]
    assert not found, f"a concept is a file and the file has its name; rename {found}"


def test_every_file_can_be_read_in_one_sitting():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"files above {MAX_LINES} lines; split them by concept: {long}"
