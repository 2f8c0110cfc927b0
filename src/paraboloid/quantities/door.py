"""The public door to everything that one forward pass and a few pulls give besides the gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from paraboloid.data import batches as batch_data
from paraboloid.data.batches import Data, Output
from paraboloid.distributed import collectives
from paraboloid.distributed.collectives import AllReduce
from paraboloid.losses import Loss
from paraboloid.quantities.named import resolve
from paraboloid.quantities.over_data import OverData
from paraboloid.quantities.quantity import Quantity
from paraboloid.quantities.recording import forward
from paraboloid.quantities.result import Statistics, of_sums
from paraboloid.quantities.sums import check_summable


def statistics(
    model: nn.Module,
    loss_fn: nn.Module | Loss,
    batch: Data,
    quantities: Iterable[str | Quantity] | str | Quantity,
    *,
    seed: int = 0,
    generator: torch.Generator | None = None,
    max_memory: int | None = None,
    accumulate_grad: bool = False,
    all_reduce: AllReduce = False,
    tol: float = 0.0,
    output: Output | None = None,
    verify: str | bool = "auto",
) -> Statistics:
    """More than the gradient of one batch, from one forward pass and the fewest pulls; or of several as one.

    model            any nn.Module; only parameters with requires_grad take part
    loss_fn          CrossEntropyLoss, MSELoss, BCEWithLogitsLoss (all options, mean or sum) or a `pb.Loss`
    batch            (inputs, targets), or a dict with "labels"; or an iterable of such batches (a DataLoader): the
                     result is that of one big batch, with per-sample quantities joined in order; labels are drawn from
                     the one generator, batch after batch.  Batch norm in training mode takes each batch's statistics;
                     "gram" holds all gradients, "kfra" is of one batch only.  A sum of losses reads the data twice
    quantities       names ("grad", "variance", "kfac", ...) or objects of `pb.quantities`; scalings are theirs
    seed, generator  for sampled labels, and for dropout in a model that is in training mode
    max_memory       bytes, an upper aim for temporary memory; the smallest chunk never raises
    accumulate_grad  also add the gradient of the loss to `.grad`, as backward() would
    all_reduce       True or a `torch.distributed` process group: quantities, loss and accumulated gradient are those of
                     one big batch, the samples of all ranks together, whatever the number of each; per-sample ones
                     (sample_grads, square_norms, gram, sqrt_ggn, ...) stay those of this rank.  All ranks must call
    tol              relative trace of the loss's Hessians, over the samples of a batch, that "diag_ggn", "kflr",
                     "sqrt_ggn" and "sample_diag_ggn" may leave out.  Each sample's own largest directions are pulled
                     back, as few as that takes: for many classes a fraction of the pulls.  Where some samples need many
                     more than others, the model runs once more, on copies of these.  What is left out is positive
                     semi-definite, so results are never above the exact ones (tr, diagonal); its part of the trace in
                     output space is certain, and is in `stats.left_out[quantity]`.  In a parameter's block the part
                     follows the gradients of what is left out: of that order, not bounded by it.  0: exact
    output           picks the output tensor from a structured result, e.g. ``lambda o: o.logits``
    verify           how often sample independence is certified by numbers (two extra pulls): "auto" (when a sequence
                     of calls and shapes is first seen, on its calls 2, 4, 8, ..., and wherever the graph alone is no
                     proof), "once" (not on calls 2, 4, ...), "always" or False

    Returns `Statistics`: ``stats["variance"]["conv1.weight"]``, ``stats.loss``, ``stats.output``,
    ``stats.total(name)``.

    Raises ValueError for inputs that do not fit (the message says which and what was expected), and where the samples
    are not independent; NotImplementedError for Kronecker factors of a parameter that has none.
    Sources: BackPACK, arXiv:1912.10985; for each quantity see its class.
    """
    wanted, loss = resolve(quantities, tol), Loss.from_torch(loss_fn)
    twice, group = True in [q.twice for q in wanted], collectives.group_of(all_reduce)
    if (pair := batch_data.as_batch(batch)) is not None:
        inputs, target = pair
        masks = collectives.rank_seed(seed, group)
        with forward(model, inputs, batch_data.device_of(target), masks, output, verify, twice) as (tape, f):
            return tape.resolved(loss, f, target, wanted, seed, generator, max_memory, accumulate_grad, group)
    if group is not None:
        check_summable(wanted)
    data = OverData(
        model, loss_fn, batch, output=output, seed=collectives.rank_seed(seed, group), max_memory=max_memory,
        verify=verify, twice=twice, group=group,
    )  # fmt: skip
    outputs: list[Tensor] = []
    wanted = [q.over_batches() for q in wanted]
    sums = data.sums(wanted, generator, accumulate_grad, outputs)
    return of_sums(model, data.parameters, wanted, data.loss, sums, outputs, accumulate_grad, group)
