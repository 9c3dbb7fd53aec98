"""A gradient store: projected gradients of a data set on disk, computed once and queried many times.

    manifest.py    the manifest: what a store holds, checked by digests
    numbers.py     the features of an example: a matrix for a parameter, or a pair of vectors
    building.py    from examples to files, part by part
    queries.py     inner products with the gradients of test examples, top-k, and the damped inverse
    approximate.py approximate nearest neighbour search, by faiss

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
