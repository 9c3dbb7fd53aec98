"""`sweep`: many runs at once, the settings with the highest held-out accuracy, and the ensemble of the best one."""

from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .. import calibration, ensemble, plots, random
from .. import sweep as sweeps
from ..distributed import World
from ..options import LOGARITHMIC, PRIVATE_OVER, Axis, Sweep, axes
from . import outputs, sources
from .processes import load, processes
from .runs import Swept, claim, described, outputs_of, percent, resume_command, shortest, spread, swept, write_best
from .sources import Parts

SHOWN = 10
"""Settings in the table."""
DRAWS = 7
"""Names the random draw of settings, next to the seed."""


def sweep(options: Sweep) -> int:
    """Trains all runs, and prints and draws their accuracies."""
    with processes(options.training, options) as world:
        return _sweep(options, world)


def _sweep(options: Sweep, world: World) -> int:
    one = options.training
    parts = sources.divided(one, load(one, world))
    runs = table(options)
    folder = one.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    private = bool(PRIVATE_OVER & runs.keys())
    if world.rank == 0:
        claim(folder, options)
    print(f"Sweep folder: {folder}")
    settings = outputs.plural(int(sweeps.settings(runs).max()) + 1, "setting")
    total = outputs.plural(len(runs[sweeps.SEED]), "run")
    print(f"{total}: {settings}, each with {outputs.plural(options.seeds, 'seed')}.", flush=True)
    if private:
        print("Steps are clipped and noisy as private ones, of fixed batches; the privacy loss is not accounted for.")
    halving = None if options.halve_every is None else sweeps.Halving(options.halve_every, options.halve_keep)
    done = swept(
        one, parts, runs, folder, vmapped_runs=options.vmapped_runs, halving=halving,
        again=resume_command("sweep", folder), world=world,
    )  # fmt: skip
    if world.rank:
        return int(bool(done.held_out.isnan().all()))
    print(f"\n{_ended(done)}")
    outputs.write(folder / "runs.csv", rows(done).encode())
    held_out = spread(runs, done.held_out)
    if held_out.mean.isnan().all():
        print("No setting has made an epoch with all its seeds.")
        return 1
    order = held_out.mean.nan_to_num(nan=-1).argsort(descending=True, stable=True)
    _print(done, order[~held_out.mean[order].isnan()], len(parts.judging.labels))
    best = (sweeps.settings(runs) == order[0]).nonzero().squeeze(1)
    _ensemble(done, parts, best, folder)
    for axis in axes(options):
        outputs.write_picture(folder / f"{axis.name}.png", partial(_picture, done, axis))
    if private:
        print("Clipped and noisy steps without an account are no run of train: no best run is kept.")
        return 0
    place = done.best_of(best)
    write_best(done, place, folder, parts)
    print(f"Best run: {folder / 'best'}, {described(runs, place)}: {100 * done.held_out[place]:.2f}% held out")
    print(f"Try: functorch-mnist evaluate {folder}")
    return 0


def table(options: Sweep) -> sweeps.Runs:
    """The runs that the options ask for."""
    seed = options.training.seed
    seeds = range(seed, seed + options.seeds)
    if options.trials is None:
        return sweeps.grid(seeds=seeds, **{axis.field: axis.values for axis in axes(options)})
    key = random.fold_in(random.key(seed), DRAWS)
    return sweeps.random_search(
        key, options.trials, seeds=seeds, **{axis.field: _range(axis) for axis in axes(options)}
    )


def rows(done: Swept) -> str:
    """One line for each run, as CSV."""
    names = [name for name in done.runs if name != sweeps.SEED]
    head = [*names, "seed", "setting", "status", "epochs", "failed_at_step", "best_epoch"]
    lines = [",".join([*head, "held_out_accuracy", "held_out_loss", "train_loss", "test_accuracy"])]
    state, setting = done.state, sweeps.settings(done.runs)
    held_out_loss = state.at_best("loss")
    train_loss = state.losses.gather(1, state.best_epoch.clamp(min=0)[:, None]).squeeze(1)
    for k, epochs in enumerate(done.epochs):
        best, failed = int(state.best_epoch[k]), int(state.failed[k])
        values = [shortest(done.runs[name][k].item()) for name in names]
        values += [str(int(done.runs[sweeps.SEED][k])), str(int(setting[k])), sweeps.STATUSES[int(state.ended[k])]]
        values += [str(epochs), "" if failed < 0 else str(failed), "" if best < 0 else str(best + 1)]
        numbers = [done.held_out[k], held_out_loss[k], train_loss[k], done.tested[k]]
        lines.append(
            ",".join([*values, *("" if best < 0 or number.isnan() else f"{number.item():.7g}" for number in numbers)])
        )
    return "\n".join(lines) + "\n"


def _range(axis: Axis) -> sweeps.Uniform | sweeps.LogUniform | sweeps.OneOf:
    if not axis.ranged:
        return sweeps.OneOf(axis.values)
    low, high = axis.values
    return sweeps.LogUniform(low, high) if axis.name in LOGARITHMIC else sweeps.Uniform(low, high)


