"""Pictures. matplotlib comes with the `plot` extra and is imported only here."""

import io

from torch import Tensor

from .options import UsageError


def confusion(counts: Tensor, *, kind: str) -> bytes:
    """The picture of a confusion matrix, as the bytes of an image file.

    Args:
        counts: (K, K) int64, rows the true classes.
        kind: the file's format, such as `"png"` or `"pdf"`.

    Raises:
        UsageError: matplotlib is missing, or cannot write the format.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise UsageError(
            f"Pictures need matplotlib. Found: {error}. Install it: pip install 'functorch-mnist[plot]'."
        ) from error
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axes = pyplot.subplots(figsize=(6.4, 6), layout="constrained")
    axes.imshow(shares.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(counts)):
        for column in range(len(counts)):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="given class", ylabel="true class", title="Confusion matrix")
    axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=kind, dpi=150)
    except ValueError as error:
        raise UsageError(f"A picture's file must end in an image format. Found: {error}.") from error
    finally:
        pyplot.close(figure)
    return picture.getvalue()
