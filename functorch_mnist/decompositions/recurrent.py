"""Recurrent layers: one product with all positions for the inputs, one with each position for the state.

    tanh    h' = tanh(W x + b + U h + d)
    relu    h' = max(W x + b + U h + d, 0)
    gru     r, z = σ(W_rz x + b_rz + U_rz h + d_rz)
            n = tanh(W_n x + b_n + r (U_n h + d_n))
            h' = n + z (h - n)
    lstm    i, f, o = σ(W_ifo x + b_ifo + U_ifo h + d_ifo),  g = tanh(W_g x + b_g + U_g h + d_g)
            c' = f c + i g
            h' = o tanh(c'),  or with a projection V o tanh(c')

The rows of W, U, b and d are in the order r, z, n and i, f, g, o. `F.linear` gets W with b and all of a layer's inputs,
then U with d at each position, and V.

Shapes: T positions, N sequences, D inputs, H hidden units, and P = H outputs, or as many as V has rows. A layer has one
cell for each direction: C cells in all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = tuple[Tensor, ...]
"""h (N, P), and for an LSTM c (N, H)."""
Inputs = tuple[Tensor, ...]
"""A cell's products with its inputs, in the parts that its step takes: (..., rows) each."""


class Weights(NamedTuple):
    """Of one cell: `W (gates · H, D)`, `U (gates · H, P)`, `b` and `d (gates · H,)` or none, `V (P, H)` or none."""

    w: Tensor
    u: Tensor
    b: Tensor | None = None
    d: Tensor | None = None
    v: Tensor | None = None


class Cell(NamedTuple):
    """A kind of cell."""

    name: str
    gates: int
    step: Callable[[Inputs, State, Weights], State]
    parts: Callable[[Tensor], Inputs] = lambda projected: (projected,)


def _lstm_step(inputs: Inputs, state: State, weights: Weights) -> State:
    h, c = state
    i, f, g, o = (F.linear(h, weights.u, weights.d) + inputs[0]).chunk(4, -1)
    c = torch.addcmul(i.sigmoid() * g.tanh(), f.sigmoid(), c)
    h = o.sigmoid() * c.tanh()
    return h if weights.v is None else F.linear(h, weights.v), c


def _gru_step(inputs: Inputs, state: State, weights: Weights) -> State:
    (h,) = state
    h_rz, h_n = _reset_update_and_new(F.linear(h, weights.u, weights.d))
    r, z = (h_rz + inputs[0]).sigmoid().chunk(2, -1)
    n = torch.addcmul(inputs[1], r, h_n).tanh()
    return (torch.addcmul(n, z, h - n),)


def _reset_update_and_new(gates: Tensor) -> Inputs:
    hidden = gates.shape[-1] // 3
    rz, n = gates.split([2 * hidden, hidden], -1)
    return rz, n


def _tanh_step(inputs: Inputs, state: State, weights: Weights) -> State:
    return ((F.linear(state[0], weights.u, weights.d) + inputs[0]).tanh(),)


def _relu_step(inputs: Inputs, state: State, weights: Weights) -> State:
    return ((F.linear(state[0], weights.u, weights.d) + inputs[0]).relu(),)


_LSTM = Cell("lstm", 4, _lstm_step)
_GRU = Cell("gru", 3, _gru_step, _reset_update_and_new)
_TANH = Cell("rnn_tanh", 1, _tanh_step)
_RELU = Cell("rnn_relu", 1, _relu_step)


