"""Any `nn.Module` as a pure model, and back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap

from functorch_mnist import models, random, tree


class Tied(nn.Module):
    """Two layers that share a weight, a frozen layer, a buffer and an attribute that is a plain tensor."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("shift", torch.arange(4.0), persistent=False)
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        return self.decode(self.frozen(self.encode(x)).tanh() + self.shift) * self.scale


def networks():
    norm = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    norm(torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0)))  # statistics other than 0 and 1
    conv = nn.Conv2d(2, 4, 3)
    return {
        "tied": (Tied(), (4,)),
        "group norm": (nn.Sequential(conv, nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)), (2, 6, 6)),
        "batch norm, evaluation": (norm.eval(), (2, 6, 6)),
        "dropout": (nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Dropout(0.2, inplace=True)), (4,)),
        "channel dropout": (nn.Sequential(conv, nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(64, 3)), (2, 6, 6)),
        "attention": (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (3, 8)),
    }


names = pytest.mark.parametrize("name", networks())


@names
@pytest.mark.filterwarnings("ignore:.*vmap:UserWarning")
def test_values_and_gradients_equal_the_module_in_evaluation_mode(name):
    module, shape = networks()[name]
    module = module.double().eval()
    module.scale = getattr(module, "scale", torch.tensor(2.0)).double()
    params, model = models.from_module(module, example_ndim=len(shape))
    x = random.normal(random.key(1), (5, *shape)).double()
    torch.testing.assert_close(model.apply(params, x), module(x), rtol=1e-12, atol=1e-12)
    grads = grad(lambda params: model.apply(params, x).square().sum())(params)
    module(x).square().sum().backward()
    assert list(grads) == [n for n, p in module.named_parameters() if p.requires_grad]
    for n, p in module.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(grads[n], p.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["tied", "group norm", "batch norm, evaluation", "dropout", "channel dropout"])
@pytest.mark.parametrize("keyed", [False, True])
def test_a_batch_is_the_stack_of_its_examples(name, keyed):
    module, shape = networks()[name]
    params, model = models.from_module(module, example_ndim=len(shape))
    params1, one = models.from_module(module)
    x = random.normal(random.key(1), (6, *shape))
    keys = random.split(random.key(2), 6) if keyed else None
    rows = torch.stack([one.apply(params1, x[i], key=keys[i] if keyed else None) for i in range(6)])
    torch.testing.assert_close(model.apply(params, x, key=keys), rows)
    grid = model.apply(params, x.view(2, 3, *shape), key=keys.view(2, 3, 2) if keyed else None)
    torch.testing.assert_close(grid.flatten(0, 1), rows)
    dims = (None, 0, 0) if keyed else (None, 0, None)

    def apply(params, x, key):
        return one.apply(params, x, key=key)

    torch.testing.assert_close(vmap(apply, in_dims=dims)(params1, x, keys), rows)


@names
def test_the_module_is_not_changed_and_its_parameters_are_not_shared(name):
    module, shape = networks()[name]
    before, training = copy.deepcopy(module.state_dict()), [m.training for m in module.modules()]
    params, model = models.from_module(module, example_ndim=len(shape))
    x = random.normal(random.key(1), (2, *shape))
    model.apply(params, x)
    state = torch.random.get_rng_state()
    if name != "attention":
        model.apply(params, x, key=random.split(random.key(0), 2))
    for p in params.values():
        assert not p.requires_grad
        p.fill_(7.0)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    assert [m.training for m in module.modules()] == training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_dropout_comes_from_the_key_and_keeps_its_rate():
    params, model = models.from_module(nn.Dropout(0.25), example_ndim=1)
    x, keys = torch.ones(200, 100), random.split(random.key(0), 200)
    a, b = model.apply(params, x, key=keys), model.apply(params, x, key=keys)
    assert torch.equal(a, b)
    assert a.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (a == 0).double().mean().item() == pytest.approx(0.25, abs=0.015)  # 5 standard deviations of 20,000 draws
    assert torch.equal(model.apply(params, x), x)


def test_two_dropout_layers_of_one_forward_draw_different_masks():
    params, model = models.from_module(nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), example_ndim=1)
    kept = (model.apply(params, torch.ones(100, 100), key=random.split(random.key(0), 100)) != 0).double().mean()
    assert kept.item() == pytest.approx(0.25, abs=0.02)


