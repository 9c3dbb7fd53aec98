"""What it costs to score every training image: the whole command, against training for one epoch.

The reference is `train` with the article's settings: start-up, one epoch, the test images. The other arms start up,
take every training image's loss, outputs and gradient norm from that run's checkpoint, and write tables and pictures.
"""

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .epoch import lacking, train
from .measure import Arm, Case, Question, Setup, Work
from .programs import run

SCORES = "grand,el2n,self-influence"
IMAGES = 60_000
LEAST_ACCURACY, TOLERANCE = 98.0, 0.25


def scoring(folder: Path, setup: Setup, *options: str) -> Work:
    """The command on a run's folder, whose outputs are how many images it has scored."""
    line = ["-m", "functorch_mnist", "scores", str(folder / "run"), "--scores", SCORES, "--out", str(folder / "out")]
    line += ["--device", setup.device, "--threads", str(setup.threads), *options]

    def scored() -> float:
        with (folder / "out" / "scores.csv").open(encoding="utf-8") as file:
            return float(sum(1 for _ in csv.DictReader(file)))

    return Work(lambda: run(*line), scored)


def cases(setup: Setup) -> Iterator[Case]:
    """The whole training set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = ("--epochs", "0") if setup.quick else ()
        line = ("-m", "functorch_mnist", "train", "--out", str(folder / "run"), "--device", setup.device, *options)
        run(*line, "--threads", str(setup.threads))
        program, images = train(setup), ("--train-size", "2000") if setup.quick else ()
        expected = 2000.0 if setup.quick else float(IMAGES)
        yield Case(
            "all of MNIST",
            [
                Arm("train, one epoch", program.work, TOLERANCE, expected=lambda: LEAST_ACCURACY),
                Arm("scores", lambda: scoring(folder, setup, *images), expected=lambda: expected),
                Arm(
                    "scores, compiled",
                    lambda: scoring(folder, setup, "--compile", "on", *images),
                    expected=lambda: expected,
                ),
            ],
            lacking,
            1 if setup.quick else 3,
            warmups=0,
            lead=0,
            settings={"scores": SCORES, "accuracies": program.accuracies},
        )


QUESTION = Question("scores", "the whole scores command on all of MNIST, against one epoch of training", cases)
