"""The scores of training images at a run's checkpoints, and the files that show them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import attribution, files, plots
from .. import train as training
from ..checkpoint import JSON
from ..distributed import World
from ..models import Params
from ..options import UsageError
from .faults import check_finite
from .passes import passes
from .restore import Point, Trained

WIDTH = 12
"""Images in a row of a gallery."""
_BY_GRADIENT = frozenset({"grand", "self-influence"})


class Scored(NamedTuple):
    """What is known of each training image."""

    prediction: Tensor
    """(N,) int64: the class it is given at the last checkpoint."""
    scores: dict[str, Tensor]
    """(N,) each, by name: self-influence is a sum over checkpoints, forgetting a count, others are means over them."""


def scored(
    run: Trained,
    points: Sequence[Point],
    images: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    compile: bool,
    folder: Path,
    config: Mapping[str, JSON],
    world: World,
) -> Scored:
    """The scores of images with labels.

    Args:
        run: gives the model and the loss.
        points: the checkpoints, at least one.
        images, labels: (N, …) and (N,).
        names: of the scores.
        compile: whether to compile the pass.
        folder: where what is done is kept until all is.
        config: what the numbers hang on besides the checkpoints and the names.
        world: the processes.

    Raises:
        UsageError: a score needs more checkpoints than there are.
        DivergedError: a score is not finite.
    """
    if "forgetting" in names and len(points) < 2:
        raise UsageError("The score forgetting needs two checkpoints at least. Found 1. Does the run keep several?")
    by_gradient = not _BY_GRADIENT.isdisjoint(names)

    def one_pass(params: Params, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if by_gradient:
            found = attribution.scores(run.made.outputs, params, images, labels=labels, loss_fn=run.made.loss)
            return found._asdict()
        outputs = run.made.outputs(params, images)
        return {"loss": run.made.loss(outputs, labels), **attribution.output_scores(outputs, labels)._asdict()}

    call = training.compiled(one_pass) if compile else one_pass
    kinds = {"prediction": torch.int64, "loss": torch.float32, "el2n": torch.float32, "margin": torch.float32}
    with torch.no_grad():
        columns = passes(
            lambda number, *rows: call(points[number].params, *rows),
            (images, labels),
            kinds | ({"grand": torch.float32} if by_gradient else {}),
            count=len(points),
            given=[point.params for point in points],
            folder=folder,
            config={
                **config,
                "steps": [point.step for point in points],
                "by_gradient": by_gradient,
                "compile": compile,
            },
            world=world,
        )
    check_finite(columns, "The scores", "Has the run diverged?")
    lrs = torch.tensor([point.lr for point in points])
    scores = {}
    for name in names:
        if name == "self-influence":
            scores[name] = attribution.self_influence(columns["grand"], lrs)
        elif name == "forgetting":
            scores[name] = attribution.forgetting_events(columns["prediction"] == labels.cpu())
        else:
            scores[name] = columns[name].mean(0)
    return Scored(columns["prediction"][-1], scores)


def suspicion(name: str, score: Tensor) -> Tensor:
    """The score turned so that it is high where a label may be wrong."""
    return -score if name == "margin" else score


def write_csv(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Writes columns (N,) with a head, whole or not at all, into a folder that is made if it is not there; says so.

    Raises:
        OSError: it cannot be written.
    """
    write(path, _csv(columns))


def write_table(path: Path, columns: Mapping[str, Tensor]) -> None:
    """The same into a folder that is there, in silence.

    Raises:
        OSError: it cannot be written.
    """
    files.write(path, _csv(columns))


def write(path: Path, data: bytes) -> None:
    """Writes a file into a folder that is made if it is not there.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, data)
    print(f"Written: {path}", flush=True)


def write_picture(path: Path, draw: Callable[[], bytes]) -> None:
    """Draws and writes a picture; without matplotlib, says that there is none.

    Raises:
        OSError: it cannot be written.
    """
    try:
        picture = draw()
    except UsageError as error:
        print(f"No {path.name}: {error}")
        return
    write(path, picture)


def rows(title: str, chosen: Sequence[int], images: Tensor, captions: Sequence[str]) -> list[plots.Row]:
    """Rows of a gallery that show the chosen of all images, the first with a title."""
    found = []
    for start in range(0, len(chosen), WIDTH):
        part = list(chosen[start : start + WIDTH])
        found.append(plots.Row("" if start else title, images[part].squeeze(1), captions[start : start + WIDTH]))
    return found


def _csv(columns: Mapping[str, Tensor]) -> bytes:
    lists = [column.tolist() for column in columns.values()]
    lines = [",".join(columns), *(",".join(map(_cell, row)) for row in zip(*lists, strict=True))]
    return ("\n".join(lines) + "\n").encode()


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.7g}"
