"""The leaves of a state by name, described and compared."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypedDict

import torch
from torch import Tensor

from .. import tree
from ..tree import Tree
from .files import CheckpointError, show

INT_LIMIT: Final = 2**63

_DTYPE = re.compile(r"float(64|32|16|8_e4m3fn|8_e5m2)|bfloat16|complex64|u?int(64|32|16|8)|bool")


class Leaf(TypedDict):
    """What a manifest says of one leaf. `dtype` is torch's name, such as `"float32"`."""

    name: str
    shape: list[int]
    dtype: str


def named(where: str, state: Tree) -> dict[str, Tensor]:
    """The leaves by name, each one that a file can hold; else TypeError or ValueError."""
    result: dict[str, Tensor] = {}
    for name, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: every leaf must be a tensor. Found {type(leaf).__name__} at {name!r}.")
        if not _DTYPE.fullmatch(_dtype(leaf)) or leaf.layout != torch.strided or leaf.is_meta:
            raise ValueError(
                f"{where}: a leaf must be dense, have storage and a dtype of safetensors. "
                f"Found {leaf.dtype}, {leaf.layout}, on {leaf.device} at {name!r}."
            )
        if name in result or name == "__metadata__":
            raise ValueError(
                f"{where}: every leaf needs a name of its own. {name!r} is taken. Is there a '/' in a key?"
            )
        result[name] = leaf
    return result


def described(leaves: Mapping[str, Tensor]) -> list[Leaf]:
    """What a manifest says of the leaves."""
    return [{"name": name, "shape": list(leaf.shape), "dtype": _dtype(leaf)} for name, leaf in leaves.items()]


def _dtype(leaf: Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def compare(file: Path, found: list[Leaf], wanted: list[Leaf]) -> None:
    """Raises CheckpointError if names, shapes or dtypes differ, with the first few differences."""
    theirs = {leaf["name"]: leaf for leaf in found}
    ours = {leaf["name"]: leaf for leaf in wanted}
    faults = [f"the checkpoint lacks {show(name)}" for name in ours if name not in theirs]
    faults += [f"the template lacks {show(name)}" for name in theirs if name not in ours]
    for name in [name for name in ours if name in theirs]:
        a, b = theirs[name], ours[name]
        pairs = [(str(tuple(a["shape"])), str(tuple(b["shape"]))), (a["dtype"], b["dtype"])]
        faults += [f"the checkpoint has {show(name)} {show(x)}, the template {y}" for x, y in pairs if x != y]
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{file}: {'; '.join(faults[:3])}{more}. Is it of another model?")


def are_leaves(value: Any) -> bool:
    """Whether `value`, from JSON, is a list of `Leaf` with no name twice."""
    return type(value) is list and all(map(_is_leaf, value)) and len({leaf["name"] for leaf in value}) == len(value)


def _is_leaf(value: Any) -> bool:
    return (
        type(value) is dict
        and value.keys() == Leaf.__required_keys__
        and type(value["name"]) is str
        and type(value["dtype"]) is str
        and type(value["shape"]) is list
        and all(map(is_natural, value["shape"]))
    )


def is_natural(value: object) -> bool:
    """Whether `value`, from JSON, is an integer, at least 0 and below 2**63."""
    return type(value) is int and 0 <= value < INT_LIMIT
