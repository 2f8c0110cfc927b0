"""The frame of studies: names, the command line, and what is written."""

import json

import pytest
from click.testing import CliRunner

from paraboloid import cli
from paraboloid.jobs import studies
from paraboloid.jobs.studies import debiasing


def test_every_study_has_what_the_frame_needs():
    for name in studies.STUDIES:
        study = studies.load(name)
        assert study.TITLE
        assert study.__doc__
        for function in ("plan", "measure", "findings", "sections"):
            assert callable(getattr(study, function)), name


def test_an_unknown_name():
    with pytest.raises(
        ValueError,
        match=r"unknown study 'debias'. Did you mean 'debiasing'\? Expected one of backpack, debiasing, gp, gradient-variance",
    ):
        studies.load("debias")
    result = CliRunner().invoke(cli.main, ["reproduce", "debias"])
    assert result.exit_code == 1
    assert "unknown study 'debias'" in result.output


def test_without_a_name_the_studies_are_listed():
    result = CliRunner().invoke(cli.main, ["reproduce"])
    assert result.exit_code == 0
    for name in studies.STUDIES:
        assert name in result.output


def test_the_command_writes_a_page_and_a_record(tmp_path, monkeypatch):
    entry = {"value": 1.5, "standard_error": 0.1}
    asked = []

    def measure(plan, seed, progress):
        asked.append((plan, seed))
        progress("table", 1, 1)
        return {"rows": [entry]}

    for name, new in (("measure", measure), ("findings", lambda results: ["Found <it>.", "And that."]),
                      ("sections", lambda results: [])):  # fmt: skip
        monkeypatch.setattr(debiasing, name, new)
    result = CliRunner().invoke(
        cli.main, ["reproduce", "debiasing", "--out", str(tmp_path / "r"), "--seed", "3", "--full"]
    )
    assert result.exit_code == 0, result.output
    assert asked == [(debiasing.Plan.full(), 3)]
    assert "And that." in result.output
    record = json.loads((tmp_path / "r" / "report.json").read_text())
    assert record["command"] == "paraboloid reproduce debiasing --seed 3 --full"
    assert (record["study"], record["full"], record["results"]) == ("debiasing", True, {"rows": [entry]})
    page = (tmp_path / "r" / "report.html").read_text()
    assert "<h1>Found &lt;it&gt;.</h1>" in page
    assert "paraboloid reproduce debiasing --seed 3 --full" in page
