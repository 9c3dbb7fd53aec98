"""What per-sample gradients cost: a clipped, noisy SGD step and norms, against one ordinary training step.

    python -m benchmarks.per_sample [--batch-size 64] [--rounds 40] [--no-peers]

Tutorial CNN without dropout. The reference is the ordinary step of the compiled `nn.Module` with `torch.optim.SGD`. All
arms start from the same weights and take the same batch; a clipped step is compared without noise with the definition,
sample gradients one by one, and then timed with noise. Peak memory is the operating system's, of one process per arm,
beyond what the process holds between steps.
"""

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap

from functorch_mnist import allocator, data, losses, models, optim, per_sample, random, train, tree

from . import measure, peers
from .step import DEVIATION, LR, MEAN, MOMENTUM, Net, Work, functional_arm, module_arm, relative_difference

MAX_NORM, NOISE = 1.0, 0.5
CHUNK = 256
"""How many examples a clipped step takes at a time, at most."""


class Deviation:
    """The deviation of the noise: none until the arms have been compared."""

    value = 0.0

    def __call__(self) -> float:
        return self.value


def loss_of(dtype: torch.dtype) -> Callable[..., Tensor]:
    """The loss of one example, as it is stored."""
    apply = train.in_precision(models.cnn(dropout=(0, 0)).apply, dtype)

    def loss_fn(params: models.Params, image: Tensor, label: Tensor) -> Tensor:
        return losses.cross_entropy(apply(params, data.normalize(image, MEAN, DEVIATION)), label)

    return loss_fn


def clipped_arm(
    params: models.Params,
    images: Tensor,
    labels: Tensor,
    noise: Deviation,
    *,
    compile: bool,
    dtype: torch.dtype,
) -> Work[models.Params]:
    """A step of this library: clipped sum, keyed noise, SGD with momentum."""
    loss_fn, optimizer = loss_of(dtype), optim.sgd(LR, momentum=MOMENTUM)

    def step(state: train.State, images: Tensor, labels: Tensor, deviation: Tensor) -> train.State:
        clipped = per_sample.clipped_sum(loss_fn, state.params, images, labels, max_norm=MAX_NORM, chunk_size=CHUNK)
        keys = random.split(random.fold_in(state.key, state.step), len(params)).unbind()
        draws = [random.box_muller(key, g.shape) for key, g in zip(keys, tree.leaves(clipped.grads), strict=True)]
        noises = tree.unflatten(clipped.grads, draws)
        grads = tree.map(lambda g, z: (g + deviation * z) / len(images), clipped.grads, noises)
        new, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return train.State(new, optimizer_state, state.step + 1, state.key)

    run = train.compiled(step) if compile else step
    state = train.init_state(params, optimizer, random.key(1))

    def call() -> None:
        nonlocal state
        state = run(state, images, labels, torch.tensor(noise()))

    return call, lambda: tree.map(torch.sub, state.params, params)


def norms_arm(
    params: models.Params, images: Tensor, labels: Tensor, *, compile: bool, dtype: torch.dtype
) -> Work[Tensor]:
    """The norms alone."""
    loss_fn = loss_of(dtype)

    def norms(params: models.Params, images: Tensor, labels: Tensor) -> Tensor:
        return per_sample.norms(loss_fn, params, images, labels, chunk_size=CHUNK)

    run = train.compiled(norms) if compile else norms
    found: list[Tensor] = []

    def call() -> None:
        found[:] = [run(params, images, labels)]

    return call, lambda: found[0]


def dense_arm(
    params: models.Params, x: Tensor, labels: Tensor, noise: Deviation, *, compile: bool
) -> Work[models.Params]:
    """A step by `vmap(grad)` of the module, as torch's tutorial has it: clip, sum, noise, SGD with momentum."""
    net, optimizer = Net(), optim.sgd(LR, momentum=MOMENTUM)

    def loss_fn(params: models.Params, image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (image[None],)), label[None])

    def step(params: models.Params, state: Any, x: Tensor, labels: Tensor, deviation: Tensor) -> tuple[Any, Any]:
        rows = vmap(grad(loss_fn), in_dims=(None, 0, 0))(params, x, labels)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in rows.values()]).norm(dim=0)
        factors = (MAX_NORM / norms).clamp(max=1)
        sums = {name: torch.tensordot(factors, g, 1) for name, g in rows.items()}
        grads = {name: (g + deviation * torch.randn_like(g)) / len(x) for name, g in sums.items()}
        return optimizer.update(params, state, grads)

    run = train.compiled(step) if compile else step
    state = (params, optimizer.init(params))

    def call() -> None:
        nonlocal state
        state = run(*state, x, labels, torch.tensor(noise()))

    return call, lambda: tree.map(torch.sub, state[0], params)


def expected(params: models.Params, x: Tensor, labels: Tensor) -> tuple[models.Params, Tensor]:
    """The first update by clipped gradients and the norms, by their definitions: a loop over examples."""
    net = Net()
    models.load_into(net, params)
    total, norms = tree.zeros_like(params), []
    for image, label in zip(x, labels, strict=True):
        rows = torch.autograd.grad(F.cross_entropy(net(image[None]), label[None]), list(net.parameters()))
        norms.append(tree.norm(list(rows)))
        factor = (MAX_NORM / norms[-1]).clamp(max=1)
        total = {name: t + factor * g for (name, t), g in zip(total.items(), rows, strict=True)}
    stepped = tree.map(lambda p, t: torch.sub(p, t / len(x), alpha=LR), params, total)
    return tree.map(torch.sub, stepped, params), torch.stack(norms)  # rounded as an update is


