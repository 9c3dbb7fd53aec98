"""The cross-entropy of a large vocabulary: its output layer and its softmax in blocks of words.

With a hidden state h_n at each position n, a row w_v of the output layer for each word v, and y_n the label,

    x_nv    = h_n · w_v + b_v
    z_n     = log Σ_v exp x_nv
    loss_n  = z_n - x_n y_n
    e_nv    = exp(x_nv - z_n) - [v = y_n]                             a block of words at a time
    d/dh_n  = c_n Σ_v e_nv w_v,  d/dw_v = Σ_n c_n e_nv h_n,  d/db_v = Σ_n c_n e_nv    where c_n comes from above

so that x and e exist for all positions and one block only, recomputed wherever they are needed.

Three layers, from without:

    operators   what modes, the compiler and `per_sample` see: `vocabulary_loss` is one op of its arguments. They have a
                kernel at the key at which `torch.func` takes ops over: a composite op is else taken apart beneath a
                transform, where an autograd function cannot be called. Called without an operator around it, one is
                traced by the compiler under `vmap(grad)` with some versions of torch only.
    functions   autograd functions: derivatives, and what `vmap` does, which lays all examples' positions together.
    kernels     loops over blocks on plain tensors, operators too: the compiler orders the blocks of a loop that it sees
                as it likes, and has held the logits of all blocks at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import tree
from .labels import in_range

_NAME = "chunked_cross_entropy"


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, block_size: int | None = None
) -> Tensor:
    """The cross-entropy of an output layer's softmax, per position, without the logits of all positions and words.

    Args:
        hidden: (..., H) float, what the output layer gets.
        weight: (V, H), of the same type: a row for each word. It may be tied to an embedding.
        labels: (...) integers in [0, V).
        bias: (V,), or none.
        block_size: words in a block, at least 1; by default as many as make 2 million logits on a CPU and 16 million
            elsewhere, but no fewer than 256.

    Returns:
        (...) losses in nats, float32 or wider.

    Raises:
        ValueError: shapes or types do not agree, a label is out of range, or `block_size` is not a whole number, at
            least 1.
        TypeError: an argument is no float tensor, or the labels are not integers.
        RuntimeError: compiled or on a GPU, a label is out of range.

    Guarantees: equals `cross_entropy(torch.nn.functional.linear(hidden, weight, bias), labels)` to rounding, and so do
        its derivatives of every order in reverse mode, by `backward`, under `torch.func.grad` and `vmap` in any order,
        and compiled; forward mode is refused. In bfloat16 and float16 the product is rounded as `linear` rounds it, and
        all that follows is float32. The block size changes nothing but rounding. In `per_sample` it is an op with a
        factored form of its own.

    Cost: N · block_size numbers at N positions, in the forward pass and in the backward pass, and (V, H) for the
        weight's gradient; the plain loss keeps N · V. One more product N · V · H, for the backward pass recomputes the
        logits; so does the derivative of a gradient, which keeps its blocks where it is differentiated in turn.
        Under `vmap` N counts the positions of all examples. A position that does not count costs what others do: give
        it any label in range, and its loss the factor 0.

    Example:
        >>> chunked_cross_entropy(torch.zeros(3, 4), torch.ones(10, 4), torch.tensor([1, 2, 3]), block_size=3)
        tensor([2.3026, 2.3026, 2.3026])

    Reference: Wijmans, Huval, Hertzberg, Koltun, Krähenbühl, "Cut your losses in large-vocabulary language models",
        ICLR 2025, section 4, https://arxiv.org/abs/2411.09009; in blocks of positions, Hsu et al., "Liger kernel:
        efficient Triton kernels for LLM training", 2024, https://arxiv.org/abs/2410.10989.
    """
    _check(hidden, weight, labels, bias, block_size)
    hidden, weight, bias = _as_autocast(hidden, weight, bias)
    block = 0 if block_size is None else block_size
    positions = in_range(_NAME, labels, weight.shape[0]).reshape(-1).long()
    rows = hidden.reshape(len(positions), weight.shape[1])
    z, losses = STATISTICS(rows.detach(), weight.detach(), None if bias is None else bias.detach(), positions, block)
    found: Tensor = LOSS(rows, weight, bias, positions, z, losses, block)
    return found.reshape(labels.shape)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, block_size: int | None) -> None:
    """Raises for what does not fit."""
    given = {"hidden": hidden, "weight": weight} if bias is None else {"hidden": hidden, "weight": weight, "bias": bias}
    for name, x in given.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{_NAME}: {name} must be a float tensor. Found {found}.")
    if weight.dim() != 2 or 0 in weight.shape or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{_NAME}: hidden must be (..., H) and weight (V, H). "
            f"Found {tuple(hidden.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{_NAME}: bias must be (V,), {tuple(weight.shape[:1])}. Found {tuple(bias.shape)}.")
    if len({x.dtype for x in given.values()}) > 1 and not torch.is_autocast_enabled(hidden.device.type):
        types = ", ".join([str(x.dtype) for x in given.values()])
        raise ValueError(f"{_NAME}: {' and '.join(given)} must have one float type. Found {types}.")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{_NAME}: hidden (..., H) and labels (...) must share their leading axes. "
            f"Found {tuple(hidden.shape)} and {tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{_NAME}: labels must be integers in [0, V). Found {labels.dtype}.")
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise ValueError(f"{_NAME}: block_size must be a whole number, at least 1. Found {block_size}.")


def _as_autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments as autocast gives them to a linear layer."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def spans(positions: int, words: int, block: int, kind: str) -> list[tuple[int, int]]:
    """The blocks: the first word of each, and that of the next.

    Args:
        positions: of all examples.
        words: V.
        block: words in a block; 0 for as many as are right for the
        kind: of device.
    """
    size = block or max(_LEAST, (2**21 if kind == "cpu" else 2**24) // max(positions, 1))
    return [(start, min(start + size, words)) for start in range(0, words, size)]


_LEAST = 256
"""Fewer words make no faster product."""


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., N, block) in float32 or wider, of hidden (..., N, H), and of weight (..., block, H) and its bias."""
    x = tree.wide(hidden @ weight.mT)
    return x if bias is None else x + bias[..., None, :]


