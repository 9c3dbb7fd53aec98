"""Hyperparameters of losses: a Python number is checked; a 0-d tensor is never read, only its shape is."""

from torch import Tensor


def check(where: str, words: str, least: float, most: float, **numbers: float | Tensor) -> None:
    """Raises ValueError for a Python number outside [least, most], said in words, and for a tensor that is not 0-d."""
    for name, value in numbers.items():
        if isinstance(value, Tensor):
            if value.shape != ():
                raise ValueError(f"{where}: a tensor {name} must be 0-d. Found {tuple(value.shape)}.")
        elif not least <= value <= most:
            raise ValueError(f"{where}: {name} must be {words}. Found {value}.")


def like(value: float | Tensor, leaf: Tensor) -> float | Tensor:
    """The number in the leaf's type and on its device; a Python number as it is."""
    return value.to(leaf.device, leaf.dtype) if isinstance(value, Tensor) else value
