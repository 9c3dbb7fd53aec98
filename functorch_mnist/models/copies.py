"""Copies of a module that hold no numbers: each call lends them parameters, and leaves no trace.

A forward may keep things in attributes, write to its buffers, or raise half-way; several threads may call at once; and
a submodule or a tensor may have several names. So a call has a copy to itself, every place of a tensor is filled by
the tensor's one name, and afterwards every attribute is as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.weight_norm import WeightNorm

from .. import random
from .model import Params

_OF_TORCH = set(nn.Module().__dict__)
"""The attributes that every module has."""


class Copies:
    """As many copies of one module as are in use at the same time."""

    def __init__(self, module: nn.Module, *, training: bool) -> None:
        first = _without_numbers(module).train().train(training)  # train() has caches emptied
        for layer in first.modules():
            if isinstance(layer, _NormBase):  # its statistics are constants
                layer.eval()
        self.first = _Copy(first)
        self.traced = _Copy(copy.deepcopy(self.first.module))
        self.free: list[_Copy] = []
        self.touched: set[tuple[int, str]] = set()  # a trial shows them before anything is traced

    @contextmanager
    def lent(self, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """A copy with these parameters and buffers, by their names."""
        if torch.compiler.is_dynamo_compiling():  # one at a time, and the compiler undoes what the forward sets
            self.traced.fill(tensors)
            try:
                yield self.traced.module
            finally:
                self.traced.empty()
                for index, name in self.touched:
                    self.traced.reset(index, name)
            return
        try:
            mine = self.free.pop()
        except IndexError:
            mine = _Copy(copy.deepcopy(self.first.module))
        mine.fill(tensors)
        try:
            yield mine.module
        finally:
            mine.empty()
            self.touched |= mine.restore()
            self.free.append(mine)

    def reinitialised(self, params: Params, key: Tensor) -> Params:
        """New parameters, drawn by each layer's own `reset_parameters`."""
        module = copy.deepcopy(self.first.module).to_empty(device="cpu")
        seed = int(random.bits(key))  # of the whole key: torch takes 32 bits of a seed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, layer in module.named_modules():
                if not any(p.requires_grad for p in layer.parameters(recurse=False)):
                    continue
                reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
                if reset is None:
                    raise ValueError(
                        f"init: each layer must know how to draw its parameters. Layer {name!r} "
                        f"({type(layer).__name__}) has no reset_parameters. Start from the parameters that "
                        "from_module returned."
                    )
                reset()
        fresh = dict(module.named_parameters())
        return {name: fresh[name].detach().to(old.device, old.dtype) for name, old in params.items()}


class _Copy:
    """One copy: its places for tensors, and what its attributes are between calls."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        names = {id(tensor): name for name, tensor in module.named_parameters()}
        names.update({id(tensor): name for name, tensor in module.named_buffers()})
        self.modules = list(module.modules())
        self.places: list[tuple[dict[str, Tensor | None], str, str, Tensor]] = []
        for layer in self.modules:
            holders: tuple[Any, ...] = (layer._parameters, layer._buffers)
            for own in holders:
                self.places += [(own, attribute, names[id(t)], t) for attribute, t in own.items() if t is not None]
        self.recurrent = [layer for layer in self.modules if isinstance(layer, nn.RNNBase)]
        self.attributes = [dict(layer.__dict__) for layer in self.modules]
        self.dicts = [
            {name: dict(value) for name, value in state.items() if name in _OF_TORCH and isinstance(value, dict)}
            for state in self.attributes
        ]
        self.containers = [
            (layer, name, value)
            for layer, state in zip(self.modules, self.attributes, strict=True)
            for name, value in state.items()
            if name not in _OF_TORCH and isinstance(value, (dict, list, set)) and not isinstance(layer, nn.RNNBase)
        ]

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts tensors into their places, and copies of its containers into the attributes."""
        for own, attribute, name, _ in self.places:
            own[attribute] = tensors[name]
        if self.containers:
            lent = {id(old): tensors[name] for _, _, name, old in self.places}
            for layer, name, value in self.containers:
                setattr(layer, name, _copied(value, lent))
        for layer in self.recurrent:
            layer._flat_weights = [getattr(layer, name, None) for name in layer._flat_weights_names]

    def empty(self) -> None:
        """Takes the tensors and the containers out again."""
        for own, attribute, _, old in self.places:
            own[attribute] = old
        for layer, name, value in self.containers:
            setattr(layer, name, value)
        for layer in self.recurrent:
            layer._flat_weights = []

    def reset(self, index: int, name: str) -> None:
        """One attribute of one layer as it was."""
        layer, attributes = self.modules[index], self.attributes[index]
        if name in attributes:
            setattr(layer, name, attributes[name])
        else:
            delattr(layer, name)

    def restore(self) -> set[tuple[int, str]]:
        """Every attribute as it was; which ones were not, by the numbers of their layers."""
        touched = set()
        for index, layer in enumerate(self.modules):
            attributes, dicts = self.attributes[index], self.dicts[index]
            state = layer.__dict__
            touched |= {
                (index, name) for name in state if name not in attributes or state[name] is not attributes[name]
            }
            layer.__dict__.clear()
            layer.__dict__.update(attributes)
            for name, items in dicts.items():
                held = attributes[name]
                if held != items:
                    held.clear()
                    held.update(items)
        return touched


