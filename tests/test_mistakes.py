"""What a user gets wrong, and the one line that says so before any number is made."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functorch_mnist as fm

B = 6
KEY = fm.random.key(0)
KEYS = fm.random.split(KEY, B)
MODEL, CNN = fm.models.mlp([4, 8, 3]), fm.models.cnn()
PARAMS, CNN_PARAMS = MODEL.init(KEY), CNN.init(KEY)
X, Y = fm.random.normal(KEY, (B, 4)), torch.arange(B) % 3
IMAGES = torch.zeros(B, 1, 28, 28)


class Two(nn.Module):
    """A module of two inputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, a, b):
        return self.layer(a) + self.layer(b)


MODULE = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 26 * 26, 3))


def of(module, **options):
    """`apply` of a module at its own parameters."""
    params, model = fm.models.from_module(module, **options)
    return lambda *inputs, **named: model.apply(params, *inputs, **named)


def loss_fn(params, x, y):
    return fm.losses.cross_entropy(MODEL.apply(params, x), y)


def with_key(params, x, y, key):
    return fm.losses.cross_entropy(MODEL.apply(params, x, key), y)


def with_dropout(params, x, y):
    return fm.losses.cross_entropy(F.dropout(MODEL.apply(params, x)), y)


def with_noise(params, x, y):
    return fm.losses.cross_entropy(MODEL.apply(params, x + torch.randn_like(x)), y)


def of_a_batch(params, x, y):
    return F.cross_entropy(MODEL.apply(params, x)[None], y[None], reduction="none")


def of_images(params, x, y):
    return fm.losses.cross_entropy(CNN.apply(params, x), y)