def arms_of(batch_size: int, noise: Deviation, *, with_peers: bool) -> tuple[list[measure.Arm], list[str]]:
    """The arms, and those whose package is missing."""
    split = data.load("mnist").train
    images, labels = split.images[:batch_size], split.labels[:batch_size]
    x, params = data.normalize(images, MEAN, DEVIATION), models.cnn().init(random.key(0))
    clipped, norms = expected(params, x, labels)
    batch, raw = (params, x, labels), (params, images, labels)
    f32, bf16 = torch.float32, torch.bfloat16

    def arm(name: str, work: Work[Any], reference: Any, tolerance: float) -> measure.Arm:
        call, outputs = work
        return measure.Arm(name, call, lambda: (outputs(), reference), tolerance)

    ordinary = module_arm(*raw, compile=True)
    arms = [arm("ordinary step: compiled nn.Module", ordinary, None, 0.0)]
    for dtype, name, tolerance in ((f32, "float32", 1e-4), (bf16, "bfloat16", 5e-2)):
        plain = functional_arm(*raw, compile=True, dtype=dtype)
        arms.append(arm(f"ordinary step: functional, compiled, {name}", plain, None, 0.0))
        for compile, form in ((True, "compiled"), (False, "eager")):
            step = clipped_arm(*raw, noise, compile=compile, dtype=dtype)
            arms.append(arm(f"clipped noisy step, {form}, {name}", step, clipped, tolerance))
        arms.append(arm(f"norms, compiled, {name}", norms_arm(*raw, compile=True, dtype=dtype), norms, tolerance))
    arms += [
        arm(f"vmap(grad), clip, noise, {form}", dense_arm(*batch, noise, compile=compile), clipped, 1e-4)
        for compile, form in ((False, "eager"), (True, "compiled"))
    ]
    others: list[tuple[str, Callable[[], Work[Any]], Any]] = [
        ("Opacus, hooks", lambda: peers.opacus(*batch, MAX_NORM, noise, ghost=False), clipped),
        ("Opacus, ghost clipping", lambda: peers.opacus(*batch, MAX_NORM, noise, ghost=True), clipped),
        ("BackPACK, norms", lambda: peers.backpack(*batch), norms),
        ("JAX, jit(vmap(grad)), clip, noise", lambda: peers.jax(*batch, MAX_NORM, noise), clipped),
    ]
    missing = []
    for name, make, reference in others if with_peers else ():
        try:
            arms.append(arm(name, make(), reference, 1e-4))
        except ImportError:
            missing.append(name)
    return arms, missing


def difference(found: tuple[Any, Any], _: Any) -> float:
    """Of an arm's outputs from their definition; an ordinary step is `benchmarks.step`'s to compare."""
    value, reference = found
    if reference is None:
        return 0.0
    if isinstance(reference, Tensor):
        return float((value - reference).norm() / reference.norm())
    return relative_difference(value, reference)


MEMORY_ARMS = ("ordinary step: compiled nn.Module", "clipped noisy step, compiled, float32")


def peak_memory(name: str, batch_size: int) -> int:
    """Bytes that steps of an arm take at their peak beyond what its process holds between steps."""
    arm = next(arm for arm in arms_of(batch_size, Deviation(), with_peers=False)[0] if arm.name == name)
    for _ in range(3):
        arm.call()
    ctypes.CDLL(None).malloc_trim(0)
    held = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts anew
    for _ in range(5):
        arm.call()
    return _status("VmHWM") - held


def _status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-peers", action="store_true", help="leave out Opacus, BackPACK and JAX")
    parser.add_argument("--default-allocator", action="store_true", help="let the C library give freed memory back")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(json.dumps(peak_memory(options.memory_of, options.batch_size)))
        return
    memory = {name: _in_own_process(name, options.batch_size) for name in MEMORY_ARMS}
    kept, noise = not options.default_allocator and allocator.keep_freed_memory(), Deviation()
    arms, missing = arms_of(options.batch_size, noise, with_peers=not options.no_peers)
    settings = {
        "batch_size": options.batch_size, "model": "cnn without dropout", "keep_freed_memory": kept,
        "max_norm": MAX_NORM, "noise": NOISE, "chunk_size": CHUNK,
        "peak_extra_memory_bytes": memory, "not_installed": missing,
    }  # fmt: skip

    def turn_on_noise() -> None:
        noise.value = NOISE

    result = measure.compare(
        "per_sample", arms, rounds=options.rounds, difference=difference, settings=settings, warmups=3,
        compared=turn_on_noise,
    )  # fmt: skip
    print(f"\n{measure.table(result)}\n")
    print("\n".join(f"{name}: not installed" for name in missing))
    base = memory[MEMORY_ARMS[0]]
    for name, size in memory.items():
        print(f"peak extra memory, {name}: {size / 1e6:.0f} MB, ratio {size / base:.2f}")
    print(f"\nWritten to {measure.write(result)}")


def _in_own_process(name: str, batch_size: int) -> int:
    command = [sys.executable, "-m", "benchmarks.per_sample", "--batch-size", str(batch_size), "--memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return int(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
