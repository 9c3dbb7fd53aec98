"""From a loss to factored sample gradients, in two runs of the loss.

The survey runs it for one example and notes every op that a parameter enters. A parameter that enters only ops with a
rule is factored; any other is differentiated densely. The pass then differentiates the loss with zeros, the taps, added
to the outputs of those ops: the taps' gradients are the cotangents, and the ops' inputs come out beside them. The
factored parameters are constants in that pass, so no dense gradient of theirs is formed.

The pass is `grad` of the sum of `vmap(loss)`, by the taps and a copy for each example of the elementwise parameters:
its backward pass is that of an ordinary batch, in the memory format of the forward pass. Where there are other dense
parameters it is `vmap(grad(loss))`, for a product with a matrix for each example costs more.

Parameters are known by identity. In the pass the loss gets stand-ins for the factored ones, filled with NaN, and an op
with a rule is called with the parameter in its stand-in's place: a use that nobody saw makes the loss NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.overrides import TorchFunctionMode

from .. import tree
from ..tree import Tree
from . import rules
from .layout import View, permuting_view, reshaping_view
from .rules import Form, Sizes
from .terms import Dense, Strategy, Term, Viewed, merge

LossFn = Callable[..., Any]
"""`loss_fn(params, *example)`, the loss () of one example; where it says so, with something else beside it."""
Differentiated = tuple[list[Tensor], list[Tensor]]
"""What the pass differentiates by: the taps, and the parameters that are not factored."""
Beside = tuple[Tensor, Tree, list[Tensor]]
"""What comes out of the pass beside the gradients: the loss, its aux, and the ops' inputs."""

_PERMUTING = (
    Tensor.t, Tensor.transpose, Tensor.permute, Tensor.movedim, Tensor.swapaxes, Tensor.swapdims, Tensor.moveaxis,
    torch.t, torch.transpose, torch.permute, torch.movedim, torch.swapaxes, torch.swapdims, torch.moveaxis,
    Tensor.T.__get__, Tensor.mT.__get__,  # type: ignore[attr-defined]
)  # fmt: skip
_RESHAPING = (
    Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.unflatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.view_as,
    Tensor.reshape_as, torch.reshape, torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze,
)  # fmt: skip
_CASTING = (Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.contiguous, Tensor.clone)
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.is_contiguous,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.__len__, torch.numel,
    torch.is_floating_point, torch.is_complex, torch.is_tensor,
}  # fmt: skip
_WITH_INPLACE = {
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.silu, F.mish, F.hardtanh, F.hardswish, F.hardsigmoid,
    F.threshold, F.rrelu, F.dropout, F.alpha_dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout,
}  # fmt: skip


class Use(NamedTuple):
    """One op that a parameter enters."""

    op: str
    sizes: Sizes | None
    """What its factored form costs; none where it is not factored."""
    reason: str
    """Why it is not factored; empty if it is."""
    form: Form | None = None
    views: tuple[View, ...] = ()
    elementwise: bool = False
    """Whether its op scales or shifts by it: its sample gradient is then no larger than the cotangent."""


class Call(NamedTuple):
    """One op with a rule."""

    shape: tuple[int, ...]
    """Of its output, as are:"""
    dtype: torch.dtype
    device: torch.device
    leaves: list[int]
    """The parameters that enter it."""


class Survey(NamedTuple):
    """What a loss does with its parameters."""

    uses: list[list[Use]]
    """Of each leaf."""
    calls: list[Call]
    """The ops that factored uses of parameters enter, in order."""
    writes: list[str]
    """The names of functions that write to tensors."""

    def elementwise(self, leaf: int) -> bool:
        """Whether every use of a leaf scales or shifts by it, and there is one."""
        return len(self.uses[leaf]) > 0 and all([use.elementwise for use in self.uses[leaf]])


class Known(NamedTuple):
    """A tensor that stands for a leaf."""

    tensor: Tensor
    leaf: int
    views: tuple[View, ...]
    real: Tensor
    """What an op with a rule gets in its place."""


