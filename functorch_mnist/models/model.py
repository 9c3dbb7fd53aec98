"""What a model is."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeAlias

import torch
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


def check_names(where: str, params: Params, names: Collection[str]) -> None:
    """Raises TypeError or ValueError for parameters that are not a dict with exactly these names."""
    if not isinstance(params, dict):
        remedy = (
            "Pass state.params."
            if hasattr(params, "params")
            else "Use model.init(key), or params, model = models.from_module(module)."
        )
        raise TypeError(
            f"{where}: params must be a dict of tensors, the first argument. Found {type(params).__name__}. {remedy}"
        )
    if len(params) != len(names) or not all([name in params for name in names]):
        missing, unexpected = sorted(set(names) - params.keys()), sorted(params.keys() - set(names))
        raise ValueError(
            f"{where}: the parameters must be the model's. Missing {missing}, unexpected {unexpected}. Are they of "
            "another model?"
        )


def check_call(
    where: str, params: Params, names: Collection[str], x: Tensor, example: tuple[int, ...], key: Tensor | None
) -> None:
    """Raises TypeError or ValueError for arguments of a forward that do not fit, by their metadata alone.

    Args:
        where: the model that an error names.
        params: as given.
        names: those of the model.
        x: the input.
        example: the shape of one example.
        key: one key per example, or none.
    """
    check_names(where, params, names)
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: the input must be a tensor. Found {type(x).__name__}.")
    lead, shape = x.shape[: x.dim() - len(example)], x.shape[max(x.dim() - len(example), 0) :]
    if shape != example:
        thin = len(example) > 1 and tuple(x.shape[1 - len(example) :]) == example[1:]
        remedy = " Is the axis of channels missing? x.unsqueeze(-3) adds it." if thin else ""
        sizes = ", ".join(map(str, example))
        raise ValueError(f"{where}: the input must be (..., {sizes}). Found {tuple(x.shape)}.{remedy}")
    if key is None:
        return
    if not isinstance(key, Tensor) or key.dtype != torch.int32 or key.shape != (*lead, 2):
        found = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise ValueError(
            f"{where}: the key must be int32 {(*lead, 2)}, one per example. Found {found}. The model takes one input; "
            "random.split(key, B) makes keys."
        )
