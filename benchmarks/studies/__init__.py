"""Studies: experiments whose results are not times. One script each, one command: `python -m benchmarks.studies`.

| file | question |
|---|---|
| `mislabelled.py` | how well scores of single examples detect wrong labels |
| `noise_scale.py` | whether two estimators of the gradient noise scale agree, and what an epoch's average is |
| `ground_truth.py` | how well attributions predict the effect of leaving examples out |
| `datamodeling.py` | how well attributions predict models trained on half of the data: dattri's protocol |
| `private.py` | what accuracy differential privacy costs, and what helps |
| `audit.py` | how much of its ε one private run with canaries shows, and what they cost |
| `frontier.py` | how accurate a private classifier of MNIST is at each ε, and what changes that |
| `overfitting.py` | what helps where there are 1,000 images |
| `imbalance.py` | what helps where two classes are rare |
| `tuning.py` | how a sweep and gradients through training find hyperparameters; losses and optimizers compared |
| `best.py` | how good one network of the tutorial's can be, with a recipe chosen on held-out images |
| `kills.py` | whether runs whose processes are killed end as one that nothing stopped |
| `store_kills.py` | the same of the build of a store |
| `accuracy.py` | whether `train` ends as accurate as the article's program |
| `runs.py` | runs of `train`, in parallel, which several studies are made of |
| `__main__.py` | the command: runs studies, writes their records, prints their tables |

A study is a module with a `QUESTION`; `run`, whose record is JSON; and `table`, which reads the record alone.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

NAMES = (
    "mislabelled", "noise_scale", "ground_truth", "datamodeling", "private", "audit", "frontier", "overfitting",
    "imbalance", "tuning", "best", "accuracy", "kills", "store_kills",
)  # fmt: skip
PREFIX = "study-"
"""What the names of records begin with."""


class Study(Protocol):
    """What the module of a study holds."""

    @property
    def QUESTION(self) -> str:
        """One sentence."""

    def run(self, *, quick: bool, progress: Callable[[str], object]) -> dict[str, Any]:
        """The record: settings and the numbers of each seed. `progress` receives a line after each part."""

    def table(self, record: dict[str, Any]) -> dict[str, str]:
        """Tables in Markdown, by name, from a record."""


def load(name: str) -> Study:
    """A study, by the name of its script."""
    return cast(Study, import_module(f"benchmarks.studies.{name}"))


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are numbers."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (heads, *rows)]
    return "\n".join([lines[0], "|---" + "|---:" * (len(heads) - 1) + "|", *lines[1:]])
