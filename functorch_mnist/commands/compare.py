"""`compare`: losses, optimizers and schedules, each at its own best learning rate."""

import shlex
from datetime import datetime
from pathlib import Path

from .. import plots
from .. import sweep as sweeps
from ..distributed import World
from ..options import Compare, combinations, lrs
from . import outputs, sources
from .processes import load, processes
from .sweep import percent, typed
from .sweeping import spread, swept


def compare(options: Compare) -> int:
    """Sweeps the learning rate of each combination, and prints and draws what it reached."""
    with processes(options.training, options) as world:
        return _compare(options, world)


def _compare(options: Compare, world: World) -> int:
    one = options.training
    parts = sources.divided(one, load(one, world))
    folder = one.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    print(f"Comparison folder: {folder}", flush=True)
    runs = sweeps.grid(seeds=range(one.seed, one.seed + options.seeds), lr=lrs(options))
    panels: dict[str, list[plots.Band]] = {}
    lines = ["loss,optimizer,schedule,lr,held_out_accuracy,held_out_deviation,test_accuracy,test_deviation"]
    best = []
    again = f"The same command with --out {shlex.quote(str(folder))}"
    for (loss, optimizer, schedule), given in combinations(options).items():
        name = f"{loss}, {optimizer}, {schedule}"
        print(f"{name}: {len(runs[sweeps.SEED])} runs", flush=True)
        own = folder / "-".join((loss, optimizer, schedule))
        done = swept(given, parts, runs, own, vmapped_runs=options.vmapped_runs, told=False, again=again, world=world)
        held_out, tested = spread(runs, done.held_out), spread(runs, done.tested)
        points = []
        for place, first in enumerate(held_out.rows.tolist()):
            lr, mean, deviation = runs["lr"][first].item(), held_out.mean[place], held_out.deviation[place]
            numbers = (mean, deviation, tested.mean[place], tested.deviation[place])
            cells = ("" if number.isnan() else f"{number.item():.7g}" for number in numbers)
            lines.append(",".join([loss, optimizer, schedule, typed(lr), *cells]))
            if not mean.isnan():
                points.append((lr, 100 * mean.item(), 100 * deviation.nan_to_num(nan=0.0).item()))
        if points:
            panels.setdefault(f"{loss}, {schedule}", []).append(plots.Band(optimizer, *zip(*points, strict=True)))
            place = int(held_out.mean.nan_to_num(nan=-1).argmax())
            best.append((name, runs["lr"][int(held_out.rows[place])].item(), place, held_out, tested))
        else:
            print(f"{name}: no learning rate has stayed finite with all seeds.")
    if world.rank:
        return int(not best)
    outputs.write(folder / "compared.csv", ("\n".join(lines) + "\n").encode())
    if not best:
        print("Nothing has stayed finite with all seeds.")
        return 1
    seeds = f", mean ± standard deviation over {options.seeds} seeds" if options.seeds > 1 else ""
    print(f"\nEach at its best learning rate on the held-out images{seeds}:")
    print(f"{'':<36}{'best lr':>10}{'held out, %':>18}{'test, %':>18}")
    for name, lr, place, held_out, tested in sorted(best, key=lambda row: -row[3].mean[row[2]].item()):
        columns = (percent(table.mean[place], table.deviation[place]) for table in (held_out, tested))
        print(f"{name:<36}{lr:>10.4g}" + "".join(f"{column:>18}" for column in columns))
    print()
    height = "accuracy on held-out images, %"
    outputs.write_picture(
        folder / "compared.png",
        lambda: plots.scores(panels, across="learning rate", logarithmic=True, height=height),
    )
    return 0
