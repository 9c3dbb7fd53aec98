"""Data sets by name, or from a folder of IDX files.

MNIST is shipped. The other sets of its format are downloaded by torchvision, which is imported for nothing else.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .idx import DataError, read_idx

NAMES: tuple[str, ...] = ("mnist", "fashion-mnist", "kmnist", "qmnist", "emnist-digits")
"""The data sets that `load` knows."""

_CLASSES = 10
_SHIPPED = Path(__file__).parent / "mnist"
_SHA256 = {
    "train-images-idx3-ubyte": "7ff28fd295f802eefc6d40e461175dfe4b969b1842b2abc8c6dc8c20711cf79f",
    "train-labels-idx1-ubyte": "81a978ae83d39ffdba0db3ce2fcaf80a8921e9629e874428996a2b03242d4b2a",
    "t10k-images-idx3-ubyte": "197e111ae341b0770be9011ac5e622d0e6cd1c640b32eb0de5dc1dd26cc6e182",
    "t10k-labels-idx1-ubyte": "b91679a0acfe4ba0e50a2437a903084cba1f5f92592b016a25a7dfd00455798b",
}
_TORCHVISION: dict[str, tuple[str, dict[str, str]]] = {
    "fashion-mnist": ("FashionMNIST", {}),
    "kmnist": ("KMNIST", {}),
    "qmnist": ("QMNIST", {}),
    "emnist-digits": ("EMNIST", {"split": "digits"}),
}
_INSTEAD = "put its four IDX files in a folder and pass folder= (on the command line: --data-dir)"


class Split(NamedTuple):
    """Examples and their classes: images, uint8 (N, 1, 28, 28), 0 is background; labels, int64 (N,)."""

    images: Tensor
    labels: Tensor


class Dataset(NamedTuple):
    """A training and a test set with labels 0 to `classes - 1`."""

    train: Split
    test: Split
    classes: int


def load(name: str = "mnist", *, folder: Path | str | None = None, cache: Path | str | None = None) -> Dataset:
    """The data set of that name.

    Args:
        name: one of `NAMES`.
        folder: holds the set as four IDX files, `{train,t10k}-images-idx3-ubyte` and `{train,t10k}-labels-idx1-ubyte`,
            each plain or with `.gz`, and with `-` or `.` before `idx`; the plain file is used where both are. Any
            number of examples. Nothing is downloaded then.
        cache: where torchvision keeps what it downloads; `$XDG_CACHE_HOME/functorch_mnist` or
            `~/.cache/functorch_mnist` unless given. Not used for MNIST, which is shipped.

    Returns:
        Images, uint8 (N, 1, 28, 28), and labels, int64 (N,), both contiguous, for each split.

    Raises:
        ValueError: the name is not in `NAMES`.
        DataError: a file is missing, unreadable or invalid, an image is not 28 x 28, images and labels differ in
            number, a label is not in 0..9, torchvision cannot be imported, or a download fails.

    Guarantees:
        - The shipped files match their SHA-256.
        - No network is used for MNIST or with `folder`.
        - `emnist-digits` is transposed back: the files of EMNIST hold each image with rows and columns exchanged. So
          under this name the images of `folder` are transposed too; under any other name they are taken as they are.

    Example:
        >>> train, test, classes = load()
        >>> train.images.shape, train.labels.shape, len(test.labels), classes
        (torch.Size([60000, 1, 28, 28]), torch.Size([60000]), 10000, 10)
    """
    if name not in NAMES:
        raise ValueError(f"data.load: name must be one of {', '.join(NAMES)}. Found {name!r}. Is it mistyped?")
    if folder is not None:
        data = _from_files(_finder(Path(folder)), {})
    elif name == "mnist":
        data = _from_files(lambda stem: _SHIPPED / f"{stem}.gz", _SHA256)
    else:
        data = _downloaded(name, cache)
    return Dataset(_transposed(data.train), _transposed(data.test), data.classes) if name == "emnist-digits" else data


def _from_files(find: Callable[[str], Path], sha256: Mapping[str, str]) -> Dataset:
    """Both splits, from the files that `find` gives for the four classic names."""

    def split(prefix: str) -> Split:
        stems = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        images_path, labels_path = find(stems[0]), find(stems[1])
        images = read_idx(images_path, expect_dims=3, sha256=sha256.get(stems[0]))
        labels = read_idx(labels_path, expect_dims=1, sha256=sha256.get(stems[1]))
        return _split(images, labels, images_path, labels_path)

    return Dataset(split("train"), split("t10k"), _CLASSES)


def _finder(folder: Path) -> Callable[[str], Path]:
    """The function from a classic name to the file in the folder that bears it."""
    try:
        present = set(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: the data folder must be readable. Found: {error}. Is the path right?") from error

    def find(stem: str) -> Path:
        dotted = stem.replace("-idx", ".idx")
        names = stem, dotted, f"{stem}.gz", f"{dotted}.gz"
        for name in names:
            if name in present:
                return folder / name
        raise DataError(f"{folder / stem}: the data folder must hold this file. Found none of {', '.join(names)}.")

    return find


def _downloaded(name: str, cache: Path | str | None) -> Dataset:
    """Both splits, from torchvision's cache, which it fills when a file is missing."""
    try:
        from torchvision import datasets
    except Exception as error:  # a torchvision built for another torch fails in many ways, RuntimeError among them
        raise DataError(
            f"{name}: the download needs torchvision. Importing it failed: {_line(error)}. Install the torchvision "
            f"that matches torch {torch.__version__}, or {_INSTEAD}."
        ) from error
    kind, options = _TORCHVISION[name]
    root = _default_cache() if cache is None else Path(cache)
    source = root / kind

    def arrays(train: bool) -> tuple[Tensor, Tensor]:
        data = getattr(datasets, kind)(root, train=train, download=True, **options)
        # QMNIST: (N, 8), the class, then the writer and more
        return data.data, data.targets[:, 0] if name == "qmnist" else data.targets

    try:
        train, test = arrays(True), arrays(False)
    except Exception as error:  # a download fails in many ways, and the parser checks with assert
        raise DataError(
            f"{name}: its files must be in {source} or come by download. Found {_line(error)}. Check the network and "
            f"that you may write there, delete {source} if an earlier download broke off, or {_INSTEAD}."
        ) from error
    return Dataset(_split(*train, source, source), _split(*test, source, source), _CLASSES)


