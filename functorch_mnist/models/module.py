"""Any `nn.Module` as a pure model, and back.

copies.py    the module without its numbers: what is lent to it, and that nothing stays
inputs.py    what a forward gets
trial.py     what the module does with a batch: where it lies, and whether examples mix
region.py    the forward on the batch, in the middle of a loss of one example
draws.py     random functions, drawn from keys
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from .. import native
from ..compiler import constant_to_the_compiler
from .copies import Copies
from .inputs import Inputs, Leaf, Spec, described, is_constant, leaves_of, rebuilt, with_leaves
from .model import Model, Params, check_names
from .region import Region
from .trial import LOOSE, Axis, Trial, hold_trial, joined, named, same, split


def from_module(
    module: nn.Module,
    *,
    example_ndim: int | Mapping[str, int] | None = None,
    batch_axis: int = 0,
    shared: Collection[str] = (),
) -> tuple[Params, Model]:
    """The parameters of a module, and the module as a pure model.

    Args:
        module: any module whose forward takes a batch and returns one: tensors, or nested dicts, lists and tuples of
            them, by position or by name; it may return named tuples and `ModelOutput`s. It is not changed.
        example_ndim: number of axes of one example, of every input or by the names of the forward's arguments. With it
            `apply` takes any leading axes; without it `apply` takes exactly one example, to be batched with `vmap`.
        batch_axis: the axis along which the forward takes its batch; 1 for time-first modules (`batch_first=False`).
        shared: names of the forward's arguments that all examples share, such as an attention mask (T, T).

    Returns:
        `(params, model)`. `params` holds a detached copy of each parameter that requires a gradient, under its
        `named_parameters` name, tied ones once. Frozen parameters and buffers are constants of the model.
        `model.apply(params, *inputs, key=None, **named)` runs in evaluation mode; with keys (..., 2), one for each
        example, dropout is on and drawn from them. Its tensors have the leading axes of the inputs in front. What is
        neither a tensor nor a Python number in them (a cache) comes back as None.
        `model.init(key)` draws new parameters with each layer's own `reset_parameters`.

    Raises:
        ValueError: a batch norm in training mode, or without running statistics; a lazy layer that has seen no input;
            a layer that renormalises its weight in place or keeps vectors of a power iteration; a tensor that is kept
            in an attribute and computed from parameters. From `apply`: a forward in which examples mix, that writes to
            its parameters, decides for a batch what it would decide otherwise for an example, or calls what torch.func
            cannot differentiate; a torch function that draws random numbers of its own; parameters whose names or
            shapes are not the module's, or whose device or dtype the rest does not share; inputs with too few axes;
            keys that are not (..., 2) with the leading axes of the inputs. From `init`: a layer without
            `reset_parameters`.
        TypeError: from `apply`, if the forward returns no tensor.

    Guarantees: neither the module nor an input is changed; equal inputs give equal outputs; a batch is the stack of its
        examples; no call leaves a trace, whether it returns or raises, also in several threads.

    Cost: the first call for inputs of new shapes tries the module on batches of two and three examples. Parameters are
        stored as the module's are: where steps are compiled on a CPU, convert one of convolutions first by
        `.to(memory_format=torch.channels_last)`, or each step reorders its kernels and their gradients.

    Example:
        >>> params, model = from_module(nn.Linear(3, 2), example_ndim=1)
        >>> model.apply(params, torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    _check_module("from_module", module)
    _check_options(module, example_ndim, shared)
    _refuse(module)
    pure = _Pure(module, example_ndim, batch_axis, frozenset(shared))
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    return params, Model(lambda key: pure.quiet.reinitialised(params, key), pure.apply)


def load_into(module: nn.Module, params: Params) -> None:
    """Copies parameters into a module, in place: the way back from `from_module`.

    Args:
        module: has the parameters that `params` names, with their shapes.
        params: as `from_module(module)` gives them.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs. Nothing has been copied then.
    """
    _check_module("load_into", module)
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _check_params("load_into", {name: p.shape for name, p in own.items()}, params)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(params[name])


class _Pure:
    """A module's forward as a pure function."""

    def __init__(
        self, module: nn.Module, example_ndim: int | Mapping[str, int] | None, batch_axis: int, shared: frozenset[str]
    ) -> None:
        self.example_ndim, self.batch_axis, self.shared = example_ndim, batch_axis, shared
        self.constants = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
        self.constants |= {name: b.detach().clone() for name, b in module.named_buffers()}
        self.shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        self.quiet, self.noisy = Copies(module, training=False), Copies(module, training=True)
        self.arguments, self.open_ended = _arguments(module)
        self.signature = inspect.signature(module.forward)
        self.trials: dict[Any, Trial] = {}

    def apply(self, params: Params, *inputs: Any, key: Tensor | None = None, **named: Any) -> Any:
        """The outputs, see `from_module`."""
        _check_params("apply", self.shapes, params)
        spec, tensors, lead = self.described(inputs, named)
        if key is not None and (not isinstance(key, Tensor) or tuple(key.shape) != (*lead, 2)):
            found = tuple(key.shape) if isinstance(key, Tensor) else type(key).__name__
            raise ValueError(
                f"apply: there must be one key per example, {(*lead, 2)}. Found {found}. "
                "Is a random.split or a vmap missing?"
            )
        at = native.mapped()
        given = (*tensors, *params.values(), *(() if key is None else (key,)))
        if at[0] and not any([native.is_of_an_example(x) for x in given]):
            at = (0, 0)
        for leaf, x in zip(leaves_of(spec), tensors, strict=True):
            if leaf.shared and native.is_of_an_example(x):
                raise ValueError(f"apply: {leaf.name} is shared by all examples. Found one for each example of a vmap.")
        per_copy = math.prod(lead)
        count = max(at[1], 1) * per_copy
        whole = [
            x if leaf.shared else self.whole(x, at, count, leaf.shape)
            for leaf, x in zip(leaves_of(spec), tensors, strict=True)
        ]
        keys = None if key is None else (native.taken_out(key, at) if at[0] else key).reshape(count, 2)
        kinds = tuple([(p.dtype, str(p.device)) for p in params.values()])
        trial = self.trial(spec, kinds, key is not None, whole, lead)
        return _Call(self, params, spec, whole, trial, at, per_copy, keys).made(lead)

    def whole(self, x: Tensor, at: tuple[int, int], count: int, shape: tuple[int, ...]) -> Tensor:
        """All examples of an input, as the forward takes a batch."""
        batch = native.taken_out(x, at) if at[0] else x
        return batch.reshape(count, *shape).movedim(0, min(self.batch_axis, len(shape)))

    def described(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Spec, list[Tensor], tuple[int, ...]]:
        """The spec of a call's inputs, their tensors, and the axes that they have in front of an example's."""
        if len(inputs) > len(self.arguments) and not self.open_ended:
            raise ValueError(
                f"apply: the forward takes the inputs {self.arguments}. Found {len(inputs)}. Pass a key as "
                "key=…: it is no input."
            )
        names = [*self.arguments[: len(inputs)], *[f"input {i}" for i in range(len(self.arguments), len(inputs))]]
        leads = []
        for name, value in (*zip(names, inputs, strict=True), *named.items()):
            found: list[Tensor] = []
            described(value, name, False, 0, found)
            leads += [] if name in self.shared else [(name, x, self.ndim(name, x)) for x in found]
        lead = tuple(leads[0][1].shape[: leads[0][2]]) if leads else ()
        for name, x, axes in leads:
            if axes < 0:
                raise ValueError(f"apply: one example of {name} has {x.dim() - axes} axes. Found {tuple(x.shape)}.")
            if x.shape[:axes] != lead:
                raise ValueError(
                    f"apply: all inputs must have the same leading axes. Found {tuple(x.shape[:axes])} for {name} and "
                    f"{lead} for {leads[0][0]}. Name an input that all examples share in from_module(shared=…)."
                )
        tensors: list[Tensor] = []
        parts = [
            described(value, name, name in self.shared, len(lead), tensors)
            for name, value in (*zip(names, inputs, strict=True), *named.items())
        ]
        spec = ("tuple", tuple(parts[: len(inputs)])), ("dict", tuple(zip(named, parts[len(inputs) :], strict=True)))
        return ("tuple", spec), tensors, lead

    def ndim(self, name: str, x: Tensor) -> int:
        """How many axes an input has in front of an example's."""
        if self.example_ndim is None:
            return 0
        if isinstance(self.example_ndim, int):
            return x.dim() - self.example_ndim
        if name not in self.example_ndim:
            raise ValueError(
                f"apply: example_ndim must name each input. Found {list(self.example_ndim)}, and {name!r}."
            )
        return x.dim() - self.example_ndim[name]

    def trial(self, spec: Spec, kinds: Any, keyed: bool, whole: list[Tensor], lead: tuple[int, ...]) -> Trial:
        """What the module does with such inputs; found once."""
        if torch.compiler.is_dynamo_compiling():
            native.show_all_ops()
            found: Trial = self.tried(spec, kinds, keyed)
            return found
        numbers = [native.numbers(x) for x in whole]
        rows = [None if n is None or n.shape != x.shape else n for n, x in zip(numbers, whole, strict=True)]
        with native.outside():
            constant = tuple([is_constant(n) for n in rows])  # where a forward branches on a mask, it is on this
            key = (spec, kinds, keyed, constant)
            if key not in self.trials:
                self.trials[key] = self.hold(spec, kinds, keyed, rows, lead)
        return self.trials[key]

    @constant_to_the_compiler
    def tried(self, spec: Spec, kinds: Any, keyed: bool) -> Trial:
        """The trial of a call that is being compiled, where inputs have no numbers."""
        key = (spec, kinds, keyed)
        if key not in self.trials:
            self.trials[key] = self.hold(spec, kinds, keyed, None)
        return self.trials[key]

    def hold(
        self, spec: Spec, kinds: Any, keyed: bool, numbers: list[Tensor | None] | None, lead: tuple[int, ...] = ()
    ) -> Trial:
        rows = None
        if numbers is not None:
            rows = [
                n if n is None or leaf.shared else n.movedim(min(self.batch_axis, n.dim() - 1), 0)
                for n, leaf in zip(numbers, leaves_of(spec), strict=True)
            ]
        inputs = Inputs(spec, self.batch_axis, rows)
        like = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for (name, shape), (dtype, device) in zip(self.shapes.items(), kinds, strict=True)
        }
        copies = self.noisy if keyed else self.quiet

        def runs(spec: Spec) -> bool:
            with suppress(Exception):
                hold_trial(copies, like, self.constants, Inputs(spec, self.batch_axis))
                return True
            return False

        try:
            return hold_trial(copies, like, self.constants, inputs)
        except (RuntimeError, TypeError) as error:
            cause = self.unbound(spec) or self.moved(like, leaves_of(spec))
            cause = cause or self.integers(spec, kinds, runs) or self.misjudged(spec, lead, runs)
            if cause is None:
                raise
            raise ValueError(cause) from error

    def unbound(self, spec: Spec) -> str | None:
        """The message where the forward takes other arguments."""
        (_, positional), (_, named) = spec[1]
        try:
            self.signature.bind(*positional, **dict(named))
        except TypeError:
            found = [*self.arguments[: len(positional)], *[name for name, _ in named]]
            return f"apply: the forward takes ({', '.join(self.signature.parameters)}). Found inputs for {found}."
        return None

    def integers(self, spec: Spec, kinds: Any, runs: Callable[[Spec], bool]) -> str | None:
        """The message where the forward takes floats and gets integers."""
        found = [leaf for leaf in leaves_of(spec) if not (leaf.dtype.is_floating_point or leaf.dtype.is_complex)]
        dtype = kinds[0][0] if kinds else torch.get_default_dtype()
        if not found or not runs(with_leaves(spec, lambda leaf: leaf._replace(dtype=dtype) if leaf in found else leaf)):
            return None
        return (
            f"apply: {found[0].name} must be floats. Found {found[0].dtype}. Divide pixels by 255, or use "
            "data.normalize, which does."
        )

    def misjudged(self, spec: Spec, lead: tuple[int, ...], runs: Callable[[Spec], bool]) -> str | None:
        """The message where an example has another number of axes than `example_ndim` says."""
        own = [leaf for leaf in leaves_of(spec) if not leaf.shared]
        least = min([len(leaf.shape) for leaf in own], default=0)
        for more in sorted(range(1 - least, len(lead) + 1), key=abs):

            def resized(leaf: Leaf, more: int = more) -> Leaf:
                whole = (*lead, *leaf.shape)
                shape = whole[len(lead) - more :]
                return leaf if leaf.shared else leaf._replace(shape=shape)

            if more and runs(with_leaves(spec, resized)):
                right = resized(own[0]).shape
                said = f"example_ndim={self.example_ndim}" if self.example_ndim is not None else "without example_ndim"
                return (
                    f"apply: example_ndim must be the number of axes of one example. Found {said}, with which one "
                    f"{own[0].name} is {own[0].shape}, where the forward takes {right}. Set example_ndim={len(right)}."
                )
        return None

    def moved(self, like: Mapping[str, Tensor], inputs: list[Leaf]) -> str | None:
        """What is said where parameters, constants and inputs are of several devices or dtypes, which torch refused."""
        held = {
            "parameters": [(p.dtype, str(p.device)) for p in like.values()],
            "frozen parameters and buffers": [(c.dtype, str(c.device)) for c in self.constants.values()],
            "inputs": [(leaf.dtype, leaf.device) for leaf in inputs],
        }
        devices = {name: sorted({device for _, device in kinds}) for name, kinds in held.items() if kinds}
        dtypes = {
            name: sorted({str(dtype) for dtype, _ in kinds if dtype.is_floating_point}) for name, kinds in held.items()
        }
        for what, found in (("device", devices), ("dtype", {name: kinds for name, kinds in dtypes.items() if kinds})):
            if len({kind for kinds in found.values() for kind in kinds}) > 1:
                shown = ", ".join(f"{name} of {' and '.join(kinds)}" for name, kinds in found.items())
                return (
                    f"apply: parameters, frozen parameters, buffers and inputs must be of one {what}. Found {shown}. "
                    "Move the module before from_module, and the inputs to its parameters."
                )
        return None


