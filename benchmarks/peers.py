"""The same quantities as others compute them: clipped steps by Opacus, JAX and jax-privacy, the rest by BackPACK too.

Each function gives a `Work`, or raises ImportError where its package is missing (`pip install -e '.[bench]'`). The
network is the tutorial CNN. All start from the same weights and take the same normalised batch; a clipped step sums
gradients of norm at most `MAX_NORM`, adds noise of deviation `noise()`, divides by B and takes a step of SGD with
momentum.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from functorch_mnist import models

from .measure import Start, Work, digest
from .problems import Problem, start
from .quantities import MAX_NORM, Deviation, Name, gram_of, norms_of
from .steps import LR, MOMENTUM

OpacusMode: TypeAlias = Literal["hooks", "functorch", "ew", "ghost"]
"""Opacus' own names: sample gradients by formulas, by `vmap`, by torch's ExpandedWeights; norms without gradients."""


def opacus_step(problem: Problem, noise: Deviation, *, mode: OpacusMode) -> Work:
    """A clipped step of Opacus; ghost clipping takes two backward passes."""
    optimizers: Any = import_module("opacus.optimizers")
    net, x, labels = problem.loaded(), problem.x, problem.labels
    weights = dict(net.named_parameters())
    sgd = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    constants = {"noise_multiplier": 0.0, "max_grad_norm": MAX_NORM, "expected_batch_size": len(x)}
    wrapped, criterion = _by_opacus(net, mode), F.cross_entropy
    if mode == "ghost":
        optimizer = optimizers.DPOptimizerFastGradientClipping(sgd, **constants)
        utilities: Any = import_module("opacus.utils.fast_gradient_clipping_utils")
        criterion = utilities.DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss())
    else:
        optimizer = optimizers.DPOptimizer(sgd, **constants)

    def release() -> None:
        optimizer.zero_grad(set_to_none=True)

    def call() -> None:
        optimizer.noise_multiplier = noise() / MAX_NORM
        release()
        criterion(wrapped(x), labels).backward()
        optimizer.step()

    return Work(
        call,
        lambda: {name: p.detach() - problem.params[name] for name, p in weights.items()},
        start(weights.values(), (x, labels), torch.float32),
        release,
    )


def opacus_norms(problem: Problem, *, mode: Literal["hooks", "ghost"]) -> Work:
    """The norms of Opacus' sample gradients, or of its ghost clipping, which has no sample gradients."""
    net, x, labels = problem.loaded(), problem.x, problem.labels
    wrapped, found = _by_opacus(net, mode), list[Tensor]()

    def release() -> None:
        wrapped.zero_grad(set_to_none=True)
        found.clear()

    def call() -> None:
        release()
        F.cross_entropy(wrapped(x), labels).backward()
        found.append(wrapped.get_norm_sample() if mode == "ghost" else norms_of(_each(net, "grad_sample")))

    return Work(call, lambda: found[0], start(net.parameters(), (x, labels), torch.float32), release)


def opacus_clipped_sum(
    net: nn.Module,
    inputs: Mapping[str, Tensor],
    targets: Tensor,
    logits: Callable[[Any], Tensor],
    *,
    mode: Literal["hooks", "ghost"],
    max_norm: float,
) -> Callable[[], list[Tensor]]:
    """A function that gives Opacus' clipped sum for each of a module's parameters.

    Args:
        net: the module, in training mode afterwards, as Opacus asks for.
        inputs: of its forward, by name.
        targets: (B, ...), of the mean cross-entropy of each example.
        logits: from what the forward returns to what is compared with the targets.
        mode: sample gradients, or norms without them.
        max_norm: the clipping norm.
    """
    optimizers: Any = import_module("opacus.optimizers")
    utilities: Any = import_module("opacus.utils.fast_gradient_clipping_utils")
    weights, wrapped = list(net.parameters()), _by_opacus(net.train(), mode, max_norm)
    sgd = torch.optim.SGD(weights, lr=LR)
    constants = {"noise_multiplier": 0.0, "max_grad_norm": max_norm, "expected_batch_size": len(targets)}
    kind = optimizers.DPOptimizerFastGradientClipping if mode == "ghost" else optimizers.DPOptimizer
    optimizer, criterion = kind(sgd, **constants), nn.CrossEntropyLoss()
    loss = utilities.DPLossFastGradientClipping(wrapped, optimizer, criterion) if mode == "ghost" else criterion

    def call() -> list[Tensor]:
        optimizer.zero_grad(set_to_none=True)
        found = logits(wrapped(**inputs))
        rows, shape = found.reshape(-1, found.shape[-1]), {}
        if mode == "ghost" and found.dim() > 2:
            shape = {"shape": found.shape}
        loss(rows, targets.reshape(-1), **shape).backward()
        if mode == "ghost":
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
        optimizer.clip_and_accumulate()
        return [getattr(p, "summed_grad") for p in weights]  # noqa: B009 (an attribute of Opacus)

    return call


