"""From a loss to factored sample gradients, in two runs of the loss.

The survey runs it for one example and notes every op where a parameter, or a weight made of parameters, meets the
example. The pass then differentiates the loss with zeros, the taps, added to the outputs of those ops: the taps'
gradients are the cotangents, and the ops' inputs come out with them. The parameters are constants in that pass, so no
dense gradient of theirs is formed.

The pass is `grad` of the sum of `vmap(loss)`: its backward pass is that of an ordinary batch, in the memory format of
the forward pass. A parameter that cannot be followed (into another transform, or written to) is differentiated densely,
by a copy for each example; it alone.

Parameters are known by identity. In the pass the loss gets stand-ins for them, filled with NaN, and ops that are
followed are called with the numbers in their place: a use that nobody saw makes the loss NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from .. import arguments, native, tree
from ..ops import nested, writes
from ..tree import Tree
from . import recurrence, rules
from .calls import CallForm, float_outputs
from .following import Follower, Found, Known, name_of
from .forms import ConvolutionForm, Form, MatrixForm, ShiftForm, Sizes
from .kernels import Kernels, on_the_batch, tapped
from .mistakes import explained
from .terms import Absent, Dense, Strategy, Term, Viewed
from .uses import merge
from .weights import Pulled, Weight

LossFn = Callable[..., Any]
"""`loss_fn(params, *example)`, the loss () of one example; where it says so, with an aux."""
Beside = tuple[Tensor, Tree, list[Any]]
"""What comes out of the pass with the gradients: the losses, their aux, and the ops' inputs."""


class Use(NamedTuple):
    """One op that a parameter enters, alone or in a weight."""

    op: str
    sizes: Sizes | None
    """What its factored form costs; none where there is none."""
    reason: str
    """Why there is none; else empty."""
    form: Form | None
    weight: Weight


