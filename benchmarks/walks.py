"""python -m benchmarks.walks: how far one walks through the package for a call, and how its files hang together.

A walk is one warm call, after three others, on Linear(4, 5)-ReLU-Linear(5, 3) with cross-entropy and 8 samples.  Files
are those of the package in which a frame was entered.  Calls are entries of frames of the package's own code, by
`sys.setprofile`: functions, lambdas and comprehensions (which Python 3.12 no longer calls), and a generator once more
each time that it is resumed.  The call of `statistics` is its model's fourth, which certifies sample independence; the
step of KFAC is on a model that has had nine calls, and certifies nothing.  With Python 3.11 the build that saved
tests/saved/0.1.0.dev0 walks through 24 files in 1,021 calls, 29 in 513, 38 in 852, and 32 in 809.

Lines are those of `wc -l`, and those that are not blank.  Two graphs of imports: of files, and of rooms, a room being a
folder or a file beside the folders.  Rooms, floors (files on the longest way down, a circle counting as one), arrows
(pairs of which one imports the other) and circles (sets that import each other), for the imports that run with a module
and for all, those inside functions and for type checkers too.  The door, `__init__.py` of the package, is left out.

Another checkout: PYTHONPATH=DIR/src python -m benchmarks.walks
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import paraboloid as pb

PACKAGE = Path(pb.__file__).parent
WARM_UPS, SETTLED = 3, 9  # calls; certified are the calls 1, 2, 4, 8, 16 of a model
Graph = dict[str, set[str]]


# --- walks -----------------------------------------------------------------------------------------------------------


def calls() -> dict[str, Callable[[], object]]:
    """What is walked through, in this order."""
    torch.manual_seed(0)
    x, y, loss_fn = torch.randn(8, 4), torch.randint(3, (8,)), nn.CrossEntropyLoss()

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))

    def statistics() -> object:
        return pb.statistics(measured, loss_fn, (x, y), ["variance", "kfac"])

    def step() -> None:
        opt.zero_grad()
        loss_fn(stepped(x), y).backward()
        opt.step()

    measured, fitted, stepped = net(), net(), net()
    posterior = pb.laplace(fitted, loss_fn, (x, y), "kron")
    for _ in range(SETTLED):
        pb.statistics(stepped, loss_fn, (x, y), ["grad"])
    opt = pb.optim.KFAC(stepped, loss_fn, lr=1e-3, factor_interval=1, inverse_interval=1)
    return {
        'statistics(["variance", "kfac"])': statistics,
        "posterior.predict, kron": lambda: posterior.predict(x),
        "laplace, kron": lambda: pb.laplace(fitted, loss_fn, (x, y), "kron"),
        "KFAC step, all due": step,
    }


def walk(call: Callable[[], object]) -> Counter[str]:
    """File -> entries of its frames in one warm call."""
    found: Counter[str] = Counter()
    inside = f"{PACKAGE}/"

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and (name := frame.f_code.co_filename).startswith(inside):
            found[name.removeprefix(inside)] += 1

    for _ in range(WARM_UPS):
        call()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


# --- lines -----------------------------------------------------------------------------------------------------------


def lines() -> dict[str, list[int]]:
    """Folder -> files in it, lines, lines that are not blank; without what is in folders inside."""
    found: dict[str, list[int]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8").splitlines()
        folder = found.setdefault(path.parent.relative_to(PACKAGE).as_posix(), [0, 0, 0])
        for i, value in enumerate((1, len(text), sum(1 for line in text if line.strip()))):
            folder[i] += value
    return found


# --- imports ---------------------------------------------------------------------------------------------------------


def name_of(path: Path) -> str:
    """`operators/ggn.py` -> "operators.ggn"; a folder's `__init__.py` is the folder, the package's own is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(tree: ast.AST, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run with the module, or all."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif everywhere or not (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
        ):
            yield from statements(node, everywhere)


