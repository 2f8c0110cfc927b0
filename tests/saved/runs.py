"""A training run of the command line to interrupt, and what it arrives at once it goes on from the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner

from paraboloid.cli import main

# name -> options of `paraboloid train`; they compute in float32
CASES: dict[str, list[str]] = {"diag-ggn, float32": ["digits-tanh", "--optimizer", "diag-ggn", "--seed", "3"]}
CHECKPOINT = "checkpoint.pt"


def train(name: str, out: Path, epochs: int, *more: str) -> dict[str, Any]:
    """Losses after the last epoch."""
    threads = torch.get_num_threads()
    try:
        options = [*CASES[name], "--epochs", str(epochs), "--out", str(out), "--quiet", *more]
        CliRunner().invoke(main, ["train", *options], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)
    last = json.loads((out / "record.json").read_text(encoding="utf-8"))["metrics"][-1]
    return {k: last[k] for k in ("step", "batch_loss", "train_loss", "test_loss")}


def begin(name: str, out: Path) -> dict[str, Any]:
    return train(name, out, 1)


def go_on(name: str, out: Path) -> dict[str, Any]:
    return train(name, out, 2, "--resume")
