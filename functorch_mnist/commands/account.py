"""`account`: ε of private training, the noise it needs or the steps it may make, by all accountants side by side."""

from collections.abc import Callable, Mapping, Sequence

from .. import plots, privacy, run_folder
from ..options import MOST_STEPS, Account, UsageError
from .faults import refusing
from .private import ACCOUNTANTS

_ROWS, _DOTS = 10, 40
_POISSON: tuple[privacy.Accountant, ...] = ("rdp-old", "rdp", "pld")
_TITLES: Mapping[privacy.Accountant, str] = {
    "rdp-old": "old Rényi",
    "rdp": "Rényi",
    "pld": "PLD",
    "gaussian": "exact",
}

Curves = Mapping[privacy.Accountant, Sequence[float]]


def account(options: Account) -> int:
    """Prints what was missing, and a table of ε over the steps; draws it."""
    per_epoch = options.steps_per_epoch
    accountant: privacy.Accountant = "gaussian" if options.sampling == "shuffled" else options.accountant

    def mechanism(sigma: float) -> privacy.Mechanism:
        if options.sampling == "shuffled":
            return privacy.Shuffled(per_epoch, sigma)
        return privacy.Poisson(options.batch_size / options.examples, sigma)

    with refusing(ImportError), refusing(ValueError):
        sigma, steps = _found(options, mechanism, accountant)
        made = mechanism(sigma)
        spent = privacy.epsilon(made, steps=steps, delta=options.delta, accountant=accountant)
        missing, accountants = "", ("gaussian",) if options.sampling == "shuffled" else _POISSON
        try:
            privacy.epsilon(made, steps=1, delta=options.delta, accountant=accountants[-1])
        except ImportError as error:  # only of a column that was not asked for
            missing, accountants = f"\nNo column of PLD: {error}", _POISSON[:-1]
        counts = _counts(steps, _ROWS)
        curves = _curves(made, counts, options.delta, accountants)
    print(f"Sampling: {_sampling(made, options)}.")
    print(f"Neighbouring data sets: {made.relation}. δ = {options.delta:g}.\n")
    print(_table(counts, curves, per_epoch) + missing + "\n")
    if options.noise_multiplier is None:
        print(f"Least noise multiplier for ε = {options.epsilon:g}: {sigma:g}")
    if options.all_steps is None:
        more = " or more" if steps >= MOST_STEPS else ""
        print(f"Most steps for ε = {options.epsilon:g}: {steps:,}{more}, {steps / per_epoch:,.4g} epochs")
    print(
        f"Spent in {steps:,} steps with noise multiplier {sigma:g}: "
        f"ε = {spent:.4g} at δ = {options.delta:g}, by the {ACCOUNTANTS[accountant]}."
    )
    if options.png is not None:
        counts = _counts(steps, _DOTS)
        curves = _curves(made, counts, options.delta, accountants)
        epochs = [count / per_epoch for count in counts]
        title = f"noise multiplier {sigma:g}, {options.batch_size:,} of {options.examples:,} examples per step"
        run_folder.write(options.png, _picture(epochs, curves, f"{title}, δ = {options.delta:g}", options.png.suffix))
        print(f"\nε over the epochs drawn into {options.png}")
    return 0


def _found(
    options: Account, mechanism: Callable[[float], privacy.Mechanism], accountant: privacy.Accountant
) -> tuple[float, int]:
    """The noise multiplier and the steps, whichever of them was asked for.

    Raises:
        UsageError: not even one step can be made.
        ImportError, ValueError: as the accountants do.
    """
    sigma, steps = options.noise_multiplier, options.all_steps
    if sigma is not None and steps is not None:
        return sigma, steps
    if options.epsilon is None or (sigma is None and steps is None):
        raise UsageError("account takes two of --epsilon, --noise-multiplier and --steps. Found fewer.")
    if steps is not None:
        return privacy.calibrated(
            mechanism, budget=options.epsilon, delta=options.delta, steps=steps, accountant=accountant
        ), steps
    made = mechanism(sigma)
    steps = privacy.most_steps(made, budget=options.epsilon, delta=options.delta, accountant=accountant)
    if steps == 0:
        one = privacy.epsilon(made, steps=1, delta=options.delta, accountant=accountant)
        raise UsageError(f"--epsilon must be enough for one step, which spends {one:.4g}. Found {options.epsilon:g}.")
    return sigma, steps


def _counts(steps: int, rows: int) -> list[int]:
    """Numbers of steps at equal distances, up to all; each once."""
    return sorted({-(-steps * row // rows) for row in range(1, rows + 1)})


def _curves(
    made: privacy.Mechanism, counts: Sequence[int], delta: float, accountants: Sequence[privacy.Accountant]
) -> Curves:
    return {name: privacy.curve(made, steps=counts, delta=delta, accountant=name) for name in accountants}


def _sampling(made: privacy.Mechanism, options: Account) -> str:
    if isinstance(made, privacy.Poisson):
        return f"Poisson, each of {options.examples:,} examples with a chance of {made.rate:.6g} in each step"
    return f"shuffled batches, each example once in {made.steps_per_epoch:,} steps, without amplification"


def _table(counts: Sequence[int], curves: Curves, per_epoch: int) -> str:
    lines = [f"{'steps':>14}{'epochs':>12}" + "".join(f"{_TITLES[name]:>12}" for name in curves)]
    for row, count in enumerate(counts):
        spent = "".join(f"{values[row]:>12.4g}" for values in curves.values())
        lines.append(f"{count:>14,}{count / per_epoch:>12,.4g}{spent}")
    return "\n".join(lines)


def _picture(epochs: Sequence[float], curves: Curves, title: str, suffix: str) -> bytes:
    """ε over the epochs, a line for each accountant."""
    figure, axes = plots._subplots(figsize=(6.4, 4.2))
    for name, values in curves.items():
        axes.plot(epochs, values, "o-", markersize=3, label=ACCOUNTANTS[name])
    axes.set(xlabel="epochs", ylabel="ε")
    axes.set_title(title, fontsize=9)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return plots._picture(figure, suffix[1:])