class Output(NamedTuple):
    """A float output of an op, for one example."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Call(NamedTuple):
    """One op of weights and an example."""

    op: Any
    taps: list[Output]
    """Of each float output, or of what else is tapped."""
    found: list[tuple[Weight, Form, int]]
    """The weights, their forms, and the tap that gives the cotangent."""


class Survey(NamedTuple):
    """What a loss does with its parameters."""

    uses: list[list[Use]]
    """Of each leaf."""
    calls: list[Call]
    """In order."""
    writes: list[str]
    """The names of functions that write to tensors."""


class _Surveyor(Follower):
    """Notes each use of a parameter."""

    def __init__(self, known: Sequence[Known], level: int, survey: Survey) -> None:
        super().__init__(known, level)
        self.survey = survey

    def see(self, func: Any, args: Any, kwargs: Any, values: list[Tensor]) -> None:
        if native.level() != self.level:  # a parameter that is an argument of the transform has another identity in it
            for leaf, uses in enumerate(self.survey.uses):
                uses.append(Use(name_of(func), None, "inside a transform of torch.func", None, Weight((leaf,))))
        if native.saves_by_hooks():
            raise ValueError(
                "per_sample: torch.func cannot differentiate through saved-tensor hooks, as activation checkpoints "
                "are. Switch checkpointing off; per-sample gradients keep few activations."
            )
        if writes(func, args, kwargs):
            self.survey.writes.append(name_of(func))
        if rules.may_mix(func) and any([native.is_of_an_example(x) for x in values]):
            rules.refuse_mixing(func, *args, **kwargs)

    def use(self, func: Any, args: Any, kwargs: Any, found: list[Found]) -> Any:
        out = on_the_batch(func, args, kwargs)
        outputs = [Output(tuple(y.shape), y.dtype, y.device) for y in float_outputs(out)]
        factored = []
        for known, form, saved, reason in found:
            sizes = None
            if len(outputs) == 0 or known.tensor.is_complex():
                form, reason = None, "its gradient does not flow as one of real numbers"
            if form is not None:
                shape = saved.shape if isinstance(saved, Tensor) else None
                sizes = form.sizes(shape, torch.Size(outputs[0].shape))
                factored.append((known.weight, form, 0))
            for leaf in known.weight.leaves:
                self.survey.uses[leaf].append(Use(name_of(func), sizes, reason, form, known.weight))
        if factored:
            self.survey.calls.append(Call(func, outputs, factored))
        return out

    def recur(self, call: recurrence.Call, args: Any, kwargs: Any) -> Any:
        shapes = recurrence.tap_shapes(call)
        taps = [Output(shape, call.input.dtype, call.input.device) for shape in shapes]
        factored = []
        for known, form, tap in self.of_layers(call):
            if known is not None:
                weight, size = known.weight, (1, shapes[tap][0] * shapes[tap][1], 1)
                sizes = form.sizes(torch.Size(size), torch.Size(shapes[tap]))
                for leaf in weight.leaves:
                    self.survey.uses[leaf].append(Use(name_of(call.op), sizes, "", form, weight))
                factored.append((weight, form, tap))
        self.survey.calls.append(Call(call.op, taps, factored))
        return on_the_batch(call.op, args, kwargs)


class Strayed(Exception):
    """The loss of a batch runs other ops than that of the first example: it branches on data."""


class _Tapper(Follower):
    """Adds a tap to each output of the ops that factored weights enter, and keeps what their forms need."""

    def __init__(
        self,
        known: Sequence[Known],
        calls: Sequence[Call],
        taps: Sequence[Tensor],
        clone: bool,
        saved: list[list[Any]],
    ) -> None:
        super().__init__(known, native.level())
        self.calls, self.taps, self.clone, self.saved = calls, iter(taps), clone, saved
        self.at = native.mapped()

    def use(self, func: Any, args: Any, kwargs: Any, found: list[Found]) -> Any:
        taps = self.next(func)
        self.saved.append([self.kept(use.saved) for use in found])
        args, kwargs = self.real(args), self.real(kwargs)
        out = tapped(func, args, kwargs, taps[0], self.at)
        if out is not None:
            return out
        out = on_the_batch(func, args, kwargs)
        each = iter([native.handed_back(tap, self.at) for tap in taps])
        if isinstance(out, Tensor):
            return out.add_(next(each)) if writes(func, args, kwargs) else out + next(each)
        parts = [y + next(each) if isinstance(y, Tensor) and y.is_floating_point() else y for y in out]
        return type(out)(parts)

    def recur(self, call: recurrence.Call, args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        out, saved = recurrence.run(call, self.at, self.next(call.op))
        mine = [known is not None for known, _, _ in self.of_layers(call)]
        self.saved.append([x for x, used in zip(saved, mine, strict=True) if used])
        return out

    def next(self, op: Any) -> list[Tensor]:
        """The taps (B, …) of the next op that is tapped, which must be this one."""
        number = len(self.saved)
        if not torch.compiler.is_dynamo_compiling() and (number == len(self.calls) or self.calls[number].op != op):
            raise Strayed
        return [next(self.taps) for _ in self.calls[number].taps]

    def kept(self, saved: Any) -> Any:
        """What a form needs of an op's inputs, (B, …), as they are now."""
        return nested(lambda x: native.taken_out(x.clone() if self.clone else x, self.at), saved)


def survey(loss_fn: LossFn, params: Tree, batch: Sequence[Tensor], *, has_aux: bool = False, rows: int = 1) -> Survey:
    """What the loss of one example does with its parameters.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`.
        params: a pytree of float tensors.
        batch: (B, …); the first example is run, or zeros where there is none.
        has_aux: it returns `(loss, aux)`.
        rows: how many examples are run: more than one where a module branches on its batch.
    """
    leaves = [_alias(leaf) for leaf in tree.leaves(params)]
    found = Survey([[] for _ in leaves], [], [])

    def run(*example: Tensor) -> Tensor:
        known = [Known(leaf, Weight((i,)), leaf) for i, leaf in enumerate(leaves)]
        surveyor = _Surveyor(known, native.level(), found)
        with torch.enable_grad(), surveyor:
            loss, _ = _with_aux(loss_fn(tree.unflatten(params, leaves), *example), has_aux)
            if torch.compiler.is_dynamo_compiling() or surveyor.find(loss) is not None:
                loss = _of_an_example(loss, example)
        return loss

    examples = [x[:rows] if len(x) else x.new_zeros((1, *x.shape[1:])) for x in batch]
    if torch.compiler.is_dynamo_compiling():
        native.show_all_ops()
        vmap(run)(*examples)
        return found
    try:
        vmap(run)(*examples)
    except (RuntimeError, TypeError) as error:
        _raise(error, loss_fn, params, examples)
    if leaves and not any(found.uses):
        raise arguments.independent("per_sample")
    return found


