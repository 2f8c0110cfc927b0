"""The modules of a model and their parameters in one walk, and whether they are still those that it had."""

from __future__ import annotations

from typing import Any

from torch import nn

from paraboloid.passes.torch_internals import own_modules, own_parts, own_tensors

# What `Module.modules` and `Module.named_parameters` go through, unless a class has its own.
_MODULES, _PARAMETERS, _MEMBERS = nn.Module.named_modules, nn.Module.named_parameters, nn.Module._named_members


def _walk(root: nn.Module) -> dict[nn.Module, str] | None:
    """Module -> prefix of its names, as `root.named_modules()` has them; None where a class names its own."""
    found: dict[nn.Module, str] = {}
    stack = [(root, "")]
    while stack:
        module, prefix = stack.pop()
        if module in found:
            continue
        if type(module).named_modules is not _MODULES:
            return None
        found[module] = prefix
        for name, m in reversed(own_modules(module).items()):
            if m is not None:
                stack.append((m, f"{prefix}{name}."))
    return found


def modules_of(model: Any) -> list[nn.Module]:
    """`model.modules()` in its order, without a generator for each floor of the tree; none of a plain callable."""
    if not isinstance(model, nn.Module):
        return list(model.modules()) if hasattr(model, "modules") else []
    found = _walk(model) if type(model).modules is nn.Module.modules else None
    return list(model.modules()) if found is None else list(found)


def named_parameters_of(model: Any) -> dict[str, nn.Parameter]:
    """`model.named_parameters()`, each parameter by its first name."""
    kind = type(model)
    plain = isinstance(model, nn.Module) and (kind.named_parameters, kind._named_members) == (_PARAMETERS, _MEMBERS)
    if not plain or (found := _walk(model)) is None:
        return dict(model.named_parameters())
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for module, prefix in found.items():
        for name, p in own_tensors(module)[0].items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                named[prefix + name] = p
    return named


class ModuleTree:
    """The modules of a model, and a cheap question: are they, and their parameters, the same objects?"""

    def __init__(self, root: nn.Module):
        self.modules = modules_of(root)
        self._held = [(part, list(part.values())) for module in self.modules for part in own_parts(module)]  # by id
        self._ids = [(part, list(map(id, held))) for part, held in self._held]

    def is_unchanged(self) -> bool:
        return all(list(map(id, part.values())) == ids for part, ids in self._ids)
