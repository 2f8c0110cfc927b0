"""Gaussian-process classification by Laplace's method: Newton steps that are regressions with noise of their own."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraboloid.gp.conditioning import condition
from paraboloid.gp.inputs import inputs_of, numbers
from paraboloid.gp.other_libraries import kernel_of
from paraboloid.gp.process import GaussianProcess
from paraboloid.gp.softmax import SoftmaxClassifier, softmax_classifier
from paraboloid.linalg.operand import check_choice, check_count

TOL = 1e-5  # of a Newton step, relative to the function
TOGETHER = {"samples": 64, "seed": 0, "features": 2048, "max_memory": None}  # options of "softmax"
MANY = 20  # real labels from which it is a mistake that all differ
LARGEST = 1e6  # noise variance of a sample whose likelihood is flat


@dataclass(frozen=True, eq=False)
class Classifier:
    """What `classify` returns.

    classes    the labels, sorted
    processes  one for two classes (of the second one), else one for each: what a latent function is given the data
    """

    classes: Tensor
    processes: list[GaussianProcess]

    def probabilities(self, x: Any) -> Tensor:
        """[M, classes]: the sigmoid of the mean over (1 + pi variance / 8)^1/2 (probit approximation); of several
        classes divided by their sum."""
        found = []
        for gp in self.processes:
            mean, variance = gp.predict(x)
            found.append(torch.sigmoid(mean / (1 + math.pi / 8 * variance).sqrt()))
        if len(found) == 1:
            return torch.stack([1 - found[0], found[0]], 1)
        together = torch.stack(found, 1)
        return together / together.sum(1, keepdim=True)

    def predict(self, x: Any) -> Tensor:
        """The most probable labels, [M]."""
        return self.classes[self.probabilities(x).argmax(1)]


def classify(
    kernel: Any, x: Any, labels: Any, max_newton: int = 50, *, likelihood: str = "sigmoid", **options: Any
) -> Classifier | SoftmaxClassifier:
    """Laplace's approximation of latent functions f ~ GP(0, kernel) behind labels, p(label | f) = sigmoid(+-f).

    Each Newton step on the log posterior is a regression: with W = p (1 - p) at the current f,

        f <- K (K + W^-1)^-1 (f + W^-1 (t - p)),   labels t in {0, 1},

    that is `condition` with targets f + W^-1 (t - p) and noise W^-1, by any of its solvers but sgd, started from the
    step before.  At the mode the same process has the approximation's variance and samples.  More than two classes: one
    against the rest, as scikit-learn does; or together with likelihood="softmax", p(label c | f) = softmax(f)_c with
    one f for each class, by conjugate gradients on all of them (`SoftmaxClassifier`).

    labels [N], integers, booleans or other numbers; options as for `condition` (with "softmax" samples, seed, features
    and max_memory).  Warns where `max_newton` steps were not enough.
    Sources: Rasmussen and Williams 2006, sections 3.4 and 3.5.
    """
    check_choice("likelihood", likelihood, ("sigmoid", "softmax"))
    x = inputs_of(x)
    labels = numbers("labels", labels).to(x.device)
    if labels.shape != (len(x),):
        raise ValueError(f"labels have shape {tuple(labels.shape)}; expected [{len(x)}]: one for each input.")
    check_count("max_newton", max_newton)
    if labels.is_complex():
        raise ValueError(f"labels have dtype {labels.dtype}; expected integers, booleans or other real numbers.")
    if labels.is_floating_point() and not bool(labels.isfinite().all()):
        raise ValueError(f"labels hold {int((~labels.isfinite()).sum())} that are not finite; expected a class for "
                         "each input.")  # fmt: skip
    classes = labels.unique()
    if len(classes) == len(x) > MANY and labels.is_floating_point():
        raise ValueError(f"every one of the {len(x)} labels is a class of its own; expected classes, not the "
                         "targets of a regression.")  # fmt: skip
    if len(classes) < 2:
        raise ValueError(f"all labels are {classes.tolist()}; expected at least two classes.")
    if likelihood == "softmax":
        if unknown := sorted(set(options) - set(TOGETHER)):
            raise ValueError(f"likelihood='softmax' takes no {', '.join(unknown)}; expected options among "
                             f"{', '.join(TOGETHER)}.")  # fmt: skip
        chosen = {**TOGETHER, **options}
        check_count("samples", chosen["samples"], least=0)
        check_count("features", chosen["features"], least=2)
        t = (labels.unsqueeze(1) == classes).to(x)
        return softmax_classifier(kernel_of(kernel), x, classes, t, max_newton, **chosen)
    if "noise_variance" in options or options.get("solver") == "sgd":
        raise ValueError("noise_variance follows from the likelihood, and differs by input, which sgd does not take; "
                         "leave both out.")  # fmt: skip
    wanted = classes[1:] if len(classes) == 2 else classes
    return Classifier(classes, [_mode(kernel, x, (labels == c).to(x), max_newton, options) for c in wanted])


def _mode(kernel: Any, x: Tensor, t: Tensor, max_newton: int, options: dict[str, Any]) -> GaussianProcess:
    f, start = torch.zeros_like(t), None
    for _ in range(max_newton):
        noise, target = _regression(f, t)
        gp = condition(kernel, x, target, noise, **{**options, "samples": 0, "start": start})
        start = gp.solved.solution.x
        before, f = f, target - noise * start[:, 0]  # K (K + noise)^-1 target
        if float((f - before).norm()) <= TOL * float(f.norm()):
            break
    else:
        moved = float((f - before).norm() / f.norm())
        warnings.warn(f"Newton's method moved the latent function by {moved:.2g} of itself in step {max_newton}; "
                      f"expected {TOL}: raise max_newton.", stacklevel=3)  # fmt: skip
    noise, target = _regression(f, t)
    return condition(kernel, x, target, noise, **options)


def _regression(f: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Noise W^-1 and targets f + W^-1 (t - p)."""
    p = torch.sigmoid(f)
    noise = (1 / (p * (1 - p)).clamp(min=1 / LARGEST)).clamp(max=LARGEST)
    return noise, f + noise * (t - p)
