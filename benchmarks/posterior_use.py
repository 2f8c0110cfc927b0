"""python -m benchmarks.posterior_use: what a posterior is good for, against what the network alone does.

Rejection: the share of unlike inputs that are turned away where 5% of the test digits are, by each score.
Active learning: test accuracy after each round of labels that a score chose, trained afresh every time.
Deletion: how close a step by the posterior's covariance comes to the network trained without the samples.
Wrong labels: how well a score finds the training digits whose label was changed.
Digits, 64-100-10 (deletion: 64-8-10 with tanh, at an optimum with weight decay), means over seeds.  Goes on where it
was stopped.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.quality_data import Pair, network, split, trained, unlike
from benchmarks.records import Record, Row
from paraboloid.jobs.uncertainty.scores import area
from paraboloid.passes.trees import unflatten

LOSS, NET = nn.CrossEntropyLoss(), "digits-mlp"
UNLIKE = ("noise", "letters", "turned 90°", "shifted 2", "noisy 0.3")
REJECTED = 0.05
START, ADDED, ROUNDS, AL_EPOCHS = 20, 20, 9, 60
DELETED, WRONG, DECAY = 20, 20, 1e-3
Score = Callable[[Tensor], Tensor]


def entropy(p: Tensor) -> Tensor:
    return -(p * p.clamp(min=1e-12).log()).sum(1)


def fitted(model: nn.Module, data: Pair, match: str | None = "auto") -> Any:
    return pb.laplace(model, LOSS, data).tune_prior(match=match)


def scores(model: nn.Module, data: Pair) -> dict[str, Score]:
    """Of how little is known of an input, larger where less."""
    posterior, plain = fitted(model, data), fitted(model, data, None)

    def information(x: Tensor) -> Tensor:
        """Mutual information of label and weights, by draws (BALD)."""
        p = plain.functional_samples(x, 100).softmax(2)
        return entropy(p.mean(0)) - entropy(p.flatten(0, 1)).view(len(p), -1).mean(0)

    return {
        "network, largest probability": lambda x: -model(x).softmax(1).amax(1),
        "network, entropy": lambda x: entropy(model(x).softmax(1)),
        "posterior as it comes, largest probability": lambda x: -posterior.predict(x).amax(1),
        "posterior as it comes, entropy": lambda x: entropy(posterior.predict(x)),
        "unweighted variance": lambda x: posterior.unweighted.functional(x, diagonal=True)[1].mean(1),
        "plain posterior, entropy": lambda x: entropy(plain.predict(x)),
        "plain posterior, information": information,
    }


def rejection(seed: int) -> list[Row]:
    train, test, _ = split(NET, 400, seed)
    torch.manual_seed(seed)
    model = trained(network(NET, seed), train)
    others, rows = unlike(test[0], seed), []
    for name, score in scores(model, train).items():
        with torch.no_grad():
            limit = score(test[0]).quantile(1 - REJECTED)
            shares = {k: (score(others[k]) > limit).double().mean().item() for k in UNLIKE}
        rows.append({"method": name, **shares})
    return rows


def learning(seed: int) -> list[Row]:
    pool, test, _ = split(NET, 1437, seed)
    rows = []
    for name in ("random", *ACTIVE):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(pool[1]), generator=generator)[:START]
        curve = []
        for done in range(ROUNDS + 1):
            torch.manual_seed(seed)
            data = pool[0][chosen], pool[1][chosen]
            model = network(NET, seed)
            optimizer = torch.optim.Adam(model.parameters(), 3e-3)
            for _ in range(AL_EPOCHS):
                for i in torch.randperm(len(chosen)).split(20):
                    optimizer.zero_grad()
                    LOSS(model(data[0][i]), data[1][i]).backward()
                    optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                curve.append((model(test[0]).argmax(1) == test[1]).double().mean().item())
            if done == ROUNDS:
                break
            left = torch.ones(len(pool[1]), dtype=torch.bool)
            left[chosen] = False
            places = left.nonzero()[:, 0]
            if name == "random":
                best = torch.randperm(len(places), generator=generator)[:ADDED]
            else:
                score = scores(model, data)[ACTIVE[name]]
                with torch.no_grad():
                    best = score(pool[0][places]).topk(ADDED).indices
            chosen = torch.cat([chosen, places[best]])
        rows.append({"method": name, "accuracy": curve})
    return rows


ACTIVE = {
    "entropy of the network": "network, entropy", "entropy as it comes": "posterior as it comes, entropy",
    "unweighted variance": "unweighted variance", "information": "plain posterior, information",
}  # fmt: skip


def to_optimum(data: Pair, model: nn.Module) -> nn.Module:
    """The model trained on, to an optimum of the summed loss with weight decay."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=400, line_search_fn="strong_wolfe", history_size=20)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]), data[1], reduction="sum")
        loss = loss + DECAY * 400 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    return model.eval()


