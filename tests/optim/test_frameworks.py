"""The worked examples of the documentation, where the framework is installed."""

import re
import warnings
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimisers" / "frameworks.md"


def run(title, needs, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports, and about the number of workers
        pytest.importorskip(
            needs, reason=f"install it with: pip install {needs.partition('.')[0]}", exc_type=ImportError
        )
        (block,) = re.findall(rf'```python title="{title}"\n(.*?)```', PAGE.read_text(encoding="utf-8"), flags=re.S)
        monkeypatch.chdir(tmp_path)
        namespace: dict = {"__name__": "example"}
        with torch.random.fork_rng():
            exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


def test_a_lightning_module_trains(tmp_path, monkeypatch):
    found = run("lightning", "lightning.pytorch", tmp_path, monkeypatch)
    assert set(found["losses"]) == {"KFAC", "KBFGS"}
    assert all(loss < 1.0 for loss in found["losses"].values()), found["losses"]  # log 3 at the start


def test_a_hugging_face_trainer_trains(tmp_path, monkeypatch):
    pytest.importorskip("accelerate", reason="install it with: pip install accelerate")
    found = run("transformers", "transformers", tmp_path, monkeypatch)
    assert found["opt"].counters["steps"] == 24
    assert found["opt"].diagnostics()["skipped"] == 0
    assert found["result"].training_loss < 0.75
