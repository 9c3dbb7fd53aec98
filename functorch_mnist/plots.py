"""Pictures, as the bytes of image files. matplotlib comes with the `plot` extra and is imported only here."""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .calibration import Reliability
from .options import UsageError


class Row(NamedTuple):
    """One row of a gallery."""

    title: str
    images: Tensor
    """(N, 28, 28) uint8."""
    captions: Sequence[str]
    """One below each image."""


class Band(NamedTuple):
    """A line of points with error bars."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]


def confusion(counts: Tensor, *, kind: str) -> bytes:
    """The picture of a confusion matrix.

    Args:
        counts: (K, K) int64, rows the true labels, columns the predicted ones.
        kind: the file's format, such as `"png"` or `"pdf"`.

    Raises:
        UsageError: matplotlib is missing, or cannot write the format.
    """
    shares = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axes = _subplots(figsize=(6.4, 6))
    axes.imshow(shares.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(counts)):
        for column in range(len(counts)):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted label", ylabel="true label", title="Confusion matrix")
    axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
    return _picture(figure, kind)


def histograms(columns: Mapping[str, Tensor]) -> bytes:
    """How each of some scores is distributed, on a logarithmic count: a PNG.

    Raises:
        UsageError: matplotlib is missing; so do the others.
    """
    figure, panels = _subplots(1, len(columns), figsize=(3.6 * len(columns), 3), squeeze=False)
    for axes, (name, values) in zip(panels[0], columns.items(), strict=True):
        axes.hist(values.cpu().numpy(), bins=60, log=True, color="#4477aa")
        axes.set(xlabel=name, ylabel="examples")
    return _picture(figure)


def gallery(rows: Sequence[Row]) -> bytes:
    """Rows of images, light digits on black, each with a title above: a PNG."""
    widest = max(len(row.images) for row in rows)
    figure, panels = _subplots(len(rows), widest, figsize=(widest * 0.95, len(rows) * 1.55), squeeze=False)
    for line, row in zip(panels, rows, strict=True):
        for axes in line:
            axes.axis("off")
        for axes, image, caption in zip(line, row.images.cpu().numpy(), row.captions, strict=False):
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.text(0.5, -0.06, caption, transform=axes.transAxes, ha="center", va="top", fontsize=7)
        title = line[0].text(0, 1.08, row.title, transform=line[0].transAxes, fontsize=9, weight="bold")
        title.set_in_layout(False)  # it is longer than its image is wide
    return _picture(figure)


def detection(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """The share of planted flips found against the share of examples checked, for each score: a PNG."""
    figure, axes = _subplots(figsize=(6, 4.5))
    for name, (checked, shares) in curves.items():
        axes.plot(checked, shares, label=name)
    axes.plot([0, 1], [0, 1], ":", color="gray", label="at random")
    axes.set(xlabel="part of the examples checked", ylabel="part of the flips found", xlim=(0, 1), ylim=(0, 1.02))
    axes.legend(loc="lower right", fontsize=8)
    return _picture(figure)


def noise_scale(bands: Sequence[Band], *, batch_size: int) -> bytes:
    """The noise scale against the step, with error bars of one standard error, and the batch size: a PNG."""
    figure, axes = _subplots(figsize=(6.4, 4.2))
    for band in bands:
        axes.errorbar(band.x, band.y, yerr=band.error, fmt="o-", markersize=3, capsize=2, label=band.name)
    axes.axhline(batch_size, linestyle=":", color="gray", label=f"the run's batch size, {batch_size}")
    axes.set(xlabel="step", ylabel="noise scale, examples")
    axes.set_yscale("log")
    heights = [batch_size, *(y for band in bands for y in band.y)]
    axes.set_ylim(min(heights) / 3, max(heights) * 3)  # an error bar may reach below zero
    axes.legend(fontsize=8)
    return _picture(figure)


def scores(panels: Mapping[str, Sequence[Band]], *, across: str, logarithmic: bool, height: str) -> bytes:
    """A score against what it hangs on, a line for each band, side by side for each panel: a PNG.

    Args:
        panels: bands by the panel's title; all panels have one scale.
        across, height: what the axes show.
        logarithmic: of the axis across.
    """
    count = len(panels)
    figure, places = _subplots(1, count, figsize=(1.2 + 4.2 * count, 4), squeeze=False, sharey=True)
    for axes, (title, bands) in zip(places[0], panels.items(), strict=True):
        for band in bands:
            axes.errorbar(band.x, band.y, yerr=band.error, fmt="o-", markersize=3, capsize=2, label=band.name)
        if logarithmic:
            axes.set_xscale("log")
        axes.set(xlabel=across)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    places[0][0].set(ylabel=height)
    if any(band.name for bands in panels.values() for band in bands):
        places[0][-1].legend(fontsize=8)
    return _picture(figure)


def reliability(curves: Mapping[str, Reliability]) -> bytes:
    """Accuracy against confidence, and how many examples are how sure, for each curve: a PNG."""
    figure, (above, below) = _subplots(2, 1, figsize=(5.2, 6), sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], ":", color="gray")
    for name, found in curves.items():
        some = found.examples > 0
        confidence = found.confidence[some].cpu().numpy()
        above.plot(confidence, found.accuracy[some].cpu().numpy(), "o-", markersize=4, label=name)
        below.plot(confidence, found.examples[some].cpu().numpy(), "o-", markersize=4)
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    above.legend(loc="upper left", fontsize=8)
    below.set(xlabel="confidence", ylabel="images", yscale="log")
    return _picture(figure)


def spent(curves: Mapping[str, Sequence[float]], *, epochs: Sequence[float], title: str, kind: str) -> bytes:
    """ε over the epochs.

    Args:
        curves: ε at each of the epochs, by name of the accountant.
        epochs: increasing.
        title: what ran.
        kind: as in `confusion`.
    """
    figure, axes = _subplots(figsize=(6.4, 4.2))
    for name, values in curves.items():
        axes.plot(epochs, values, "o-", markersize=3, label=name)
    axes.set(xlabel="epochs", ylabel="ε", xlim=(0, None), ylim=(0, None))
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _picture(figure, kind)


def _subplots(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*args, layout="constrained", **kwargs)
    return figure, axes


def _picture(figure: Any, kind: str = "png") -> bytes:
    """The figure's file; the figure is closed."""
    from matplotlib import pyplot

    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=kind, dpi=150)
    except ValueError as error:
        raise UsageError(f"A picture's file must end in an image format. Found: {error}.") from error
    finally:
        pyplot.close(figure)
    return picture.getvalue()
