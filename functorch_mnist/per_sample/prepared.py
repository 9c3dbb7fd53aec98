"""A loss prepared: what depends on it and on shapes alone is computed once, not in every call.

In eager mode the survey is kept, and the ops of a pass are recorded when it comes again. The compiler is shown those
ops and not what leads to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import arguments, native, tree
from ..compiler import constant_to_the_compiler
from ..tree import Structure, Tree
from . import opaque
from .algebra import Factored
from .capture import LossFn, Strayed
from .passes import Finish, Loss, Pass, Ways, itself, passed, ways
from .planning import Plan, Planned, batch_of_one
from .programs import NotRecorded, Program, record
from .squares import are_in_range, ends, looked_at_later

Kind: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
"""What a tensor is like, but for its numbers."""


class Signature(NamedTuple):
    """What is made of a pass, and of which tensors; parameters come first in their list."""

    finish: Finish
    batch: int
    """How many tensors a batch has."""
    masked: bool
    alone: tuple[bool, ...]
    """Of each further argument of `finish`, whether it is a tensor; else it is a tree like the parameters."""

    def read(self, like: Tree, inputs: Sequence[Tensor]) -> tuple[Tree, tuple[Tensor, ...], Tensor | None, list[Tree]]:
        """The parameters, the batch, its mask and what else there is, from the list."""
        count, ahead = len(tree.leaves(like)), iter(inputs)

        def params() -> Tree:
            return tree.unflatten(like, [next(ahead) for _ in range(count)])

        theirs, batch = params(), tuple([next(ahead) for _ in range(self.batch)])
        mask = next(ahead) if self.masked else None
        return theirs, batch, mask, [next(ahead) if alone else params() for alone in self.alone]


class Recorded(NamedTuple):
    """The ops of a pass and of what is made of it."""

    program: Program | None
    """None where they are unknown."""
    structure: Structure | None
    """Of what the program returns."""
    looks: bool = False
    """Whether it returns the ends of sums of squares after that: see `squares`."""
    reason: str = ""
    """Why there is none."""


@dataclass(eq=False)
class Known:
    """What is known of a loss for parameters and examples of one kind, under one autocast."""

    examples: tuple[Kind, ...]
    ways: Ways
    recorded: dict[tuple[Signature, tuple[Kind, ...]], Recorded | None] = field(default_factory=dict)
    """By the signature and the kinds of all tensors but the parameters; none where it came once."""


TENSOR, TREE = True, False
_RETURNS: dict[Finish, bool | tuple[bool, ...]] = {
    Factored.norms: TENSOR,
    Factored.leaf_norms: TREE,
    Factored.weighted_sum: TREE,
    Factored.dot: TENSOR,
    Factored.second_moment: TREE,
}
"""What is made of a pass: a tensor, a tree like the parameters, or a tuple of such."""


def returns(*parts: bool) -> Callable[[Finish], Finish]:
    """Says what the decorated function makes of a pass, so that a compiler need not look into it."""

    def register(finish: Finish) -> Finish:
        _RETURNS[finish] = parts
        return finish

    return register


class Prepared:
    """A loss that keeps its survey, its strategies and the ops of its passes: see `prepare`. It is the loss itself."""

    def __init__(self, loss: Loss, like: Tree) -> None:
        self.loss, self.like, self.paths = loss, like, tuple(tree.paths(like))
        self.held: list[Tensor] = []
        """The tensors that the loss holds, once a compiler has asked for them."""
        self._known: dict[tuple[Structure, tuple[Kind, ...], torch.dtype | None], Known] = {}
        self._opaque: dict[Signature, str] = {}

    def __call__(self, params: Tree, *example: Tensor) -> Any:
        return self.loss.loss_fn(params, *example)

    def __str__(self) -> str:
        lines = ["prepared loss"]
        for known in self._known.values():
            kinds = [f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype, _ in known.examples]
            lines.append(f"  one example: {', '.join(kinds)}")
            for (signature, rest), recorded in known.recorded.items():
                if recorded is None:
                    said = "recorded when it comes again"
                else:
                    said = recorded.reason if recorded.program is None else f"{len(recorded.program)} ops"
                lines.append(f"    {signature.finish.__name__.strip('_')} of {rest[0][0][0]}: {said}")
        return "\n".join(lines)

    def known(self, params: Tree, batch: Sequence[Tensor], mask: Tensor | None = None) -> Known:
        """What is known for parameters and examples like these, found out where they are the first of their kind."""
        leaves, structure = tree.flatten(params)
        examples = tuple([(x.shape[1:], x.dtype, x.device) for x in batch])
        key = structure, (*[_kind(x) for x in leaves], *examples), _autocast(batch[0].device.type)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(examples, ways(self.loss, params, batch, mask))
        return known

    def recorded(self, signature: Signature, params: Tree, rest: list[Tensor], known: Known) -> Recorded | None:
        """The ops of a pass, from its second time on; `rest` are the tensors that it takes besides the parameters."""
        key = signature, tuple([_kind(x) for x in rest])
        if key not in known.recorded:
            known.recorded[key] = None
        elif known.recorded[key] is None:
            known.recorded[key] = self._record(signature, params, [*tree.leaves(params), *rest], known.ways)
        return known.recorded[key]

    def _record(self, signature: Signature, params: Tree, inputs: list[Tensor], found: Ways) -> Recorded:
        made: list[Structure] = []
        looks: list[bool] = []

        def run(*values: Tensor) -> list[Tensor]:
            theirs, batch, mask, more = signature.read(params, values)
            factored = passed(self.loss, theirs, batch, mask, found)
            with looked_at_later() as seen:
                leaves, structure = tree.flatten(signature.finish(factored, *more))
            made.append(structure)
            looks.append(len(seen) > 0)
            return [*leaves, *ends(seen)] if seen else leaves

        try:
            program = record(run, inputs)
        except NotRecorded as error:
            return Recorded(None, None, reason=str(error))
        except Strayed:
            return Recorded(None, None, reason="the forward branches on its data")
        if any([x.requires_grad for x in program.constants]):
            return Recorded(None, None, reason="the loss holds a tensor that requires a gradient")
        return Recorded(program, made[0], looks[0])

    @constant_to_the_compiler
    def opaque(
        self, finish: Finish, batch: int, masked: bool, alone: tuple[bool, ...], paths: tuple[str, ...]
    ) -> tuple[str, bool | tuple[bool, ...]] | None:
        """The name of a pass for a compiler to call, and what it returns; none where the compiler has to follow it."""
        if finish not in _RETURNS or paths != self.paths:
            return None
        if not self._opaque:
            with native.outside():
                self.held = self._held()
        if any([x.requires_grad for x in self.held]):
            return None
        signature = Signature(finish, batch, masked, alone)
        if signature not in self._opaque:

            def run(*inputs: Tensor) -> list[Tensor]:
                params, batch, mask, more = signature.read(self.like, inputs)
                return tree.leaves(Pass(self.loss, params)(batch, mask, finish, *more))

            self._opaque[signature] = opaque.register(run, self.held)
        return self._opaque[signature], _RETURNS[finish]

    def _held(self) -> list[Tensor]:
        (examples,) = [known.examples for known in list(self._known.values())[:1]]
        kinds = [_kind(x) for x in tree.leaves(self.like)]
        batch = [(torch.Size((2, *shape)), dtype, device) for shape, dtype, device in examples]

        def run(*inputs: Tensor) -> list[Tensor]:
            params = tree.unflatten(self.like, list(inputs[: len(kinds)]))
            return tree.leaves(Pass(self.loss, params)(inputs[len(kinds) :], None, itself))

        return opaque.held_by(run, [*kinds, *batch])


class PreparedPass:
    """The pass of a prepared loss over chunk after chunk."""

    def __init__(self, prepared: Prepared, params: Tree) -> None:
        self.prepared, self.params = prepared, params
        self.leaves = tree.leaves(params)

    def look(self, batch: Sequence[Tensor], mask: Tensor | None) -> None:
        """What is found out before the first chunk: all of it is known."""

    def __call__(self, batch: Sequence[Tensor], mask: Tensor | None, finish: Finish = itself, *more: Tree) -> Any:
        """What `finish` makes of the factored gradients of a chunk; `more` are tensors, or trees like `params`."""
        rest = [*batch, *([] if mask is None else [mask])]
        for part in more:
            rest += [part] if isinstance(part, Tensor) else tree.leaves(part)
        inputs = [*self.leaves, *rest]
        alone = tuple([isinstance(part, Tensor) for part in more])
        differentiable = torch.is_grad_enabled() and any([x.requires_grad for x in inputs])
        if native.level() or differentiable:  # what it gives may be differentiated
            return Pass(self.prepared.loss, self.params)(batch, mask, finish, *more)
        if torch.compiler.is_dynamo_compiling():
            return self.compiled(batch, mask, finish, more, alone, inputs)
        known = self.prepared.known(self.params, batch, mask)
        signature = Signature(finish, len(batch), mask is not None, alone)
        untracked = any([x.is_inference() for x in inputs])  # whether they are written to is not known
        recorded = None if untracked else self.prepared.recorded(signature, self.params, rest, known)
        if recorded is None or recorded.program is None or recorded.structure is None:
            return Pass(self.prepared.loss, self.params, known.ways)(batch, mask, finish, *more)
        out = recorded.program(*inputs)
        if recorded.looks:
            *out, least, most = out
            if not are_in_range(least, most):
                return Pass(self.prepared.loss, self.params, known.ways)(batch, mask, finish, *more)
        return tree.restore(recorded.structure, out)

    def compiled(
        self,
        batch: Sequence[Tensor],
        mask: Tensor | None,
        finish: Finish,
        more: Sequence[Tree],
        alone: tuple[bool, ...],
        inputs: list[Tensor],
    ) -> Any:
        """The same, which the compiler calls."""
        paths = tuple(tree.paths(self.params))
        found = self.prepared.opaque(finish, len(batch), mask is not None, alone, paths)
        if found is None:
            return Pass(self.prepared.loss, self.params)(batch, mask, finish, *more)
        name, returned = found
        ahead = iter(opaque.call(name, *inputs, *self.prepared.held))
        parts = []
        for is_tensor in returned if isinstance(returned, tuple) else (returned,):
            parts.append(next(ahead) if is_tensor else tree.unflatten(self.params, [next(ahead) for _ in self.leaves]))
        return tuple(parts) if isinstance(returned, tuple) else parts[0]


def passes(loss_fn: LossFn, params: Tree, plan: Plan | None = None, has_aux: bool = False) -> Pass | PreparedPass:
    """The pass of a loss as a function `(batch, mask, finish, *more)`, see `Pass`.

    Args:
        loss_fn, params, plan, has_aux: as for `factored`.

    Raises:
        ValueError: a prepared loss is given a plan, or another `has_aux` than it was prepared with.
    """
    if isinstance(loss_fn, Planned):
        return passes(loss_fn.loss_fn, params, loss_fn.plan if plan is None else plan, has_aux)
    if not isinstance(loss_fn, Prepared):
        return Pass(Loss(loss_fn, plan, has_aux), params)
    if plan is not None or has_aux != loss_fn.loss.has_aux:
        found = "a plan" if plan is not None else f"has_aux = {has_aux}"
        raise ValueError(f"per_sample: a prepared loss has its plan and has_aux from prepare. Found {found}.")
    return PreparedPass(loss_fn, params)


def prepare(
    loss_fn: LossFn, params: Tree, *example: Tensor, plan: Plan | None = None, has_aux: bool = False
) -> Prepared:
    """The loss, prepared: eager calls run little more than their ops, and compilers see little more than these.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        example: one example, without a batch axis.
        plan: strategies to take instead of those that would be chosen.
        has_aux: the loss returns `(loss, aux)`, see `factored`.

    Returns:
        The loss. Every function that takes a loss takes it; what is kept serves those of `per_sample`. Printed, it says
        for which batches the ops of a pass are kept.

    Raises:
        TypeError, ValueError: the loss does not fit, see `factored`.

    Guarantees: results are those of the loss itself. Parameters or examples of other shapes, dtypes or devices are
        prepared again. Nothing is kept of a forward that branches on its data, and nothing kept is used where a result
        may be differentiated: within a transform, or where an input requires a gradient. A batch with a gradient whose
        norm is above 8e6, or below 3e-26 and not zero, is taken again without what is kept.

    As by `jax.jit`, what the loss reads besides its arguments, such as a number or an attribute, is read once; the
    numbers of a tensor that it holds are read in every call.

    Cost: the second call with a batch of one size is made twice, to record it.

    Example:
        >>> from functorch_mnist.per_sample import norms
        >>> loss = prepare(lambda w, x: w @ x, torch.zeros(2), torch.zeros(2))
        >>> batch = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> [norms(loss, torch.zeros(2), batch) for _ in range(3)][-1]
        tensor([5., 1.])
        >>> print(loss)  # doctest: +ELLIPSIS
        prepared loss
          one example: (2,) float32
            norms of 2: ... ops
    """
    if isinstance(loss_fn, Planned):
        plan, loss_fn = loss_fn.plan if plan is None else plan, loss_fn.loss_fn
    arguments.check_params("per_sample.prepare", params)
    prepared = Prepared(Loss(loss_fn, plan, has_aux), params)
    prepared.known(params, batch_of_one("prepare", example))
    return prepared


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(x: Tensor) -> Kind:
    return x.shape, x.dtype, x.device
