"""`compare`: losses, optimizers and schedules, each at its own best learning rate."""

import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from .. import plots
from .. import sweep as sweeps
from ..distributed import World
from ..options import Compare, combinations, lrs
from . import outputs, sources
from .processes import load, processes
from .runs import Spread, Swept, claim, percent, resume_command, shortest, spread, swept, write_best


class _Best(NamedTuple):
    """A combination at its best learning rate."""

    name: str
    place: int
    """The setting."""
    done: Swept
    held_out: Spread
    tested: Spread

    @property
    def lr(self) -> float:
        return self.done.runs["lr"][int(self.held_out.rows[self.place])].item()

    @property
    def accuracy(self) -> float:
        """On the held-out images, the mean over seeds."""
        return self.held_out.mean[self.place].item()


def compare(options: Compare) -> int:
    """Sweeps the learning rate of each combination, and prints and draws the accuracies."""
    with processes(options.training, options) as world:
        return _compare(options, world)


def _compare(options: Compare, world: World) -> int:
    one = options.training
    parts = sources.divided(one, load(one, world))
    folder = one.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    if world.rank == 0:
        claim(folder, options)
    print(f"Comparison folder: {folder}", flush=True)
    runs = sweeps.grid(seeds=range(one.seed, one.seed + options.seeds), lr=lrs(options))
    panels: dict[str, list[plots.Band]] = {}
    lines = ["loss,optimizer,schedule,lr,held_out_accuracy,held_out_deviation,test_accuracy,test_deviation"]
    every, width = list[_Best](), options.vmapped_runs
    for (loss, optimizer, schedule), training in combinations(options).items():
        name = f"{loss}, {optimizer}, {schedule}"
        print(f"{name}: {outputs.plural(len(runs[sweeps.SEED]), 'run')}", flush=True)
        start = time.perf_counter()
        done = swept(
            training, parts, runs, folder / "-".join((loss, optimizer, schedule)), vmapped_runs=width,
            verbose=False, again=resume_command("compare", folder), world=world,
        )  # fmt: skip
        width = str(done.width)  # timed once
        held_out, tested = spread(runs, done.held_out), spread(runs, done.tested)
        points = []
        for place, first in enumerate(held_out.rows.tolist()):
            lr, mean, deviation = runs["lr"][first].item(), held_out.mean[place], held_out.deviation[place]
            numbers = (mean, deviation, tested.mean[place], tested.deviation[place])
            cells = ("" if number.isnan() else f"{number.item():.7g}" for number in numbers)
            lines.append(",".join([loss, optimizer, schedule, shortest(lr), *cells]))
            if not mean.isnan():
                points.append(plots.Point(lr, 100 * mean.item(), 100 * deviation.nan_to_num(nan=0.0).item()))
        if points:
            panels.setdefault(f"{loss}, {schedule}", []).append(plots.Band(optimizer, points))
            place = int(held_out.mean.nan_to_num(nan=-1).argmax())
            every.append(best := _Best(name, place, done, held_out, tested))
            seconds = time.perf_counter() - start
            print(f"  best lr {best.lr:.4g}: {100 * best.accuracy:.2f}% held out, in {seconds:.0f} s", flush=True)
        else:
            print("  no learning rate has stayed finite with all seeds")
    if world.rank:
        return int(not every)
    outputs.write(folder / "compared.csv", ("\n".join(lines) + "\n").encode())
    if not every:
        print("Nothing has stayed finite with all seeds.")
        return 1
    every.sort(key=lambda best: -best.accuracy)
    seeds = f", mean ± standard deviation over {options.seeds} seeds" if options.seeds > 1 else ""
    print(f"\nEach at its best learning rate on the held-out images{seeds}:")
    print(f"{'':<36}{'best lr':>10}{'held out, %':>18}{'test, %':>18}")
    for best in every:
        columns = (
            percent(table.mean[best.place], table.deviation[best.place]) for table in (best.held_out, best.tested)
        )
        print(f"{best.name:<36}{best.lr:>10.4g}" + "".join(f"{column:>18}" for column in columns))
    print()
    height = "accuracy on held-out images, %"
    outputs.write_picture(
        folder / "compared.png",
        lambda: plots.accuracies(panels, across="learning rate", logarithmic=True, height=height),
    )
    best = every[0]
    seeds_of_best = (sweeps.settings(runs) == best.place).nonzero().squeeze(1)
    place = best.done.best_of(seeds_of_best)
    write_best(best.done, place, folder, parts)
    print(
        f"Best run: {folder / 'best'}, {best.name}, lr {best.lr:.4g}, seed {int(runs[sweeps.SEED][place])}: "
        f"{100 * best.done.held_out[place]:.2f}% held out"
    )
    print(f"Try: functorch-mnist evaluate {folder}")
    return 0
