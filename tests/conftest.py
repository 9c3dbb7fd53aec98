"""Shared settings: the suite runs in a stricter world than the user's."""

import functools
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from shell import CNN, LINEAR, TEST, TRAIN, part, succeed, write_idx

import functorch_mnist as fm
from functorch_mnist.commands import outputs

settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("suite")

# A per-example fallback under vmap is slow and silent; here it is an error.
torch._C._functorch._set_vmap_fallback_enabled(False)

# A shell has its background jobs ignore Ctrl-C, and their children inherit that; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Threads only wait for each other over so little data.
torch.set_num_threads(1)


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced as one graph, which runs as it is: torch's own kernels take a second each to make."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.fixture
def no_pictures(monkeypatch):
    """Where numbers alone are looked at: a picture takes longer than they do."""
    monkeypatch.setattr(outputs, "write_picture", lambda path, draw: None)


@pytest.fixture(scope="session")
def mnist():
    return fm.data.load()


@pytest.fixture(scope="session")
def data_dir(mnist, tmp_path_factory):
    return write_idx(tmp_path_factory.mktemp("data") / "tiny", part(mnist, TRAIN, TEST))


@pytest.fixture(scope="session")
def linear(data_dir, tmp_path_factory):
    """A finished run of the linear model: 16 steps, checkpoints after 12, 15 and 16."""
    run = tmp_path_factory.mktemp("linear") / "run"
    succeed("train", "--data-dir", data_dir, *LINEAR, "--out", run)
    return run


@pytest.fixture(scope="session")
def cnn(data_dir, tmp_path_factory):
    """A finished run of the CNN, with dropout, that nothing stopped."""
    run = tmp_path_factory.mktemp("cnn") / "run"
    succeed("train", "--data-dir", data_dir, *CNN, "--out", run)
    return run


@pytest.fixture
def copy(linear, tmp_path):
    """A copy of the linear run to damage."""
    return Path(shutil.copytree(linear, tmp_path / "copy"))
