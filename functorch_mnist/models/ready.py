"""The models of the tutorial: a linear map, a multi-layer perceptron and a convolutional network."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .. import layers, random
from .model import Model, Params, check_call

Activation = Callable[[Tensor], Tensor]


def linear(in_features: int, out_features: int, *, bias: bool = True) -> Model:
    """A linear map, the twin of `nn.Linear`.

    Args:
        in_features: D.
        out_features: H.
        bias: whether there is one.

    Returns:
        A model of (..., D) to (..., H), with parameters `weight` and, where there is one, `bias`.

    Example:
        >>> import torch
        >>> model = linear(2, 1)
        >>> model.apply({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, torch.tensor([1.0, 2.0]))
        tensor([3.])
    """

    names = ("weight", "bias") if bias else ("weight",)

    def apply(params: Params, x: Tensor, key: Tensor | None = None) -> Tensor:
        check_call("linear", params, names, x, (in_features,), key)
        return layers.linear(x, params["weight"], params["bias"] if bias else None)

    def init(key: Tensor) -> Params:
        params = _init(key, {"": (out_features, in_features)})
        return params if bias else {"weight": params["weight"]}

    return Model(init, apply)


def mlp(sizes: Sequence[int], *, activation: Activation = layers.relu) -> Model:
    """Linear layers with an activation between them, the twin of `nn.Sequential(nn.Linear, activation, nn.Linear, …)`.

    Args:
        sizes: widths from input to output, at least two.
        activation: elementwise function.

    Returns:
        A model of (..., sizes[0]) to (..., sizes[-1]), with parameters `0.weight`, `0.bias`, `2.weight`, ….

    Raises:
        ValueError: fewer than two sizes, or one below 1.
    """
    if isinstance(sizes, int) or len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"mlp: sizes must be two or more positive widths. Found {sizes}.")
    shapes = {f"{2 * i}.": (sizes[i + 1], sizes[i]) for i in range(len(sizes) - 1)}
    *hidden, last = shapes
    names = _names(shapes)

    def apply(params: Params, x: Tensor, key: Tensor | None = None) -> Tensor:
        check_call("mlp", params, names, x, (sizes[0],), key)
        for name in hidden:
            x = activation(layers.linear(x, params[name + "weight"], params[name + "bias"]))
        return layers.linear(x, params[last + "weight"], params[last + "bias"])

    return Model(lambda key: _init(key, shapes), apply)


def cnn(*, activation: Activation = layers.relu, dropout: tuple[float | Tensor, float | Tensor] = (0.25, 0.5)) -> Model:
    """The tutorial's network: conv 32, conv 64, max-pool, dropout, linear 128, dropout, linear 10, log-softmax.

    Args:
        activation: elementwise function after the first convolution and the first linear layer.
        dropout: rates in [0, 1) of the channel dropout after pooling and of the dropout before the last layer, numbers
            or 0-d tensors.

    Returns:
        A model of (..., 1, 28, 28) images to (..., 10) log-probabilities, with parameters `conv1.weight`, `conv1.bias`,
        `conv2.…`, `fc1.…` and `fc2.…`: 1,199,882 numbers.

    Raises:
        ValueError: a rate is outside [0, 1).

    Guarantees: equals the `nn.Module` of the same name and weights, with dropout off, and with it on given the masks.
    """
    if not all(isinstance(rate, Tensor) or 0 <= rate < 1 for rate in dropout):
        raise ValueError(f"cnn: dropout rates must be in [0, 1). Found {dropout}.")
    channel_rate, unit_rate = dropout
    shapes = {"conv1.": (32, 1, 3, 3), "conv2.": (64, 32, 3, 3), "fc1.": (128, 9216), "fc2.": (10, 128)}
    names = _names(shapes)

    def apply(params: Params, x: Tensor, key: Tensor | None = None) -> Tensor:
        check_call("cnn", params, names, x, (1, 28, 28), key)
        x = layers.channels_last(x)
        x = activation(layers.conv2d(x, params["conv1.weight"], params["conv1.bias"]))  # (..., 32, 26, 26)
        x = layers.max_pool2d(layers.conv2d(x, params["conv2.weight"], params["conv2.bias"]))  # (..., 64, 12, 12)
        if key is not None:
            channel_key, unit_key = random.split(key).unbind(-2)
            x = layers.channel_dropout(x, channel_key, rate=channel_rate)
        x = activation(layers.image_linear(x, params["fc1.weight"], params["fc1.bias"]))  # (..., 128)
        if key is not None:
            x = layers.dropout(x, unit_key, rate=unit_rate)
        return layers.log_softmax(layers.linear(x, params["fc2.weight"], params["fc2.bias"]))

    return Model(lambda key: _init(key, shapes), apply)


def small_cnn(*, activation: Activation = layers.relu) -> Model:
    """The network on which differentially private training is compared: conv 16, pool, conv 32, pool, linear 32 and 10.

    Both pools take the maximum of 2 by 2 pixels, a pixel apart.

    Args:
        activation: elementwise function after all layers but the last.

    Returns:
        A model of (..., 1, 28, 28) images to (..., 10) logits, with parameters `conv1.weight`, `conv1.bias`, `conv2.…`,
        `fc1.…` and `fc2.…`: 26,010 numbers.

    Reference: Papernot et al., "Tempered sigmoid activations for deep learning with differential privacy", AAAI 2021,
        table 1; with ReLU, the MNIST examples of Opacus and of TensorFlow Privacy.
    """
    shapes = {"conv1.": (16, 1, 8, 8), "conv2.": (32, 16, 4, 4), "fc1.": (32, 512), "fc2.": (10, 32)}
    names = _names(shapes)

    def apply(params: Params, x: Tensor, key: Tensor | None = None) -> Tensor:
        check_call("small_cnn", params, names, x, (1, 28, 28), key)
        x = layers.channels_last(x)
        x = activation(layers.conv2d(x, params["conv1.weight"], params["conv1.bias"], stride=2, padding=3))
        x = layers.max_pool2d(x, stride=1)  # (..., 16, 13, 13)
        x = activation(layers.conv2d(x, params["conv2.weight"], params["conv2.bias"], stride=2))
        x = layers.flatten(layers.max_pool2d(x, stride=1))  # (..., 512)
        x = activation(layers.linear(x, params["fc1.weight"], params["fc1.bias"]))
        return layers.linear(x, params["fc2.weight"], params["fc2.bias"])

    return Model(lambda key: _init(key, shapes), apply)


def _names(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """The names of the parameters of layers."""
    return tuple(layer + name for layer in shapes for name in ("weight", "bias"))


def _init(key: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Params:
    """Weights and biases as `nn.Linear` and `nn.Conv2d` draw them: uniform in ±1/√fan_in."""
    random.check_key("init", key)
    if key.dim() != 1:
        raise ValueError(f"init: the key must be one key (2,). Found {tuple(key.shape)}. Use vmap for several models.")
    params: Params = {}
    for layer_key, (name, shape) in zip(random.split(key, len(shapes)), shapes.items(), strict=True):
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        weight_key, bias_key = random.split(layer_key)
        params[name + "weight"] = random.uniform(weight_key, shape, -bound, bound)
        params[name + "bias"] = random.uniform(bias_key, shape[:1], -bound, bound)
    return params
