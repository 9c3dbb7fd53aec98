"""Digests by which processes detect, before a number is wrong, that they do not compute the same."""

import hashlib
from functools import cache
from pathlib import Path

import torch

from .. import tree
from ..tree import Tree
from .sums import all_gather
from .world import World


class DisagreementError(ValueError):
    """Processes differ in data, state or code that must be the same."""


def check_agreed(world: World, where: str, remedy: str, **digests: str) -> None:
    """Checks that something is the same on all processes.

    Args:
        world: the processes.
        where: the beginning of the error.
        remedy: the end of the error.
        digests: SHA-256 in hex, by the name of what it is of; the same names on all processes.

    Raises:
        DisagreementError: on all processes, where one differs from process 0; it names what differs, and where.

    Cost: one message of 32 bytes per name.

    Example:
        >>> check_agreed(World(), "fit", "Give all the same data.", examples=digest(torch.ones(2)))
    """
    if world.size == 1:
        return
    mine = [torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=torch.uint8) for text in digests.values()]
    every = all_gather(world, torch.stack(mine)[None].to(world.device)).cpu()  # (P, names, 32)
    same = (every == every[:1]).all(-1)
    if bool(same.all()):
        return
    differing = [name.replace("_", " ") for name, good in zip(digests, same.all(0).tolist(), strict=True) if not good]
    ranks = [rank for rank, good in enumerate(same.all(1).tolist()) if not good]
    raise DisagreementError(
        f"{where}: all processes must have the same {', '.join(differing)}. Found others than those of process 0 on "
        f"{'process' if len(ranks) == 1 else 'processes'} {', '.join(map(str, ranks))}. {remedy}"
    )


def digest(values: Tree) -> str:
    """SHA-256 of the numbers, types and shapes of a tree: equal trees have equal digests.

    Args:
        values: a pytree of tensors.

    Returns:
        64 hexadecimal digits.
    """
    seen = hashlib.sha256()
    for leaf in tree.leaves(values):
        if leaf is None:
            seen.update(b"none")
            continue
        seen.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        if leaf.numel():
            seen.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()


def digest_of(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def code() -> str:
    """SHA-256 of the sources of this package and the version of torch."""
    seen = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        seen.update(str(path.relative_to(root)).encode())
        seen.update(path.read_bytes())
    return seen.hexdigest()
