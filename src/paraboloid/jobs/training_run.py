"""Train a problem by name: any optimiser, plain or clustered batches, exact checkpoints, a JSON record."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid import __version__, optim, problems
from paraboloid.data.batches import Chunks, call, check_finite, sample_count, take
from paraboloid.jobs.training_page import page
from paraboloid.losses import Loss
from paraboloid.noise import GradientClustering, StratifiedBatchSampler
from paraboloid.noise.monitor import Reclustering
from paraboloid.passes import trees
from paraboloid.passes.modes import evaluating
from paraboloid.passes.random_state import seeded
from paraboloid.report import plain

CHECKPOINT, RECORD, PAGE = "checkpoint.pt", "record.json", "report.html"
SAMPLERS = ("uniform", "gc")
WARM = 2048  # samples for a warm start

Make = Callable[[nn.Module, Loss, dict[str, Any]], Any]
# name -> (default lr, maker); options are lr, weight_decay and, where it has them, momentum and damping.
OPTIMIZERS: dict[str, tuple[float, Make]] = {
    "sgd": (0.05, lambda m, loss, o: torch.optim.SGD(m.parameters(), **o)),
    "adam": (1e-3, lambda m, loss, o: torch.optim.Adam(m.parameters(), **o)),
    "adamw": (1e-3, lambda m, loss, o: torch.optim.AdamW(m.parameters(), **o)),
    "kfac": (0.1, lambda m, loss, o: optim.KFAC(m, loss, **o)),
    "ekfac": (0.1, lambda m, loss, o: optim.EKFAC(m, loss, **o)),
    "diag-ggn": (0.1, lambda m, loss, o: optim.Preconditioned(m, loss, **o)),
    "kbfgs": (0.3, lambda m, loss, o: optim.KBFGS(m, loss, graft="adam", **o)),
    "kbfgsl": (0.3, lambda m, loss, o: optim.KBFGSL(m, loss, graft="adam", **o)),
    "polar": (5e-3, lambda m, loss, o: optim.Polar(m, loss, **o)),
    "hessian-free": (1.0, lambda m, loss, o: optim.HessianFree(m, loss, **o)),
}
DAMPED = {"kfac", "ekfac", "diag-ggn", "kbfgs", "kbfgsl", "hessian-free"}
WITH_MOMENTUM = {"sgd", "kfac", "ekfac", "diag-ggn", "kbfgs", "kbfgsl", "polar"}


@dataclass(frozen=True)
class Settings:
    """What decides how a run goes; a checkpoint resumes only under the same ones (`epochs` may grow)."""

    problem: str
    optimizer: str = "adam"
    sampler: str = "uniform"
    lr: float | None = None
    damping: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None  # with sampler "gc": the number of clusters; default: the problem's
    recluster: int = 200  # steps between fits of the clusters
    epochs: int | None = None
    seed: int = 0
    data: str | None = None
    short: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("optimizer", self.optimizer, tuple(OPTIMIZERS)),
            ("sampler", self.sampler, SAMPLERS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}.")
        for name, allowed in (("damping", DAMPED), ("momentum", WITH_MOMENTUM)):
            if getattr(self, name) is not None and self.optimizer not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)} with {self.optimizer}; only "
                                 f"{', '.join(sorted(allowed))} take it.")  # fmt: skip
        for name in ("batch_size", "recluster"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.epochs is not None and self.epochs < 0:
            raise ValueError(f"epochs is {self.epochs}; expected at least 0.")


class Uniform:
    """Batches of a fresh permutation each epoch; where it stands is two numbers."""

    def __init__(self, samples: int, batch_size: int, seed: int):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.epoch, self.place = 0, 0

    def __len__(self) -> int:
        full, rest = divmod(self.samples, self.batch_size)
        return max(1, full + (rest > 1))  # a single sample is left out: batch norm cannot be trained on it

    def next(self) -> Tensor:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + 7919 * self.epoch))
        found = order.split(self.batch_size)[self.place]
        self.place += 1
        if self.place == len(self):
            self.epoch, self.place = self.epoch + 1, 0
        return found

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.place = state["epoch"], state["place"]


class Clustered:
    """One sample of each gradient cluster, clusters renewed every so many steps; with loss weights."""

    def __init__(self, model: nn.Module, loss: Loss, dataset: Any, clusters: int, every: int, seed: int):
        self.clusters = GradientClustering(model, loss, clusters, seed=seed)
        self.model, self.dataset, self.seed, self.every = model, dataset, seed, every
        self.sampler: StratifiedBatchSampler | None = None
        self.steps, self.length = 0, -(-sample_count(dataset) // clusters)

    def __len__(self) -> int:
        return self.length

    def _renew(self) -> None:
        with evaluating(self.model):  # the samples' own gradients: no batch statistics, no dropout
            if self.sampler is None:
                self.clusters.fit(self.dataset, 256, 3)
                self.sampler = StratifiedBatchSampler(self.clusters.assignments, seed=self.seed)
            else:
                Reclustering(self.clusters, self.dataset, self.sampler, every=self.every)(self.steps)

    def next(self) -> Tensor:
        if self.sampler is None or self.steps % self.every == 0:
            self._renew()
        assert self.sampler is not None
        self.steps += 1
        return torch.tensor(next(iter(self.sampler)))

    def weights(self, indices: Tensor) -> Tensor:
        assert self.sampler is not None
        return self.sampler.weights(indices)

    def state_dict(self) -> dict[str, Any]:
        if self.sampler is None:
            return {"steps": 0}
        return {"steps": self.steps, "clusters": self.clusters.state_dict(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        if "clusters" in state:
            self.clusters.load_state_dict(state["clusters"])
            self.sampler = StratifiedBatchSampler(self.clusters.assignments, seed=self.seed)
            self.sampler.load_state_dict(state["sampler"])


class Run:
    """One training run in the directory `out`: `go()` trains to the end, or goes on from the checkpoint there."""

    def __init__(self, settings: Settings, out: Path, progress: Callable[[str, int, int], None] | None = None):
        self.settings, self.out = settings, Path(out)
        self.progress = progress or (lambda stage, done, total: None)
        options = {} if settings.data is None else {"data": settings.data}
        self.problem = problems.load(settings.problem, seed=settings.seed, short=settings.short, **options)
        self.model, self.loss = self.problem.model, Loss.from_torch(self.problem.loss_fn)
        training = self.problem.training
        size = settings.batch_size or (training.batch_size if settings.sampler == "uniform" else 10)
        if settings.sampler == "uniform":
            self.batches: Uniform | Clustered = Uniform(sample_count(self.problem.train), size, settings.seed)
        else:
            self.batches = Clustered(
                self.model, self.loss, self.problem.train, size, settings.recluster, settings.seed
            )  # fmt: skip
        self.epochs = training.epochs if settings.epochs is None else settings.epochs
        self.optimizer = self._optimizer(training)
        self.step, self.metrics = 0, list[dict[str, Any]]()
        self.times: list[Any] = []  # epoch, and seconds per step in it

    def _optimizer(self, training: Any) -> Any:
        s = self.settings
        lr, make = OPTIMIZERS[s.optimizer]
        if s.optimizer == training.optimizer:  # the problem's own settings, unless others are given
            lr = training.lr
        options: dict[str, Any] = {"lr": lr if s.lr is None else s.lr}
        options["weight_decay"] = training.weight_decay if s.weight_decay is None else s.weight_decay
        if s.damping is not None:
            options["damping"] = s.damping
        if s.momentum is not None:
            options["momentum"] = s.momentum
        elif s.optimizer == "sgd":
            options["momentum"] = training.momentum
        if s.optimizer in {"kfac", "ekfac", "diag-ggn", "hessian-free"}:
            options["seed"] = s.seed
        return make(self.model, self.loss, options)

    # --- training ------------------------------------------------------------------------------------------------

    def go(self, resume: bool = False) -> dict[str, Any]:
        """Train; the record.  Raises ValueError where there is nothing to resume, or it was another run's, and
        FloatingPointError for a loss that is not finite."""
        self.out.mkdir(parents=True, exist_ok=True)
        device = next(iter(trees.parameters(self.model).values())).device
        with seeded(self.settings.seed):
            if resume:
                self.load()
            else:
                if callable(start := getattr(self.optimizer, "warm_start", None)):
                    start(self._first_samples(device))
                self._note()
            per_epoch, total = len(self.batches), len(self.batches) * self.epochs
            sums, began = list[float](), time.perf_counter()
            self.model.train()
            while self.step < total:
                sums.append(self._step(device))
                self.step += 1
                self.progress("train", self.step, total)
                if self.step % per_epoch == 0:
                    self.times.append([self.step // per_epoch, (time.perf_counter() - began) / len(sums)])
                    self._note(sum(sums) / len(sums))
                    sums = []
                    self.save()
                    began = time.perf_counter()
        return self.record()

    def _first_samples(self, device: torch.device) -> Any:
        chunks = Chunks(self.problem.train, self.problem.training.batch_size, device)
        return [batch for i, batch in enumerate(chunks) if i * chunks.size < WARM]

    def _step(self, device: torch.device) -> float:
        indices = self.batches.next()
        inputs, targets = take(self.problem.train, indices, device)
        weights = self.batches.weights(indices).to(device) if isinstance(self.batches, Clustered) else None
        if isinstance(self.optimizer, optim.HessianFree):
            if weights is not None:
                raise ValueError("sampler 'gc' weights the samples, which hessian-free does not know; expected another "
                                 "optimizer, or sampler 'uniform'.")  # fmt: skip
            found = self.optimizer.step((inputs, targets))
            return float("nan") if found is None else float(found)

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            f = call(self.model, inputs)
            if weights is None:
                loss = self.loss(f, targets)
            else:
                if hasattr(self.optimizer, "observe"):
                    self.optimizer.observe(f, targets)
                loss = (weights * self.loss.sample_losses(f, targets)).sum() / self.loss.normalizer(f, targets)
            loss.backward()
            return loss.detach()

        try:
            return float(check_finite(self.optimizer.step(closure)))
        except ValueError as error:
            raise FloatingPointError(
                f"at step {self.step}: {error} Lower the learning rate, or raise the damping."
            ) from error

    def _note(self, batch_loss: float | None = None) -> None:
        """One line of metrics over the whole sets."""
        self.model.eval()
        start = time.perf_counter()
        train_loss, train_accuracy = problems.evaluate(self.problem, self.problem.train)
        test_loss, test_accuracy = problems.evaluate(self.problem, self.problem.test)
        self.model.train()
        self.metrics.append({
            "step": self.step, "epoch": self.step // len(self.batches), "batch_loss": batch_loss,
            "train_loss": train_loss, "train_accuracy": train_accuracy, "test_loss": test_loss,
            "test_accuracy": test_accuracy, "evaluation_seconds": time.perf_counter() - start,
            "diagnostics": self.optimizer.diagnostics() if hasattr(self.optimizer, "diagnostics") else None,
        })  # fmt: skip
        self.write_record()

    # --- files ---------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Settings and metrics as plain data."""
        return {"settings": asdict(self.settings), "parameters": sum(p.numel() for p in self.model.parameters()),
                "steps_per_epoch": len(self.batches), "metrics": self.metrics,
                "step_seconds": self.times}  # fmt: skip

    def write_page(self) -> Path:
        """`report.html` of what was trained so far."""
        given = {k: v for k, v in asdict(self.settings).items() if v not in (None, False) and k != "problem"}
        options = [f"--{k.replace('_', '-')}" + ("" if v is True else f" {v}") for k, v in given.items()]
        seconds = sum(m["evaluation_seconds"] for m in self.metrics) + len(self.batches) * sum(s for _, s in self.times)
        more = {
            "command": " ".join(["paraboloid train", self.settings.problem, *options]),
            "lr": float(self.optimizer.param_groups[0]["lr"]), "seconds": seconds,
            "threads": torch.get_num_threads(),
            "versions": {"paraboloid": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }  # fmt: skip
        text = page({**self.record(), **more})
        _replace(self.out / PAGE, lambda path: path.write_text(text, encoding="utf-8"))
        return self.out / PAGE

    def write_record(self) -> None:
        text = json.dumps(plain(self.record()), indent=1, allow_nan=False) + "\n"
        _replace(self.out / RECORD, lambda path: path.write_text(text, encoding="utf-8"))

    def save(self) -> None:
        """The checkpoint, written beside the old one and then put in its place: never half a file."""
        state = {
            "settings": asdict(self.settings), "step": self.step, "metrics": self.metrics, "times": self.times,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "batches": self.batches.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip
        _replace(self.out / CHECKPOINT, lambda path: torch.save(state, path))

    def load(self) -> None:
        """Go on from the checkpoint in `out`."""
        path = self.out / CHECKPOINT
        if not path.is_file():
            raise ValueError(f"there is no {path} to resume from; expected the directory of a run (--out) that reached "
                             "the end of an epoch.")  # fmt: skip
        state = torch.load(path, weights_only=True)
        mine, its = asdict(self.settings), state["settings"]
        different = [k for k in mine if k != "epochs" and mine[k] != its.get(k)]
        if different:
            told = ", ".join(f"{k} is {its.get(k)!r} there and {mine[k]!r} here" for k in different)
            raise ValueError(f"{path} is of another run: {told}; expected the same settings.")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.load_state_dict(state["batches"])
        self.step, self.metrics, self.times = state["step"], state["metrics"], state.get("times", [])
        torch.set_rng_state(state["random"])


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
