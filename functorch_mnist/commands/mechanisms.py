"""The mechanism of `train --private` and `account`."""

from collections.abc import Callable

from .. import privacy
from ..options import Account, Train, noise_of, private_steps_per_epoch


def mechanism_of(options: Train | Account, *, examples: int, steps: int) -> Callable[[float], privacy.Mechanism]:
    """From a noise multiplier to the mechanism of a run.

    Args:
        options: how it samples and correlates noise.
        examples: N.
        steps: of the whole run.
    """
    kind, parameter = noise_of(options.noise)
    per_epoch = private_steps_per_epoch(options.batch_size, examples)
    rate = min(options.batch_size, examples) / examples

    def made(sigma: float) -> privacy.Mechanism:
        if kind == "banded":
            return privacy.BandMF(rate, sigma, int(parameter), max(1, steps))
        if kind == "bisr" or kind == "cgd":
            return privacy.FixedOrder(per_epoch, sigma, "bisr" if kind == "bisr" else "cgd", parameter)
        if options.sampling == "shuffled":
            return privacy.Shuffled(per_epoch, sigma)
        return privacy.Poisson(rate, sigma)

    return made
