"""MNIST and four sets of the same format, as whole tensors in memory, and batches of them.

| file | what it holds |
|---|---|
| `idx.py` | the reader of the IDX file format, which trusts nothing in a file |
| `sets.py` | a data set by name or from a folder |
| `pixels.py` | the statistics of pixels, and pixels as a network takes them |
| `augment.py` | random changes of images that leave their class: one resampling, and erasing |
| `mixing.py` | shares of images in their mixtures |
| `resampling.py` | images seen through affine maps |
| `shifted.py` | moves by whole pixels |
| `upright.py` | images straightened, each by its own ink |
| `glyphs.py` | random pen strokes in classes: images that are of no data set |
| `batches.py` | the order of an epoch and its batches |
| `imbalance.py` | classes of unequal sizes: made so, and sampled equally often |
| `mnist/` | the four files of MNIST, shipped with the package, and their licence |
"""

from .augment import Augmentation as Augmentation
from .augment import augmented as augmented
from .batches import Batch as Batch
from .batches import batches as batches
from .batches import epoch_order as epoch_order
from .batches import steps_per_epoch as steps_per_epoch
from .glyphs import glyphs as glyphs
from .idx import DataError as DataError
from .idx import read_idx as read_idx
from .imbalance import balanced_order as balanced_order
from .imbalance import imbalance as imbalance
from .mixing import mixing_shares as mixing_shares
from .pixels import normalization as normalization
from .pixels import normalize as normalize
from .sets import NAMES as NAMES
from .sets import Dataset as Dataset
from .sets import Split as Split
from .sets import load as load
from .shifted import shifted as shifted
from .upright import upright as upright
