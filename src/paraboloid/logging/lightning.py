"""A callback for Lightning that measures the batch that is about to be trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import nn

from paraboloid.data.batches import Output
from paraboloid.logging.layer_scalars import scalars
from paraboloid.losses import Loss
from paraboloid.passes.modes import evaluating
from paraboloid.quantities.door import statistics
from paraboloid.quantities.quantity import Quantity

try:
    from lightning.pytorch import Callback  # type: ignore[reportMissingImports]
except ImportError as e:
    raise ImportError("pb.logging.LightningCallback needs the package lightning, which could not be imported "
                      f"({e}); install it with: pip install 'paraboloid[lightning]'") from e  # fmt: skip


class LightningCallback(Callback):
    """Logs numbers of quantities (see `scalars`) to the trainer's loggers.

        trainer = Trainer(callbacks=[pb.logging.LightningCallback(nn.CrossEntropyLoss(), every=100)])

    Before every `every`-th optimiser step the batch goes through the model once more, in the trainer's precision.  The
    training itself does not notice: random state, buffers and gradients are left alone.  With several devices the
    numbers are those of all devices' samples together.

    loss_fn, quantities, output, max_memory
                as for `pb.statistics`
    every       optimiser steps from one measurement to the next
    model       picks the module that is measured from the LightningModule, which itself is the default; it is called
                with the batch's inputs
    batch       makes (inputs, targets) of what the loader yields, where that is something else
    eval_mode   whether modules are in eval mode while measured: for batch norm, which has no per-sample gradients in
                training mode, and without dropout
    per, prefix as for `scalars` and of all names
    seed        of sampled labels and dropout masks, which differ from step to step
    """

    def __init__(
        self,
        loss_fn: nn.Module | Loss,
        quantities: Iterable[str | Quantity] | str | Quantity = ("grad", "variance"),
        *,
        every: int = 50,
        model: Callable[[Any], nn.Module] | None = None,
        batch: Callable[[Any], Any] | None = None,
        output: Output | None = None,
        eval_mode: bool = False,
        per: str = "layer",
        prefix: str = "paraboloid",
        seed: int = 0,
        max_memory: int | None = None,
    ):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every is {every!r}; expected an integer >= 1, the optimiser steps between measurements.")
        self.loss_fn, self.every, self.eval_mode = loss_fn, every, eval_mode
        self.quantities = quantities if isinstance(quantities, str | Quantity) else list(quantities)
        self.model, self.batch, self.output = model, batch, output
        self.per, self.prefix, self.seed, self.max_memory = per, prefix, seed, max_memory
        self._measured = -1  # the last step: with gradient accumulation several batches belong to one

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every or step == self._measured:
            return
        self._measured = step
        model = pl_module if self.model is None else self.model(pl_module)
        pair = batch if self.batch is None else self.batch(batch)
        with evaluating(model) if self.eval_mode else nullcontext(), trainer.precision_plugin.forward_context():
            stats = statistics(
                model, self.loss_fn, pair, self.quantities, seed=self.seed + step, max_memory=self.max_memory,
                output=self.output, all_reduce=trainer.world_size > 1,
            )  # fmt: skip
        numbers = {f"{self.prefix}/{name}": value for name, value in scalars(stats, per=self.per).items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
