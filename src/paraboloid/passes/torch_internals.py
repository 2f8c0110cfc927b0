"""Every private or undocumented part of torch that we touch, named by what it tells; a test says what depends on each.

Names stand for torch's own objects where a call of ours in between would cost; they are then C functions or constants.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils.flop_counter import flop_registry

_torch: Any = torch  # some names below are not among its typed ones

# --- calls of torch -----------------------------------------------------------------------------------------------

DisableTorchFunction: Any = _torch._C.DisableTorchFunction  # context: modes and subclasses do not see what runs inside
EnableTorchFunction: Any = _torch._C._EnableTorchFunction  # context: inside the one above they see again
PLAIN_RESULTS = _torch._C._disabled_torch_function_impl  # as `__torch_function__`: a subclass whose results are tensors
weight_norm: Callable[..., Tensor] = _torch._VF._weight_norm  # what torch.nn.utils.parametrizations.weight_norm calls
unsafe_view: Callable[..., Tensor] = torch.ops.aten._unsafe_view  # a view that autograd takes for a tensor of its own
foreach_add, foreach_add_ = _torch._foreach_add, _torch._foreach_add_
foreach_mul, foreach_mul_ = _torch._foreach_mul, _torch._foreach_mul_
foreach_norm = _torch._foreach_norm
foreach_lerp_ = _torch._foreach_lerp_
foreach_addcmul_, foreach_div, foreach_sqrt = _torch._foreach_addcmul_, _torch._foreach_div, _torch._foreach_sqrt
flattened: Callable[[Sequence[Tensor]], Tensor] = _torch._C._nn.flatten_dense_tensors  # entries in turn; of one: a view


class DispatchMode(TorchDispatchMode):
    """torch's, whose handler is called as it is: torch wraps it for code that is compiled, at twice the time of a small
    operation.  For blocks in which nothing is compiled (`eager_code`)."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


# Operation by id (hashing one is a call of its own) -> itself, kept alive for its id; the formulas known; its own.
_FLOPS: dict[int, tuple[Any, int, Callable[..., int] | None]] = {}
_NO_FLOPS = (None, 0, None)


def flops_of(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Floating-point operations of what a dispatch mode sees, by torch's formula; 0 where it has none."""
    packet = func._overloadpacket
    held, formulas, count = _FLOPS.get(id(packet), _NO_FLOPS)
    if held is None or formulas != len(flop_registry):  # first seen, or a formula was registered since
        count = flop_registry.get(packet)
        _FLOPS[id(packet)] = packet, len(flop_registry), count
    if count is None:
        return 0
    by_shapes = getattr(count, "__wrapped__", None)  # without the search for tensors in nested arguments
    if by_shapes is None or kwargs or not isinstance(result, Tensor):
        return count(*args, **kwargs, out_val=result)
    return by_shapes(*[a.shape if isinstance(a, Tensor) else a for a in args], out_shape=result.shape)


def seen_inside(op: Callable) -> Callable | None:
    """A composite Python function of torch with its own code, which shows modes the calls that it consists of; else
    None.  Such a function begins by asking `has_torch_function..`, a name that its copy reads as no."""
    if not isinstance(op, types.FunctionType):
        return None
    switches = [n for n in op.__code__.co_names if n.startswith("has_torch_function")]
    if not switches or "__class__" in op.__code__.co_freevars:  # a Tensor method calls super(), which is itself again
        return None
    blind = op.__globals__ | dict.fromkeys(switches, lambda *_: False)
    function = types.FunctionType(op.__code__, blind, op.__name__, op.__defaults__, op.__closure__)
    function.__kwdefaults__ = op.__kwdefaults__
    return function


# --- tensors ------------------------------------------------------------------------------------------------------

is_view: Callable[[Tensor], bool] = Tensor._is_view
base_of: Callable[[Tensor], Tensor | None] = _torch.Tensor._base.__get__  # what autograd takes for the owner of a view
storage_place = attrgetter("_cdata")  # of an untyped storage: the same for all tensors in it
_VERSION = _torch.Tensor._version.__get__


gradient_hooks = attrgetter("_backward_hooks")  # a dict of those that `register_hook` noted; None where there are none
post_gradient_hooks = attrgetter("_post_accumulate_grad_hooks")


def version(t: Tensor) -> int:
    """How often t was modified in place; tensors made under inference_mode do not count."""
    return 0 if t.is_inference() else t._version


def versions(ts: Sequence[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, ts))
    except RuntimeError:  # one of inference_mode
        return [version(t) for t in ts]


casts_somewhere: Callable[[], bool] = _torch._C._is_any_autocast_enabled  # whether autocast is on for any device


def saved_tensor_hooks() -> Any:
    """Those that pack what autograd saves now (a checkpoint, offloading to the host); None where there are none."""
    return _torch._C._autograd._top_saved_tensors_default_hooks(False)


# --- modules ------------------------------------------------------------------------------------------------------

own_tensors = attrgetter("_parameters", "_buffers")  # two dicts of a module, without its children's
own_buffers = attrgetter("_buffers")
own_parts = attrgetter("_modules", "_parameters")  # two dicts of a module
own_modules = attrgetter("_modules")
# What torch.compile, fully sharded data parallel and checkpoint wrappers put into parameters' names.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
COMPILER = "torch._dynamo"  # the module that is imported by the first torch.compile


def inside_compiled(model: Any) -> nn.Module | None:
    """The module that `torch.compile(module)` runs; None where the model is not of this kind."""
    if not isinstance(model, nn.Module):
        return None
    found, children = model.__dict__.get("_orig_mod"), model._modules
    if found is None and "_orig_mod" in children:  # a scripted module's children have no `get`
        found = children["_orig_mod"]
    return found


def changes_inputs(model: Any) -> bool:
    """Whether a model may compute with other arguments than it is called with: hooks, torch.compile, no module."""
    return not isinstance(model, nn.Module) or bool(model._forward_pre_hooks) or inside_compiled(model) is not None


def compiled_in_place(module: Any) -> bool:
    """Whether `module.compile()` was called, which compiles hooks with it."""
    return getattr(module, "_compiled_call_impl", None) is not None


def running_data_parallel() -> nn.Module | None:
    """The DistributedDataParallel wrapper whose forward pass is under way."""
    return getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)


