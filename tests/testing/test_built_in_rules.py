"""Every rule and lowering of the library by `pb.testing.check_rule`: one table of cases, no entry without one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import paraboloid as pb
from paraboloid.layers import LOWERINGS, RULES


def x(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def w(*shape):
    return (1.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1))).requires_grad_()


def ids(*shape, rows=6):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(0))


MATRIX = [(x(3, 4), w(4, 5)), (x(2, 3, 4), w(4, 5)), (x(3, 4), w(4))]
BROADCAST = [(x(3, 2, 4), w(2, 4)), (x(3, 2, 4), w(2, 1)), (w(4), x(3, 4))]
CASES = {
    F.linear: [(x(4, 5), w(3, 5), w(3)), (x(2, 3, 5), w(4, 5)), lambda n: (x(n, 2, 3), w(2, 3), w(2))],
    torch.matmul: MATRIX,
    Tensor.matmul: MATRIX[:1],
    Tensor.__matmul__: MATRIX[:1],
    torch.mm: MATRIX[:1],
    Tensor.mm: MATRIX[:1],
    torch.mv: MATRIX[2:],
    Tensor.mv: MATRIX[2:],
    torch.addmm: [((w(5), x(3, 4), w(4, 5)), {"beta": 0.5, "alpha": 2.0}), ((w(3, 1), x(3, 4), w(4, 5)))],
    Tensor.addmm: [((w(1, 5), x(3, 4), w(4, 5)), {"alpha": -1})],
    torch.bilinear: [(x(3, 2), x(3, 4), w(5, 2, 4), w(5)), (x(2, 3, 2), x(2, 3, 3), w(4, 2, 3))],
    F.conv1d: [
        (x(3, 2, 6), w(4, 2, 3), w(4), 2, 1),
        ((x(2, 4, 5), w(4, 2, 2)), {"groups": 2, "padding": "same", "dilation": 2}),
    ],
    F.conv2d: [
        ((x(3, 2, 4, 5), w(4, 1, 3, 2), w(4)), {"groups": 2, "stride": (1, 2), "padding": 1, "dilation": (1, 2)})
    ],
    F.conv3d: [(x(2, 1, 2, 3, 3), w(2, 1, 2, 2, 2), w(2))],
    F.conv_transpose1d: [(x(2, 4, 3), w(4, 2, 3), w(4), 2, 1, 1, 2, 2), (x(2, 2, 3), w(2, 3, 2), None, 1, 0, 0, 1, 3)],
    F.conv_transpose2d: [(x(2, 2, 2, 3), w(2, 3, 3, 2), w(3), (2, 1), (1, 0), (1, 0), 1, (1, 2))],
    F.conv_transpose3d: [(x(2, 2, 1, 2, 2), w(2, 1, 2, 2, 2), w(1))],
    F.layer_norm: [(x(3, 2, 4), (4,), w(4), w(4)), (x(3, 2, 4), (2, 4), w(2, 4))],
    F.rms_norm: [(x(3, 2, 4), (4,), w(4))],
    F.group_norm: [(x(2, 4, 3), 2, w(4), w(4))],
    F.instance_norm: [
        (x(2, 3, 4), None, None, w(3), w(3)),
        (x(2, 3, 4), w(3).detach(), w(3).detach(), w(3), w(3), False),
    ],
    F.batch_norm: [(x(4, 3), w(3).detach(), w(3).detach(), w(3), w(3)), (x(2, 3, 4), x(3), w(3).detach(), w(3), w(3))],
    torch.prelu: [(x(3, 4, 2), w(4)), (x(3, 4), w(1))],
    F.embedding: [(ids(3, 4), w(6, 2)), (ids(5), w(6, 2), 2), (ids(2, 3, 2), w(6, 3), -1)],
    F.embedding_bag: [
        (ids(3, 4), w(6, 2)),
        ((ids(3, 4), w(6, 2)), {"mode": "sum", "per_sample_weights": x(3, 4), "padding_idx": 1}),
        (ids(7), w(6, 2), torch.tensor([0, 2, 2])),
    ],
    torch.cat: [([w(1, 2, 4).expand(3, -1, -1), x(3, 1, 4)], 1), ([x(3, 2), w(2).expand(3, 2)], -1)],
    Tensor.expand: [(w(1, 4), 3, -1), (w(4), (2, 3, 4))],
    Tensor.expand_as: [(w(1, 4), x(3, 4))],
    torch.broadcast_to: [(w(1, 4), (3, 4))],
    Tensor.broadcast_to: [(w(1, 4), (3, 4))],
    Tensor.repeat: [(w(1, 4), 3, 1), (w(4), (3, 1))],
}
ADDED = [*BROADCAST[:2], ((x(3, 4), w(4)), {"alpha": -2})]
CASES |= dict.fromkeys([torch.add, torch.sub], ADDED) | dict.fromkeys([torch.mul, torch.div], BROADCAST)
CASES |= dict.fromkeys([Tensor.add, Tensor.add_, Tensor.sub, torch.subtract, Tensor.subtract], ADDED[2:])
CASES |= dict.fromkeys([Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.__sub__], BROADCAST[:1])
CASES |= dict.fromkeys([Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply], BROADCAST[:1])
CASES |= dict.fromkeys([Tensor.div, Tensor.__truediv__, torch.divide, torch.true_divide], BROADCAST[:1])
CASES |= dict.fromkeys([torch.concat, torch.concatenate], CASES[torch.cat][:1])


def recurrent(rows, *, cell=False):
    """One layer [N 2 3] -> 4 with gates of `rows` rows, from a given state; torch's own calls have the batch first."""
    weights = [w(rows, 3), w(rows, 4), w(rows), w(rows)]
    weights = [(t.detach() - 2).requires_grad_() for t in weights]
    if cell:
        return lambda state: (x(3, 3), state, *weights)
    return lambda state: (x(3, 2, 3), state, weights, True, 1, 0.0, False, False, True)


LOWERED = {
    torch.lstm: [recurrent(16)((x(1, 3, 4), x(1, 3, 4)))],
    torch.gru: [recurrent(12)(x(1, 3, 4))],
    torch.rnn_tanh: [recurrent(4)(x(1, 3, 4))],
    torch.rnn_relu: [recurrent(4)(x(1, 3, 4))],
    torch.lstm_cell: [recurrent(16, cell=True)((x(3, 4), x(3, 4)))],
    torch.gru_cell: [recurrent(12, cell=True)(x(3, 4))],
    torch.rnn_tanh_cell: [recurrent(4, cell=True)(x(3, 4))],
    torch.rnn_relu_cell: [recurrent(4, cell=True)(x(3, 4))],
}
CASES |= LOWERED
# What the library itself teaches; tests of other files may have registered more by now.
BUILT_IN = [op for op, rule in {**RULES, **LOWERINGS}.items() if rule.__module__.startswith("paraboloid.layers.")]


@pytest.mark.parametrize("op", BUILT_IN, ids=lambda op: f"{RULES.get(op, LOWERINGS.get(op)).__name__}-{op.__name__}")
def test_every_rule_and_lowering(op):
    assert op in CASES, f"give {op} a row in the table"
    pb.testing.check_rule(op, CASES[op])
