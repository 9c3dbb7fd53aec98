"""Pytrees: nested dicts, lists, tuples and named tuples whose leaves are tensors.

The one file that touches torch's private `torch.utils._pytree`, which is what `torch.func` itself uses. Dictionaries
keep their insertion order, as torch does (JAX sorts the keys).
"""

from builtins import map as builtin_map
from collections.abc import Callable, Iterable
from dataclasses import field, fields
from functools import reduce
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import native

__all__ = ["Tree", "dot", "leaves", "map", "norm", "paths", "ravel", "unflatten", "unravel", "zeros_like"]


def __dir__() -> list[str]:
    return __all__


Tree: TypeAlias = Any
"""A pytree of tensors. Python's types cannot say "nested to any depth, structure kept", hence `Any`."""

Structure: TypeAlias = pytree.TreeSpec
"""A pytree without its leaves. It can be compared and is hashable where its keys are."""

T = TypeVar("T")
C = TypeVar("C")


def map(fn: Callable[..., object], tree: T, *rest: T) -> T:
    """The tree of `fn(leaf, *leaves of rest)`.

    Args:
        fn: takes one leaf of each tree.
        tree: gives the structure of the result.
        rest: trees of the same structure.

    Raises:
        ValueError: a tree of `rest` has another structure.

    Example:
        >>> map(lambda a, b: a + b, {"w": torch.ones(2)}, {"w": torch.ones(2)})
        {'w': tensor([2., 2.])}
    """
    values, structure = pytree.tree_flatten(tree)
    columns = [values]
    for other in rest:
        leaves_of_other, other_structure = pytree.tree_flatten(other)
        if other_structure != structure:
            raise ValueError(
                f"tree.map: the trees must have one structure. Found {_outline(tree)} and {_outline(other)}."
            )
        columns.append(leaves_of_other)
    return cast(T, pytree.tree_unflatten([fn(*row) for row in zip(*columns, strict=True)], structure))


def _outline(tree: Tree) -> str:
    """A tree in one line: its type and the paths of its leaves."""
    names = paths(tree)
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"{type(tree).__name__} with {len(names)} leaves ({shown})" if names != [""] else type(tree).__name__


def leaves(tree: Tree) -> list[Tensor]:
    """The leaves, in the order of `paths`.

    Example:
        >>> leaves({"a": torch.tensor(1), "b": [torch.tensor(2)]})
        [tensor(1), tensor(2)]
    """
    return pytree.tree_leaves(tree)


def paths(tree: Tree) -> list[str]:
    """The name of each leaf, its keys, field names and positions joined by `/`.

    Example:
        >>> paths({"a": torch.tensor(1), "b": [torch.tensor(2)]})
        ['a', 'b/0']
    """
    return ["/".join(_part(entry) for entry in path) for path, _ in pytree.tree_flatten_with_path(tree)[0]]