def errors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, labels: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """p = exp(x - z) and e, (..., N, block) in float32 or wider.

    Args:
        hidden: (..., N, H).
        weight: (..., block, H), the rows of a block, and so is
        bias: (..., block), or none.
        first: the block's first word.
        labels: (..., N); -1 is of no block.
        z: (..., N).
    """
    p = torch.exp(logits(hidden, weight, bias) - z[..., None])
    at, there = _at(labels, first, p.shape[-1])
    return p, p.scatter_add(-1, at[..., None], -there[..., None].to(p.dtype))


class Block:
    """The logits of one block after another, where those of the last one were: a fresh page is as dear as an exp."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, block: int, product: torch.dtype) -> None:
        self.hidden, self.weight, self.bias = hidden.to(product), weight, bias
        positions = hidden.shape[:-1].numel()
        self.spans = spans(positions, weight.shape[-2], block, hidden.device.type)
        self.memory = self.hidden.new_empty(positions * max([stop - start for start, stop in self.spans]))

    def logits(self, start: int, stop: int) -> Tensor:
        """x (..., N, block), to be written to."""
        shape = (*self.hidden.shape[:-1], stop - start)
        memory = self.memory[: torch.Size(shape).numel()].view(shape)
        rows = self.weight[..., start:stop, :].to(self.hidden.dtype)
        x = tree.wide(torch.matmul(self.hidden, rows.mT, out=memory))
        return x if self.bias is None else x.add_(self.bias[..., None, start:stop])

    def errors(self, start: int, stop: int, labels: Tensor, z: Tensor) -> Tensor:
        """e (..., N, block), to be written to."""
        e = self.logits(start, stop).sub_(z[..., None]).exp_()
        at, there = _at(labels, start, stop - start)
        return e.scatter_add_(-1, at[..., None], -there[..., None].to(e.dtype))


def _at(labels: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """The labels' places in a block, and whether they have one."""
    at = labels - first
    return at.clamp(0, size - 1), (at >= 0) & (at < size)


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Where products are taken in the types of their factors, whatever autocast says."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _statistics_kernel(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """z and the losses (..., N)."""
    own = tree.wide(hidden.new_zeros(labels.shape))
    with as_given(hidden):
        block_of = Block(hidden, weight, bias, block, hidden.dtype)
        parts = own.new_empty(len(block_of.spans), *labels.shape)
        for (start, stop), part in zip(block_of.spans, parts, strict=True):
            x = block_of.logits(start, stop)
            at, there = _at(labels, start, stop - start)
            own.copy_(torch.where(there, x.gather(-1, at[..., None]).squeeze(-1), own))
            most = x.amax(-1, keepdim=True)
            most.masked_fill_(most.isinf(), 0)
            torch.sum(x.sub_(most).exp_(), -1, out=part).log_().add_(most.squeeze(-1))
        z = torch.logsumexp(parts, 0)
    return z, z - own


def _gradients_kernel(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    z: Tensor,
    cotangents: Tensor,
    block: int,
    product: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Those of d/dh, d/dw, d/db that are asked for, see `_Gradients`."""
    found = _empty_gradients(hidden, weight, bias, labels, z, cotangents, block, product, needs)
    given = iter(found)
    by_hidden, by_weight, by_bias = [next(given) if need else None for need in needs]
    total = None if by_hidden is None else tree.wide(torch.zeros_like(hidden))
    scaled = hidden * cotangents[..., None].to(hidden.dtype)
    with as_given(hidden):
        block_of = Block(hidden, weight, bias, block, product)
        for start, stop in block_of.spans:
            e = block_of.errors(start, stop, labels, z)
            if by_bias is not None:
                by_bias[..., start:stop] = (cotangents[..., None, :].to(e.dtype) @ e).squeeze(-2)
            e = e.to(hidden.dtype)
            if total is not None:
                total += e @ weight[..., start:stop, :].to(hidden.dtype)
            if by_weight is not None:
                _multiply(e.mT, scaled, by_weight[..., start:stop, :])
    if by_hidden is not None and total is not None:
        by_hidden.copy_(total * cotangents[..., None])
    return found


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    if left.dtype == out.dtype:
        torch.matmul(left, right, out=out)
    else:
        out.copy_(left @ right)