def test_channel_dropout_of_a_module_drops_whole_channels():
    params, model = models.from_module(nn.Dropout2d(0.5), example_ndim=3)
    y = model.apply(params, torch.ones(50, 8, 3, 3), key=random.split(random.key(0), 50))
    assert torch.equal(y.amin((-2, -1)), y.amax((-2, -1)))
    assert y.unique().tolist() == [0, 2]


def test_tied_parameters_appear_once_and_stay_tied():
    params, _ = models.from_module(Tied(), example_ndim=1)
    assert list(params) == ["encode.weight"]
    doubled = {"encode.weight": torch.eye(4)}
    module = Tied()
    models.load_into(module, doubled)
    assert module.decode.weight is module.encode.weight


@pytest.mark.parametrize(
    "module, fault",
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), r"'1' \(BatchNorm1d\) is in training mode.*eval\(\)"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)).eval(), "no running statistics.*GroupNorm"),
        (nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True)), "'0'.*training mode"),
        (nn.Sequential(nn.LazyLinear(3)), "'0'.*lazy"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_module_that_mixes_examples_or_is_not_ready_is_refused_by_layer(module, fault):
    with pytest.raises(ValueError, match=fault):
        models.from_module(module)


class Calls(nn.Module):
    """A module without parameters whose forward is one function."""

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x)


ATTENTION = nn.MultiheadAttention(4, 1, dropout=0.5).requires_grad_(False)
LSTM = nn.LSTM(4, 4, 2, dropout=0.5, batch_first=True).requires_grad_(False)


def attended(x, *, training):
    weights = (ATTENTION.in_proj_weight, ATTENTION.in_proj_bias, None, None, False, 0.5, ATTENTION.out_proj.weight)
    x = x.transpose(0, 1)
    return F.multi_head_attention_forward(x, x, x, 4, 1, *weights, None, training=training)[0].transpose(0, 1)


def recurrent(x):
    zeros = x.new_zeros(2, len(x), 4)
    return torch.lstm(x, (zeros, zeros), LSTM._flat_weights, True, 2, 0.5, True, False, True)[0]


