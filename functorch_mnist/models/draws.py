"""Random functions of a module: drawn from the key of each example, or refused."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..decompositions import decomposition

_ELEMENT_DROPOUT = {F.dropout, torch.dropout}
_CHANNEL_DROPOUT = {F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}
_FILLED = {Tensor.bernoulli_, Tensor.bernoulli, torch.bernoulli, torch.rand, torch.rand_like}
_NAMES = (
    "_sample_dirichlet", "_standard_gamma", "binomial", "cauchy", "exponential", "fractional_max_pool2d",
    "fractional_max_pool2d_with_indices", "fractional_max_pool3d", "fractional_max_pool3d_with_indices", "geometric",
    "gumbel_softmax", "lobpcg", "log_normal", "multinomial", "normal", "pca_lowrank", "poisson",
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
}  # fmt: skip
"""Functions that are random if all these arguments, given by position, name and default, are true; refused then."""
_DROPOUT, _RECURRENT = (5, "dropout", 0), (6, "train", False)
_DRAWING_INSIDE: dict[Any, tuple[tuple[int, str, float], ...]] = {
    F.scaled_dot_product_attention: ((4, "dropout_p", 0),),
    F.multi_head_attention_forward: ((10, "dropout_p", 0), (13, "training", True)),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), (_DROPOUT, _RECURRENT)),
}
"""The same for ops that draw dropout of their own: they are decomposed, so that it is seen."""
_RANDOM = dict.fromkeys(
    (*_ALWAYS_RANDOM, *_RANDOM_IF, *_DRAWING_INSIDE, *_ELEMENT_DROPOUT, *_CHANNEL_DROPOUT, *_FILLED)
)  # a dict: the compiler does not find every function of Python in a set
"""All functions that may be random."""


def draws_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a function of torch draws from the global generator."""
    if func not in _RANDOM:
        return False
    if func in _ELEMENT_DROPOUT or func in _CHANNEL_DROPOUT:
        rate = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
        return bool(rate and training)
    if func in _ALWAYS_RANDOM or func in _FILLED:
        return True
    return _is_on(_RANDOM_IF.get(func), args, kwargs) or _is_on(_DRAWING_INSIDE.get(func), args, kwargs)


class Drawing(TorchFunctionMode):
    """Sees each op of a module's forward; subclasses say what a draw is, and how other ops run."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _RANDOM:
            return self.run(func, args, kwargs)
        if func in _ALWAYS_RANDOM or _is_on(_RANDOM_IF.get(func), args, kwargs):
            raise ValueError(
                f"apply: random numbers must come from the key. The module calls {func.__name__}, which draws from the "
                "global generator."
            )
        if _is_on(_DRAWING_INSIDE.get(func), args, kwargs):
            simpler = decomposition(func)
            if simpler is not None:
                with self:
                    return simpler(*args, **kwargs)
        if func in _ELEMENT_DROPOUT:
            return self._dropout(func, None, *args, **kwargs)
        if func in _CHANNEL_DROPOUT:
            return self._dropout(func, _CHANNEL_DROPOUT[func], *args, **kwargs)
        if func in _FILLED:
            return self._filled(func, args, kwargs)
        return self.run(func, args, kwargs)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other op."""
        raise NotImplementedError

    def dropped(self, input: Tensor, rate: float, batched_ndim: int | None) -> Tensor:
        """`input` under dropout: of numbers, or of the channels of an input with that many axes."""
        raise NotImplementedError

    def uniform(self, like: Tensor, name: str) -> Tensor:
        """Numbers in [0, 1), shaped as `like`."""
        raise NotImplementedError

    def _dropout(
        self,
        func: Any,  # noqa: ARG002
        batched_ndim: int | None,
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
        *,
        train: bool = True,
    ) -> Tensor:
        if not (training and train) or p == 0:
            return input
        dropped = torch.zeros_like(input) if p == 1 else self.dropped(input, p, batched_ndim)
        return input.copy_(dropped) if inplace else dropped

    def _filled(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """Functions that fill a tensor with draws of its own."""
        if func is torch.rand:
            return self.uniform(torch.zeros(*args, **kwargs), "rand")
        if func is torch.rand_like:
            return self.uniform(torch.zeros_like(*args, **kwargs), "rand_like")
        if func is Tensor.bernoulli_:
            input, p = args[0], (*args[1:], kwargs.get("p", 0.5))[0]
            written: Tensor = input.copy_(self.uniform(input, "bernoulli_") < p)
            return written
        chances: Tensor = args[0]
        p = (*args[1:], kwargs.get("p"))[0]
        return (self.uniform(chances, "bernoulli") < (chances if p is None else p)).to(chances.dtype)


def channels(x: Tensor, batched_ndim: int) -> tuple[int, ...]:
    """The shape of a mask over the channels of `x`, which is (N, C, …) or (C, …)."""
    lead = 2 if x.dim() == batched_ndim else 1
    return (*x.shape[:lead], *[1] * (x.dim() - lead))


def _is_on(switches: tuple[tuple[int, str, float], ...] | None, args: Any, kwargs: Any) -> bool:
    return switches is not None and all(
        [args[at] if at < len(args) else kwargs.get(name, default) for at, name, default in switches]
    )
