"""Passes over data: the batches run forward one by one, the same on every pass, and what they add up to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Inputs, Output
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import Group
from paraboloid.engine.twice_differentiable import twice_differentiable
from paraboloid.losses import Loss, LossFunction, NoTargets, Opaque, settled
from paraboloid.losses.loss import full
from paraboloid.passes import trees
from paraboloid.passes.memory import RECORDINGS
from paraboloid.passes.modes import own_arithmetic
from paraboloid.passes.random_state import RandomStream, copied_buffers
from paraboloid.passes.torch_internals import DisableTorchFunction
from paraboloid.passes.wrappers import unwrapped
from paraboloid.quantities.quantity import Quantity
from paraboloid.quantities.recording import Recording, record
from paraboloid.quantities.sums import Sums, merged, normalizers

T = TypeVar("T")
_AS_IT_IS = nullcontext()


class Passes(Generic[T]):
    """A model and its loss on data: iterating makes one pass and gives (what `around` gave, output, targets) by batch.

    Each forward pass is made inside ``with around()``.  Masks of dropout, and whatever else draws from torch's global
    random state (a shuffling loader too), are those of `seed` on each pass; that state is not touched.  The first pass
    checks outputs, targets and loss, and counts `samples`, the `total` of the unreduced loss and its `normalizer`,
    which adds up over batches; later ones raise RuntimeError if the total moved, or with `ordered` the samples' order.

    A sum of losses, each divided by a total of its own, takes a pass that counts before.  again: there will be several
    passes, so that the data has to be readable again.  instead: what else helps where the total moves.  group: the
    ranks whose samples count too.
    """

    def __init__(
        self,
        model: Any,
        loss: Loss,
        data: Data,
        around: Callable[[], AbstractContextManager[T]],
        *,
        output: Output | None = None,
        seed: int = 0,
        again: bool = True,
        ordered: bool = False,
        instead: str = "",
        group: Group = None,
    ):
        self.parameters: dict[str, nn.Parameter] = trees.parameters(model)
        self.model, self.loss, self.data, self.around, self.output = model, loss, data, around, output
        self.device = next(iter(self.parameters.values())).device
        self.stream, self.group, self.instead = RandomStream(seed, self.device), group, instead
        self.pair = batch_data.as_batch(data)
        self.single = self.pair is not None
        self.order: list[float] | None = [] if ordered else None  # of each batch, a number that follows its order
        self.passes, self.samples, self.normalizer, self.total = 0, 0, 0.0, 0.0
        self.batches = 0  # of a pass
        self.latest = 0.0  # total of the batch at hand
        self.counted: list[float] = []  # what the loss's terms divide by on it, in the first pass
        settle = len(loss.terms) > 1 and not self.single
        if (again or settle) and isinstance(data, Iterator):
            why = f"two passes {'count and add up a sum of losses' if settle else 'or more are needed'}"
            raise ValueError(
                f"data is a {type(data).__name__}, which can be read only once, but {why}; expected a batch, or what "
                "can be iterated again, such as a list of batches or a DataLoader."
            )
        if settle:
            self._settle()

    @property
    def factor(self) -> float:
        """a = 1 / normalizer: of the loss as reduced over all batches."""
        return 1 / self.normalizer

    @property
    def values(self) -> dict[str, Tensor]:
        """The parameters as they are."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def __iter__(self) -> Iterator[tuple[T, Tensor, Any]]:
        return self.inside(self.around)

    def inside(self, around: Callable[[], AbstractContextManager[T]]) -> Iterator[tuple[T, Tensor, Any]]:
        """One pass whose forward passes are made inside ``with around()``."""
        total = 0.0
        for index, (inside, f, y) in enumerate(self._outputs(around)):
            total += self._look(f, y, index)
            yield inside, f, y
            del inside, f, y  # not to be held while the next batch runs
        if self.passes == 0:
            self.total = total
            if self.normalizer <= 0 and self.group is None:
                raise NoTargets("every target of every batch is ignored or has zero class weight, so the mean loss is "
                                "0/0; expected at least one target that counts.")  # fmt: skip
        elif self._differ(total, self.total, abs(self.total)):
            raise RuntimeError(
                f"the summed loss moved from {self.total:.8g} to {total:.8g} between two passes over the data, so the "
                "passes do not see one function; expected the same samples and values on each pass. Turn random "
                f"augmentation, drop_last with shuffling, and changes of mode or parameters off{self.instead}."
            )
        self.passes += 1

    def _outputs(self, around: Callable[[], AbstractContextManager[T]]) -> Iterator[tuple[T, Tensor, Any]]:
        model = unwrapped(self.model)
        self.stream.rewind()
        pair = self.pair
        iterator = batch_data.batches(self.data) if pair is None else iter([pair])
        while True:
            with self.stream if pair is None else _AS_IT_IS:  # a loader may draw
                batch = next(iterator, None)
            if batch is None:
                return
            inputs, y = batch
            with self.stream, around() as inside:
                f = batch_data.call(model, inputs, self.output)
            self._ran(inside, inputs, f)
            del batch, inputs
            yield inside, f, y
            del inside, f, y

    def _ran(self, inside: T, inputs: Inputs, f: Tensor) -> None:
        """What is to be noted of a forward pass, before its inputs go."""

    def _look(self, f: Tensor, y: Any, index: int) -> float:
        """Check a batch, and count it on the first pass; its summed loss."""
        with own_arithmetic(self.device), DisableTorchFunction():
            if self.passes == 0:
                self._count(f, y)
            losses = self.loss.sample_losses(f if isinstance(self.loss, Opaque) else full(f), y).detach()
            if self.order is not None:
                self._follow(losses, index)
            self.latest = batch_data.check_finite(losses.sum()).item()
            return self.latest

    def _count(self, f: Tensor, y: Any) -> None:
        self.loss.check(f, y)
        if self.samples and self.loss.reduction == "whole":
            raise ValueError("the loss is a plain callable, which does not tell how it divides, and the data has "
                             "several batches; expected one batch, a callable with .reduction == 'sum', a torch loss "
                             "module that paraboloid knows, or a subclass of pb.Loss.")  # fmt: skip
        self.samples += len(f) if f.dim() else 1
        self.batches += 1
        self.counted = normalizers(self.loss, f, y)
        m = self.loss.normalizer(f.detach(), y) if len(self.counted) > 1 else self.counted[0]
        self.normalizer = m if self.loss.reduction in ("sum", "whole") else self.normalizer + m

    def _follow(self, losses: Tensor, index: int) -> None:
        """Note the order of a batch's samples on the first pass, compare it on later ones."""
        assert self.order is not None
        found = (losses * torch.linspace(1, 2, len(losses), dtype=losses.dtype, device=losses.device)).sum().item()
        if self.passes == 0:
            self.order.append(found)
            return
        expected = self.order[index] if index < len(self.order) else 0.0
        if self._differ(found, expected, max(abs(found), abs(expected))):
            raise RuntimeError(
                f"batch {index} does not hold the samples of the first pass in their order, to which the drawn labels "
                f"belong; expected the same batches on each pass. Turn shuffling off{self.instead}."
            )

    def _differ(self, found: float, expected: float, scale: float) -> bool:
        dtype = next(iter(self.parameters.values())).dtype
        return abs(found - expected) > torch.finfo(dtype).eps ** 0.75 * scale

    def _settle(self) -> None:
        """A sum of losses, each term divided by its own total over all batches (of all ranks)."""
        totals, samples = [0.0] * len(self.loss.terms), 0
        for _, f, y in self._outputs(self.around):
            self.loss.check(f, y)
            samples += len(f)
            for i, term in enumerate(self.loss.terms):
                with suppress(NoTargets):
                    totals[i] += term.normalizer(f.detach(), y)
        if self.group is not None:
            samples, *totals = map(sum, zip(*collectives.gathered((samples, *totals), self.group), strict=True))
        totals = [1.0 if t.reduction == "sum" else m for t, m in zip(self.loss.terms, totals, strict=True)]
        if min(totals) <= 0:
            raise NoTargets("every target of every batch is ignored or has zero class weight for a term of the loss, "
                            "so its mean is 0/0; expected at least one target that counts.")  # fmt: skip
        self.loss = settled(self.loss, totals, samples)


