"""Recurrent layers, unrolled into linear calls: time steps become positions of one parameter.

Each function takes the arguments of the fused operation and gives the same numbers.  The products with the inputs are
one call for all time steps, those with the hidden state one call for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from paraboloid.layers.registry import lowering
from paraboloid.passes.torch_internals import DisableTorchFunction

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, Tensor, State], State]  # (from the input, from the hidden state, state) -> next state


def _lstm(x: Tensor, h: Tensor, state: State) -> State:
    i, f, g, o = (x + h).chunk(4, -1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, h: Tensor, state: State) -> State:
    (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), h.chunk(3, -1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (n + (xz + hz).sigmoid() * (state[0] - n),)


def _tanh(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).tanh(),)


def _relu(x: Tensor, h: Tensor, state: State) -> State:
    return ((x + h).relu(),)


def _as_data(state: Sequence[Tensor], x: Tensor) -> State:
    """The initial state, so that it counts as data: what constant zeros meet would look like part of the weights."""
    zero = torch.zeros_like(x[..., :1])
    return tuple(s + zero for s in state)


def _direction(cell: Cell, x: Tensor, state: State, weights: Sequence[Tensor], biased: bool, reverse: bool):
    """One layer in one direction: x [T N D] -> (h [T N H], last state)."""
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biased else (None, None)
    projection = rest[-1] if len(rest) % 2 else None
    steps = F.linear(x, w_ih, b_ih).unbind(0)
    out = []
    for step in reversed(steps) if reverse else steps:
        hidden = F.linear(state[0], w_hh, b_hh)
        with DisableTorchFunction():  # arithmetic on data, in which a recorder would find nothing
            state = cell(step, hidden, state)
        if projection is not None:
            state = F.linear(state[0], projection), *state[1:]
        out.append(state[0])
    return torch.stack(out[::-1] if reverse else out), state


def _unrolled(
    cell: Cell, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], biased: bool, layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All layers and directions: (h of the last layer, last state [layers * directions, N, H] ..)."""
    x = x.transpose(0, 1) if batch_first else x
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    last = []
    for layer in range(layers):
        outs = []
        for d in range(directions):
            i = layer * directions + d
            state = _as_data([s[i] for s in initial], x[0])
            out, state = _direction(cell, x, state, weights[i * each : (i + 1) * each], biased, reverse=d == 1)
            outs.append(out)
            last.append(state)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
        if dropout and train and layer < layers - 1:
            x = F.dropout(x, dropout)
    return x.transpose(0, 1) if batch_first else x, *(torch.stack(s) for s in zip(*last, strict=True))


def _lower_layer(operation: Callable, cell: Cell) -> None:
    @lowering(operation)
    def layer(*args, **named):
        if named or not isinstance(args[3], bool):
            return NotImplemented  # a packed sequence: (data, batch sizes, initial state, weights, ...)
        x, initial, *rest = args
        return _unrolled(cell, x, initial if isinstance(initial, tuple | list) else (initial,), *rest)


def _lower_cell(operation: Callable, cell: Cell) -> None:
    @lowering(operation)
    def step(x, initial, w_ih, w_hh, b_ih=None, b_hh=None):
        state = _as_data(initial if isinstance(initial, tuple | list) else (initial,), x)
        state = cell(F.linear(x, w_ih, b_ih), F.linear(state[0], w_hh, b_hh), state)
        return state[0] if len(state) == 1 else state


_lower_layer(torch.lstm, _lstm)
_lower_layer(torch.gru, _gru)
_lower_layer(torch.rnn_tanh, _tanh)
_lower_layer(torch.rnn_relu, _relu)
_lower_cell(torch.lstm_cell, _lstm)
_lower_cell(torch.gru_cell, _gru)
_lower_cell(torch.rnn_tanh_cell, _tanh)
_lower_cell(torch.rnn_relu_cell, _relu)
