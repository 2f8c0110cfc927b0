"""The command line: `paraboloid inspect`, `noise`, `train`, `uncertainty`, `compare`, `reproduce`, `problems`."""

from __future__ import annotations

import importlib
import inspect as inspection_of_code
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import paraboloid

DEBUG = "PARABOLOID_DEBUG"
SMALL = 200_000  # parameters up to which more threads than one cost more than they bring
INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


TRAININGS = "trainings.jsonl"  # what a study has finished so far
OUT = click.option("--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True,
                   help="Directory of the report; made if missing, an older report in it is replaced.")  # fmt: skip
QUICK = click.option("--quick", is_flag=True, help="Train and measure less: a first look in a fraction of the time.")
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                    help="Of the initial parameters, the batches and every other random choice.")  # fmt: skip
SAMPLES = click.option("--samples", type=click.IntRange(min=2), help=(
    "Training samples to measure on, at most  [default: 2048, with --quick 1024; fewer for a large model]"
))  # fmt: skip
DATA = click.option("--data", type=click.Path(exists=True, file_okay=False), metavar="DIR",
                    help="Folder with the files of MNIST, CIFAR or ImageNet, for the problems on these.")  # fmt: skip
QUIET = click.option("--quiet", is_flag=True, help="No progress bars, and only the path of what was written.")
TRACEBACK = click.option("--debug", is_flag=True, envvar=DEBUG,
                         help=f"Show the traceback of an error (or set {DEBUG}=1).")  # fmt: skip


class BatchSizes(click.ParamType):
    """Positive integers separated by commas."""

    name = "M,M,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            sizes = tuple(int(part) for part in value.split(",")) if isinstance(value, str) else tuple(value)
        except ValueError:
            sizes = ()
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r} is not a list of positive integers such as 32,128.", param, ctx)
        return tuple(sorted(set(sizes)))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(paraboloid.__version__, prog_name="paraboloid")
def main() -> None:
    """Local quadratic models of deep-learning losses from mini-batches."""


@main.command()
@click.argument("problem", default="digits-cnn")
@OUT
@QUICK
@SEED
@click.option("--batch-sizes", type=BatchSizes(), help=(
    "Batch sizes whose bias is measured, that of the training added  [default: 32,64,128,256,512; with --quick 32,256]"
))  # fmt: skip
@SAMPLES
@click.option("--curvature", type=click.Choice(["ggn", "hessian", "kfac", "ekfac"]), default="ggn", show_default=True,
              help="The matrix of the curvature section.")  # fmt: skip
@DATA
@QUIET
@TRACEBACK
def inspect(problem: str, **options: Any) -> None:
    """Train PROBLEM, measure it, and write report.html and report.json.

    PROBLEM is a built-in name (see `paraboloid problems`; digits-cnn by default) or module:factory, a function of your
    own that returns a pb.Problem(model, loss_fn, train, test).
    """
    _report(problem, "bias", **options)


@main.command()
@click.argument("problem", default="digits-cnn")
@OUT
@QUICK
@SEED
@SAMPLES
@click.option("--draws", type=click.IntRange(min=2), help="Of each estimator at each checkpoint  [default: 20, or 10].")
@DATA
@QUIET
@TRACEBACK
def noise(problem: str, **options: Any) -> None:
    """Train PROBLEM and measure its gradient noise alone.

    Noise against signal by layer, estimators of the gradient by their variance, and gradient clusters with their most
    and least typical samples, in report.html and report.json.
    """
    _report(problem, "noise", **options)


def _report(
    problem: str, main_section: str, *, out: Path, quick: bool, seed: int, samples: int | None, data: str | None,
    quiet: bool, debug: bool, **changes: Any,
) -> None:  # fmt: skip
    """Inspect a problem, the whole of it or its noise; `changes` of the plan that are None are none."""
    with _one_line_errors(debug):
        # Imported here, so that --help and --version do not wait for Matplotlib and scikit-learn.
        from paraboloid import problems, report
        from paraboloid.jobs import inspection

        report.check_writable(out)
        changes = {name: value for name, value in changes.items() if value is not None}
        if samples is not None:
            changes |= {"samples": samples, "budget": None}
        plan = inspection.Plan.quick(**changes) if quick else inspection.Plan(**changes)
        loaded = problems.load(problem, seed=seed, short=quick, **({} if data is None else {"data": data}))
        _choose_threads(loaded.model)
        stages = inspection.NOISE_ONLY if main_section == "noise" else inspection.STAGES
        with _bars(quiet) as progress:
            record = inspection.inspect(loaded, plan, seed=seed, progress=progress, stages=stages)
        report.write({"report.json": report.to_json(record), "report.html": report.render(record)}, out)
    if not quiet:
        click.echo("\n" + "\n".join(record[main_section]["reading"]))
        for note in record["problem"]["notes"]:
            click.echo(f"Note: {note}", err=True)
        click.echo()
    click.echo(str((out / "report.html").resolve()))