RANDOM = {
    "randn_like": lambda x: x + torch.randn_like(x),
    "randint_like": lambda x: x + torch.randint_like(x, 3),
    "normal": lambda x: torch.distributions.Normal(x, 1.0).sample(),
    "multinomial": lambda x: x.multinomial(1),
    "poisson": torch.poisson,
    "exponential_": lambda x: torch.empty_like(x).exponential_(),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.5),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(),
    "random_": lambda x: torch.empty_like(x).random_(),
    "gumbel_softmax": F.gumbel_softmax,
    "fractional_max_pool2d": lambda x: F.fractional_max_pool2d(x[None], 1, output_size=1)[0],
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "dropout_": lambda x: torch.dropout_(x, 0.5, train=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "rrelu": lambda x: torch.rrelu(x, training=True),
    "rrelu_": lambda x: F.rrelu_(x, 0.1, 0.3, True),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("keyed", [False, True])
def test_a_function_that_draws_from_the_global_generator_is_refused_by_name(name, keyed):
    params, model = models.from_module(Calls(RANDOM[name]))
    state = torch.random.get_rng_state()
    with pytest.raises(ValueError, match=f"calls {name}, which draws"):
        model.apply(params, torch.ones(2, 4), key=random.key(0) if keyed else None)
    assert torch.equal(torch.random.get_rng_state(), state)


DRAWN = {
    "rand": lambda x: x + torch.rand(x.shape),
    "rand_like": lambda x: x + torch.rand_like(x),
    "bernoulli": lambda x: x + (x / 2).bernoulli(),
    "bernoulli of a rate": lambda x: x + torch.bernoulli(x, p=0.5),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.5),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "multi_head_attention_forward": lambda x: attended(x, training=True),
    "lstm": recurrent,
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_function_that_draws_is_drawn_from_the_key_of_each_example(name):
    params, model = models.from_module(Calls(DRAWN[name]), example_ndim=2)
    state = torch.random.get_rng_state()
    x, keys = random.uniform(random.key(1), (6, 3, 4)), random.split(random.key(0), 6)
    batch = model.apply(params, x, key=keys)
    rows = torch.stack([model.apply(params, row, key=key) for row, key in zip(x, keys, strict=True)])
    torch.testing.assert_close(batch, rows, rtol=1e-6, atol=1e-7)  # of products of other sizes: a rounding
    twins = model.apply(params, x[:1].expand(6, 3, 4), key=keys)
    assert all(not torch.equal(twins[0], twin) for twin in twins[1:])
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", DRAWN)
def test_a_function_that_draws_is_refused_without_a_key(name):
    params, model = models.from_module(Calls(DRAWN[name]), example_ndim=2)
    state = torch.random.get_rng_state()
    for lead in ((), (3,)):
        with pytest.raises(ValueError, match="without a key nothing may be random"):
            model.apply(params, torch.ones(*lead, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "fn",
    [
        F.rrelu,
        nn.RReLU(),
        nn.AlphaDropout(0.5),
        nn.FeatureAlphaDropout(0.5),
        lambda x: torch.dropout_(x, 0.5, False),
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: attended(x, training=False),
        nn.TransformerEncoderLayer(4, 1, 4, dropout=0.1, batch_first=True),
    ],
)
def test_a_random_function_that_is_switched_off_is_allowed(fn):
    module = Calls(fn).eval()
    params, model = models.from_module(module)
    x = torch.ones(2, 4)
    torch.testing.assert_close(model.apply(params, x), module(x[None].clone())[0])


@pytest.mark.parametrize("fn", [F.dropout, F.dropout1d, lambda x: torch.dropout(x, 0.5, True)])
def test_dropout_in_evaluation_mode_is_refused_without_a_key(fn):
    params, model = models.from_module(Calls(fn), example_ndim=2)
    for x in (torch.ones(2, 4), torch.ones(3, 2, 4)):
        with pytest.raises(ValueError, match=r"without a key nothing may be random.*training=self\.training"):
            model.apply(params, x)
    assert model.apply(params, torch.ones(2, 4), key=random.key(0)).unique().tolist() == [0, 2]


def test_the_dropout_inside_of_a_layer_is_drawn_from_the_key_of_each_example():
    layer = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True, dropout=0.5)
    layer.dropout = layer.dropout1 = layer.dropout2 = nn.Identity()  # that of the attention is left
    params, model = models.from_module(layer.double(), example_ndim=2)
    x, keys = random.normal(random.key(1), (5, 3, 4)).double(), random.split(random.key(0), 5)
    batch = model.apply(params, x, key=keys)
    rows = torch.stack([model.apply(params, row, key=key) for row, key in zip(x, keys, strict=True)])
    torch.testing.assert_close(batch, rows, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(batch, model.apply(params, x))
    twins = model.apply(params, x[:1].expand(5, 3, 4), key=keys)
    assert len({tuple(twin.flatten().tolist()) for twin in twins}) > 1


class Twice(Calls):
    def forward(self, x):
        return self.fn(x) + x  # in place, the second x is the first one's result


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("fn", [nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), F.relu_, lambda x: x.add_(1)])
def test_an_input_is_not_written_to_and_the_module_computes_what_it_did(fn, keyed):
    module = Twice(fn)
    params, model = models.from_module(module, example_ndim=1)
    x = torch.tensor([[-1.0, 2.0]])
    result = model.apply(params, x, key=random.split(random.key(0), 1) if keyed else None)
    assert x.tolist() == [[-1, 2]]
    if not isinstance(fn, nn.Dropout):
        assert torch.equal(result, module(x.clone()))


def test_an_empty_batch_gives_no_outputs():
    params, model = models.from_module(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), example_ndim=1)
    for lead in ((0,), (2, 0)):
        for keys in (None, torch.zeros(*lead, 2, dtype=torch.int32)):
            assert model.apply(params, torch.zeros(*lead, 4), key=keys).shape == (*lead, 3)


