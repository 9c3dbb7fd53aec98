"""A pure-functional, JAX-style library on torch.func.

    import functorch_mnist as fm

    model = fm.models.cnn()
    params = model.init(fm.random.key(0))

The public surface is these namespaces; `help(fm.per_sample)` lists what one holds.

| namespace | what it holds |
|---|---|
| `per_sample` | per-sample gradients in factored form: norms, clipped sums, inner products, second moments |
| `models` | ready-made networks, and `from_module` for any `nn.Module` |
| `losses` | losses of one example or of each example of a batch, and accuracy |
| `optim` | optimizers as pairs of pure functions, learning-rate schedules, EMA and SWA |
| `train` | training steps, `fit`, private training, evaluation, compilation |
| `privacy` | differential privacy: clipping, sampling, noise, accounting, auditing |
| `statistics` | statistics of per-sample gradients over a data set: moments, the noise scale, the Fisher information |
| `attribution` | scores of training examples, influence functions, TracIn, TRAK, and their ground truth |
| `sweep` | many training runs vmapped in one step, and hypergradients |
| `ensemble` | predictions of several models, and their disagreement |
| `calibration` | reliability, temperature scaling, the Brier score |
| `data` | MNIST and sets of its format as tensors, batches, augmentation |
| `layers` | pure layers and activations |
| `random` | the stateless keys and random numbers of JAX |
| `tree` | functions on pytrees of tensors |
| `distributed` | many processes with the result of one |
| `checkpoint` | checkpoints that a crash cannot leave half-written |

A namespace is imported when it is first used, so that the command line can answer `--help` before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        attribution,
        calibration,
        checkpoint,
        data,
        distributed,
        ensemble,
        layers,
        losses,
        models,
        optim,
        per_sample,
        privacy,
        random,
        statistics,
        sweep,
        train,
        tree,
    )

    __version__: str

__all__ = [
    "attribution", "calibration", "checkpoint", "data", "distributed", "ensemble", "layers", "losses", "models",
    "optim", "per_sample", "privacy", "random", "statistics", "sweep", "train", "tree",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        return import_module("importlib.metadata").version("functorch-mnist")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
