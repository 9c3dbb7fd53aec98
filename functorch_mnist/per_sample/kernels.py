"""Ops that `vmap` takes one example at a time, run on the whole batch instead."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native, products
from ..decompositions import DECOMPOSITIONS, fastest
from ..ops import tensors
from .recurrence import OPS, read


class Kernels(native.PerExample):
    """Runs such ops of a loss on the whole batch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_the_batch(func, args, kwargs or {})


def on_the_batch(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs an op; inside `vmap`, one without a batching rule on the whole batch, or as plain ops.

    The batch has to be what the innermost `vmap` maps over.
    """
    run, simpler = _OPS.get(func), DECOMPOSITIONS.get(func)
    if run is None and simpler is None:
        return fastest(func)(*args, **kwargs)
    at = native.mapped()
    if at[0] == 0 or not _any_of_an_example(args, kwargs):
        return func(*args, **kwargs)
    if simpler is None or run is not None:
        return run(func, at, *args, **kwargs)  # type: ignore[misc]
    with Kernels():
        return simpler(*args, **kwargs)


def _any_of_an_example(args: Any, kwargs: Any) -> bool:
    return any([native.is_of_an_example(x) for x in tensors(args, kwargs)])


def _recurrent(func: Any, at: tuple[int, int], *args: Any, **named: Any) -> Any:
    """A recurrent layer: the batch of each example, of one, is merged with that of all."""
    call = read(func, args)
    weights = () if call is None else [weight for layer in call.layers for weight in layer.weights]
    if call is None or any([native.is_of_an_example(weight) for weight in weights]):
        with Kernels():
            return DECOMPOSITIONS[func](*args, **named)
    axis = 0 if call.batch_first else 1

    def merged(x: Tensor, axis: int) -> Tensor:
        return native.taken_out(x, at).movedim(0, axis).flatten(axis, axis + 1)

    states = tuple([merged(state, 1) for state in call.states])
    out, *ended = func(merged(call.input, axis), states if isinstance(args[1], (list, tuple)) else states[0], *args[2:])

    def back(x: Tensor, axis: int) -> Tensor:
        return native.handed_back(x.unflatten(axis, (at[1], -1)).movedim(axis, 0), at)

    return (back(out, axis), *[back(state, 1) for state in ended])


def tapped(func: Any, args: Any, kwargs: Any, tap: Tensor, at: tuple[int, int]) -> Tensor | None:
    """A linear map of an example, on the whole batch, plus a tap (B, *positions, H); none where it cannot be.

    The bias is then added by the product itself, and the tap where the product stands.
    """
    run = _MAPS.get(func)
    out = None if run is None else run(at, *args, **kwargs)
    if out is None:
        return None
    return native.handed_back(out.add_(tap.flatten(0, -2)).view(tap.shape), at)


def _linear(at: tuple[int, int], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """(B positions, H)."""
    if not native.is_of_an_example(input) or _any_of_an_example((weight, bias), {}) or weight.dim() != 2:
        return None
    return products.linear(native.taken_out(input, at).flatten(0, -2), weight, bias)


def _addmm(
    at: tuple[int, int], input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    if not native.is_of_an_example(mat1) or _any_of_an_example((input, mat2), {}) or input.dim() != 1:
        return None
    return torch.addmm(input, native.taken_out(mat1, at).flatten(0, 1), mat2, beta=beta, alpha=alpha)


_MAPS: dict[Any, Any] = {F.linear: _linear, torch.addmm: _addmm}


def _embedding(
    func: Any,
    at: tuple[int, int],  # noqa: ARG001
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """A lookup: with a table for each example torch would forget that the padding's row gets no gradient."""
    if max_norm is not None:
        raise ValueError(
            f"embedding: parameters must not be written to. Found max_norm = {max_norm}, which scales rows of the "
            "table where they lie. Leave it out and clip the rows between steps."
        )
    if padding_idx is None or not native.is_of_an_example(weight):
        found: Tensor = func(input, weight, padding_idx, None, *rest, **named)
        return found
    rows: Tensor = func(input, weight, None, None, *rest, **named)
    return torch.where((input == padding_idx % weight.shape[0])[..., None], rows.detach(), rows)


def _attention(
    func: Any,
    at: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *rest: Any,
    **named: Any,
) -> Tensor:
    """Attention over (…, heads, T, d): all leading axes are one batch axis to the kernels."""
    q, k, v = (native.taken_out(x, at) for x in (query, key, value))
    lead = torch.broadcast_shapes(*[x.shape[:-3] for x in (q, k, v)]) if query.dim() > 2 else q.shape[:1]
    heads = 1 if query.dim() > 2 else 0

    def flat(x: Tensor) -> Tensor:
        return x.expand(*lead, *x.shape[len(x.shape) - 2 - heads :]).reshape(math.prod(lead), *x.shape[-2 - heads :])

    if attn_mask is not None:
        mask = native.taken_out(attn_mask, at)  # (B, *any, T, S), whose axes may be 1 or missing
        missing = len(lead) + heads + 2 - mask.dim()
        mask = mask.view(mask.shape[0], *[1] * missing, *mask.shape[1:])
        full = (*lead, *mask.shape[len(lead) :])
        attn_mask = mask.expand(full).reshape(math.prod(lead), *full[len(lead) :])
    out: Tensor = func(flat(q), flat(k), flat(v), attn_mask, *rest, **named)
    return native.handed_back(out.view(*lead, *out.shape[1:]), at)


def _pooling(func: Any, at: tuple[int, int], input: Tensor, *rest: Any, **named: Any) -> Tensor:
    """Adaptive pooling over the last axes: leading ones are flattened."""
    space = _SPACES[func]
    images = native.taken_out(input, at)
    lead = images.shape[: images.dim() - space]
    out: Tensor = func(images.reshape(math.prod(lead[:-1]), *images.shape[-space - 1 :]), *rest, **named)
    return native.handed_back(out.view(*lead, *out.shape[-space:]), at)


def _bilinear(
    func: Any, at: tuple[int, int], input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """A product of two inputs and a weight: by products of their pairs where there is a weight for each example."""
    if any([p is not None and native.is_of_an_example(p) for p in (weight, bias)]):
        out = torch.einsum("...i,hij,...j->...h", input1, weight, input2)
        return out if bias is None else out + bias
    return native.handed_back(func(native.taken_out(input1, at), native.taken_out(input2, at), weight, bias), at)


_SPACES = {
    F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3,
    torch.adaptive_avg_pool1d: 1,
}  # fmt: skip
_OPS: dict[Any, Any] = {
    F.embedding: _embedding,
    F.scaled_dot_product_attention: _attention,
    F.bilinear: _bilinear,
    **dict.fromkeys(OPS, _recurrent),
    **dict.fromkeys(_SPACES, _pooling),
}
