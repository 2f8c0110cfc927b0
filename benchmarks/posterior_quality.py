"""python -m benchmarks.posterior_quality: how good confident predictions are on few digits, against what else there is.

400 digits to train on, 300 to test; negative log-likelihood and calibration error (15 bins) of the test images, their
accuracy, and the area under the curve by which one minus the largest probability tells each kind of unlike inputs from
test digits.  Means over seeds of split, network and noise, with standard errors.  Nothing is set by hand.  Peers that
are not installed (laplace-torch, ivon-opt, vbll) are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.peers import installed
from paraboloid import problems
from paraboloid.jobs.uncertainty.scores import area, of_classes

TRAIN, TEST, HELD_OUT, EPOCHS, BATCH, CLASSES = 400, 300, 100, 100, 50, 10
MEMBERS, MASKS, DROPOUT, SAMPLES = 5, 50, 0.2, 20
SHIFTS = ("noise", "turned 30°", "turned 90°", "shifted", "noisy", "blurred", "letters")
LETTERS = {  # 8 x 8, one row a number in base 16
    "A": "183C66667E666600", "E": "7E60607C60607E00", "F": "7E60607C60606000", "H": "6666667E66666600",
    "K": "666C7870786C6600", "M": "63777F6B63636300", "T": "7E18181818181800", "X": "66663C183C666600",
}  # fmt: skip
Pair = tuple[Tensor, Tensor]
Predict = Callable[[Tensor], Tensor]


def trained(model: nn.Module, train: Pair, loss: Callable[[Any, Tensor], Tensor] = F.cross_entropy) -> nn.Module:
    """The model after 100 epochs of Adam, in evaluation mode."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(EPOCHS):
        for i in torch.randperm(TRAIN).split(BATCH):
            optimizer.zero_grad()
            loss(model(train[0][i]), train[1][i]).backward()
            optimizer.step()
    return model.eval()


def data(net: str, seed: int) -> tuple[Pair, Pair, Pair, dict[str, Tensor]]:
    """Training, test and held-out digits, and inputs unlike them, as the network takes them."""
    torch.manual_seed(seed)
    problem = problems.load(net)
    pairs = zip(problem.train.tensors, problem.test.tensors, strict=True)  # type: ignore[attr-defined]
    x, y = (torch.cat(pair) for pair in pairs)
    order = torch.randperm(len(x))
    parts = order[: TRAIN + TEST + HELD_OUT].split([TRAIN, TEST, HELD_OUT])
    train, test, held_out = ((x[i], y[i]) for i in parts)
    return train, test, held_out, unlike(test[0])


def unlike(x: Tensor) -> dict[str, Tensor]:
    side = 16 if x.dim() == 4 else 8
    images = x.view(len(x), 1, side, side)

    def enlarged(t: Tensor) -> Tensor:
        return t if side == 8 else F.interpolate(t, size=(side, side), mode="bilinear")

    def moved(degrees: float = 0.0, across: float = 0.0) -> Tensor:
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        grid = F.affine_grid(torch.tensor([[[c, -s, across], [s, c, 0.0]]]).expand(len(x), 2, 3), images.shape,
                             align_corners=False)  # fmt: skip
        return F.grid_sample(images, grid, align_corners=False)

    glyphs = torch.tensor([[[int(b) for b in f"{int(rows[2 * i : 2 * i + 2], 16):08b}"] for i in range(8)]
                           for rows in LETTERS.values()], dtype=x.dtype).unsqueeze(1)  # fmt: skip
    drawn = glyphs[torch.randint(len(glyphs), (len(x),))] * (0.7 + 0.3 * torch.rand(len(x), 1, 8, 8))
    box = torch.ones(1, 1, 3, 3) / 9
    found = {
        "noise": enlarged(torch.rand(len(x), 1, 8, 8)), "turned 30°": moved(30), "turned 90°": moved(90),
        "shifted": moved(across=0.5), "noisy": images + 0.3 * torch.randn(images.shape),
        "blurred": F.conv2d(F.conv2d(images, box, padding=1), box, padding=1), "letters": enlarged(drawn),
    }  # fmt: skip
    return {name: t.view_as(x) for name, t in found.items()}


@torch.no_grad()
def quality(predict: Predict, test: Pair, others: dict[str, Tensor]) -> dict[str, float]:
    p = predict(test[0])
    scores = of_classes(p, test[1])
    areas = {name: area(-p.amax(1), -predict(x).amax(1)) for name, x in others.items()}
    return {**{k: scores[k] for k in ("nll", "ece", "accuracy")}, **areas}


def posteriors(model: nn.Module, train: Pair, structures: list[str]) -> dict[str, Predict]:
    """Each structure as it comes, and what the steps of that are worth: plain, with one exponent."""
    found: dict[str, Predict] = {}
    for structure in structures:
        name, _, part = structure.partition(", ")
        weights = part.replace(" ", "_") or "all"
        for way, match in (("", "auto"), (", exponent", "exponent"), (", plain", None)):
            if name == "functional" and way:
                continue
            posterior: Any = pb.laplace(model, nn.CrossEntropyLoss(), train, name, weights)
            posterior.tune_prior("evidence" if name == "functional" else None, match=match)
            found[structure + way] = posterior.predict
    return found


