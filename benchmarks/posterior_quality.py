"""python -m benchmarks.posterior_quality: how good the predictions of Laplace posteriors are on few digits.

400 digits to train on, 300 to test, 300 images of uniform noise; negative log-likelihood and expected calibration error
(15 bins) of the test images, their accuracy, and the area under the curve by which one minus the largest probability
tells noise from digits.  Means over seeds of split, network and noise, with standard errors.  No prior is set by hand.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

import paraboloid as pb
from paraboloid import problems

TRAIN, TEST, EPOCHS, BATCH, CLASSES = 400, 300, 100, 50, 10
METHODS = ("evidence", "adapted")
MEASURES = ("nll", "ece", "accuracy", "auroc")


def trained(net: str, seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
    """(network, its training data, test data, noise)."""
    torch.manual_seed(seed)
    problem = problems.load(net)
    parts = zip(problem.train.tensors, problem.test.tensors, strict=True)  # type: ignore[attr-defined]
    x, y = (torch.cat(pair) for pair in parts)
    order, model = torch.randperm(len(x)), problem.model
    train, test = order[:TRAIN], order[TRAIN : TRAIN + TEST]
    noise = torch.rand(TEST, 1, 8, 8)
    if x.dim() == 4:
        noise = F.interpolate(noise, size=x.shape[2:], mode="bilinear")  # as the digits are enlarged
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(EPOCHS):
        for i in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[train[i]]), y[train[i]]).backward()
            optimizer.step()
    return model.eval(), (x[train], y[train]), (x[test], y[test]), noise.view(TEST, *x.shape[1:])


@torch.no_grad()
def quality(predict: Callable[[Tensor], Tensor], test: tuple[Tensor, Tensor], noise: Tensor) -> dict[str, float]:
    p, unknown, y = predict(test[0]), predict(noise), test[1]
    scores = 1 - torch.cat([p, unknown]).amax(1)
    ece = multiclass_calibration_error(p, y, CLASSES, 15)
    return {
        "nll": F.nll_loss(p.clamp(min=1e-30).log(), y).item(), "ece": ece.item(),
        "accuracy": (p.argmax(1) == y).float().mean().item(),
        "auroc": float(roc_auc_score([0] * len(p) + [1] * len(unknown), scores)),
    }  # fmt: skip


def row(net: str, seed: int, structures: list[str]) -> dict[str, dict[str, float]]:
    model, train, test, noise = trained(net, seed)
    found = {"the network": quality(lambda x: model(x).softmax(1), test, noise)}
    for structure in structures:
        name, weights = structure.split(", ") if ", " in structure else (structure, "all")
        posterior: Any = pb.laplace(model, nn.CrossEntropyLoss(), train, name, weights.replace(" ", "_"))
        for method in METHODS if name != "functional" else METHODS[:1]:
            posterior.sharpness = 1.0
            posterior.tune_prior(method)
            found[f"{structure}, {method}"] = quality(posterior.predict, test, noise)
            posterior.match_confidence()
            found[f"{structure}, {method}, matched"] = quality(posterior.predict, test, noise)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["digits-mlp", "digits-cnn"])
    parser.add_argument("--structures", nargs="+", default=["diag", "kron", "kron, last layer", "functional"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, lines = {}, []
    for net in options.nets:
        runs = [row(net, seed, options.structures) for seed in range(options.seeds)]
        record[net] = {k: {m: [run[k][m] for run in runs] for m in MEASURES} for k in runs[0]}
        lines += [f"### {net}", "", "| | " + " | ".join(MEASURES) + " |", "|---" * 5 + "|"]
        for k, values in record[net].items():
            cells = [f"{mean(v):.3f} ± {stdev(v) / len(v) ** 0.5:.3f}" for v in values.values()]
            lines.append(f"| {k} | " + " | ".join(cells) + " |")
        lines.append("")
    (options.out / "posterior-quality.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "posterior-quality.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
