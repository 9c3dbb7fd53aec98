"""How good one network of the tutorial's can be: `train --recipe best`, and the recipes that it was chosen from.

The candidates were trained on 55,000 images and compared on the 5,000 others, one run each. The chosen one is the
recipe, trained on all 60,000; test accuracy is of the 10,000 test images, and seconds are of the whole command.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch

from . import markdown
from .runs import Job, Result, all_made, made, spread

QUESTION = "How accurate can one network of the tutorial's be?"

SHARED = "--schedule one-cycle --warmup 0.2 --precision bfloat16 --compile on"
MOVED = "shift=2,rotate=10,scale=0.1,shear=0.1"
CANDIDATES = (
    f"--epochs 12 --lr 0.05 --weight-decay 5e-4 --dropout 0.1 0.25 --augment {MOVED},elastic=1",
    f"--epochs 12 --lr 0.02 --weight-decay 5e-4 --dropout 0.1 0.25 --augment {MOVED}",
    f"--epochs 12 --optimizer adamw --lr 0.001 --weight-decay 0.02 --dropout 0.1 0.25 --augment {MOVED},elastic=0.7",
    f"--epochs 12 --lr 0.02 --weight-decay 5e-4 --dropout 0 0.25 --augment {MOVED},elastic=0.7",
    f"--epochs 12 --lr 0.01 --nesterov --weight-decay 5e-4 --dropout 0.1 0.5 --augment {MOVED},elastic=0.7",
    f"--epochs 12 --lr 0.02 --weight-decay 5e-4 --dropout 0.1 0.25 --label-smoothing 0.1 --augment {MOVED},elastic=0.7",
    f"--epochs 12 --lr 0.05 --batch-size 256 --weight-decay 5e-4 --dropout 0.1 0.25 --augment {MOVED},elastic=0.7",
    f"--epochs 12 --lr 0.02 --weight-decay 5e-4 --dropout 0.1 0.25 --augment {MOVED},elastic=0.7 --ema-decay 0.999",
    f"--epochs 12 --lr 0.02 --weight-decay 1e-3 --dropout 0 0 --augment {MOVED},elastic=0.7 --ema-decay 0.999",
    f"--epochs 30 --lr 0.02 --weight-decay 5e-4 --dropout 0 0.25 --augment {MOVED},elastic=0.7 --ema-decay 0.999",
    f"--epochs 30 --lr 0.02 --weight-decay 1e-3 --dropout 0 0 --augment {MOVED},elastic=0.7 --ema-decay 0.999",
    f"--epochs 60 --lr 0.04 --batch-size 128 --weight-decay 1e-3 --dropout 0 0.25 --augment {MOVED},elastic=1 "
    "--ema-decay 0.999",
    "--epochs 30 --lr 0.02 --weight-decay 5e-4 --dropout 0 0.25 --deskew "
    "--augment shift=1,rotate=5,scale=0.1,shear=0.05,elastic=0.7 --ema-decay 0.999",
)
"""Options of `train`, in the order in which they were tried: the last is the recipe."""
CHOOSING, SEEDS = 0, (0, 1, 2)
QUICK = "--train-size 1000 --epochs 1"


def run(*, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
    """The record: the candidates' runs and the recipe's, these sequentially on all threads."""
    more = QUICK if quick else ""
    jobs = [Job(one, f"--hold-out 5000 {SHARED} {one} {more}", CHOOSING) for one in CANDIDATES]
    tried = all_made(jobs[:1] if quick else jobs, progress)
    found = []
    for seed in SEEDS[:1] if quick else SEEDS:
        found.append(made(Job("best", f"--recipe best {more}", seed), torch.get_num_threads()))
        progress(f"seed {seed}: {found[-1].accuracy:.2f} %, {found[-1].seconds:.0f} s")
    return {"candidates": [one._asdict() for one in tried], "runs": [one._asdict() for one in found]}


def table(record: dict[str, Any]) -> dict[str, str]:
    """The candidates on held-out images, and the recipe on test images."""
    tried = [Result(**row) for row in record["candidates"]]
    found = [Result(**row) for row in record["runs"]]
    candidates = [[f"`{one.name}`", f"{one.held_out:.2f}", f"{one.accuracy:.2f}"] for one in tried]
    rows = [[str(one.seed), f"{one.accuracy:.2f}", f"{one.seconds:.0f}"] for one in found]
    rows.append(["all", spread([one.accuracy for one in found]), f"{fmean(one.seconds for one in found):.0f}"])
    return {
        "Candidates": markdown(("candidate", "held-out %", "test %"), candidates),
        "Recipe": markdown(("seed", "test %", f"seconds, {found[0].threads} threads"), rows),
    }
