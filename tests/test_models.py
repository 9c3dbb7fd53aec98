"""The ready-made models against the `nn.Module` they are twins of."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap

from functorch_mnist import layers, losses, models, random, tree


class ArticleNet(nn.Module):
    """The article's network; its dropout layers are set from outside."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dropout1, self.dropout2 = nn.Dropout2d(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(self.conv2(F.relu(self.conv1(x))), 2)
        x = torch.flatten(self.dropout1(x), 1)
        return F.log_softmax(self.fc2(self.dropout2(F.relu(self.fc1(x)))), dim=1)


class SmallNet(nn.Module):
    """The network of Opacus' MNIST example."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 8, 2, padding=3), nn.Conv2d(16, 32, 4, 2)
        self.fc1, self.fc2 = nn.Linear(512, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Mask(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask, rate):
        super().__init__()
        self.mask, self.rate = mask, rate

    def forward(self, x):
        return x * self.mask / (1 - self.rate)


TWINS = {
    "linear": (models.linear(7, 3), lambda: nn.Linear(7, 3), (7,)),
    "mlp": (models.mlp((7, 5, 4, 3)), lambda: nn.Sequential(
        nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (7,)),
    "mlp of tanh": (models.mlp((7, 5, 3), activation=layers.tanh), lambda: nn.Sequential(
        nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), (7,)),
    "cnn": (models.cnn(), ArticleNet, (1, 28, 28)),
    "small cnn": (models.small_cnn(), SmallNet, (1, 28, 28)),
}  # fmt: skip
twins = pytest.mark.parametrize("name", TWINS)


def double(params):
    return tree.map(torch.Tensor.double, params)


def examples(*shape):
    return random.normal(random.key(5), shape).double()


@twins
def test_parameters_have_the_names_shapes_and_order_of_the_module(name):
    model, module, _ = TWINS[name]
    params = model.init(random.key(0))
    expected = {n: p.shape for n, p in module().named_parameters()}
    assert {n: p.shape for n, p in params.items()} == expected
    assert list(params) == list(expected)


@twins
def test_parameters_have_the_distribution_of_the_module(name):
    model, module, _ = TWINS[name]
    draws = [model.init(key) for key in random.split(random.key(1), 30)]
    fan_in = {n.rpartition(".")[0]: p[0].numel() for n, p in module().named_parameters() if p.dim() > 1}
    for n in draws[0]:
        bound = 1 / math.sqrt(fan_in[n.rpartition(".")[0]])  # nn.Linear and nn.Conv2d: uniform in ±1/√fan_in
        values = torch.cat([draw[n].flatten() for draw in draws]) / bound
        assert values.abs().max() <= 1
        error = 4 / math.sqrt(len(values))  # four standard deviations or more
        assert values.mean().abs() < error
        assert abs(values.square().mean() - 1 / 3) < error


@twins
def test_init_is_a_function_of_the_key_alone(name):
    model = TWINS[name][0]
    a, b, c = (tree.ravel(model.init(random.key(seed))) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@twins
def test_values_and_gradients_equal_the_modules_in_evaluation_mode(name):
    model, module, shape = TWINS[name]
    params, x = double(model.init(random.key(0))), examples(4, *shape)
    net = module().double().eval()
    models.load_into(net, params)
    value, expected = model.apply(params, x), net(x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    weights = examples(*value.shape)
    grads = grad(lambda params: (model.apply(params, x) * weights).sum())(params)
    (expected * weights).sum().backward()
    for n, p in net.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-12, atol=1e-12)


def test_the_cnn_in_training_mode_equals_the_module_given_the_same_masks():
    model, params, x = models.cnn(), double(models.cnn().init(random.key(0))), examples(4, 1, 28, 28)
    keys = random.split(random.key(9), 4)
    channel_keys, unit_keys = random.split(keys).unbind(-2)
    net = ArticleNet().double().train()
    net.dropout1 = Mask(random.bernoulli(channel_keys, 0.75, (64, 1, 1)), 0.25)
    net.dropout2 = Mask(random.bernoulli(unit_keys, 0.5, (128,)), 0.5)
    models.load_into(net, params)
    torch.testing.assert_close(model.apply(params, x, keys), net(x), rtol=1e-12, atol=1e-12)
    labels = torch.tensor([3, 1, 4, 1])
    grads = grad(lambda params: losses.cross_entropy(model.apply(params, x, keys), labels).mean())(params)
    F.cross_entropy(net(x), labels).backward()
    for n, p in net.named_parameters():
        torch.testing.assert_close(grads[n], p.grad, rtol=1e-12, atol=1e-12)


@twins
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)])
def test_a_batch_is_the_stack_of_its_examples_with_dropout_on(name, lead):
    model, _, shape = TWINS[name]
    params, x = double(model.init(random.key(0))), examples(*lead, *shape)
    keys = random.fold_in(random.key(2), torch.arange(math.prod(lead))).view(*lead, 2)
    batch = model.apply(params, x, keys).view(-1, model.apply(params, x, keys).shape[-1])
    rows = [
        model.apply(params, example, key) for example, key in zip(x.view(-1, *shape), keys.view(-1, 2), strict=True)
    ]
    torch.testing.assert_close(batch, torch.stack(rows), rtol=0, atol=1e-12)
    if len(lead) == 1:
        mapped = vmap(model.apply, in_dims=(None, 0, 0))(params, x, keys)
        torch.testing.assert_close(batch, mapped, rtol=0, atol=1e-12)


def test_dropout_is_on_with_a_key_and_off_without():
    model, params, x = models.cnn(), models.cnn().init(random.key(0)), examples(1, 28, 28).float()
    a, b, off = model.apply(params, x, random.key(0)), model.apply(params, x, random.key(1)), model.apply(params, x)
    assert not torch.equal(a, b)
    assert not torch.equal(a, off)
    assert torch.equal(models.cnn(dropout=(0, 0)).apply(params, x, random.key(0)), off)


@twins
def test_gradients_equal_finite_differences(name):
    model, _, shape = TWINS[name]
    params, x = double(model.init(random.key(0))), examples(2, *shape)
    keys, labels = random.split(random.key(2), 2), torch.tensor([0, 2])

    def loss(params):
        return losses.cross_entropy(model.apply(params, x, keys), labels).mean()

    grads = grad(loss)(params)
    for number, (n, p) in enumerate(params.items()):
        direction = random.normal(random.key(number), p.shape).double()
        step = 1e-6 / direction.norm()
        up, down = ({**params, n: p + sign * step * direction} for sign in (1, -1))
        slope = (loss(up) - loss(down)) / (2 * step)
        # The error of the central difference: rounding of the loss over the step, 2e-16 · |direction| / 1e-6.
        torch.testing.assert_close((grads[n] * direction).sum(), slope, rtol=1e-5, atol=1e-9 * direction.norm().item())


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_compiled_forward_and_gradient_equal_the_eager_ones(name):
    model, _, shape = TWINS[name]
    params, x, keys = double(model.init(random.key(0))), examples(3, *shape), random.split(random.key(2), 3)
    labels = torch.tensor([0, 1, 2])

    def value_and_grad(params, x, keys, labels):
        def loss(params):
            return losses.cross_entropy(model.apply(params, x, keys), labels).mean()

        return torch.func.grad_and_value(loss)(params)

    eager = value_and_grad(params, x, keys, labels)
    fused = torch.compile(value_and_grad, fullgraph=True, dynamic=False, backend="aot_eager")(params, x, keys, labels)
    torch.testing.assert_close(tree.leaves(fused), tree.leaves(eager), rtol=1e-10, atol=1e-12)


def test_the_article_fault_cannot_be_written_training_lowers_the_loss():
    model = models.mlp((7, 16, 3))
    params, x, labels = model.init(random.key(0)), examples(30, 7).float(), torch.arange(30) % 3

    def loss(params):
        return losses.cross_entropy(model.apply(params, x), labels).mean()

    before = loss(params)
    for _ in range(50):
        params = tree.map(lambda w, g: w - 0.5 * g, params, grad(loss)(params))
    assert loss(params) < 0.5 * before


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0), (-1, 2)])
def test_an_mlp_needs_two_positive_sizes(sizes):
    with pytest.raises(ValueError, match="two or more positive widths"):
        models.mlp(sizes)


@pytest.mark.parametrize("rates", [(1.0, 0.5), (0.25, -0.1), (float("nan"), 0)])
def test_a_dropout_rate_outside_its_range_is_refused(rates):
    with pytest.raises(ValueError, match=r"rates must be in \[0, 1\)"):
        models.cnn(dropout=rates)


def test_functional_call_of_the_module_with_our_parameters_is_our_model():
    params, x = models.cnn().init(random.key(0)), examples(2, 1, 28, 28).float()
    torch.testing.assert_close(functional_call(ArticleNet().eval(), params, (x,)), models.cnn().apply(params, x))
