"""Canaries in a private training run, for one-run auditing: `privacy.lower_bound`.

A canary is an additional example. Its loss is linear in its own parameter, next to the model's parameters, so that its
gradient e_i is orthogonal to all others and far longer than the clipping norm C. It is sampled, clipped, summed and
noised like any example. Of the release of step t, x_t = n (mean gradient)_i / C is a sufficient statistic of it:

    x_t ~ N(d b_t, σ²),    b_t = 1 with probability q where canary i is included, else 0

with d ≤ 1, the norm of a clipped canary over C. So no attack is better than the likelihood ratio:

    score_i = Σ_t log(1 - q + q exp((2 d x_t - d²) / 2σ²))

The canaries do not affect the model: no other example has a gradient along e_i, nor a canary one along the model's
parameters. The audit covers the code of the run, sampling, clipping, sums, noise and accountant, in coordinates of its
own; that the model's gradients are clipped by their true norms is covered by other tests.

Its power falls with q, for ε at a small δ is then that of rare draws. At ε = 4, δ = 1e-5, ten runs with 1,000 canaries
gave `LowerBound.independent` of on average 0.81 ε at q = 1, 0.68 at 0.1 and 0.55 at 0.02 with ten draws of each canary,
and 0.12 at 0.004 with one draw; for the other bounds see `benchmarks/studies/audit.py`.

Reference: Nasr et al., "Tight auditing of differentially private machine learning", USENIX Security 2023, section 4
    (Dirac canaries); Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import random, tree
from ..arguments import check_key, check_tensors
from ..batch import check
from ..optim import Optimizer
from ..privacy import Clipping, LowerBound, Mechanism, lower_bound
from ..privacy.clipping import check_clipping
from ..privacy.mechanism import check_mechanism
from ..tree import Tree
from .step import State, check_is_state, check_loss, check_optimizer

LENGTHS = (100.0, 0.99)
"""Norms of a canary's gradient, in clipping norms. The first shows missing clipping; the second is for rules that drop
long gradients."""


class CanaryParams(NamedTuple):
    """The parameters of a run with canaries."""

    model: Tree
    """The model's."""
    canaries: Tensor
    """(m, 1): the canaries' parameters, always zero."""


class CanaryState(NamedTuple):
    """The optimizer's state in a run with canaries."""

    optimizer: Tree
    """The state of the model's optimizer."""
    scores: Tensor
    """(m,): the log likelihood ratio of each canary over all steps so far."""


@dataclass(frozen=True)
class CanaryRun:
    """The loss, parameters, optimizer and examples of a private run with canaries, from `plant_canaries`."""

    loss_fn: Callable[..., Tensor]
    """`loss_fn(params, *example, key) -> ()`, of the model and of the canaries."""
    params: CanaryParams
    """The parameters of the model and of the canaries."""
    optimizer: Optimizer
    """The model's optimizer, which also accumulates the canaries' scores."""
    examples: tuple[Tensor, ...]
    """Tensors (N + m, …), and the canary of each row, (N + m,) int64: -1 for an ordinary example."""
    included: Tensor
    """(m,) bool: the coins, whether each canary is included."""

    def lower_bound(self, state: State, *, delta: float = 1e-5, confidence: float = 0.95) -> LowerBound:
        """The lower bound on ε that a run shows: `privacy.lower_bound` of the scores in its last state.

        Args:
            state: after `fit_private`.
            delta: δ in (0, 1), at which ε is reported.
            confidence: of each bound, in (0, 1).

        Returns:
            Lower bounds under three assumptions.

        Raises:
            TypeError: `state` is no training state of a run with canaries.
            ValueError: it is of other canaries.
        """
        check_is_state("lower_bound", state)
        kept, count = state.optimizer, len(self.included)
        if not isinstance(kept, CanaryState):
            raise TypeError(
                f"lower_bound: the state must be of a run with canaries. Found {type(kept).__name__} in "
                "state.optimizer. Train with the params, optimizer and examples of plant_canaries."
            )
        if kept.scores.shape != self.included.shape:
            raise ValueError(
                f"lower_bound: the state must be of this run, with {count} canaries. "
                f"Found {len(kept.scores)}. Is it of another run?"
            )
        return lower_bound(state.optimizer.scores, self.included, delta=delta, confidence=confidence)


