"""The command line as a user meets it: a report at the end, or one clear line."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

import paraboloid
from paraboloid import cli
from paraboloid.report import from_json

PROBLEMS = """
import time
import torch
from torch import nn
from paraboloid.problems import Problem, Training

SETTINGS = Training("sgd", lr=0.1, batch_size=8, epochs=2)

def data(samples=40):
    x = torch.randn(samples, 3, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] > 0).long()

def made(model=None, loss=None, train=None, training=SETTINGS):
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return Problem(model, loss or nn.CrossEntropyLoss(), train or data(), data(), training=training)

def good():
    return made()

def fails():
    raise KeyError("weights.pt\\nsecond line")

def returns_nothing():
    pass

def empty():
    return made(train=data(0))

def lengths_differ():
    x, y = data()
    return made(train=(x, y[:-1]))

class Ragged:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return torch.zeros(3 if i % 2 else 4), 0

def ragged():
    return made(train=Ragged())

def targets_out_of_range():
    x, y = data()
    return made(train=(x, y + 1))

def nan_input():
    x, y = data()
    x[7, 1] = float("nan")
    return made(train=(x, y))

def diverges():
    x, _ = data()
    line = x, x[:, :1] * 1e18
    training = Training("sgd", lr=1e10, batch_size=8, epochs=20)
    return Problem(nn.Linear(3, 1), nn.MSELoss(), line, line, training=training)

def no_parameters():
    return made(model=nn.Flatten())

def frozen():
    return made(model=nn.Linear(3, 2).requires_grad_(False))

class With(nn.Module):
    def __init__(self, parameter):
        super().__init__()
        self.linear, self.odd = nn.Linear(3, 2), parameter
    def forward(self, x):
        return self.linear(x)

def complex_parameter():
    return made(model=With(nn.Parameter(torch.zeros(2, dtype=torch.complex64))))

def integer_parameter():
    return made(model=With(nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)))

def mixed_devices():
    return made(model=With(nn.Parameter(torch.zeros(2, device="meta"))))

class Coupled(With):
    def __init__(self):
        super().__init__(None)
        self.norm = nn.BatchNorm1d(2, track_running_stats=False)
    def forward(self, x):
        return self.norm(self.linear(x))

def batch_norm_in_training_mode():
    return made(model=Coupled())

def batch_norm():
    return made(model=nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))

def wrong_shapes():
    return made(model=nn.Linear(5, 2))

def too_few():
    return made(train=data(9))

class Slow(With):
    def __init__(self):
        super().__init__(None)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 5:
            print("started", flush=True)
            while True:  # a signal that comes before one sleep is noticed after it
                time.sleep(0.01)
        return self.linear(x)

def slow():
    return made(model=Slow())
"""

QUICK = ["--quick", "--batch-sizes", "4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A user's folder with `nets.py` in it, as the current directory."""
    (tmp_path / "nets.py").write_text(PROBLEMS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)
    sys.modules.pop("nets", None)


def run(*arguments):
    return CliRunner().invoke(cli.main, list(arguments), prog_name="paraboloid")


def test_inspect_writes_the_report_and_prints_its_path_and_the_reading(here):
    result = run("inspect", "nets:good", "--out", "out", *QUICK)
    assert result.exit_code == 0, result.output
    record = from_json((here / "out" / "report.json").read_text(encoding="utf-8"))
    page = (here / "out" / "report.html").read_text(encoding="utf-8")
    lines = result.stdout.split("\n")
    assert lines[-2] == str(here / "out" / "report.html")
    for sentence in record["bias"]["reading"]:
        assert sentence in result.stdout
    assert record["bias"]["reading"][0] in page
    assert record["problem"]["name"] == "nets:good"
    assert record["problem"]["command"] == "paraboloid inspect nets:good --seed 0 --quick --batch-sizes 4"
    assert sorted(path.name for path in (here / "out").iterdir()) == ["report.html", "report.json"]
    assert result.stderr == "", "no progress where there is no terminal"