# Of each slip: the call and what its message says.
MISTAKES = {
    # Parameters
    "a module where parameters belong": (
        lambda f: f(loss_fn, nn.Linear(4, 3), X, Y),
        "params must be a pytree of float tensors. Found the module Linear. Use params, model = models.from_module",
    ),
    "module.parameters()": (
        lambda f: f(loss_fn, nn.Linear(4, 3).parameters(), X, Y),
        "params must be a pytree of float tensors. Found a generator. Pass dict(module.named_parameters())",
    ),
    "parameters that are integers": (
        lambda f: f(loss_fn, {"w": torch.ones(4, dtype=torch.int64)}, X, Y),
        "Found torch.int64 (4,) at 'w'. Convert it to float",
    ),
    "a parameter that is None": (lambda f: f(loss_fn, {"w": None}, X, Y), "Found NoneType at 'w'"),
    "the loss and the parameters swapped": (lambda f: f(PARAMS, loss_fn, X, Y), "Found function"),
    "the parameters of another model": (
        lambda f: f(loss_fn, fm.models.linear(4, 3).init(KEY), X, Y),
        "mlp: the parameters must be the model's. Missing ['0.bias'",
    ),
    # The loss
    "a module as the loss": (
        lambda f: f(MODULE, PARAMS, X, Y),
        "the loss must be a function",
    ),
    "a loss that returns a vector": (
        lambda f: f(of_a_batch, PARAMS, X, Y),
        "the loss of one example must be a 0-d tensor. Found (1,). Is a reduction missing",
    ),
    "a loss that returns a number": (
        lambda f: f(lambda p, x, y: 1.0, PARAMS, X, Y),
        "must be a 0-d tensor. Found float. Return the tensor itself",
    ),
    "y left out": (
        lambda f: f(loss_fn, PARAMS, X),
        "the loss takes (params, x, y). Found params and a batch of 1 tensor. Pass one tensor (B, …) for each",
    ),
    "a tensor too many": (lambda f: f(loss_fn, PARAMS, X, Y, Y), "Found params and a batch of 3 tensors"),
    "keys left out": (
        lambda f: f(with_key, PARAMS, X, Y),
        "the loss takes (params, x, y, key). Found params and a batch of 2 tensors. Pass one key per example",
    ),
    "dropout of torch in a loss": (
        lambda f: f(with_dropout, PARAMS, X, Y),
        "random numbers in a loss must come from a key. The loss calls dropout",
    ),
    "noise of torch in a loss": (lambda f: f(with_noise, PARAMS, X, Y), "The loss calls randn_like"),
    # The inputs
    "uint8 images": (
        lambda f: f(of_images, CNN_PARAMS, IMAGES.byte(), Y),
        "conv2d: x must be floats. Found",
    ),
    "integer inputs": (lambda f: f(loss_fn, PARAMS, X.long(), Y), "linear: x must be floats. Found torch.int64"),
    "float64 inputs": (lambda f: f(loss_fn, PARAMS, X.double(), Y), "x and weight must have one dtype"),
    "labels that are floats": (lambda f: f(loss_fn, PARAMS, X, Y.float()), "labels must be integers"),
}
BATCHES = {
    "tensors of other lengths": ((X, Y[:5]), "must have one leading size B. Found shapes [(6, 4), (5,)]"),
    "a 0-d tensor": ((X, torch.tensor(1)), "Found shapes [(6, 4), ()]. What all examples share belongs in the loss"),
    "no tensor": ((), "a batch must have at least one tensor"),
    "a tuple": (((X, Y),), "a batch must be tensors (B, …). Found tuple. Pass its tensors one by one"),
    "one key": ((X, Y, KEY), "Is (2,) a single key? random.split(key, B) gives one per example"),
}
CALLS = {
    "max_norm is text": (
        lambda: fm.per_sample.clipped_sum(loss_fn, PARAMS, X, Y, max_norm="1"),
        "clipped_sum: max_norm must be a number, a tensor or a function. Found '1'",
    ),
    "the mask is a list": (
        lambda: fm.per_sample.norms(loss_fn, PARAMS, X, Y, mask=[True] * B),
        "a bool tensor",
    ),
    "the plan is a strategy": (
        lambda: fm.per_sample.norms(loss_fn, PARAMS, X, Y, plan="dense"),
        "per_sample.plan",
    ),
    "an example as a tuple": (lambda: fm.per_sample.prepare(loss_fn, PARAMS, (X[0], Y[0])), "Found tuple"),
    "a direction of another model": (
        lambda: fm.per_sample.dot(loss_fn, PARAMS, X, Y, direction=fm.models.linear(4, 3).init(KEY)),
        "Found dict with 4 leaves (0.weight, 0.bias, 2.weight, 2.bias) and dict with 2 leaves (weight, bias)",
    ),
    # ready-made models
    "a second input where the key belongs": (
        lambda: MODEL.apply(PARAMS, X, X),
        "mlp: the key must be int32 (6, 2), one per example. Found torch.float32 (6, 4)",
    ),
    "labels where the key belongs": (lambda: CNN.apply(CNN_PARAMS, IMAGES, Y), "cnn: the key must be int32 (6, 2)"),
    "one key for a batch": (lambda: CNN.apply(CNN_PARAMS, IMAGES, KEY), "Found torch.int32 (2,)"),
    "a seed where the key belongs": (lambda: CNN.apply(CNN_PARAMS, IMAGES, 0), "Found int"),
    "images without channels": (lambda: CNN.apply(CNN_PARAMS, IMAGES[:, 0]), "Is the axis of channels missing?"),
    "images to an MLP": (lambda: MODEL.apply(PARAMS, IMAGES), "mlp: the input must be (..., 4)"),
    "input and parameters swapped": (lambda: MODEL.apply(X, PARAMS), "params must be a dict of tensors"),
    "a module in apply": (lambda: MODEL.apply(MODULE, X), "mlp: params must be a dict of tensors"),
    "init with keys": (lambda: MODEL.init(KEYS), "init: the key must be one key (2,). Found (6, 2)"),
    "init with a seed": (lambda: MODEL.init(0), "init: a key is an int32 tensor"),
    "one width": (lambda: fm.models.mlp(784), "mlp: sizes must be two or more positive widths. Found 784"),
    # modules
    "a class where a module belongs": (lambda: fm.models.from_module(nn.Linear), "Found Linear. Call the class"),
    "parameters where a module belongs": (
        lambda: fm.models.load_into(PARAMS, MODULE),
        "Found dict",
    ),
    "a negative example_ndim": (lambda: of(MODULE, example_ndim=-1), "example_ndim must be a number of axes"),
    "example_ndim of an unknown input": (
        lambda: of(Two(), example_ndim={"c": 1}),
        "Found the names ['c']",
    ),
    "an unknown shared input": (lambda: of(Two(), shared=("c",)), "Found the names ['c']"),
    "example_ndim too small": (
        lambda: of(MODULE, example_ndim=1)(IMAGES),
        "with which one input is (28,), where the forward takes (1, 28, 28). Set example_ndim=3",
    ),
    "example_ndim too large": (lambda: of(MODULE, example_ndim=4)(IMAGES), "Set example_ndim=3"),
    "a batch without example_ndim": (lambda: of(MODULE)(IMAGES), "Found without example_ndim"),
    "uint8 images of a module": (
        lambda: of(MODULE, example_ndim=3)(IMAGES.byte()),
        "input must be floats",
    ),
    "a key by position": (lambda: of(Two(), example_ndim=1)(X, X, KEYS), "Pass a key as key=…"),
    "a seed as the key of a module": (
        lambda: of(Two(), example_ndim=1)(X, X, key=0),
        "one key per example, (6, 2)",
    ),
    "an input left out": (lambda: of(Two(), example_ndim=1)(X), "the forward takes (a, b). Found inputs for ['a']"),
    "an unknown input": (lambda: of(Two(), example_ndim=1)(X, c=X), "Found inputs for ['a', 'c']"),
    # trees, layers, data
    "a norm of a module": (lambda: fm.tree.norm(MODULE), "tree.norm: the leaves must be tensors. Found Sequential"),
    "an optimizer of a module": (
        lambda: fm.optim.adam(0.1).init(MODULE),
        "adam: params must be a pytree",
    ),
    "dropout with a seed": (lambda: fm.layers.dropout(X, 0, rate=0.5), "dropout: a key is an int32 tensor"),
    "augmentation with a seed": (
        lambda: fm.data.augmented(IMAGES, 0, fm.data.Augmentation()),
        "a key is an int32 tensor",
    ),
    "a label that is a number": (lambda: fm.losses.cross_entropy(X[0], 1), "labels must be a tensor. Found int"),
    "an order of images": (
        lambda: fm.data.epoch_order(X, key=KEY, epoch=0),
        "examples must be an int, N. Found Tensor",
    ),
}


