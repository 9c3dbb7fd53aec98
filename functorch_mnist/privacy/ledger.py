"""What several runs on the same examples spend together."""

import math
from collections.abc import Sequence

from .account import Accountant, Ledger, epsilon
from .gaussian import gaussian_epsilon
from .mechanism import Poisson, Shuffled
from .pld import pld_epsilon
from .rdp import ORDERS, converted, rdp


def together(ledgers: Sequence[Ledger], *, delta: float, accountant: Accountant = "pld") -> float:
    """ε at δ of runs on the same examples, whatever the noise and the rate of each.

    Args:
        ledgers: one of each run, of one kind of sampling. Runs that share only some examples spend no more.
        delta: δ in (0, 1), of all together.
        accountant: as in `epsilon`.

    Returns:
        At least 0; 0 for no run.

    Raises:
        ValueError: a number is out of its range; the runs sample in two ways; the accountant is not of theirs.
        ImportError: `dp-accounting` is not installed.

    Guarantees: no less for one more run. Each run shuffles anew, so the begun epoch of each counts as a whole one.

    Example:
        >>> run = Ledger(Shuffled(10, 4.0), "Flat(max_norm=1.0)", "mnist", 5)
        >>> round(together([run], delta=1e-5, accountant="gaussian"), 3)
        0.911
        >>> round(together([run, run], delta=1e-5, accountant="gaussian"), 3)
        1.366
    """
    kinds = {type(ledger.mechanism).__name__ for ledger in ledgers}
    if len(kinds) > 1:
        raise ValueError(
            f"together: runs must sample in one way. Found {' and '.join(sorted(kinds))}, "
            "whose neighbouring data sets are not the same."
        )
    for ledger in ledgers:
        if type(ledger.steps) is not int or ledger.steps < 0:
            raise ValueError(f"together: steps must be a whole number, at least 0. Found {ledger.steps}.")
        epsilon(ledger.mechanism, steps=0, delta=delta, accountant=accountant)  # refuses what it must
    made = [(ledger.mechanism, ledger.steps) for ledger in ledgers if ledger.steps]
    if not made:
        return 0.0
    shuffled = [(one, steps) for one, steps in made if isinstance(one, Shuffled)]
    if shuffled:
        mu_squared = sum(-(-steps // one.steps_per_epoch) / one.noise_multiplier / one.noise_multiplier for one, steps in shuffled)
        return gaussian_epsilon(math.sqrt(mu_squared), delta)
    poisson = [(one, steps) for one, steps in made if isinstance(one, Poisson)]
    if accountant == "pld":
        return pld_epsilon(poisson, delta=delta)
    spent = [[steps * at for at in rdp(one.rate, one.noise_multiplier)] for one, steps in poisson]
    divergences = [sum(at) for at in zip(*spent, strict=True)]
    return converted(divergences, ORDERS, delta=delta, conversion="old" if accountant == "rdp-old" else "improved")