def null_space(model: nn.Module, train: Pair) -> Predict:
    """Variance only where the training outputs do not move (arXiv:2410.16901), and one exponent."""
    posterior: Any = pb.laplace(
        model, nn.CrossEntropyLoss(), train, "functional", curvature="jacobian", temperature=1e-4
    )
    return posterior.match_confidence().predict


def with_dropout(model: nn.Module) -> nn.Sequential:
    """Before the last layer."""
    layers = list(model.children())
    return nn.Sequential(*layers[:-1], nn.Dropout(DROPOUT), layers[-1])


def peers(net: str, model: nn.Module, train: Pair, held_out: Pair) -> dict[str, Predict]:
    """What else there is, each trained on the same digits; temperature scaling has 100 more."""
    fresh = lambda: problems.load(net, seed=int(torch.randint(10**6, ()))).model  # noqa: E731
    found = {"temperature scaling": temperature(model, held_out)}
    members = [model, *(trained(fresh(), train) for _ in range(MEMBERS - 1))]
    found[f"ensemble of {MEMBERS}"] = lambda x: torch.stack([m(x).softmax(1) for m in members]).mean(0)
    masked = trained(with_dropout(fresh()), train)

    def dropped(x: Tensor) -> Tensor:
        masked.train()
        return torch.stack([masked(x).softmax(1) for _ in range(MASKS)]).mean(0)

    found["Monte Carlo dropout"] = dropped
    if installed("ivon"):
        found["IVON"] = ivon(fresh(), train)
    if installed("vbll"):
        found["VBLL"] = vbll(fresh(), train)
    if installed("laplace"):
        for weights in ("last_layer", "all"):
            found[f"laplace-torch, kron, {weights.replace('_', ' ')}"] = laplace_torch(model, train, weights)
    return found


def temperature(model: nn.Module, held_out: Pair) -> Predict:
    with torch.no_grad():
        f = model(held_out[0])
    grid = torch.logspace(-1, 1, 200)
    best = min(grid.tolist(), key=lambda t: F.cross_entropy(f / t, held_out[1]).item())
    return lambda x: (model(x) / best).softmax(1)


def ivon(model: nn.Module, train: Pair) -> Predict:
    from ivon import IVON

    optimizer = IVON(model.parameters(), lr=0.1, ess=TRAIN, weight_decay=1e-3)
    model.train()
    for _ in range(EPOCHS):
        for i in torch.randperm(TRAIN).split(BATCH):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                F.cross_entropy(model(train[0][i]), train[1][i]).backward()
            optimizer.step()
    model.eval()

    def predict(x: Tensor) -> Tensor:
        total = torch.zeros(len(x), CLASSES)
        for _ in range(SAMPLES):
            with optimizer.sampled_params():
                total += model(x).softmax(1)
        return total / SAMPLES

    return predict


def vbll(model: nn.Module, train: Pair) -> Predict:
    import vbll as package

    layers = list(model.children())
    head = package.DiscClassification(layers[-1].in_features, CLASSES, 1 / TRAIN)
    whole = nn.Sequential(*layers[:-1], head)
    trained(whole, train, lambda out, y: out.train_loss_fn(y))
    return lambda x: whole(x).predictive.probs


def laplace_torch(model: nn.Module, train: Pair, weights: str) -> Predict:
    from laplace import Laplace
    from laplace.curvature.curvlinops import CurvlinopsGGN

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*train), BATCH)
    posterior = Laplace(copy.deepcopy(model), "classification", weights, "kron", backend=CurvlinopsGGN)
    posterior.fit(loader)
    posterior.optimize_prior_precision()
    return lambda x: posterior(x, link_approx="probit")


def row(net: str, seed: int, structures: list[str]) -> dict[str, dict[str, float]]:
    train, test, held_out, others = data(net, seed)
    model = trained(problems.load(net, seed=seed).model, train)
    methods: dict[str, Predict] = {"the network": lambda x: model(x).softmax(1)}
    methods |= posteriors(model, train, [s for s in structures if s != "null space"])
    if "null space" in structures:
        methods["null space"] = null_space(model, train)
    methods |= peers(net, model, train, held_out)
    return {name: quality(predict, test, others) for name, predict in methods.items()}


def table(runs: list[dict[str, dict[str, float]]]) -> list[str]:
    measures = ("nll", "ece", "accuracy", *SHIFTS)
    lines = ["| | " + " | ".join(measures) + " |", "|---" * (1 + len(measures)) + "|"]
    for name in runs[0]:
        cells = []
        for m in measures:
            values = [run[name][m] for run in runs]
            error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{error}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=["digits-mlp", "digits-cnn"])
    parser.add_argument("--structures", nargs="+",
                        default=["kron", "kron, last layer", "diag", "functional", "null space"])  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record, lines = {}, []
    for net in options.nets:
        runs = []
        for seed in range(options.seeds):
            runs.append(row(net, seed, options.structures))
            record[net] = runs
            text = "\n".join([*lines, f"### {net}, {len(runs)} seeds", "", *table(runs), ""])
            (options.out / "posterior-quality.json").write_text(json.dumps(record, indent=1) + "\n")
            (options.out / "posterior-quality.md").write_text(text)
        lines += [f"### {net}, {options.seeds} seeds", "", *table(runs), ""]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
