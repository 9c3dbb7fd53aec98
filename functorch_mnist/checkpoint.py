"""Checkpoints: a state on disk that a crash cannot leave half-written and that a reader need not trust.

    runs/step-00000938/state.safetensors    every leaf, under its name in `tree.paths`
    runs/step-00000938/manifest.json        step, config, versions, leaves, size and SHA-256 of the state, own checksum

A folder gets its `step-` name by a rename, once its files are complete and on the disk. What is unfinished or on its
way out is called `.tmp-step-…`. A checkpoint that is being replaced is called `.old-step-…` until its successor has the
name, and is found under either.

Nothing read from a file is unpickled, or trusted before its checksum agrees. The checksums find damage. They are no
signature: whoever can write both files can write any numbers into them.

For POSIX systems. Writers into one folder take turns by a lock on it; where the file system has no locks, it is for the
caller to have one writer at a time.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypedDict, cast

import torch
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from . import tree
from .tree import Tree

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
"""What a JSON document can say; numbers are finite."""


class CheckpointError(Exception):
    """A checkpoint cannot be written or read; the message names the file and the fault."""


class Checkpoint(NamedTuple):
    """A state that was loaded, the step and the config it was saved with, and its folder."""

    state: Tree
    step: int
    config: dict[str, JSON]
    path: Path


class Leaf(TypedDict):
    """What a manifest says of one leaf. `dtype` is torch's name, such as `"float32"`."""

    name: str
    shape: list[int]
    dtype: str


class Manifest(TypedDict):
    """What `manifest.json` holds: these keys and no others.

    `schema` is the version of this format; `package` and `torch` are the versions that wrote it; `file`, `size` (bytes)
    and `sha256` belong to the file of the leaves; `checksum` is the SHA-256 of everything else in the manifest.
    """

    schema: int
    package: str
    torch: str
    step: int
    config: dict[str, JSON]
    file: str
    size: int
    sha256: str
    leaves: list[Leaf]
    checksum: str


_SCHEMA = 1
_STATE = "state.safetensors"
_MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 2**20  # bytes
_HEADER_LIMIT = 2**22  # bytes of a safetensors header; a manifest within its limit describes no leaves that need more
_INT_LIMIT = 2**63
_NAME = re.compile(r"(?:\.old-)?(step-([0-9]{8,}))")
_TEMPORARY = re.compile(r"\.tmp-step-[0-9]{8,}-[0-9a-f]{8}")
_DTYPE = re.compile(r"float(64|32|16|8_e4m3fn|8_e5m2)|bfloat16|complex64|u?int(64|32|16|8)|bool")


def save(folder: str | os.PathLike[str], state: Tree, *, step: int, config: Mapping[str, JSON], keep: int = 3) -> Path:
    """Writes the checkpoint `folder/step-…` and removes all but the newest `keep`; the path of the new one.

    Args:
        folder: where the checkpoints of one run are; made if it does not exist.
        state: every leaf a dense tensor, on any device, of any shape and strides; leaves may share memory.
        step: at least 0, below 2**63.
        config: what else to know about the run, in plain JSON.
        keep: how many checkpoints remain, at least 1.

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
        >>> with TemporaryDirectory() as folder:
        ...     path = save(folder, {"w": torch.arange(3)}, step=938, config={"lr": 0.1})
        ...     path.name, load(path, {"w": torch.zeros(3, dtype=torch.int64)}).state
        ('step-00000938', {'w': tensor([0, 1, 2])})
    """
    if not isinstance(step, int) or isinstance(step, bool) or not isinstance(keep, int):
        raise TypeError(f"save: step and keep must be integers. Found {step!r} and {keep!r}.")
    if not 0 <= step < _INT_LIMIT:
        raise ValueError(f"save: step must be at least 0 and below 2**63. Found {step}.")
    if keep < 1:
        raise ValueError(f"save: keep must be at least 1. Found {keep}.")
    data, manifest = _encode(_named("save", state), step, config)
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    try:
        _make(folder)
        with _locked(folder):
            _tidy(folder)
            try:
                new = _temporary(final)
                new.mkdir()
                _write(new / _STATE, data)
                _write(new / _MANIFEST, manifest)
                _sync(new)
                if final.is_dir() and not final.is_symlink():
                    os.rename(final, _aside(final))
                os.rename(new, final)
                _sync(folder)
                for old in steps(folder)[:-keep]:
                    if old != final:
                        _remove(old)
            finally:
                _tidy(folder)
    except OSError as error:
        raise CheckpointError(f"{final}: cannot be saved. {error}.") from error
    return final


