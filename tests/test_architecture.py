"""The layers: each file imports only from the rows above its own."""

import ast
from pathlib import Path

import pytest

import functorch_mnist

ROOT = Path(functorch_mnist.__file__).parent
ROWS = [
    {"compiler", "files", "machine"},
    {"native"},
    {"tree", "allocator", "batch", "ops", "hyperparameters", "options"},
    {"random", "products"},
    {"decompositions"},
    {"layers", "losses", "optim", "data"},
    {"models", "distributed"},
    {"per_sample"},
    {"statistics", "privacy", "calibration", "ensemble"},
    {"attribution"},
    {"train", "checkpoint"},
    {"sweep"},
    {"run_folder", "plots"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_units(path):
    """The units of the package that a file imports, wherever in the file."""
    package = ("functorch_mnist", *path.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            modules = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {module[1] for module in modules if module[0] == "functorch_mnist" and len(module) > 1}
    return {name for name in found if name in RANK}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_the_rows_above(path):
    own = unit(path)
    for other in imported_units(path) - {own}:
        assert RANK[other] < RANK[own], f"{path} imports {other}"


def test_every_file_has_its_row():
    assert {unit(path) for path in FILES} == set(RANK)


def test_the_public_namespaces_are_there_and_no_other():
    for name in dir(functorch_mnist):
        assert getattr(functorch_mnist, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        functorch_mnist.nothing  # noqa: B018
