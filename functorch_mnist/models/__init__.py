"""Models: pairs of pure functions, `init(key) -> params` and `apply(params, x, key=None) -> outputs`.

`linear`, `mlp`, `cnn` and `small_cnn` are ready-made; `from_module` makes such a pair of any `nn.Module`, and
`load_into` is the way back. Parameters are flat dicts with the names, shapes and initial distribution of the matching
`nn.Module`. `scattering` gives fixed features of images and `discriminants` what of
features tells classes apart, for a model to start from.
"""

from .discriminant import Discriminants, discriminants, discriminated
from .model import Apply, Model, Params
from .module import from_module, load_into
from .ready import cnn, linear, mlp, small_cnn
from .wavelets import Filters, scattering, scattering_filters

__all__ = [
    "Apply",
    "Discriminants",
    "Filters",
    "Model",
    "Params",
    "cnn",
    "discriminants",
    "discriminated",
    "from_module",
    "linear",
    "load_into",
    "mlp",
    "scattering",
    "scattering_filters",
    "small_cnn",
]


def __dir__() -> list[str]:
    return __all__
