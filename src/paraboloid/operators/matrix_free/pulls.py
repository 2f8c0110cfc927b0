"""Passes over the data that pull vectors back to every parameter, batch by batch: what structure is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.losses import Loss, NoTargets, Sum, settled
from paraboloid.losses.loss import full
from paraboloid.operators.matrix_free.second_order_passes import RandomStream
from paraboloid.passes import trees
from paraboloid.passes.memory import GRADIENTS, RECORDINGS
from paraboloid.passes.modes import own_arithmetic
from paraboloid.passes.random_state import copied_buffers
from paraboloid.passes.torch_internals import DisableTorchFunction
from paraboloid.passes.wrappers import unwrapped
from paraboloid.quantities.door import Recording, output_vectors, record
from paraboloid.quantities.named import Source
from paraboloid.reductions.outer import Outer
from paraboloid.reductions.products import merge as merged

Outers = dict[str, list[Outer]]


class Pulls:
    """The pulled-back vectors of every batch, the same on every pass; with the total normalizer after the first.

    With `repeated` there may be several.  A single batch is run forward once: its recording is kept, and the pulled
    vectors too if they fit into `max_memory` bytes (default 1 GiB).  Of a loader each pass reads and records every
    batch, with the masks and labels of `seed`.  Batches are weighted by what the loss divides by: `factor` is that of
    all data together.  `separate`: samples must not be mixed by batch norm in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        data: Any,
        source: Source,
        *,
        output: batch_data.Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
        separate: bool = False,
        repeated: bool = False,
    ):
        if repeated and isinstance(data, Iterator):
            raise ValueError(f"data is a {type(data).__name__}, which can be read only once, but two passes are "
                             "needed; expected a batch, a list of batches or a DataLoader.")  # fmt: skip
        self.parameters = {k: p.detach() for k, p in trees.parameters(model).items()}
        self.model, self.loss, self.data, self.source = model, Loss.from_torch(loss_fn), data, source
        self.output, self.seed, self.max_memory, self.separate = output, seed, max_memory, separate
        self.device = next(iter(self.parameters.values())).device
        self.stream = RandomStream(seed, self.device)
        self.single, self.repeated = batch_data.as_batch(data) is not None, repeated
        self.passes, self.samples, self.normalizer, self.total = 0, 0, 0.0, 0.0
        self.recording: tuple[Recording, Tensor, Any] | None = None
        self.kept: list[Outers] | None = None
        if len(self.loss.terms) > 1 and not self.single:
            self._settle()

    @property
    def factor(self) -> float:
        """a = 1 / normalizer: of the loss as reduced over all batches."""
        if self.normalizer <= 0:
            raise NoTargets("every target of every batch is ignored or has zero class weight, so the mean loss is 0/0; "
                            "expected at least one target that counts.")  # fmt: skip
        return 1 / self.normalizer

    @property
    def vectors(self) -> int:
        """How many vectors the current batch has (at most)."""
        assert self.recording is not None
        return self.loss.root_columns(self.recording[1]) if self.source.kind == "root" else self.source.samples

    def summed(self, add: Callable[[str, Any, Outer], Any], merge: Callable[[Any, Any], Any]) -> dict[str, Any]:
        """One value per parameter from one pass: `add(name, value, outer)` for every group of vectors of a batch (value
        is None at first), `merge(total, value)` after each batch."""
        totals: dict[str, Any] = dict.fromkeys(self.parameters)
        for groups in self.batches():
            values: dict[str, Any] = dict.fromkeys(self.parameters)
            for outers in groups:
                with own_arithmetic(self.device), DisableTorchFunction(), torch.no_grad():
                    for name in self.parameters:
                        uses = outers[name] if self.kept is not None else outers.pop(name)
                        try:
                            values[name] = add(name, values[name], merged(uses))
                        except NotImplementedError as e:
                            raise NotImplementedError(f"parameter {name!r} {e}") from None
            with torch.no_grad():
                totals = {name: merge(totals[name], value) for name, value in values.items() if value is not None}
        return totals

    def batches(self) -> Iterator[Iterator[Outers]]:
        """One pass: for each batch the groups of pulled-back vectors, to be used before the next batch."""
        self.passes += 1
        generator = torch.Generator(self.device).manual_seed(self.seed)
        if self.recording is not None:
            yield iter(self.kept) if self.kept is not None and self.passes > 1 else self._groups(generator)
            return
        total = 0.0
        for tape, f, y in self._recorded():
            total += self._count(f, y)
            self.recording = tape, f, y
            yield self._groups(generator)
            if not self.single:
                self.recording = None
        if self.passes > 1:
            self._check_total(total)
        self.total = total

    def _recorded(self) -> Iterator[tuple[Recording, Tensor, Any]]:
        self.stream.rewind()
        iterator = batch_data.batches(self.data)
        while True:
            with self.stream:
                batch = next(iterator, None)
            if batch is None:
                return
            inputs, y = batch
            with self.stream, copied_buffers(self.model), _differentiable(), record(self.model) as tape:
                f = batch_data.call(unwrapped(self.model), inputs, self.output)
            yield tape, f, y

    def _count(self, f: Tensor, y: Any) -> float:
        """Check a batch at the door; its summed loss."""
        with own_arithmetic(self.device), DisableTorchFunction(), torch.no_grad():
            self.loss.check(f, y)
            if self.passes == 1:
                self.samples += len(f)
                if self.loss.reduction == "sum":
                    self.normalizer = 1.0
                else:
                    with suppress(NoTargets):  # such a batch adds nothing to the sums over a loader
                        self.normalizer += self.loss.normalizer(f.detach(), y)
            return batch_data.check_finite(self.loss.sample_losses(full(f), y).sum()).item()

    def _groups(self, generator: torch.Generator) -> Iterator[Outers]:
        assert self.recording is not None
        tape, f, y = self.recording
        with own_arithmetic(self.device), DisableTorchFunction():
            vectors = output_vectors(self.loss, f, y, self.source, generator)
            if self.source.kind == "gradient" and isinstance(self.loss, Sum):  # whose square has to be in its own unit
                vectors = (self.loss.unit**0.5 * v for v in vectors)
        size = sum(c.shape.numel() for c in tape.calls) * f.element_size()
        count = GRADIENTS.count(size, self.max_memory, f.device)
        room = RECORDINGS.of(self.max_memory)
        keep = [] if self.single and self.repeated and self.passes == 1 else None
        self.kept = keep
        while True:
            with own_arithmetic(self.device), DisableTorchFunction():
                vs = list(islice(vectors, count))
                if not vs:
                    return
                outers = tape.pull(f, torch.stack(vs), batch_statistics=not self.separate)
            if keep is not None:
                room -= len(vs) * size
                keep.append(outers)
                if room < 0:
                    self.kept = keep = None
            yield outers

    def _settle(self) -> None:
        """A sum of losses, each term divided by its own total over all batches: one pass to count them."""
        totals, samples = [0.0] * len(self.loss.terms), 0
        for _, f, y in self._recorded():
            self.loss.check(f, y)
            samples += len(f)
            for i, term in enumerate(self.loss.terms):
                with suppress(NoTargets):
                    totals[i] += term.normalizer(f.detach(), y)
        totals = [1.0 if t.reduction == "sum" else m for t, m in zip(self.loss.terms, totals, strict=True)]
        self.loss = settled(self.loss, totals, samples)

    def _check_total(self, total: float) -> None:
        dtype = next(iter(self.parameters.values())).dtype
        if abs(total - self.total) > torch.finfo(dtype).eps ** 0.75 * abs(self.total):
            raise RuntimeError(
                f"the summed loss moved from {self.total:.8g} to {total:.8g} between two passes over the data, so the "
                "passes do not see one function; expected the same samples and values on each pass. Turn random "
                "augmentation, drop_last with shuffling, and changes of mode or parameters off."
            )


@contextmanager
def _differentiable() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield
