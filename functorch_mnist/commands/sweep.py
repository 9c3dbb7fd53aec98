"""`sweep`: many runs at once, which setting did best, and what its models say together."""

from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from .. import calibration, ensemble, plots, random
from .. import sweep as sweeps
from ..distributed import World
from ..options import LOGARITHMIC, PRIVATE_OVER, Axis, Sweep, axes, flag
from . import outputs, sources
from .processes import load, processes
from .sources import Parts
from .sweeping import Swept, outputs_of, spread, swept, words

SHOWN = 10
"""Settings in the table."""
DRAWS = 7
"""Names the random draw of settings, beside the seed."""


def sweep(options: Sweep) -> int:
    """Trains all runs, and prints and draws what they reached."""
    with processes(options.training, options) as world:
        return _sweep(options, world)


def _sweep(options: Sweep, world: World) -> int:
    one = options.training
    parts = sources.divided(one, load(one, world))
    runs = table(options)
    folder = one.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    print(f"Sweep folder: {folder}")
    settings = int(sweeps.settings(runs).max()) + 1
    seeds = "a seed" if options.seeds == 1 else f"{options.seeds} seeds"
    total = len(runs[sweeps.SEED])
    print(f"{total} run{'s' * (total > 1)}: {settings} setting{'s' * (settings > 1)}, each with {seeds}.", flush=True)
    if PRIVATE_OVER & runs.keys():
        print("Steps are clipped and noisy as private ones, of fixed batches; what they spend is not accounted for.")
    halving = None if options.halve_every is None else sweeps.Halving(options.halve_every, options.halve_keep)
    done = swept(one, parts, runs, folder, vmapped_runs=options.vmapped_runs, halving=halving, world=world)
    if world.rank:
        return int(bool(done.held_out.isnan().all()))
    held_out = spread(runs, done.held_out)
    print(f"\n{_ended(done)}")
    outputs.write(folder / "runs.csv", rows(done).encode())
    if held_out.mean.isnan().all():
        print("No setting has made an epoch with all its seeds.")
        return 1
    tested = spread(runs, done.tested)
    order = held_out.mean.nan_to_num(nan=-1).argsort(descending=True, stable=True)
    order = order[~held_out.mean[order].isnan()]
    names = [name for name in runs if name != sweeps.SEED]
    held = len(parts.judging.labels)
    print(f"\nThe best settings by accuracy on {held:,} held-out images, at each run's best epoch:")
    print(
        "".join(f"{name.replace('_', '-'):>18}" for name in names) + f"{'epochs':>9}{'held out, %':>18}{'test, %':>18}"
    )
    made, setting = epochs_made(done.found), sweeps.settings(runs)
    seeds_of = {place: (setting == place).nonzero().squeeze(1).tolist() for place in order.tolist()}
    for place in order[:SHOWN].tolist():
        first = int(held_out.rows[place])
        values = "".join(f"{runs[name][first].item():>18.5g}" for name in names)
        print(
            values
            + f"{max(made[k] for k in seeds_of[place]):>9}"
            + f"{percent(held_out.mean[place], held_out.deviation[place]):>18}"
            + f"{percent(tested.mean[place], tested.deviation[place]):>18}"
        )
    best = (sweeps.settings(runs) == order[0]).nonzero().squeeze(1)
    print()
    _together(done, parts, best, folder)
    panels = {axis.field: axis for axis in axes(options)}
    for name, axis in panels.items():
        outputs.write_picture(folder / f"{axis.name}.png", lambda n=name, a=axis: _picture(done, n, a))  # type: ignore[misc]
    if not PRIVATE_OVER & runs.keys():
        print(f"One run of the best, by train with this sweep's other options: {command(runs, int(best[0]))}")
    return 0


def table(options: Sweep) -> sweeps.Runs:
    """The runs that the options ask for."""
    seed = options.training.seed
    seeds = range(seed, seed + options.seeds)
    found = axes(options)
    if options.trials is None:
        return sweeps.grid(seeds=seeds, **{axis.field: axis.values for axis in found})
    key = random.fold_in(random.key(seed), DRAWS)
    return sweeps.random_search(key, options.trials, seeds=seeds, **{axis.field: _range(axis) for axis in found})


def rows(done: Swept) -> str:
    """One line for each run, as CSV."""
    names = [name for name in done.runs if name != sweeps.SEED]
    head = [*names, "seed", "setting", "status", "epochs", "failed_at_step", "best_epoch"]
    lines = [",".join([*head, "held_out_accuracy", "held_out_loss", "train_loss", "test_accuracy"])]
    found, setting = done.found, sweeps.settings(done.runs)
    held_out_loss = found.at_best("loss")
    train_loss = found.losses.gather(1, found.best_epoch.clamp(min=0)[:, None]).squeeze(1)
    for k in range(len(done.runs[sweeps.SEED])):
        epochs = epochs_made(found)[k]
        best, failed = int(found.best_epoch[k]), int(found.failed[k])
        values = [typed(done.runs[name][k].item()) for name in names]
        values += [str(int(done.runs[sweeps.SEED][k])), str(int(setting[k])), sweeps.STATUSES[int(found.ended[k])]]
        values += [str(epochs), "" if failed < 0 else str(failed), "" if best < 0 else str(best + 1)]
        numbers = [done.held_out[k], held_out_loss[k], train_loss[k], done.tested[k]]
        lines.append(
            ",".join([*values, *("" if best < 0 or number.isnan() else f"{number.item():.7g}" for number in numbers)])
        )
    return "\n".join(lines) + "\n"


