"""What the whole `train` command costs: start to end, against the article's program, on the same data.

The reference is the article's program with its one fault mended: `nn.Module`, torchvision's transforms, `DataLoader`,
`torch.optim.SGD`. Every arm is a process of its own, from start-up to the printed accuracy, which must be high enough.
Each call has another seed, the same for all arms, and the accuracies of all seeds are kept. A compiled arm's first call
may fill torch's cache, and its later ones find it filled. Each program keeps or returns freed memory in its own way.
"""

import gzip
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from functorch_mnist.data import sets

from .measure import Arm, Case, Comparison, Question, Setup
from .programs import Program

MOST_EPOCHS = 30
"""After which the article's program gives up on an accuracy."""
TOLERANCE = 0.25
"""In percent points: accuracies of single runs scatter by about that much."""


def article(root: str, least: float, setup: Setup) -> Program:
    """The article's program, which continues until an accuracy."""
    options = (root, "{seed}", str(MOST_EPOCHS), str(least), setup.device, str(setup.threads))
    return Program("-m", "benchmarks.article", *options)


def train(setup: Setup, *options: str) -> Program:
    """This library's command, with a folder of its own."""
    common = ("--seed", "{seed}", "--out", "{folder}/run", "--device", setup.device, "--threads", str(setup.threads))
    return Program("-m", "functorch_mnist", "train", *common, *options)


def lacking(accuracy: float, least: float) -> float:
    """By how many percent points an accuracy misses the least one."""
    return max(0.0, least - accuracy)


def unpack_mnist(root: Path) -> None:
    """Lays the shipped files out as torchvision wants them."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for packed in (Path(sets.__file__).parent / "mnist").glob("*.gz"):
        with gzip.open(packed) as source, (raw / packed.stem).open("wb") as target:
            shutil.copyfileobj(source, target)


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each accuracy."""
    half, compiled = ("--precision", "bfloat16"), ("--compile", "on")
    with tempfile.TemporaryDirectory() as root:
        unpack_mnist(Path(root))
        programs = {
            "article's program, float32": article(root, 98.0, setup),
            "train, float32": train(setup),
            "train, bfloat16": train(setup, *half),
            "train, compiled, float32": train(setup, *compiled),
            "train, compiled, bfloat16": train(setup, *half, *compiled),
        }
        if setup.quick:
            yield _case("to 98 %", 98.0, dict(list(programs.items())[:2]), rounds=1)
            return
        programs["train, fast recipe, bfloat16"] = train(setup, "--recipe", "fast")
        yield _case("to 98 %", 98.0, programs, rounds=4)
        programs = {
            "article's program, float32": article(root, 99.0, setup),
            "train, fast recipe, bfloat16": train(setup, "--recipe", "fast"),
        }
        yield _case("to 99 %", 99.0, programs, rounds=1)


def _case(name: str, least: float, programs: Mapping[str, Program], *, rounds: int) -> Case:
    """Programs that reach an accuracy; the end of a program's name is its precision."""
    arms = [
        Arm(name, program.work, TOLERANCE, name.rsplit(", ", 1)[1], expected=lambda: least)
        for name, program in programs.items()
    ]
    accuracies = {name: program.accuracies for name, program in programs.items()}
    settings = {"least_accuracy": least, "accuracies": accuracies}
    return Case(name, arms, lacking, rounds, warmups=0, lead=0, settings=settings)


def conclude(comparisons: Sequence[Comparison]) -> str:
    """The accuracies of all runs."""
    lines = ["| case | program | mean accuracy, % | minimum | maximum | seeds |", "|---|---|---:|---:|---:|---:|"]
    for comparison in comparisons:
        for name, found in comparison.settings["accuracies"].items():
            if found:
                numbers = f"{statistics.mean(found):.2f} | {min(found):.2f} | {max(found):.2f} | {len(found)}"
                lines.append(f"| {comparison.case} | {name} | {numbers} |")
    return "\n".join(lines)


QUESTION = Question("epoch", "the whole train command, to an accuracy, against the article's program", cases, conclude)
