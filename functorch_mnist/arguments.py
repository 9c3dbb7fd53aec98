"""What a call is refused for before any number: a wrong kind of argument, seen from its type or its signature.

Nothing here reads a tensor, and what a compiler traces has no such check in it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import tree


def check_params(where: str, params: object) -> None:
    """Refuses what is no pytree of float tensors: a module, an iterator over one, a training state, integers.

    Raises:
        TypeError: it is none.
    """
    rule = f"{where}: params must be a pytree of float tensors."
    if inspect.isgenerator(params):
        raise TypeError(f"{rule} Found a generator. Pass dict(module.named_parameters())?")
    if hasattr(params, "params") and hasattr(params, "optimizer"):
        raise TypeError(f"{rule} Found {shown(params)}. Pass its params?")
    for i, leaf in enumerate(tree.leaves(params)):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            continue
        path = tree.paths(params)[i]
        place = f" at {path!r}" if path else ""
        if isinstance(leaf, nn.Module):
            raise TypeError(
                f"{rule} Found the module {type(leaf).__name__}{place}. "
                "Use params, model = models.from_module(module), and model.apply as the function of them."
            )
        if isinstance(leaf, Tensor):
            raise TypeError(
                f"{rule} Found {leaf.dtype} {tuple(leaf.shape)}{place}. Convert it to float, or let the loss "
                "close over it."
            )
        raise TypeError(
            f"{rule} Found {type(leaf).__name__}{place}. Is it what model.init(key) or from_module returns?"
        )


def independent(where: str, loss: str = "the loss") -> ValueError:
    """The error for a loss that does not depend on its parameters: all its gradients would be zero, in silence."""
    return ValueError(
        f"{where}: {loss} must depend on its params. Found that it uses none of them. Does it call a module, such as "
        "module(x)? Use model.apply(params, x), of params, model = models.from_module(module)."
    )


def check_key(where: str, key: object) -> None:
    """Refuses what is no single key, such as a seed.

    Raises:
        TypeError, ValueError: it is none; its shape is not (2,).
    """
    if not isinstance(key, Tensor) or key.dtype != torch.int32:
        raise TypeError(
            f"{where}: key must be an int32 tensor (2,). Found {shown(key)}. Make one with random.key(seed)."
        )
    if key.shape != (2,):
        raise ValueError(f"{where}: key must be (2,). Found {tuple(key.shape)}. Is it a batch of keys?")


def check_tensors(where: str, name: str, tensors: object) -> None:
    """Refuses one bare tensor where a tuple of tensors belongs: its rows would be taken for the tuple's members.

    Raises:
        TypeError: it is a tensor, or no sequence of them.
    """
    if isinstance(tensors, Tensor):
        raise TypeError(f"{where}: {name} must be a tuple of tensors. Found one tensor. Pass (x,)?")
    if not isinstance(tensors, Sequence) or not all(isinstance(x, Tensor) for x in tensors) or not len(tensors):
        kinds = [type(x).__name__ for x in tensors] if isinstance(tensors, Sequence) else type(tensors).__name__
        raise TypeError(f"{where}: {name} must be a tuple of tensors, at least one. Found {kinds}. Pass (x, y)?")


def check_fn(where: str, name: str, fn: object, remedy: str = "") -> None:
    """Refuses what cannot be called.

    Raises:
        TypeError: it cannot.
    """
    if not callable(fn):
        raise TypeError(f"{where}: {name} must be a function. Found {shown(fn)}. {remedy}".rstrip())


def check_outputs_fn(where: str, fn: object) -> None:
    """Refuses a module or a model where its function of parameters and one input belongs.

    Raises:
        TypeError: it is one, or cannot be called.
    """
    rule = f"{where}: outputs_fn must be a function of params and the inputs of one example."
    if isinstance(fn, nn.Module):
        raise TypeError(
            f"{rule} Found the module {type(fn).__name__}. "
            "Take params, model = models.from_module(module) and pass model.apply."
        )
    if hasattr(fn, "apply") and not callable(fn):
        raise TypeError(f"{rule} Found {shown(fn)}. Pass model.apply.")
    check_fn(where, "outputs_fn", fn)


def check_takes(
    where: str,
    name: str,
    fn: Callable[..., Any],
    arguments: Sequence[str],
    remedy: str,
    *,
    keywords: Sequence[str] = (),
) -> None:
    """Refuses a function whose signature does not take some arguments.

    Args:
        where: the function that the error names.
        name: what it calls the function that is checked.
        fn: the function; one without a signature is let through.
        arguments: what it shall take by position, in words.
        remedy: what the error ends with.
        keywords: what it shall take by name.

    Raises:
        TypeError: it does not take them.
    """
    if torch.compiler.is_compiling():
        return
    check_fn(where, name, fn)
    try:
        signature = inspect.signature(fn, follow_wrapped=False)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError:
        own = getattr(fn, "__name__", type(fn).__name__)
        called = ", ".join([*arguments, *[f"{keyword}=…" for keyword in keywords]])
        raise TypeError(f"{where}: {name} is called with ({called}). Found {own}{signature}. {remedy}") from None


def shown(value: object) -> str:
    """A value for a message: a number or a text itself, of others the type."""
    if isinstance(value, (str, int, float)) or value is None:
        return f"{value!r:.60}"
    return type(value).__name__
