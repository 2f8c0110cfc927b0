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
    found = _walk(model) if _names_its_modules_plainly(model) else None
    return _modules(model) if found is None else list(found)


def named_parameters_of(model: Any) -> dict[str, nn.Parameter]:
    """`model.named_parameters()`, each parameter by its first name."""
    found = _walk(model) if _names_its_parameters_plainly(model) else None
    return dict(model.named_parameters()) if found is None else _parameters(found)


def modules_and_parameters_of(model: Any) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The modules and the parameters, as `modules_of` and `named_parameters_of` have them, in one walk."""
    plain = _names_its_modules_plainly(model) and _names_its_parameters_plainly(model)
    if plain and (found := _walk(model)) is not None:
        return list(found), list(_parameters(found).values())
    return modules_of(model), list(named_parameters_of(model).values())


def _names_its_modules_plainly(model: Any) -> bool:
    return isinstance(model, nn.Module) and type(model).modules is nn.Module.modules


def _names_its_parameters_plainly(model: Any) -> bool:
    kind = type(model)
    return isinstance(model, nn.Module) and (kind.named_parameters, kind._named_members) == (_PARAMETERS, _MEMBERS)


def _modules(model: Any) -> list[nn.Module]:
    return list(model.modules()) if hasattr(model, "modules") else []


def _parameters(found: dict[nn.Module, str]) -> dict[str, nn.Parameter]:
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