def targets(node: ast.Import | ast.ImportFrom, path: Path) -> Iterator[str]:
    """What a statement imports, as dotted names: of a `from`, the name with each of its members."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    here = (PACKAGE.name, *path.relative_to(PACKAGE).parent.parts)
    base = [*here[: len(here) - node.level + 1]] if node.level else []
    base += node.module.split(".") if node.module else []
    yield from (".".join([*base, alias.name]) for alias in node.names)


def imports(everywhere: bool) -> Graph:
    """File -> files that it imports from, both as dotted names without the package's."""
    files = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph: Graph = {name: set() for name in files if name}
    for name in graph:
        tree = ast.parse(files[name].read_text(encoding="utf-8"))
        for node in statements(tree, everywhere):
            for target in targets(node, files[name]):
                first, _, rest = target.partition(".")
                if first != PACKAGE.name:
                    continue
                while rest and rest not in graph:  # a member of a file
                    rest = rest.rpartition(".")[0]
                if rest and rest != name:
                    graph[name].add(rest)
    return graph


def rooms(graph: Graph) -> Graph:
    """The same between folders, and files beside them."""
    folders = {path.relative_to(PACKAGE).parent.as_posix().replace("/", ".") for path in PACKAGE.rglob("__init__.py")}

    def room(name: str) -> str:
        return name if name in folders else name.rpartition(".")[0] or name

    found: Graph = {room(name): set() for name in graph}
    for name, below in graph.items():
        found[room(name)] |= {room(other) for other in below} - {room(name)}
    return found


def reachable(graph: Graph) -> Graph:
    found: Graph = {}
    for start in graph:
        seen, waiting = set(), [start]
        while waiting:
            waiting += (new := graph[waiting.pop()] - seen)
            seen |= new
        found[start] = seen
    return found


def shape(graph: Graph) -> dict[str, Any]:
    """Rooms, floors, arrows, and the circles as lists of their members."""
    below = reachable(graph)
    circle_of = {name: frozenset({name} | {other for other in below[name] if name in below[other]}) for name in graph}

    @cache
    def height(circle: frozenset[str]) -> int:
        lower = {circle_of[other] for name in circle for other in graph[name]} - {circle}
        return 1 + max((height(each) for each in lower), default=0)

    circles = {circle for circle in circle_of.values() if len(circle) > 1}
    return {
        "rooms": len(graph),
        "floors": max(map(height, circle_of.values())),
        "arrows": sum(map(len, graph.values())),
        "circles": sorted((sorted(circle) for circle in circles), key=len, reverse=True),
    }


# --- the page --------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: Mapping[str, list[Any]]) -> str:
    body = [head, *([name, *(f"{v:,}" for v in values)] for name, values in rows.items())]
    return "\n".join([f"| {' | '.join(body[0])} |", "|" + "---|" * len(head),
                      *(f"| {' | '.join(row)} |" for row in body[1:])])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="the files of each walk, with their calls")
    parser.add_argument("--circles", action="store_true", help="who is in each circle of files")
    parser.add_argument("--json", type=Path, help="write everything to this file too")
    options = parser.parse_args()
    walks = {name: walk(call) for name, call in calls().items()}
    folders = lines()
    total = [sum(column) for column in zip(*folders.values(), strict=True)]
    shapes = {}
    for label, everywhere in (("with a module", False), ("all", True)):
        graph = imports(everywhere)
        shapes |= {f"files, {label}": shape(graph), f"folders, {label}": shape(rooms(graph))}
    print(table(["a warm call", "files", "calls"], {k: [len(v), v.total()] for k, v in walks.items()}), end="\n\n")
    if options.files:
        for name, found in walks.items():
            print(f"{name}: {', '.join(f'{file} {n}' for file, n in found.most_common())}", end="\n\n")
    print(table(["folder", "files", "lines", "not blank"], folders | {"together": total}), end="\n\n")
    counted = {k: [s["rooms"], s["floors"], s["arrows"], len(s["circles"]), sum(map(len, s["circles"]))]
               for k, s in shapes.items()}  # fmt: skip
    print(table(["imports", "rooms", "floors", "arrows", "circles", "rooms in circles"], counted))
    if options.circles:
        for label, found in shapes.items():
            for circle in found["circles"]:
                print(f"\n{label}: {', '.join(circle)}")
    if options.json:
        record = {"walks": {k: dict(v) for k, v in walks.items()}, "lines": folders, "imports": shapes}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