def _ended(done: Swept) -> str:
    """How the runs ended, and which have failed."""
    counts = torch.bincount(done.state.ended, minlength=len(sweeps.STATUSES)).tolist()
    statuses = ", ".join(f"{count} {word}" for word, count in zip(sweeps.STATUSES, counts, strict=True) if count)
    lines = [f"Runs: {statuses}."]
    for k in (done.state.failed >= 0).nonzero().squeeze(1).tolist()[:SHOWN]:
        lines.append(f"Not finite after step {int(done.state.failed[k])}: {described(done.runs, k)}")
    return "\n".join(lines)


def _print(done: Swept, order: Tensor, images: int) -> None:
    """The table of the best settings, by held-out accuracy; `order` has the places of those that have not failed."""
    runs, epochs, setting = done.runs, done.epochs, sweeps.settings(done.runs)
    held_out, tested = spread(runs, done.held_out), spread(runs, done.tested)
    names = [name for name in runs if name != sweeps.SEED]
    print(f"\nThe best settings by accuracy on {images:,} held-out images, at each run's best epoch:")
    print(
        "".join(f"{name.replace('_', '-'):>18}" for name in names) + f"{'epochs':>9}{'held out, %':>18}{'test, %':>18}"
    )
    for place in order[:SHOWN].tolist():
        seeds = (setting == place).nonzero().squeeze(1).tolist()
        print(
            "".join(f"{runs[name][seeds[0]].item():>18.5g}" for name in names)
            + f"{max(epochs[k] for k in seeds):>9}"
            + "".join(f"{percent(one.mean[place], one.deviation[place]):>18}" for one in (held_out, tested))
        )
    print()


def _ensemble(done: Swept, parts: Parts, best: Tensor, folder: Path) -> None:
    """The accuracy of the best setting's models as an ensemble, and its calibration."""
    logits, labels = outputs_of(done, best, parts.test.images), parts.test.labels
    mean = ensemble.mean(logits)
    if len(best) > 1:
        averaged, voted = (_accuracy(one, labels) for one in (mean, ensemble.vote(logits)))
        single = (logits.argmax(-1) == labels).double().mean()
        apart, informed = ensemble.disagreement(logits).mean(), ensemble.mutual_information(logits).mean()
        print(
            f"Ensemble of the {len(best)} models of the best setting, on the test images: {averaged} by the mean "
            f"probability, {voted} by majority vote; a single model {100 * single.item():.2f}%. Two models disagree on "
            f"{100 * apart.item():.2f}% of the images; mutual information {informed.item():.4f} nats."
        )
    held_out = parts.judging
    scale = calibration.temperature(ensemble.mean(outputs_of(done, best, held_out.images)), held_out.labels)
    curves = {}
    for name, one in (("as trained", mean), (f"temperature {scale.item():.2f}", mean / scale)):
        curves[name] = calibration.reliability(one.softmax(-1), labels)
        error, brier = curves[name].expected_error.item(), calibration.brier(one.softmax(-1), labels).item()
        print(f"Expected calibration error, {name}: {100 * error:.2f}%; Brier score {brier:.4f}")
    outputs.write_picture(folder / "reliability.png", lambda: plots.reliability(curves))


def _accuracy(logits: Tensor, labels: Tensor) -> str:
    return f"{100 * (logits.argmax(-1) == labels).double().mean().item():.2f}%"


def _picture(done: Swept, axis: Axis) -> bytes:
    """Accuracy against a hyperparameter; a line for each combination of the others, if they are few."""
    runs, held_out, setting = done.runs, spread(done.runs, done.held_out), sweeps.settings(done.runs)
    others = [other for other in runs if other not in (axis.field, sweeps.SEED)]
    stopped = (done.state.ended == sweeps.PRUNED) | (done.state.ended == sweeps.STOPPED)
    lines: dict[str, list[plots.Point]] = {}
    failed = 0
    for place, first in enumerate(held_out.rows.tolist()):
        if held_out.mean[place].isnan():
            failed += 1
            continue
        label = ", ".join(f"{other.replace('_', '-')} {runs[other][first].item():.3g}" for other in others)
        deviation = held_out.deviation[place].nan_to_num(nan=0.0).item()
        early = bool(stopped[setting == place].all())
        x, y = runs[axis.field][first].item(), 100 * held_out.mean[place].item()
        lines.setdefault(label, []).append(plots.Point(x, y, 100 * deviation, early))
    cloud = len(lines) > 12
    if cloud:
        lines = {"": [point for line in lines.values() for point in line]}
    bands = [plots.Band(label, sorted(line), joined=not cloud) for label, line in lines.items()]
    note = f"{outputs.plural(failed, 'setting')} not finite, not shown" if failed else ""
    return plots.accuracies(
        {note: bands}, across=axis.name, logarithmic=axis.name in LOGARITHMIC, height="accuracy on held-out images, %"
    )
