"""The gradients of a data set on disk, under a projection, to be asked again and again.

    manifest.py    what a store holds, said and checked
    numbers.py     the numbers of an example: a matrix of features for a parameter, or a pair of vectors
    building.py    from examples to files, part by part
    queries.py     inner products with the gradients of other examples, the largest of them, and the damped inverse
    approximate.py approximate search, by faiss

A store is a folder:

    manifest.json            what was projected and how, the parts and their SHA-256
    maps/0-left.npy …        the projection: L (h, H) and R (d, D) of each parameter
    0/00000.npy …            of checkpoint 0: rows of `scale` (float32) and `values` (F,); features are scale x values

NumPy alone reads it: `rows = numpy.load("0/00000.npy", mmap_mode="r")`, then `rows["scale"][:, None] * rows["values"]`.
"""

from .approximate import Index, index
from .building import Compile, append, begun_projection, build
from .manifest import StoreError
from .queries import Queries, Store, Top, load

__all__ = [
    "Compile",
    "Index",
    "Queries",
    "Store",
    "StoreError",
    "Top",
    "append",
    "begun_projection",
    "build",
    "index",
    "load",
]


def __dir__() -> list[str]:
    return __all__
