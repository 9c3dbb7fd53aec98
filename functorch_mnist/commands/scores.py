"""`scores`: the scores of the training images at a run's checkpoints, as a table and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import attribution, plots
from .. import train as training
from ..checkpoint import JSON
from ..distributed import World
from ..models import Params
from ..options import SCORES, Analysis, Scores, UsageError, listed
from . import outputs, restore
from .faults import check_finite
from .passes import forget, passes
from .processes import processes
from .restore import Point, Trained
from .sources import first_images

_BY_GRADIENT = frozenset({"grand", "self-influence"})
PARTIAL = ".partial"
"""The folder in the results' folder that keeps what is done until all is."""


class Scored(NamedTuple):
    """The model's answers for some training images, and their scores."""

    predicted: Tensor
    """(N,) int64: the predicted label at the last checkpoint."""
    scores: dict[str, Tensor]
    """(N,) each, by name: self-influence is a sum over checkpoints, forgetting a count, the others are means."""


def scores(options: Scores) -> int:
    """Writes scores.csv, histograms.png and gallery.png."""
    with processes(options) as world:
        return _scores(options, world)


def _scores(options: Scores, world: World) -> int:
    run = restore.trained(options.run, world.device)
    names = listed("--scores", options.scores, SCORES)
    points = restore.points(options.run, run, world.device)
    if options.checkpoints == "newest":
        points = points[-1:]
    dataset = first_images(restore.training_images(run, options.data_dir, world.device), options.images)
    (images, labels), index = dataset.train, dataset.indices
    folder = options.out or options.run / "scores"
    config = restore.to_config(run.begun) | {"images": len(images)}
    scored = scores_of(run, points, images, labels, names, options=options, folder=folder, config=config, world=world)
    if world.rank:
        return 0
    labels = labels.cpu()
    table = {"index": index, "given_label": labels, "predicted": scored.predicted, **scored.scores}
    outputs.write_csv(folder / "scores.csv", table)
    outputs.write_picture(folder / "histograms.png", lambda: plots.histograms(scored.scores))
    pictures = []
    for name, score in scored.scores.items():
        order = score.argsort(descending=True, stable=True)
        for end, chosen in (("highest", order[: outputs.WIDTH]), ("lowest", order[-outputs.WIDTH :].flip(0))):
            captions = [f"{index[i]}: {labels[i]}\n{score[i]:.3g}" for i in chosen.tolist()]
            pictures += outputs.rows(f"{end} {name} (index: given label, score)", images[chosen], captions)
    outputs.write_picture(folder / "gallery.png", lambda: plots.gallery(pictures))
    forget(folder / PARTIAL)
    for name, score in scored.scores.items():
        low, middle, high = score.float().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"{name:>15}: median {middle:.4g}, 80 % from {low:.4g} to {high:.4g}, largest {score.max():.4g}")
    return 0


def scores_of(
    run: Trained,
    points: Sequence[Point],
    images: Tensor,
    labels: Tensor,
    names: Sequence[str],
    *,
    options: Analysis,
    folder: Path,
    config: Mapping[str, JSON],
    world: World,
) -> Scored:
    """The scores of images with labels; self-influence is left out where it ranks as GraNd does, at one checkpoint.

    Args:
        run: gives the model and the loss.
        points: the checkpoints, at least one.
        images, labels: (N, …) and (N,).
        names: of the scores.
        options: say whether the pass is compiled.
        folder: of the results; what is done is kept there in `PARTIAL` until all is.
        config: what the numbers depend on besides the checkpoints and the names.
        world: the processes.

    Raises:
        UsageError: a score needs more checkpoints than there are.
        OSError: the folder cannot be written.
        DivergedError: a score is not finite.
    """
    if "forgetting" in names and len(points) < 2:
        raise UsageError("The score forgetting needs two checkpoints at least. Found 1. Does the run keep several?")
    if world.rank == 0:
        outputs.check_writable(folder)
    if len(points) == 1 and _BY_GRADIENT.issubset(names):
        names = [name for name in names if name != "self-influence"]
        print("At one checkpoint self-influence is the learning rate times GraNd squared, the same ranking: left out.")
    by_gradient = not _BY_GRADIENT.isdisjoint(names)
    place = f"the checkpoint after step {points[-1].step}"
    if len(points) > 1:
        place = f"{len(points)} checkpoints, the last after step {points[-1].step}"
    print(f"Scoring {len(images):,} training images at {place}.", flush=True)

    def one_pass(params: Params, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if by_gradient:
            return attribution.scores(run.made.outputs, params, images, labels=labels, loss_fn=run.made.loss)._asdict()
        logits = run.made.outputs(params, images)
        return {"loss": run.made.loss(logits, labels), **attribution.output_scores(logits, labels)._asdict()}

    compiled = options.compile == "on"
    call = training.compiled(one_pass) if compiled else one_pass
    kinds = {"prediction": torch.int64, "loss": torch.float32, "el2n": torch.float32, "margin": torch.float32}
    with torch.no_grad():
        columns = passes(
            lambda number, *rows: call(points[number].params, *rows),
            (images, labels),
            kinds | ({"grand": torch.float32} if by_gradient else {}),
            count=len(points),
            given=[point.params for point in points],
            folder=folder / PARTIAL,
            config={
                **config,
                "steps": [point.step for point in points],
                "by_gradient": by_gradient,
                "compile": compiled,
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