@main.command()
@click.argument("problem", default="digits-mlp")
@click.option("--optimizer", default="adam", show_default=True,
              help="sgd, adam, adamw, kfac, ekfac, diag-ggn, kbfgs, kbfgsl, polar or hessian-free.")  # fmt: skip
@click.option("--sampler", default="uniform", show_default=True,
              help="uniform, or gc: one sample of each gradient cluster, with loss weights.")  # fmt: skip
@click.option("--lr", type=float, help="Learning rate  [default: the problem's, or the optimizer's].")
@click.option("--damping", type=float, help="Of second-order optimizers.")
@click.option("--momentum", type=float, help="Of sgd and second-order optimizers.")
@click.option("--weight-decay", type=float, help="[default: the problem's]")
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Of gc: the number of clusters  [default: the problem's; 10]."
)
@click.option(
    "--recluster", type=click.IntRange(min=1), default=200, show_default=True, help="Steps between clusterings."
)
@click.option("--epochs", type=click.IntRange(min=0), help="[default: the problem's]")
@SEED
@click.option("--short", is_flag=True, help="The smaller size of a generated problem.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("run"), show_default=True,
              help="Directory of report.html, record.json and checkpoint.pt.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out, exactly as if never interrupted.")
@DATA
@QUIET
@TRACEBACK
def train(out: Path, resume: bool, quiet: bool, debug: bool, **settings: Any) -> None:
    """Train PROBLEM: report.html, metrics in record.json and a checkpoint after every epoch.

    PROBLEM is a built-in name (see `paraboloid problems`) or module:factory.
    """
    with _one_line_errors(debug):
        from paraboloid.jobs.training_run import RECORD, Run, Settings

        with _bars(quiet) as progress:
            run = Run(Settings(**settings), out, progress)
            _choose_threads(run.model)
            record = run.go(resume)
        written = run.write_page()
    if not quiet:
        last = record["metrics"][-1]
        found = [f"{k.replace('_', ' ')} {last[k]:.4g}" for k in ("train_loss", "test_loss", "test_accuracy")
                 if last[k] is not None]  # fmt: skip
        click.echo(f"\nepoch {last['epoch']}: {', '.join(found)}\n")
        from paraboloid.jobs.training_page import advice

        click.echo("\n".join(advice({**record, "lr": float(run.optimizer.param_groups[0]["lr"])})) + "\n")
        click.echo(str(written.resolve()))
    click.echo(str((out / RECORD).resolve()))


@main.command()
@click.argument("problem", default="digits-cnn")
@click.option("--method", default="kron", show_default=True, help="kron, last-layer, functional or sampled.")
@OUT
@QUICK
@SEED
@click.option(
    "--samples", type=click.IntRange(min=2), help="Training samples that the posterior is fitted on, at most."
)
@DATA
@QUIET
@TRACEBACK
def uncertainty(
    problem: str, method: str, out: Path, quick: bool, seed: int, samples: int | None, data: str | None, quiet: bool,
    debug: bool,
) -> None:  # fmt: skip
    """Train PROBLEM, fit and tune a posterior, and write report.html and report.json: whether to trust its confidence.

    PROBLEM is a built-in name (see `paraboloid problems`; digits-cnn by default) or module:factory.
    """
    with _one_line_errors(debug):
        from paraboloid import problems, report
        from paraboloid.jobs import uncertainty as job
        from paraboloid.linalg.operand import check_choice

        check_choice("--method", method, list(job.METHODS))
        report.check_writable(out)
        loaded = problems.load(problem, seed=seed, short=quick, **({} if data is None else {"data": data}))
        _choose_threads(loaded.model)
        with _bars(quiet) as progress:
            record = job.uncertainty(loaded, method, seed=seed, samples=samples, quick=quick, progress=progress)
        report.write({"report.json": report.strict_json(record), "report.html": job.page(record)}, out)
    if not quiet:
        click.echo("\n" + "\n".join(record["findings"]) + "\n")
    click.echo(str((out / "report.html").resolve()))


