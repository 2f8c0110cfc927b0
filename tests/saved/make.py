"""Write the files that every later build must load, and what today's answers after loading them.

    PYTHONPATH=BUILD/src:tests python -m saved.make

BUILD is a checkout of the build whose files they are: with its package first on the path, these modules, which use the
public API only, write a folder of the build's version.  The tests load the files of all folders.  A folder is never
written again: what a release has saved stays as it is.  A release with another format gets a folder of its own; an old
folder may lack the cases that the tables of these modules got later.

    settings.pt.xz             networks and data of all cases: what is missing is drawn, the rest is kept
    VERSION/posteriors/*.pt.xz written by `Posterior.save`; answers.pt.xz: what each answered once it was loaded
    VERSION/operators.pt.xz    name -> `state_dict()` and answers
    VERSION/optimisers.pt.xz   name -> `state_dict()` and parameters, and the parameters after each of the next steps
    VERSION/clusterings.pt.xz  name -> `state_dict()` of clusterings and samplers, and what comes next
    VERSION/runs.pt.xz         name -> checkpoint of `paraboloid train`, as bytes, and the losses after one more epoch
    monte_carlo.pt.xz          values by seed; made again (`--monte-carlo`) where a change of them is meant

Those of 0.1.0.dev0 were made with torch 2.13 on one thread of an x86 processor; float64, but for cases named float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from saved import clusterings, files, monte_carlo, operators, optimisers, posteriors, runs, settings

import paraboloid as pb

HERE = Path(__file__).parent


def through_a_file(tree: Any) -> Any:
    return files.loaded(files.saved(tree))


def write_posteriors(folder: Path) -> None:
    folder.mkdir()
    answers = {}
    with TemporaryDirectory() as beside:
        path = Path(beside) / "posterior.pt"
        for name in posteriors.CASES:
            posteriors.fit(name).save(path)
            files.pack(path.read_bytes(), folder / f"{name}.pt.xz")
            s = posteriors.setting_of(name)
            answers[name] = posteriors.answers(name, pb.load_posterior(path, s.model, s.loss_fn))
    files.write(answers, folder / "answers.pt.xz")


def write_operators(path: Path) -> None:
    found = {}
    for name in operators.CASES:
        state = through_a_file(operators.make(name).state_dict())
        loaded = pb.operators.load(state, operators.setting_of(name).model)
        found[name] = {"state": state, "answers": operators.answers(name, loaded)}
    files.write(found, path)


def write_optimisers(path: Path) -> None:
    found = {}
    for name in optimisers.CASES:
        s, opt = optimisers.begin(name)
        optimisers.steps(s, opt, 0, optimisers.BEFORE)
        state, parameters = through_a_file([opt.state_dict(), s.model.state_dict()])
        s, opt = optimisers.resumed(name, through_a_file(state), parameters)
        after = optimisers.steps(s, opt, optimisers.BEFORE, optimisers.AFTER)
        found[name] = {"state": state, "parameters": parameters, "after": after}
    files.write(found, path)


def write_clusterings(path: Path) -> None:
    found: dict[str, Any] = {"clusterings": {}, "samplers": {}}
    for name in clusterings.CLUSTERINGS:
        clusters = clusterings.clustering(name)
        clusterings.go_on(clusters)
        state = through_a_file(clusters.state_dict())
        found["clusterings"][name] = {"state": state, "after": clusterings.go_on(clusters)}
    for name in clusterings.SAMPLERS:
        sampler = clusterings.sampler(name)
        next(iter(sampler))
        state = through_a_file(sampler.state_dict())
        found["samplers"][name] = {"state": state, "after": clusterings.batches(sampler)}
    files.write(found, path)


def write_runs(path: Path) -> None:
    found = {}
    for name in runs.CASES:
        with TemporaryDirectory() as out:
            runs.begin(name, Path(out))
            checkpoint = (Path(out) / runs.CHECKPOINT).read_bytes()
            found[name] = {"checkpoint": checkpoint, "after": runs.go_on(name, Path(out))}
    files.write(found, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--monte-carlo", action="store_true", help="only monte_carlo.pt.xz, in place of the old one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"the package is {Path(pb.__file__).parent}, version {pb.__version__}")
    settings.draw()
    if not options.monte_carlo:
        folder = HERE / pb.__version__
        folder.mkdir()  # an error where it exists
        write_posteriors(folder / "posteriors")
        write_operators(folder / "operators.pt.xz")
        write_optimisers(folder / "optimisers.pt.xz")
        write_clusterings(folder / "clusterings.pt.xz")
        write_runs(folder / "runs.pt.xz")
    files.write(monte_carlo.values(), HERE / "monte_carlo.pt.xz")


if __name__ == "__main__":
    main()
