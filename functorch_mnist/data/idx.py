"""The IDX file format of MNIST, read as from a hostile source.

An IDX file is a header and the numbers, in C order. The header is two zero bytes, one byte for the type of a number,
one for the count D of dimensions, and D sizes as big-endian unsigned 32-bit integers.

The one idea: memory follows the bytes that arrive, never a number that the file states. The file is read, and inflated,
in small chunks, and reading stops at the first chunk past the end that the header implies.
"""

import hashlib
import math
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

MAX_BYTES: Final = 2**30
"""The largest file that is read, in bytes after decompression."""

_CHUNK_IN: Final = 2**16
_CHUNK_OUT: Final = 2**20
_UNSIGNED_BYTE: Final = 0x08
_TYPES: Final = {
    0x08: "unsigned byte",
    0x09: "signed byte",
    0x0B: "int16",
    0x0C: "int32",
    0x0D: "float32",
    0x0E: "float64",
}


class DataError(Exception):
    """A data set cannot be had: the message names the file, the rule it breaks and what was found."""


def read_idx(path: Path | str, *, expect_dims: int, sha256: str | None = None) -> Tensor:
    """The numbers of an IDX file of unsigned bytes, plain or, when the name ends in `.gz`, compressed with gzip.

    Args:
        path: a regular file.
        expect_dims: how many dimensions the file must have: 3 for images, 1 for labels.
        sha256: the SHA-256 of the file as it lies on disk, in lower-case hexadecimal; checked first when given.

    Returns:
        A contiguous uint8 tensor of the file's sizes, in memory of its own.

    Raises:
        DataError: the file cannot be read or is anything but one whole, valid IDX file without empty sizes; `from` the
            underlying error where there is one.

    Guarantees:
        - A file is read whole or refused: truncated data, trailing bytes, a damaged gzip stream, a second gzip member
          and a wrong checksum are each a `DataError`.
        - A header that claims more than arrives, or than `MAX_BYTES`, allocates nothing for it; compressed data that
          inflates past the header's claim is refused at the first chunk past it.
        - A folder, pipe or device is refused unopened.
        - With `sha256`, a file with any changed byte is refused.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     labels = Path(folder, "labels-idx1-ubyte")
        ...     _ = labels.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(labels, expect_dims=1)
        tensor([7, 2, 1], dtype=torch.uint8)
    """
    path = Path(path)
    try:
        _check_regular(path)
        with open(path, "rb") as file:
            if sha256 is not None:
                _check_digest(path, file, sha256)
            return _parse(path, _inflated(path, file) if path.suffix == ".gz" else _plain(file), expect_dims)
    except OSError as error:
        raise DataError(
            f"{path}: the file must be readable. Found: {error}. Are its path and permissions right?"
        ) from error
    except zlib.error as error:
        raise DataError(f"{path}: gzip data must be intact. Found: {error}. Was it damaged in a transfer?") from error
    except MemoryError as error:
        raise DataError(f"{path}: the data must fit in memory. It does not. Is this the right file?") from error


def _check_regular(path: Path) -> None:
    """Refuses what could block or never end, before it is opened."""
    try:
        info = os.stat(path)
    except ValueError as error:
        raise DataError(f"{path}: the path must be a valid file name. Found: {error}. Is it mistyped?") from error
    if not stat.S_ISREG(info.st_mode):
        found = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
        raise DataError(f"{path}: data is read from a regular file. Found {found}. Is the path right?")
    if info.st_size == 0:
        raise DataError(f"{path}: an IDX file has a header. Found an empty file. Did a download break off?")


def _check_digest(path: Path, file: BufferedReader, sha256: str) -> None:
    """Compares the whole file with its checksum and goes back to its start."""
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise DataError(f"{path}: the SHA-256 must be {sha256}. Found {found}. Was the file changed or damaged?")
    file.seek(0)


def _plain(file: BufferedReader) -> Iterator[bytes]:
    """The bytes of the file, chunk by chunk."""
    return iter(lambda: file.read(_CHUNK_OUT), b"")


def _inflated(path: Path, file: BufferedReader) -> Iterator[bytes]:
    """The bytes of the file's one gzip member, chunk by chunk; zlib checks its CRC and length."""
    start = file.read(2)
    if start != b"\x1f\x8b":
        raise DataError(
            f"{path}: a .gz file starts with the bytes 1f 8b. Found {start.hex(' ')}. Is it decompressed already? Then "
            "its name must not end in .gz."
        )
    file.seek(0)
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    while not inflate.eof:
        compressed = inflate.unconsumed_tail or file.read(_CHUNK_IN)
        chunk = inflate.decompress(compressed, _CHUNK_OUT)
        if not compressed and not chunk:
            raise DataError(
                f"{path}: gzip data ends with its checksum. Found a truncated file. Did a download break off?"
            )
        yield chunk
    if inflate.unused_data or file.read(1):
        raise DataError(
            f"{path}: the file must be one gzip member. Found more bytes after its end. Decompress it and compress it "
            "again?"
        )


def _parse(path: Path, chunks: Iterator[bytes], expect_dims: int) -> Tensor:
    """The tensor, from the chunks of an IDX file."""
    start = 4 + 4 * expect_dims
    data = bytearray()
    sizes: tuple[int, ...] | None = None
    for chunk in chunks:
        data += chunk
        if sizes is None and len(data) >= start:
            sizes = _sizes(path, data, expect_dims)
        if sizes is not None and len(data) > start + math.prod(sizes):
            raise DataError(
                f"{path}: the file must end after {start + math.prod(sizes)} bytes, as its sizes {sizes} say. Found "
                "trailing bytes. Is the header damaged?"
            )
    if sizes is None:
        sizes = _sizes(path, data, expect_dims)
    if len(data) < start + math.prod(sizes):
        raise DataError(
            f"{path}: the file must have {start + math.prod(sizes)} bytes, as its sizes {sizes} say. Found "
            f"{len(data)}. Is it truncated?"
        )
    return torch.frombuffer(data, dtype=torch.uint8, offset=start).reshape(sizes)


def _sizes(path: Path, data: bytearray, expect_dims: int) -> tuple[int, ...]:
    """The sizes in the header that `data` starts with."""
    if data[:2] != b"\0\0"[: len(data)]:
        raise DataError(
            f"{path}: an IDX file starts with two zero bytes. Found {data[:2].hex(' ')}. Is it another format, or "
            "compressed without .gz in its name?"
        )
    if len(data) > 2 and data[2] != _UNSIGNED_BYTE:
        found = f"{data[2]:#04x} ({_TYPES.get(data[2], 'not an IDX type')})"
        raise DataError(
            f"{path}: the numbers must be unsigned bytes, type 0x08. Found {found}. Is this the right file?"
        )
    if len(data) > 3 and data[3] != expect_dims:
        raise DataError(
            f"{path}: the file must have {expect_dims} dimension(s). Found {data[3]}. Are images and labels mixed up?"
        )
    if len(data) < 4 + 4 * expect_dims:
        raise DataError(
            f"{path}: the header has {4 + 4 * expect_dims} bytes. Found {len(data)} in all. Did a download break off?"
        )
    sizes = struct.unpack_from(f">{expect_dims}I", data, 4)
    if 0 in sizes:
        raise DataError(f"{path}: every size must be at least 1. Found {sizes}. Is the header damaged?")
    if math.prod(sizes) > MAX_BYTES:
        raise DataError(
            f"{path}: the data may have up to {MAX_BYTES} bytes. Found the sizes {sizes}. Is the header damaged?"
        )
    return sizes