def epochs_made(found: sweeps.Sweep) -> list[int]:
    """How many epochs each run has made."""
    made: list[int] = (~found.score.isnan()).sum(1).tolist()
    return made


def percent(mean: Tensor, deviation: Tensor) -> str:
    """A part as percent, with its deviation where there is one."""
    told = f"{100 * mean.item():.2f}"
    return told if deviation.isnan() else f"{told} ± {100 * deviation.item():.2f}"


def typed(value: float) -> str:
    """The shortest decimal number that is the same float32."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if torch.tensor(float(text)).item() == torch.tensor(value).item())


def command(runs: sweeps.Runs, place: int) -> str:
    """A run of a sweep as options of `train`."""
    told = []
    for name, column in runs.items():
        value = column[place].item()
        values = (value / 2, value) if name == "dropout" else (value,)
        told.append(" ".join([flag(name), *map(typed, values)]))
    return " ".join(told)


def _range(axis: Axis) -> sweeps.Uniform | sweeps.LogUniform | sweeps.OneOf:
    if not axis.ranged:
        return sweeps.OneOf(axis.values)
    low, high = axis.values
    return sweeps.LogUniform(low, high) if axis.name in LOGARITHMIC else sweeps.Uniform(low, high)


def _ended(done: Swept) -> str:
    """How the runs ended, and which have failed."""
    found = done.found
    counts = torch.bincount(found.ended, minlength=len(sweeps.STATUSES)).tolist()
    told = ", ".join(f"{count} {word}" for word, count in zip(sweeps.STATUSES, counts, strict=True) if count)
    lines = [f"Runs: {told}."]
    for k in (found.failed >= 0).nonzero().squeeze(1).tolist()[:SHOWN]:
        lines.append(f"Not finite after step {int(found.failed[k])}: {words(done.runs, k)}")
    return "\n".join(lines)


def _together(done: Swept, parts: Parts, best: Tensor, folder: Path) -> None:
    """What the models of the best setting say together, and how sure they are."""
    held_out = parts.judging
    logits = outputs_of(done, best, parts.test.images)
    labels = parts.test.labels
    single = (logits.argmax(-1) == labels).double().mean(-1)
    mean = ensemble.mean(logits)
    if len(best) > 1:
        averaged, voted = (_accuracy(given, labels) for given in (mean, ensemble.vote(logits)))
        apart, informed = ensemble.disagreement(logits).mean(), ensemble.mutual_information(logits).mean()
        print(
            f"The {len(best)} models of the best setting together, on the test images: {averaged} by their mean, "
            f"{voted} by vote; one alone {100 * single.mean().item():.2f}%. Two of them differ on "
            f"{100 * apart.item():.2f}% of the images; mutual information {informed.item():.4f} nats."
        )
    scale = calibration.temperature(ensemble.mean(outputs_of(done, best, held_out.images)), held_out.labels)
    curves = {}
    for name, given in (("as trained", mean), (f"temperature {scale.item():.2f}", mean / scale)):
        curves[name] = calibration.reliability(given.softmax(-1), labels)
        error, brier = curves[name].expected_error.item(), calibration.brier(given.softmax(-1), labels).item()
        print(f"Expected calibration error, {name}: {100 * error:.2f}%; Brier score {brier:.4f}")
    outputs.write_picture(folder / "reliability.png", lambda: plots.reliability(curves))


def _accuracy(outputs: Tensor, labels: Tensor) -> str:
    return f"{100 * (outputs.argmax(-1) == labels).double().mean().item():.2f}%"


def _picture(done: Swept, name: str, axis: Axis) -> bytes:
    """Accuracy against one thing that runs differ in; a line for each combination of the others, if they are few."""
    runs = done.runs
    found = spread(runs, done.held_out)
    others = [other for other in runs if other not in (name, sweeps.SEED)]
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for place, first in enumerate(found.rows.tolist()):
        if found.mean[place].isnan():
            continue
        label = ", ".join(f"{other.replace('_', '-')} {runs[other][first].item():.3g}" for other in others)
        deviation = found.deviation[place].nan_to_num(nan=0.0).item()
        point = (runs[name][first].item(), 100 * found.mean[place].item(), 100 * deviation)
        lines.setdefault(label, []).append(point)
    if len(lines) > 12:  # a cloud: a point for each setting
        bands = [plots.Band("", [x], [y], [error]) for line in lines.values() for x, y, error in line]
    else:
        bands = [plots.Band(label, *zip(*sorted(line), strict=True)) for label, line in lines.items()]
    return plots.scores(
        {"": bands}, across=axis.name, logarithmic=axis.name in LOGARITHMIC, height="accuracy on held-out images, %"
    )
