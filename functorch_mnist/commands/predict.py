"""`predict`: the likeliest classes and their probabilities, for image files or test images."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import train as training
from ..options import Predict, Train, UsageError, range_of
from . import build, images, restore, sources
from .faults import check_finite

SHOWN = 3
"""Classes of each image."""


def predict(options: Predict) -> int:
    """Prints a line per image: the likeliest classes, with their probabilities; returns 1 if a file is no image."""
    where = sources.device(options.device)
    run = restore.trained(options.run, where)
    if options.save_inputs is not None:
        options.save_inputs.mkdir(parents=True, exist_ok=True)  # refused before the work, if it cannot be
    names, faults = list[str](), list[str]()
    if options.test is None:
        names, pixels, faults = _files(options.images)
    else:
        names, pixels = _test_images(run.options, *range_of("--test", options.test), where)
    if names:
        pixels = pixels.to(where)
        probabilities = training.predictions(run.made.outputs, run.params, pixels).softmax(-1)
        check_finite(probabilities, "The probabilities")
        for name, row in zip(names, probabilities, strict=True):
            likeliest = row.topk(SHOWN)
            pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
            print(f"{name}: " + ", ".join(f"{digit} ({probability:.4f})" for digit, probability in pairs))
    if names and options.save_inputs is not None:
        for number, (name, image) in enumerate(zip(names, build.seen(run.begun.options, pixels), strict=True)):
            stem = Path(name).stem if options.test is None else name.partition(",")[0].replace(" ", "-")
            images.save(options.save_inputs / f"{number:03}-{stem}.png", image)
        print(f"Written: what the network sees, {len(names)} files in {options.save_inputs}")
    sys.stdout.flush()
    for fault in faults:
        print(f"functorch-mnist: {fault}", file=sys.stderr)
    return int(bool(faults))


def _files(paths: Sequence[Path]) -> tuple[list[str], torch.Tensor, list[str]]:
    """The names and pixels of the files that can be read, and what is wrong with the others."""
    good, faults = dict[str, torch.Tensor](), []
    for path in paths:
        try:
            good[str(path)] = images.read(path)
        except UsageError as error:
            faults.append(str(error))
    return list(good), torch.stack(list(good.values())) if good else torch.empty(0), faults


def _test_images(saved: Train, start: int, stop: int, where: torch.device) -> tuple[list[str], torch.Tensor]:
    test = sources.load(saved.dataset, saved.data_dir, where).test
    if stop > len(test.images):
        raise UsageError(f"--test must be within the {len(test.images)} test images. Found {start}:{stop}.")
    return [f"test image {i}, label {int(test.labels[i])}" for i in range(start, stop)], test.images[start:stop]
