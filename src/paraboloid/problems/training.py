"""Train a problem's model in place, and note how its losses move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Chunks, Samples, call, sample_count, take
from paraboloid.passes import trees
from paraboloid.passes.random_state import seeded
from paraboloid.problems.problem import Problem, Training, loss_of

CurvePoint = dict[str, Any]
Callback = Callable[[int, nn.Module, CurvePoint], None]

CHUNK = 1024  # samples per forward pass of an evaluation


def train(
    problem: Problem,
    seed: int = 0,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    evaluations: int | None = None,
    callback: Callback | None = None,
) -> list[CurvePoint]:
    """Minimise the training loss as `problem.training` says; returns the curve, first point before the first step.

    A point is ``{"step", "epoch", "train_loss", "test_loss", "test_accuracy"}``: losses over the whole sets in
    evaluation mode, without the weight decay's part; the accuracy is None where there are no classes. One is taken at
    the start, and then at `evaluations` evenly spaced steps (default: two per epoch, but 10 to 30). Each is handed to
    ``callback(step, model, point)``, with the model in evaluation mode, where it also is in the end. Each epoch runs
    through a fresh permutation drawn from `seed`. Raises ValueError where the data does not fit the loss, and
    FloatingPointError for a loss that is NaN or infinite.
    """
    settings, model, loss_fn = problem.training, problem.model, problem.loss_fn
    parameters = list(trees.parameters(model).values())
    device = parameters[0].device
    total = step_count(problem, epochs=epochs, steps=steps)
    optimizer = _optimizer(settings, parameters)
    batches = _batches(sample_count(problem.train), settings.batch_size, torch.Generator().manual_seed(seed))
    per_epoch = _steps_per_epoch(len(problem.train), settings.batch_size)
    # An evaluation costs about a third of an epoch, so few epochs get few of them.
    count = min(30, max(10, 2 * total // per_epoch)) if evaluations is None else max(1, evaluations)
    moments = {round(total * i / count) for i in range(count + 1)}

    curve: list[CurvePoint] = []
    with seeded(seed):
        try:
            for step in range(total + 1):
                if step in moments:
                    point = {"step": step, "epoch": step / per_epoch, **_evaluate_both(problem, step)}
                    curve.append(point)
                    if callback is not None:
                        callback(step, model, point)
                if step == total:
                    break
                model.train()
                inputs, targets = take(problem.train, next(batches), device)
                loss = loss_fn(call(model, inputs), targets)
                _check_finite("loss of a training batch", loss.item(), step, settings)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        finally:
            optimizer.zero_grad()
            model.eval()
    return curve


def step_count(problem: Problem, *, epochs: int | None = None, steps: int | None = None) -> int:
    """Number of steps that `train` takes with the same arguments."""
    if epochs is not None and steps is not None:
        raise ValueError(f"both epochs ({epochs}) and steps ({steps}) are given; expected one of them.")
    for name, value in (("epochs", epochs), ("steps", steps)):
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}; expected at least 0.")
    settings = problem.training
    if steps is None and epochs is None:
        steps, epochs = settings.steps, settings.epochs
    if steps is not None:
        return steps
    assert epochs is not None
    return epochs * _steps_per_epoch(len(problem.train), settings.batch_size)


@torch.no_grad()
def evaluate(problem: Problem, dataset: Samples) -> tuple[float, float | None]:
    """The loss over a whole dataset, as one batch would have it, and the share of right classes, or None.

    Runs the model in the mode it is in. Raises ValueError where outputs and targets do not fit the loss.
    """
    loss = loss_of(problem.loss_fn)
    device = next(iter(trees.parameters(problem.model).values())).device
    total, weight, right, counted = 0.0, 0.0, 0, 0
    seen: list[Tensor] = []
    for inputs, y in Chunks(dataset, CHUNK, device):
        f = call(problem.model, inputs)
        seen.append(y)
        if loss is not None:
            _check(loss, f, seen)
        share = float(len(f)) if loss is None else loss.normalizer(f, y)
        total += problem.loss_fn(f, y).item() * share
        weight += share
        if _has_classes(problem, f, y):
            counted_here = y != getattr(loss, "ignore_index", -100)
            right += int(((f.argmax(1) == y) & counted_here).sum())
            counted += int(counted_here.sum())
    summed = loss is not None and loss.reduction == "sum"
    return total if summed else total / weight, right / counted if counted else None


def _check(loss: Any, f: Tensor, seen: list[Tensor]) -> None:
    """Check the last chunk; where it fails, check them all, so that the message counts from the first sample."""
    try:
        loss.check(f, seen[-1])
    except ValueError:
        if len(f) == len(seen[-1]):
            targets = torch.cat(seen)
            loss.check(f[:1].expand(len(targets), *f.shape[1:]), targets)
        raise


def _has_classes(problem: Problem, f: Tensor, y: Tensor) -> bool:
    indices = not y.is_floating_point() and f.dim() >= 2 and y.shape == f.shape[:1] + f.shape[2:]
    if problem.accuracy and not indices:
        raise ValueError(
            f"accuracy=True needs class indices for outputs [N, classes, ...]; found targets of shape {tuple(y.shape)} "
            f"and dtype {y.dtype} for outputs {tuple(f.shape)}."
        )
    return indices and problem.accuracy is not False


def _evaluate_both(problem: Problem, step: int) -> dict[str, float | None]:
    problem.model.eval()
    values: dict[str, tuple[float, float | None]] = {}
    for split in ("train", "test"):
        try:
            values[split] = evaluate(problem, getattr(problem, split))
        except ValueError as error:
            raise ValueError(f"the {split} data does not fit: {error}") from error
        _check_finite(f"{split} loss", values[split][0], step, problem.training)
    return {"train_loss": values["train"][0], "test_loss": values["test"][0], "test_accuracy": values["test"][1]}


def _check_finite(what: str, value: float, step: int, settings: Training) -> None:
    if value - value != 0.0:  # NaN and both infinities, but no finite number
        advice = (
            "Look for NaN or infinite values in the inputs, the targets and the initial parameters."
            if step == 0
            else f"Lower the learning rate (now {settings.lr:g} with {settings.optimizer}), or look at the data."
        )
        raise FloatingPointError(f"the {what} is {value} at step {step}; expected a finite number. {advice}")


def _optimizer(settings: Training, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def _steps_per_epoch(samples: int, batch_size: int) -> int:
    full, rest = divmod(samples, batch_size)
    return max(1, full + (rest > 1))


def _batches(samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of one batch after the other, without end.

    An epoch's last batch is smaller where `samples` is no multiple; one of a single sample is left out, because batch
    normalisation cannot be trained on it.
    """
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order.split(batch_size)[: _steps_per_epoch(samples, batch_size)]
