"""Digests by which processes find out, before a number is wrong, that they do not compute the same."""

import hashlib
from functools import cache
from pathlib import Path

import torch

from .. import tree
from ..tree import Tree
from .sums import all_gather
from .world import World


class DisagreementError(ValueError):
    """Processes that should have the same have not."""


def check_agreed(world: World, where: str, remedy: str, **digests: str) -> None:
    """Compares what all processes must have in common.

    Args:
        world: the processes.
        where: what the error begins with.
        remedy: what it ends with.
        digests: SHA-256 in hex, by the name of what it is of; the same names on all.

    Raises:
        DisagreementError: on all processes, where one differs from process 0; it names what, and which processes.

    Cost: one message of 32 bytes for each name.
    """
    if world.size == 1:
        return
    mine = [torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=torch.uint8) for text in digests.values()]
    found = all_gather(world, torch.stack(mine)[None].to(world.device)).cpu()  # (P, names, 32)
    same = (found == found[:1]).all(-1)
    if bool(same.all()):
        return
    differing = [name.replace("_", " ") for name, good in zip(digests, same.all(0).tolist(), strict=True) if not good]
    ranks = [rank for rank, good in enumerate(same.all(1).tolist()) if not good]
    raise DisagreementError(
        f"{where}: all processes must have the same {', '.join(differing)}. Found others than those of process 0 on "
        f"{'process' if len(ranks) == 1 else 'processes'} {', '.join(map(str, ranks))}. {remedy}"
    )


def digest(values: Tree) -> str:
    """SHA-256 of tensors' numbers, types and shapes: equal trees have equal digests."""
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
