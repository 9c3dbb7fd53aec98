"""The manifest of a store: what was projected and how, and which files hold it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from ... import __version__, files

NAME = "manifest.json"
BEGUN = "begun.json"
"""What is being built, until all of it is there."""
FORMAT = "functorch-mnist gradient store"
SCHEMA = 1
_LIMIT = 1 << 26

Kind: TypeAlias = Literal["matrix", "pair"]


class StoreError(Exception):
    """A gradient store cannot be built or read; the message names the file and the fault."""


@dataclass(frozen=True)
class Block:
    """Where the features of one parameter are."""

    path: str
    shape: tuple[int, ...]
    """Of the parameter."""
    kind: Kind
    """`L ∇ Rᵀ`, h x d numbers, or `L g` and `R a`, h + d numbers, whose outer product it is."""
    left: int
    """h."""
    right: int
    """d."""
    start: int
    """The first of its numbers among those of an example."""

    @property
    def stop(self) -> int:
        """The first number after its own."""
        return self.start + (self.left * self.right if self.kind == "matrix" else self.left + self.right)


@dataclass(frozen=True)
class Checkpoint:
    """One of the models whose gradients are stored."""

    params: str
    """A digest."""
    weight: float
    """What its inner products are multiplied with, such as a learning rate."""


@dataclass(frozen=True)
class Examples:
    """What was built or appended at a time."""

    count: int
    digest: str


@dataclass(frozen=True)
class File:
    """A file of the store."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Part:
    """Some examples of one checkpoint."""

    checkpoint: int
    first: int
    """The number of its first example."""
    count: int
    file: File


@dataclass(frozen=True)
class Plan:
    """What is built: equal for two builds that give the same bits."""

    about: str
    """What was differentiated and projected, in the user's words."""
    dtype: str
    rows: int
    """Examples in a part."""
    blocks: tuple[Block, ...]
    checkpoints: tuple[Checkpoint, ...]
    maps: tuple[File, ...]
    examples: tuple[Examples, ...]

    @property
    def count(self) -> int:
        """N."""
        return sum(one.count for one in self.examples)

    @property
    def width(self) -> int:
        """F, the numbers of an example and checkpoint."""
        return self.blocks[-1].stop if self.blocks else 0

    @property
    def error(self) -> float:
        """What the distance of an example's features from those that were computed is at most, over their norm.

        Their largest number is 1 before it is rounded: others have an error of 2^-11 of theirs, or 2^-25.
        """
        return 2**-24 if self.dtype == "float32" else 2**-11 + 2**-25 * self.width**0.5

    @property
    def row(self) -> np.dtype[Any]:
        """How a row is stored."""
        return np.dtype([("scale", "<f4"), ("values", np.dtype(self.dtype).newbyteorder("<"), (self.width,))])


def encode(plan: Plan, parts: tuple[Part, ...]) -> bytes:
    """The manifest as strict JSON, with a checksum of the rest."""
    body: dict[str, Any] = {"format": FORMAT, "schema": SCHEMA, "package": __version__, "torch": _torch()}
    body |= {"plan": asdict(plan), "parts": [asdict(part) for part in parts]}
    text = json.dumps(body, allow_nan=False, sort_keys=True)
    body["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return (json.dumps(body, indent=1, allow_nan=False, sort_keys=True) + "\n").encode()


def decode(path: Path) -> tuple[Plan, tuple[Part, ...]]:
    """What a manifest says.

    Raises:
        StoreError: there is none, it is of something else, or it is damaged.
    """
    try:
        if not path.is_file():
            raise StoreError(f"{path.parent} holds no store. Found no file {path.name}.")
        if path.stat().st_size > _LIMIT:
            raise StoreError(f"{path} must have at most {_LIMIT} bytes. Found {path.stat().st_size}.")
        body = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path} must be readable. Found: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} must be JSON. Found: {error}. Is it damaged?") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise StoreError(f"{path} must be the manifest of a {FORMAT}. Found another file.")
    if body.get("schema") != SCHEMA:
        raise StoreError(f"{path} must be of format {SCHEMA}. Found {body.get('schema')!r}. Of another version?")
    checksum = body.pop("checksum", None)
    text = json.dumps(body, sort_keys=True)
    if checksum != hashlib.sha256(text.encode()).hexdigest():
        raise StoreError(f"{path} must have the checksum of its contents. Found another. Is it damaged?")
    try:
        return _plan(body["plan"]), tuple(_made(Part, one, file=_made(File, one["file"])) for one in body["parts"])
    except (LookupError, TypeError, ValueError) as error:
        raise StoreError(f"{path} must say what a store holds. Found: {error!r}.") from error


def _plan(values: Mapping[str, Any]) -> Plan:
    plan: Plan = _made(
        Plan,
        values,
        blocks=tuple(_made(Block, one, shape=tuple(one["shape"])) for one in values["blocks"]),
        checkpoints=tuple(_made(Checkpoint, one) for one in values["checkpoints"]),
        maps=tuple(_made(File, one) for one in values["maps"]),
        examples=tuple(_made(Examples, one) for one in values["examples"]),
    )
    return plan


def _made(kind: Any, values: Mapping[str, Any], **more: Any) -> Any:
    """The dataclass with these values; its fields and no others must be there."""
    names = {field.name for field in fields(kind)}
    if set(values) != names:
        raise ValueError(f"{kind.__name__} has the fields {sorted(names)}, not {sorted(values)}")
    return kind(**{**values, **more})


def write(path: Path, data: bytes) -> File:
    """Writes a file of the store, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data)
    return File(f"{path.parent.name}/{path.name}", len(data), hashlib.sha256(data).hexdigest())


def described(path: Path) -> File:
    """A file of the store that is there already."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return File(f"{path.parent.name}/{path.name}", path.stat().st_size, sha256)


def check(folder: Path, file: File, *, contents: bool) -> Path:
    """A file of the store.

    Raises:
        StoreError: it is missing, of another size, or with `contents` of another SHA-256.
    """
    path = folder / file.name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{folder / NAME} must name files of its folder. Found {file.name!r}.")
    try:
        size = path.stat().st_size
        found = described(path).sha256 if contents and size == file.size else file.sha256
    except OSError as error:
        raise StoreError(f"{path} must be there and readable. Found: {error.strerror}.") from error
    if size != file.size:
        raise StoreError(f"{path} must have {file.size} bytes. Found {size}. Is it damaged?")
    if found != file.sha256:
        raise StoreError(f"{path} must have the SHA-256 of the manifest. Found another. Is it damaged?")
    return path


def _torch() -> str:
    import torch

    return torch.__version__