class _Call:
    """One call of a forward on a batch."""

    def __init__(
        self,
        pure: _Pure,
        params: Params,
        spec: Spec,
        whole: list[Tensor],
        trial: Trial,
        at: tuple[int, int],
        per_copy: int,
        keys: Tensor | None,
    ) -> None:
        self.pure, self.params, self.spec, self.whole, self.trial = pure, params, spec, whole, trial
        self.at, self.per_copy, self.keys = at, per_copy, keys
        self.count = max(at[1], 1) * per_copy

    def made(self, lead: tuple[int, ...]) -> Any:
        """What the forward returns: of one example, or of all in their leading axes."""
        lifts = self.at[0] > 0 and (
            native.inside(native.PerExample) or any([native.is_of_an_example(p) for p in self.params.values()])
        )
        decisions: list[Any] = []
        watches = self.count > 1 and not torch.compiler.is_dynamo_compiling()
        region = Region(
            self.params.values(),
            self.trial,
            at=self.at,
            per_copy=self.per_copy,
            keys=self.keys,
            lifts=lifts,
            decided=decisions.append if watches else None,
        )
        out = self.forward(self.params, self.whole, region)
        if decisions:
            self.check(decisions, out)
        return self.handed_back(out, lead, region)

    def forward(self, params: Mapping[str, Tensor], whole: list[Tensor], region: Region) -> Any:
        written = self.trial.written
        constants = {name: c.clone() if name in written else c for name, c in self.pure.constants.items()}
        found = iter([x.clone() if i in self.trial.overwritten else x for i, x in enumerate(whole)])
        args, kwargs = rebuilt(self.spec, found)
        copies = self.pure.quiet if self.keys is None else self.pure.noisy
        with copies.lent({**constants, **params}) as module, region:
            return module(*args, **kwargs)

    def check(self, decisions: list[Any], out: Any) -> None:
        """Refuses a forward that decides for the batch what it would decide otherwise, and to effect, for an example.

        An example is run up to the last decision; where one differs, to the end.
        """
        params = {name: native.one_of(p, self.at) for name, p in self.params.items()}
        for i in range(self.count):
            alone, _ = self.single(params, i, len(decisions))
            if alone == decisions:
                continue
            _, expected = self.single(params, i, None)
            for name, x, axis, y in zip(*named(out), self.trial.outputs, named(expected)[1], strict=True):
                mine = x if axis is None else joined(split(x, axis, self.count)[i : i + 1], axis)
                if not same(mine, y, LOOSE):
                    raise ValueError(
                        "apply: a batch must be the stack of its examples. The forward branches on its data, and for "
                        f"the batch decides otherwise than for example {i} alone: output {name} differs. Write the "
                        "branch with torch.where, or apply the module to one example at a time."
                    )

    def single(self, params: Mapping[str, Tensor], i: int, decisions: int | None) -> tuple[list[Any], Any]:
        """The decisions of one example alone, and what the forward returns for it if it is run to the end."""
        made: list[Any] = []

        def decided(value: Any) -> None:
            made.append(value)
            if len(made) == decisions:
                raise _Enough

        leaves = leaves_of(self.spec)
        whole = [
            x if leaf.shared else x.narrow(min(self.pure.batch_axis, x.dim() - 1), i, 1)
            for leaf, x in zip(leaves, self.whole, strict=True)
        ]
        keys = None if self.keys is None else self.keys[i : i + 1]
        region = Region(params.values(), self.trial, at=(0, 0), per_copy=1, keys=keys, lifts=False, decided=decided)
        try:
            return made, self.forward(params, whole, region)
        except _Enough:
            return made, None

    def handed_back(self, out: Any, lead: tuple[int, ...], region: Region) -> Any:
        """The outputs of one example, or of all in their leading axes."""
        leaves, structure = pytree.tree_flatten(out)
        axes = iter(self.trial.outputs)
        back: list[Any] = []
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                back.append(leaf if isinstance(leaf, (bool, int, float, str)) else None)
                continue
            axis = next(axes)
            of_one = region.lifts and leaf in region.mine  # it is made of parameters, and for one vmapped example
            back.append(leaf if axis is None else self.of_examples(leaf, axis, lead, of_one))
        if not any([isinstance(x, Tensor) for x in back]):
            raise TypeError(
                "from_module: the forward must return tensors, or nested dicts, lists and tuples of them. Found "
                f"{type(out).__name__}."
            )
        return pytree.tree_unflatten(back, structure)

    def of_examples(self, x: Tensor, axis: Axis, lead: tuple[int, ...], of_one: bool) -> Tensor:
        parts = split(x, axis, self.per_copy if of_one else self.count)
        if axis.before * axis.after == 1:
            parts = parts.squeeze(axis.axis + 1)
        vmapped = (self.at[1],) if self.at[0] and not of_one else ()
        parts = parts.reshape((*vmapped, *lead, *parts.shape[1:]))
        return native.handed_back(parts, self.at) if vmapped else parts


