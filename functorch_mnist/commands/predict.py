"""`predict`: the class and its probability, for image files or test images."""

import torch

from .. import train as training
from ..options import Predict, Train, UsageError
from . import images, restore, sources
from .faults import check_finite


def predict(options: Predict) -> int:
    """Prints a line per image: its name, the likeliest class and the class's probability."""
    if bool(options.images) == (options.test is not None):
        raise UsageError("predict needs image files, or a range of test images by --test FIRST LAST, and not both.")
    where = sources.device(options.device)
    run = restore.trained(options.run, where)
    if options.test is None:
        names = [str(path) for path in options.images]
        pixels = torch.stack([images.read(path) for path in options.images]).to(where)
    else:
        names, pixels = _test_images(run.options, *options.test, where)
    probabilities = training.predictions(run.made.outputs, run.params, pixels).softmax(-1)
    check_finite(probabilities, "The probabilities")
    for name, row in zip(names, probabilities, strict=True):
        print(f"{name}: {int(row.argmax())} ({row.max().item():.4f})")
    return 0


def _test_images(saved: Train, first: int, last: int, where: torch.device) -> tuple[list[str], torch.Tensor]:
    test = sources.load(saved.dataset, saved.data_dir, where).test
    if not 0 <= first < last <= len(test.images):
        raise UsageError(f"--test must be a range within 0 and {len(test.images)}. Found {first} {last}.")
    names = [f"test image {i}, a {int(test.labels[i])}" for i in range(first, last)]
    return names, test.images[first:last]
