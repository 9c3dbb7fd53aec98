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

from .approximate import Index as Index
from .approximate import index as index
from .building import Compile as Compile
from .building import append as append
from .building import begun_projection as begun_projection
from .building import build as build
from .manifest import StoreError as StoreError
from .queries import Queries as Queries
from .queries import Store as Store
from .queries import Top as Top
from .queries import load as load
