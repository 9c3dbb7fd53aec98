"""A pure-functional, JAX-style library on torch.func.

    import functorch_mnist as fm

    model = fm.models.cnn()
    params = model.init(fm.random.key(0))

The namespaces below are the public surface. Each is imported when it is first used, so that the command line can answer
`--help` before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attribution as attribution
    from . import calibration as calibration
    from . import checkpoint as checkpoint
    from . import data as data
    from . import distributed as distributed
    from . import ensemble as ensemble
    from . import layers as layers
    from . import losses as losses
    from . import models as models
    from . import optim as optim
    from . import per_sample as per_sample
    from . import privacy as privacy
    from . import random as random
    from . import statistics as statistics
    from . import sweep as sweep
    from . import train as train
    from . import tree as tree

    __version__: str

_NAMESPACES = (
    "attribution", "calibration", "checkpoint", "data", "distributed", "ensemble", "layers", "losses", "models",
    "optim", "per_sample", "privacy", "random", "statistics", "sweep", "train", "tree",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        return import_module("importlib.metadata").version("functorch-mnist")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_NAMESPACES, "__version__"]
