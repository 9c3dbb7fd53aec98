"""Clipping rules: the factor of each per-sample gradient, and the sensitivity of the sum of clipped gradients.

With ∇_i the gradient of example i, ∇_i^k its part in group k of the parameters, a rule gives each part a factor

    Flat         s_i   = min(1, C / |∇_i|)                          Abadi et al. 2016
    Automatic    s_i   = C / (|∇_i| + γ), AUTO-S                    Bu et al. 2023
    Global       s_i   = 1 where |∇_i| ≤ C, else 0                  Bu et al. 2021
    PerLayer     s_i^k = min(1, C_k / |∇_i^k|), C_k = C / √K        McMahan et al. 2018
    PerGroup     the same, with any C_k
    Quantile     Flat with adaptive C: a quantile of the norms      Andrew et al. 2021

and its sensitivity, the largest norm by which `Σ_i s_i ∇_i` can change when an example is added or removed: C, and for
groups √(Σ C_k²). An example whose gradient is not finite has the factor 0 under every rule.
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
    """A clipping rule. It is immutable: what an adaptive rule adapts is a state, made by `init` and passed in."""

    def init(self) -> Tree:
        """The initial state: empty, for a rule that does not adapt."""
        return ()

    def sensitivity(self, state: Tree = ()) -> float | Tensor:
        """The largest norm by which one example can change the sum of clipped gradients.

        Args:
            state: of the rule, for one that adapts.
        """
        raise NotImplementedError

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:
        """The factor of each per-sample gradient.

        Args:
            norms: the norm of each parameter's part of ∇_i: a tree like the parameters with leaves (B,), finite.
            state: of the rule.

        Returns:
            The factor of each parameter's part, in [0, 1] for most rules: a tree with leaves (B,).

        Raises:
            ValueError: the rule's groups do not fit the parameters.
        """
        raise NotImplementedError

    def votes(self, norms: Tree, state: Tree = ()) -> Tensor:  # noqa: ARG002
        """What each example adds to the step's second release, by which an adaptive rule adapts.

        Args:
            norms: as in `factors`.
            state: of the rule.

        Returns:
            (B, V); an example's row has norm 1/2 at most. V is 0 for a rule that does not adapt.
        """
        leaf = tree.leaves(norms)[0]
        return leaf.new_zeros(len(leaf), 0)

    def deviations(self, noise_multiplier: float | Tensor) -> tuple[float | Tensor, float]:
        """How a step's noise multiplier is divided between its releases.

        Args:
            noise_multiplier: σ of the step as a whole.

        Returns:
            The noise multiplier of the gradients, above σ for an adaptive rule, and the standard deviation of the noise
            on the sum of votes.

        Raises:
            ValueError: there is not enough noise for both.
        """
        return noise_multiplier, 0.0

    def adapt(self, state: Tree, votes: Tensor) -> Tree:  # noqa: ARG002
        """The state for the next step.

        Args:
            state: of the rule.
            votes: (V,), the noisy mean of the votes.
        """
        return state


@dataclass(frozen=True)
class Flat(Clipping):
    """Flat clipping, that of DP-SGD: gradients longer than `max_norm` are scaled down to it.

    Example:
        >>> Flat(1.0).factors({"w": torch.tensor([0.5, 4.0])})["w"]
        tensor([1.0000, 0.2500])

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """

    max_norm: float | Tensor
    """C, above 0; or a 0-d tensor, whose value is not read, so that it can differ between vmapped runs."""

    def __post_init__(self) -> None:
        if not (isinstance(self.max_norm, Tensor) and self.max_norm.shape == ()):
            _check_norm("Flat", self.max_norm)

    def sensitivity(self, state: Tree = ()) -> float | Tensor:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        return _everywhere(norms, lambda whole: _scale(self.max_norm, whole))


@dataclass(frozen=True)
class Automatic(Clipping):
    """Automatic clipping (AUTO-S): gradients are normalised, to a norm just below `max_norm`. There is no norm to tune.

    Reference: Bu, Wang, Zha, Karypis, "Automatic clipping: differentially private deep learning made easier and
        stronger", NeurIPS 2023, equation 4.
    """

    max_norm: float = 1.0
    """C, above 0: it scales gradients and noise equally, as a learning rate does."""
    gamma: float = 0.01
    """γ, above 0: the stability constant. Gradients shorter than it stay short."""

    def __post_init__(self) -> None:
        _check_norm("Automatic", self.max_norm)
        _check_norm("Automatic", self.gamma, "gamma")

    def sensitivity(self, state: Tree = ()) -> float:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        return _everywhere(norms, lambda whole: self.max_norm / (whole + self.gamma) * _margin(whole))


@dataclass(frozen=True)
class Global(Clipping):
    """Global clipping: gradients up to `max_norm` are kept as they are, longer ones are dropped.

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
    """Per-layer clipping: each layer's part of a gradient is clipped on its own, to an equal norm C / √K.

    The parameters of a layer share their path up to its last part, such as `conv1.weight` and `conv1.bias`.

    Reference: McMahan, Ramage, Talwar, Zhang, "Learning differentially private recurrent language models", ICLR 2018,
        section 3.
    """

    max_norm: float
    """C, above 0, the clipping norm of all K layers together: each has C / √K."""

    def __post_init__(self) -> None:
        _check_norm("PerLayer", self.max_norm)

    def sensitivity(self, state: Tree = ()) -> float:  # noqa: ARG002
        return self.max_norm

    def factors(self, norms: Tree, state: Tree = ()) -> Tree:  # noqa: ARG002
        layers = [path[: max(path.rfind("."), path.rfind("/"), 0)] or path for path in tree.paths(norms)]
        of_each = self.max_norm / math.sqrt(len(set(layers)))
        return _by_group(norms, layers, dict.fromkeys(layers, of_each))


