"""The world that the commands run in: a small data set in files, and a shell's view of a command."""

import contextlib
import io
import signal
import struct
from typing import NamedTuple

import torch

import functorch_mnist as fm
from functorch_mnist import cli

TRAIN, TEST, BATCH = 256, 64, 32
CNN = ("--model", "cnn", "--epochs", "2", "--batch-size", str(BATCH), "--save-every", "3")
LINEAR = ("--model", "linear", "--epochs", "2", "--batch-size", str(BATCH), "--save-every", "3")


class Answer(NamedTuple):
    """What a command does."""

    status: int
    out: str
    err: str


def ask(*arguments):
    """Runs a command in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    term = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, term)
    return Answer(status, *(stream.buffer.getvalue().decode("utf-8") for stream in (out, err)))


def succeed(*arguments):
    """What a command prints that has nothing to complain about."""
    answer = ask(*arguments)
    assert (answer.status, answer.err) == (0, ""), answer
    return answer.out


def complain(status, *arguments):
    """The one line that a command fails with."""
    answer = ask(*arguments)
    lines = answer.err.splitlines()
    assert answer.status == status, answer
    assert len(lines) == 1, answer
    assert lines[0].startswith("functorch-mnist: "), answer
    return lines[0].removeprefix("functorch-mnist: ")


def accuracy(out):
    """The line in which a command prints the accuracy on the test images."""
    (line,) = [line for line in out.splitlines() if line.startswith("Accuracy of the network on the ")]
    return line


def write_idx(folder, dataset):
    folder.mkdir()
    for prefix, split in (("train", dataset.train), ("t10k", dataset.test)):
        count = len(split.labels)
        head = struct.pack(">HBBIII", 0, 8, 3, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(head + split.images.numpy().tobytes())
        head = struct.pack(">HBBI", 0, 8, 1, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(head + split.labels.to(torch.uint8).numpy().tobytes())
    return folder


def part(dataset, train, test):
    cut = [fm.data.Split(s.images[:n], s.labels[:n]) for s, n in ((dataset.train, train), (dataset.test, test))]
    return fm.data.Dataset(*cut, dataset.classes)
