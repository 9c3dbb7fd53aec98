"""Decompositions against the ops they stand for: values, gradients, transforms, and what a mode above them sees."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from functorch_mnist.decompositions import __all__ as public
from functorch_mnist.decompositions import decomposition

LAYERS = {"lstm": torch.lstm, "gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}
CELLS = {
    "lstm_cell": torch.lstm_cell,
    "gru_cell": torch.gru_cell,
    "rnn_tanh_cell": torch.rnn_tanh_cell,
    "rnn_relu_cell": torch.rnn_relu_cell,
}


class Record(TorchFunctionMode):
    """Keeps the calls that pass through it."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def of(self, func):
        return [(args, kwargs) for called, args, kwargs in self.calls if called is func]


class Decompose(TorchFunctionMode):
    """Runs each op's decomposition, under itself."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        fn = decomposition(func) or func
        if fn is func:
            return func(*args, **(kwargs or {}))
        with self:
            return fn(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def is_float(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def outputs_and_gradients(fn, args, kwargs):
    """What `fn` returns, and the gradients of a fixed linear function of it by every float tensor it gets."""
    args, kwargs = tree_map(lambda x: x.detach().clone().requires_grad_() if is_float(x) else x, (args, kwargs))
    out = [x for x in tree_flatten(fn(*args, **kwargs))[0] if x is not None]
    total = sum((x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum() for x in out)
    inputs = [x for x in tree_flatten((args, kwargs))[0] if is_float(x)]
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return out, [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def agree(op, *args, **kwargs):
    """Asserts that an op and its decomposition give the same values, shapes and gradients."""
    same(outputs_and_gradients(decomposition(op), args, kwargs), outputs_and_gradients(op, args, kwargs))


def agree_under_transforms(op, batch, params, call):
    """Asserts the same of `grad` of the sum of `vmap`, against the op in a loop, and of that compiled.

    `call(op, params, *example)` returns the outputs of one example.
    """

    def loss(fn, params, *example):
        out = [x for x in tree_flatten(call(fn, params, *example))[0] if x is not None]
        return sum((x * torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view(x.shape)).sum() for x in out)

    def gradients(params, *batch):
        return grad(lambda p: vmap(lambda *example: loss(decomposition(op), p, *example))(*batch).sum())(params)

    leaves = [p.clone().requires_grad_() for p in params]
    total = sum(loss(op, leaves, *example) for example in zip(*batch, strict=True))
    expected = list(torch.autograd.grad(total, leaves))
    same(gradients(params, *batch), expected)
    torch.compiler.reset()  # the compiler counts how often it has seen the lines of one function
    compiled = torch.compile(gradients, fullgraph=True, dynamic=False, backend="aot_eager")
    same(compiled(params, *batch), expected)


# Recurrent layers


def recurrent(name, *, layers=1, biases=True, bidirectional=False, batch_first=False, projection=0, sizes=(4, 2, 3, 5)):
    """The arguments of a recurrent op, without dropout."""
    t, n, d, h = sizes
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    more = {"proj_size": projection} if projection else {}
    module = kind(d, h, layers, bias=biases, bidirectional=bidirectional, **more).double()
    params = [p.detach() for p in module._flat_weights]
    x = randn(n, t, d) if batch_first else randn(t, n, d)
    cells = layers * (2 if bidirectional else 1)
    state = (randn(cells, n, projection or h), randn(cells, n, h)) if name == "lstm" else randn(cells, n, h)
    return x, state, params, biases, layers, 0.0, True, bidirectional, batch_first


TABLE = [
    (name, *flags, projection)
    for name, *flags in itertools.product(LAYERS, (1, 3), (False, True), (False, True), (False, True))
    for projection in ((0, 2) if name == "lstm" else (0,))
]


@pytest.mark.parametrize(("name", "layers", "biases", "bidirectional", "batch_first", "projection"), TABLE)
def test_a_recurrent_layer_equals_torchs(name, layers, biases, bidirectional, batch_first, projection):
    args = recurrent(
        name,
        layers=layers,
        biases=biases,
        bidirectional=bidirectional,
        batch_first=batch_first,
        projection=projection,
    )
    agree(LAYERS[name], *args)


@given(st.sampled_from(sorted(LAYERS)), st.tuples(*[st.integers(1, 4)] * 4), st.integers(1, 2), st.booleans())
def test_a_recurrent_layer_of_any_size_equals_torchs(name, sizes, layers, bidirectional):
    agree(LAYERS[name], *recurrent(name, layers=layers, bidirectional=bidirectional, sizes=sizes))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_cell_equals_torchs(name, biases):
    kind = {"lstm_cell": nn.LSTMCell, "gru_cell": nn.GRUCell}.get(name, nn.RNNCell)
    params = [p.detach() for p in kind(3, 5, bias=biases).double().parameters()]
    state = (randn(2, 5), randn(2, 5)) if name == "lstm_cell" else randn(2, 5)
    agree(CELLS[name], randn(2, 3), state, *params)


@pytest.mark.parametrize("name", LAYERS)
def test_a_recurrent_layer_equals_torchs_under_grad_of_vmap_and_compiled(name):
    _, _, params, *flags = recurrent(name, bidirectional=True, projection=2 if name == "lstm" else 0)
    state = (randn(3, 2, 1, 2), randn(3, 2, 1, 5)) if name == "lstm" else (randn(3, 2, 1, 5),)

    def call(op, params, x, *state):
        return op(x, state if len(state) == 2 else state[0], params, *flags)

    agree_under_transforms(LAYERS[name], (randn(3, 2, 1, 3), *state), params, call)


@pytest.mark.parametrize("name", CELLS)
def test_a_recurrent_cell_equals_torchs_under_grad_of_vmap_and_compiled(name):
    kind = {"lstm_cell": nn.LSTMCell, "gru_cell": nn.GRUCell}.get(name, nn.RNNCell)
    params = [p.detach() for p in kind(3, 5).double().parameters()]
    state = (randn(3, 1, 5), randn(3, 1, 5)) if name == "lstm_cell" else (randn(3, 1, 5),)

    def call(op, params, x, *state):
        return op(x, state if len(state) == 2 else state[0], *params)

    agree_under_transforms(CELLS[name], (randn(3, 1, 3), *state), params, call)


def test_linear_gets_the_parameters_themselves_once_for_inputs_and_once_a_position_for_states():
    args = recurrent("lstm", layers=2, bidirectional=True, projection=2)
    w, u, b, d, v = args[2][5:10]  # of the first layer's second cell
    with Record() as record:
        decomposition(torch.lstm)(*args)
    calls = [linear for linear, _ in record.of(F.linear)]
    assert len(calls) == 4 * (1 + 2 * 4)
    assert [len(x) for x, *given in calls if given[0] is w and given[1] is b] == [4]
    assert len([x for x, *given in calls if given[0] is u and given[1] is d]) == 4
    assert len([x for x, *given in calls if given[0] is v]) == 4


@pytest.mark.parametrize(("projection", "calls"), [(0, 11), (2, 12)])
def test_an_lstm_makes_so_many_calls_a_position(projection, calls):
    counts = []
    for positions in (4, 7):
        args = recurrent("lstm", projection=projection, sizes=(positions, 2, 3, 5))
        with Record() as record:
            decomposition(torch.lstm)(*args)
        counts.append(len(record.calls))
    assert counts[1] - counts[0] == 3 * calls


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_dropout_lies_between_recurrent_layers_and_draws_as_torchs(name, batch_first):
    x, state, params, biases, layers, _, train, *flags = recurrent(
        name, layers=3, bidirectional=True, batch_first=batch_first
    )
    args = (x, state, params, biases, layers, 0.3, train, *flags)
    with Record() as record:
        decomposition(LAYERS[name])(*args)
    dropped = [(x.shape, named["p"], named["training"]) for (x,), named in record.of(F.dropout)]
    assert dropped == [((4, 2, 10), 0.3, True)] * 2
    torch.manual_seed(1)
    found = decomposition(LAYERS[name])(*args)
    torch.manual_seed(1)
    same(found, LAYERS[name](*args))


@pytest.mark.parametrize(("rate", "train"), [(0.3, False), (0.0, True)])
def test_a_recurrent_layer_without_a_rate_or_outside_training_drops_nothing(rate, train):
    x, state, params, biases, layers, _, _, *flags = recurrent("gru", layers=2)
    with Record() as record:
        decomposition(torch.gru)(x, state, params, biases, layers, rate, train, *flags)
    assert record.of(F.dropout) == []


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_are_refused_with_the_way_out(name):
    kind = {"lstm": nn.LSTM, "gru": nn.GRU}.get(name, nn.RNN)
    more = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=f"{name}: .*pack_padded_sequence.*padded input, and .* mask"), Decompose():
        kind(3, 5, **more)(packed)


def test_a_recurrent_state_is_never_broadcast():
    x, state, params, *flags = recurrent("gru", layers=2)
    for wrong in (state[:, :1], state[:1], state[..., :1]):
        with pytest.raises(ValueError, match="gru: a state"):
            decomposition(torch.gru)(x, wrong, params, *flags)
    with pytest.raises(ValueError, match=r"2 cells must have 4 parameters each\. Found 7"):
        decomposition(torch.gru)(x, state, params[1:], *flags)
    x, (h, c), params, *flags = recurrent("lstm")
    with pytest.raises(ValueError, match="lstm: a state"):
        decomposition(torch.lstm)(x, (h, c[..., :1]), params, *flags)
    with pytest.raises(ValueError, match="gru: the input must have 3 axes"):
        decomposition(torch.gru)(x[0], *recurrent("gru")[1:])


@pytest.mark.parametrize("name", LAYERS)
def test_a_recurrent_layer_runs_in_mixed_precision(name):
    x, state, params, *flags = tree_map(lambda x: x.float() if is_float(x) else x, recurrent(name, layers=2))
    with torch.autocast("cpu", torch.bfloat16):
        found = decomposition(LAYERS[name])(x, state, params, *flags)
    expected = LAYERS[name](x, state, params, *flags)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=0.05)  # eight bits of mantissa over four positions


# All of them


def modules():
    """Modules of which each calls one op, and an input."""
    x = randn(4, 2, 3)
    return {
        torch.lstm: (nn.LSTM(3, 5, 2), x),
        torch.gru: (nn.GRU(3, 5), x[:, 0]),
        torch.rnn_tanh: (nn.RNN(3, 5, batch_first=True), x),
        torch.rnn_relu: (nn.RNN(3, 5, nonlinearity="relu"), x),
        torch.lstm_cell: (nn.LSTMCell(3, 5), x[0]),
        torch.gru_cell: (nn.GRUCell(3, 5), x[0, 0]),
        torch.rnn_tanh_cell: (nn.RNNCell(3, 5), x[0]),
        torch.rnn_relu_cell: (nn.RNNCell(3, 5, nonlinearity="relu"), x[0]),
    }


@pytest.mark.parametrize("op", list(modules()), ids=lambda op: op.__name__)
@pytest.mark.parametrize("training", [False, True])
def test_a_mode_finds_the_op_in_torchs_module_and_runs_it_decomposed(op, training):
    torch.manual_seed(0)
    module, x = modules()[op]
    module.double().train(training)
    with Decompose() as mode:
        found = module(x)
    assert op in mode.seen
    same(found, module(x))


def test_the_public_names_are_there():
    assert public == ["decomposition"]
    assert decomposition(torch.relu) is None
