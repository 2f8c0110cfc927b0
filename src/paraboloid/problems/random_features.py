"""A linear classifier on frozen random features, with labels from a random teacher.

The model of the gradient-variance study of Faghri et al. 2020, arXiv:2007.04532.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paraboloid.problems.problem import Problem, Training


def random_features(
    seed: int = 0,
    samples: int = 1000,
    inputs: int = 100,
    teacher: int = 100,
    hidden: int = 1000,
    duplicated: float = 0.0,
    originals: int = 5,
) -> Problem:
    """ReLU features of Gaussian inputs, two classes; only the layer on top is trained.

    x ~ N(0, I) in `inputs` dimensions; the label is the sign of v . ReLU(W x) minus its mean over x,
    with `teacher` rows of W of unit norm and v ~ N(0, I). The student's first layer has `hidden` rows of unit norm and
    is frozen. The last `duplicated` share of the training set are copies of its first `originals` samples, in turn.
    Tests on as many samples, without copies.
    """
    copies = round(duplicated * samples)
    if not 0 <= copies <= samples - originals or originals < 1:
        raise ValueError(
            f"duplicated={duplicated} of {samples} samples leaves {samples - copies}, of which originals={originals} "
            f"are to be copied; expected duplicated between 0 and {1 - originals / samples:.4g} and at least 1 "
            "original."
        )
    rng = np.random.default_rng(seed)
    rows, direction = _unit_rows(rng, teacher, inputs), rng.standard_normal(teacher)
    x, x_test = rng.standard_normal((samples, inputs)), rng.standard_normal((samples, inputs))
    logit, logit_test = (np.maximum(each @ rows.T, 0) @ direction for each in (x, x_test))
    y, y_test = ((each > logit.mean()).astype(np.int64) for each in (logit, logit_test))
    for each in (x, y):
        each[samples - copies :] = each[np.arange(copies) % originals]

    frozen = nn.Linear(inputs, hidden, bias=False).requires_grad_(False)
    frozen.weight.copy_(_tensor(_unit_rows(rng, hidden, inputs)))
    return Problem(
        nn.Sequential(OrderedDict[str, nn.Module](features=frozen, relu=nn.ReLU(), output=nn.Linear(hidden, 2))),
        nn.CrossEntropyLoss(),
        TensorDataset(_tensor(x), torch.from_numpy(y)),
        TensorDataset(_tensor(x_test), torch.from_numpy(y_test)),
        title="Random features",
        description=(
            f"{samples:,} Gaussian inputs in {inputs} dimensions, labelled by a random teacher; a linear classifier on "
            f"{hidden:,} frozen ReLU features"
            + (f"; {copies:,} of the samples are copies of {originals} others." if copies else ".")
        ),
        training=Training("sgd", lr=0.01, batch_size=10, steps=5000, weight_decay=1e-4),
    )


def _unit_rows(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    w = rng.standard_normal((rows, columns))
    return w / np.linalg.norm(w, axis=1, keepdims=True)


def _tensor(a: np.ndarray) -> Tensor:
    return torch.from_numpy(a.astype(np.float32))
