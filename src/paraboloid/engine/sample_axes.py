"""Prove from the graph alone that samples do not mix on the way from the output to every recorded call.

`sample_independence` finds out by numbers, which holds for the numbers it saw: an adjacency matrix, a sort, a branch
whose scale is still zero can change without changing shapes.  Here the axis that holds the samples is followed down the
autograd graph, node by node; what a node does to it follows from its kind, shapes and saved integers, so the answer
holds for every value.  A node of another kind, or one that touches the samples' axis, ends the proof: then numbers have
to be asked each time.  It costs no arithmetic, a few microseconds for each node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from paraboloid.engine.sample_independence import Layout, Layouts
from paraboloid.passes.torch_internals import (
    axes_of_input,
    indexed_dims,
    named_dims,
    normalised_dims,
    output_shape,
    output_shapes,
    padding,
    trained_statistics,
)  # fmt: skip

Shape = Sequence[int]
# (node, shape of its output, layout of the samples there, which input, the input's shape) -> the layout there
Rule = Callable[[Any, Shape, Layout, int, Shape], Layout | None]


def _aligned(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """Axes correspond from the right, and the samples' axis is not broadcast."""
    axis = at.axis - len(out) + len(below)
    return Layout(axis, at.sizes) if axis >= 0 and below[axis] == out[at.axis] else None


