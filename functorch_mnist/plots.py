"""Pictures, as the bytes of image files. matplotlib is imported only here, and only where a picture is drawn."""

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


class Point(NamedTuple):
    """A point with an error bar."""

    x: float
    y: float
    error: float
    stopped: bool = False
    """Whether it is of runs that were stopped before their last epoch."""


class Band(NamedTuple):
    """Points of one color."""

    name: str
    points: Sequence[Point]
    joined: bool = True
    """Whether a line joins them."""


def confusion(counts: Tensor, *, kind: str) -> bytes:
    """The picture of a confusion matrix.

    Args:
        counts: (K, K) int64, rows the true labels, columns the predicted ones.
        kind: the file's format, such as `"png"` or `"pdf"`.

    Raises:
        UsageError: matplotlib cannot write the format.
    """
    fractions = counts.double() / counts.sum(1, keepdim=True).clamp(min=1)
    figure, axes = _subplots(figsize=(6.4, 6))
    axes.imshow(fractions.cpu().numpy(), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(counts)):
        for column in range(len(counts)):
            color = "white" if fractions[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted label", ylabel="true label", title="Confusion matrix")
    axes.set(xticks=range(len(counts)), yticks=range(len(counts)))
    return _picture(figure, kind)


def histograms(columns: Mapping[str, Tensor]) -> bytes:
    """How each of some scores is distributed, on a logarithmic count: a PNG."""
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
    """The fraction of flipped labels detected against the fraction of examples inspected, for each score: a PNG."""
    figure, axes = _subplots(figsize=(6, 4.5))
    for name, (inspected, detected) in curves.items():
        axes.plot(inspected, detected, label=name)
    axes.plot([0, 1], [0, 1], ":", color="gray", label="expected at random")
    axes.set(
        title="Detection curve", xlabel="fraction of examples inspected", ylabel="fraction of flipped labels detected"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    _legend(figure, axes)
    return _picture(figure)


def noise_scale(bands: Sequence[Band], *, batch_size: int) -> bytes:
    """The noise scale against the step, with error bars of one standard error, and the batch size: a PNG."""
    figure, axes = _subplots(figsize=(6.4, 4.4))
    heights = [batch_size, *(point.y for band in bands for point in band.points)]
    axes.set_yscale("log")
    axes.set_ylim(min(heights) / 3, max(heights) * 3)  # an error bar may reach below zero
    note = _draw(axes, bands)
    axes.axhline(batch_size, linestyle=":", color="gray", label=f"the run's batch size, {batch_size}")
    axes.set(xlabel=f"step{note}", ylabel="noise scale, examples")
    _legend(figure, axes)
    return _picture(figure)


def accuracies(panels: Mapping[str, Sequence[Band]], *, across: str, logarithmic: bool, height: str) -> bytes:
    """An accuracy in percent against a hyperparameter, with a line for each band and a panel for each entry: a PNG.

    Args:
        panels: bands by the panel's title; all panels have one scale.
        across, height: the labels of the axes.
        logarithmic: of the axis across.
    """
    count = len(panels)
    figure, places = _subplots(1, count, figsize=(1.2 + 4.2 * count, 4.4), squeeze=False, sharey=True)
    ys = [point.y for bands in panels.values() for band in bands for point in band.points]
    margin = max(1.0, 0.1 * (max(ys) - min(ys)))
    places[0][0].set_ylim(max(0.0, min(ys) - margin), min(100.5, max(ys) + margin))
    for axes, (title, bands) in zip(places[0], panels.items(), strict=True):
        if logarithmic:
            axes.set_xscale("log")
        note = _draw(axes, bands)
        axes.set(xlabel=f"{across}{note}")
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    places[0][0].set(ylabel=height)
    _legend(figure, *places[0])
    return _picture(figure)


def _draw(axes: Any, bands: Sequence[Band]) -> str:
    """Draws bands, their error bars clipped to the axes; a note of what that leaves out, for below an axis."""
    low, high = axes.get_ylim()
    marked = {"marker": "X", "markersize": 10, "markeredgecolor": "black", "linestyle": ""}
    clipped, label = 0, "stopped early"
    for band in filter(lambda band: band.points, bands):
        x, y, error, _ = zip(*band.points, strict=True)
        clipped += sum(bool(p.y - p.error < low or p.y + p.error > high) for p in band.points)
        form = "o-" if band.joined else "o"
        line, *_ = axes.errorbar(x, y, yerr=error, fmt=form, markersize=4, capsize=2, label=band.name or None)
        ends = [(p.x, p.y) for p in band.points if p.stopped]
        if ends:
            axes.plot(*zip(*ends, strict=True), color=line.get_color(), label=label, **marked)
            label = ""
    return f"\n({clipped} error bar{'s'[: clipped > 1]} cut off at the edge)" if clipped else ""


def _legend(figure: Any, *panels: Any) -> None:
    """One legend below all panels, where it hides nothing; none where nothing has a name."""
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=min(3, len(entries)), fontsize=8
        )


def reliability(curves: Mapping[str, Reliability]) -> bytes:
    """Accuracy against confidence, and the number of examples at each confidence, for each curve: a PNG."""
    figure, (above, below) = _subplots(2, 1, figsize=(5.2, 6), sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], ":", color="gray", label="perfectly calibrated")
    for name, curve in curves.items():
        some = curve.examples > 0
        confidence = curve.confidence[some].cpu().numpy()
        above.plot(confidence, curve.accuracy[some].cpu().numpy(), "o-", markersize=4, label=name)
        below.plot(confidence, curve.examples[some].cpu().numpy(), "o-", markersize=4)
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    _legend(figure, above)
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
    _legend(figure, axes)
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
