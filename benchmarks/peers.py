"""The same quantities as others compute them: a clipped SGD step by Opacus and by JAX, norms by BackPACK.

Each function returns a `Work`, or raises ImportError where its package is not installed (`pip install -e '.[bench]'`).
All start from the same weights, take the same normalised batch, sum gradients of norm at most `max_norm`, add noise of
deviation `noise()` and divide by B. The harness first compares them with no noise, then times them with it.
"""

import os
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from functorch_mnist import models

from .step import LR, MOMENTUM, Net, Work

Noise = Callable[[], float]


def opacus(
    params: models.Params, x: Tensor, labels: Tensor, max_norm: float, noise: Noise, *, ghost: bool
) -> Work[models.Params]:
    """A step of Opacus: hooks that materialise every sample gradient, or ghost clipping by two backward passes."""
    from opacus import GradSampleModule
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    warnings.filterwarnings("ignore", "Full backward hook is firing")
    net = Net()
    models.load_into(net, params)
    sgd = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    constants: dict[str, Any] = {
        "noise_multiplier": 0.0, "max_grad_norm": max_norm, "expected_batch_size": len(x), "loss_reduction": "mean",
    }  # fmt: skip
    criterion: Any = nn.CrossEntropyLoss()
    wrapped: Any
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(net, max_grad_norm=max_norm, use_ghost_clipping=True)
        optimizer = DPOptimizerFastGradientClipping(sgd, **constants)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion)
    else:
        wrapped, optimizer = GradSampleModule(net), DPOptimizer(sgd, **constants)

    def call() -> None:
        optimizer.noise_multiplier = noise() / max_norm
        optimizer.zero_grad()
        criterion(wrapped(x), labels).backward()
        optimizer.step()

    return call, lambda: {name: p.detach() - params[name] for name, p in net.named_parameters()}


def backpack(params: models.Params, x: Tensor, labels: Tensor) -> Work[Tensor]:
    """The norms by BackPACK's `BatchL2Grad`."""
    from backpack import backpack as context
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    warnings.filterwarnings("ignore", "Full backward hook is firing")
    convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.MaxPool2d(2))
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))
    models.load_into(net, dict(zip(dict(net.named_parameters()), params.values(), strict=True)))
    net, criterion = extend(net), extend(nn.CrossEntropyLoss(reduction="sum"))
    squares: list[Tensor] = []

    def call() -> None:
        net.zero_grad()
        with context(BatchL2Grad()):
            criterion(net(x), labels).backward()
        squares[:] = [p.batch_l2 for p in net.parameters()]

    return call, lambda: torch.stack(squares).sum(0).sqrt()


def jax(params: models.Params, x: Tensor, labels: Tensor, max_norm: float, noise: Noise) -> Work[models.Params]:
    """A step of JAX: `jit(vmap(grad))`, clip, sum, noise, SGD with momentum."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    j: Any = import_module("jax")
    jnp: Any = import_module("jax.numpy")

    start = {name: jnp.asarray(p.numpy()) for name, p in params.items()}
    images, targets = jnp.asarray(x.numpy()), jnp.asarray(labels.numpy())

    def conv(x: Any, weight: Any, bias: Any) -> Any:
        return j.lax.conv(x, weight, (1, 1), "VALID") + bias[:, None, None]

    def loss_fn(p: Any, x: Any, y: Any) -> Any:
        x = j.nn.relu(conv(x[None], p["conv1.weight"], p["conv1.bias"]))
        x = conv(x, p["conv2.weight"], p["conv2.bias"])
        x = j.lax.reduce_window(x, -jnp.inf, j.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID").reshape(-1)
        x = j.nn.relu(p["fc1.weight"] @ x + p["fc1.bias"])
        return -j.nn.log_softmax(p["fc2.weight"] @ x + p["fc2.bias"])[y]

    def one_step(p: Any, velocity: Any, key: Any, deviation: Any) -> Any:
        rows = j.vmap(j.grad(loss_fn), in_axes=(None, 0, 0))(p, images, targets)
        norms = jnp.sqrt(sum(jnp.sum(g.reshape(len(g), -1) ** 2, 1) for g in rows.values()))
        factors = jnp.minimum(1, max_norm / norms)
        total = {name: jnp.tensordot(factors, g, 1) for name, g in rows.items()}
        keys = dict(zip(total, j.random.split(key, len(total)), strict=True))
        total = {n: g + deviation * j.random.normal(keys[n], g.shape) for n, g in total.items()}
        velocity = {n: MOMENTUM * velocity[n] + total[n] / len(images) for n in total}
        return {n: p[n] - LR * velocity[n] for n in total}, velocity

    step: Any = j.jit(one_step)
    state: list[Any] = [start, {name: jnp.zeros_like(p) for name, p in start.items()}]

    def call() -> None:
        state[:] = j.block_until_ready(step(*state, j.random.key(0), jnp.float32(noise())))

    def update() -> models.Params:
        return {name: torch.from_numpy(np.array(state[0][name] - start[name])) for name in params}

    return call, update
