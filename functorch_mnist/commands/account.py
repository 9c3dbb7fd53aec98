"""`account`: ε of private training, the noise it needs or the steps it may make, by all accountants."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .. import files, plots, privacy, run_folder
from ..options import Account, UsageError
from . import restore
from .faults import refusing
from .mechanisms import mechanism_of
from .private import ACCOUNTANTS, LEDGER, spans

_ROWS, _DOTS = 10, 40
_TITLES: Mapping[privacy.Accountant, str] = {
    "rdp-old": "old Rényi",
    "rdp": "Rényi",
    "pld": "PLD",
    "gaussian": "exact",
}

Curves = Mapping[privacy.Accountant, Sequence[float]]


def account(options: Account) -> int:
    """Prints what was asked for, and a table of ε over the steps; draws it. Or the ε of several runs, composed."""
    if options.runs:
        return _spent(options)
    shuffled = options.sampling == "shuffled"
    per_epoch = options.steps_per_epoch
    accountant: privacy.Accountant = "gaussian" if shuffled else options.accountant
    columns: list[privacy.Accountant] = ["gaussian"] if shuffled else ["rdp-old", "rdp", "pld"]

    mechanism = mechanism_of(options, examples=options.examples, steps=options.all_steps or per_epoch)
    with refusing(ValueError):
        sigma, steps = _solved(options, mechanism, accountant)
        made = mechanism(sigma)
        spent = privacy.epsilon(made, steps=steps, delta=options.delta, accountant=accountant)

    def curves(counts: Sequence[int]) -> Curves:
        return {
            name: privacy.epsilon_curve(made, steps=counts, delta=options.delta, accountant=name) for name in columns
        }

    counts = _counts(steps, _ROWS)
    print(f"Sampling: {_sampling(made, options)}.")
    print(f"Neighbouring data sets: {made.relation}. δ = {options.delta:g}.\n")
    print(f"{_table(counts, curves(counts), per_epoch)}\n")
    if options.noise_multiplier is None:
        print(f"Least noise multiplier for ε = {options.epsilon:g}: {sigma:g}")
    if options.all_steps is None:
        more = " or more" if steps >= privacy.MAX_STEPS else ""
        print(f"Most steps for ε = {options.epsilon:g}: {steps:,}{more}, {steps / per_epoch:,.4g} epochs")
    print(
        f"Spent in {steps:,} steps with noise multiplier {sigma:g}: "
        f"ε = {spent:.4g} at δ = {options.delta:g}, by the {ACCOUNTANTS[accountant]}."
    )
    if options.png is not None:
        counts = _counts(steps, _DOTS)
        drawn = plots.spent(
            {ACCOUNTANTS[name]: values for name, values in curves(counts).items()},
            epochs=[count / per_epoch for count in counts],
            title=f"noise multiplier {sigma:g}, {options.batch_size:,} of {options.examples:,} examples per step, "
            f"δ = {options.delta:g}",
            kind=options.png.suffix[1:].lower(),
        )
        files.write(options.png, drawn)
        print(f"ε over the epochs drawn into {options.png}")
    return 0


def _spent(options: Account) -> int:
    """Prints the ledgers of some runs, and the ε of their composition."""
    if len({folder.resolve() for folder in options.runs}) < len(options.runs):
        raise UsageError("Each folder must be given once, for it counts as often. Found one twice.")
    read = {folder: _ledger(folder) for folder in options.runs}
    seeded = [folder for folder in options.runs if run_folder.read_config(folder).noise_seed is not None]
    total = sum(read.values(), privacy.Ledger())
    with refusing(ValueError):
        for folder, ledger in read.items():
            alone = ledger.epsilon(delta=options.delta, accountant=options.accountant)
            for entry in ledger.entries:
                print(
                    f"{folder}: {entry.steps:,} steps, {entry.mechanism.sampling}; noise multiplier "
                    f"{entry.mechanism.noise_multiplier:g}; {entry.clipping}; {entry.data}."
                )
                if entry.before:
                    print(f"  in parts, each with its own secret: {spans(entry)}")
            print(f"  alone: ε = {alone:.4g}")
        spent = total.epsilon(delta=options.delta, accountant=options.accountant)
    print(f"Neighbouring data sets: {total.relation}.")
    if seeded:
        print(
            f"NOT PRIVATE: {', '.join(map(str, seeded))} took sampling and noise from a --noise-seed, which anybody "
            "can draw again. The ε are those of fresh secrets."
        )
    print(
        f"Spent by {len(read):,} runs together: ε = {spent:.4g} at δ = {options.delta:g}, "
        f"by the {ACCOUNTANTS[options.accountant]}."
    )
    return 0


def _ledger(folder: Path) -> privacy.Ledger:
    """What the newest good checkpoint of a run has spent.

    Raises:
        UsageError: it is no private run.
        CheckpointError: it has no good checkpoint.
    """
    run_folder.read_config(folder)
    config = restore.newest_config(folder)
    if LEDGER not in config:
        raise UsageError(f"{folder} must hold a private run. Found one without a ledger.")
    with refusing(ValueError):
        return privacy.Ledger.from_json(config[LEDGER])


def _solved(
    options: Account, mechanism: Callable[[float], privacy.Mechanism], accountant: privacy.Accountant
) -> tuple[float, int]:
    """The noise multiplier and the steps, whichever of them was asked for.

    Raises:
        UsageError: not even one step can be made.
        ValueError: as the accountants do.
    """
    sigma, steps, budget = options.noise_multiplier, options.all_steps, options.epsilon
    if sigma is not None and steps is not None:
        return sigma, steps
    assert budget is not None  # two of three are given
    if steps is not None:
        sigma = privacy.calibrated(mechanism, budget=budget, delta=options.delta, steps=steps, accountant=accountant)
        return sigma, steps
    assert sigma is not None
    made = mechanism(sigma)
    steps = privacy.max_steps(made, budget=budget, delta=options.delta, accountant=accountant)
    if steps == 0:
        one = privacy.epsilon(made, steps=1, delta=options.delta, accountant=accountant)
        raise UsageError(f"--epsilon must be enough for one step, which spends {one:.4g}. Found {budget:g}.")
    return sigma, steps


def _counts(steps: int, rows: int) -> list[int]:
    """Numbers of steps at equal distances, up to all; each once."""
    return sorted({-(-steps * row // rows) for row in range(1, rows + 1)})


def _sampling(made: privacy.Mechanism, options: Account) -> str:
    return made.sampling.replace("each example with", f"each of {options.examples:,} examples with")


def _table(counts: Sequence[int], curves: Curves, per_epoch: int) -> str:
    lines = [f"{'steps':>14}{'epochs':>12}" + "".join(f"{_TITLES[name]:>12}" for name in curves)]
    for row, count in enumerate(counts):
        spent = "".join(f"{values[row]:>12.4g}" for values in curves.values())
        lines.append(f"{count:>14,}{count / per_epoch:>12,.4g}{spent}")
    return "\n".join(lines)
