"""What a model is."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]
"""Float tensors by their `state_dict` name, such as `"conv1.weight"`."""


class Apply(Protocol):
    """The forward function of a model: pure, for one example or a batch with any leading axes."""

    def __call__(self, params: Params, x: Tensor, key: Tensor | None = None) -> Tensor:
        """The outputs for `x` (..., *example).

        With `key` (..., 2), one key per example, dropout is on; without, it is off.
        """
        ...


class Model(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[Tensor], Params]
    """`init(key) -> params`: fresh parameters, a function of the key alone."""
    apply: Apply
    """`apply(params, x, key=None) -> outputs`."""
