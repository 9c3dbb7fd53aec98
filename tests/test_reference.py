"""The reference: what `dir`, `help` and documentation generators show of each namespace."""

import ast
import importlib
import inspect
import pydoc
import re
import warnings
from functools import cache
from pathlib import Path

import pytest

import functorch_mnist as fm

ROOT = Path(fm.__file__).parent
NAMESPACES = [*fm.__all__, "attribution.store"]


def namespace(name):
    return importlib.import_module(f"functorch_mnist.{name}")


def values(name):
    """The public values of a namespace that are not namespaces."""
    module = namespace(name)
    return {each: getattr(module, each) for each in module.__all__ if not inspect.ismodule(getattr(module, each))}


def functions(name):
    return {each: value for each, value in values(name).items() if inspect.isfunction(value)}


@cache
def constants(path):
    """The names that a file assigns and describes by a string in the next line."""
    described = set()
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            described |= {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    return described


def files(name):
    """The files of a namespace."""
    path = Path(namespace(name).__file__)
    return sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]


def undescribed(name):
    """What of a namespace is defined elsewhere, or has no docstring of its own."""
    described = set().union(*(constants(path) for path in files(name)))
    for each, value in values(name).items():
        if each in described:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            own = value.__module__.startswith(f"functorch_mnist.{name}") and value.__doc__
            generated = inspect.isclass(value) and value.__doc__.startswith(f"{each}(")
            if not own or generated:
                yield each
        else:
            yield each


def unnamed(function):
    """The parameters of a function of several that the Args of its docstring do not name."""
    parameters = list(inspect.signature(function).parameters)
    if len(parameters) < 2:
        return []
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", f"{inspect.getdoc(function)}\n", re.MULTILINE)
    entries = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[1] if section else "", re.MULTILINE)
    named = {name.lstrip("*") for entry in entries for name in entry.split(", ")}
    return [name for name in parameters if name not in named]


@pytest.mark.parametrize("name", NAMESPACES)
def test_dir_shows_the_public_names_and_nothing_else(name):
    module = namespace(name)
    assert len(set(module.__all__)) == len(module.__all__)
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, each) and not each.startswith("_") for each in module.__all__)


def test_dir_shows_the_namespaces():
    assert dir(fm) == sorted([*fm.__all__, "__version__"])


@pytest.mark.parametrize("name", NAMESPACES)
def test_all_that_is_public_is_described_where_it_is_defined(name):
    assert list(undescribed(name)) == []


@pytest.mark.parametrize("name", NAMESPACES)
def test_the_args_of_a_function_of_several_parameters_name_them_all(name):
    assert {each: unnamed(function) for each, function in functions(name).items() if unnamed(function)} == {}


@pytest.mark.parametrize("name", fm.__all__)
def test_help_lists_the_functions_of_a_namespace(name):
    text = pydoc.plain(pydoc.render_doc(namespace(name)))
    missing = [each for each in functions(name) if not re.search(rf"^    {each}\(", text, re.MULTILINE)]
    assert missing == []


def test_help_of_the_package_says_what_each_namespace_is_for():
    assert sorted(re.findall(r"^\| `(\w+)` \| .{10,} \|$", fm.__doc__, re.MULTILINE)) == sorted(fm.__all__)


def test_pdoc_writes_the_public_names_and_nothing_else_without_a_warning(tmp_path):
    pdoc = pytest.importorskip("pdoc")
    pdoc.render.configure(show_source=False, search=False)  # most of its time
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pdoc.pdoc("functorch_mnist", output_directory=tmp_path)
    pages = {path.relative_to(tmp_path).with_suffix("").as_posix(): path for path in tmp_path.rglob("*.html")}
    assert pages.keys() == {
        "index",
        "functorch_mnist",
        *(f"functorch_mnist/{name.replace('.', '/')}" for name in NAMESPACES),
    }
    for name in NAMESPACES:
        sections = re.findall(r'<section id="(\w+)">', pages[f"functorch_mnist/{name.replace('.', '/')}"].read_text())
        assert set(sections) == set(values(name)), name
