"""What a loss that torch or Python refuses is likely to have wrong, found by running it once more on one example."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import native, tree
from ..models.draws import draws_numbers
from ..tree import Tree


def explained(error: Exception, loss_fn: Callable[..., Any], params: Tree, batch: Sequence[Tensor]) -> Exception:
    """The error in the words of this package where its cause is known, else itself.

    Args:
        error: what the loss raised.
        loss_fn: `loss_fn(params, *example)`.
        params: its parameters.
        batch: (B, …) each.
    """
    if isinstance(error, TypeError):
        return _of_arguments(loss_fn, batch) or error
    return _of_functions(loss_fn, params, batch) or error


def _of_arguments(loss_fn: Callable[..., Any], batch: Sequence[Tensor]) -> TypeError | None:
    """Where the loss takes another number of arguments."""
    if isinstance(loss_fn, torch.nn.Module):
        return TypeError(
            f"per_sample: the loss must be a function loss_fn(params, *example) -> (). Found the module "
            f"{type(loss_fn).__name__}. Call model.apply in it, of params, model = models.from_module(module)."
        )
    with suppress(ValueError, TypeError):  # a signature that cannot be told
        signature = inspect.signature(loss_fn)
        try:
            signature.bind(None, *batch)
        except TypeError:
            names = list(signature.parameters)
            has_key = len(names) == len(batch) + 2 and names[-1] in ("key", "keys")
            remedy = (
                "Pass one key per example as the last: random.split(key, B)."
                if has_key
                else "Pass one tensor (B, …) for each argument after the parameters."
            )
            return TypeError(
                f"per_sample: the loss takes ({', '.join(names)}). Found params and a batch of {len(batch)} "
                f"{'tensor' if len(batch) == 1 else 'tensors'}. {remedy}"
            )
    return None


def _of_functions(loss_fn: Callable[..., Any], params: Tree, batch: Sequence[Tensor]) -> ValueError | None:
    """Where the loss draws random numbers without a key, or calls an autograd function of the old style."""
    seen = _Draws()
    with suppress(Exception), native.outside(), torch.random.fork_rng(devices=[]):
        leaves = [native.beneath(leaf).detach().requires_grad_() for leaf in tree.leaves(params)]
        rows = [native.beneath(x) for x in batch]
        example = [x[0].detach().requires_grad_(x.is_floating_point()) for x in rows]
        with seen:
            out = loss_fn(tree.unflatten(params, leaves), *example)
        function = native.old_function_behind([x for x in tree.leaves(out) if isinstance(x, Tensor)])
        if function is not None:
            return ValueError(f"per_sample: {native.refusal(function)}")
    if seen.names:
        return ValueError(
            f"per_sample: random numbers in a loss must come from a key. The loss calls {seen.names[0]}, which draws "
            "from the global generator. Take a key per example: layers.dropout(x, key, rate=…), random.normal(key, …)."
        )
    return None


class _Draws(TorchFunctionMode):
    """Notes the functions that draw from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if draws_numbers(func, args, kwargs or {}):
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
