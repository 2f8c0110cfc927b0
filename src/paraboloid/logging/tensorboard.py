"""Quantities as TensorBoard's scalars and histograms."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from paraboloid.logging.layer_scalars import scalars
from paraboloid.quantities.result import Statistics


class TensorBoard:
    """Writes statistics to TensorBoard.

        with pb.logging.TensorBoard("runs/first") as board:
            for step, batch in enumerate(loader):
                stats = pb.statistics(model, loss_fn, batch, ["grad", "variance"], accumulate_grad=True)
                board.write(stats, step)

    where       a folder, or a `torch.utils.tensorboard.SummaryWriter` of yours, which is left open
    per         "parameter", "layer" or "model": whose numbers are written, see `scalars`
    histograms  names of quantities (with tensors as values) of which a histogram is written for each parameter
    prefix      of all tags
    """

    def __init__(
        self,
        where: str | Path | Any,
        *,
        per: str = "layer",
        histograms: Collection[str] = (),
        prefix: str = "paraboloid",
    ):
        self.owned = isinstance(where, str | Path)
        self.writer: Any = _open(where) if isinstance(where, str | Path) else where
        self.per, self.histograms, self.prefix = per, histograms, prefix

    def write(self, stats: Statistics, step: int) -> None:
        """Write the numbers of `scalars`, and the histograms asked for."""
        for tag, value in scalars(stats, per=self.per).items():
            self.writer.add_scalar(f"{self.prefix}/{tag}", value, step)
        for name in self.histograms:
            for parameter, value in stats[name].items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"{name!r} has no histogram: its value for {parameter!r} is a "
                                     f"{type(value).__name__}; expected a tensor.")  # fmt: skip
                self.writer.add_histogram(f"{self.prefix}/{name}/{parameter}", value.float(), step)

    def close(self) -> None:
        if self.owned:
            self.writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError("pb.logging.TensorBoard needs the package tensorboard, which could not be imported "
                          f"({e}); install it with: pip install 'paraboloid[tensorboard]'") from e  # fmt: skip
    return SummaryWriter(str(folder))
