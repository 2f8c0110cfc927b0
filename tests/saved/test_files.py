"""What an earlier build saved is loaded, and answers as it did then; see `make.py`."""

from functools import lru_cache
from pathlib import Path

import pytest
from saved import clusterings, files, operators, optimisers, posteriors, runs
from saved.comparing import check_close, tolerances

import paraboloid as pb

HERE = Path(__file__).parent
FOLDERS = sorted(path.name for path in HERE.iterdir() if (path / "operators.pt.xz").exists())
read = lru_cache(lambda place: files.read(HERE / place))


def cases(table):
    """(folder, name) of every case; one whose file an old build could not write is left out below."""
    return pytest.mark.parametrize("version, name", [(version, name) for version in FOLDERS for name in table])


def kept(place, name):
    found = read(place)
    if name not in found:
        pytest.skip(f"{place} is older than this case")
    return files.loaded(files.saved(found[name]))  # tensors of its own


def test_there_are_files():
    assert "0.1.0.dev0" in FOLDERS


@cases(posteriors.CASES)
def test_a_posterior_answers_as_when_it_was_saved(version, name, tmp_path):
    expected = kept(f"{version}/posteriors/answers.pt.xz", name)
    path = tmp_path / "posterior.pt"
    path.write_bytes(files.unpacked(HERE / version / "posteriors" / f"{name}.pt.xz"))
    s = posteriors.setting_of(name)
    check_close(posteriors.answers(name, pb.load_posterior(path, s.model, s.loss_fn)), expected, tolerances(name))


@cases(operators.CASES)
def test_an_operator_answers_as_when_it_was_saved(version, name):
    expected = kept(f"{version}/operators.pt.xz", name)
    loaded = pb.operators.load(expected["state"], operators.setting_of(name).model)
    operators.check_answers(name, loaded, expected["answers"], tolerances(name))


@cases([name for name in operators.CASES if name in ("KFAC", "EKFAC of few samples", "blocks of layers", "low rank")])
def test_an_operator_becomes_the_saved_one(version, name):
    expected = kept(f"{version}/operators.pt.xz", name)
    found = operators.make(name)
    found.load_state_dict(expected["state"])
    operators.check_answers(name, found, expected["answers"], tolerances(name))


@cases(optimisers.CASES)
def test_an_optimiser_goes_on_as_when_it_was_saved(version, name):
    expected = kept(f"{version}/optimisers.pt.xz", name)
    s, opt = optimisers.resumed(name, expected["state"], expected["parameters"])
    assert opt.diagnostics()["steps"] == optimisers.BEFORE
    check_close(optimisers.steps(s, opt, optimisers.BEFORE, optimisers.AFTER), expected["after"], tolerances(name))


@cases(clusterings.CLUSTERINGS)
def test_a_clustering_goes_on_as_when_it_was_saved(version, name):
    expected = kept(f"{version}/clusterings.pt.xz", "clusterings")[name]
    clusters = clusterings.clustering(name)
    clusters.load_state_dict(expected["state"])
    check_close(clusterings.go_on(clusters), expected["after"], tolerances(name))


@cases(clusterings.SAMPLERS)
def test_a_sampler_goes_on_as_when_it_was_saved(version, name):
    expected = kept(f"{version}/clusterings.pt.xz", "samplers")[name]
    sampler = clusterings.sampler(name, seed=77)
    sampler.load_state_dict(expected["state"])
    check_close(clusterings.batches(sampler), expected["after"], tolerances(name))


@cases(runs.CASES)
def test_a_training_run_goes_on_as_when_it_was_saved(version, name, tmp_path):
    expected = kept(f"{version}/runs.pt.xz", name)
    (tmp_path / runs.CHECKPOINT).write_bytes(expected["checkpoint"])
    check_close(runs.go_on(name, tmp_path), expected["after"], tolerances(name, single=1e-4))