@pytest.mark.parametrize("function", [fm.per_sample.norms, fm.per_sample.grads], ids=["factored", "dense"])
@pytest.mark.parametrize("slip", MISTAKES)
def test_a_loss_that_does_not_fit_is_refused_in_one_line(slip, function):
    call, text = MISTAKES[slip]
    refused(lambda: call(function), text)


@pytest.mark.parametrize("name", ["norms", "grads", "kronecker", "second_moment"])
@pytest.mark.parametrize("slip", BATCHES)
def test_a_batch_that_does_not_fit_is_refused_in_one_line(slip, name):
    batch, text = BATCHES[slip]
    refused(lambda: getattr(fm.per_sample, name)(loss_fn, PARAMS, *batch), text)


@pytest.mark.parametrize("slip", CALLS)
def test_an_argument_that_does_not_fit_is_refused_in_one_line(slip):
    refused(*CALLS[slip])


@pytest.mark.parametrize("function", [fm.per_sample.plan, fm.per_sample.prepare])
def test_plan_and_prepare_refuse_what_the_others_refuse(function):
    more = {"batch_size": B} if function is fm.per_sample.plan else {}
    refused(lambda: function(loss_fn, MODULE, X[0], Y[0], **more), "Found the module Sequential")
    refused(lambda: function(with_dropout, PARAMS, X[0], Y[0], **more), "The loss calls dropout")


def test_dropout_that_is_off_and_random_ops_of_a_module_with_keys_are_not_refused():
    def off(params, x, y):
        return loss_fn(params, F.dropout(x, training=False), y)

    torch.testing.assert_close(
        fm.per_sample.norms(off, PARAMS, X, Y), fm.per_sample.norms(loss_fn, PARAMS, X, Y), rtol=0, atol=0
    )
    apply = of(nn.Sequential(nn.Dropout(), nn.Linear(4, 3)), example_ndim=1)
    assert apply(X, key=KEYS).shape == (B, 3)


def test_a_refused_loss_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        fm.per_sample.norms(with_noise, PARAMS, X, Y)
    assert torch.equal(torch.get_rng_state(), before)


def refused(call, text):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert text in message
    assert "\n" not in message