def load(path: str | os.PathLike[str], template: Tree) -> Checkpoint:
    """The checkpoint in the folder `path`.

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
    wanted = _named("load", template)
    path = Path(path)
    file = path / _STATE
    manifest = read_manifest(path)
    _compare(
        path / _MANIFEST, {leaf["name"]: (tuple(leaf["shape"]), leaf["dtype"]) for leaf in manifest["leaves"]}, wanted
    )
    size = manifest["size"]
    # Bounds what a forged manifest can make us read.
    if not 0 <= size - sum(leaf.numel() * leaf.element_size() for leaf in wanted.values()) <= _HEADER_LIMIT:
        raise CheckpointError(f"{path / _MANIFEST}: size must be that of the leaves and a header. Found {size} bytes.")
    data = _read(file, size)
    if len(data) != size:
        raise CheckpointError(f"{file}: must have {size} bytes. Found {len(data)}. Was it cut short?")
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest["sha256"]:
        raise CheckpointError(
            f"{file}: must have the SHA-256 {manifest['sha256']}. Found {digest}. Was it damaged or changed?"
        )
    try:
        tensors = parse_tensors(data)
    except Exception as error:  # it raises many types, of which only one is its own
        raise CheckpointError(f"{file}: must be a safetensors file. {_show(str(error))}.") from error
    _compare(file, {name: (tuple(leaf.shape), _dtype(leaf)) for name, leaf in tensors.items()}, wanted)
    state = tree.unflatten(template, [torch.empty_like(leaf).copy_(tensors[name]) for name, leaf in wanted.items()])
    return Checkpoint(state, manifest["step"], manifest["config"], path)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the checkpoint in the folder `path`: its config can be read before there is a template.

    Raises:
        CheckpointError: `manifest.json` is missing, over 1 MiB, no strict JSON, of an unknown schema, or not exactly a
            `Manifest`; its checksum differs; or the folder is named after another step.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     manifest = read_manifest(save(folder, {"w": torch.zeros(2, 3)}, step=5, config={"lr": 0.1}))
        >>> manifest["config"], manifest["leaves"]
        ({'lr': 0.1}, [{'name': 'w', 'shape': [2, 3], 'dtype': 'float32'}])
    """
    path = Path(path)
    file = path / _MANIFEST
    data = _read(file, _MANIFEST_LIMIT)
    try:
        manifest = _validated(_parsed(data))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    named = _step(path.name)
    if named is not None and named != manifest["step"]:
        raise CheckpointError(f"{file}: the folder is named after step {named}. Found step {manifest['step']}.")
    return manifest


