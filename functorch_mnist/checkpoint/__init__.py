"""Checkpoints: a state on disk that a crash cannot leave half-written and that a reader need not trust.

    runs/step-00000938/state.safetensors    every leaf, under its name in `tree.paths`
    runs/step-00000938/manifest.json        step, config, versions, leaves, size and SHA-256 of the state, own checksum

The one idea: a name is a promise. A folder gets its `step-` name by a rename, once its files are complete and on the
disk. What is unfinished or on its way out is called `.tmp-step-…`. A checkpoint that is being replaced is called
`.old-step-…` until its successor has the name, and is found under either.

Nothing read from a file is unpickled, or trusted before its checksum agrees. The checksums find damage. They are no
signature: whoever can write both files can write any numbers into them.

For POSIX systems. Writers into one folder take turns by a lock on it; where the file system has no locks, it is for the
caller to have one writer at a time.

| file | what it holds |
|---|---|
| `files.py` | a file or a folder on the disk: read without trust, written to last |
| `leaves.py` | the leaves of a state by name, described and compared |
| `manifest.py` | the manifest of a checkpoint: strict JSON with a checksum |
| `folders.py` | the folders of one run: their names, and the lock of their writers |
| `writing.py`, `reading.py` | `save`; `load`, `latest`, `read_manifest` |
"""

from .files import CheckpointError
from .folders import steps
from .leaves import Leaf
from .manifest import JSON, Manifest
from .reading import Checkpoint, latest, load, read_manifest
from .writing import save

__all__ = [
    "JSON",
    "Checkpoint",
    "CheckpointError",
    "Leaf",
    "Manifest",
    "latest",
    "load",
    "read_manifest",
    "save",
    "steps",
]


def __dir__() -> list[str]:
    return __all__
