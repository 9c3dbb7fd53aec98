"""`noise-scale`: the gradient noise scale during a run, with error bars, and the batch size that it advises."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import files, plots, random, run_folder, statistics
from ..distributed import World, broadcast, check_agreed, digest
from ..models import Params
from ..options import NoiseScale, UsageError
from . import outputs, restore
from .faults import check_finite
from .passes import CHUNK, bar
from .processes import SAME, processes
from .restore import Point, Trained
from .sources import first_images

_KEPT = ".partial.json"


class Measured(NamedTuple):
    """A noise scale over some steps of a run."""

    first: int
    last: int
    estimate: statistics.NoiseScale


def noise_scale(options: NoiseScale) -> int:
    """Prints a line for each part of the run that was watched and for each checkpoint; writes a table and a picture."""
    with processes(options) as world:
        return _noise_scale(options, world)


def _noise_scale(options: NoiseScale, world: World) -> int:
    run = restore.trained(options.run, world.device)
    folder = options.out or options.run / "noise-scale"
    records = [r for r in run_folder.read_metrics(options.run) if r["kind"] == "watch" and _is_noise(r)]
    estimates = {
        "batches": _watched(records, options.windows),
        "checkpoint": _at_checkpoints(options, run, folder, world),
    }
    if world.rank:
        return 0
    print(f"{'from':>12}{'steps':>16}{'noise scale':>14}{'error':>10}{'tr Σ':>12}{'|E ∇|²':>12}")
    lines = ["from,first_step,last_step,noise_scale,error,trace,trace_error,square_norm,square_norm_error,samples"]
    for source, measured in estimates.items():
        for first, last, one in measured:
            steps = str(last) if first == last else f"{first} to {last}"
            error = float(f"{one.error:.2g}")
            print(f"{source:>12}{steps:>16}{one.scale:>14.4g}{error:>10g}{one.trace:>12.4g}{one.square_norm:>12.4g}")
            lines.append(",".join([source, str(first), str(last), *map(str, one)]))
    whole = _watched(records, 1)
    if whole:
        print(f"Noise scale of the watched steps together: {whole[0].estimate}")
        print(_trust(estimates["batches"], estimates["checkpoint"][-1]))
    print(_advice((whole or estimates["checkpoint"])[-1].estimate, run.begun.options.batch_size))
    outputs.write(folder / "noise-scale.csv", ("\n".join(lines) + "\n").encode())
    bands = [_band(source, measured) for source, measured in estimates.items() if measured]
    outputs.write_picture(
        folder / "noise-scale.png", lambda: plots.noise_scale(bands, batch_size=run.begun.options.batch_size)
    )
    (folder / _KEPT).unlink(missing_ok=True)
    return 0


def _is_noise(record: Mapping[str, Any]) -> bool:
    """Whether a record has a step's noise, and not what was edited by hand."""
    return all(isinstance(record.get(name), float) for name in ("trace", "square_norm"))


def _watched(records: Sequence[Mapping[str, Any]], windows: int) -> list[Measured]:
    """The noise scale over parts of the watched steps, three steps in each at least."""
    size = max(3, math.ceil(len(records) / windows))
    parts = [records[i : i + size] for i in range(0, len(records), size)]
    measured = []
    for part in parts:
        if len(part) >= 3:
            columns = [torch.tensor([float(r[name]) for r in part]) for name in ("trace", "square_norm")]
            measured.append(Measured(part[0]["step"], part[-1]["step"], statistics.mean_noise_scale(*columns)))
    return measured


def _at_checkpoints(options: NoiseScale, run: Trained, folder: Path, world: World) -> list[Measured]:
    """The noise scale at each checkpoint, from single examples, dropout as in training; resumes where it stopped."""
    images, labels = first_images(restore.training_images(run, options.data_dir, world.device), options.images).train
    if len(images) < 3:
        raise UsageError(f"--images must be 3 at least for an error bar. Found {len(images)}.")
    points = restore.points(options.run, run, world.device)
    given = ([point.params for point in points], images, labels)
    config = restore.to_config(run.begun) | {"digest": digest(given)}
    check_agreed(world, "Starting", SAME, data=str(config["digest"]))
    kept = _agreed(_read(folder / _KEPT, config), points, world)

    def loss_fn(params: Params, image: Tensor, label: Tensor, key: Tensor) -> Tensor:
        return run.made.loss(run.made.outputs(params, image, key), label)

    measured: list[Measured] = []
    if world.rank == 0:
        outputs.check_writable(folder)
    print(f"Noise scale of {len(images):,} training images at {outputs.plural(len(points), 'checkpoint')}.", flush=True)
    with bar(total=len(points), unit=" checkpoints", silent=world.rank > 0) as progress:
        for point in points:
            if str(point.step) not in kept:
                try:
                    keys = _keys(point, len(images))
                    rows = (images, labels, keys)
                    one = statistics.noise_scale(loss_fn, point.params, *rows, chunk_size=CHUNK, world=world)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(
                        f"Interrupted after {len(measured)} of {len(points)} checkpoints. "
                        "The same command resumes from there."
                    ) from None
                numbers = torch.tensor([one.trace, one.square_norm])
                check_finite(numbers, f"The gradients at step {point.step}", "Has the run diverged?")
                kept[str(point.step)] = list(one)
                if world.rank == 0:
                    files.write(folder / _KEPT, json.dumps({"config": config, "estimates": kept}).encode())
            measured.append(Measured(point.step, point.step, _scale(kept[str(point.step)])))
            progress.update(1)
    return measured


