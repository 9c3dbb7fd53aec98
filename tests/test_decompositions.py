"""Decompositions against the ops they stand for: values, gradients, transforms, and what a mode above them sees."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import grad, jacrev, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from functorch_mnist.decompositions import __all__ as public
from functorch_mnist.decompositions import decomposition, fastest
from functorch_mnist.decompositions.normalization import group_norm

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


def agree_under_transforms(op, batch, params, call, *, fuse=True):
    """Asserts the same of `grad` of the sum of `vmap`, against the op in a loop, and of that compiled, if asked.

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
    if not fuse:
        return
    torch.compiler.reset()  # the compiler counts how often it has seen the lines of one function
    compiled = torch.compile(gradients, fullgraph=True, dynamic=False, backend="eager")
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


# Attention


def attention(
    *,
    shared="qkv",
    separate=False,
    biases=True,
    batched=True,
    extra=False,
    static=False,
    zero=False,
    sizes=(3, 4, 2, 6),
):
    """The positional arguments up to the output's bias, and the named ones, of two heads."""
    length, s, n, e = sizes
    s = length if shared == "qkv" else s
    size_k, size_v = (e - 1, e + 1) if separate else (e, e)

    def sequence(t, size):
        return randn(t, n, size) if batched else randn(t, size)

    query = sequence(length, e)
    key = query if shared == "qkv" else sequence(s, size_k)
    value = key if shared in ("qkv", "kv") else sequence(s, size_v)
    one = n if batched else 1
    named = {}
    if separate:
        named = {"use_separate_proj_weight": True, "q_proj_weight": randn(e, e)}
        named |= {"k_proj_weight": randn(e, key.shape[-1]), "v_proj_weight": randn(e, value.shape[-1])}
    if static:
        named |= {"static_k": randn(2 * one, s, e // 2), "static_v": randn(2 * one, s, e // 2)}
    args = (
        query, key, value, e, 2,
        None if separate else randn(3 * e, e), randn(3 * e) if biases else None,
        randn(1, 1, e) if extra else None, randn(1, 1, e) if extra else None,
        zero, 0.0, randn(e, e), randn(e) if biases else None,
    )  # fmt: skip
    return args, named


def padding(n, s, kind):
    """A mask (N, S) in which the first key is open."""
    lengths = torch.arange(1, n + 1).clamp(max=s)
    is_padding = torch.arange(s) >= lengths[:, None]
    return is_padding if kind == "bool" else randn(n, s).masked_fill(is_padding, -torch.inf)


def causal(length, s, kind):
    closed = torch.ones(length, s).triu(1).bool()
    return closed if kind == "bool" else randn(length, s).masked_fill(closed, -torch.inf)


SHARED = [("qkv", False), ("kv", False), ("none", False), ("kv", True), ("none", True)]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(("shared", "separate"), SHARED)
def test_attention_of_any_projection_equals_torchs(shared, separate, biases, batched, need_weights):
    args, named = attention(shared=shared, separate=separate, biases=biases, batched=batched)
    agree(F.multi_head_attention_forward, *args, need_weights=need_weights, **named)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("mask", [None, "2-D", "3-D", "causal"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("added", ["nothing", "extra", "zero", "both", "static"])
def test_attention_under_any_mask_equals_torchs(kind, padded, mask, batched, need_weights, added):
    args, named = attention(
        shared="kv",
        batched=batched,
        extra=added in ("extra", "both"),
        zero=added in ("zero", "both"),
        static=added == "static",
    )
    n = 2 if batched else 1
    masks = {"need_weights": need_weights, "is_causal": mask == "causal"}
    if mask is not None:
        masks["attn_mask"] = causal(3, 4, kind)
    if mask == "3-D":
        masks["attn_mask"] = torch.stack([causal(3, 4, kind) for _ in range(2 * n)])
    if padded:
        masks["key_padding_mask"] = padding(n, 4, kind) if batched else padding(2, 4, kind)[1]
    agree(F.multi_head_attention_forward, *args, **masks, **named)


@pytest.mark.parametrize("batched", [False, True])
def test_attention_weights_of_each_head_equal_torchs(batched):
    args, named = attention(batched=batched)
    agree(F.multi_head_attention_forward, *args, average_attn_weights=False, **named)


@given(st.tuples(*[st.integers(1, 4)] * 3), st.integers(1, 3), st.booleans(), st.sampled_from(["qkv", "kv", "none"]))
def test_attention_of_any_size_equals_torchs(sizes, half, need_weights, shared):
    args, named = attention(shared=shared, sizes=(*sizes, 2 * half))
    agree(F.multi_head_attention_forward, *args, need_weights=need_weights, **named)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_attention_equals_torchs_under_grad_of_vmap_and_compiled(batched, need_weights):
    (query, _, _, *sizes, w, b, _, _, zero, rate, w_out, b_out), _ = attention(batched=batched, sizes=(3, 3, 1, 6))
    params = [w, b, randn(1, 1, 6), randn(1, 1, 6), w_out, b_out]
    mask = causal(3, 3, "bool")

    def call(op, params, x, is_padding):
        w, b, b_k, b_v, w_out, b_out = params
        is_padding = is_padding[None] if batched else is_padding
        return op(
            x, x, x, *sizes, w, b, b_k, b_v, zero, rate, w_out, b_out,
            key_padding_mask=is_padding, need_weights=need_weights, attn_mask=mask,
        )  # fmt: skip

    batch = (randn(2, *query.shape), padding(2, 3, "bool"))
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the kernel of CPUs
        agree_under_transforms(F.multi_head_attention_forward, batch, params, call, fuse=batched == need_weights)


@pytest.mark.parametrize("batched", [False, True])
def test_linear_gets_the_packed_parameters_themselves_in_self_attention(batched):
    args, named = attention(batched=batched)
    with Record() as record:
        decomposition(F.multi_head_attention_forward)(*args, **named)
    calls = [linear for linear, _ in record.of(F.linear)]
    assert [(call[1] is w, call[2] is b) for call, (w, b) in zip(calls, (args[5:7], args[11:13]), strict=True)] == [
        (True, True)
    ] * 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_drops_weights_where_torch_does_and_draws_as_it_does(need_weights, training):
    args, named = attention()
    args = (*args[:10], 0.3, *args[11:])
    named |= {"training": training, "need_weights": need_weights}
    torch.manual_seed(1)
    expected = F.multi_head_attention_forward(*args, **named)
    torch.manual_seed(1)
    with Record() as record:
        found = decomposition(F.multi_head_attention_forward)(*args, **named)
    same(found, expected)
    dropped = [(x.shape, named["p"], named["training"]) for (x,), named in record.of(F.dropout)]
    assert dropped == ([((4, 3, 3), 0.3, True)] if need_weights and training else [])
    attended = [call[4] for call, _ in record.of(F.scaled_dot_product_attention)]
    assert attended == ([] if need_weights else [0.3 if training else 0.0])


def test_attention_refuses_shapes_that_disagree():
    args, _ = attention(shared="kv")
    op = decomposition(F.multi_head_attention_forward)
    query, key, value, size, heads, w, b, *_ = args
    named = {
        "attn_mask": torch.zeros(1, 4), "key_padding_mask": torch.zeros(1, 4), "static_k": randn(4, 4, 1),
        "static_v": randn(1, 4, 3), "is_causal": True, "use_separate_proj_weight": True,
    }  # fmt: skip
    for name, value_ in named.items():
        with pytest.raises(ValueError, match="multi_head_attention_forward: "):
            op(*args, **{name: value_})
    with pytest.raises(ValueError, match="bools or floats"):
        op(*args, attn_mask=torch.zeros(3, 4, dtype=torch.long))
    wrong = [
        (query[:, 0], key, value, size, heads, w, b),
        (query, key[:, :1], value, size, heads, w, b),
        (query[:, :1], key, value, size, heads, w, b),
        (query, key, value[:1], size, heads, w, b),
        (query, key, value, size - 1, heads, w, b),
        (query, key, value, size, 4, w, b),
        (query, key, value, size, heads, w[1:], b),
        (query, key, value, size, heads, None, b),
    ]
    for given_ in wrong:
        with pytest.raises(ValueError, match="multi_head_attention_forward: "):
            op(*given_, *args[7:])
    extra, _ = attention(extra=True)
    with pytest.raises(ValueError, match="bias_k and bias_v"):
        op(*extra[:8], None, *extra[9:])
    with pytest.raises(ValueError, match="static"):
        op(*extra, static_k=randn(4, 3, 3))


# Bags of embeddings


def bag_options():
    for mode, padding_idx, by_frequency in itertools.product(("sum", "mean", "max"), (None, 2, -3), (False, True)):
        if mode != "max" or not by_frequency:
            yield {"mode": mode, "padding_idx": padding_idx, "scale_grad_by_freq": by_frequency}


@pytest.mark.parametrize("options", list(bag_options()), ids=str)
@pytest.mark.parametrize("offsets", [None, [0, 2, 2, 5], [0, 0, 6], [0]])
def test_an_embedding_bag_equals_torchs(options, offsets):
    table = randn(5, 3)
    index = torch.tensor([2, 1, 2, 2, 4, 2]) if offsets else torch.tensor([[2, 1, 2], [2, 2, 2], [0, 4, 4]])
    offsets = torch.tensor(offsets) if offsets else None
    agree(F.embedding_bag, index, table, offsets, **options)
    if offsets is not None:
        ends = torch.cat([offsets, torch.tensor([6])])
        agree(F.embedding_bag, index, table, ends, include_last_offset=True, **options)
    if options["mode"] == "sum":
        agree(F.embedding_bag, index, table, offsets, per_sample_weights=randn(*index.shape), **options)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(sum),
    st.sampled_from(["sum", "mean", "max"]),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_an_embedding_bag_of_any_sizes_equals_torchs(sizes, mode, dtype):
    ends = torch.tensor([0, *itertools.accumulate(sizes)], dtype=dtype)
    index = torch.randint(5, (sum(sizes),), dtype=dtype)
    agree(F.embedding_bag, index, randn(5, 3), ends[:-1], mode=mode)
    agree(F.embedding_bag, index, randn(5, 3), ends, mode=mode, include_last_offset=True)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_indices_from_the_last_offset_on_are_in_no_bag(mode):
    table, index = randn(5, 3), torch.tensor([2, 1, 4, 0, 3])
    bag = decomposition(F.embedding_bag)
    args = (table, torch.tensor([0, 1, 3]))
    found = bag(index, *args, mode=mode, include_last_offset=True)
    same(found, bag(index[:3], *args, mode=mode, include_last_offset=True))


def test_a_maximum_that_ties_passes_its_gradient_to_the_row_torch_passes_it_to():
    agree(F.embedding_bag, torch.tensor([[2, 1, 3]]), torch.zeros(4, 3, dtype=torch.float64), mode="max")


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_an_embedding_bag_equals_torchs_under_grad_of_vmap_and_compiled(mode):
    table = randn(5, 3)
    index = torch.tensor([[2, 1, 2, 4], [0, 2, 3, 3]])

    def bags(op, params, index, offsets):
        return op(index, params[0], offsets, mode=mode, padding_idx=2)

    agree_under_transforms(F.embedding_bag, (index, torch.tensor([[0, 0, 3], [0, 1, 4]])), [table], bags)

    def rows(op, params, index):
        return op(index, params[0], mode=mode, padding_idx=2)

    agree_under_transforms(F.embedding_bag, (index.view(2, 2, 2),), [table], rows)


def test_an_embedding_bag_refuses_what_it_cannot_do():
    bag = decomposition(F.embedding_bag)
    index, table = torch.tensor([1, 2]), randn(4, 3)
    offsets = torch.tensor([0])
    with pytest.raises(ValueError, match="written to"):
        bag(index, table, offsets, max_norm=1.0)
    with pytest.raises(ValueError, match="mode must be"):
        bag(index, table, offsets, mode="median")
    for wrong in ((index, table), (index[None], table, offsets), (index, table, offsets[None])):
        with pytest.raises(ValueError, match="must have offsets"):
            bag(*wrong)
    for wrong in ((index[None, None], table), (index, table[0], offsets)):
        with pytest.raises(ValueError, match="1 or 2 axes"):
            bag(*wrong)
    for mode, weights in (("mean", randn(2)), ("sum", randn(1))):
        with pytest.raises(ValueError, match="per_sample_weights must be"):
            bag(index, table, offsets, mode=mode, per_sample_weights=weights)
    with pytest.raises(ValueError, match="scale_grad_by_freq and sparse"):
        bag(index, table, offsets, mode="max", scale_grad_by_freq=True)


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
        F.multi_head_attention_forward: (nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), randn(2, 3, 4)),
        F.embedding_bag: (nn.EmbeddingBag(5, 3), torch.tensor([[1, 2], [0, 2]])),
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


GROUPED = [((3, 6, 4, 5), 3), ((2, 6), 3), ((2, 8, 7), 8), ((2, 4, 3, 3, 2), 1)]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("shape", "groups"), GROUPED)
def test_group_norm_for_the_compiler_is_group_norm_with_its_derivatives(shape, groups, affine, last):
    x = torch.randn(shape, dtype=torch.float64) * 2 + 5
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    weights = tuple(torch.randn(2, shape[1], dtype=torch.float64)) if affine else ()
    cotangent = torch.randn(shape, dtype=torch.float64)
    expected, pull = vjp(lambda x, *w: F.group_norm(x, groups, *w), x, *weights)
    found, pull_found = vjp(lambda x, *w: group_norm(x, groups, *w), x, *weights)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(pull_found(cotangent), pull(cotangent), rtol=1e-10, atol=1e-10)

    def curvature(fn):
        return jacrev(grad(lambda x: (fn(x, groups) * cotangent[:1]).sum()))(x[:1])

    torch.testing.assert_close(curvature(group_norm), curvature(F.group_norm), rtol=1e-9, atol=1e-9)


def test_group_norm_is_as_precise_far_from_zero_as_torchs():
    x = torch.randn(2, 8, 16, 16) * 1e-2 + 100
    exact = F.group_norm(x.double(), 4)
    mine, theirs = [(fn(x, 4) - exact).abs().max() for fn in (group_norm, F.group_norm)]
    assert mine <= 4 * theirs
    low = group_norm(x.bfloat16(), 4)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low, F.group_norm(x.bfloat16(), 4), rtol=2e-2, atol=2e-2)


def test_a_group_norm_of_single_numbers_is_refused():
    for fn in (group_norm, F.group_norm):
        with pytest.raises(ValueError, match=r"several numbers|more than 1 value"):
            fn(torch.ones(1, 3), 3)


def test_group_norm_has_another_form_once_compiled():
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    assert fastest(F.group_norm) is F.group_norm
    assert fastest(torch.relu) is torch.relu
    compiled = torch.compile(lambda x: fastest(F.group_norm)(x, 4), fullgraph=True)(x)
    torch.testing.assert_close(compiled, F.group_norm(x, 4), rtol=1e-5, atol=1e-5)
