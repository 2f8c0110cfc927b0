"""What we take for granted about private parts of torch: where a version of torch moves one, a test here says which
function of `passes/torch_internals.py` to mend and what goes wrong until then."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from paraboloid.engine import sample_axes
from paraboloid.graph import kfra_recursion, nodes
from paraboloid.passes import torch_internals as internals

OPERATIONS = {re.sub(r"Backward\d*$", "", name) for name in dir(torch._C._functions)}
TABLES = {
    nodes: ("PIECEWISE", "SMOOTH", "VIEWS", "SUMS", "PRODUCTS", "ADDED_PRODUCTS"), kfra_recursion: ("SELECTIONS",),
    sample_axes: ("KINDS",),
}  # fmt: skip


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_function__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


# --- calls of torch -----------------------------------------------------------------------------------------------


def test_modes_do_not_see_what_runs_under_DisableTorchFunction():
    with Seen() as seen, internals.DisableTorchFunction():
        torch.ones(2).exp()
    assert not seen.ops, "DisableTorchFunction: the recorder would take our own arithmetic for the model's calls"


def test_modes_see_again_what_runs_under_EnableTorchFunction():
    with internals.DisableTorchFunction(), internals.EnableTorchFunction(), Seen() as seen:
        torch.ones(2).exp()
    assert seen.ops, "EnableTorchFunction: a model that runs again, on copies of samples, would not be recorded"


def test_gradients_at_are_those_of_autograd():
    x, unused = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    z = x.sin()
    f, v = z.square(), torch.randn(3, 2)
    inputs = (get_gradient_edge(z), x, unused)
    expected = torch.autograd.grad(f, inputs, v, retain_graph=True, allow_unused=True)
    for _ in range(2):  # the graph is kept
        found = internals.gradients_at(f, inputs, v)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[2] is None, (
            "gradients_at: pulls would take other gradients than autograd's"
        )
    assert x.grad is None, "gradients_at: a pull would add to .grad"


def test_a_subclass_with_PLAIN_RESULTS_gives_plain_tensors():
    class Mine(torch.Tensor):
        __torch_function__ = internals.PLAIN_RESULTS

    assert type(torch.ones(2).as_subclass(Mine) * 2) is torch.Tensor, (
        "PLAIN_RESULTS: arithmetic on an estimate would keep its standard error"
    )


def test_weight_norm_is_what_the_parametrization_calls():
    with Seen() as seen:
        nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))(torch.ones(1, 2))
    assert internals.weight_norm in seen.ops, (
        "weight_norm: second-order passes would take the fused kernel, whose double backward is wrong"
    )
    v, g = torch.randn(3, 2), torch.rand(3, 1)
    torch.testing.assert_close(internals.weight_norm(v, g, 0), v * g / v.norm(dim=1, keepdim=True))


def test_an_in_place_call_on_an_unsafe_view_stays_behind_it_in_the_graph():
    weight = torch.ones(2, 2, requires_grad=True)
    z = internals.unsafe_view((weight * 2).view(4), (4,))
    edge = get_gradient_edge(z)
    (g,) = torch.autograd.grad(z.mul_(3).sum(), edge)
    assert not internals.is_view(z) and torch.equal(g, torch.full((4,), 3.0)), (
        "unsafe_view: an in-place activation after F.linear on [N T D] would be routed around the recorded call"
    )


def test_foreach():
    xs, ys = [torch.ones(2), torch.full((3,), 2.0)], [torch.ones(2), torch.ones(3)]
    found = internals.foreach_mul(xs, 3.0), internals.foreach_add(xs, ys, alpha=2.0), internals.foreach_norm(xs)
    internals.foreach_mul_(xs, 2.0)
    internals.foreach_add_(xs, ys, alpha=-1.0)
    for lists, expected in zip((*found, xs), ((3, 6), (3, 4), (2**0.5, 12**0.5), (1, 3)), strict=True):
        for x, value in zip(lists, expected, strict=True):
            torch.testing.assert_close(
                x, torch.full_like(x, value), msg="foreach_*: steps of optimisers would be wrong"
            )


def test_composite_functions_are_seen_inside():
    function = internals.seen_inside(F.multi_head_attention_forward)
    assert function is not None, "seen_inside: attention would fall back to a pull per sample"
    attention = nn.MultiheadAttention(4, 2).double()
    x, used = torch.randn(3, 2, 4, dtype=torch.float64), []
    for op in (F.multi_head_attention_forward, function):
        with Seen() as seen:
            used.append(op(x, x, x, 4, 2, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0,
                           attention.out_proj.weight, attention.out_proj.bias)[0])  # fmt: skip
    assert torch.equal(*used) and F.linear in seen.ops and F.multi_head_attention_forward not in seen.ops
    for other in (F.linear, torch.exp, torch.Tensor.exp, nn.Linear, lambda x: x):
        assert internals.seen_inside(other) is None


def test_what_a_dispatch_mode_sees_has_its_operations_count():
    class Count(internals.DispatchMode):
        flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.flops += internals.flops_of(func, args, kwargs or {}, result)
            return result

    image = torch.ones(2, 3, 5, 5)
    for run, flops in (
        (lambda: torch.ones(2, 3) @ torch.ones(3, 5), 2 * 2 * 3 * 5),
        (lambda: torch.addmm(torch.ones(5), torch.ones(2, 3), torch.ones(3, 5), alpha=2.0), 2 * 2 * 3 * 5),
        (lambda: F.linear(torch.ones(2, 3), torch.ones(5, 3), torch.ones(5)), 2 * 2 * 3 * 5),
        (lambda: F.conv2d(image, torch.ones(4, 3, 3, 3), torch.ones(4)), 2 * 2 * 4 * 3 * 3 * 3 * 3 * 3),
        (lambda: image.exp(), 0),
    ):
        with Count() as count:
            run()
        assert count.flops == flops, "DispatchMode, flops_of: Footprint would misjudge what a forward pass costs"


def test_nothing_wraps_a_dispatch_mode():
    class Mode(internals.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not hasattr(Mode.__torch_dispatch__, "__wrapped__"), (
        "DispatchMode: recording a model would take three microseconds more for each of its operations"
    )


def test_flattened():
    xs = [torch.arange(6.0).view(2, 3).T, torch.tensor(7.0), torch.arange(2.0)]
    found = internals.flattened(xs)
    assert torch.equal(found, torch.tensor([0.0, 3, 1, 4, 2, 5, 7, 0, 1])), (
        "flattened: slopes along an optimiser's steps would be wrong"
    )
    found.zero_()
    assert torch.equal(xs[2], torch.arange(2.0)), "flattened: the parameters of an optimiser would be written over"


# --- tensors ------------------------------------------------------------------------------------------------------


def test_views_know_their_base():
    base = torch.ones(2, 3)
    message = "is_view, base_of: transposed and sliced weights would lose their Kronecker factors"
    assert internals.is_view(base.T) and internals.base_of(base.T[:1]) is base, message
    assert not internals.is_view(base) and internals.base_of(base) is None, message


def test_versions_move_with_in_place_changes():
    t = torch.ones(2)
    with torch.inference_mode():
        without = torch.ones(2)
    before = internals.versions([t]), internals.versions([t, without])
    t.add_(1)
    message = "version, versions: a tensor that was modified after the forward pass would give wrong numbers"
    assert internals.versions([t]) == [before[0][0] + 1] == [internals.version(t)], message
    assert internals.versions([t, without]) == [before[1][0] + 1, 0], message


def test_tensors_of_one_storage_have_one_place():
    t = torch.ones(4)
    places = [internals.storage_place(x.untyped_storage()) for x in (t, t[1:], torch.ones(4))]
    assert places[0] == places[1] != places[2], "storage_place: Footprint would count parameters as recorded graphs"
    reference = internals.StorageWeakRef(t.untyped_storage())
    assert not reference.expired()
    del t
    assert reference.expired(), "StorageWeakRef: Footprint would count storages that have gone"
    assert internals.tree_leaves({"a": [1, (2,)]}) == [1, 2]


# --- modules ------------------------------------------------------------------------------------------------------


def test_a_modules_own_tensors_are_two_dicts_that_may_be_changed():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    message = "own_tensors, own_buffers: buffers would count as data, and backward passes would move statistics"
    parameters, buffers = internals.own_tensors(module[0])
    assert list(parameters) == ["weight", "bias"] and "running_mean" in buffers, message
    assert internals.own_tensors(module) == ({}, {}), message
    other = torch.ones(2)
    internals.own_buffers(module[0])["running_mean"] = other
    assert module[0].running_mean is other, message


def test_wrappers_insert_these_names():
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    message = "WRAPPERS: wrapped models would have other parameter names than plain ones"
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    assert next(name for name, _ in compiled.named_parameters()) == internals.WRAPPERS[0] + "weight", message
    assert f"{_common_utils.FSDP_WRAPPED_MODULE}." == internals.WRAPPERS[1], message
    assert f"{checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE}." == internals.WRAPPERS[2], message


def test_compiled_models_are_known():
    model = nn.Linear(2, 2)
    message = "inside_compiled, compiled_in_place: torch.compile'd models would be recorded without their calls"
    assert internals.inside_compiled(torch.compile(model, backend="eager")) is model, message
    assert internals.inside_compiled(model) is None and not internals.compiled_in_place(model), message
    model.compile(backend="eager")
    assert internals.compiled_in_place(model), message


def test_models_that_may_change_their_inputs_are_known():
    plain, hooked, callable_ = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).forward
    hooked.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    found = [
        internals.changes_inputs(model) for model in (plain, hooked, torch.compile(plain, backend="eager"), callable_)
    ]
    assert found == [False, True, True, True], "changes_inputs: shared inputs would be looked for in other arguments"


def test_compiling_imports_the_compiler():
    torch.compile(nn.Linear(2, 2), backend="eager")
    assert internals.COMPILER in sys.modules, "COMPILER: compiled code would not run eagerly while it is recorded"


def test_the_running_data_parallel_wrapper_has_a_place():
    assert hasattr(nn.parallel.DistributedDataParallel, "_active_ddp_module"), (
        "running_data_parallel: an optimiser that was given the bare model would not be told"
    )
    assert internals.running_data_parallel() is None


# --- autograd's graph ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "table"), [(m, t) for m, tables in TABLES.items() for t in tables])
def test_every_operation_of_the_tables_exists(module, table):
    unknown = set(getattr(module, table)) - OPERATIONS
    assert not unknown, (
        f"{module.__name__}.{table}: autograd has no such nodes any more, so they would be probed or refused"
    )


@pytest.mark.parametrize("name", ["Div", "Where", "NativeBatchNorm", "CudnnBatchNorm", "WeightNormInterface"])
def test_operations_that_are_named_one_by_one_exist(name):
    assert name in OPERATIONS, f"{name}: autograd has no such node any more"


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (torch.relu, "Relu"), (torch.tanh, "Tanh"), (F.gelu, "Gelu"), (F.silu, "Silu"), (torch.t, "T"),
        (lambda x: x.view(-1), "View"), (lambda x: x + x, "Add"), (lambda x: x.sum(), "Sum"), (lambda x: x @ x.T, "Mm"),
        (lambda x: F.max_pool2d(x[None], 2), "MaxPool2DWithIndices"), (lambda x: F.softmax(x, 1), "Softmax"),
    ],
)  # fmt: skip
def test_nodes_say_what_they_go_back_through(function, name):
    z = function(torch.ones(4, 4, requires_grad=True))
    assert internals.operation(z.grad_fn) == name, (
        "operation: the tables of graph/nodes.py would know nothing, and every node would be probed"
    )


def test_nodes_know_the_shapes_of_their_results_and_can_be_applied():
    x = torch.rand(2, 6, requires_grad=True)
    first, second = x.exp().split([2, 4], 1)
    node = first.grad_fn
    message = "shape_of, output_count: walks of the graph would pull back gradients of a wrong number or shape"
    assert internals.output_count(node) == 2, message
    assert [internals.shape_of(get_gradient_edge(t)) for t in (first, second)] == [(2, 2), (2, 4)], message
    assert internals.shape_of(get_gradient_edge(x)) == (2, 6), message
    g = node(torch.ones(2, 2), None)
    assert torch.equal(g, F.pad(torch.ones(2, 2), (0, 4))), "node(*gradients): no node could be probed"
    (below, _), *_ = node.next_functions
    v = torch.ones(2, 6, requires_grad=True)
    assert below(v).grad_fn is None or below(v).requires_grad, "node(*gradients): second derivatives would be lost"


PROOF = "the proof that samples do not mix would take the wrong axis for theirs"


@pytest.mark.parametrize(
    ("function", "dims"),
    [
        (lambda x: x.softmax(-1), {2}), (lambda x: x.log_softmax(1), {1}), (lambda x: x.cumsum(-2), {1}),
        (lambda x: torch.cat([x, x], -1), {2}), (lambda x: x.flip(0, -1), {0, 2}), (lambda x: x.sum((0, -1)), {0, 2}),
        (lambda x: x.mean(1), {1}), (lambda x: x.sum(), None), (lambda x: x.amax((1, 2)), {1, 2}),
        (lambda x: x.max(-1).values, {2}), (lambda x: x.select(-1, 0), {2}), (lambda x: x.unbind(1)[0], {1}),
        (lambda x: x.unfold(-1, 2, 1), {2}), (lambda x: x.logsumexp(1), {1}), (lambda x: x.roll(1, -1), {2}),
        (lambda x: x.gather(1, torch.zeros(2, 1, 4, dtype=torch.int64)), {1}), (lambda x: x.var(1), {1}),
        (lambda x: F.glu(x, -1), {2}), (lambda x: x.index_select(1, torch.tensor([0])), {1}),
    ],
)  # fmt: skip
def test_nodes_name_the_dimensions_they_work_along(function, dims):
    z = function(torch.rand(2, 3, 4, requires_grad=True))
    assert internals.named_dims(z.grad_fn, 3) == dims, f"named_dims of {z.grad_fn.name()}: {PROOF}"


def test_a_stack_names_its_new_dimension():
    z = torch.stack([torch.rand(2, 3, requires_grad=True)] * 2, -1)
    assert internals.named_dims(z.grad_fn, 3) == {2}, f"named_dims: {PROOF}"


@pytest.mark.parametrize(
    ("function", "order"),
    [(lambda x: x.permute(2, 0, -2), [2, 0, 1]), (lambda x: x.transpose(0, -1), [2, 1, 0]), (lambda x: x.mT, [0, 2, 1]),
     (lambda x: x[0].t(), [1, 0]), (lambda x: x.movedim(0, -1), [1, 2, 0])],
)  # fmt: skip
def test_transposed_axes_are_known(function, order):
    x = torch.rand(2, 3, 4, requires_grad=True)
    z = function(x)
    assert internals.axes_of_input(z.grad_fn, z.dim()) == order, f"axes_of_input: {PROOF}"


def test_paddings_indices_and_norms_say_where():
    x = torch.rand(2, 3, 4, requires_grad=True)
    assert list(internals.padding(F.pad(x, (1, 2, 0, 3)).grad_fn)) == [1, 2, 0, 3], f"padding: {PROOF}"
    assert internals.indexed_dims(x[:, torch.tensor([0, 1])].grad_fn) == [1], f"indexed_dims: {PROOF}"
    assert internals.normalised_dims(F.layer_norm(x, (3, 4)).grad_fn) == 2, f"normalised_dims: {PROOF}"
    parts = x.split([1, 2], 1)[0].grad_fn
    assert internals.output_shapes(parts) == [[2, 1, 4], [2, 2, 4]], f"output_shapes: {PROOF}"
    assert internals.output_shape(parts, 1) == [2, 2, 4], f"output_shape: {PROOF}"


def test_leaves_hang_at_nodes_that_hold_them():
    x = torch.ones(2, requires_grad=True)
    node = get_gradient_edge(x).node
    assert getattr(node, internals.LEAF) is x, "LEAF: parameters that no call uses would be missed"
    assert not hasattr((x * 2).grad_fn, internals.LEAF)


def test_reentrant_checkpoints_have_a_node_of_their_own():
    x = torch.ones(2, requires_grad=True)
    z = torch.utils.checkpoint.checkpoint(torch.exp, x, use_reentrant=True)
    assert type(z.grad_fn).__name__ == internals.REENTRANT_CHECKPOINT, (
        "REENTRANT_CHECKPOINT: such models would be refused with an error of autograd's"
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_knows_which_statistics_it_used(training):
    x = torch.rand(4, 3, requires_grad=True)
    z = F.batch_norm(x, torch.zeros(3), torch.ones(3), training=training)
    assert internals.operation(z.grad_fn) == "NativeBatchNorm"
    assert internals.trained_statistics(z.grad_fn) is training, (
        "trained_statistics: batch norm in training mode would pass for a scale"
    )


def test_a_max_pooling_knows_where_its_results_are_from():
    x = torch.arange(16.0).view(1, 1, 4, 4).flip(3).requires_grad_()
    z = F.max_pool2d(x, 2)
    assert torch.equal(x.detach().flatten()[internals.maxima(z.grad_fn)], z.detach()), (
        "maxima: kfra would carry curvature through max pooling to wrong places"
    )


# --- one place ----------------------------------------------------------------------------------------------------

PRIVATE = re.compile(
    r"torch\._[a-zA-Z]|_input_metadata|_saved_|\._base\b|_is_view|_orig_mod|_compiled_call|\w\._parameters\b(?!\()|\._buffers\b"
    r"|_cdata|_overloadpacket|_python_dispatch|_pytree|\._version\b|_active_ddp|_fsdp_wrapped"
)


def test_private_parts_of_torch_are_touched_nowhere_else():
    package = Path(internals.__file__).parents[1]
    found = [
        f"{path.relative_to(package)}:{number}: {line.strip()}"
        for path in sorted(package.rglob("*.py")) if path != Path(internals.__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if PRIVATE.search(line)
    ]  # fmt: skip
    assert not found, "give these a name and a test in passes/torch_internals.py:\n" + "\n".join(found)
