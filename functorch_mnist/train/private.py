"""Differentially private training, DP-SGD: clipped sums over a random draw, noise once, then the optimizer.

    for each step:  draw examples;  G = Σ over chunks of clipped sums;  (G + noise) / n;  optimizer

A step is made from its mechanism and draws its own examples: it takes no batch, so the accountant reads exactly what
runs. Its randomness is a function of a secret and the step: the secret is split into roots of draws, of noise and of
examples' keys (dropout, augmentation), and the step is folded into them. The secret is in no state and in no file.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import privacy, random, tree
from ..arguments import check_fn, check_tensors, shown
from ..data import Batch
from ..distributed import SINGLE_PROCESS, World, all_reduce, broadcast, rows_of
from ..distributed.rows import parts_of
from ..distributed.sums import pairwise_sum
from ..optim import Optimizer
from ..privacy import Clipping, Mechanism, Secret, Sums, Users, clipped_sums, noise_draws, noisy_mean, zero_sums
from ..privacy.clipping import check_clipping
from ..privacy.mechanism import check_count, check_mechanism, column
from ..tree import Tree
from .agreement import CHECK_EVERY, check_examples, check_state
from .fitting import Progress, listed
from .forms import compiled
from .step import Estimator, State, check_is_state, check_loss, check_optimizer, init_state


class _Parts(NamedTuple):
    """The parts of a step, for a large draw has several chunks. Each is pure and compiles as one graph per shape."""

    poisson_mask: Callable[..., Tensor]
    """`privacy.poisson_mask`."""
    add: Callable[..., Sums]
    """`add(state, sums, roots, batch, owners, *examples) -> sums`: adds one more chunk. `batch` has the indices of its
    examples, `owners` (N,) the user of each example, or is None."""
    end: Callable[..., tuple[State, dict[str, Tensor]]]
    """`end(state, sums, roots) -> (state, aux)`: sums over all processes, adds noise and updates."""


@dataclass(frozen=True)
class PrivateStep:
    """A whole DP-SGD step: `step(state, roots, *examples) -> (state, aux)`. `make_private_step` makes it.

    It draws examples, sums their clipped gradients chunk by chunk, adds noise and updates. `roots` are those of a
    `Secret`, `examples` the whole data set, tensors (N, …). `aux` holds what is not private, see `Sums.seen`. What it
    draws, adds and divides by follows from its fields alone: `dataclasses.replace` makes another consistent step.

    Raises:
        ValueError: the fields do not go together.
        TypeError: a field is of a wrong kind.
    """

    loss_fn: Callable[..., Tensor]
    """`loss_fn(params, *example, key) -> ()`."""
    optimizer: Optimizer
    """Gets the noisy mean gradient."""
    clipping: Clipping
    """The clipping rule."""
    mechanism: Mechanism
    """How it samples and how much noise it adds, as the accountants read it."""
    population: int | Users
    """N, the number of examples, or `privacy.Users`, the user of each."""
    chunk_sizes: tuple[int, ...] | None = None
    """The sizes of a draw's chunks; None for those of `privacy.chunk_sizes`, compiled for the largest of them."""
    world: World = SINGLE_PROCESS
    """The processes."""
    is_compiled: bool = False
    """Whether its parts are compiled."""

    def __post_init__(self) -> None:
        """Refuses what does not go together.

        Raises:
            ValueError: it does not.
        """
        if isinstance(self.loss_fn, Estimator):
            raise TypeError(
                "private step: loss_fn must be the loss of one example: the step clips its gradient itself. "
                "Found an Estimator. Pass the loss that it was made from."
            )
        check_fn("private step", "loss_fn", self.loss_fn)
        check_optimizer("private step", self.optimizer)
        check_clipping("private step", self.clipping)
        check_mechanism("private step", self.mechanism)
        if not isinstance(self.population, Users):
            if isinstance(self.population, Tensor) or type(self.population) is not int:
                raise TypeError(
                    f"private step: examples must be N, an int, or privacy.Users. Found "
                    f"{shown(self.population)}. Pass len(x), or Users(ids, max_examples=…)?"
                )
            check_count("private step", "examples", self.population)
        unit = "user" if isinstance(self.population, Users) else "example"
        if unit != self.mechanism.unit:
            raise ValueError(
                f"private step: a mechanism of each {self.mechanism.unit} must be given {self.mechanism.unit}s. Found "
                f"{unit}s: examples=N takes a number of examples, or privacy.Users for unit='user'."
            )
        if unit == "user" and self.world.parts > 1:
            raise ValueError("private step: a user's examples must be on one process. Found several, or shards.")
        if self.mechanism.noise_multiplier:
            self.clipping.deviations(self.mechanism.noise_multiplier)  # refuses what cannot be divided

    @property
    def size(self) -> int:
        """The number of examples, or of users."""
        return self.population if isinstance(self.population, int) else len(self.population)

    @property
    def expected(self) -> float:
        """The divisor of sums: the expected number of examples, or users, of a step, over all processes."""
        return self.mechanism.sampling_rate * self.size

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The sizes that draws are cut into."""
        if self.chunk_sizes is not None:
            return self.chunk_sizes
        if isinstance(self.population, Users):
            sizes = self.population.chunk_sizes(self.mechanism)
        else:
            sizes = privacy.chunk_sizes(self.mechanism, self.population)
        return sizes[-1:] if self.is_compiled else sizes

    def compiled(self) -> "PrivateStep":
        """The same with all parts compiled.

        Cost: torch compiles at the first call one graph for each size of chunks, and one that adds noise and updates;
        for Poisson sampling also a small one that draws. By default that is one size, so two graphs, which pads the
        rows of a draw to the largest likely one: by a fifth for 256 expected examples, by 7 % for 2,048. More
        `chunk_sizes` pad less and compile longer: five sizes of a small MLP have taken 110 s, where the steps saved
        milliseconds.
        """
        return replace(self, is_compiled=True)

    def __call__(self, state: State, roots: Tensor, *examples: Tensor) -> tuple[State, dict[str, Tensor]]:
        """The next state, and what is not private.

        Args:
            state: from `init_private_state`.
            roots: (4, 2), `secret.roots()`.
            examples: the whole data set, tensors (N, …).

        Returns:
            `(state, aux)`: aux holds the sum of losses, and the numbers of examples, see `Sums.seen`.

        Raises:
            ValueError: there are not as many examples as it was made for.
            TypeError: `state` is no state, `roots` are none, or the loss does not take the examples and a key.
        """
        check_is_state("private step", state)
        if len(tree.leaves(state.estimator)) != len(tree.leaves(self.clipping.init())):
            raise ValueError(
                f"private step: the state must hold what {type(self.clipping).__name__} adapts. Found "
                f"{len(tree.leaves(state.estimator))} tensors. Make it with init_private_state(…, clipping)."
            )
        if not isinstance(roots, Tensor) or roots.shape != (4, 2):
            found = tuple(roots.shape) if isinstance(roots, Tensor) else f"one of type {type(roots).__name__}"
            raise TypeError(f"private step: roots must be secret.roots(), (4, 2). Found {found}. Pass secret.roots()?")
        users = self.population if isinstance(self.population, Users) else None
        count = self.population if users is None else len(users.ids)
        if {len(tensor) for tensor in examples} != {count}:
            raise ValueError(
                f"private step: it must get the {count:,} examples that it was made for: their number "
                f"divides its sums. Found {[len(tensor) for tensor in examples]}."
            )
        check_loss("private step", "loss_fn", self.loss_fn, (*examples, roots[2:3]))
        drawn = privacy.draw(
            self.mechanism, roots[0], step=state.step, population=self.size, mask_fn=self._parts.poisson_mask
        )  # fmt: skip
        if users is None:
            chunks = privacy.chunks(drawn, self.sizes)
        else:
            chunks = users.chunks(drawn, random.fold_in(roots[3], state.step), self.sizes)
        own = [rows_of(self.world, batch) for batch in chunks]
        return self._stepped(state, roots, own, None if users is None else users.ids, examples)

    def _stepped(
        self, state: State, roots: Tensor, chunks: list[Batch], owners: Tensor | None, examples: Sequence[Tensor]
    ) -> tuple[State, dict[str, Tensor]]:
        """A step over this process's rows of some chunks."""
        none = zero_sums(state.params, self.clipping, state.key.device)
        totals = [none] * (1 if self.world.shards is None else self.world.parts_here)
        for batch in chunks:
            parts = [batch] if self.world.shards is None else parts_of(self.world, batch)
            totals = [
                self._parts.add(state, sums, roots, part, owners, *examples)
                for sums, part in zip(totals, parts, strict=True)
            ]
        return self._parts.end(state, pairwise_sum(totals, lambda a, b: tree.map(torch.add, a, b)), roots)

    @cached_property
    def _parts(self) -> _Parts:
        loss_fn, optimizer, clipping, world = self.loss_fn, self.optimizer, self.clipping, self.world
        strategy, expected = self.mechanism.strategy, self.expected
        sigma = self.mechanism.noise_multiplier * column(strategy)

        def add(
            state: State, sums: Sums, roots: Tensor, batch: Batch, owners: Tensor | None, *examples: Tensor
        ) -> Sums:
            rows = [tensor[batch.examples] for tensor in examples]
            keys = random.fold_in(random.fold_in(roots[2], state.step), batch.examples)
            more = clipped_sums(
                loss_fn, state.params, *rows, keys, clipping=clipping, clipping_state=state.estimator, mask=batch.mask,
                group=None if owners is None else owners[batch.examples],
            )  # fmt: skip
            summed: Sums = tree.map(torch.add, sums, more)
            return summed

        def end(state: State, sums: Sums, roots: Tensor) -> tuple[State, dict[str, Tensor]]:
            total = all_reduce(world, sums)
            drawn: tuple[Tensor, Tensor | None] = (random.fold_in(roots[1], state.step), None)
            if strategy is not None:
                drawn = noise_draws(strategy, roots[1], state.step)
            grads, estimator = noisy_mean(
                state.params, total, drawn[0], clipping=clipping, noise_multiplier=sigma, expected=expected,
                clipping_state=state.estimator, weights=drawn[1],
            )  # fmt: skip
            params, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
            return State(params, optimizer_state, state.step + 1, state.key, estimator), total.seen

        if self.is_compiled:
            return _Parts(compiled(privacy.poisson_mask), _by_size(add), compiled(end))
        return _Parts(privacy.poisson_mask, add, end)