def test_a_second_run_replaces_the_report_and_quiet_prints_the_path_only(here):
    (here / "report").mkdir()
    (here / "report" / "report.html").write_text("old")
    result = run("inspect", "nets:batch_norm", "--quiet", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{here / 'report' / 'report.html'}\n"
    assert (here / "report" / "report.html").read_text().startswith("<!doctype html>")


def test_a_terminal_sees_one_bar_for_each_stage(here, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(cli, "Console", lambda stderr: Console(file=screen, force_terminal=True, width=100))
    result = run("inspect", "nets:good", *QUICK)
    assert result.exit_code == 0, result.output
    for stage in ("training", "noise", "curvature", "bias"):
        assert stage in screen.getvalue()
    assert screen.getvalue().count("100%") >= 4


BAD = {
    "digits-cn": "unknown problem 'digits-cn'. Did you mean 'digits-cnn'",
    "nowhere:good": "neither in",
    "nets:goood": "has no 'goood'. Did you mean 'good'",
    "nets": "unknown problem 'nets'",
    "nets:fails": "its factory raised KeyError: 'weights.pt",
    "nets:returns_nothing": "returned a NoneType",
    "nets:empty": "the train data is empty",
    "nets:lengths_differ": "the same number of samples",
    "nets:ragged": "",
    "nets:targets_out_of_range": "target 2 at index",
    "nets:nan_input": "nan",
    "nets:diverges": "expected a finite number. Lower the learning rate",
    "nets:no_parameters": "has no parameter with requires_grad=True",
    "nets:frozen": "has no parameter with requires_grad=True",
    "nets:complex_parameter": "parameter 'odd' has dtype torch.complex64",
    "nets:integer_parameter": "parameter 'odd' has dtype torch.int64",
    "nets:mixed_devices": "several devices",
    "nets:batch_norm_in_training_mode": "BatchNorm",
    "nets:wrong_shapes": "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    "nets:too_few": "9 training samples are too few",
}


@pytest.mark.parametrize("problem, words", BAD.items(), ids=BAD)
def test_bad_input_is_one_clear_line_and_nothing_is_written(here, problem, words):
    sizes = ["--batch-sizes", "8"] if problem == "nets:too_few" else ["--batch-sizes", "4"]
    result = run("inspect", problem, "--out", "new/deep", "--quick", *sizes)
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert words in line, line
    assert len(line) < 500
    assert "Traceback" not in line
    assert not (here / "new").exists()


def test_an_error_leaves_the_older_report(here):
    (here / "out").mkdir()
    (here / "out" / "report.html").write_text("old")
    assert run("inspect", "nets:nan_input", "--out", "out", *QUICK).exit_code == 1
    assert [path.name for path in (here / "out").iterdir()] == ["report.html"]
    assert (here / "out" / "report.html").read_text() == "old"


@pytest.mark.parametrize("out", ["nets.py", "nets.py/below", "/proc/nowhere"])
def test_an_output_directory_that_cannot_be_written_is_said_before_the_training(here, out, monkeypatch):
    monkeypatch.setattr("paraboloid.problems.load", lambda *_, **__: pytest.fail("loaded"))
    result = run("inspect", "nets:good", "--out", out)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: the output directory ")


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_the_traceback(here, how, monkeypatch):
    if how == "variable":
        monkeypatch.setenv(cli.DEBUG, "1")
    result = run("inspect", "nets:fails", *QUICK, *(["--debug"] if how == "flag" else []))
    assert isinstance(result.exception, ValueError)
    assert isinstance(result.exception.__cause__, KeyError)


@pytest.mark.parametrize("stage", ["paraboloid.jobs.inspection.inspect", "paraboloid.report.render", "os.fsync"])
def test_ctrl_c_in_any_stage_leaves_no_partial_report(here, stage, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / "report.json").write_text("old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, interrupted)
    result = run("inspect", "nets:good", "--out", "out", *QUICK)
    assert result.exit_code == cli.INTERRUPTED
    assert result.stderr.strip() == "Interrupted: no report was written."
    assert [path.name for path in (here / "out").iterdir()] == ["report.json"]
    assert (here / "out" / "report.json").read_text() == "old"


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_real_ctrl_c(here):
    # A shell's background jobs ignore Ctrl-C, and so do their children unless they say otherwise.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from paraboloid.cli import main; main()"
    command = [sys.executable, "-c", code, "inspect", "nets:slow", "--out", "out", *QUICK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line == "started\n", (line, *process.communicate())
            process.send_signal(signal.SIGINT)
            _, error = process.communicate()
        finally:
            process.kill()
    assert process.returncode == cli.INTERRUPTED
    assert error.strip() == "Interrupted: no report was written."
    assert not (here / "out").exists()


@pytest.mark.parametrize("sizes", ["0", "8,-1", "many", ""])
def test_batch_sizes_must_be_positive_integers(sizes):
    result = run("inspect", "digits-cnn", "--batch-sizes", sizes)
    assert result.exit_code == 2
    assert "is not a list of positive integers such as 32,128." in result.stderr


def test_small_models_take_one_thread_unless_told_otherwise(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cli._choose_threads(torch.nn.Linear(500, 500))
    assert asked == []
    cli._choose_threads(torch.nn.Linear(4, 4))
    assert asked == [1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    cli._choose_threads(torch.nn.Linear(4, 4))
    assert asked == [1]


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert paraboloid.__version__ in result.stdout


def test_problems_are_listed():
    result = run("problems")
    assert result.exit_code == 0
    for name in ("digits-cnn", "digits-mlp", "curves-autoencoder", "sequence-transformer"):
        assert name in result.stdout


def test_python_m_paraboloid():
    done = subprocess.run([sys.executable, "-m", "paraboloid", "--help"], capture_output=True, text=True, check=True)
    assert "Usage: paraboloid" in done.stdout
    assert "inspect" in done.stdout


def test_the_record_is_strict_json(here):
    assert run("inspect", "nets:good", "--out", "out", *QUICK).exit_code == 0

    def refuse(constant):
        raise AssertionError(constant)

    record = json.loads((here / "out" / "report.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert list(record) == ["problem", "training", "noise", "curvature", "bias"]


def test_the_noise_alone(here):
    result = run("noise", "nets:good", "--out", "out", "--quick", "--draws", "2")
    assert result.exit_code == 0
    assert "times as much noise as signal" in result.stdout
    record = json.loads((here / "out" / "report.json").read_text(encoding="utf-8"))
    assert list(record) == ["problem", "training", "noise"]
    assert record["problem"]["command"].startswith("paraboloid noise nets:good")
    assert "<h1>" in (here / "out" / "report.html").read_text(encoding="utf-8")


def test_errors_of_noise_are_one_line(here):
    result = run("noise", "nets:nothing", "--out", "out")
    assert result.exit_code == 1 and result.stderr.strip().count("\n") == 0
