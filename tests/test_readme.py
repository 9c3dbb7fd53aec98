"""The README: its blocks run, its commands parse, its tables are those of the committed results."""

import re
import shlex
from pathlib import Path

import pytest

import functorch_mnist as fm
from functorch_mnist import cli
from functorch_mnist.per_sample import measured

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"^functorch-mnist (.*?)(?:#.*)?$", README, re.MULTILINE)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_a_python_block_runs(block, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(measured, "default_file", lambda: tmp_path / "ways.json")
    whole = fm.data.load("mnist")
    part = fm.data.Dataset(*(fm.data.Split(s.images[:640], s.labels[:640]) for s in whole[:2]), whole.classes)
    monkeypatch.setattr(fm.data, "load", lambda name: part)  # a hundredth of MNIST, for the time it takes
    exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert ("Accuracy" in printed) == ("print(" in block)


def test_the_cnn_loop_has_20_lines_of_code():
    (block,) = (b for b in BLOCKS if "models.cnn" in b)
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 20


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_parses(command, monkeypatch):
    monkeypatch.setattr(cli.run_folder, "read_config", lambda folder: cli.opt.RECIPES["article"])
    assert cli._parse(shlex.split(command))


def test_there_are_blocks_and_commands():
    assert len(BLOCKS) >= 3
    assert len(COMMANDS) >= 5