def _raise(error: Exception, loss_fn: LossFn, params: Tree, batch: Sequence[Tensor]) -> NoReturn:
    """Raises what explains an error of the loss, or the error."""
    cause = explained(error, loss_fn, params, batch)
    if cause is error:
        raise error
    raise cause from error


def factor(
    loss_fn: LossFn,
    params: Tree,
    batch: Sequence[Tensor],
    found: Survey,
    strategies: Sequence[Strategy | None],
    *,
    has_aux: bool = False,
) -> tuple[Tensor, tuple[Term, ...], Tree]:
    """The losses (B,), the term of each leaf, and what the loss returned with it, (B, …).

    Raises:
        Strayed: it runs other ops than the survey saw.

    Args:
        loss_fn, params, batch: as in `survey`; B is at least 1.
        found: the survey.
        strategies: of each leaf; none for one that is differentiated densely.
        has_aux: the loss returns `(loss, aux)`.
    """
    leaves, rows = tree.leaves(params), len(batch[0])
    factored = {i: strategy for i, strategy in enumerate(strategies) if strategy is not None}
    # The compiler does not show every use of a tensor, such as a loop over its rows: what looks unused may not be.
    unseen = torch.compiler.is_dynamo_compiling()
    dense = [i for i in range(len(leaves)) if i not in factored and (unseen or found.uses[i])]
    real = {i: _alias(leaf) for i, leaf in enumerate(leaves)}
    stand_ins = {i: torch.full_like(leaf, torch.nan) for i, leaf in enumerate(leaves) if i not in dense}
    calls = [call._replace(found=[use for use in call.found if use[0].leaves[0] in factored]) for call in found.calls]
    calls = [call for call in calls if call.found]
    taps = [_zeros(rows, output) for call in calls for output in call.taps]
    clone = len(found.writes) > 0 or torch.compiler.is_dynamo_compiling()  # the compiler removes needless copies

    def total(differentiated: list[Tensor]) -> tuple[Tensor, Beside]:
        saved: list[list[Any]] = []

        def run(*example: Tensor) -> tuple[Tensor, Tree]:
            at = native.mapped()
            copies = [native.handed_back(copy, at) for copy in differentiated[len(taps) :]]
            given = {**stand_ins, **dict(zip(dense, copies, strict=True))}
            known = [Known(stand_in, Weight((i,)), real[i]) for i, stand_in in stand_ins.items()]
            tapper = _Tapper(known, calls, differentiated[: len(taps)], clone, saved)
            with tapper:
                out = loss_fn(tree.unflatten(params, [given[i] for i in range(len(leaves))]), *example)
                loss, aux = _with_aux(out, has_aux)
                if torch.compiler.is_dynamo_compiling() or tapper.find(loss) is not None:
                    loss = _of_an_example(loss, example)
            return loss, aux

        losses, aux = vmap(run)(*batch)
        seeds = torch.where(losses.isnan(), torch.nan, torch.ones_like(losses)).detach()
        # The seeds make the cotangents of others NaN, too, where there is a use that nobody saw.
        return (losses * seeds).sum(), (losses, aux, saved)

    copies = [leaves[i].expand(rows, *leaves[i].shape) for i in dense]
    cotangents, (losses, aux, saved) = _grad(total, [*taps, *copies], has_aux=True)
    if len(saved) < len(calls):
        raise Strayed
    terms: dict[int, list[tuple[Weight, Term]]] = {i: [] for i in range(len(leaves))}
    for i, values in zip(dense, cotangents[len(taps) :], strict=True):
        terms[i].append((Weight((i,)), Dense(values)))
    following = iter(cotangents)
    for call, kept in zip(calls, saved, strict=True):
        outputs = [next(following) for _ in call.taps]
        for (weight, form, tap), given in zip(call.found, kept, strict=True):
            strategy = factored[weight.leaves[0]]
            if isinstance(form, CallForm):
                values = weight.value(real), tuple([other.value(real) for other in form.others]), given
                term = form.term(values, tuple(outputs), strategy)
            else:
                term = form.term(given, outputs[tap], strategy)
            for leaf in weight.leaves:
                terms[leaf].append((weight, term))
    return losses, tuple([_term(i, terms[i], real, rows, strategies[i]) for i in range(len(leaves))]), aux


