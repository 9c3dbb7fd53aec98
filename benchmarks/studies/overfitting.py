"""What helps against overfitting: the tutorial's CNN on 1,000 images, plain, with each remedy alone, and with several.

All runs make 40 epochs of one cycle from 64 images a step; the images are drawn by the seed. Each remedy has the
strength that did best of a few on 2,000 held-out images, on a seed of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

from . import markdown
from .runs import Job, Result, all_made, spread

QUESTION = "What helps against overfitting on 1,000 images?"

PLAIN = (
    "--train-size 1000 --hold-out 2000 --dropout 0 0 --lr 0.05 --schedule one-cycle --warmup 0.2 --precision bfloat16 "
    "--compile on"
)
MOVED, MORE = "shift=2,rotate=10,scale=0.1,shear=0.1", "shift=3,rotate=15,scale=0.15,shear=0.2"
REMEDIES: dict[str, tuple[str, ...]] = {
    "plain": ("--lr 0.02", "--lr 0.05"),
    "weight decay": ("--weight-decay 0.001", "--weight-decay 0.005"),
    "dropout": ("--dropout 0.1 0.25", "--dropout 0.25 0.5"),
    "label smoothing": ("--label-smoothing 0.1",),
    "mixup": ("--mixup 0.4",),
    "shifts": ("--augment shift=2", "--augment shift=3"),
    "shifts, rotations, scales and shears": (f"--augment {MOVED}", f"--augment {MORE}"),
    "elastic deformations": ("--augment elastic=1", "--augment elastic=2"),
    "random erasing": ("--augment erase=0.3", "--augment erase=0.6"),
    "early stopping": ("--patience 10",),
    "EMA of parameters": ("--ema-decay 0.98",),
    "stochastic weight averaging": ("--swa-start 0.5 --schedule constant --warmup 0.3 --lr 0.02",),
    "all together": (
        f"--augment {MOVED},elastic=1 --weight-decay 0.001 --dropout 0.1 0.25 --ema-decay 0.98",
        f"--augment {MOVED},elastic=2 --weight-decay 0.001 --dropout 0.1 0.25 --ema-decay 0.98",
        f"--augment {MOVED},elastic=1 --weight-decay 0.001 --dropout 0.25 0.5 --label-smoothing 0.05 --ema-decay 0.98",
    ),
}
"""Options of `train` in addition to the plain run's, to choose from; a later one counts."""
EPOCHS, SEEDS, CHOOSING = 40, (0, 1, 2, 3, 4), 100


def candidates(epochs: int) -> list[Job]:
    """The runs that strengths are chosen by."""
    return [
        Job(name, f"{PLAIN} --epochs {epochs} {one}", CHOOSING) for name, several in REMEDIES.items() for one in several
    ]


def chosen(results: Sequence[Result], seeds: Sequence[int]) -> list[Job]:
    """The runs to report: each remedy at the best of its strengths."""
    best = {name: max((one for one in results if one.name == name), key=_held_out) for name in REMEDIES}
    return [Job(name, one.options, seed) for seed in seeds for name, one in best.items()]


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: each run's options and accuracy."""
    tried = all_made(candidates(1 if quick else EPOCHS), progress)
    made = all_made(chosen(tried, SEEDS[:1] if quick else SEEDS), progress)
    return {"candidates": [result._asdict() for result in tried], "runs": [result._asdict() for result in made]}


def table(record: dict[str, Any]) -> dict[str, str]:
    """Test accuracy of each remedy."""
    runs = [Result(**row) for row in record["runs"]]
    plain = {one.seed: one.accuracy for one in runs if one.name == "plain"}
    rows = []
    for name in REMEDIES:
        found = [one for one in runs if one.name == name]
        gains = [one.accuracy - plain[one.seed] for one in found]
        options = next(one for one in REMEDIES[name] if found[0].options.endswith(one))
        tested = spread([one.accuracy for one in found])
        rows.append([name, f"`{options}`", spread([_held_out(one) for one in found]), tested, spread(gains)])
    return {"Remedies": markdown(("remedy", "options", "held-out %", "test %", "gain"), rows)}


def _held_out(result: Result) -> float:
    if result.held_out is None:
        raise ValueError(f"overfitting: a run must have held-out images. Found none in {result.options}.")
    return result.held_out
