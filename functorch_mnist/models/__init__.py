"""Models: pairs of pure functions, `init(key) -> params` and `apply(params, x, key=None) -> outputs`.

`linear`, `mlp`, `cnn` and `small_cnn` are ready-made; `from_module` makes such a pair of any `nn.Module`, and
`load_into` is the way back. Parameters are flat dicts with the names, shapes and initial distribution of the matching
`nn.Module`. `scattering` gives fixed features of images and `discriminants` what of
features tells classes apart, for a model to start from.
"""

from .discriminant import Discriminants as Discriminants
from .discriminant import discriminants as discriminants
from .discriminant import discriminated as discriminated
from .model import Apply as Apply
from .model import Model as Model
from .model import Params as Params
from .module import from_module as from_module
from .module import load_into as load_into
from .ready import cnn as cnn
from .ready import linear as linear
from .ready import mlp as mlp
from .ready import small_cnn as small_cnn
from .wavelets import Filters as Filters
from .wavelets import scattering as scattering
from .wavelets import scattering_filters as scattering_filters
