"""How hyperparameters are found: by sweeps, with and without halving, and by gradients through training; what losses,
optimizers and schedules do, each at its best learning rate.

An MLP 784-128-10 on 10,000 images, five epochs of one cycle. The gradients begin at a learning rate that is far too
small. What each way finds is trained by `train` with five seeds; seconds are of the search alone.
"""

import contextlib
import csv
import io
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from functorch_mnist import cli, run_folder

from . import markdown
from .runs import Job, Result, all_made, spread

QUESTION = "How are hyperparameters found, and which loss and optimizer do best?"

COMMON = "--model mlp --train-size 10000 --hold-out 5000 --epochs 5 --schedule one-cycle"
START = "--lr 0.001"
OVER = "--over lr=0.003:1 --over weight-decay=1e-6:0.01"
SWEEPS = {
    "sweep, 24 settings": f"{OVER} --trials 24",
    "sweep, 64 settings, halving": f"{OVER} --trials 64 --halve-every 1",
}
TUNED = "gradients through training"
STEPS, ROUNDS = 200, 12
SEEDS = (0, 1, 2, 3, 4)
COMPARED = "--epochs 3 --seeds 3"
QUICK = "--train-size 500 --hold-out 500 --epochs 1"


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: what each way has found and how long it took, the runs with it, and the comparison's table."""
    more = QUICK if quick else ""
    found = {"the start": (START, 0.0)}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, options) in enumerate(SWEEPS.items()):
            out = Path(folder) / str(number)
            seconds = _called(f"sweep {COMMON} {options} {more} --out {out}")
            found[name] = _best_of(out), seconds
            progress(f"{name}: {found[name]}")
        out = Path(folder) / "tuned"
        tuning = f"--tune lr,weight-decay --tune-steps {5 if quick else STEPS} --tune-rounds {2 if quick else ROUNDS}"
        whole = _called(f"train {COMMON} {START} {tuning} {more} --out {out}")
        tuned = run_folder.read_config(out)
        chosen = f"--lr {tuned.lr:.6g} --weight-decay {tuned.weight_decay:.6g}"
        alone = _called(f"train {COMMON} {chosen} {more} --out {Path(folder) / 'alone'}")
        found[TUNED] = chosen, whole - alone
        progress(f"{TUNED}: {found[TUNED]}")
        _called(f"compare {COMPARED} {more} {'--lrs 0.01,0.1' if quick else ''} --out {Path(folder) / 'compared'}")
        with (Path(folder) / "compared" / "compared.csv").open() as file:
            compared = list(csv.DictReader(file))
    jobs = [Job(name, f"{COMMON} {chosen} {more}", seed) for name, (chosen, _) in found.items() for seed in SEEDS]
    made = all_made(jobs[:: len(SEEDS)] if quick else jobs, progress)
    return {
        "selected": {name: {"options": chosen, "seconds": seconds} for name, (chosen, seconds) in found.items()},
        "runs": [result._asdict() for result in made],
        "compared": compared,
    }


def table(record: dict[str, Any]) -> dict[str, str]:
    """The ways, and the comparison at the best learning rates."""
    runs = [Result(**row) for row in record["runs"]]
    rows = []
    for name, one in record["selected"].items():
        own = [result for result in runs if result.name == name]
        held_out = spread([result.held_out for result in own if result.held_out is not None])
        tested = spread([result.accuracy for result in own])
        rows.append([name, f"`{one['options']}`", f"{one['seconds']:.0f}", held_out, tested])
    ways = markdown(("method", "selected setting", "seconds", "held-out %", "test %"), rows)
    return {"Ways": ways, "Losses, optimizers and schedules": _compared(record["compared"])}


def _compared(lines: Sequence[dict[str, str]]) -> str:
    best: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        name = line["optimizer"], line["loss"], line["schedule"]
        if line["held_out_accuracy"] and (
            name not in best or float(line["held_out_accuracy"]) > float(best[name]["held_out_accuracy"])
        ):
            best[name] = line
    columns = list(dict.fromkeys(name[1:] for name in best))
    rows = [
        [optimizer, *(_cell(best.get((optimizer, *column))) for column in columns)]
        for optimizer in dict.fromkeys(name[0] for name in best)
    ]
    return markdown(("test %, at the best lr", *(", ".join(column) for column in columns)), rows)


def _cell(line: dict[str, str] | None) -> str:
    if line is None:
        return "—"
    deviation = f" ± {100 * float(line['test_deviation']):.2f}" if line["test_deviation"] else ""
    return f"{100 * float(line['test_accuracy']):.2f}{deviation}, {float(line['lr']):g}"


def _called(command: str) -> float:
    """How many seconds a command takes.

    Raises:
        RuntimeError: it has failed.
    """
    output = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = cli.main(command.split())
    if status:
        raise RuntimeError(f"{command} failed with status {status}: {output.getvalue()[-500:]}")
    return time.perf_counter() - start


def _best_of(folder: Path) -> str:
    """The options of a sweep's best run on held-out images."""
    with (folder / "runs.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["held_out_accuracy"]]
    best = max(lines, key=lambda line: float(line["held_out_accuracy"]))
    return f"--lr {float(best['lr']):.6g} --weight-decay {float(best['weight_decay']):.6g}"