@main.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("comparison"), show_default=True,
              help="Directory of the comparison; made if missing.")  # fmt: skip
@QUIET
@TRACEBACK
def compare(a: Path, b: Path, out: Path, quiet: bool, debug: bool) -> None:
    """Put the reports A and B side by side: settings that differ, what is told apart, curves over each other.

    A and B are folders that `inspect`, `noise`, `train` or `uncertainty` wrote with --out, or the JSON files in them.
    """
    with _one_line_errors(debug):
        from paraboloid import report
        from paraboloid.jobs import comparison

        record = comparison.compare(a, b)
        pages = {"comparison.json": report.strict_json(record), "report.html": comparison.page(record, a, b)}
        report.write(pages, out)
    if not quiet:
        click.echo("\n" + "\n".join(record["findings"]) + "\n")
    click.echo(str((out / "report.html").resolve()))


@main.command()
@click.argument("study", metavar="[NAME]", required=False)
@click.option("--full", is_flag=True, help="Run the long form, which may take hours.")
@click.option("--resume", is_flag=True, help="Go on from what an interrupted run left in --out, if a study keeps it.")
@OUT
@SEED
@DATA
@QUIET
@TRACEBACK
def reproduce(
    study: str | None, full: bool, resume: bool, out: Path, seed: int, data: str | None, quiet: bool, debug: bool
) -> None:
    """Run the study NAME, and write report.html and report.json; without a name, list the studies.

    The default takes less than fifteen minutes on two cores.
    """
    with _one_line_errors(debug):
        from paraboloid import report
        from paraboloid.jobs import studies

        if study is None:
            _list({name: importlib.import_module(path) for name, path in studies.STUDIES.items()})
            return
        studies.load(study)
        if resume and not studies.keeps(study):
            raise ValueError(f"the study {study!r} keeps nothing to go on from (--resume).")
        report.check_writable(out)
        if not resume:
            (out / TRAININGS).unlink(missing_ok=True)
        if not full:
            _one_thread()  # the default is made of small networks
        with _bars(quiet) as progress:
            record = studies.reproduce(study, full, seed, progress, data=data, keep=str(out / TRAININGS))
        report.write({"report.json": report.strict_json(record), "report.html": studies.page(record)}, out)
    if not quiet:
        click.echo("\n" + "\n".join(record["findings"]) + "\n")
    click.echo(str((out / "report.html").resolve()))


@main.command()
def problems() -> None:
    """List the built-in problems."""
    from paraboloid.problems.registry import BUILT_IN, WITH_DATA

    found = {}
    for name, path in (BUILT_IN | WITH_DATA).items():
        module, _, factory = path.partition(":")
        found[name] = getattr(importlib.import_module(module), factory)
    _list(found)


def _list(described: dict[str, Any]) -> None:
    """Names, and the first paragraph of what the docstrings say of them."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("name", no_wrap=True)
    table.add_column("what it is")
    for name, thing in described.items():
        words = inspection_of_code.getdoc(thing) or ""
        table.add_row(name, words.partition("\n\n")[0].replace("\n", " "))
    Console().print(table)


def _choose_threads(model: Any) -> None:
    """One thread for a small model, unless OMP_NUM_THREADS says how many."""
    if sum(p.numel() for p in model.parameters()) <= SMALL:
        _one_thread()


def _one_thread() -> None:
    """Unless OMP_NUM_THREADS says how many: short operations spend the others' time waiting, above all when busy."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """An error becomes one line on stderr and exit status 1, Ctrl-C exit status 130; with `debug` it is raised."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("\nInterrupted: no report was written.", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException:
        raise
    except Exception as error:
        if debug:
            raise
        raise click.ClickException(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    """The message in one line; the type stands before it where the message is not a sentence of ours."""
    message = " ".join(str(error).split())
    ours = isinstance(error, ValueError | FloatingPointError | OSError | NotImplementedError) and message
    if not ours:
        message = f"{type(error).__name__}: {message}" if message else type(error).__name__
        message += f" (--debug or {DEBUG}=1 shows the traceback)"
    return message


@contextmanager
def _bars(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One progress bar for each stage on stderr; none where that is not a terminal, or with `quiet`."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=36), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=max(1, total))
            bars.update(tasks[stage], completed=done if total else 1)

        yield progress