def _agreed(kept: dict[str, list[float]], points: Sequence[Point], world: World) -> dict[str, list[float]]:
    """The estimates that the first process has read from the folder, on all."""
    nothing = [math.nan] * len(statistics.NoiseScale._fields)
    rows = torch.tensor([kept.get(str(point.step), nothing) for point in points], dtype=torch.float64)
    rows = broadcast(world, rows.to(world.device))
    return {str(p.step): row for p, row in zip(points, rows.tolist(), strict=True) if not math.isnan(row[-1])}


def _scale(numbers: list[float]) -> statistics.NoiseScale:
    scale, error, trace, trace_error, square_norm, square_norm_error, samples = numbers
    return statistics.NoiseScale(scale, error, trace, trace_error, square_norm, square_norm_error, int(samples))


def _keys(point: Point, count: int) -> Tensor:
    """The keys of the examples' dropout in the step that follows the checkpoint: (N, 2)."""
    _, noise_key = random.split(point.key).unbind(-2)
    return random.fold_in(random.fold_in(noise_key, point.step), torch.arange(count, device=point.key.device))


def _read(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The estimates of an interrupted command, by step; none if it was of another config."""
    try:
        kept = json.loads(path.read_bytes())
        estimates = {step: list(statistics.NoiseScale(*numbers)) for step, numbers in kept["estimates"].items()}
        good = all(type(number) in (int, float) for numbers in estimates.values() for number in numbers)
        return estimates if good and kept["config"] == config else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _trust(batches: Sequence[Measured], checkpoint: Measured) -> str:
    """What each of the two estimates is unbiased for, and whether they disagree at a checkpoint."""
    step, at = checkpoint.last, checkpoint.estimate
    near = min(batches, key=lambda one: max(one.first - step, step - one.last, 0))
    mean = near.estimate
    differences = (
        (at.trace - mean.trace, at.trace_error, mean.trace_error),
        (at.square_norm - mean.square_norm, at.square_norm_error, mean.square_norm_error),
    )
    if all(abs(difference) <= 2 * math.hypot(*errors) for difference, *errors in differences):
        verdict = "they agree within two standard errors."
    else:
        verdict = (
            f"they disagree by more than two standard errors. Trust the checkpoint's for step {step}: it is unbiased "
            f"for tr Σ and |E ∇|² there, from {at.samples:,} independent examples at fixed parameters. Trust the "
            "batches' for the mean over their steps alone: the parameters move between them, and the error bar, which "
            "takes steps as independent, is too small where the noise scale drifts."
        )
    return (
        f"At step {step} {at} by the checkpoint, {mean} by the batches of steps {near.first} to {near.last}: {verdict}"
    )


def _advice(estimate: statistics.NoiseScale, batch_size: int) -> str:
    if not math.isfinite(estimate.scale):
        return (
            "The gradient is lost in its noise, |E ∇|² not above zero: no batch size is too large. Take more --images?"
        )
    costs = statistics.efficiency(estimate.scale, batch_size)
    significant = estimate.square_norm > 2 * estimate.square_norm_error
    doubt = (
        "" if significant else "|E ∇|² is below two of its standard errors, so the noise scale is a rough estimate. "
    )
    return doubt + (
        f"At a noise scale of {estimate.scale:.4g}, batches of {batch_size} take {costs.steps:.3g} times the fewest "
        f"steps and {costs.examples:.3g} times the fewest examples; batches of {max(1, round(estimate.scale))} take "
        "twice the fewest of both."
    )


def _band(source: str, measured: Sequence[Measured]) -> plots.Band:
    """The finite estimates, each at the middle of its steps."""
    points = [
        plots.Point((one.first + one.last) / 2, one.estimate.scale, one.estimate.error)
        for one in measured
        if math.isfinite(one.estimate.scale)
    ]
    return plots.Band({"batches": "from the run's batches", "checkpoint": "at checkpoints"}[source], points)
