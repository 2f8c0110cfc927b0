"""Draw the gallery's figures: run the code of each page as it stands, then draw what it computed.

    python docs/gallery/make.py [page ...]

A page `NAME.md` has a function `NAME` in `first_order.py` or `second_order.py`, which takes the page's variables by
name and returns a Figure; it goes to `figures/NAME.svg`.  The same code gives the same file on the same machine.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
FIGURES = HERE / "figures"

STYLE = {
    "svg.hashsalt": "paraboloid",
    "svg.fonttype": "path",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "image.interpolation": "none",  # the SVG holds the data's own pixels
    "image.cmap": "magma",
}


def main(names: list[str]) -> None:
    sys.path.insert(0, str(HERE))
    known = drawings()
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no drawing for {unknown}; expected some of {sorted(known)}")
    for name in names or known:
        save(draw(name, known[name]), FIGURES / f"{name}.svg")


def save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same for the same figure."""
    with rc_context(STYLE):
        figure.savefig(path, dpi=200, metadata={"Date": None, "Creator": None})
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text(encoding="utf-8").splitlines()))
    print(f"{path.relative_to(HERE.parents[1])}: {path.stat().st_size // 1024} KiB")


def drawings() -> dict[str, Callable[..., Figure]]:
    """Page -> the function that draws its figure."""
    import first_order
    import second_order

    return {
        name: function
        for module in (first_order, second_order)
        for name, function in vars(module).items()
        if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
    }


def draw(name: str, function: Callable[..., Figure]) -> Figure:
    variables = run(HERE / f"{name}.md")
    arguments = {key: variables[key] for key in inspect.signature(function).parameters}
    with rc_context(STYLE):
        return function(**arguments)


def run(page: Path) -> dict[str, object]:
    """The variables after the page's Python blocks have run, top to bottom."""
    variables: dict[str, object] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
            exec(compile(block, str(page), "exec"), variables)
    return variables


if __name__ == "__main__":
    torch.set_num_threads(1)  # sums in the same order everywhere
    main(sys.argv[1:])