def test_parameters_keys_and_inputs_that_do_not_fit_are_refused():
    params, model = models.from_module(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), example_ndim=1)
    x, weight, bias = torch.zeros(5, 4), params["0.weight"], params["0.bias"]
    for arguments, fault in [
        (({"0.weight": weight}, x), r"apply: .*Missing \['0\.bias'\]"),
        (({**params, "more": bias}, x), r"apply: .*unexpected \['more'\]"),
        (({"0.weight": weight.T, "0.bias": bias}, x), r"0\.weight has shape \(3, 4\).*Found \(4, 3\)"),
        ((params, x[0, 0]), r"one example of input has 1 axes\. Found \(\)"),
        ((params, x, random.split(random.key(0), 5)), r"takes the inputs \['input'\]\. Found 2\. Pass a key as key="),
    ]:
        with pytest.raises(ValueError, match=fault):
            model.apply(*arguments)
    for given, key, fault in [
        (x, random.key(0), r"one key per example, \(5, 2\)\. Found \(2,\)"),
        (x[0], random.split(random.key(0), 5), r"one key per example, \(2,\)\. Found \(5, 2\)"),
    ]:
        with pytest.raises(ValueError, match=fault):
            model.apply(params, given, key=key)


def test_init_draws_new_parameters_from_the_key_alone():
    params, model = models.from_module(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)))
    state = torch.random.get_rng_state()
    a, b, c, d = (model.init(random.key(seed)) for seed in (1, 1, 2, 1 + 2**32))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(tree.ravel(a), tree.ravel(b))
    assert not torch.equal(a["0.weight"], c["0.weight"])
    assert not torch.equal(a["0.weight"], d["0.weight"])
    assert a["0.weight"].abs().max() <= 1 / 18**0.5
    assert torch.equal(a["1.weight"], torch.ones(4))
    assert tree.paths(a) == tree.paths(params)


@pytest.mark.parametrize("returned", [3, "word", None, (), {"a": None}])
def test_a_module_that_returns_no_tensor_is_refused(returned):
    params, model = models.from_module(Calls(lambda x: returned))
    with pytest.raises(TypeError, match=f"must return tensors.*Found {type(returned).__name__}"):
        model.apply(params, torch.ones(2))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x + self.token


def test_init_of_a_layer_that_cannot_draw_its_parameters_is_refused():
    _, model = models.from_module(nn.Sequential(Bare()))
    with pytest.raises(ValueError, match="'0' \\(Bare\\) has no reset_parameters"):
        model.init(random.key(0))


def test_load_into_is_the_way_back():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    params, model = models.from_module(module, example_ndim=1)
    params = tree.map(lambda p: p + 1, params)
    models.load_into(module, params)
    x = torch.ones(2, 3)
    torch.testing.assert_close(module(x), model.apply(params, x))
    assert all(p.requires_grad for p in module.parameters())


def test_load_into_refuses_other_names_and_shapes_and_then_changes_nothing():
    module = nn.Linear(3, 2)
    before = copy.deepcopy(module.state_dict())
    for params, fault in [
        ({"weight": torch.zeros(2, 3)}, r"Missing \['bias'\]"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "more": torch.zeros(1)}, r"unexpected \['more'\]"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}, r"bias has shape \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=fault):
            models.load_into(module, params)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


@pytest.mark.parametrize("keyed", [False, True])
def test_a_model_of_a_module_compiles_inside_grad_and_with_a_key_has_dropout(keyed):
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 1))
    params, model = models.from_module(module)

    def apply(params, x, key):
        return model.apply(params, x, key=key)

    def gradient(params, x, keys):
        def loss(params):
            dims = (None, 0, 0 if keyed else None)
            return vmap(apply, in_dims=dims)(params, x, keys).square().sum()

        return grad(loss)(params)

    x, keys = torch.ones(5, 4), random.split(random.key(0), 5) if keyed else None
    eager = gradient(params, x, keys)
    backend = "inductor" if keyed else "eager"
    fused = torch.compile(gradient, fullgraph=True, dynamic=False, backend=backend)(params, x, keys)
    torch.testing.assert_close(tree.leaves(fused), tree.leaves(eager), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moved", ["parameters", "inputs"])
def test_what_was_moved_to_another_dtype_is_refused_by_name(moved):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    module[2].weight.requires_grad_(False)
    params, model = models.from_module(module, example_ndim=1)
    x = torch.ones(5, 3)
    if moved == "inputs":
        x = x.double()
    else:
        params = tree.map(lambda p: p.double(), params)
    with pytest.raises(ValueError, match=f"must be of one dtype.*{moved} of torch.float64.*before from_module"):
        model.apply(params, x)
    norm = nn.BatchNorm1d(3).eval()  # torch takes parameters in single precision beside inputs in half
    params, model = models.from_module(norm, example_ndim=1)
    assert model.apply(params, x.bfloat16()).dtype == torch.bfloat16