def lstm(
    input: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` of padded sequences.

    Args:
        input: (T, N, D), or (N, T, D) with `batch_first`.
        hx: h (C, N, P) and c (C, N, H) before the first position.
        params: of each cell W, U, then with `has_biases` b, d, then V if P is not H.
        has_biases: see `params`.
        num_layers: each gets the outputs of the one before it.
        dropout: the rate between layers, in [0, 1], by `F.dropout` of (T, N, outputs); nothing without `train`.
        train: see `dropout`.
        bidirectional: each layer has a second cell that reads from the last position to the first.
        batch_first: see `input`.

    Returns:
        The last layer's outputs (T, N, directions · P), or (N, T, …), and h (C, N, P) and c (C, N, H) after the last
        position.

    Raises:
        ValueError: the sequences are packed, or shapes disagree.

    Cost: 11 calls of torch for each cell and position, 12 with a projection: where N · H is small they cost more than
        their arithmetic. A compiled graph is as long as the sequence.
    """
    if isinstance(hx, Tensor):
        raise _packed("lstm")
    output, (h, c) = _layers(
        _LSTM, input, tuple(hx), params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )
    return output, h, c


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.gru` of padded sequences; arguments and results as of `lstm`, without c and V."""
    return _one_state(_GRU, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


def rnn_tanh(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.rnn_tanh` of padded sequences; arguments and results as of `lstm`, without c and V."""
    return _one_state(_TANH, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


def rnn_relu(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.rnn_relu` of padded sequences; arguments and results as of `lstm`, without c and V."""
    return _one_state(_RELU, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`torch.lstm_cell`: h and c (N, H) after an input (N, D)."""
    h, c = _cell(_LSTM, input, tuple(hx), Weights(w_ih, w_hh, b_ih, b_hh))
    return h, c


def gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """`torch.gru_cell`: h (N, H) after an input (N, D)."""
    return _cell(_GRU, input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


def rnn_tanh_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """`torch.rnn_tanh_cell`: h (N, H) after an input (N, D)."""
    return _cell(_TANH, input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


def rnn_relu_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """`torch.rnn_relu_cell`: h (N, H) after an input (N, D)."""
    return _cell(_RELU, input, (hx,), Weights(w_ih, w_hh, b_ih, b_hh))[0]


def _one_state(
    cell: Cell,
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor]:
    """`_layers` of cells whose state is h alone."""
    if isinstance(params, Tensor):
        raise _packed(cell.name)
    output, (h,) = _layers(
        cell, input, (hx,), params, has_biases, num_layers, dropout, train, bidirectional, batch_first
    )
    return output, h


def _layers(
    cell: Cell,
    input: Tensor,
    states: tuple[Tensor, ...],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The last layer's outputs, and the parts of the state after the last position, (C, N, …) each."""
    directions = 2 if bidirectional else 1
    cells = _weights(cell, params, has_biases, num_layers * directions)
    x = input.transpose(0, 1) if batch_first else input
    if x.dim() != 3:
        raise ValueError(f"{cell.name}: the input must have 3 axes. Found {tuple(input.shape)}.")
    for state in states:
        if len(state) != len(cells):
            raise ValueError(f"{cell.name}: a state must have {len(cells)} rows, one a cell. Found {len(state)}.")
    befores = list(zip(*[state.unbind(0) for state in states], strict=True))
    afters: list[State] = []
    for layer in range(num_layers):
        if layer > 0 and train and dropout > 0:
            x = F.dropout(x, dropout, True)
        outputs = []
        for direction in range(directions):
            i = layer * directions + direction
            output, after = _scan(cell, x, befores[i], cells[i], reverse=direction == 1)
            outputs.append(output)
            afters.append(after)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x.transpose(0, 1) if batch_first else x, tuple([torch.stack(part) for part in zip(*afters, strict=True)])


def _scan(cell: Cell, x: Tensor, state: State, weights: Weights, reverse: bool) -> tuple[Tensor, State]:
    """The outputs (T, N, P) of one cell at all positions, and its last state."""
    _check(cell, x.shape[1:-1], state, weights)
    positions = list(zip(*[part.unbind(0) for part in _project(cell, x, weights)], strict=True))
    outputs = []
    for inputs in reversed(positions) if reverse else positions:
        state = cell.step(inputs, state, weights)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _cell(cell: Cell, input: Tensor, state: State, weights: Weights) -> State:
    """The state after one position."""
    _check(cell, input.shape[:-1], state, weights)
    return cell.step(_project(cell, input, weights), state, weights)


def _project(cell: Cell, x: Tensor, weights: Weights) -> Inputs:
    return cell.parts(F.linear(x, weights.w, weights.b))


def _weights(cell: Cell, params: Sequence[Tensor], has_biases: bool, cells: int) -> list[Weights]:
    """The parameters of each cell."""
    many = len(params) // cells
    known = (4, 5) if has_biases else (2, 3)
    if len(params) != many * cells or many not in known[: 2 if cell is _LSTM else 1]:
        raise ValueError(f"{cell.name}: {cells} cells must have {known[0]} parameters each. Found {len(params)}.")
    found = []
    for i in range(cells):
        w, u, *others = params[i * many : (i + 1) * many]
        b, d = others[:2] if has_biases else (None, None)
        found.append(Weights(w, u, b, d, others[-1] if many == known[1] else None))
    return found


def _check(cell: Cell, leading: tuple[int, ...], state: State, weights: Weights) -> None:
    """Raises where a state would be broadcast to the inputs (*leading, D) of one position."""
    sizes = (weights.u.shape[1], len(weights.w) // cell.gates)
    for part, size in zip(state, sizes, strict=False):
        if part.shape != (*leading, size):
            expected, found = (*leading, size), tuple(part.shape)
            raise ValueError(f"{cell.name}: a state of a cell must be {expected}. Found {found}.")


def _packed(name: str) -> ValueError:
    return ValueError(
        f"{name}: sequences must be padded. Found packed ones, of pack_padded_sequence, whose lengths differ. "
        "Give the module the padded input, and leave the padding out by a mask where its output is used; the backward "
        "direction of a bidirectional one reads the padding first."
    )