def _grad(fn: Callable[[list[Tensor]], Any], inputs: list[Tensor], *, has_aux: bool = False) -> Any:
    """`torch.func.grad`, which keeps what a derivative of the gradient would need only where one can be asked for.

    It is where the result depends on a tensor outside that requires a gradient; `grad` always keeps it, and so all
    activations until the end of the backward pass.
    """
    if torch.compiler.is_dynamo_compiling():  # a graph keeps what is used
        return grad(fn, has_aux=has_aux)(inputs)
    out, pull, *aux = vjp(fn, inputs, has_aux=has_aux)
    again = out.requires_grad
    gradient = pull(torch.ones_like(out), retain_graph=again, create_graph=again)[0]
    return (gradient, *aux) if has_aux else gradient


def biases(found: Survey) -> tuple[int | None, ...]:
    """Of each leaf, the number of the bias that is added by the one op that it enters, if no other op has that bias."""
    result: list[int | None] = [None] * len(found.uses)
    alone = [len(uses) == 1 and uses[0].weight.made is None for uses in found.uses]
    for call in found.calls:
        mine = [(weight.leaves[0], form) for weight, form, _ in call.found if weight.made is None]
        for leaf, form in mine:
            groups, outputs = form.biased if isinstance(form, MatrixForm | ConvolutionForm) else (0, 0)
            for bias, shift in mine:
                fits = isinstance(shift, ShiftForm) and shift.factor == 1 and shift.shape == (groups * outputs,)
                if fits and alone[leaf] and alone[bias]:
                    result[leaf] = bias
    return tuple(result)


def dense_grads(loss_fn: LossFn, params: Tree, batch: Sequence[Tensor]) -> list[Tensor]:
    """The sample gradients (B, *w) of each leaf, by a copy of it for each example.

    It is `grad` of the sum of `vmap(loss)`, not `vmap(grad(loss))`, so that what runs on whole batches can.
    """
    leaves, rows = tree.leaves(params), len(batch[0])

    def run(copies: list[Tensor], *example: Tensor) -> Tensor:
        with Kernels():
            loss, _ = _with_aux(loss_fn(tree.unflatten(params, copies), *example), has_aux=False)
        return loss

    copies = [leaf.expand(rows, *leaf.shape) for leaf in leaves]
    if torch.compiler.is_dynamo_compiling():
        return list(_grad(lambda copies: vmap(run)(copies, *batch).sum(), copies))
    try:
        return list(_grad(lambda copies: vmap(run)(copies, *batch).sum(), copies))
    except (RuntimeError, TypeError) as error:
        _raise(error, loss_fn, params, batch)


def _of_an_example(loss: Tensor, example: Sequence[Tensor]) -> Tensor:
    """The loss plus nothing of the example: one that is made of parameters alone has no other use of them."""
    return loss + example[0].reshape(-1)[:0].sum().to(loss.device, loss.dtype)


def _zeros(rows: int, output: Output) -> Tensor:
    """A tap of each example; no memory is spent on it."""
    return torch.zeros((), dtype=output.dtype, device=output.device).expand(rows, *output.shape)


def _term(
    leaf: int, uses: list[tuple[Weight, Term]], real: dict[int, Tensor], rows: int, strategy: Strategy | None
) -> Term:
    """One term for all uses of a parameter: those of one weight are merged, then pulled back."""
    if not uses:
        return Absent(real[leaf].new_zeros(()).expand(rows, *real[leaf].shape))
    groups: list[tuple[Weight, list[Term]]] = []
    for weight, term in uses:
        for view in reversed(weight.views) if weight.made is None else ():
            term = Viewed(term, view)
        for other, members in groups:
            if other is weight or (other.made is None and weight.made is None):
                members.append(term)
                break
        else:
            groups.append((weight, [term]))
    strategy = strategy or "build"
    return merge([_pulled(leaf, weight, merge(members, strategy), real) for weight, members in groups], strategy)


def _pulled(leaf: int, weight: Weight, term: Term, real: dict[int, Tensor]) -> Term:
    return term if weight.made is None else Pulled(term, tuple([real[i] for i in weight.leaves]), weight, leaf)


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
        is_tensor = isinstance(loss, Tensor)
        shape = tuple(loss.shape) if is_tensor else type(loss).__name__
        remedy = "Is a reduction missing, or was it given a batch?" if is_tensor else "Return the tensor itself."
        raise ValueError(f"per_sample: the loss of one example must be a 0-d tensor. Found {shape}. {remedy}")
    return loss, aux
