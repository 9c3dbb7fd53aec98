"""MNIST and four sets of the same format, as whole tensors in memory, and batches of them.

| file | what it holds |
|---|---|
| `idx.py` | the reader of the IDX file format, which trusts nothing in a file |
| `sets.py` | a data set by name or from a folder |
| `pixels.py` | the statistics of pixels, and pixels as a network takes them |
| `augment.py` | random changes of images that leave their class: one resampling, and erasing |
| `mixup.py` | mixup weights from a beta distribution |
| `resampling.py` | images seen through affine maps |
| `shifting.py` | moves by whole pixels |
| `deskewing.py` | deskewing, each image by its own moments |
| `strokes.py` | random pen strokes in classes: images that are of no data set |
| `batching.py` | the order of an epoch and its batches |
| `imbalance.py` | classes of unequal sizes: made so, and sampled equally often |
| `mnist/` | the four files of MNIST, shipped with the package, and their licence |
"""

from .augment import Augmentation, augmented
from .batching import Batch, batches, epoch_order, steps_per_epoch
from .deskewing import deskewed
from .idx import DataError, read_idx
from .imbalance import balanced_order, imbalanced
from .mixup import mixup_weights
from .pixels import normalization, normalize
from .sets import NAMES, Dataset, Split, load
from .shifting import shifted
from .strokes import glyphs

__all__ = [
    "NAMES",
    "Augmentation",
    "Batch",
    "DataError",
    "Dataset",
    "Split",
    "augmented",
    "balanced_order",
    "batches",
    "deskewed",
    "epoch_order",
    "glyphs",
    "imbalanced",
    "load",
    "mixup_weights",
    "normalization",
    "normalize",
    "read_idx",
    "shifted",
    "steps_per_epoch",
]


def __dir__() -> list[str]:
    return __all__
