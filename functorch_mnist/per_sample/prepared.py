"""A loss prepared: what hangs on it and on shapes alone is found out once, and not in every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import native, tree
from ..compiler import constant_to_the_compiler, unseen, unseen_as
from ..tree import Structure, Tree
from .capture import LossFn, Strayed
from .passes import Finish, Loss, Pass, Ways, itself, passed, ways
from .plan import Plan
from . import programs
from .programs import NotRecorded, Program, record

Kind: TypeAlias = tuple[torch.Size, torch.dtype, torch.device]
"""What a tensor is like, but for its numbers."""


class Recorded(NamedTuple):
    """A pass over batches of one size, and what is made of it."""

    program: Program | None
    """None where it cannot be recorded."""
    structure: Structure | None
    """Of what the program returns."""
    reason: str = ""
    """Why there is none."""


class Form(NamedTuple):
    """What is made of a pass, and of which inputs."""

    finish: Finish
    batch: int
    """How many tensors a batch has."""
    masked: bool
    alone: tuple[bool, ...]
    """Of each further argument of `finish`, whether it is a tensor; else it is a tree like the parameters."""

    def read(self, params: Tree, inputs: list[Tensor]) -> tuple[Tree, tuple[Tensor, ...], Tensor | None, list[Tree]]:
        """The parameters, the batch, its mask and what else there is, from the list of all tensors."""
        count = len(tree.leaves(params))
        ahead = iter(inputs)
        theirs = tree.unflatten(params, [next(ahead) for _ in range(count)])
        batch = tuple([next(ahead) for _ in range(self.batch)])
        mask = next(ahead) if self.masked else None
        more = [
            next(ahead) if alone else tree.unflatten(params, [next(ahead) for _ in range(count)]) for alone in self.alone
        ]
        return theirs, batch, mask, more


@dataclass(eq=False)
class Known:
    """What is known of a loss for parameters and examples of one kind."""

    examples: tuple[Kind, ...]
    ways: Ways
    recorded: dict[Any, Recorded | None] = field(default_factory=dict)
    """By what is made of the pass and the shapes of all it takes; none where it was made once."""


@torch.compiler.nested_compile_region
def once(name, *inputs):
    return unseen(name, *inputs)


PLAIN = set()


def plain(finish):
    PLAIN.add(finish)
    return finish


class Prepared:
    """A loss that keeps its survey, its strategies and the ops of its passes: see `prepare`. It is the loss itself."""

    def __init__(self, loss: Loss, like: Tree) -> None:
        self.loss, self.like = loss, like
        self._names: dict[Any, str] = {}
        self.held: dict[str, list[Tensor]] = {}
        self._returned: dict[str, tuple[bool, ...]] = {}
        self._known: dict[tuple[Structure, tuple[Kind, ...]], Known] = {}

    def __call__(self, params: Tree, *example: Tensor) -> Any:
        return self.loss.loss_fn(params, *example)

    def __str__(self) -> str:
        lines = ["prepared loss"]
        for known in self._known.values():
            kinds = [f"{tuple(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype, _ in known.examples]
            lines.append(f"  one example: {', '.join(kinds)}")
            for (form, inputs, _), recorded in known.recorded.items():
                if recorded is None:
                    said = "recorded when it comes again"
                else:
                    said = recorded.reason if recorded.program is None else f"{len(recorded.program)} ops"
                lines.append(f"    {form.finish.__name__} of {inputs[0][0][0]}: {said}")
        return "\n".join(lines)

    def known(self, params: Tree, batch: Sequence[Tensor]) -> Known:
        """What is known for parameters and examples like these, found out where they are the first of their kind."""
        leaves, structure = tree.flatten(params)
        examples = tuple([(x.shape[1:], x.dtype, x.device) for x in batch])
        key = structure, (*[_kind(x) for x in leaves], *examples)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Known(examples, ways(self.loss, params, batch))
        return known

    def run(
        self, params: Tree, batch: Sequence[Tensor], mask: Tensor | None, finish: Finish = itself, *more: Tree
    ) -> Any:
        """What `finish` makes of the factored gradients of a batch; `more` are tensors, or trees like `params`."""
        leaves, rest = tree.leaves(params), [*batch, *([] if mask is None else [mask])]
        form = Form(finish, len(batch), mask is not None, tuple([isinstance(x, Tensor) for x in more]))
        inputs = [*leaves, *rest, *tree.leaves(more)]
        if torch.compiler.is_dynamo_compiling():
            name = self.named(finish, *form[1:], tuple(tree.paths(params)), tuple([_kind(x) for x in inputs]))
            if name is None:
                return Pass(self.loss, params)(batch, mask, finish, *more)
            values = once(name, *inputs, *self.held[name])
            return restored(params, self.returned(name), values)
        known = self.known(params, batch)
        plain = Pass(self.loss, params, known.ways)
        if native.level() or (torch.is_grad_enabled() and any([x.requires_grad for x in inputs])):
            return plain(batch, mask, finish, *more)  # so that what it gives can be differentiated
        key = form, tuple([_kind(x) for x in inputs[len(leaves) :]]), _autocast(inputs[0].device.type)
        recorded = known.recorded.get(key)
        if recorded is None:
            if key not in known.recorded:
                known.recorded[key] = None
                return plain(batch, mask, finish, *more)
            recorded = known.recorded[key] = self.record(form, params, inputs, known.ways)
        if recorded.program is None:
            return plain(batch, mask, finish, *more)
        return tree.restore(recorded.structure, recorded.program(*inputs))

    @constant_to_the_compiler
    def named(
        self, finish: Finish, batch: int, masked: bool, alone: tuple[bool, ...], paths: tuple[str, ...], kinds: tuple[Kind, ...]
    ) -> str | None:
        """The name under which the compiler calls a pass; none where it has to see into it."""
        if finish not in PLAIN or paths != tuple(tree.paths(self.like)):
            return None
        form = Form(finish, batch, masked, alone)
        if (form, kinds) in self._names:
            return self._names[form, kinds]

        def run(*inputs: Tensor) -> list[Tensor]:
            params, batch, mask, more = form.read(self.like, list(inputs))
            out = Pass(self.loss, params)(batch, mask, finish, *more)
            returned[:] = [isinstance(x, Tensor) for x in out] if isinstance(out, tuple) else []
            return tree.leaves(out)

        returned: list[bool] = []
        with native.outside():
            held = programs.held(run, kinds)
        if any([x.requires_grad for x in held]):
            return None
        name = self._names[form, kinds] = unseen_as(programs.lending(run, held))
        self.held[name], self._returned[name] = held, tuple(returned)
        return name

    @constant_to_the_compiler
    def returned(self, name: str) -> tuple[bool, ...]:
        return self._returned[name]

    def record(self, form: Form, params: Tree, inputs: list[Tensor], found: Ways) -> Recorded:
        """The ops of a pass, or why they cannot be told."""
        made: list[Structure] = []

        def run(*values: Tensor) -> Iterator[list[Tensor]]:
            theirs, batch, mask, more = form.read(params, list(values))
            factored = passed(self.loss, theirs, batch, mask, found)
            yield tree.leaves(factored)
            leaves, structure = tree.flatten(form.finish(factored, *more))
            made.append(structure)
            yield leaves

        try:
            program = record(run, inputs)
        except NotRecorded as error:
            return Recorded(None, None, str(error))
        except Strayed:
            return Recorded(None, None, "the forward branches on its data")
        if any([x.requires_grad for x in program.constants.buffers()]):
            return Recorded(None, None, "the loss holds a tensor that requires a gradient")
        return Recorded(program, made[0])


def restored(params, alone, values):
    ahead = iter(values)
    count = len(tree.leaves(params))

    def one(is_tensor):
        return next(ahead) if is_tensor else tree.unflatten(params, [next(ahead) for _ in range(count)])

    if alone == ():
        return one(len(values) == 1 and count != 1)
    return tuple([one(x) for x in alone])


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(x: Tensor) -> Kind:
    return x.shape, x.dtype, x.device


def prepare(
    loss_fn: LossFn, params: Tree, *example: Tensor, plan: Plan | None = None, has_aux: bool = False
) -> Prepared:
    """The loss, prepared: what hangs on it and on shapes alone is kept, and eager calls cost little more than their ops.

    Args:
        loss_fn: `loss_fn(params, *example) -> ()`, a pure function of one example.
        params: a pytree of float tensors.
        example: one example, without a batch axis.
        plan: strategies to take instead of those that would be chosen.
        has_aux: the loss returns `(loss, aux)`, see `factored`.

    Returns:
        The loss. Every function that takes a loss takes it; those of `per_sample` take what is kept. Printed, it says
        for which batches the ops of a pass are kept.

    Raises:
        TypeError, ValueError: the loss does not fit, see `factored`.

    Guarantees: the results are those of the loss itself. Parameters or examples of other shapes, dtypes or devices are
        prepared anew. Nothing is kept of a forward that branches on its data, and nothing kept is used where a result
        may be differentiated: within a transform, or where an input requires a gradient.

    What the loss reads besides its arguments, a number or an attribute, is read once, as by `jax.jit`; of a tensor that
    it holds the numbers are read in every call.

    Cost: the second call with a batch of one size runs twice.

    Example:
        >>> loss = prepare(lambda w, x: w @ x, torch.zeros(2), torch.zeros(2))
        >>> norms(loss, torch.zeros(2), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([5., 1.])
    """
    prepared = Prepared(Loss(loss_fn, plan, has_aux), params)
    prepared.known(params, [torch.as_tensor(x)[None] for x in example])
    return prepared


def passes(loss_fn: LossFn, params: Tree, plan: Plan | None = None, has_aux: bool = False) -> Callable[..., Any]:
    """The pass of a loss as a function `(batch, mask, finish, *more)`, see `Pass`.

    Raises:
        ValueError: a prepared loss is given another plan or `has_aux` than it was prepared with.
    """
    if not isinstance(loss_fn, Prepared):
        return Pass(Loss(loss_fn, plan, has_aux), params)
    if plan is not None or has_aux != loss_fn.loss.has_aux:
        raise ValueError(
            f"per_sample: the plan and has_aux of a prepared loss are given to prepare. Found a plan, or has_aux = {has_aux}."
        )
    return partial(loss_fn.run, params)
