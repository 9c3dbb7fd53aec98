"""`evaluate`: accuracy, recall, precision and F1 per class, and the confusion matrix on the test images."""

import math

from .. import files, plots
from .. import train as training
from ..options import Evaluate
from . import restore, sources
from .faults import check_finite


def evaluate(options: Evaluate) -> int:
    """Prints the test accuracy of a run's newest parameters, and their confusion matrix."""
    where = sources.device(options.device)
    run = restore.trained(options.run, where)
    folder = options.data_dir if options.dataset else options.data_dir or run.options.data_dir
    test = sources.load(options.dataset or run.options.dataset, folder, where).test
    batch_size = min(options.batch_size, len(test.images))
    result = training.evaluate(run.made.outputs, run.made.test_loss, run.params, *test, batch_size=batch_size)
    check_finite(result.loss, "The loss on the test images")
    print(f"Accuracy of the network on the {result.total} test images: {100 * result.accuracy:.2f}%")
    print(f"Mean loss: {result.loss.item():.4f}")
    print(f"Macro-F1: {result.macro_f1:.4f}, balanced accuracy: {100 * result.balanced_accuracy:.2f}%\n")
    print(_table(result))
    if options.png is not None:
        files.write(options.png, plots.confusion(result.confusion, kind=options.png.suffix[1:].lower()))
        print(f"\nConfusion matrix drawn into {options.png}")
    return 0


def _table(result: training.Evaluation) -> str:
    """Rows are true classes, columns predicted ones."""
    confusion = result.confusion
    classes = len(confusion)
    width = max(5, len(str(int(confusion.max()))) + 1)
    head = "true \\ predicted" + "".join(f"{c:>{width}}" for c in range(classes)) + "   recall  precision      F1"
    rows = [
        f"{c:>16}"
        + "".join(f"{int(n):>{width}}" for n in confusion[c])
        + f"{_percent(result.recall[c].item()):>9}{_percent(result.precision[c].item()):>11}{result.f1[c].item():>8.4f}"
        for c in range(classes)
    ]
    return "\n".join([head, *rows])


def _percent(fraction: float) -> str:
    return "none" if math.isnan(fraction) else f"{100 * fraction:.2f}%"  # NaN: the class has no image