class Saved(NamedTuple):
    """An op's input, kept for a factored parameter."""

    a: Tensor | None
    leaf: int
    tap: int
    form: Form
    views: tuple[View, ...]


class _Follower(TorchFunctionMode):
    """Follows parameters through a loss, their casts and views too; subclasses say what happens where they are used."""

    def __init__(self, known: Sequence[Known], level: int) -> None:
        super().__init__()
        self.known = list(known)
        self.level = level

    def find(self, value: Any) -> Known | None:
        if isinstance(value, Tensor):
            for known in self.known:
                if known.tensor is value:
                    return known
        return None

    def find_all(self, arguments: Any) -> list[Known]:
        found = []
        for value in _flat(arguments):
            known = self.find(value)
            if known is not None:
                found.append(known)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = self.find_all((args, kwargs))
        self.see(func, args, kwargs)
        if not found or func in _METADATA:
            return func(*args, **kwargs)
        if len(found) == 1 and args and found[0].tensor is args[0] and self.follows(func, args, kwargs):
            return self.follow(found[0], func, args, kwargs)
        return self.use(func, args, kwargs, found)

    def follows(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether an op's result is the parameter in another form, through which its gradient passes as it is."""
        if not torch.is_grad_enabled() or _level() != self.level:
            return False
        types = [value for value in _flat((args, kwargs)) if isinstance(value, torch.dtype)]
        if func in _CASTING:
            return all([dtype.is_floating_point for dtype in types])
        return (func in _RESHAPING or func in _PERMUTING) and len(types) == 0  # x.view(dtype) passes no gradient

    def follow(self, known: Known, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs a cast or a view of a parameter, whose result then stands for it too."""
        out = func(*args, **kwargs)
        real = out if known.real is known.tensor else func(known.real, *args[1:], **kwargs)
        before = tuple(known.tensor.shape)
        views = known.views
        if func in _PERMUTING:
            views = (*views, permuting_view(lambda v: func(v, *args[1:], **kwargs), before))
        elif func in _RESHAPING:
            views = (*views, reshaping_view(before, tuple(out.shape)))
        self.known.append(Known(out, known.leaf, views, real))
        return out

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        """Looks at any op."""

    def use(self, func: Any, args: Any, kwargs: Any, found: list[Known]) -> Any:
        """Runs an op that parameters enter."""
        raise NotImplementedError


class _Surveyor(_Follower):
    """Notes each use of a parameter."""

    def __init__(self, known: Sequence[Known], level: int, survey: Survey) -> None:
        super().__init__(known, level)
        self.survey = survey

    def see(self, func: Any, args: Any, kwargs: Any) -> None:
        if _level() != self.level:
            for uses in self.survey.uses:
                uses.append(Use(_name(func), None, "the loss runs this op inside a transform of torch.func"))
        if _writes(func, args, kwargs):
            self.survey.writes.append(_name(func))
        rule = rules.find(func)
        if rule is rules.batch_norm or rule is rules.instance_norm:
            rule(*args, **kwargs)  # refuses what mixes examples, whoever owns its parameters

    def use(self, func: Any, args: Any, kwargs: Any, found: list[Known]) -> Any:
        out = func(*args, **kwargs)
        rule = rules.find(func) if isinstance(out, Tensor) else None
        claimed: list[int] = []
        factored: list[int] = []
        for entry in rule(*args, **kwargs) if rule is not None else ():
            known = self.find(entry.parameter)
            if known is None:
                continue
            claimed.append(known.leaf)
            if entry.form is None:
                reason = "elementwise: no larger than its cotangent"
                self.survey.uses[known.leaf].append(Use(_name(func), None, reason, elementwise=True))
            else:
                sizes = entry.form.sizes(None if entry.saved is None else entry.saved.shape, out.shape)
                self.survey.uses[known.leaf].append(Use(_name(func), sizes, "", entry.form, known.views))
                factored.append(known.leaf)
        for known in found:
            if known.leaf in claimed:
                claimed.remove(known.leaf)
            else:
                reason = "no rule for this op" if rule is None else "used in a way its op's rule does not cover"
                self.survey.uses[known.leaf].append(Use(_name(func), None, reason))
        if factored:
            self.survey.calls.append(Call(tuple(out.shape), out.dtype, out.device, factored))
        return out


class _Tapper(_Follower):
    """Adds a tap to the output of each op that a factored parameter enters, and keeps the op's input."""

    def __init__(
        self, known: Sequence[Known], level: int, taps: Sequence[Tensor], clone: bool, saved: list[Saved]
    ) -> None:
        super().__init__(known, level)
        self.taps, self.clone, self.saved = taps, clone, saved

    def use(self, func: Any, args: Any, kwargs: Any, found: list[Known]) -> Any:
        rule = rules.find(func)
        real_args, real_kwargs = self.real(args), {name: self.real(value) for name, value in kwargs.items()}
        mine = []
        tap = self.saved[-1].tap + 1 if self.saved else 0
        for entry in rule(*real_args, **real_kwargs) if rule is not None else ():
            for known in found:
                if known.real is entry.parameter and entry.form is not None:
                    a = entry.saved.clone() if self.clone and entry.saved is not None else entry.saved
                    mine.append(Saved(a, known.leaf, tap, entry.form, known.views))
                    break
        if not mine:
            return func(*args, **kwargs)
        self.saved.extend(mine)
        return func(*real_args, **real_kwargs) + self.taps[tap]

    def real(self, value: Any) -> Any:
        """The arguments with parameters in their stand-ins' places."""
        if isinstance(value, list):
            return [self.real(v) for v in value]
        if isinstance(value, tuple):
            return tuple([self.real(v) for v in value])
        known = self.find(value)
        return value if known is None else known.real


def survey(loss_fn: LossFn, params: Tree, batch: Sequence[Tensor], *, has_aux: bool = False) -> Survey:
    """What the loss of one example does with its parameters.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`.
        params: a pytree of float tensors.
        batch: (B, …); the first example is run, or zeros where there is none.
        has_aux: it returns `(loss, aux)`.
    """
    leaves = [_alias(leaf) for leaf in tree.leaves(params)]
    found = Survey([[] for _ in leaves], [], [])

    def run(*example: Tensor) -> Tensor:
        known = [Known(leaf, i, (), leaf) for i, leaf in enumerate(leaves)]
        with torch.enable_grad(), _Surveyor(known, _level(), found):
            loss, _ = _with_aux(loss_fn(tree.unflatten(params, leaves), *example), has_aux)
        return loss

    vmap(run)(*(rows[:1] if len(rows) else rows.new_zeros((1, *rows.shape[1:])) for rows in batch))
    return found


def factor(
    loss_fn: LossFn,
    params: Tree,
    batch: Sequence[Tensor],
    found: Survey,
    strategies: Sequence[Strategy | None],
    *,
    has_aux: bool = False,
) -> tuple[Tensor, tuple[Term, ...], Tree]:
    """The losses (B,), the term of each leaf, and what the loss returned beside it, (B, …).

    Args:
        loss_fn, params, batch: as in `survey`; B is at least 1.
        found: the survey.
        strategies: of each leaf; none for one that is differentiated densely.
        has_aux: the loss returns `(loss, aux)`.
    """
    leaves = tree.leaves(params)
    factored = {i: strategy for i, strategy in enumerate(strategies) if strategy is not None}
    dense = [i for i, strategy in enumerate(strategies) if strategy is None]
    real = {i: _alias(leaves[i]) for i in factored}
    stand_ins = {i: torch.full_like(leaves[i], torch.nan) for i in factored}
    calls = [call for call in found.calls if any([leaf in factored for leaf in call.leaves])]
    taps = [torch.zeros(call.shape, dtype=call.dtype, device=call.device) for call in calls]
    factors: list[Saved] = []

    def run(differentiated: Differentiated, *example: Tensor) -> tuple[Tensor, Beside]:
        taps, others = differentiated
        given = {**stand_ins, **dict(zip(dense, others, strict=True))}
        known = [Known(stand_ins[i], i, (), real[i]) for i in factored]
        with _Tapper(known, _level(), taps, len(found.writes) > 0, factors):
            out = loss_fn(tree.unflatten(params, [given[i] for i in range(len(leaves))]), *example)
        loss, aux = _with_aux(out, has_aux)
        return loss, (loss, aux, [factor.a for factor in factors if factor.a is not None])

    def total(differentiated: Differentiated) -> tuple[Tensor, Beside]:
        losses, beside = vmap(run)(differentiated, *batch)
        return losses.sum(), beside

    others = [leaves[i] for i in dense]
    if all([found.elementwise(i) for i in dense]):
        copies = [[x.expand(len(batch[0]), *x.shape) for x in xs] for xs in (taps, others)]
        (cotangents, grads), (losses, aux, saved) = grad(total, has_aux=True)((copies[0], copies[1]))
    else:
        sample_grads = vmap(grad(run, has_aux=True), in_dims=(None, *[0] * len(batch)))
        (cotangents, grads), (losses, aux, saved) = sample_grads((taps, others), *batch)
    terms: list[list[Term]] = [[] for _ in leaves]
    for i, values in zip(dense, grads, strict=True):
        terms[i].append(Dense(values))
    kept = iter(saved)
    for factor in factors:
        a = None if factor.a is None else next(kept)
        term: Term = factor.form.term(a, cotangents[factor.tap], factored[factor.leaf])
        for view in reversed(factor.views):
            term = Viewed(term, view)
        terms[factor.leaf].append(term)
    return losses, tuple(merge(uses) for uses in terms), aux


def _alias(leaf: Tensor) -> Tensor:
    """The same tensor as another object: two leaves may be one tensor, and the loss may hold it too."""
    return leaf.view_as(leaf)


def _shown(out: Any) -> str:
    return f"a tuple of {len(out)}" if isinstance(out, tuple) else type(out).__name__


def _with_aux(out: Any, has_aux: bool) -> tuple[Tensor, Tree]:
    """The loss, checked, and its aux: nothing where it has none."""
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise ValueError(f"per_sample: with has_aux the loss must return a tuple (loss, aux). Found {_shown(out)}.")
    loss, aux = out if has_aux else (out, ())
    for leaf in tree.leaves(aux):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"per_sample: aux must be a pytree of tensors. Found {type(leaf).__name__} in it.")
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"per_sample: the loss of one example must be a 0-d tensor. Found {shape}.")
    return loss, aux


def _level() -> int:
    """How many transforms of torch.func are being applied."""
    return int(torch._C._functorch.maybe_current_level() or 0)


# What `torch.compiler.assume_constant_result` does, which would import the compiler, for 0.8 s.
_level._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _name(func: Any) -> str:
    """For people; the compiler knows no names of built-in methods."""
    if torch.compiler.is_dynamo_compiling():
        return "an op"
    name = str(getattr(func, "__name__", func))
    return str(getattr(getattr(func, "__self__", None), "__name__", name)) if name == "__get__" else name


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op may write to a tensor in place; to the compiler, which removes needless copies, every op may."""
    if torch.compiler.is_dynamo_compiling():
        return True
    name = _name(func).split(".")[0]
    if name == "__setitem__" or (name.startswith("__i") and name.endswith("__")):
        return True
    if (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None:
        return True
    return kwargs.get("inplace") is True or (func in _WITH_INPLACE and any(value is True for value in args))


def _flat(value: Any) -> list[Any]:
    """All values in nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [v for part in value for v in _flat(part)]
    return [value]