class _Enough(Exception):
    """All decisions have been seen."""


def _arguments(module: nn.Module) -> tuple[list[str], bool]:
    """The names of the forward's positional arguments, and whether it takes any number of them."""
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return names, any([p.kind is p.VAR_POSITIONAL for p in parameters])


def _check_module(where: str, module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        found = module.__name__ if isinstance(module, type) else type(module).__name__
        remedy = " Call the class: its instance has the parameters." if isinstance(module, type) else ""
        raise TypeError(f"{where}: module must be an nn.Module. Found {found}.{remedy}")


def _check_options(module: nn.Module, example_ndim: int | Mapping[str, int] | None, shared: Collection[str]) -> None:
    """Refuses what no call of the forward can mean."""
    each = example_ndim if isinstance(example_ndim, Mapping) else {"": 0 if example_ndim is None else example_ndim}
    for axes in each.values():
        if not isinstance(axes, int) or axes < 0:
            raise ValueError(f"from_module: example_ndim must be a number of axes, at least 0. Found {axes!r}.")
    parameters = inspect.signature(module.forward).parameters
    if not any([p.kind is p.VAR_KEYWORD for p in parameters.values()]):
        names = (*(each if isinstance(example_ndim, Mapping) else ()), *shared)
        unknown = [name for name in names if name not in parameters]
        if unknown:
            raise ValueError(f"from_module: the forward takes ({', '.join(parameters)}). Found the names {unknown}.")


def _check_params(where: str, shapes: Mapping[str, torch.Size], params: Params) -> None:
    check_names(where, params, shapes)
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(shape)} in the module. Found {tuple(params[name].shape)}."
            )