def double(pair: Pair) -> Pair:
    return pair[0].double(), pair[1]


def deletion(seed: int) -> list[Row]:
    """Distances of test logits, relative to that of doing nothing, and of the deleted samples' losses."""
    train, test, _ = (double(part) for part in split(NET, 400, seed))
    generator, rows = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    whole = to_optimum(train, model)
    gone = torch.randperm(400, generator=generator)[:DELETED]
    kept = torch.ones(400, dtype=torch.bool)
    kept[gone] = False
    less = to_optimum((train[0][kept], train[1][kept]), copy.deepcopy(whole))  # the optimum that is near
    f0, target = whole(test[0]).detach().softmax(1), less(test[0]).detach().softmax(1)
    start = torch.cat([p.detach().flatten() for p in whole.parameters()])
    for structure in ("full", "kron", "diag"):
        rest = pb.laplace(
            whole, LOSS, (train[0][kept], train[1][kept]), structure, prior_precision=DECAY * 400
        )  # of what is left
        losses = F.cross_entropy(whole(train[0][gone]), train[1][gone], reduction="sum")
        g = torch.cat([t.flatten() for t in torch.autograd.grad(losses, list(whole.parameters()))])
        moved = start + rest.precision().apply(g.unsqueeze(0))[0]
        parts = unflatten(moved, dict(whole.named_parameters()))
        p = torch.func.functional_call(whole, parts, (test[0],)).detach().softmax(1)
        rows.append({"method": structure, "distance": ((p - target).norm() / (f0 - target).norm()).item()})
    return rows


def wrong_labels(seed: int) -> list[Row]:
    train, _, _ = split(NET, 400, seed)
    torch.manual_seed(seed)
    x, y = train[0], train[1].clone()
    bad = torch.randperm(400)[:WRONG]
    y[bad] = (y[bad] + torch.randint(1, 10, (WRONG,))) % 10
    model = trained(network(NET, seed), (x, y))
    posterior = fitted(model, (x, y), None)
    f, covariance = posterior.functional(x)
    p = f.softmax(1)
    residual = p - F.one_hot(y, 10)
    moved = (covariance @ residual.unsqueeze(2))[..., 0]  # without the sample, to first order
    found = {
        "loss of the network": F.cross_entropy(f, y, reduction="none"),
        "loss without the sample, by the posterior": F.cross_entropy(f + moved, y, reduction="none"),
        "influence on itself, r S r": (residual * moved).sum(1),
    }
    wrong = torch.zeros(400, dtype=torch.bool)
    wrong[bad] = True
    return [{"method": k, "area": area(v[~wrong], v[wrong])} for k, v in found.items()]


PARTS = {"rejection": rejection, "learning": learning, "deletion": deletion, "wrong labels": wrong_labels}


def tables(rows: list[Row]) -> list[str]:
    lines = []
    for part in PARTS:
        here = [row for row in rows if row["part"] == part]
        if not here:
            continue
        first = here[0]
        keys = [k for k in first if k not in ("part", "seed", "method")]
        columns = [str(START + ADDED * i) for i in range(ROUNDS + 1)] if part == "learning" else keys
        lines += [f"### {part}", "", "| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for name in dict.fromkeys(row["method"] for row in here):
            mine = [row for row in here if row["method"] == name]
            values = [row["accuracy"] if part == "learning" else [row[k] for k in keys] for row in mine]
            cells = [spread([v[i] for v in values]) for i in range(len(columns))]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines += ["", f"{len({row['seed'] for row in here})} seeds.", ""]
    return lines


def spread(values: list[float]) -> str:
    error = f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(options.out, "posterior-use", tables)
    for seed in range(options.seeds):
        for part in options.parts:
            if not record.holds(part=part, seed=seed):
                record.add(PARTS[part](seed), part=part, seed=seed)


if __name__ == "__main__":
    main()
