"""What helps where two digits are rare: the tutorial's CNN on MNIST, of whose 8 and 9 all but 1 % are left out."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from . import markdown
from .runs import Job, Result, all_made, spread

QUESTION = "What helps where the digits 8 and 9 are cut to 1 %?"

CUT = (8, 9)
# Without a bound on the norm, weights that make up for 1 % let the first steps run away.
PLAIN = (
    "--imbalance 8=0.01,9=0.01 --dropout 0.1 0.25 --lr 0.02 --max-norm 1 --schedule one-cycle --warmup 0.2 "
    "--weight-decay 5e-4 --precision bfloat16 --compile on"
)
MOVED = "shift=2,rotate=10,scale=0.1,shear=0.1"
REMEDIES = {
    "plain": "",
    "class weights, balanced": "--class-weights balanced",
    "class weights, effective numbers": "--class-weights effective",
    "class weights, 5 for 8 and 9": "--class-weights 1,1,1,1,1,1,1,1,5,5",
    "balanced sampling": "--sampler balanced",
    "focal loss": "--focal-gamma 2",
    "logit adjustment": "--logit-adjustment 1",
    "augmentation": f"--augment {MOVED}",
    "logit adjustment and augmentation": f"--logit-adjustment 1 --augment {MOVED}",
    "balanced sampling and augmentation": f"--sampler balanced --augment {MOVED}",
}
"""Options of `train` in addition to the plain run's."""
EPOCHS, SEEDS = 3, (0, 1, 2)


def jobs(seeds: Sequence[int], epochs: int, more: str = "") -> list[Job]:
    """The runs."""
    return [
        Job(name, f"{PLAIN} --epochs {epochs} {remedy} {more}".strip(), seed)
        for seed in seeds
        for name, remedy in REMEDIES.items()
    ]


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: each run's options, accuracy and recalls."""
    made = all_made(jobs(SEEDS[:1], 1, "--train-size 2000") if quick else jobs(SEEDS, EPOCHS), progress)
    return {"runs": [result._asdict() for result in made]}


def table(record: dict[str, Any]) -> dict[str, str]:
    """Recall of the cut digits, of the others, and the accuracy."""
    runs = [Result(**row) for row in record["runs"]]
    rows = []
    for name, remedy in REMEDIES.items():
        found = [one for one in runs if one.name == name]
        cells = [spread([one.recall[digit] for one in found]) for digit in CUT]
        cells.append(spread([fmean(one.recall[digit] for digit in CUT) for one in found]))
        cells.append(spread([one.accuracy for one in found]))
        rows.append([name, f"`{remedy}`" if remedy else "", *cells])
    heads = ("remedy", "options", "recall of 8, %", "recall of 9, %", "both, %", "test accuracy, %")
    return {"Remedies": markdown(heads, rows)}