def _copied(value: Any, lent: dict[int, Tensor]) -> Any:
    """Copies of nested containers, with lent tensors where they hold parameters."""
    if isinstance(value, dict):
        fresh = {} if type(value) is dict else copy.copy(value)
        for name, part in value.items():
            fresh[name] = _copied(part, lent)
        return fresh
    if type(value) in (list, set, tuple):
        return type(value)([_copied(part, lent) for part in value])
    return lent.get(id(value), value)


_STALE = object()


def _without_numbers(module: nn.Module) -> nn.Module:
    """A copy with the same structure and ties whose parameters and buffers hold no numbers."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for name, layer in module.named_modules():
        for attribute, value in layer.__dict__.items():
            if isinstance(value, Tensor) and value.grad_fn is not None and id(value) not in memo:
                old = any([isinstance(hook, WeightNorm) for hook in layer._forward_pre_hooks.values()])
                kind = f"layer {name!r} ({type(layer).__name__})"
                remedy = (
                    "Use torch.nn.utils.parametrizations.weight_norm."
                    if old
                    else "Delete it; a forward makes it again."
                )
                what = (
                    "torch.nn.utils.weight_norm keeps the weight of" if old else f"attribute {attribute!r} is kept by"
                )
                raise ValueError(
                    f"from_module: a module may not keep tensors that are computed from its parameters. Found that "
                    f"{what} {kind}. {remedy}"
                )
            if _keeps_computed(value, memo):
                raise ValueError(
                    "from_module: a module may not keep tensors that are computed from its parameters. Found some in "
                    f"attribute {attribute!r} of layer {name!r} ({type(layer).__name__}). Delete them; a forward makes "
                    "them again."
                )
        for attribute, buffer in layer.named_buffers(recurse=False):
            if buffer.grad_fn is not None:
                raise ValueError(
                    "from_module: a module may not keep tensors that are computed from its parameters. Found buffer "
                    f"{attribute!r} of layer {name!r} ({type(layer).__name__}). Compute it in the forward."
                )
    made = copy.deepcopy(module, memo)
    for layer in made.modules():
        for value in layer.__dict__.values():
            _leave_out_stale(value)
    return made


def _keeps_computed(value: Any, memo: dict[int, Any]) -> bool:
    """Whether nested containers keep tensors that are computed from parameters; those in dicts are marked stale."""
    if isinstance(value, dict):
        parts = []
        for part in value.values():
            if isinstance(part, Tensor) and part.grad_fn is not None and id(part) not in memo:
                memo[id(part)] = _STALE
            elif not isinstance(part, Tensor):
                parts.append(part)
        return any([_keeps_computed(part, memo) for part in parts])
    if isinstance(value, (list, tuple, set)):
        tensors = [part for part in value if isinstance(part, Tensor)]
        computed = any([part.grad_fn is not None for part in tensors])
        return computed or any([_keeps_computed(part, memo) for part in value if not isinstance(part, Tensor)])
    return False


def _leave_out_stale(value: Any) -> None:
    if isinstance(value, dict):
        for name in [name for name, part in value.items() if part is _STALE]:
            del value[name]
        for part in value.values():
            _leave_out_stale(part)
    if isinstance(value, (list, tuple)):
        for part in value:
            _leave_out_stale(part)
