"""python -m benchmarks.sampled_shapes: sampled Laplace of ResNet-18 on all 10,000 images of the `shapes` problem.

The network is trained first (Adam, 4 passes). Then samples by stochastic descent, one EM step and the samples again,
streamed in batches of 128. All of it is saved in the folder --work as it goes, and a second call goes on from there.
What is stated: the residual that was reached, processor time, peak memory, and the likelihood of 2,000 test images by
the network and by the posterior, whose confidence is matched on the training data by one exponent.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import paraboloid as pb
from benchmarks.harness import machine
from benchmarks.sampled import Parts
from paraboloid.problems import networks, shapes

TRAINED, BATCH = 4, 128  # passes over the data, and images of a batch of the samples


def trained(work: Path, x: Tensor, y: Tensor) -> nn.Module:
    """ResNet-18 with 10 classes, from the file where it was trained before."""
    torch.manual_seed(0)
    model, file = networks.resnet18(10), work / "network.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    steps = TRAINED * -(-len(x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(TRAINED):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    torch.save(model.state_dict(), file)
    return model.eval()


@torch.no_grad()
def quality(probabilities: Tensor, y: Tensor) -> dict[str, float]:
    right = probabilities.argmax(1) == y
    return {"nll": F.nll_loss(probabilities.clamp(min=1e-12).log(), y).item(), "accuracy": right.double().mean().item()}


def run(work: Path, samples: int, epochs: int, em_steps: int, precision: float, images: int) -> dict[str, Any]:
    work.mkdir(parents=True, exist_ok=True)
    found, labels = shapes.draw_shapes(images + images // 5, seed=0)
    x, y = torch.from_numpy(found), torch.from_numpy(labels)
    model = trained(work, x[:images], y[:images])
    data = list(zip(x[:images].split(BATCH), y[:images].split(BATCH), strict=True))
    parts = Parts(work / "run")
    posterior = pb.sampled_laplace(
        model, nn.CrossEntropyLoss(), data, samples, em_steps=em_steps, prior_precision=precision, solver="sgd",
        epochs=epochs, max_memory=1, match=None, checkpoint=work / "run", callback=parts,
    )  # fmt: skip
    test = x[images:].split(BATCH), y[images:]
    with torch.no_grad():
        plain = torch.cat([model(part).softmax(1) for part in test[0]])
    scores = {
        "network": quality(plain, test[1]),
        "posterior, unmatched": quality(torch.cat([posterior.predict(part) for part in test[0]]), test[1]),
    }
    posterior.match_confidence()
    scores["posterior"] = quality(torch.cat([posterior.predict(part) for part in test[0]]), test[1])
    return {"samples": samples, "epochs": epochs, "images": images, "quality": scores, **parts.summary(posterior)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--em-steps", type=int, default=1)
    parser.add_argument("--precision", type=float, default=1000.0)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("sampled-shapes"), help="what goes on from call to call")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {
        "machine": machine(),
        **run(args.work, args.samples, args.epochs, args.em_steps, args.precision, args.images),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sampled-shapes.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
