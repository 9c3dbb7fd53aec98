"""`influence`: the training images that helped and hurt most on one test image."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import grad

from .. import per_sample, plots, statistics
from .. import train as training
from ..distributed import World
from ..models import Params
from ..options import Influence, UsageError
from ..tree import Tree
from . import restore, stored
from .faults import check_finite
from .passes import forget, passes
from .processes import processes
from .restore import Point
from .scoring import rows, write_csv, write_picture


def influence(options: Influence) -> int:
    """Writes influence.csv and pictures, and prints both ends."""
    with processes(options) as world:
        if options.store is not None:
            return stored.influence(options, options.store, world)
        return _influence(options, world)


def _influence(options: Influence, world: World) -> int:
    where = world.device
    run = restore.trained(options.run, where)
    dataset = restore.training_images(run, options.data_dir, where)
    test, method = options.tests[0], options.method or "tracin"
    if test >= len(dataset.test.images):
        raise UsageError(f"--test must be below {len(dataset.test.images)}. Found {test}.")
    points: Sequence[Point] = restore.points(options.run, run, where)
    if method != "tracin":
        points = points[-1:]
    images, labels = (part[: options.images] for part in dataset.train)
    image, label = (part[test] for part in dataset.test)
    loss_fn = restore.loss_of(run)

    def one_pass(params: Params, direction: Tree, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        quantity = statistics.cosines if method == "cosine" else per_sample.dot
        return {"influence": quantity(loss_fn, params, images, labels, direction=direction)}

    call = training.compiled(one_pass) if options.compile == "on" else one_pass
    directions = [grad(loss_fn)(point.params, image, label) for point in points]
    folder = options.out or options.run / "influence" / f"test-{test}-{method}"
    kept = folder / ".partial"
    config = restore.to_config(run.begun) | {
        "images": len(images), "test": test, "steps": [point.step for point in points],
        "method": method, "compile": options.compile,
    }  # fmt: skip
    print(
        f"Influence of {len(images):,} training images on test image {test}, a {int(label)}, "
        f"by {method} over {len(points)} checkpoint{'s'[: len(points) > 1]}.",
        flush=True,
    )
    columns = passes(
        lambda number, *part: call(points[number].params, directions[number], *part),
        (images, labels),
        {"influence": torch.float32},
        count=len(points),
        given=([point.params for point in points], directions),
        folder=kept,
        config=config,
        world=world,
    )
    if world.rank:
        return 0
    check_finite(columns, "The influences", "Has the run diverged?")
    lrs = torch.tensor([point.lr for point in points]) if method == "tracin" else torch.ones(1)
    found, labels = lrs @ columns["influence"], labels.cpu()
    write_csv(folder / "influence.csv", {"index": torch.arange(len(found)), "label": labels, "influence": found})
    order = found.argsort(descending=True, stable=True)
    helped = [i for i in order[: options.top].tolist() if found[i] > 0]
    hurt = [i for i in order.flip(0)[: options.top].tolist() if found[i] < 0]
    pictures = [plots.Row(f"test image {test}", image, [f"a {int(label)}"])]
    for title, chosen in (("Helped", helped), ("Hurt", hurt)):
        told = ", ".join(f"{i} (a {labels[i]}, {found[i]:.3g})" for i in chosen) or "none"
        print(f"{title} most: {told}")
        captions = [f"{i}: {labels[i]}\n{found[i]:.3g}" for i in chosen]
        pictures += rows(f"{title.lower()} most (index: label, influence)", chosen, images, captions)
    write_picture(folder / "influence.png", lambda: plots.gallery(pictures))
    forget(kept)
    return 0
