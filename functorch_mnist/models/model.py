"""What a model is."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Float tensors by their `state_dict` name, such as `"conv1.weight"`."""


Apply: TypeAlias = Callable[..., Any]
"""`apply(params, *inputs, key=None) -> outputs`, the forward function of a model.

It is pure, for one example or a batch with any leading axes. Inputs and outputs are tensors (..., *example); those of
some modules are nested dicts, lists and tuples of them. With `key` (..., 2), one key per example, dropout is on;
without, it is off.
"""


class Model(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[Tensor], Params]
    """`init(key) -> params`: fresh parameters, a function of the key alone."""
    apply: Apply
    """`apply(params, *inputs, key=None) -> outputs`."""