def _refuse(module: nn.Module) -> None:
    """Refuses layers that cannot be pure, by their names."""
    for name, layer in module.named_modules():
        kind = f"layer {name!r} ({type(layer).__name__})"
        if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():  # type: ignore[misc]
            raise ValueError(f"from_module: every parameter must exist. The {kind} is lazy. Run one batch through it.")
        if isinstance(layer, _BatchNorm) and not layer.track_running_stats:
            raise ValueError(
                f"from_module: examples must not mix. The {kind} has no running statistics, so it averages over the "
                "batch. Use nn.GroupNorm instead."
            )
        if isinstance(layer, _NormBase) and layer.track_running_stats and layer.training:
            raise ValueError(
                f"from_module: examples must not mix. The {kind} is in training mode, where it averages over the batch "
                "and updates its statistics. Call eval() on it to use its running statistics, or use nn.GroupNorm."
            )
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            if layer.max_norm is not None:
                raise ValueError(
                    f"from_module: a forward may not write to its parameters. The {kind} has max_norm, with which it "
                    "renormalises rows of its weight in place. Normalise the rows after each step instead."
                )
            if layer.scale_grad_by_freq:
                raise ValueError(
                    f"from_module: examples must not mix. The {kind} has scale_grad_by_freq, with which gradients are "
                    "divided by counts over the batch. Leave it out."
                )
        hooks = layer._forward_pre_hooks.values()
        if isinstance(layer, _SpectralNorm) or any([isinstance(hook, SpectralNorm) for hook in hooks]):
            raise ValueError(
                f"from_module: a forward may not change what the next one sees. The {kind} is a spectral norm, whose "
                "power iteration keeps its vectors from call to call. Remove it (torch.nn.utils.parametrize."
                "remove_parametrizations), or bound torch.linalg.matrix_norm(weight, 2) in the loss."
            )
        if any([isinstance(hook, WeightNorm) for hook in hooks]):
            raise ValueError(
                f"from_module: a module may not keep tensors that are computed from its parameters. The {kind} has "
                "torch.nn.utils.weight_norm. Use torch.nn.utils.parametrizations.weight_norm."
            )
