"""TensorBoard: what is written can be read again."""

import sys

import pytest
import torch
from torch import nn

import paraboloid as pb


def stats(quantities=("grad", "variance", "square_norms")):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), (torch.randn(4, 2), torch.randn(4, 1))
    return pb.statistics(model, nn.MSELoss(), batch, quantities)


class Board:
    """What a SummaryWriter is asked to write."""

    def __init__(self):
        self.scalars, self.histograms, self.closed = {}, {}, False

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def add_histogram(self, tag, values, step):
        self.histograms[tag, step] = values

    def close(self):
        self.closed = True


def test_scalars_and_histograms_go_to_a_given_writer():
    board, found = Board(), stats()
    with pb.logging.TensorBoard(board, per="layer", histograms=["grad"], prefix="run") as writer:
        writer.write(found, 7)
    assert board.scalars == {(f"run/{k}", 7): v for k, v in pb.logging.scalars(found).items()}
    assert set(board.histograms) == {(f"run/grad/{k}", 7) for k in found["grad"]}
    assert torch.equal(board.histograms["run/grad/0.weight", 7], found["grad"]["0.weight"])
    assert not board.closed
    with pytest.raises(
        ValueError, match=r"'kfac' has no histogram: its value for '0\.weight' is a Kron; expected a tensor"
    ):
        pb.logging.TensorBoard(board, histograms=["kfac"]).write(stats(["kfac"]), 0)


def test_a_folder_is_written_with_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard", reason="install it with: pip install 'paraboloid[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = stats()
    with pb.logging.TensorBoard(tmp_path, histograms=["variance"]) as board:
        for step in (0, 10):
            board.write(found, step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for tag, value in pb.logging.scalars(found).items():
        read = events.Scalars(f"paraboloid/{tag}")
        assert [e.step for e in read] == [0, 10]
        assert read[0].value == pytest.approx(value, rel=1e-6)
    assert set(events.Tags()["histograms"]) == {f"paraboloid/variance/{k}" for k in found["variance"]}


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"needs the package tensorboard.*pip install 'paraboloid\[tensorboard\]'"):
        pb.logging.TensorBoard(tmp_path)