def _by_opacus(net: nn.Module, mode: OpacusMode, max_norm: float = MAX_NORM) -> Any:
    """The module wrapped; Opacus multiplies the gradients of a mean loss by B."""
    utilities: Any = import_module("opacus.grad_sample.utils")
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    return utilities.wrap_model(net, mode, **({"max_grad_norm": max_norm} if mode == "ghost" else {}))


class Extension(NamedTuple):
    """Of BackPACK."""

    name: str
    field: str
    """Where at a parameter it leaves what it finds."""


BACKPACK: dict[Name, Extension] = {
    "norms": Extension("BatchL2Grad", "batch_l2"),
    "gram": Extension("BatchGrad", "grad_batch"),
    "second_moment": Extension("SumGradSquared", "sum_grad_squared"),
}


def backpack(problem: Problem, name: Name) -> Work:
    """A quantity by BackPACK: of the summed loss, as it would divide a mean loss's gradients by B."""
    package: Any = import_module("backpack")
    field = BACKPACK[name].field
    extension: Any = getattr(import_module("backpack.extensions"), BACKPACK[name].name)
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.MaxPool2d(2))
    net = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10))
    net.to(problem.labels.device)
    models.load_into(net, dict(zip(dict(net.named_parameters()), problem.params.values(), strict=True)))
    x, labels, found = problem.x, problem.labels, list[Any]()
    net, criterion = package.extend(net), package.extend(nn.CrossEntropyLoss(reduction="sum"))

    def quantity() -> Any:
        if name == "norms":
            return torch.stack(_each(net, field)).sum(0).sqrt()
        if name == "gram":
            return gram_of(_each(net, field))
        return dict(zip(problem.params, _each(net, field), strict=True))

    def release() -> None:
        net.zero_grad()
        for p in net.parameters():
            setattr(p, field, None)
        found.clear()

    def call() -> None:
        release()
        with package.backpack(extension()):
            criterion(net(x), labels).backward()
        found.append(quantity())

    return Work(call, lambda: found[0], start(net.parameters(), (x, labels), torch.float32), release)


def _each(net: nn.Module, field: str) -> list[Any]:
    """What a package has left at each parameter."""
    return [getattr(p, field) for p in net.parameters()]