def _empty_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # noqa: ARG001
    z: Tensor,  # noqa: ARG001
    cotangents: Tensor,  # noqa: ARG001
    block: int,  # noqa: ARG001
    product: torch.dtype,  # noqa: ARG001
    needs: list[bool],
) -> list[Tensor]:
    groups, kind = hidden.shape[:-2], weight.dtype if bias is None else bias.dtype
    shapes = (
        (hidden.shape, hidden.dtype),
        ((*groups, *weight.shape[-2:]), weight.dtype),
        ((*groups, weight.shape[-2]), kind),
    )
    return [hidden.new_empty(shape, dtype=dtype) for (shape, dtype), need in zip(shapes, needs, strict=True) if need]


class _Statistics(torch.autograd.Function):
    """z and the losses (..., N), of what nobody differentiates."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = torch.ops.functorch_mnist.vocabulary_statistics_kernel.default(*inputs)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        hidden, weight, bias, labels, block = inputs
        (hidden, labels), weight, bias, shape = _together(info, in_dims, (hidden, labels), weight, bias, (0, 3))
        z, losses = _Statistics.apply(hidden, weight, bias, labels, block)
        return (z.view(shape), losses.view(shape)), (0, 0)


class _Loss(torch.autograd.Function):
    """The losses (..., N), which are given: of hidden (N, H), weight (V, H), bias (V,), or each of them with an axis G.

    With labels of -1 and z in the place of the losses it is z, as a function of the others.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        losses: Tensor = inputs[5].clone()
        return losses

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:5])
        ctx.block = inputs[6]

    @staticmethod
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, labels, z = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        z = _Loss.apply(hidden, weight, bias, torch.full_like(labels, -1), z, z, ctx.block)  # to be differentiated too
        found = _Gradients.apply(hidden, weight, bias, labels, z, cotangents, ctx.block, hidden.dtype, *needs)
        grads = iter(found)
        return (*[next(grads) if need else None for need in needs], None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        hidden, weight, bias, labels, z, losses, block = inputs
        rows, weight, bias, shape = _together(info, in_dims, (hidden, labels, z, losses), weight, bias, (0, 3, 4, 5))
        return _Loss.apply(rows[0], weight, bias, *rows[1:], block).view(shape), 0


def _together(
    info: Any,
    in_dims: tuple[Any, ...],
    rows: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    at: tuple[int, ...],
) -> tuple[list[Tensor], Tensor, Tensor | None, torch.Size]:
    """The positions of all examples as those of one, and the shape (B, ...) of what comes of them.

    Args:
        rows: hidden (..., N, H) and labels (..., N), and others like these.
        at: the places of the rows among the inputs.
    """
    found = [_first(x, in_dims[i], info.batch_size) for x, i in zip(rows, at, strict=True)]
    if in_dims[1] is not None or in_dims[2] is not None or weight.dim() == 3:  # a weight of each example
        weight = _first(weight, in_dims[1], info.batch_size)
        bias = None if bias is None else _first(bias, in_dims[2], info.batch_size)
    shape = found[1].shape
    if weight.dim() != 3:
        found = [x.flatten(0, 1) for x in found]
    if weight.dim() == 4:
        weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten(0, 1)
    return found, weight, bias, shape


class _Gradients(torch.autograd.Function):
    """Those of d/dh, d/dw, d/db that are asked for. Of hidden (G, N, H) the latter are of each group."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        kernel = torch.ops.functorch_mnist.vocabulary_gradients_kernel.default
        return tuple(kernel(*inputs[:8], list(inputs[8:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:6])
        ctx.rest = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> tuple[Any, ...]:
        """Of `Σ_n c_n Σ_v e_nv s_nv`, `s_nv = u_n · w_v + h_n · U_v + β_v`, with u, U, β the outputs' cotangents."""
        hidden, weight, bias, labels, z, cotangents = ctx.saved_tensors
        block, product, *needs = ctx.rest
        given = iter(by)
        u, whole, shift = [next(given) if need else None for need in needs]
        h, c = tree.wide(hidden), cotangents
        by_hidden, by_z, by_c = torch.zeros_like(h), torch.zeros_like(z), torch.zeros_like(z)
        by_weight, by_bias = [], []
        for start, stop in spans(labels.numel(), weight.shape[-2], block, hidden.device.type):
            w, b = weight[..., start:stop, :], None if bias is None else bias[..., start:stop]
            p, e = errors(hidden.to(product), w.to(product), b, start, labels, z)
            w = tree.wide(w)
            s, parts = torch.zeros_like(p), []
            if u is not None:
                s = s + tree.wide(u) @ w.mT
                parts.append(_summed(c[..., None] * e, tree.wide(u), weight.dim()))
            if whole is not None:
                rows = tree.wide(whole[..., start:stop, :])
                s, by_hidden = s + h @ rows.mT, by_hidden + (c[..., None] * e) @ rows
            if shift is not None:
                s = s + tree.wide(shift[..., None, start:stop])
            q = c[..., None] * p * s
            by_hidden, by_z, by_c = by_hidden + q @ w, by_z - q.sum(-1), by_c + (e * s).sum(-1)
            by_weight.append(sum(parts, _summed(q, h, weight.dim())))
            if bias is not None:
                by_bias.append(q.sum(-2) if bias.dim() == q.dim() - 1 else q.sum((0, -2)))
        grads = (
            by_hidden.to(hidden.dtype),
            torch.cat(by_weight, -2).to(weight.dtype),
            None if bias is None else torch.cat(by_bias, -1).to(bias.dtype),
        )
        return (*grads, None, by_z, by_c.to(cotangents.dtype), *[None] * (2 + len(needs)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        hidden, weight, bias, labels, z, cotangents, *rest = inputs
        size = info.batch_size
        rows = [
            _first(x, in_dims[i], size) for i, x in ((0, hidden), (3, labels), (4, z), (5, cotangents))
        ]  # (B, N, …), or (B, G, N, …)
        if in_dims[1] is not None or in_dims[2] is not None or weight.dim() == 3:
            weight = _first(weight, in_dims[1], size)
            bias = None if bias is None else _first(bias, in_dims[2], size)
        groups = rows[1].shape[:-1]
        if len(groups) == 2:
            rows = [x.flatten(0, 1) for x in rows]
            if weight.dim() > 2:
                weight, bias = [
                    None if x is None else _of_groups(x, axes, groups) for x, axes in ((weight, 4), (bias, 3))
                ]
        found = _Gradients.apply(rows[0], weight, bias, *rows[1:], *rest)
        return tuple([x.view(*groups, *x.shape[1:]) for x in found]), (0,) * len(found)


def _first(x: Tensor, axis: int | None, size: int) -> Tensor:
    """With the mapped axis first: (B, …)."""
    return x.expand(size, *x.shape) if axis is None else x.movedim(axis, 0)


def _of_groups(x: Tensor, axes: int, groups: tuple[int, ...]) -> Tensor:
    """(B, G, …) or (B, …), common to each group, as (B · G, …)."""
    x = x if x.dim() == axes else x[:, None].expand(*groups, *x.shape[1:])
    return x.flatten(0, 1)


def _summed(left: Tensor, right: Tensor, axes: int) -> Tensor:
    """Σ_n of left (..., N, block) and right (..., N, H): (..., block, H) with that many axes."""
    if axes < left.dim():
        left, right = left.flatten(0, -2), right.flatten(0, -2)
    return left.mT @ right


def _sum(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    z: Tensor,
    cotangents: Tensor,
    block: int,
    product: torch.dtype,
    of_weight: bool,
) -> Tensor:
    """d/dw (V, H), or d/db (V,)."""
    found: tuple[Tensor, ...] = _Gradients.apply(
        hidden, weight, bias, labels, z, cotangents, block, product, False, of_weight, not of_weight
    )
    return found[0]


_INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_MORE = f"{_INPUTS}, Tensor z, Tensor cotangents, SymInt block, ScalarType product"
LIBRARY = torch.library.Library("functorch_mnist", "FRAGMENT")


def operator(name: str, schema: str, fn: Callable[..., Any]) -> Any:
    """An operator that modes and the compiler see whole, and that autograd and transforms see through, into `fn`."""
    LIBRARY.define(name + schema)
    for key in ("CompositeImplicitAutograd", "FuncTorchDynamicLayerFrontMode"):
        LIBRARY.impl(name, fn, key)
    return getattr(torch.ops.functorch_mnist, name).default


def kernel(name: str, schema: str, fn: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator that runs as it is on plain tensors: `fake` says what comes of it."""
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"functorch_mnist::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.functorch_mnist, name).default


kernel(
    "vocabulary_statistics_kernel",
    f"({_INPUTS}, SymInt block) -> (Tensor, Tensor)",
    _statistics_kernel,
    lambda hidden, weight, bias, labels, block: (  # noqa: ARG005
        tree.wide(hidden.new_empty(labels.shape)),
        tree.wide(hidden.new_empty(labels.shape)),
    ),
)
kernel("vocabulary_gradients_kernel", f"({_MORE}, bool[] needs) -> Tensor[]", _gradients_kernel, _empty_gradients)
STATISTICS = operator(
    "vocabulary_statistics",
    f"({_INPUTS}, SymInt block) -> (Tensor, Tensor)",
    lambda *inputs: _Statistics.apply(*inputs),
)
"""`(hidden (N, H), weight (V, H), bias (V,) or none, labels (N,), block) -> z (N,), losses (N,)`, as constants."""
LOSS = operator(
    "vocabulary_loss",
    f"({_INPUTS}, Tensor z, Tensor losses, SymInt block) -> Tensor",
    lambda *inputs: _Loss.apply(*inputs),
)
"""`(hidden (N, H), weight (V, H), bias (V,) or none, labels (N,), z (N,), losses (N,), block) -> (N,)`: the losses."""
SUM = operator("vocabulary_sum", f"({_MORE}, bool of_weight) -> Tensor", _sum)
"""d/dw (V, H) or d/db (V,), by cotangents (N,); z is a number to it."""
