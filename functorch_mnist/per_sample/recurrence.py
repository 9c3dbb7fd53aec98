"""Recurrent layers on the whole batch, with one tap on all gates of a layer: linear maps at T positions.

With x_t a layer's input and h_t its state, time unrolled,

    lstm    gates_t = W_ih x_t + W_hh h_{t-1} + b       one cotangent for all four of W_ih, W_hh, b_ih, b_hh
    gru     gates_t = W_ih x_t + b_ih, and W_hh h_{t-1} + b_hh apart, for a gate multiplies the latter
    rnn     gates_t = W_ih x_t + W_hh h_{t-1} + b

so that the factors of W_ih are (x_t, g_t), those of W_hh (h_{t-1}, g_t), and those of biases g_t. Decomposed into ops
of one example, each of the T steps would have taps of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .forms import Form, MatrixForm, ShiftForm
from .layout import layout

OPS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class Layer(NamedTuple):
    """One layer in one direction."""

    weights: tuple[Tensor, ...]
    """W_ih, W_hh, and b_ih, b_hh where there are biases."""
    reverse: bool


class Call(NamedTuple):
    """A recurrent op, its arguments in order."""

    op: Any
    input: Tensor
    states: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    directions: int
    batch_first: bool

    @property
    def taps_each(self) -> int:
        """Taps of a layer."""
        return 2 if self.op is torch.gru else 1


def read(op: Any, args: Sequence[Any]) -> Call | None:
    """The call of a recurrent op that is a plain one: padded inputs, no projection, no dropout inside."""
    if len(args) != 9 or not isinstance(args[2], (list, tuple)) or not isinstance(args[0], Tensor):
        return None
    input, hx, params, biases, count, dropout, train, bidirectional, batch_first = args
    states = tuple(hx) if isinstance(hx, (list, tuple)) else (hx,)
    directions = 2 if bidirectional else 1
    each = 4 if biases else 2
    if len(params) != each * count * directions or (dropout and train) or input.dim() != 3:
        return None
    layers = [Layer(tuple(params[each * i : each * (i + 1)]), i % directions == 1) for i in range(count * directions)]
    return Call(op, input, states, tuple(layers), directions, bool(batch_first))


def forms(call: Call) -> list[tuple[Tensor, Form, int]]:
    """Each weight with its form and the number of the tap whose cotangent it takes."""
    found: list[tuple[Tensor, Form, int]] = []
    for i, layer in enumerate(call.layers):
        for j, weight in enumerate(layer.weights):
            shape = tuple(weight.shape)
            form: Form = MatrixForm(layout(shape), (0, 1, 2)) if j < 2 else ShiftForm(shape, shape)
            found.append((weight, form, i * call.taps_each + (j % 2 if call.taps_each == 2 else 0)))
    return found


def tap_shapes(call: Call) -> list[tuple[int, ...]]:
    """Of one example: (T, N, gates)."""
    n, t = call.input.shape[:2] if call.batch_first else reversed(call.input.shape[:2])
    return [(t, n, layer.weights[0].shape[0]) for layer in call.layers for _ in range(call.taps_each)]


def run(call: Call, at: tuple[int, int], taps: Sequence[Tensor]) -> tuple[Any, list[Any]]:
    """What the op returns for one example, and what each weight's form needs of the batch; computed on the batch.

    Args:
        call: of one example, with the weights' numbers.
        at: where `vmap` maps, see `native.mapped`.
        taps: (B, T, N, gates) each.
    """
    rows = at[1]
    x = _time_first(native.taken_out(call.input, at), call.batch_first)
    states = [native.taken_out(s, at).movedim(0, 1).flatten(1, 2) for s in call.states]  # (layers, B N, H)
    whole = [_time_first(tap, batch_first=False) for tap in taps]
    saved: list[Any] = []
    last: list[list[Tensor]] = [[] for _ in states]
    outputs: list[Tensor] = []

    def inputs_of(sequence: Tensor) -> Tensor:
        """(T, B N, D) as (B, 1, T N, D)."""
        parts: Tensor = sequence.unflatten(1, (rows, -1)).movedim(1, 0).flatten(1, 2)[:, None]
        return parts

    for i, layer in enumerate(call.layers):
        if i % call.directions == 0 and i > 0:
            x = torch.cat(outputs[-call.directions :], -1) if call.directions > 1 else outputs[-1]
        start = [s[i] for s in states]
        own = whole[i * call.taps_each : (i + 1) * call.taps_each]
        inputs = x.flip(0) if layer.reverse else x
        before, after, ends = _STEPS[call.op](inputs, start, layer.weights, own)
        saved += [inputs_of(inputs), inputs_of(before), *[() for _ in layer.weights[2:]]]
        outputs.append(after.flip(0) if layer.reverse else after)
        for part, end in zip(last, ends, strict=True):
            part.append(end)
    out = torch.cat(outputs[-call.directions :], -1) if call.directions > 1 else outputs[-1]
    out = out.unflatten(1, (rows, -1)).movedim(1, 0)  # (B, T, N, H)
    out = native.handed_back(out.transpose(1, 2) if call.batch_first else out, at)
    ended = [native.handed_back(torch.stack(part).unflatten(1, (rows, -1)).movedim(1, 0), at) for part in last]
    return (out, *ended), saved


def _time_first(x: Tensor, batch_first: bool) -> Tensor:
    """(B, N, T, D) or (B, T, N, D) as (T, B N, D)."""
    return (x.movedim(2, 0) if batch_first else x.movedim(1, 0)).flatten(1, 2)


def _lstm(
    x: Tensor, start: list[Tensor], weights: tuple[Tensor, ...], taps: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The states before each step, those after, and the last ones."""
    (h, c), recurrent = start, weights[1].t()
    states = [h]
    for gates in _gates(x, weights, taps[0]).unbind(0):
        i, f, g, o = torch.addmm(gates, h, recurrent).chunk(4, 1)
        c = torch.addcmul(torch.sigmoid(f) * c, torch.sigmoid(i), torch.tanh(g))
        h = torch.sigmoid(o) * torch.tanh(c)
        states.append(h)
    every = torch.stack(states)
    return every[:-1], every[1:], [h, c]