@dataclass(frozen=True)
class PerGroup(Clipping):
    """Per-group clipping: each group's part of a gradient is clipped to its own norm.

    Example:
        >>> rule = PerGroup({"conv1": 3.0, "fc": 4.0})
        >>> rule.sensitivity()
        5.0

    Reference: McMahan, Andrew, Erlingsson et al., "A general approach to adding differential privacy to iterative
        training procedures", 2018, section 2.
    """

    max_norms: Mapping[str, float]
    """C_k, above 0, by a prefix of the paths of the group's parameters. A parameter is in the group of its longest
    prefix; `""` is a prefix of all."""

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
    """Adaptive clipping: flat clipping whose norm follows a quantile of the norms, estimated with noise.

        b = (Σ_i ([|∇_i| ≤ C] - 1/2) + N(0, σ_b²)) / expected batch + 1/2,    C ← C exp(-lr (b - quantile))

    The votes use up some of the step's noise multiplier σ: the gradients get `σ_Δ = (σ⁻² - (2 σ_b)⁻²)^(-1/2)`, and both
    releases together cost what one Gaussian of σ costs. The noisy b is clamped to [0, 1], and C to its bounds, so that
    no noise and no quantile takes it to zero or infinity.

    Example:
        >>> rule = Quantile(0.5, count_stddev=1.0)
        >>> rule.adapt(torch.tensor(1.0), torch.tensor([-0.5]))  # no gradient is below C: C grows by exp(0.2 · 0.5)
        tensor(1.1052)

    Reference: Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive clipping", NeurIPS
        2021, algorithm 1 and theorem 1.
    """

    quantile: float
    """γ in [0, 1]: the target fraction of gradients that are not clipped."""
    count_stddev: float
    """σ_b, above half the step's noise multiplier: the standard deviation of the noise on the count of unclipped
    gradients. The authors take a twentieth of the expected batch."""
    initial_norm: float = 0.1
    """C of the first step, above 0."""
    lr: float = 0.2
    """η, above 0 and at most 10: the learning rate of log C."""
    min_norm: float = 1e-4
    """The lower bound of C, above 0."""
    max_norm: float = 1e4
    """The upper bound of C."""

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
    """min(1, C / norm), slightly less where it is not 1, so that rounding does not make a gradient longer than C."""
    return (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny) * _margin(norms)).clamp(max=1)


def _margin(norms: Tensor) -> float:
    """1 minus a bound on the relative rounding error of the norm of a million numbers."""
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