def _by_size(add: Callable[..., Sums]) -> Callable[..., Sums]:
    """`add`, compiled for each size of chunks: torch compiles one function 8 times at most."""
    forms: dict[int, Callable[..., Sums]] = {}

    def call(state: State, sums: Sums, roots: Tensor, batch: Batch, *more: Any) -> Sums:
        size = len(batch.examples)
        if size not in forms:
            forms[size] = compiled(add)
        return forms[size](state, sums, roots, batch, *more)

    return call


def init_private_state(params: Tree, optimizer: Optimizer, key: Tensor, clipping: Clipping) -> State:
    """The training state before the first private step.

    Args:
        params: a pytree of float tensors, such as those of `models.from_module`.
        optimizer: the optimizer of the step, which makes its own initial state.
        key: (2,), of random streams that need not be secret.
        clipping: the rule of the step, which makes its own initial state.

    Returns:
        The state.

    Raises:
        TypeError: the parameters are a module, the optimizer is one of torch's, `clipping` is no rule, or the key is a
            seed.

    Example: see `make_private_step`.
    """
    check_clipping("init_private_state", clipping)
    return init_state(params, optimizer, key)._replace(estimator=clipping.init())


def make_private_step(
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    *,
    clipping: Clipping,
    mechanism: Mechanism,
    examples: int | Users,
    chunk_sizes: Sequence[int] | None = None,
    world: World = SINGLE_PROCESS,
) -> PrivateStep:
    """A DP-SGD training step.

    Args:
        loss_fn: `loss_fn(params, *example, key) -> ()`, pure, the loss of ONE example; the key (2,) is the example's
            own, of this step, for dropout and augmentation.
        optimizer: from `optim`; gets the noisy mean gradient.
        clipping: the rule, such as `privacy.Flat(max_norm)`, of each example or, where users are sampled, of each
            user's summed gradient.
        mechanism: how it samples and how much noise it adds, such as `privacy.Poisson(rate, noise_multiplier)`.
        examples: N, the number of examples, or `privacy.Users`, the user of each. Sums are divided by the expected
            number q N of examples, or users, not by the realised one; so N is public.
        chunk_sizes: the sizes of a draw's chunks; by default those of `privacy.chunk_sizes`, compiled their largest
            alone. Smaller ones need less memory.
        world: the processes. Each sums the chunks of its own rows; all add the same noise to the sum.

    Returns:
        The step, `step(state, roots, *examples) -> (state, aux)`, for `fit_private`; `step.compiled()` compiles it.

    Raises:
        ValueError: a number is out of its range, or the parts do not go together.
        TypeError: `mechanism` is a noise multiplier, `clipping` a number, `loss_fn` an estimator, `examples` tensors,
            or the optimizer one of torch's.

    Guarantees: equal, up to rounding, for any division of the examples into chunks and processes.

    Example:
        >>> from functorch_mnist import optim, privacy
        >>> optimizer, clipping = optim.sgd(0.5), privacy.Flat(1.0)
        >>> step = make_private_step(
        ...     lambda w, x, key: w * x, optimizer, clipping=clipping, mechanism=privacy.Poisson(1.0, 0.0), examples=2
        ... )
        >>> state = init_private_state(torch.tensor(0.0), optimizer, random.key(0), clipping)
        >>> state, seen = step(state, Secret(1).roots(), torch.tensor([0.5, 3.0]))
        >>> state.params, seen["clipped"]
        (tensor(-0.3750), tensor(1))

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """
    check_mechanism("make_private_step", mechanism)
    if isinstance(chunk_sizes, int):
        raise TypeError(f"make_private_step: chunk_sizes must be several sizes. Found {chunk_sizes}. Pass (size,)?")
    sizes = None if chunk_sizes is None else tuple(chunk_sizes)
    return PrivateStep(loss_fn, optimizer, clipping, mechanism, examples, sizes, world)