def _rnn(activation: Any) -> Any:
    def steps(
        x: Tensor, start: list[Tensor], weights: tuple[Tensor, ...], taps: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        (h,), recurrent = start, weights[1].t()
        states = [h]
        for gates in _gates(x, weights, taps[0]).unbind(0):
            h = activation(torch.addmm(gates, h, recurrent))
            states.append(h)
        every = torch.stack(states)
        return every[:-1], every[1:], [h]

    return steps


def _gru(
    x: Tensor, start: list[Tensor], weights: tuple[Tensor, ...], taps: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    (h,), recurrent = start, weights[1].t()
    inner = taps[1] if len(weights) == 2 else taps[1] + weights[3]
    states = [h]
    for outer, shift in zip((F.linear(x, weights[0], *weights[2:3]) + taps[0]).unbind(0), inner.unbind(0), strict=True):
        ri, zi, ni = outer.chunk(3, 1)
        rh, zh, nh = torch.addmm(shift, h, recurrent).chunk(3, 1)
        z = torch.sigmoid(zi + zh)
        n = torch.tanh(torch.addcmul(ni, torch.sigmoid(ri + rh), nh))
        h = torch.addcmul(n, z, h - n)
        states.append(h)
    every = torch.stack(states)
    return every[:-1], every[1:], [h]


def _gates(x: Tensor, weights: tuple[Tensor, ...], tap: Tensor) -> Tensor:
    """What the inputs add to the gates, (T, B N, gates), with all biases and the tap."""
    gates = F.linear(x, weights[0], None if len(weights) == 2 else weights[2] + weights[3])
    return gates + tap


_STEPS = {torch.lstm: _lstm, torch.gru: _gru, torch.rnn_tanh: _rnn(torch.tanh), torch.rnn_relu: _rnn(torch.relu)}
