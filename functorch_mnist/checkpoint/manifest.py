"""The manifest: what is said of a checkpoint, as strict JSON with a checksum.

`encode` and `decode` are inverse. Neither asks the file system anything: what is wrong with the bytes is a ValueError.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias, TypedDict, cast

import torch

from .. import __version__
from .files import show
from .leaves import Leaf, are_leaves, is_natural

STATE: Final = "state.safetensors"
MANIFEST: Final = "manifest.json"
MANIFEST_LIMIT: Final = 2**20
"""The longest manifest, in bytes."""

_SCHEMA: Final = 1

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
"""What a JSON document can say; numbers are finite."""


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


def encode(data: bytes, leaves: list[Leaf], step: int, config: Mapping[str, JSON]) -> bytes:
    """The manifest of a state, `data` in its file; TypeError or ValueError if `config` does not fit into one."""
    manifest: Manifest = {
        "schema": _SCHEMA,
        "package": __version__,
        "torch": torch.__version__,
        "step": step,
        "config": dict(config),
        "file": STATE,
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "leaves": leaves,
        "checksum": "",
    }
    try:
        manifest["checksum"] = _checksum(manifest)
        text = json.dumps(manifest, indent=2, allow_nan=False).encode("ascii")
        back = decode(text)
    except TypeError as error:
        raise TypeError(f"save: config must be plain JSON. {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"save: config must be plain JSON with finite numbers, not too deep. {error}.") from error
    if back["config"] != manifest["config"]:
        raise TypeError("save: config must come back from JSON as it was. Is there a tuple or a key that is no text?")
    if len(text) > MANIFEST_LIMIT:
        raise ValueError(f"save: a manifest must have at most {MANIFEST_LIMIT} bytes. Found {len(text)}.")
    return text


def decode(data: bytes) -> Manifest:
    """The manifest that `data` is; ValueError if it is none of this schema, or its checksum differs."""
    try:
        return _validated(_parsed(data))
    except RecursionError as error:
        raise ValueError(f"must not be nested so deep. {error}. Was it damaged?") from error


def _parsed(data: bytes) -> object:
    """Strict JSON in UTF-8: no NaN or Infinity, no number that overflows, no key twice."""
    try:
        value: object = json.loads(
            data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_finite, parse_float=_finite
        )
    except ValueError as error:
        raise ValueError(f"must be strict JSON in UTF-8. {error}. Was it damaged?") from error
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("A key occurs twice")
    return result


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{show(literal)} is not finite")
    return value


def _validated(value: Any) -> Manifest:
    """`value`, if it is a manifest of this schema; else ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object. Found {type(value).__name__}.")
    schema = value.get("schema")
    if type(schema) is not int or schema != _SCHEMA:
        raise ValueError(
            f"this library reads schema {_SCHEMA}. Found {show(str(schema))}. Was it written by another version?"
        )
    difference = sorted(value.keys() ^ Manifest.__required_keys__)
    if difference:
        raise ValueError(f"must have exactly the keys of a manifest. Missing or extra: {show(', '.join(difference))}.")
    if value["checksum"] != _checksum(value):
        raise ValueError("must agree with its own checksum. Was it damaged or edited?")
    good = {
        "package": type(value["package"]) is str,
        "torch": type(value["torch"]) is str,
        "step": is_natural(value["step"]),
        "config": type(value["config"]) is dict,
        "file": value["file"] == STATE,
        "size": is_natural(value["size"]),
        "sha256": type(value["sha256"]) is str and re.fullmatch("[0-9a-f]{64}", value["sha256"]) is not None,
        "leaves": are_leaves(value["leaves"]),
    }
    for key, is_good in good.items():
        if not is_good:
            raise ValueError(f"{key} must be as `Manifest` has it. Found {show(repr(value[key]))}.")
    return cast(Manifest, value)


def _checksum(manifest: Mapping[str, object]) -> str:
    """SHA-256 of what the manifest says: of all but `checksum`, in one fixed spelling."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