def _default_cache() -> Path:
    """The folder of the XDG base directory specification, which ignores a relative `$XDG_CACHE_HOME`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "functorch_mnist"
    except RuntimeError as error:
        raise DataError(f"~/.cache: the cache folder must exist. Found: {error}. Pass cache=, or set HOME.") from error


def _split(images: Tensor, labels: Tensor, images_path: Path, labels_path: Path) -> Split:
    """The split of images (N, 28, 28) and labels (N,), checked."""
    if images.shape[1:] != (28, 28):
        found = " x ".join(str(size) for size in images.shape[1:])
        raise DataError(f"{images_path}: images must be 28 x 28 pixels. Found {found}. Resize them first.")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: there must be one label for each of the {len(images)} images in {images_path}. Found "
            f"{len(labels)}. Are the splits mixed up?"
        )
    outside = ((labels < 0) | (labels >= _CLASSES)).nonzero()
    if len(outside):
        index = int(outside[0])
        raise DataError(
            f"{labels_path}: labels must be in 0..{_CLASSES - 1}. Found {int(labels[index])} at index {index}. Is it a "
            "set with other classes?"
        )
    return Split(images.unsqueeze(1), labels.to(torch.int64).contiguous())


def _transposed(split: Split) -> Split:
    """The split with rows and columns of each image exchanged."""
    return split._replace(images=split.images.transpose(-1, -2).contiguous())


def _line(error: Exception) -> str:
    """The error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": .")