@contextmanager
def recorded(model: nn.Module, verify: str | bool = "auto", twice: bool = False) -> Iterator[Recording]:
    """Inside, a forward pass is recorded with gradients on, and moves no buffer of the model."""
    double = twice_differentiable() if twice else nullcontext()
    with copied_buffers(model), torch.inference_mode(False), torch.enable_grad(), record(model, verify) as tape, double:
        yield tape


class OverData(Passes[Recording]):
    """Quantities of all the data, as one big batch: their running values are added up, batch by batch.

    Labels are drawn from one generator, batch after batch, the same on every pass.  With `again` a single batch runs
    forward once: its recording is kept, and the pulled vectors too if they fit into `max_memory` bytes (default 1 GiB).
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Data,
        *,
        output: Output | None = None,
        seed: int = 0,
        max_memory: int | None = None,
        again: bool = False,
        verify: str | bool = "auto",
        twice: bool = False,
        group: Group = None,
    ):
        self.seed, self.again, self.max_memory = seed, again, max_memory
        self.kept: tuple[Recording, Tensor, Any] | None = None
        around = partial(recorded, model, verify, twice)
        super().__init__(
            model, Loss.from_torch(loss_fn), data, around, output=output, seed=seed, again=again, group=group
        )  # fmt: skip

    def _ran(self, inside, inputs, f):
        inside.runs_again(self.model, inputs, self.device, self.seed, self.output, f)

    def __iter__(self) -> Iterator[tuple[Recording, Tensor, Any]]:
        if self.kept is not None:
            yield self.kept
            return
        for tape, f, y in self.inside(self.around):
            if self.single and self.again:
                tape.room = RECORDINGS.of(self.max_memory)
                self.kept = tape, f, y
            yield tape, f, y
            del tape, f, y

    def by_batch(
        self, quantities: Iterable[Quantity], generator: torch.Generator | None = None, accumulate: bool = False
    ) -> Iterator[tuple[Sums, Tensor, Any]]:
        """(sums, output, targets) of each batch of one pass."""
        generator = torch.Generator(self.device).manual_seed(self.seed) if generator is None else generator
        for tape, f, y in self:
            with DisableTorchFunction(), own_arithmetic(self.device):
                values, gradient = tape.running(self.loss, f, y, quantities, generator, self.max_memory, accumulate)
                counted = normalizers(self.loss, f, y) if self.passes else self.counted
            yield Sums(len(f), counted, self.latest, values, gradient, tape.left_out), f, y
            del tape, f, y, values, gradient

    def sums(
        self, quantities: Sequence[Quantity], generator: torch.Generator | None = None, accumulate: bool = False,
        outputs: list[Tensor] | None = None,
    ) -> Sums:  # fmt: skip
        """Those of all batches in one pass, whose outputs are added to a list that is given."""
        quantities = [q if self.single else q.over_batches() for q in quantities]
        whole: Sums | None = None
        for sums, f, _ in self.by_batch(quantities, generator, accumulate):
            if outputs is not None:
                outputs.append(f.detach())
            with torch.no_grad(), own_arithmetic(self.device):
                whole = merged(quantities, self.loss, whole, sums)
            del sums, f
        assert whole is not None
        return whole
