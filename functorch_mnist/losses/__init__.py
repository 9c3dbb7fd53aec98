"""Losses of one example or of each example of a batch, what they weigh unequal classes with, and accuracy.

| file | what it holds |
|---|---|
| `classification.py` | cross-entropy, focal loss, accuracy |
| `labels.py` | what labels must be |
| `vocabulary.py` | cross-entropy with its output layer, in blocks of a large vocabulary |
| `regression.py` | the squared error |
| `imbalance.py` | weights of classes from their counts, and outputs adjusted by how common a class is |

A loss returns one number per example: it never averages over examples, so a batch is the stack of its examples. A
hyperparameter is a number, which is checked, or a 0-d tensor, whose value is never read: so a loss can be mapped over
it with `vmap`, differentiated by it, and compiled once for all its values.
"""

from .classification import accuracy, cross_entropy, focal, one_hot
from .imbalance import balanced_weights, effective_number_weights, logit_adjusted
from .regression import mse
from .vocabulary import chunked_cross_entropy

__all__ = [
    "accuracy",
    "balanced_weights",
    "chunked_cross_entropy",
    "cross_entropy",
    "effective_number_weights",
    "focal",
    "logit_adjusted",
    "mse",
    "one_hot",
]


def __dir__() -> list[str]:
    return __all__
