"""The verbs that read: `load`, `read_manifest`, `latest`. What is parsed was verified, and was read once."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load as parse

from .. import tree
from ..tree import Tree
from .files import CheckpointError, read, show
from .folders import step_of, steps
from .leaves import compare, described, named
from .manifest import JSON, MANIFEST, MANIFEST_LIMIT, STATE, Manifest, decode

_HEADER_LIMIT: Final = 2**22
"""The longest header of a safetensors file, in bytes; leaves that fit into a manifest need no longer one."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was loaded."""

    state: Tree
    """The state, with the structure of the template."""
    step: int
    """The step it was saved at."""
    config: dict[str, JSON]
    """The config it was saved with."""
    path: Path
    """Its folder."""


def load(path: str | os.PathLike[str], template: Tree) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        path: one checkpoint's folder, as from `save` or `steps`.
        template: a tree of tensors with the structure, names, shapes and dtypes to expect, such as a fresh state.

    Returns:
        Its `state` has the structure of `template`, and each leaf the memory format and device of the template's leaf;
        no leaf requires a gradient or shares memory with another.

    Raises:
        CheckpointError: a file is missing, damaged, hostile, or of another state. Whatever the files hold, this is
            the only error they cause.
        TypeError: a leaf of the template is no tensor.
        ValueError: a leaf of the template is without storage or of a dtype that is never saved, or two have one name.

    Guarantees:
        - The leaves are equal to those saved in every bit, payloads of NaN and the sign of zero included.
        - A changed bit in either file is found, or (a space in the manifest) does not matter.
        - The bytes that are parsed are the bytes that were verified: each file is read once.
        - Links, pipes and devices are refused, without waiting on them.

    Cost: three copies of the state in memory; the check is one SHA-256 over the file.

    Example: see `save`.
    """
    leaves = named("load", template)
    wanted = described(leaves)
    path = Path(path)
    file = path / STATE
    manifest = read_manifest(path)
    compare(path / MANIFEST, manifest["leaves"], wanted)
    size = manifest["size"]
    # Bounds what a forged manifest can make us read.
    if not 0 <= size - sum(leaf.nbytes for leaf in leaves.values()) <= _HEADER_LIMIT:
        raise CheckpointError(f"{path / MANIFEST}: size must be that of the leaves and a header. Found {size} bytes.")
    data = read(file, size)
    if len(data) != size:
        raise CheckpointError(f"{file}: must have {size} bytes. Found {len(data)}. Was it cut short?")
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest["sha256"]:
        raise CheckpointError(
            f"{file}: must have the SHA-256 {manifest['sha256']}. Found {digest}. Was it damaged or changed?"
        )
    try:
        tensors = parse(data)
    except Exception as error:  # it raises many types, of which only one is its own
        raise CheckpointError(f"{file}: must be a safetensors file. {show(str(error))}.") from error
    compare(file, described(tensors), wanted)
    state = tree.unflatten(template, [torch.empty_like(leaf).copy_(tensors[name]) for name, leaf in leaves.items()])
    return Checkpoint(state, manifest["step"], manifest["config"], path)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of a checkpoint: its config can be read before there is a template.

    Args:
        path: one checkpoint's folder, as from `save` or `steps`.

    Returns:
        The manifest, a dict.

    Raises:
        CheckpointError: `manifest.json` is missing, over 1 MiB, no strict JSON, of an unknown schema, or not exactly a
            `Manifest`; its checksum differs; or the folder is named after another step.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from functorch_mnist.checkpoint import save
        >>> with TemporaryDirectory() as folder:
        ...     manifest = read_manifest(save(folder, {"w": torch.zeros(2, 3)}, step=5, config={"lr": 0.1}))
        >>> manifest["config"], manifest["leaves"]
        ({'lr': 0.1}, [{'name': 'w', 'shape': [2, 3], 'dtype': 'float32'}])
    """
    path = Path(path)
    file = path / MANIFEST
    data = read(file, MANIFEST_LIMIT)
    try:
        manifest = decode(data)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    step = step_of(path.name)
    if step is not None and step != manifest["step"]:
        raise CheckpointError(f"{file}: the folder is named after step {step}. Found step {manifest['step']}.")
    return manifest


def latest(folder: str | os.PathLike[str], template: Tree) -> tuple[Checkpoint, list[CheckpointError]]:
    """The checkpoint of the highest step that loads, and why each higher one did not.

    Args:
        folder: as for `save`.
        template: as for `load`.

    Returns:
        The checkpoint, and the errors of those that were skipped, highest step first; an empty list when all is well.

    Raises:
        CheckpointError: there is no checkpoint, or none loads; the message has every fault.
        TypeError, ValueError: as for `load`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from functorch_mnist.checkpoint import save
        >>> with TemporaryDirectory() as folder:
        ...     paths = [save(folder, {"w": torch.tensor(step)}, step=step, config={}) for step in (10, 20)]
        ...     _ = (paths[1] / "state.safetensors").write_bytes(b"")
        ...     checkpoint, faults = latest(folder, {"w": torch.tensor(0)})
        >>> checkpoint.step, len(faults)
        (10, 1)
    """
    faults: list[CheckpointError] = []
    for path in reversed(steps(folder)):
        try:
            return load(path, template), faults
        except CheckpointError as error:
            faults.append(error)
    if not faults:
        raise CheckpointError(f"{Path(folder)}: there is no checkpoint.")
    raise CheckpointError("\n  ".join([f"{Path(folder)}: no checkpoint can be loaded.", *map(str, faults)]))
