"""The layers: each file imports only from the rows above its own.

    python tests/test_architecture.py

writes the map of files in the package's README from the rows below.
"""

import ast
import re
from pathlib import Path

import pytest

import functorch_mnist

ROOT = Path(functorch_mnist.__file__).parent
ROWS = [
    {
        "compiler": "hints to the compiler: what to run while tracing, where to stop fusing, loops",
        "files": "files written whole or not at all",
        "machine": "the CPU at hand: what measured times depend on",
    },
    {"native": "out of `vmap` and back; all private functions of torch.func"},
    {"tree": "pytrees"},
    {
        "allocator": "glibc's handling of freed memory",
        "arguments": "what a call is refused for before any number",
        "batch": "a batch and its mask",
        "ops": "kinds of ops: which write to a tensor, draw random numbers or branch on data",
        "hyperparameters": "numbers that may be 0-d tensors",
        "options": "the command line's options, read before torch is imported",
    },
    {
        "random": "stateless keys and draws, JAX's bit for bit",
        "products": "matrix products by the faster of torch's two CPU libraries",
    },
    {"decompositions": "ops in terms of others: for per-sample rules, and for the compiler"},
    {
        "layers": "pure layers",
        "losses": "losses, class weights, accuracy, cross-entropy in blocks of a large vocabulary",
        "optim": "SGD with momentum, Adam and AdamW, schedules, clipping, averages of parameters",
        "data": "data sets as tensors, their files, batches; augmentation, mixup, deskewing, random glyphs, imbalance",
    },
    {
        "models": "ready-made models; scattering features and discriminants; `from_module` for any `nn.Module`",
        "distributed": "many processes: sums and rows over a world, sharded optimizers, lost processes",
    },
    {"per_sample": "factored per-sample gradients: capture, rules, algebra, the plan; `norms`, `clipped_sum`, …"},
    {
        "statistics": "folds over per-sample gradients: norms, moments, noise scale, Fisher information",
        "privacy": "clipping rules, mechanisms, sampling, noise, accountants, audits",
        "calibration": "accuracy against confidence, temperature scaling",
        "ensemble": "means, votes and disagreement of several models",
    },
    {"attribution": "scores and influence of training examples, gradients on disk, ground truth to grade them"},
    {
        "train": "state, steps, the loop, private training, canaries, evaluation, precision and compiling",
        "checkpoint": "files of a state, loaded whole or refused",
    },
    {"sweep": "many runs as one, hypergradients, descent on hyperparameters"},
    {"run_folder": "the files of a run", "plots": "pictures of results"},
    {"commands": "one file for each command, and what several share"},
    {"cli": "parses the options and runs a command"},
    {"__main__": "`python -m functorch_mnist`"},
]
"""What each unit is about, in the order of layers."""
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
PAGE = ROOT / "README.md"
MAP = re.compile(r"(?<=<!-- map -->\n).*?(?=<!-- end -->)", re.DOTALL)
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def table_of_rows():
    lines = ["| layer | file or folder | concern |", "|---:|---|---|"]
    for rank, row in enumerate(ROWS):
        for name, concern in row.items():
            shown = f"{name}/" if (ROOT / name).is_dir() else f"{name}.py"
            lines.append(f"| {rank} | [`{shown}`]({shown}) | {concern} |")
    return "\n".join(lines) + "\n"


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


def test_the_map_of_the_package_is_that_of_the_layers():
    assert MAP.findall(PAGE.read_text(encoding="utf-8")) == [table_of_rows()]


def test_the_public_namespaces_are_there_and_no_other():
    for name in dir(functorch_mnist):
        assert getattr(functorch_mnist, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        functorch_mnist.nothing  # noqa: B018


if __name__ == "__main__":
    PAGE.write_text(MAP.sub(table_of_rows(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