@dataclass(frozen=True)
class _Jax:
    """A problem in JAX, and its modules: untyped, so that types are checked alike with and without it."""

    jax: Any
    numpy: Any
    params: dict[str, Any]
    batch: tuple[Any, Any]
    start: Start
    device: torch.device

    def loss(self, params: Any, x: Any, label: Any) -> Any:
        """The cross-entropy of one example."""
        j, jnp = self.jax, self.numpy
        x = j.nn.relu(self._conv(x[None], params["conv1.weight"], params["conv1.bias"]))
        x = self._conv(x, params["conv2.weight"], params["conv2.bias"])
        x = j.lax.reduce_window(x, -jnp.inf, j.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID").reshape(-1)
        x = j.nn.relu(params["fc1.weight"] @ x + params["fc1.bias"])
        return -j.nn.log_softmax(params["fc2.weight"] @ x + params["fc2.bias"])[label]

    def _conv(self, x: Any, weight: Any, bias: Any) -> Any:
        return self.jax.lax.conv(x, weight, (1, 1), "VALID") + bias[:, None, None]

    def sample_grads(self, params: Any, x: Any, labels: Any) -> dict[str, Any]:
        """Every ∇_i, flattened: (B, P) for each parameter."""
        rows = self.jax.vmap(self.jax.grad(self.loss), in_axes=(None, 0, 0))(params, x, labels)
        return {name: g.reshape(len(g), -1) for name, g in rows.items()}

    def norms(self, rows: dict[str, Any]) -> Any:
        """(B,)."""
        return self.numpy.sqrt(sum(self.numpy.sum(g**2, 1) for g in rows.values()))

    def shaped(self, flat: dict[str, Any]) -> dict[str, Any]:
        """Like the parameters."""
        return {name: value.reshape(self.params[name].shape) for name, value in flat.items()}

    def tensors(self, found: Any) -> Any:
        """Arrays as tensors; a `jit` has sorted the names."""
        if isinstance(found, dict):
            return {name: self.tensors(found[name]) for name in self.params}
        return torch.from_numpy(np.array(found)).to(self.device)


def _in_jax(problem: Problem) -> _Jax:
    device = problem.labels.device
    if device.type == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory to the other arms
    j: Any = import_module("jax")
    jnp: Any = import_module("jax.numpy")
    if device.type != "cpu" and all(found.platform != "gpu" for found in j.devices()):
        raise ImportError("jaxlib for this GPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    params = {name: jnp.asarray(p.cpu().numpy()) for name, p in problem.params.items()}
    x, labels = problem.x.cpu().numpy(), problem.labels.cpu().numpy()
    batch = jnp.asarray(x), jnp.asarray(labels)
    begin = Start(digest(params.values()), digest((batch[0], labels)), "float32", cores)  # labels become int32 there
    return _Jax(j, jnp, params, batch, begin, device)


def jax(problem: Problem, name: Name) -> Work:
    """A quantity by JAX: `jit(vmap(grad))`, and what follows in the same `jit`."""
    p = _in_jax(problem)
    quantities: dict[Name, Callable[[dict[str, Any]], Any]] = {
        "norms": p.norms,
        "gram": lambda rows: sum(g @ g.T for g in rows.values()),
        "second_moment": lambda rows: p.shaped({n: (g**2).sum(0) for n, g in rows.items()}),
    }
    fn: Any = p.jax.jit(lambda params, x, labels: quantities[name](p.sample_grads(params, x, labels)))
    found: list[Any] = []

    def call() -> None:
        found[:] = [p.jax.block_until_ready(fn(p.params, *p.batch))]

    return Work(call, lambda: p.tensors(found[0]), p.start, found.clear)


def jax_step(problem: Problem, noise: Deviation) -> Work:
    """A clipped step by JAX: `jit(vmap(grad))`, clip, sum, noise."""
    p = _in_jax(problem)

    def noisy_sum(params: Any, batch: Any, deviation: Any, key: Any) -> tuple[Any, Any]:
        rows = p.sample_grads(params, *batch)
        factors = p.numpy.minimum(1, MAX_NORM / p.norms(rows))
        sums = p.shaped({name: factors @ g for name, g in rows.items()})
        key, *keys = p.jax.random.split(key, 1 + len(sums))
        draws = {name: p.jax.random.normal(k, sums[name].shape) for name, k in zip(sums, keys, strict=True)}
        return {name: sums[name] + deviation * draws[name] for name in sums}, key

    return _jax_sgd(p, noise, noisy_sum, p.jax.random.key(0))


def jax_privacy_step(problem: Problem, noise: Deviation) -> Work:
    """A clipped step by jax-privacy's `clipped_grad` and `gaussian_privatizer`."""
    p = _in_jax(problem)
    package: Any = import_module("jax_privacy")
    # Gradients are clipped flat: in their own shapes XLA takes a hundred times as long for the convolutions on a CPU.
    clipped = package.clipped_grad(
        p.loss,
        l2_clip_norm=MAX_NORM,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
        pre_clipping_transform=lambda grads: {name: g.reshape(-1) for name, g in grads.items()},
    )

    def privatizer(deviation: Any) -> Any:
        return package.noise_addition.gaussian_privatizer(stddev=deviation, prng_key=0)

    def noisy_sum(params: Any, batch: Any, deviation: Any, state: Any) -> Any:
        return privatizer(deviation).update(p.shaped(clipped(params, *batch)), state)

    return _jax_sgd(p, noise, noisy_sum, privatizer(0.0).init(p.params))


def _jax_sgd(p: _Jax, noise: Deviation, noisy_sum: Callable[..., Any], noise_state: Any) -> Work:
    """SGD with momentum on noisy sums, `noisy_sum(params, batch, deviation, noise_state) -> (sum, noise_state)`."""

    def one_step(params: Any, velocity: Any, noise_state: Any, batch: Any, deviation: Any) -> Any:
        sums, noise_state = noisy_sum(params, batch, deviation, noise_state)
        velocity = {n: MOMENTUM * velocity[n] + sums[n] / len(batch[0]) for n in params}
        return {n: params[n] - LR * velocity[n] for n in params}, velocity, noise_state

    step: Any = p.jax.jit(one_step)
    state: list[Any] = [p.params, p.jax.tree.map(p.numpy.zeros_like, p.params), noise_state]

    def call() -> None:
        state[:] = p.jax.block_until_ready(step(*state, p.batch, p.numpy.float32(noise())))

    return Work(call, lambda: p.tensors({n: state[0][n] - p.params[n] for n in p.params}), p.start)
