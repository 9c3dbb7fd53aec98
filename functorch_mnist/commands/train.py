"""`train`: one run, from the data to the accuracy on the test images."""

import sys
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from .. import allocator, checkpoint, data, run_folder
from .. import train as training
from ..models import Params
from ..options import INTERRUPTED, Train, to_json
from . import build
from .build import Saved
from .callbacks import Reporter, Saver


def train(options: Train) -> int:
    """Trains as the options say, or goes on; prints the accuracy on the test images."""
    allocator.keep_freed_memory()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    where = build.device(options.device)
    dataset = build.load(options.dataset, options.data_dir, where)
    pixels = data.normalization(dataset.train.images)
    per_epoch = data.steps_per_epoch(len(dataset.train.images), options.batch_size)
    made = build.classifier(options, pixels, dataset.classes)
    optimizer = build.optimizer(options, per_epoch)
    saved = build.start(options, made, optimizer, where)

    folder = options.resume or options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    saved_step = -1
    if options.resume is None:
        run_folder.create(folder, options)
    else:
        saved, saved_step = _resumed(folder, saved)
        run_folder.write_config(folder, options)
    print(f"Run folder: {folder}", flush=True)

    def losses_fn(params: Params, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        return made.loss(made.outputs(params, images, keys), labels)

    step = training.make_step(training.batch_gradient(losses_fn), optimizer)
    compiled = options.compile == "on"
    config = {"options": to_json(options), "pixels": list(pixels), "classes": dataset.classes}
    saver = Saver(folder, saved, saved_step=saved_step, every=options.save_every, keep=options.keep, config=config)
    reporter = Reporter(folder, epochs=options.epochs, total=options.epochs * per_epoch, done=int(saved.state.step))
    try:
        state = training.fit(
            training.compiled(step) if compiled else step,
            saved.state,
            dataset.train,
            epochs=options.epochs,
            batch_size=options.batch_size,
            pad=compiled,
            loss=saved.loss,
            callbacks=(saver, reporter),
        )
    except KeyboardInterrupt:
        reporter.close()
        print(
            f"Interrupted after step {saver.save()}. Go on with: functorch-mnist train --resume {folder}",
            file=sys.stderr,
        )
        return INTERRUPTED
    reporter.close()
    saver.save()
    result = training.evaluate(made.outputs, made.loss, state.params, *dataset.test)
    counts = {"correct": result.correct, "total": result.total}
    run_folder.append_metrics(folder, {"kind": "test", "step": saver.saved_step, "loss": result.loss.item(), **counts})
    print(f"Accuracy of the network on the {result.total} test images: {100 * result.accuracy:.2f}%")
    return 0


def _resumed(folder: Path, template: Saved) -> tuple[Saved, int]:
    """The newest good state of a run and its step; its start and -1 where it has saved none."""
    if not checkpoint.steps(folder / run_folder.CHECKPOINTS):
        print("The run has no checkpoint yet: starting from the beginning.")
        run_folder.forget_metrics_after(folder, 0)
        return template, -1
    found, faults = checkpoint.latest(folder / run_folder.CHECKPOINTS, template)
    for fault in faults:
        print(f"Passed over a damaged checkpoint: {fault}")
    print(f"Going on after step {found.step}.")
    run_folder.forget_metrics_after(folder, found.step)
    saved: Saved = found.state
    return saved, found.step
