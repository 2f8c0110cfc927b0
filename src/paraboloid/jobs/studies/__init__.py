"""Studies: experiments that are run again by `paraboloid reproduce NAME`, with a page and a record at the end.

A study is a module or package here, named in `STUDIES`, with

    TITLE                                      of the page
    plan(full)                                 how much is run: any object; with `keep`, a file's name or None, where
                                               finished pieces are kept in such a file
    with_data(plan, folder)                    the plan on image data of the user's; only where there is such a thing
    measure(plan, seed, progress)              the results, as plain data; progress(part, done, total)
    findings(results)                          sentences, the most important first, negative ones as plainly as positive
    sections(results)                          of the page, `paraboloid.report.section.Section`
    __doc__                                    what it is; its first line is shown in the list
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import platform
import time
from dataclasses import replace
from typing import Any

import torch

from paraboloid import __version__
from paraboloid.report import plain, render_study
from paraboloid.report import strict_json as to_json

__all__ = ["STUDIES", "load", "page", "reproduce", "to_json"]

STUDIES = {
    "backpack": "paraboloid.jobs.studies.backpack",
    "debiasing": "paraboloid.jobs.studies.debiasing",
    "gp": "paraboloid.jobs.studies.gp",
    "gradient-variance": "paraboloid.jobs.studies.gradient_variance",
    "linearised-laplace": "paraboloid.jobs.studies.linearised_laplace",
    "quasi-newton": "paraboloid.jobs.studies.quasi_newton",
    "tomography": "paraboloid.jobs.studies.tomography",
}


def load(name: str) -> Any:
    """The study's module; ValueError for an unknown name."""
    if name not in STUDIES:
        close = difflib.get_close_matches(name, STUDIES, n=2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"unknown study {name!r}.{hint} Expected one of {', '.join(STUDIES)}.")
    return importlib.import_module(STUDIES[name])


def keeps(name: str) -> bool:
    """Whether a study keeps what was finished, and goes on from it."""
    return hasattr(load(name).plan(False), "keep")


def reproduce(
    name: str, full: bool = False, seed: int = 0, progress: Any = None, plan: Any = None, data: str | None = None,
    keep: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a study: a record of plain data, with its findings in words.

    data   folder with files of MNIST, CIFAR or ImageNet, for a study that has a `with_data(plan, folder)`; ValueError
           for others
    keep   file of finished trainings, for a study whose plan has such a file: those in it are not run again
    """
    study, start = load(name), time.perf_counter()
    plan = study.plan(full) if plan is None else plan
    if data is not None:
        if not hasattr(study, "with_data"):
            raise ValueError(f"the study {name!r} takes no data of your own (--data {data}).")
        plan = study.with_data(plan, data)
    if keep is not None and keeps(name):
        plan = replace(plan, keep=keep)
    results = study.measure(plan, seed, progress)
    return plain({
        "study": name,
        "full": full,
        "seed": seed,
        "command": " ".join(
            [f"paraboloid reproduce {name} --seed {seed}", *["--full"] * full, *([f"--data {data}"] if data else [])]
        ),
        "versions": {"paraboloid": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
        "findings": study.findings(results),
        "results": results,
    })  # fmt: skip


def page(record: dict[str, Any]) -> str:
    """The HTML page of a record that `reproduce` made."""
    study = load(record["study"])
    about = " ".join((inspect.getdoc(study) or "").split())
    return render_study(study.TITLE, about, record, study.sections(record["results"]))