# --- autograd ----------------------------------------------------------------------------------------------------

_ENGINE = _torch.autograd.Variable._execution_engine


def gradients_at(f: Tensor, inputs: tuple[Any, ...], v: Tensor) -> tuple[Any, ...]:
    """`torch.autograd.grad(f, inputs, v, retain_graph=True, allow_unused=True)` for v of f's shape and type, without
    its checks: half of what a pull through a small network takes."""
    return _ENGINE.run_backward((f,), (v,), True, False, inputs, True, accumulate_grad=False)


# --- autograd's graph ---------------------------------------------------------------------------------------------

LEAF = "variable"  # attribute of the nodes that add to a leaf's .grad: the leaf
REENTRANT_CHECKPOINT = "CheckpointFunctionBackward"  # the type of its node


def is_custom(node: Any) -> bool:
    """Whether it is that of an `autograd.Function` written in Python, whatever its name."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def operation(node: Any) -> str:
    """What a node of autograd's graph goes back through, as torch names it: "Relu" for a ReluBackward0.

    A user's own function is "Function Relu", whatever torch calls by that name.
    """
    if is_custom(node):
        return f"Function {node.name().removesuffix('Backward')}"
    return re.sub(r"Backward\d*$", "", node.name())


def shape_of(edge: GradientEdge) -> torch.Size:
    """The shape of the tensor that a graph edge stands for."""
    node: Any = edge.node
    return torch.Size(node._input_metadata[edge.output_nr].shape)


_SHAPE = attrgetter("shape")


def output_shapes(node: Any) -> list[Sequence[int]]:
    """The shapes of what the operation of a node returned."""
    return list(map(_SHAPE, node._input_metadata))


def output_shape(node: Any, nr: int) -> Sequence[int]:
    """One of them."""
    return node._input_metadata[nr].shape


def zeros_of(node: Any, nr: int) -> Tensor:
    """Zeros of the shape, type and device of what the operation of a node returned."""
    meta = node._input_metadata[nr]
    return torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)


def output_count(node: Any) -> int:
    """How many results the operation of a node had; `node(*gradients)` takes as many."""
    return len(node._input_metadata)


def _signed(value: int) -> int:
    """A saved dimension: autograd keeps -1 as 2^64 - 1."""
    return value - 2**64 if value >= 2**63 else value


def named_dims(node: Any, rank: int) -> set[int] | None:
    """The dimensions that a node's operation works along; None for all, or none."""
    for name in ("_saved_dim", "_saved_dims", "_saved_dimension"):
        if hasattr(node, name):
            dims = getattr(node, name)
            dims = (dims,) if isinstance(dims, int) else dims
            return {_signed(d) % rank for d in dims} if dims else None
    return None


def axes_of_input(node: Any, rank: int) -> list[int]:
    """For each axis of a transposed or permuted output, the axis of the input that it is."""
    dims = getattr(node, "_saved_dims", None)
    if dims is not None:
        return [_signed(d) % rank for d in dims]
    order = list(range(rank))
    first, second = (_signed(d) % rank for d in (getattr(node, "_saved_dim0", 0), getattr(node, "_saved_dim1", 1)))
    order[first], order[second] = order[second], order[first]
    return order


def padding(node: Any) -> Sequence[int]:
    """Of a padding by constants: before and after, the last axis first."""
    return node._saved_pad


def indexed_dims(node: Any) -> list[int]:
    """The dimensions that an advanced indexing gives indices for."""
    return [k for k, index in enumerate(node._saved_indices) if index is not None]


def index_of(node: Any) -> Tensor | None:
    """What a node's operation indexes one dimension by; None where that are several, or there was nothing to keep."""
    index = getattr(node, "_saved_index", None)
    if index is not None or not hasattr(node, "_saved_indices"):
        return index
    found = node._saved_indices
    given = (found,) if isinstance(found, Tensor) else tuple(i for i in found if i is not None)
    return given[0] if len(given) == 1 else None


def factor_of(node: Any, other: int) -> Tensor | None:
    """Of a product of two (behind a summand or not), the factor beside the one that is the node's input `other`."""
    left, right = (
        next((getattr(node, n) for n in names if getattr(node, n, None) is not None), None)
        for names in (("_saved_mat1", "_saved_self"), ("_saved_mat2", "_saved_vec", "_saved_other"))
    )
    return left if other else right


def normalised_dims(node: Any) -> int:
    """How many of the last dimensions a layer norm is taken over."""
    return len(node._saved_normalized_shape)


def trained_statistics(node: Any) -> bool:
    """Whether a batch norm's node normalised with the statistics of its batch."""
    return node._saved_training


def maxima(node: Any) -> Tensor:
    """Where a max pooling found its results, as flat places within a plane of the input."""
    return node._saved_result1
