"""Clipping rules: how much of its gradient an example keeps, and by how much it can then move the sum.

With ∇_i the gradient of example i, ∇_i^k its part in group k of the parameters, a rule gives each part a factor

    Flat         s_i   = min(1, C / |∇_i|)                          Abadi et al. 2016
    Automatic    s_i   = C / (|∇_i| + γ)                            Bu et al. 2023
    Global       s_i   = 1 where |∇_i| ≤ C, else 0                  Bu et al. 2021
    PerLayer     s_i^k = min(1, C_k / |∇_i^k|), C_k = C / √K        McMahan et al. 2018
    PerGroup     the same, with any C_k
    Quantile     Flat, whose C follows a quantile of the norms      Andrew et al. 2021

and carries its sensitivity, the largest norm that `Σ_i s_i ∇_i` can change by when an example comes or goes: C, and for
groups √(Σ C_k²). An example whose gradient is not finite gets zero from every rule.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tree
from ..arguments import shown
from ..tree import Tree


class Clipping:
    """A rule. It is a value: what evolves is a state that it makes and is given."""

    def init(self) -> Tree:
        """What evolves: nothing, for a rule that does not adapt."""
        return ()

    def sensitivity(self, state: Tree = ()) -> float | Tensor:
        """The largest norm by which one example can change the sum of clipped gradients."""
        raise NotImplementedError

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:
        """What each example's gradient is multiplied by.

        Args:
            norms: the norm of each parameter's part of ∇_i: a tree like the parameters with leaves (B,), finite.
            state: of the rule.

        Returns:
            The factors of the parts: a tree with leaves (B,).

        Raises:
            ValueError: the rule's groups do not fit the parameters.
        """
        raise NotImplementedError

    def votes(self, norms: Tree, state: Tree = ()) -> Tensor:  # noqa: ARG002
        """What each example adds to the second thing that a step releases, for the rule to adapt to: (B, V).

        One example's row has norm 1/2 at most.
        """
        leaf = tree.leaves(norms)[0]
        return leaf.new_zeros(len(leaf), 0)

    def deviations(self, noise_multiplier: float | Tensor) -> tuple[float | Tensor, float]:
        """How the noise of a step is divided between what it releases.

        Args:
            noise_multiplier: of all that a step releases together.

        Returns:
            The noise multiplier of the gradients, above the whole one where there are votes, and the standard deviation
            of the noise on the sum of votes.

        Raises:
            ValueError: there is not enough noise for both.
        """
        return noise_multiplier, 0.0

    def adapt(self, state: Tree, votes: Tensor) -> Tree:  # noqa: ARG002
        """The state for the next step, from the noisy mean of the votes (V,)."""
        return state


@dataclass(frozen=True)
class Flat(Clipping):
    """Gradients longer than `max_norm` are scaled down to it.

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """

    max_norm: float | Tensor
    """C, above 0, or a 0-d tensor, whose value is not read: so many runs differ in it under `vmap`."""

    def __post_init__(self) -> None:
        if not (isinstance(self.max_norm, Tensor) and self.max_norm.shape == ()):
            _check_norm("Flat", self.max_norm)

    def sensitivity(self, state: Tree = ()) -> float | Tensor:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        return _everywhere(norms, lambda whole: _scale(self.max_norm, whole))


@dataclass(frozen=True)
class Automatic(Clipping):
    """Every gradient is scaled to a norm just below `max_norm`, however long it was: there is no norm to tune.

    Reference: Bu, Wang, Zha, Karypis, "Automatic clipping: differentially private deep learning made easier and
        stronger", NeurIPS 2023, equation 4.
    """

    max_norm: float = 1.0
    """C, above 0: it scales gradients and noise alike."""
    gamma: float = 0.01
    """γ, above 0: gradients shorter than this stay short."""

    def __post_init__(self) -> None:
        _check_norm("Automatic", self.max_norm)
        _check_norm("Automatic", self.gamma, "gamma")

    def sensitivity(self, state: Tree = ()) -> float:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        return _everywhere(norms, lambda whole: self.max_norm / (whole + self.gamma) * _margin(whole))


@dataclass(frozen=True)
class Global(Clipping):
    """Gradients up to `max_norm` stay as they are, and longer ones are left out.

    Reference: Bu, Dong, Long, Su, "On the convergence and calibration of deep learning with differential privacy", TMLR
        2023 (arXiv 2106.07830), section 4.
    """

    max_norm: float
    """C, above 0."""

    def __post_init__(self) -> None:
        _check_norm("Global", self.max_norm)

    def sensitivity(self, state: Tree = ()) -> float:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        return _everywhere(norms, lambda whole: (whole <= self.max_norm * _margin(whole)).to(whole.dtype))


@dataclass(frozen=True)
class PerLayer(Clipping):
    """Each layer's part of a gradient is clipped on its own; all layers have the same share of `max_norm`.

    The parameters of a layer have one path but for its last part, such as `conv1.weight` and `conv1.bias`.

    Reference: McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models", ICLR 2018,
        section 3.
    """

    max_norm: float
    """C, above 0, of all layers together: each of K has C / √K."""

    def __post_init__(self) -> None:
        _check_norm("PerLayer", self.max_norm)

    def sensitivity(self, state: Tree = ()) -> float:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        layers = [path[: max(path.rfind("."), path.rfind("/"), 0)] or path for path in tree.paths(norms)]
        share = self.max_norm / math.sqrt(len(set(layers)))
        return _by_group(norms, layers, dict.fromkeys(layers, share))


@dataclass(frozen=True)
class PerGroup(Clipping):
    """Each group's part of a gradient is clipped to a norm of its own.

    Example:
        >>> rule = PerGroup({"conv1": 3.0, "fc": 4.0})
        >>> rule.sensitivity()
        5.0
    """

    max_norms: Mapping[str, float]
    """C_k, above 0, by how the paths of the group's parameters begin. A parameter is in the group with the longest
    beginning that fits; `""` fits all."""

    def __post_init__(self) -> None:
        if not self.max_norms:
            raise ValueError("PerGroup: there must be a group. Found none.")
        for prefix, max_norm in self.max_norms.items():
            _check_norm("PerGroup", max_norm, f"the max_norm of {prefix!r}")

    def sensitivity(self, state: Tree = ()) -> float:  # noqa: ARG002
        return math.hypot(*self.max_norms.values())

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        paths, prefixes = tree.paths(norms), sorted(self.max_norms, key=len)
        groups = []
        for path in paths:
            fitting = [prefix for prefix in prefixes if path.startswith(prefix)]
            if not fitting:
                raise ValueError(f"PerGroup: every parameter must be in a group. Found {path!r}, groups {prefixes}.")
            groups.append(fitting[-1])
        if set(groups) != set(prefixes):
            empty = sorted(set(prefixes) - set(groups))
            raise ValueError(f"PerGroup: every group must have a parameter. Found {empty} without, parameters {paths}.")
        return _by_group(norms, groups, self.max_norms)


@dataclass(frozen=True)
class Quantile(Clipping):
    """Flat clipping whose norm follows a quantile of the norms, which is itself released with noise.

        b = (Σ_i ([|∇_i| ≤ C] - 1/2) + N(0, σ_b²)) / expected batch + 1/2,    C ← C exp(-lr (b - quantile))

    The votes take a part of the step's noise multiplier σ, so the gradients get `σ_Δ = (σ⁻² - (2 σ_b)⁻²)^(-1/2)`, and
    the two together cost what one Gaussian of σ costs. The noisy b is taken as a part, in [0, 1], and C stays within
    bounds, so that no noise and no quantile takes it to zero or beyond all numbers.

    Reference: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS
        2021, algorithm 1 and theorem 1.
    """

    quantile: float
    """γ in [0, 1]: the part of the gradients that are to stay as they are."""
    count_stddev: float
    """σ_b, above half the step's noise multiplier: the standard deviation of the noise on the count. The authors take a
    twentieth of the expected batch."""
    initial_norm: float = 0.1
    """C of the first step, above 0."""
    lr: float = 0.2
    """η, above 0 and at most 10: how fast C follows."""
    min_norm: float = 1e-4
    """C is never below, above 0."""
    max_norm: float = 1e4
    """C is never above."""

    def __post_init__(self) -> None:
        if isinstance(self.quantile, bool) or not isinstance(self.quantile, (int, float)):
            raise TypeError(f"Quantile: quantile must be a number. Found {shown(self.quantile)}.")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"Quantile: quantile must be from 0 to 1. Found {self.quantile}.")
        for name in ("count_stddev", "initial_norm", "lr", "min_norm", "max_norm"):
            _check_norm("Quantile", getattr(self, name), name)
        if self.lr > 10 or self.count_stddev > 1e12:
            raise ValueError(
                f"Quantile: lr must be at most 10, count_stddev at most 1e12. Found {self.lr} and "
                f"{self.count_stddev}: the norm would be all noise."
            )
        if not 1e-12 <= self.min_norm <= self.initial_norm <= self.max_norm <= 1e12:
            raise ValueError(
                "Quantile: min_norm, initial_norm and max_norm must increase, from 1e-12 to 1e12. "
                f"Found {self.min_norm}, {self.initial_norm}, {self.max_norm}."
            )

    def init(self) -> Tensor:
        return torch.tensor(self.initial_norm)

    def sensitivity(self, state: Tree = ()) -> float | Tensor:
        """C, the state; without one, its first value."""
        return state if isinstance(state, Tensor) else self.initial_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:
        return _everywhere(norms, lambda whole: _scale(self.sensitivity(state), whole))

    def votes(self, norms: Tree, state: Tree = ()) -> Tensor:
        whole = _total(tree.leaves(norms))
        return ((whole <= self.sensitivity(state)).to(whole.dtype) - 0.5)[:, None]

    def deviations(self, noise_multiplier: float | Tensor) -> tuple[float | Tensor, float]:
        if not 2 * self.count_stddev > noise_multiplier:
            raise ValueError(
                f"Quantile: count_stddev must be above half the noise multiplier. Found {self.count_stddev} and "
                f"{noise_multiplier}: the votes alone would cost more than the step may."
            )
        return (noise_multiplier**-2 - (2 * self.count_stddev) ** -2) ** -0.5, self.count_stddev

    def adapt(self, state: Tree, votes: Tensor) -> Tensor:
        below = (votes[0] + 0.5).clamp(0, 1).to(state.dtype)  # the state's stays: another would compile the step again
        adapted: Tensor = state * torch.exp(-self.lr * (below - self.quantile))
        return adapted.clamp(self.min_norm, self.max_norm)


def _total(norms: list[Tensor]) -> Tensor:
    """The norm of several parts together: (B,)."""
    if len(norms) == 1:
        return norms[0]
    every = torch.stack(norms)
    total: Tensor = torch.linalg.vector_norm(every.double(), dim=0)  # their squares may be out of float32's range
    return total.to(every.dtype)


def _everywhere(norms: Tree, factor_fn: Callable[[Tensor], Tensor]) -> Tree:
    """The same factor, a function of the whole norm, for every parameter."""
    factor = factor_fn(_total(tree.leaves(norms)))
    return tree.map(lambda _: factor, norms)


def _by_group(norms: Tree, groups: list[str], max_norms: Mapping[str, float]) -> Tree:
    """The factor of each parameter's group, from the group's norm."""
    leaves = tree.leaves(norms)
    factors = {
        group: _scale(
            max_norms[group], _total([leaf for leaf, own in zip(leaves, groups, strict=True) if own == group])
        )
        for group in dict.fromkeys(groups)
    }
    return tree.unflatten(norms, [factors[group] for group in groups])


def _scale(max_norm: float | Tensor, norms: Tensor) -> Tensor:
    """min(1, C / norm), a little less where it is not 1, so that rounding does not make a gradient longer than C."""
    return (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny) * _margin(norms)).clamp(max=1)


def _margin(norms: Tensor) -> float:
    """One, less what the norm of a million numbers may have been rounded by."""
    return 1 - 16 * torch.finfo(norms.dtype).eps


def check_clipping(where: str, clipping: object) -> None:
    """Refuses what is no clipping rule, such as a clipping norm alone.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(clipping, Clipping):
        raise TypeError(f"{where}: clipping must be a rule. Found {shown(clipping)}. Pass privacy.Flat(max_norm)?")


def _check_norm(where: str, value: object, name: str = "max_norm") -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number. Found {type(value).__name__}.")
    if not 0 < value < math.inf:
        raise ValueError(f"{where}: {name} must be above 0 and finite. Found {value}.")
