"""Whether a model still consists of the modules and parameters that it had."""

from __future__ import annotations

from torch import nn

from paraboloid.passes.torch_internals import own_parts


class ModuleTree:
    """The modules of a model, and a cheap question: are they, and their parameters, the same objects?"""

    def __init__(self, root: nn.Module):
        self.modules = list(root.modules())
        self._held = [(part, list(part.values())) for module in self.modules for part in own_parts(module)]  # by id
        self._ids = [(part, list(map(id, held))) for part, held in self._held]

    def is_unchanged(self) -> bool:
        return all(list(map(id, part.values())) == ids for part, ids in self._ids)
