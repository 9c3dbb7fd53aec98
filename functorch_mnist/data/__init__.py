"""MNIST and four sets of the same format, as whole tensors in memory, and batches of them.

| file | what it holds |
|---|---|
| `idx.py` | the reader of the IDX file format, which trusts nothing in a file |
| `sets.py` | a data set by name or from a folder |
| `pixels.py` | the statistics of pixels, and pixels as a network takes them |
| `augment.py` | random changes of images that leave their class: one resampling, and erasing |
| `mixup.py` | shares of images in their mixtures |
| `resampling.py` | images seen through affine maps |
| `shifting.py` | moves by whole pixels |
| `deskewing.py` | images deskewed, each by its own moments |
| `strokes.py` | random pen strokes in classes: images that are of no data set |
| `batching.py` | the order of an epoch and its batches |
| `imbalance.py` | classes of unequal sizes: made so, and sampled equally often |
| `mnist/` | the four files of MNIST, shipped with the package, and their licence |
"""

from .augment import Augmentation as Augmentation
from .augment import augmented as augmented
from .batching import Batch as Batch
from .batching import batches as batches
from .batching import epoch_order as epoch_order
from .batching import steps_per_epoch as steps_per_epoch
from .deskewing import deskewed as deskewed
from .idx import DataError as DataError
from .idx import read_idx as read_idx
from .imbalance import balanced_order as balanced_order
from .imbalance import imbalanced as imbalanced
from .mixup import mixup_weights as mixup_weights
from .pixels import normalization as normalization
from .pixels import normalize as normalize
from .sets import NAMES as NAMES
from .sets import Dataset as Dataset
from .sets import Split as Split
from .sets import load as load
from .shifting import shifted as shifted
from .strokes import glyphs as glyphs
