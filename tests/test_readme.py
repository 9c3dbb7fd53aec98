"""The pages: their blocks run, their commands parse, their links lead somewhere."""

import re
import shlex
import signal
import warnings
from pathlib import Path

import pytest

import functorch_mnist as fm
from functorch_mnist import cli
from functorch_mnist.per_sample import measured

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "benchmarks" / "README.md", *sorted((ROOT / "functorch_mnist").rglob("*.md"))]
PEERS = ("jax", "opacus", "optax", "peft", "timm", "transformers")
"""Blocks that import one of these run where it is installed."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name(page):
    return str(page.relative_to(ROOT))


def fences(page, language):
    return [body for fence, body in FENCE.findall(page.read_text(encoding="utf-8")) if fence == language]


def prose(page):
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page):
    """What a page says to type after `functorch-mnist`: in its shell blocks and within its sentences."""
    lines = "\n".join(fences(page, "bash")).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|\s#\s", line)]
    inline = re.findall(r"`(functorch-mnist [^`]+)`", prose(page))
    found = [re.search(r"(?:^\s*functorch-mnist|-m functorch_mnist)\s+([^']*)", part) for part in [*parts, *inline]]
    return [match[1].strip() for match in found if match]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


def of_pages(items):
    return [pytest.param(page, item, id=f"{name(page)}:{number}") for page in PAGES for number, item in items(page)]


def blocks(page):
    return enumerate(fences(page, "python"), 1)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("page", "block"), of_pages(blocks))
def test_a_python_block_runs_alone(page, block, monkeypatch, capsys, tmp_path):
    for peer in PEERS:
        if re.search(rf"^(?:import|from) {peer}\b", block, re.MULTILINE):
            warnings.simplefilter("ignore")  # theirs; pytest restores the filters
            pytest.importorskip(peer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measured, "default_file", lambda: tmp_path / "ways.json")
    whole = fm.data.load("mnist")
    part = fm.data.Dataset(*(fm.data.Split(s.images[:640], s.labels[:640]) for s in whole[:2]), whole.classes)
    monkeypatch.setattr(
        fm.data, "load", lambda name="mnist", folder=None: part
    )  # a hundredth of MNIST, for the time it takes
    term = signal.getsignal(signal.SIGTERM)
    try:
        exec(compile(block, name(page), "exec"), {"__name__": "block"})
    finally:
        signal.signal(signal.SIGTERM, term)  # a block may run a command, which sets its own
    assert bool(capsys.readouterr().out) == ("print(" in block)


def test_the_cnn_loop_has_20_lines_of_code():
    (block,) = (b for b in fences(README, "python") if "models.cnn" in b)
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 20


@pytest.mark.parametrize(("page", "command"), of_pages(lambda page: enumerate(commands(page), 1)))
def test_a_command_of_a_page_parses(page, command, monkeypatch):
    monkeypatch.setattr(cli.run_folder, "read_config", lambda folder: cli.opt.RECIPES["tutorial"])
    if command.startswith("--"):  # help or the version, after which Python exits
        with pytest.raises(SystemExit) as done:
            cli._parse([command])
        assert not done.value.code
    else:
        assert cli._parse(shlex.split(command))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT), target
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there / "README.md" if there.is_dir() else there), target


def test_tests_that_a_page_names_exist():
    named = {file for page in PAGES for file in re.findall(r"\btest_\w+\.py\b", prose(page))}
    assert named
    assert all((ROOT / "tests" / file).is_file() for file in named)


def test_the_ratios_of_the_first_screen_are_in_measured_tables():
    screen, _ = prose(README).split("## Install")
    ratios = re.findall(r"\d+\.\d\d", screen)
    measured_tables = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert len(ratios) >= 5
    assert all(f"| {ratio} (" in measured_tables for ratio in ratios)


def test_the_readme_is_a_page():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_the_readme_shows_code_and_commands():
    assert len(fences(README, "python")) >= 2
    assert len(commands(README)) >= 2