def plant_canaries(
    loss_fn: Callable[..., Tensor],
    params: Tree,
    optimizer: Optimizer,
    examples: Sequence[Tensor],
    *,
    clipping: Clipping,
    mechanism: Mechanism,
    canaries: int = 1000,
    key: Tensor,
) -> CanaryRun:
    """Inserts canaries into a private training run, for one-run auditing.

    Args:
        loss_fn: `loss_fn(params, *example, key) -> ()`, as for `make_private_step`.
        params: the model's parameters, a pytree of float tensors.
        optimizer: the model's optimizer.
        examples: a tuple of tensors (N, …).
        clipping: the rule of the run, which must not adapt. For `PerGroup` the canaries are the group `canaries`, and
            the paths of the model's parameters begin with `model/`.
        mechanism: of the run, whose step is made for the N + m rows.
        canaries: m, the number of canaries, at least 2.
        key: (2,), of the coins: not from the run's secret, for coins must be independent of its noise.

    Returns:
        Loss, parameters, optimizer and examples for `make_private_step`, `init_private_state` and `fit_private`. The
        model is `state.params.model`. The row of an excluded canary has no gradient, so that the number of rows carries
        no information.

    Raises:
        ValueError: the rule adapts, or drops every canary; there are fewer than 2 canaries; examples have no row, or
            differ in their number.
        TypeError: `examples` is one tensor, or another argument is of a wrong kind.

    Guarantees: ε of the run is ε of a canary. The model is trained as without canaries: its mean gradient is over the
        expected number of the N examples, and has the same noise.

    Cost: q m more rows of a step, through the model as well, and m more parameters.

    Example:
        >>> from functorch_mnist import optim, privacy
        >>> clipping, mechanism, optimizer = privacy.Flat(1.0), privacy.Poisson(0.5, 10.0), optim.sgd(0.1)
        >>> run = plant_canaries(
        ...     lambda w, x, key: (w - x) ** 2, torch.tensor(0.0), optimizer, (torch.ones(8),), clipping=clipping,
        ...     mechanism=mechanism, key=random.key(0),
        ... )
        >>> run.included[:3], run.examples[1][[0, 8, 9, 10]]
        (tensor([False, False,  True]), tensor([  -1, 1000, 1000,    2]))

    Reference: Steinke, Nasr, Jagielski, "Privacy auditing with one (1) training run", NeurIPS 2023; Dirac canaries:
        Nasr et al., "Tight auditing of differentially private machine learning", USENIX Security 2023, section 4.
    """
    check_optimizer("plant_canaries", optimizer)
    check_tensors("plant_canaries", "examples", examples)
    check_clipping("plant_canaries", clipping)
    check_mechanism("plant_canaries", mechanism)
    check_key("plant_canaries", key)
    if canaries < 2:
        raise ValueError(f"plant_canaries: at least 2 canaries. Found {canaries}.")
    if tree.leaves(clipping.init()):
        raise ValueError(f"plant_canaries: the clipping norm must be the same in all steps. Found {clipping!r}.")
    ordinary, device = check("plant_canaries", examples, None), examples[0].device
    if ordinary == 0:
        raise ValueError("plant_canaries: there must be an example. Found none.")
    check_loss("plant_canaries", "loss_fn", loss_fn, (*examples, key[None]))
    both = CanaryParams(params, torch.zeros(canaries, 1, device=device))
    length, kept = _length(both, clipping)
    included = random.bernoulli(key, 0.5, (canaries,)).to(device)
    places = torch.arange(canaries, device=device)
    numbers = torch.cat(
        [places.new_full((ordinary,), -1), torch.where(included, places, canaries)]
    )  # an excluded canary has the number m, which no canary has
    with_canaries = (*[torch.cat([rows, rows[places % ordinary]]) for rows in examples], numbers)

    def loss(params: CanaryParams, *example: Tensor) -> Tensor:
        *own, number, key = example
        line = length * F.embedding(number.clamp(0, canaries - 1), params.canaries)[0]
        of_canary = torch.where(number < canaries, line, 0.0)
        return torch.where(number < 0, loss_fn(params.model, *own, key), of_canary)

    scored = _scoring(optimizer, clipping, mechanism, ordinary, canaries, kept)
    return CanaryRun(loss, both, scored, with_canaries, included)


def _scoring(
    optimizer: Optimizer, clipping: Clipping, mechanism: Mechanism, ordinary: int, canaries: int, kept: float
) -> Optimizer:
    """The model's optimizer, extended by the canaries' scores."""
    rate, rows = mechanism.sampling_rate, ordinary + canaries
    sigma, _ = clipping.deviations(mechanism.noise_multiplier)
    unit = rate * rows / clipping.sensitivity()
    missed = math.log1p(-rate) if rate < 1 else -math.inf

    def update(params: CanaryParams, state: CanaryState, grads: CanaryParams) -> tuple[CanaryParams, CanaryState]:
        own = tree.map(lambda g: g * (rows / ordinary), grads.model)
        model, inner = optimizer.update(params.model, state.optimizer, own)
        seen = unit * grads.canaries[:, 0]
        drawn = math.log(rate) + (2 * kept * seen - kept**2) / (2 * sigma**2)
        ratio = torch.logaddexp(drawn, torch.full_like(drawn, missed))
        return CanaryParams(model, params.canaries), CanaryState(inner, state.scores + ratio)

    return Optimizer(lambda params: CanaryState(optimizer.init(params.model), params.canaries[:, 0].clone()), update)


def _length(params: CanaryParams, clipping: Clipping) -> tuple[float, float]:
    """The norm of a canary's gradient, and its norm when clipped, the latter in units of the sensitivity."""
    most = float(clipping.sensitivity())

    def kept(length: float) -> float:
        norms = CanaryParams(tree.map(lambda w: w.new_zeros(1), params.model), params.canaries.new_full((1,), length))
        return length * float(clipping.factors(norms).canaries[0]) / most

    length = max((most * one for one in LENGTHS), key=kept)
    if kept(length) == 0:
        raise ValueError(f"plant_canaries: the rule must leave something of a canary. Found {clipping!r}.")
    return length, kept(length)
