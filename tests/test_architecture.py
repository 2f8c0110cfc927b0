"""The floors: a module imports from its own floor or from one below, and every file can be read in one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "paraboloid"

# From the ground up. `problems` stands beside the house: it uses the ground only, and only the roof uses it.
FLOORS = [
    {"losses", "trees", "data", "distributed", "randomness", "ambient", "fresh"},
    {
        "tape",
        "bends",
        "twice_differentiable",
        "recording",
        "aliases",
        "promotion",
        "certify",
        "regroup",
        "outer",
        "unfolding",
        "vectorised",
        "layers",
    },
    {
        "quantity",
        "quantities",
        "data_parallel",
        "diag_hessian",
        "kfra",
        "averaged_curvature",
        "through_call",
        "hessian_columns",
        "signed_diagonal",
        "single_use",
        "reductions",
        "rotation",
        "factors",
        "kron",
        "kronecker_product",
        "eigenform",
        "statistics",
        "linalg",
        "operators",
        "quadratic",
        "bias",
        "measured_bias",
        "predicted_bias",
        "cross_fit",
        "shrunk_curvature",
    },
    {
        "posteriors",
        "gp",
        "optim",
        "noise",
        "logging",
        "report",
        "inspection",
        "training_run",
        "studies",
        "cli",
        "__main__",
    },
]
KNOWN = set().union(*FLOORS, {"problems"})
FLOOR_NAMES = ["ground", "engine", "middle", "roof"]
GROUND, ROOF = 0, len(FLOORS) - 1
HOMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
MAX_LINES = 400

MODULES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> tuple[str, ...]:
    """`src/paraboloid/linalg/cg.py` -> ("linalg", "cg"); a package's `__init__.py` is the package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> list[tuple[int, str]]:
    """(line, first name below `paraboloid`) of every import of the package in this file, wherever it stands."""
    here = dotted(path)
    package = here if path.name == "__init__.py" else here[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                base = ("paraboloid", *package[: len(package) - node.level + 1], *base)
            # `from paraboloid import tape` names the module last; `from paraboloid.tape import Tape` does not.
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found += [(node.lineno, target[1]) for target in targets if target[0] == "paraboloid" and len(target) > 1]
    return found


def floor_of(name: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) if name in floor)


def allowed(importer: str, target: str) -> bool:
    if importer == target:
        return True
    if importer == "problems":
        return floor_of(target) == GROUND
    if target == "problems":
        return floor_of(importer) == ROOF
    return floor_of(target) <= floor_of(importer)


def place(name: str) -> str:
    return "beside" if name == "problems" else FLOOR_NAMES[floor_of(name)]


def test_every_module_has_a_floor():
    homeless = sorted({dotted(path)[0] for path in MODULES if dotted(path)} - KNOWN)
    assert not homeless, f"give these a floor in FLOORS: {homeless}"


def test_imports_point_down():
    offences = []
    for path in MODULES:
        if not dotted(path):  # paraboloid/__init__.py is the public door and names everything
            continue
        importer = dotted(path)[0]
        assert importer in KNOWN, f"give `{importer}` a floor in FLOORS"
        for line, target in imported(path):
            if target.startswith("__") and target != "__main__":  # `from paraboloid import __version__`
                continue
            if target not in KNOWN:
                offences.append(
                    f"{path.relative_to(ROOT)}:{line} imports `paraboloid.{target}` through the public door; "
                    "import it from the module that defines it"
                )
            elif not allowed(importer, target):
                offences.append(
                    f"{path.relative_to(ROOT)}:{line} ({place(importer)}) imports paraboloid.{target} ({place(target)})"
                )
    assert not offences, "imports must point down:\n" + "\n".join(offences)


@pytest.mark.parametrize(
    "importer, target, fine",
    [
        ("quantities", "tape", True),
        ("tape", "quantities", False),
        ("tape", "layers", True),
        ("problems", "data", True),
        ("problems", "statistics", False),
        ("statistics", "problems", False),
        ("cli", "problems", True),
        ("problems", "problems", True),
    ],
)
def test_the_rule_itself(importer, target, fine):
    assert allowed(importer, target) is fine


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
    module = tmp_path / "linalg" / "cg.py"
    module.parent.mkdir()
    module.write_text(
        "import torch\nimport paraboloid.cli\nfrom paraboloid import tape\nfrom paraboloid.problems.digits import mlp\n"
        "from ..outer import Outer\nfrom .. import bias\nfrom .lanczos import lanczos\n"
        "def f():\n    from ..report import page\n"
    )
    assert sorted(name for _, name in imported(module)) == sorted(
        ["cli", "tape", "problems", "outer", "bias", "linalg", "report"]
    )


def test_no_homeless_names():
    found = [str(path.relative_to(ROOT)) for path in MODULES if HOMELESS & set(dotted(path))]
    assert not found, f"a concept is a file and the file has its name; rename {found}"


def test_every_file_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = {name: lines for name, lines in lengths.items() if lines > MAX_LINES}
    assert not long, f"files above {MAX_LINES} lines; split them by concept: {long}"
