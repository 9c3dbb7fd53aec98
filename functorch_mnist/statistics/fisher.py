"""The Fisher information of a classifier: the second moment of gradients of log-probabilities under the model's labels.

    F = (1 / N) Σ_i Σ_k p_ik ∇log p_ik ∇log p_ikᵀ,   p_i = softmax(outputs_i)

exactly, with one backward pass for each class k, or with labels drawn from p_i, with one backward pass for each draw.
The empirical Fisher information, of the labels of the data, is `Moments.fisher`.

Reference: Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020, sections 5 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import TypeVar

import torch
from torch import Tensor

from .. import layers, random, tree
from ..arguments import check_key, check_outputs_fn, check_params
from ..batch import check
from ..per_sample import Eigenbasis, Kronecker, Plan
from ..tree import Tree
from .folds import Gradients, fold, merge
from .gradients import Eigenvalues, KroneckerFactors, Moments

S = TypeVar("S")


def fisher_diagonal(
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    *inputs: Tensor,
    key: Tensor | None = None,
    draws: int = 1,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> Tree:
    """The diagonal of the Fisher information matrix.

    Args:
        outputs_fn: `outputs_fn(params, *input) -> (K,)`, of one example, whose softmax are the probabilities.
        params: a pytree of float tensors.
        inputs: tensors (N, …), at least one example.
        key: (2,), draws labels from the model's predictive distribution, those of an example by its position (Monte
            Carlo). Without it the expectation over labels is exact.
        draws: labels drawn per example, at least 1; above 1 it needs a key.
        mask: (N,) bool; an example with False is left out.
        chunk_size: examples taken at a time, at least 1. Memory is that of one chunk.
        plan: how `per_sample` computes each parameter; by default the cheapest way.

    Returns:
        A tree like `params`, in float64: `(1 / N) Σ_i Σ_k p_ik (∇log p_ik)²`, elementwise.

    Raises:
        ValueError: `draws` is below 1, or above it without a key, or the inputs, the outputs or the key do not fit.
        TypeError: the parameters are a module, or the key is no key.

    Guarantees: of expectation equal to the exact diagonal, with a key. The empirical Fisher information, of the labels
        of the data, is `Moments.fisher`.

    Cost: K forward and backward passes, or `draws` with a key.

    Example:
        >>> fisher_diagonal(lambda w, x: w * x, torch.zeros(2), torch.ones(1, 2))  # p (1 - p) x²
        tensor([0.2500, 0.2500], dtype=torch.float64)

    Reference: Martens, "New insights and perspectives on the natural gradient method", JMLR 21, 2020, section 5; exact
        and sampled labels: Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation", NeurIPS 2019.
    """
    moments, passes = _over_labels(Moments.of, outputs_fn, params, inputs, key, draws, mask, chunk_size, plan)
    return tree.map(lambda squares: squares * passes / moments.count, moments.squares)


def fisher_kronecker(
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    *inputs: Tensor,
    key: Tensor | None = None,
    draws: int = 1,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> dict[str, Kronecker]:
    """The Kronecker factors of the Fisher information (K-FAC).

    Args:
        outputs_fn, params, inputs, key, draws, mask, chunk_size, plan: as in `fisher_diagonal`.

    Returns:
        Per example, in float64, by the path of each parameter that has factors: `Σ_t a aᵀ` of the inputs a of its op,
        and `Σ_t g gᵀ` of the cotangents g of its outputs, over positions t.

    Raises:
        ValueError, TypeError: as in `fisher_diagonal`.

    Cost: K backward passes, or `draws` with a key.

    Reference: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML
        2015; for convolutions Grosse and Martens, ICML 2016. Both factors are sums over positions here; there that of
        the cotangents is a mean.
    """
    found, passes = _over_labels(KroneckerFactors.of, outputs_fn, params, inputs, key, draws, mask, chunk_size, plan)
    return {
        path: replace(
            pair,
            inputs=pair.inputs / found.count,
            sums=tree.map(lambda sums: sums / found.count, pair.sums),
            cotangents=pair.cotangents * passes / found.count,
        )
        for path, pair in found.sums.items()
    }


def fisher_eigenvalues(
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    *inputs: Tensor,
    bases: Mapping[str, Eigenbasis],
    key: Tensor | None = None,
    draws: int = 1,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    plan: Plan | None = None,
) -> dict[str, Tensor]:
    """The corrected eigenvalues of EK-FAC: the Fisher information's diagonal in its Kronecker factors' eigenbases.

    Args:
        outputs_fn, params, inputs, key, draws, mask, chunk_size, plan: as in `fisher_diagonal`.
        bases: by the path of a parameter, `per_sample.eigenbasis` of each of `fisher_kronecker`. Parameters without one
            have their diagonal.

    Returns:
        By path, the second moments per example along the eigenvectors: `(1 / N) Σ_i Σ_k p_ik (Uᵀ ∇log p_ik V)²`.

    Raises:
        ValueError, TypeError: as in `fisher_diagonal`.

    Cost: K backward passes, or `draws` with a key; in each, gradients are rotated into their eigenbasis.

    Reference: George et al., "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis", NeurIPS
        2018, section 3.
    """
    of = partial(Eigenvalues.of, bases=bases)
    found, passes = _over_labels(of, outputs_fn, params, inputs, key, draws, mask, chunk_size, plan)
    return {path: sums * passes / found.count for path, sums in found.sums.items()}


def _over_labels(
    of: Callable[[Gradients], S],
    outputs_fn: Callable[..., Tensor],
    params: Tree,
    inputs: tuple[Tensor, ...],
    key: Tensor | None,
    draws: int,
    mask: Tensor | None,
    chunk_size: int | None,
    plan: Plan | None,
) -> tuple[S, int]:
    """The statistic over all passes, weighted so that their second moments add up, and the number of passes."""
    check_params("statistics.fisher", params)
    check_outputs_fn("statistics.fisher", outputs_fn)
    if key is not None:
        check_key("statistics.fisher", key)
    if check("statistics.fisher", inputs, mask) < 1 or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"fisher: at least one example and one draw. Found {len(inputs[0])} and {draws}.")
    if key is None and draws != 1:
        raise ValueError(f"fisher: draws need a key. Found {draws} draws and no key.")
    count, device = len(inputs[0]), inputs[0].device
    shape = tuple(outputs_fn(params, *[x[0] for x in inputs]).shape)
    if len(shape) != 1:
        raise ValueError(f"fisher: the outputs of one example must be (K,). Found {shape}. Is it a loss?")
    columns: list[Tensor]
    if key is None:
        columns = [torch.full((count,), label, device=device) for label in range(shape[0])]
    else:
        columns = list(random.uniform(key, (draws, count)).unbind())

    def loss_fn(params: Tree, *example: Tensor) -> Tensor:
        *given, chosen = example
        log_probs = layers.log_softmax(tree.wide(outputs_fn(params, *given)))
        probs = log_probs.detach().exp()
        label = chosen if key is None else (probs.cumsum(-1) <= chosen).sum(-1).clamp(max=len(probs) - 1)
        weight = probs.gather(-1, label[None]).squeeze(-1) if key is None else 1 / draws
        return -(weight**0.5) * log_probs.gather(-1, label[None]).squeeze(-1)

    parts = [
        fold(loss_fn, params, *inputs, column, of=of, mask=mask, chunk_size=chunk_size, plan=plan) for column in columns
    ]
    return reduce(merge, parts), len(parts)
