"""`evaluate`: accuracy, recall per class and the confusion matrix on the test images."""

from torch import Tensor

from .. import run_folder
from .. import train as training
from ..options import Evaluate, UsageError
from . import build


def evaluate(options: Evaluate) -> int:
    """Prints what a run's newest parameters do on the test images."""
    if options.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1. Found {options.batch_size}.")
    where = build.device(options.device)
    made, params, classes = build.trained(options.run, where)
    saved = run_folder.read_config(options.run)
    folder = options.data_dir if options.dataset else options.data_dir or saved.data_dir
    test = build.load(options.dataset or saved.dataset, folder, where).test
    result = training.evaluate(made.outputs, made.loss, params, *test, batch_size=options.batch_size)
    print(f"Accuracy of the network on the {result.total} test images: {100 * result.accuracy:.2f}%")
    print(f"Mean loss: {result.loss.item():.4f}\n")
    print(_table(result.confusion, result.recall, classes))
    if options.png is not None:
        from .. import plots  # needs the plot extra

        plots.confusion(result.confusion, options.png)
        print(f"\nConfusion matrix drawn into {options.png}")
    return 0


def _table(confusion: Tensor, recall: Tensor, classes: int) -> str:
    """Rows are true classes, columns given ones."""
    width = max(5, len(str(int(confusion.max()))) + 1)
    head = "true \\ given" + "".join(f"{c:>{width}}" for c in range(classes)) + "   recall"
    rows = [
        f"{c:>12}" + "".join(f"{int(n):>{width}}" for n in confusion[c]) + f"{100 * recall[c].item():>8.2f}%"
        for c in range(classes)
    ]
    return "\n".join([head, *rows])