def _reshaped(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """The elements keep their order: sample n is (flat position // inner) % N in both shapes."""
    _, N, b = at.sizes
    inner = b
    for size in out[at.axis + 1 :]:
        inner *= size
    behind = 1
    for axis in range(len(below) - 1, -1, -1):
        size = below[axis]
        if inner < behind * size:
            rest, over = divmod(inner, behind)
            return None if over or size % (rest * N) else Layout(axis, (size // (rest * N), N, rest))
        behind *= size
    return None


def _transposed(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    return Layout(axes_of_input(node, len(out))[at.axis], at.sizes)


def _along(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """Works along some dimensions (softmax, cumsum, cat, flip, gather), which must not be the samples'."""
    dims = named_dims(node, len(below))
    return None if dims is None or at.axis in dims else _aligned(node, out, at, i, below)


def _reduced(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """Some dimensions of the input are summed over; the output has them with length one, or not at all."""
    dims = named_dims(node, len(below))
    if dims is None:
        return None
    if len(out) == len(below):
        return None if at.axis in dims else _aligned(node, out, at, i, below)
    axis = [k for k in range(len(below)) if k not in dims][at.axis]
    return Layout(axis, at.sizes) if below[axis] == out[at.axis] else None


def _stacked(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    dims = named_dims(node, len(out)) or {at.axis}
    return None if at.axis in dims else Layout(at.axis - (at.axis > min(dims)), at.sizes)


def _windows(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """Tensor.unfold: the windows' elements come last."""
    dims = named_dims(node, len(below)) or {at.axis}
    return None if at.axis in dims or at.axis == len(below) else Layout(at.axis, at.sizes)


def _padded(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    pads = padding(node)[2 * (len(out) - 1 - at.axis) :][:2]
    return None if any(pads) else _aligned(node, out, at, i, below)


def _indexed(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """Advanced indexing, of neighbouring dimensions behind the samples' axis."""
    used = indexed_dims(node)
    neighbours = used == list(range(used[0], used[-1] + 1)) if used else False
    return _first_axes(at, below, out, used[0]) if neighbours else None


def _first_axes(at: Layout, below: Shape, out: Shape, count: int) -> Layout | None:
    """The first `count` axes are left alone."""
    return at if at.axis < count and len(below) > at.axis and below[at.axis] == out[at.axis] else None


def _batched(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """Convolutions, pooling, group norm: axis 0 is the batch, and the first input the data."""
    return _first_axes(at, below, out, 1) if i == 0 else None


def _attention(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    return _first_axes(at, below, out, len(out) - 2) if i < 3 else None


def _layer_norm(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    return _first_axes(at, below, out, len(out) - normalised_dims(node)) if i == 0 else None


def _batch_norm(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
    """With the statistics of a batch the channels alone are apart (instance norm puts the samples there)."""
    return at if i == 0 and (not trained_statistics(node) or at.axis == 1) else None


def _product(added: int, batch: int) -> Rule:
    """left [*batch R K] @ right [*batch K C] behind `added` summands: rows come from left, columns from right."""

    def rule(node: Any, out: Shape, at: Layout, i: int, below: Shape) -> Layout | None:
        if i < added:
            return _aligned(node, out, at, i, below)
        own = at.axis < batch or at.axis == batch + i - added
        return Layout(at.axis, at.sizes) if own and below[at.axis] == out[at.axis] else None

    return rule


# Names of autograd's nodes, without "Backward" and number.
KINDS: dict[str, Rule] = {
    **dict.fromkeys((
        "Abs", "Acos", "Acosh", "Add", "Addcdiv", "Addcmul", "Alias", "Asin", "Asinh", "Atan", "Atan2", "Atanh", "Ceil",
        "Celu", "Clamp", "ClampMax", "ClampMin", "Clone", "Cos", "Cosh", "Div", "Elu", "Erf", "Erfc",
        "Exp", "Exp2", "Expand", "Expm1", "Floor", "Fmod", "Gelu", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh",
        "Hypot", "LeakyRelu", "Lerp", "Lgamma", "Log", "Log10", "Log1P", "Log2", "LogSigmoid", "Logaddexp", "Logit",
        "MaskedFill", "Maximum", "Minimum", "Mish", "Mul", "NanToNum", "NativeDropout", "Neg", "Pow", "PreluKernel",
        "Reciprocal", "Relu", "Remainder", "Repeat", "Round", "RreluWithNoise", "Rsqrt", "Sigmoid", "Sign", "Silu",
        "Sin", "Sinc", "Sinh", "Slice", "Softplus", "Softshrink", "Split", "SplitWithSizes", "Sqrt", "Sub",
        "Tan", "Tanh", "Threshold", "ToCopy", "Tril", "Triu", "Trunc", "UnsafeSplit", "Where", "Xlogy",
    ), _aligned),
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("T", "Transpose", "Permute"), _transposed),
    **dict.fromkeys((
        "Cat", "Cummax", "Cummin", "Cumprod", "Cumsum", "Flip", "Gather", "Glu", "IndexAdd", "IndexCopy", "IndexReduce",
        "IndexSelect", "LogSoftmax", "Logcumsumexp", "Roll", "SafeSoftmax", "ScatterAdd", "ScatterReduce", "Softmax",
        "Sort", "Topk",
    ), _along),
    **dict.fromkeys((
        "Amax", "Amin", "Aminmax", "Kthvalue", "LinalgVectorNorm", "Logsumexp", "Max", "Mean", "Median", "Min", "Norm",
        "Prod", "Select", "Std", "Sum", "Unbind", "Var",
    ), _reduced),
    "Stack": _stacked,
    "Unfold": _windows,
    "ConstantPadNd": _padded,
    "Index": _indexed,
    **dict.fromkeys((
        "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "AvgPool2D", "AvgPool3D",
        "Col2Im", "Convolution", "CudnnConvolution", "Im2Col", "MaxPool2DWithIndices", "MaxPool3DWithIndices",
        "NativeGroupNorm", "PixelShuffle", "PixelUnshuffle", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D",
        "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D", "UpsampleBicubic2D", "UpsampleBilinear2D",
        "UpsampleLinear1D", "UpsampleNearest1D",
        "UpsampleNearest2D", "UpsampleNearest3D", "UpsampleTrilinear3D",
    ), _batched),
    **dict.fromkeys(("NativeLayerNorm", "FusedRmsNorm"), _layer_norm),
    **dict.fromkeys(("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"), _batch_norm),
    **dict.fromkeys((
        "ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention", "ScaledDotProductEfficientAttention",
        "ScaledDotProductCudnnAttention",
    ), _attention),
    "Mm": _product(0, 0),
    "Addmm": _product(1, 0),
    "Bmm": _product(0, 1),
    "Baddbmm": _product(1, 1),
    "Mv": lambda node, out, at, i, below: at if i == 0 else None,
}  # fmt: skip
_rules: dict[type, Rule | None] = {}  # by the node's own type, which a user's autograd Function does not share


def kind_of(node: Any) -> str:
    """The name of a node of torch's own; nothing for that of a user's Function, whatever its name."""
    kind = type(node)
    return "" if issubclass(kind, BackwardCFunction) else kind.__name__.rstrip("0123456789").removesuffix("Backward")


def _rule_of(node: Any) -> Rule | None:
    kind = type(node)
    if kind not in _rules:
        _rules[kind] = KINDS.get(kind_of(node))
    return _rules[kind]


def sample_axes(
    f: Tensor, edges: Sequence[Any], batch_statistics: bool = False, between: Rule | None = None
) -> Layouts | None:
    """The layout of the samples at every edge (None where no path leads to it), or None where nothing is proved.

    f [N, ...] has them on axis 0; `edges` are the graph edges of the recorded calls' outputs.  With
    `batch_statistics` batch norms in training mode count as if their statistics were constants.  `between` is asked
    where a node has no rule or its rule finds no layout.
    """
    order = _ordered(f.grad_fn, {edge.node for edge in edges})
    found: dict[tuple[Any, int], Layout] = {(f.grad_fn, f.output_nr): Layout(0, (1, len(f), 1))}
    for node in order:
        shapes = output_shapes(node)
        at: list[tuple[int, Layout]] = []
        for nr in range(len(shapes)):
            if (layout := found.get((node, nr))) is not None:
                at.append((nr, layout))
        rule = _rule_of(node)
        if rule is _batch_norm and batch_statistics:
            rule = _aligned
        for i, (below, nr) in enumerate(node.next_functions):
            if below not in order:
                continue  # nothing recorded lies there: a weight, an input
            shape = output_shape(below, nr)
            for place, layout in at:
                there = None if rule is None else rule(node, shapes[place], layout, i, shape)
                if there is None and between is not None:
                    there = between(node, shapes[place], layout, i, shape)
                if there is None or found.setdefault((below, nr), there) != there:
                    return None
    return [found.get((edge.node, edge.output_nr)) for edge in edges]


def _ordered(top: Any, wanted: set[Any]) -> dict[Any, None]:
    """The nodes on paths from `top` to the wanted ones, each behind all that lead to it."""
    leads: dict[Any, bool] = {}
    finished: list[Any] = []
    stack = [(top, False)]
    while stack:
        node, done = stack.pop()
        if done:
            leads[node] = node in wanted
            for below, _ in node.next_functions:
                if leads.get(below):
                    leads[node] = True
                    break
            finished.append(node)
        elif node not in leads:
            leads[node] = False
            stack.append((node, True))
            for below, _ in node.next_functions:
                if below is not None and below not in leads:
                    stack.append((below, False))
    return {node: None for node in reversed(finished) if leads[node]}