def fit_private(
    step: PrivateStep,
    state: State,
    examples: Sequence[Tensor],
    *,
    secret: Secret,
    steps: int,
    loss: Tensor | None = None,
    callbacks: Iterable[Callable[[Progress], None]] = (),
) -> State:
    """Trains privately until a number of steps have been made: DP-SGD.

    Args:
        step: from `make_private_step`; its `mechanism` is what the accountant takes.
        state: from `init_private_state`, or a saved one to resume from; its `step` is the number of steps made.
        examples: a tuple of tensors (N, …), the whole data set, on one device.
        secret: `privacy.Secret()`, the root of draws, noise and examples' keys. A Poisson run that is resumed with a
            fresh secret is as private as one that was never interrupted; for a shuffled one see `privacy.Ledger`. With
            a secret from a seed it also ends as that one, bit for bit.
        steps: the number of steps in total, at least 0, those that `state` has made included.
        loss: the `Progress.loss` that belongs to a state from the middle of an epoch.
        callbacks: called with the `Progress` after each step, in order, on all processes.

    Returns:
        The state after the last step. Its privacy is `privacy.epsilon(step.mechanism, steps=steps, delta=…)`.

    Raises:
        ValueError: the number of examples is not that of the step, or a number is out of its range.
        TypeError: `examples` is one tensor, `secret` an int or a key, `state` no state, `step` no private one, or the
            loss takes no key.
        DisagreementError: examples or states differ between processes.

    Guarantees: draws and noise are those of process 0's secret, once for all processes: the account is that of one
        process.

    Example:
        >>> from functorch_mnist import optim, privacy
        >>> optimizer, clipping, mechanism = optim.sgd(0.5), privacy.Flat(1.0), privacy.Poisson(0.5, 2.0)
        >>> step = make_private_step(
        ...     lambda w, x, key: w * x, optimizer, clipping=clipping, mechanism=mechanism, examples=8
        ... )
        >>> state = init_private_state(torch.tensor(0.0), optimizer, random.key(0), clipping)
        >>> state = fit_private(step, state, (torch.ones(8),), secret=Secret(), steps=3)
        >>> int(state.step), round(privacy.epsilon(mechanism, steps=3, delta=1e-5), 1)
        (3, 2.2)

    Reference: Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.
    """
    if not isinstance(step, PrivateStep):
        raise TypeError(
            f"fit_private: step must be a PrivateStep, as make_private_step gives it. Found {shown(step)}. "
            "For a step of make_step use fit."
        )
    check_is_state("fit_private", state)
    check_tensors("fit_private", "examples", examples)
    if not isinstance(secret, Secret):
        raise TypeError(
            f"fit_private: secret must be a privacy.Secret. Found one of type {type(secret).__name__}. Pass Secret(): "
            "draws and noise must not be guessed, as those of a seed can be. For a reproduction Secret(seed)."
        )
    if type(steps) is not int or steps < 0:
        raise ValueError(f"fit_private: steps must be at least 0, a whole number. Found {steps}.")
    world, callbacks = step.world, listed("fit_private", callbacks)
    check_examples(world, examples)
    check_state(world, state)
    roots = broadcast(world, secret.roots(examples[0].device))
    per_epoch = max(1, round(1 / step.mechanism.sampling_rate))
    for done in range(int(state.step), steps):
        state, aux = step(state, roots, *examples)
        if (done + 1) % CHECK_EVERY == 0 or done + 1 == steps:
            check_state(world, state)
        epoch, before = divmod(done, per_epoch)
        loss = aux["loss"].double() + (0 if loss is None or before == 0 else loss)
        seen = round(step.expected * (before + 1))
        progress = Progress(state, loss, seen, epoch, done + 1, before + 1 == per_epoch, aux)
        for callback in callbacks:
            callback(progress)
    return state
