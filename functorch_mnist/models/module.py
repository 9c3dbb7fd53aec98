"""Any `nn.Module` as a pure model, and back.

The module is copied without its numbers; the copy is only ever run through `torch.func.functional_call`, which lends
it the parameters that `apply` is given. A `TorchFunctionMode` finds the random functions: it draws dropout from the
key, and refuses what would draw from the global generator.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from .. import layers, random
from .model import Model, Params


def from_module(module: nn.Module, *, example_ndim: int | None = None) -> tuple[Params, Model]:
    """The parameters of a module, and the module as a pure model.

    Args:
        module: any module whose forward takes one tensor with a leading batch axis and returns one. It is not changed.
            Python attributes that a forward sets are not supported: they are not kept.
        example_ndim: number of axes of one example. With it `apply` takes any leading axes; without it `apply` takes
            exactly one example, to be batched with `vmap`.

    Returns:
        `(params, model)`. `params` holds a detached copy of each parameter that requires a gradient, under its
        `named_parameters` name, tied ones once. Frozen parameters and buffers are constants of the model.
        `model.apply(params, x)` runs in evaluation mode; with a key, dropout is on and drawn from it.
        `model.init(key)` draws new parameters with each layer's own `reset_parameters`.

    Raises:
        ValueError: a batch norm in training mode, or without running statistics; a lazy layer that has seen no input.
            From `apply`: a torch function that draws random numbers of its own; parameters whose names or shapes are
            not the module's; an `x` with too few axes; keys that are not (..., 2) with the leading axes of `x`. From
            `init`: a layer without `reset_parameters`.
        TypeError: from `apply`, if the module returns anything but one tensor.

    Guarantees: neither the module nor `x` is changed; equal inputs give equal outputs.

    Example:
        >>> params, model = from_module(nn.Linear(3, 2), example_ndim=1)
        >>> model.apply(params, torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """
    _refuse_mixing_layers(module)
    params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    constants = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    constants |= {name: b.detach().clone() for name, b in module.named_buffers()}
    shapes = {name: p.shape for name, p in params.items()}
    quiet, noisy = _skeleton(module).eval(), _skeleton(module).train()
    for layer in noisy.modules():
        if isinstance(layer, _NormBase):
            layer.eval()

    def call(skeleton: nn.Module, params: Params, x: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in constants.items()}  # a forward may write to its buffers
        outputs = functional_call(skeleton, (params, buffers), (x.clone(),))  # and to its input
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"from_module: the forward must return one tensor. Found {type(outputs).__name__}. Wrap the module."
            )
        return outputs

    def one(params: Params, x: Tensor, key: Tensor | None) -> Tensor:
        with _KeyedRandomness(key):
            return call(quiet if key is None else noisy, params, x[None])[0]

    def apply(params: Params, x: Tensor, key: Tensor | None = None) -> Tensor:
        _check_params("apply", shapes, params)
        if x.dim() < (example_ndim or 0):
            raise ValueError(f"apply: one example has {example_ndim} axes. Found an x of {tuple(x.shape)}.")
        lead = x.shape[: x.dim() - example_ndim] if example_ndim is not None else ()
        if key is not None:
            _refuse_hidden_dropout(noisy)
            if key.shape != (*lead, 2):
                raise ValueError(
                    f"apply: there must be one key per example, {(*lead, 2)}. Found {tuple(key.shape)}. "
                    "Is a random.split or a vmap missing?"
                )
        if not lead:
            return one(params, x, key)
        examples = x.flatten(0, len(lead) - 1)
        if key is None or 0 in lead:  # vmap over no example fails in torch; there is nothing to drop either
            with _KeyedRandomness(None):
                outputs = call(quiet, params, examples)
        else:
            outputs = vmap(one, in_dims=(None, 0, 0))(params, examples, key.reshape(-1, 2))
        return outputs.reshape(*lead, *outputs.shape[1:])

    return params, Model(lambda key: _reinitialised(quiet, params, key), apply)


def load_into(module: nn.Module, params: Params) -> None:
    """Copies parameters into a module, in place: the way back from `from_module`.

    Args:
        module: has the parameters that `params` names, with their shapes.
        params: as `from_module(module)` gives them.

    Raises:
        ValueError: a name is missing or unexpected, or a shape differs. Nothing has been copied then.
    """
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _check_params("load_into", {name: p.shape for name, p in own.items()}, params)
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(params[name])


def _check_params(where: str, shapes: dict[str, torch.Size], params: Params) -> None:
    if params.keys() != shapes.keys():
        missing, unexpected = sorted(shapes.keys() - params.keys()), sorted(params.keys() - shapes.keys())
        raise ValueError(f"{where}: the names must be the module's. Missing {missing}, unexpected {unexpected}.")
    for name, shape in shapes.items():
        if params[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has shape {tuple(shape)} in the module. Found {tuple(params[name].shape)}."
            )


def _refuse_mixing_layers(module: nn.Module) -> None:
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


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy with the same structure and ties whose parameters and buffers hold no numbers."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)


def _reinitialised(skeleton: nn.Module, params: Params, key: Tensor) -> Params:
    module = copy.deepcopy(skeleton).to_empty(device="cpu")
    seed = int(key[..., 0]) << 32 | (int(key[..., 1]) & 0xFFFFFFFF)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in module.named_modules():
            if not any(p.requires_grad for p in layer.parameters(recurse=False)):
                continue
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if reset is None:
                raise ValueError(
                    f"init: each layer must know how to draw its parameters. Layer {name!r} ({type(layer).__name__}) "
                    "has no reset_parameters. Start from the parameters that from_module returned."
                )
            reset()
    fresh = dict(module.named_parameters())
    return {name: fresh[name].detach().to(old.device, old.dtype) for name, old in params.items()}


def _refuse_hidden_dropout(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        hidden = isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)) and layer.dropout > 0
        if hidden:
            raise ValueError(
                f"apply: random numbers must come from the key. Layer {name!r} ({type(layer).__name__}) draws its own "
                "dropout. Set its dropout to 0."
            )


_ELEMENT_DROPOUT = {F.dropout, torch.dropout}
_CHANNEL_DROPOUT = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}
_NAMES = (
    "_sample_dirichlet", "_standard_gamma", "bernoulli", "binomial", "cauchy", "exponential", "fractional_max_pool2d",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d", "fractional_max_pool3d_with_indices", "geometric",
    "gumbel_softmax", "lobpcg", "log_normal", "multinomial", "normal", "pca_lowrank", "poisson", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "random", "randperm", "svd_lowrank", "uniform",
)  # fmt: skip
_SPELLINGS = [(space, name + ending) for space in (torch, Tensor, F) for name in _NAMES for ending in ("", "_")]
_ALWAYS_RANDOM = {getattr(space, name) for space, name in _SPELLINGS if callable(getattr(space, name, None))}
_TRAIN, _TRAINING, _RRELU = (2, "train", False), (2, "training", False), (3, "training", False)
_RANDOM_IF: dict[Any, tuple[tuple[int, str, float], ...]] = {
    F.alpha_dropout: (_TRAINING,), F.feature_alpha_dropout: (_TRAINING,),
    F.rrelu: (_RRELU,), torch.rrelu: (_RRELU,), torch.rrelu_: (_RRELU,),
    torch.alpha_dropout: (_TRAIN,), torch.alpha_dropout_: (_TRAIN,), torch.dropout_: (_TRAIN,),
    torch.feature_alpha_dropout: (_TRAIN,), torch.feature_alpha_dropout_: (_TRAIN,), torch.feature_dropout: (_TRAIN,),
    torch.feature_dropout_: (_TRAIN,), torch.native_dropout: (_TRAIN,),
    F.scaled_dot_product_attention: ((4, "dropout_p", 0),),
    F.multi_head_attention_forward: ((10, "dropout_p", 0), (13, "training", True)),
}  # fmt: skip
"""Functions that are random if all these arguments, given by position, name and default, are true."""


class _KeyedRandomness(TorchFunctionMode):
    """Draws the n-th dropout of a forward from `fold_in(key, n)`; refuses all other randomness, and all without one."""

    def __init__(self, key: Tensor | None) -> None:
        super().__init__()
        self.keys = None if key is None else self._stream(key)

    @staticmethod
    def _stream(key: Tensor) -> Iterator[Tensor]:
        n = 0
        while True:
            yield random.fold_in(key, n)
            n += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        switches = () if func in _ALWAYS_RANDOM else _RANDOM_IF.get(func)
        if switches is not None and all(
            args[position] if position < len(args) else kwargs.get(name, default)
            for position, name, default in switches
        ):
            raise ValueError(
                f"apply: random numbers must come from the key. The module calls {func.__name__}, which draws from the "
                "global generator."
            )
        if func in _ELEMENT_DROPOUT:
            return self._drop(lambda x: x.shape, *args, **kwargs)
        if func in _CHANNEL_DROPOUT:
            return self._drop(lambda x: _channels(x, _CHANNEL_DROPOUT[func]), *args, **kwargs)
        return func(*args, **kwargs)

    def _drop(
        self,
        shape_of: Any,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        *,
        train: bool = True,
    ) -> Tensor:
        if not (training and train) or p == 0:
            return input
        if self.keys is None:
            raise ValueError(
                "apply: without a key nothing may be random. The module calls a dropout function in evaluation mode. "
                "Pass it training=self.training?"
            )
        dropped = torch.zeros_like(input) if p == 1 else layers.drop(input, next(self.keys), shape_of(input), rate=p)
        return input.copy_(dropped) if inplace else dropped


def _channels(x: Tensor, batched_ndim: int) -> tuple[int, ...]:
    """The shape of a mask over the channels of `x`, which is (N, C, …) or (C, …)."""
    lead = 2 if x.dim() == batched_ndim else 1
    return (*x.shape[:lead], *[1] * (x.dim() - lead))
