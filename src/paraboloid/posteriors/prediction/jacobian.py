"""The Jacobian of a batch's outputs in outer-product form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraboloid.data.batches import Inputs, Output
from paraboloid.engine.tape import Tape
from paraboloid.passes import trees
from paraboloid.posteriors.weights import only
from paraboloid.quantities.recording import forward
from paraboloid.reductions.contractions import layers, times
from paraboloid.reductions.outer import EVERYTHING, Outer
from paraboloid.reductions.products import merge


@dataclass
class Jacobian:
    """d f_k / d theta of every sample for the K elements of its output, by parameter: V = K vectors are pulled back.

    `outputs` are f [N, *shape], detached; `uses[name]` the parameter's form.
    """

    outputs: Tensor
    uses: dict[str, Outer]
    parameters: Mapping[str, Tensor]

    def dense(self) -> Tensor:
        """[N, K, D]."""
        return torch.cat([torch.cat(list(o.rows(None))) for o in self.uses.values()], 2)

    def times(self, rows: Tensor) -> Tensor:
        """J r for the rows r of a [R, D] tensor, [N, K, R]."""
        found: Tensor | None = None
        pieces = rows.split([p.numel() for p in self.parameters.values()], 1)
        parts = dict(zip(self.uses, pieces, strict=True))
        for name, bias in layers(self.uses):
            added = times(self.uses[name], parts[name], None if bias is None else parts[bias])
            found = added if found is None else found.add_(added)
        assert found is not None
        return found


@contextmanager
def recorded(
    model: nn.Module, names: list[str], inputs: Inputs, output: Output | None, verify: str | bool = "auto"
) -> Iterator[tuple[Tape, Tensor]]:
    """(tape, f) of a forward pass in evaluation of the chosen weights' Jacobian; the model is left as it was."""
    known = trees.parameters(model)
    device = next(iter(known.values())).device
    with only(model, names, known), forward(model, inputs, device, 0, output, verify) as tape_and_output:
        yield tape_and_output


def pull_outputs(tape: Tape, f: Tensor, elements: range | None = None, some: slice = EVERYTHING) -> Jacobian:
    """The Jacobian of the output elements in `elements` (default: all K); of some samples that see each other."""
    size = f[0].numel()
    chosen = torch.arange(size, device=f.device) if elements is None else torch.tensor(list(elements), device=f.device)
    v = f.new_zeros(len(chosen), 1, size)
    v[torch.arange(len(chosen), device=f.device), 0, chosen] = 1
    v = v.expand(-1, len(f), -1).reshape(-1, *f.shape)
    pulled = tape.pull(f, v, some=some)
    return Jacobian(f.detach()[some], {k: merge(uses) for k, uses in pulled.items()}, tape.parameters)