def steps(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders of the checkpoints in `folder`, by step, lowest first; empty if there is no such folder.

    They are known by their name, which a folder gets once it is complete; they are not opened. Links are left out.

    Raises:
        CheckpointError: `folder` cannot be listed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     paths = [save(folder, {}, step=step, config={}, keep=2) for step in (10, 20, 30)]
        ...     [path.name for path in steps(folder)]
        ['step-00000020', 'step-00000030']
    """
    folder = Path(folder)
    found: dict[int, Path] = {}
    try:
        # Sorted, so that `.old-step-…` yields to `step-…`.
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            step = _step(entry.name)
            if step is not None and entry.is_dir(follow_symlinks=False):
                found[step] = folder / entry.name
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: must be a folder of checkpoints. {error}.") from error
    return [found[step] for step in sorted(found)]


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


# ---- a state and its manifest as bytes


def _named(where: str, state: Tree) -> dict[str, Tensor]:
    """The leaves by name, each one that a file can hold."""
    named: dict[str, Tensor] = {}
    for name, leaf in zip(tree.paths(state), tree.leaves(state), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{where}: every leaf must be a tensor. Found {type(leaf).__name__} at {name!r}.")
        if not _DTYPE.fullmatch(_dtype(leaf)) or leaf.layout != torch.strided or leaf.is_meta:
            raise ValueError(
                f"{where}: a leaf must be dense, have storage and a dtype of safetensors. "
                f"Found {leaf.dtype}, {leaf.layout}, on {leaf.device} at {name!r}."
            )
        if name in named or name == "__metadata__":
            raise ValueError(
                f"{where}: every leaf needs a name of its own. {name!r} is taken. Is there a '/' in a key?"
            )
        named[name] = leaf
    return named


def _encode(named: dict[str, Tensor], step: int, config: Mapping[str, JSON]) -> tuple[bytes, bytes]:
    """The two files' contents."""
    # Copies, because safetensors refuses leaves that share memory or are not contiguous.
    # A copy also carries out a conjugation or negation that torch has put off.
    data = serialize_tensors(
        {
            name: leaf.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, leaf in named.items()
        }
    )
    manifest: Manifest = {
        "schema": _SCHEMA,
        "package": version("functorch-mnist"),
        "torch": str(torch.__version__),
        "step": step,
        "config": dict(config),
        "file": _STATE,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "leaves": [{"name": name, "shape": list(leaf.shape), "dtype": _dtype(leaf)} for name, leaf in named.items()],
        "checksum": "",
    }
    try:
        manifest["checksum"] = _checksum(manifest)
        text = json.dumps(manifest, indent=2, allow_nan=False).encode("ascii")
        back = _validated(_parsed(text))
    except TypeError as error:
        raise TypeError(f"save: config must be plain JSON. {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"save: config must be plain JSON with finite numbers, not too deep. {error}.") from error
    if back["config"] != manifest["config"]:
        raise TypeError("save: config must come back from JSON as it was. Is there a tuple or a key that is no text?")
    if len(text) > _MANIFEST_LIMIT:
        raise ValueError(f"save: a manifest must have at most {_MANIFEST_LIMIT} bytes. Found {len(text)}.")
    return data, text


def _checksum(manifest: Mapping[str, object]) -> str:
    """SHA-256 of what the manifest says: of all but `checksum`, in one fixed spelling."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _parsed(data: bytes) -> object:
    """Strict JSON in UTF-8: no NaN or Infinity, no number that overflows, no key twice."""
    try:
        parsed: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be strict JSON in UTF-8. {error}. Was it damaged?") from error
    return parsed


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("A key occurs twice")
    return result


def _refuse(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not finite")


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        _refuse(_show(literal))
    return value


def _validated(value: Any) -> Manifest:
    """`value`, if it is a manifest of this schema; else ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object. Found {type(value).__name__}.")
    schema = value.get("schema")
    if type(schema) is not int or schema != _SCHEMA:
        raise ValueError(
            f"this library reads schema {_SCHEMA}. Found {_show(str(schema))}. Was it written by another version?"
        )
    difference = sorted(value.keys() ^ Manifest.__required_keys__)
    if difference:
        raise ValueError(f"must have exactly the keys of a manifest. Missing or extra: {_show(', '.join(difference))}.")
    if value["checksum"] != _checksum(value):
        raise ValueError("must agree with its own checksum. Was it damaged or edited?")
    leaves = value["leaves"]
    good = {
        "package": type(value["package"]) is str,
        "torch": type(value["torch"]) is str,
        "step": _natural(value["step"]),
        "config": type(value["config"]) is dict,
        "file": value["file"] == _STATE,
        "size": _natural(value["size"]),
        "sha256": type(value["sha256"]) is str and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None,
        "leaves": type(leaves) is list
        and all(map(_is_leaf, leaves))
        and len({leaf["name"] for leaf in leaves}) == len(leaves),
    }
    for key in good:
        if not good[key]:
            raise ValueError(f"{key} must be as `Manifest` has it. Found {_show(repr(value[key]))}.")
    return cast(Manifest, value)


def _is_leaf(value: Any) -> bool:
    return (
        type(value) is dict
        and value.keys() == Leaf.__required_keys__
        and type(value["name"]) is str
        and type(value["dtype"]) is str
        and type(value["shape"]) is list
        and all(map(_natural, value["shape"]))
    )


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < _INT_LIMIT


def _dtype(leaf: Tensor) -> str:
    return str(leaf.dtype).removeprefix("torch.")


def _compare(file: Path, found: dict[str, tuple[tuple[int, ...], str]], wanted: dict[str, Tensor]) -> None:
    """Raises if names, shapes or dtypes differ, with the first few differences."""
    faults = [f"the checkpoint lacks {_show(name)}" for name in wanted if name not in found]
    faults += [f"the template lacks {_show(name)}" for name in found if name not in wanted]
    for name, leaf in wanted.items():
        shape, dtype = found.get(name, (tuple(leaf.shape), _dtype(leaf)))
        here = f"the checkpoint has {_show(name)}"
        if shape != tuple(leaf.shape):
            faults.append(f"{here} {_show(str(shape))}, the template {tuple(leaf.shape)}")
        if dtype != _dtype(leaf):
            faults.append(f"{here} {_show(dtype)}, the template {_dtype(leaf)}")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{file}: {'; '.join(faults[:3])}{more}. Is it of another model?")


def _show(text: str) -> str:
    """`text` from a file, safe and short enough for a message."""
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 120 else text[:120] + "…"


# ---- files and folders


def _step(name: str) -> int | None:
    """The step that a checkpoint's folder is named after."""
    match = _NAME.fullmatch(name)
    if match is None or match[1] != f"step-{int(match[2]):08d}":
        return None
    return int(match[2])


def _temporary(path: Path) -> Path:
    """A new name, in the same folder, for what is not yet or no longer the checkpoint `path`."""
    return path.parent / f".tmp-{path.name.removeprefix('.old-')}-{os.urandom(4).hex()}"


def _aside(final: Path) -> Path:
    return final.parent / f".old-{final.name}"


def _read(file: Path, limit: int) -> bytes:
    """The bytes of a regular file, read once; not more than `limit`."""
    try:
        # Asks what was opened, not what is to be opened: no gap in which it could be exchanged.
        with open(file, "rb", opener=_open) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise CheckpointError(f"{file}: must be a regular file.")
            data = stream.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: must be a regular file that can be read, no link. {error}.") from error
    if len(data) > limit:
        raise CheckpointError(f"{file}: must have at most {limit} bytes. Found more.")
    return data


def _open(path: str, flags: int) -> int:
    """Opens without following a link or waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _write(file: Path, data: bytes) -> None:
    with open(file, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    """Waits until the folder's entries are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make(folder: Path) -> None:
    """Makes the folder and what is missing above it, and waits until they are on the disk."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for part in missing:
        _sync(part.parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Held by one writer at a time, and let go when the writer dies: so any temporary folder found is a dead one's."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # not left to `close`: a forked process may hold the descriptor too
        os.close(descriptor)


def _tidy(folder: Path) -> None:
    """Removes what is temporary; a checkpoint that was set aside for one that never came gets its name back."""
    for entry in list(os.scandir(folder)):
        path = folder / entry.name
        if _TEMPORARY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(path, ignore_errors=True)
        elif entry.name.startswith(".old-") and _step(entry.name) is not None:
            final = folder / entry.name.removeprefix(".old-")
            with suppress(OSError):  # the next save tries again, and until then `steps` finds it where it is
                if os.path.lexists(final):
                    _remove(path)
                else:
                    os.rename(path, final)


def _remove(path: Path) -> None:
    """Removes a checkpoint, out of sight first, so that none is ever seen half-removed."""
    doomed = _temporary(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