def _part(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    raise TypeError(f"tree.paths: cannot name the path entry {entry!r}.")


def unflatten(like: T, values: list[Tensor]) -> T:
    """The tree with the structure of `like` and the leaves `values`: `unflatten(t, leaves(t))` equals `t`.

    Args:
        like: gives the structure.
        values: one for each leaf, in the order of `leaves`.

    Raises:
        ValueError: the number of values is not the number of leaves.
    """
    structure = pytree.tree_structure(like)
    if structure.num_leaves != len(values):
        raise ValueError(f"tree.unflatten: the tree has {structure.num_leaves} leaves. Found {len(values)} values.")
    return cast(T, pytree.tree_unflatten(values, structure))


def flatten(tree: Tree) -> tuple[list[Tensor], Structure]:
    """The leaves and the structure, which `restore` makes into the tree again.

    Example:
        >>> values, structure = flatten({"a": torch.tensor(1)})
        >>> restore(structure, values)
        {'a': tensor(1)}
    """
    values, structure = pytree.tree_flatten(tree)
    return values, structure


def restore(structure: Structure, values: list[Tensor]) -> Tree:
    """The tree with this structure and these leaves."""
    return pytree.tree_unflatten(values, structure)


def replaced(tree: Tree, which: Callable[[Tree], bool], by: Callable[[Any], Tree]) -> Tree:
    """The tree with `by(node)` in place of each node, the outermost first, that `which` says.

    Example:
        >>> replaced({"a": (1, 2), "b": 3}, lambda node: isinstance(node, tuple), sum)
        {'a': 3, 'b': 3}
    """
    return pytree.tree_map(lambda node: by(node) if which(node) else node, tree, is_leaf=which)


def zeros_like(tree: T) -> T:
    """Zeros of the same shapes, dtypes, devices and memory formats."""
    return map(torch.zeros_like, tree)


def wide(leaf: Tensor) -> Tensor:
    """The same numbers in float32 or wider.

    Example:
        >>> wide(torch.ones(2, dtype=torch.bfloat16)).dtype, wide(torch.ones(2, dtype=torch.float64)).dtype
        (torch.float32, torch.float64)
    """
    return leaf.to(torch.promote_types(leaf.dtype, torch.float32))


def dot(a: T, b: T) -> Tensor:
    """The inner product `Σ a_i b_i` over all leaves, a 0-d tensor in float32 or wider; 0 for an empty tree.

    Args:
        a, b: trees of one structure, with leaves of the same shapes.

    Raises:
        ValueError: the trees have different structures.

    Example:
        >>> dot({"w": torch.ones(3)}, {"w": torch.full((3,), 2.0)})
        tensor(6.)
    """
    products = leaves(map(lambda x, y: (wide(x) * wide(y)).sum(), a, b))
    return torch.stack(products).sum() if products else torch.zeros(())


def norm(tree: Tree) -> Tensor:
    """The Euclidean norm over all leaves, a 0-d tensor in float32 or wider; 0 for an empty tree.

    Guarantees: its gradient at zero is zero. It is right for all numbers that float32 holds, though it may not hold
    their squares.

    Example:
        >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    for leaf in leaves(tree):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"tree.norm: the leaves must be tensors. Found {type(leaf).__name__}.")
    values = [wide(leaf) for leaf in leaves(tree)]
    if not values:
        return torch.zeros(())
    if torch.compiler.is_compiling():  # one pass over the numbers: the compiler fuses it
        total = torch.stack([leaf.double().square().sum() for leaf in values]).sum()
        positive = total > 0
        return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), total).to(_promoted(values))
    found = _norm(values)
    known = None if torch._C._len_torch_dispatch_stack() or found.device.type != "cpu" else native.numbers(found)
    if found.dtype == torch.float64 or (known is not None and bool(((known > 2.0**-40) & (known < 2.0**60)).all())):
        return found
    largest = torch.stack([leaf.detach().abs().amax().to(found.dtype) for leaf in values if leaf.numel()] or [found])
    scale = torch.ones_like(found)
    for _ in range(3):
        most = largest.amax() * scale
        up = torch.where(most < 2.0**-20, 2.0**40, torch.where(most > 2.0**20, 2.0**-40, 1.0))
        scale = torch.where(most > 0, scale * up, scale)
    return _norm([leaf * scale.to(leaf.dtype) for leaf in values]) / scale


def _promoted(values: list[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, [leaf.dtype for leaf in values])


def _norm(values: list[Tensor]) -> Tensor:
    found: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf) for leaf in values]))
    return found


def register(cls: type[C]) -> type[C]:
    """The dataclass, made a node of pytrees: fields that hold tensors are its children, the others are its structure.

    A field belongs to the structure if it was declared with `static()`.
    """
    children = [field.name for field in fields(cast(Any, cls)) if not field.metadata.get("static")]
    rest = [field.name for field in fields(cast(Any, cls)) if field.metadata.get("static")]

    def flatten(node: C) -> tuple[list[Tree], tuple[object, ...]]:
        return [getattr(node, name) for name in children], tuple(getattr(node, name) for name in rest)

    def flatten_with_keys(node: C) -> tuple[list[tuple[Any, Tree]], tuple[object, ...]]:
        keyed = [(pytree.GetAttrKey(name), getattr(node, name)) for name in children]
        return keyed, tuple(getattr(node, name) for name in rest)

    def restore(values: Iterable[Tree], context: tuple[object, ...]) -> C:
        return cls(**dict(zip(children, values, strict=True)), **dict(zip(rest, context, strict=True)))

    pytree.register_pytree_node(cls, flatten, restore, flatten_with_keys_fn=flatten_with_keys)
    return cls


def static() -> Any:
    """A field of a registered dataclass that is structure: hashable, without tensors."""
    return field(metadata={"static": True})


def ravel(tree: Tree) -> Tensor:
    """All leaves as one vector, in the order of `leaves`.

    Example:
        >>> ravel({"w": torch.ones(1, 2), "b": torch.zeros(1)})
        tensor([1., 1., 0.])
    """
    values = leaves(tree)
    return torch.cat([leaf.reshape(-1) for leaf in values]) if values else torch.zeros(0)


def unravel(like: T, vector: Tensor) -> T:
    """The tree with the structure, shapes and dtypes of `like` and the numbers of `vector`: the inverse of `ravel`.

    Args:
        like: gives structure, shapes and dtypes.
        vector: (P,), the numbers of all leaves, in the order of `leaves`.

    Raises:
        ValueError: `vector` is not one-dimensional with as many numbers as `like` has.
    """
    values = leaves(like)
    sizes = [leaf.numel() for leaf in values]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"tree.unravel: the tree holds {sum(sizes)} numbers. Found a vector of {tuple(vector.shape)}.")
    parts = builtin_map(lambda part, leaf: part.view(leaf.shape).to(leaf.dtype), torch.split(vector, sizes), values)
    return unflatten(like, list(parts))
