"""`scores`: the scores of every training image, as a table and as pictures."""

import torch

from .. import plots
from ..distributed import World
from ..options import SCORES, Scores, listed
from . import restore
from .passes import forget
from .processes import processes
from .scoring import WIDTH, rows, scored, write_csv, write_picture


def scores(options: Scores) -> int:
    """Writes scores.csv, histograms.png and gallery.png."""
    with processes(options) as world:
        return _scores(options, world)


def _scores(options: Scores, world: World) -> int:
    where = world.device
    run = restore.trained(options.run, where)
    names = listed("--scores", options.scores, SCORES)
    points = restore.points(options.run, run, where)
    if options.checkpoints == "newest":
        points = points[-1:]
    train = restore.training_images(run, options.data_dir, where).train
    images, labels = (part[: options.images] for part in train)
    folder = options.out or options.run / "scores"
    kept = folder / ".partial"
    config = restore.to_config(run.begun) | {"images": len(images)}
    print(f"Scoring {len(images):,} training images at {_moments(len(points), points[-1].step)}.", flush=True)
    found = scored(
        run, points, images, labels, names, compile=options.compile == "on", folder=kept, config=config, world=world
    )
    if world.rank:
        return 0
    labels = labels.cpu()
    table = {"index": torch.arange(len(images)), "label": labels, "prediction": found.prediction, **found.scores}
    write_csv(folder / "scores.csv", table)
    write_picture(folder / "histograms.png", lambda: plots.histograms(found.scores))
    pictures = []
    for name, score in found.scores.items():
        order = score.argsort(descending=True, stable=True)
        for end, chosen in (("highest", order[:WIDTH]), ("lowest", order[-WIDTH:].flip(0))):
            captions = [f"{i}: {labels[i]}\n{score[i]:.3g}" for i in chosen.tolist()]
            pictures += rows(f"{end} {name} (index: label, score)", chosen.tolist(), images, captions)
    write_picture(folder / "gallery.png", lambda: plots.gallery(pictures))
    forget(kept)
    for name, score in found.scores.items():
        low, middle, high = score.float().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(f"{name:>15}: median {middle:.4g}, 80 % from {low:.4g} to {high:.4g}, most {score.max():.4g}")
    return 0


def _moments(count: int, last: int) -> str:
    return f"the checkpoint after step {last}" if count == 1 else f"{count} checkpoints, the last after step {last}"
