"""The verb `save`: complete under another name first, and then a rename."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ..tree import Tree
from .files import CheckpointError, make, sync, write
from .folders import aside, final, hide, steps, temporary, turn
from .leaves import INT_LIMIT, described, named
from .manifest import JSON, MANIFEST, STATE, encode


def save(folder: str | os.PathLike[str], state: Tree, *, step: int, config: Mapping[str, JSON], keep: int = 3) -> Path:
    """Writes the checkpoint `folder/step-…` and removes all but the newest `keep`.

    Args:
        folder: where the checkpoints of one run are; created if it does not exist.
        state: a pytree of dense tensors, on any device, of any shape and strides; leaves may share memory.
        step: at least 0, below 2**63.
        config: further data of the run, in plain JSON.
        keep: the number of checkpoints that remain, at least 1.

    Returns:
        The path of the new checkpoint.

    Raises:
        CheckpointError: the system refused: no space, no permission, a file in the way. From the `OSError`.
        TypeError: a leaf is no tensor, or a value in `config` does not come back from JSON as it was.
        ValueError: `step` or `keep` is out of range, two leaves have one name, a leaf's dtype or layout cannot be
            written, or `config` has a number that is not finite or is too long or too deep for a manifest (1 MiB).

    Guarantees:
        - When it returns, the checkpoint is on the disk, not only in the system's cache.
        - Killed at any moment, or stopped by any error, every earlier checkpoint that was to be kept is still there.
        - A checkpoint of the same step is replaced; until the new one has the name, `steps` still lists the old one.
        - The checkpoint just written is never removed, even if `keep` others have higher steps.
        - After an error or an interrupt no temporary folder is left; after a kill, the next `save` removes it.

    Cost: two copies of the state in memory.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from functorch_mnist.checkpoint import load
        >>> with TemporaryDirectory() as folder:
        ...     path = save(folder, {"w": torch.arange(3)}, step=938, config={"lr": 0.1})
        ...     path.name, load(path, {"w": torch.zeros(3, dtype=torch.int64)}).state
        ('step-00000938', {'w': tensor([0, 1, 2])})
    """
    if not isinstance(step, int) or isinstance(step, bool) or not isinstance(keep, int):
        raise TypeError(f"save: step and keep must be integers. Found {step!r} and {keep!r}.")
    if not 0 <= step < INT_LIMIT:
        raise ValueError(f"save: step must be at least 0 and below 2**63. Found {step}.")
    if keep < 1:
        raise ValueError(f"save: keep must be at least 1. Found {keep}.")
    leaves = named("save", state)
    data = serialize({name: _plain(leaf) for name, leaf in leaves.items()})
    manifest = encode(data, described(leaves), step, config)
    folder = Path(folder)
    path = final(folder, step)
    try:
        make(folder)
        with turn(folder):
            new = temporary(path)
            new.mkdir()
            write(new / STATE, data)
            write(new / MANIFEST, manifest)
            sync(new)
            if path.is_dir() and not path.is_symlink():
                os.rename(path, aside(path))
            os.rename(new, path)
            sync(folder)
            for old in steps(folder)[:-keep]:
                if old != path:
                    hide(old)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be saved. {error}.") from error
    return path


def _plain(leaf: Tensor) -> Tensor:
    """A copy, because safetensors refuses leaves that share memory or are not contiguous.

    It also carries out a conjugation or negation that torch has put off.
    """
    return leaf.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
