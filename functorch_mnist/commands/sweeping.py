"""Many runs of the same kind as one sweep: the program of one run, how many at once, and a folder to go on in."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from .. import checkpoint, data, privacy, random, sweep, tree
from .. import train as training
from ..checkpoint import JSON
from ..distributed import World, broadcast, digest, map_rows
from ..models import Params
from ..options import CHANGEABLE, PRIVATE_OVER, Train, UsageError, set_to, to_json
from ..run_folder import CHECKPOINTS
from . import build
from .build import Classifier, Origin
from .processes import check_data
from .sources import Parts

NOISE = 1
"""Folded into a run's key for the noise of its steps."""
_WIDTHS = (1, 8, 64)
"""How many runs at once are tried, as far as there are so many."""


class Swept(NamedTuple):
    """A sweep that has ended, as results are taken from it."""

    runs: sweep.Runs
    found: sweep.Sweep
    made: Classifier
    """Of all runs: what they differ in changes no output."""
    width: int
    """How many runs were made at once."""
    held_out: Tensor
    """(K,) float64: accuracy on the held-out images at each run's best epoch, NaN for one that failed."""
    tested: Tensor
    """(K,) float64: accuracy on the test images there, NaN likewise."""


class Spread(NamedTuple):
    """Means and standard deviations over the seeds of each setting: (settings,) each."""

    rows: Tensor
    """int64: the first run of each setting."""
    mean: Tensor
    """NaN where a run of the setting has failed or ended without an epoch."""
    deviation: Tensor
    """NaN where there is one seed alone."""


def program(begun: Origin, parts: Parts) -> sweep.Program:
    """A run of this origin, as pure functions of what its sweep sets it to."""
    options = begun.options
    others = build.partners(options, parts.train)
    batch_size = min(options.batch_size, begun.examples)
    per_epoch = data.steps_per_epoch(begun.examples, batch_size)
    held_out = parts.judging
    judged = build.prepared(build.classifier(begun), held_out.images)

    def made(hyper: sweep.Values) -> tuple[Train, Classifier]:
        one = options
        for name, value in hyper.items():
            if name != sweep.SEED and name not in PRIVATE_OVER:
                one = set_to(one, name, value)
        return one, build.classifier(begun._replace(options=one))

    def init(hyper: sweep.Values, key: Tensor) -> training.State:
        one, classifier = made(hyper)
        init_key, train_key = random.split(key).unbind(0)
        return training.init_state(classifier.init(init_key), build.optimizer(one, per_epoch), train_key)

    def step(
        hyper: sweep.Values, state: training.State, *rows: Tensor, mask: Tensor | None, divisor: Tensor
    ) -> tuple[training.State, dict[str, Tensor]]:
        one, classifier = made(hyper)
        losses_fn = build.losses(classifier, one, others)
        optimizer = build.optimizer(one, per_epoch)
        if not PRIVATE_OVER & hyper.keys():
            return training.make_step(training.batch_gradient(losses_fn), optimizer)(
                state, *rows, mask=mask, divisor=divisor
            )
        clipping = privacy.Flat(hyper.get("clip_norm", options.clip_norm))
        sums = privacy.clipped_sums(losses_fn, state.params, *rows, clipping=clipping, mask=mask)
        noise_key = random.fold_in(random.fold_in(state.key, NOISE), state.step)
        grads, _ = privacy.noisy_mean(
            state.params, sums, noise_key, clipping=clipping, expected=batch_size,
            noise_multiplier=hyper.get("noise_multiplier", 0.0),
        )  # fmt: skip
        params, optimizer_state = optimizer.update(state.params, state.optimizer, grads)
        return state._replace(params=params, optimizer=optimizer_state, step=state.step + 1), sums.seen

    def judge(hyper: sweep.Values, state: training.State) -> dict[str, Tensor]:
        one, classifier = made(hyper)
        outputs = training.predictions(classifier.outputs, build.current(one, state), judged)
        right = (outputs.argmax(-1) == held_out.labels).double().mean()
        return {"accuracy": right, "loss": classifier.test_loss(outputs, held_out.labels).double().mean()}

    return sweep.Program(init, step, judge, lambda state: build.current(options, state))


def swept(
    options: Train,
    parts: Parts,
    runs: sweep.Runs,
    folder: Path,
    *,
    vmapped_runs: str,
    halving: sweep.Halving | None = None,
    told: bool = True,
    again: str | None = None,
    world: World,
) -> Swept:
    """The sweep after all its runs have ended; goes on with one that was broken off in the folder.

    Args:
        options: of all runs.
        parts: the images.
        runs: what they differ in.
        folder: where the sweep is kept, after each epoch.
        vmapped_runs: a number of runs at once, or `auto`.
        halving: whether only the better settings go on.
        told: print how far it is.
        again: what goes on after Ctrl-C; by default the same command with the folder.
        world: the processes, of which the first keeps the folder.

    Raises:
        UsageError: the folder holds another sweep.
        KeyboardInterrupt: after Ctrl-C; it says how to go on.
    """
    where = parts.train.images.device
    runs = {name: column.to(where) for name, column in runs.items()}
    origin = build.origin(options, parts)
    made = build.classifier(origin)
    images = build.prepared(made, parts.train.images)
    kept = program(origin, parts)
    several = sweep.VmappedStep(
        kept,
        (images, parts.train.labels),
        batch_size=min(options.batch_size, len(images)),
        compile=options.compile == "on",
    )
    begun = sweep.init_sweep(kept, runs, epochs=options.epochs)
    fixed = {name: value for name, value in to_json(options).items() if name not in CHANGEABLE - {"epochs"}}
    config: dict[str, JSON] = {
        "options": fixed | {"out": None},
        "digest": digest((runs, parts.train, parts.held_out)),
        "halving": list(halving) if halving else None,
    }
    check_data(world, (runs, parts.train, parts.held_out, parts.test))
    found, width = begun, 0
    if world.rank == 0:
        found, width = _kept(folder, begun, config, vmapped_runs)
    found, kept_width = broadcast(world, (found, torch.tensor([width], device=where)))
    width = int(kept_width) or _chosen(several, runs, begun, vmapped_runs, told=told)
    width = int(broadcast(world, torch.tensor([width], device=where)))
    config["width"] = width
    total, saved = len(runs[sweep.SEED]), int(found.epoch)

    def keep(now: sweep.Sweep) -> None:
        nonlocal saved
        epoch = int(now.epoch)
        if world.rank == 0:
            checkpoint.save(folder / CHECKPOINTS, now, step=epoch, config=config, keep=2)
        saved = epoch
        if told:
            left = int((now.ended == sweep.RUNNING).sum())
            score = now.at_best("accuracy").nan_to_num(nan=-1)
            best = int(score.argmax())
            leader = f"; the best so far {100 * score[best].item():.2f}% with {words(runs, best)}"
            line = f"epoch {epoch}/{options.epochs}: {left} of {total} runs go on"
            print(line + leader * bool(score[best] >= 0), flush=True)

    try:
        found = sweep.fit(
            several,
            runs,
            found,
            width=width,
            halving=halving,
            patience=options.patience,
            callbacks=(keep,),
            world=world,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted after epoch {saved} of {options.epochs}. "
            f"{again or f'The same command with --out {shlex.quote(str(folder))}'} goes on."
        ) from None
    tested = torch.full((total,), torch.nan, dtype=torch.float64)
    with_epoch = (found.best_epoch >= 0).nonzero().squeeze(1)

    def accuracies(which: Tensor) -> Tensor:
        given = _outputs(made, found.best, which, parts.test.images, width).argmax(-1)
        return (given == parts.test.labels).double().mean(-1)

    if len(with_epoch):
        tested[with_epoch.cpu()] = map_rows(world, accuracies, with_epoch, unit=width).cpu()
    failed = found.ended.cpu() == sweep.FAILED
    held_out = found.at_best("accuracy").cpu().masked_fill(failed, torch.nan)
    return Swept(tree.map(Tensor.cpu, runs), found, made, width, held_out, tested.masked_fill(failed, torch.nan))


def outputs_of(swept: Swept, which: Tensor, images: Tensor) -> Tensor:
    """What some runs say of images after their best epochs: (len(which), N, classes)."""
    return _outputs(swept.made, swept.found.best, which, images, swept.width)


def spread(runs: sweep.Runs, values: Tensor) -> Spread:
    """A number of each run, over the seeds of each setting."""
    setting = sweep.settings(runs)
    groups = [(setting == number).nonzero().squeeze(1) for number in range(int(setting.max()) + 1)]
    alone = torch.tensor(torch.nan, dtype=values.dtype)
    return Spread(
        torch.stack([group[0] for group in groups]),
        torch.stack([values[group].mean().cpu() for group in groups]),
        torch.stack([values[group].std().cpu() if len(group) > 1 else alone for group in groups]),
    )


def words(runs: sweep.Runs, place: int) -> str:
    """What a run is set to, as it is typed."""
    return ", ".join(f"{name.replace('_', '-')} {column[place].item():.4g}" for name, column in runs.items())


def _outputs(made: Classifier, params: Params, which: Tensor, images: Tensor, width: int) -> Tensor:
    """Outputs of stacked models, some at a time."""
    found = []
    for some in which.split(width):
        part = {name: leaf[some] for name, leaf in params.items()}
        if width == 1:
            one = {name: leaf[0] for name, leaf in part.items()}
            found.append(training.predictions(made.outputs, one, images)[None])
        else:
            found.append(vmap(lambda one: training.predictions(made.outputs, one, images))(part))
    return torch.cat(found)


def _kept(folder: Path, begun: sweep.Sweep, config: Mapping[str, Any], vmapped_runs: str) -> tuple[sweep.Sweep, int]:
    """Where a sweep stands in its folder, and how many runs it makes at once, 0 where that is not settled."""
    good, faults = None, list[checkpoint.CheckpointError]()
    for path in reversed(checkpoint.steps(folder / CHECKPOINTS)):
        try:
            before = checkpoint.read_manifest(path)["config"]
            if {name: before.get(name) for name in config} != config:
                raise UsageError(f"{folder} holds another sweep. Choose another --out.")
            if vmapped_runs not in ("auto", str(before["width"])):
                raise UsageError(
                    f"A sweep goes on with its --vmapped-runs, which is {before['width']}. Found {vmapped_runs}."
                )
            good = checkpoint.load(path, begun)
            break
        except checkpoint.CheckpointError as error:
            faults.append(error)
    for fault in faults:
        print(f"Passed over a damaged checkpoint: {fault}")
    if good is None:
        if folder.exists() and any(path.name != CHECKPOINTS for path in folder.iterdir()):
            raise UsageError(f"{folder} must be empty or hold this sweep. Found other files. Choose another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        return begun, 0
    print(f"Going on after epoch {good.step}.", flush=True)
    state: sweep.Sweep = good.state
    return state, int(str(good.config["width"]))


def _chosen(several: sweep.VmappedStep, runs: sweep.Runs, begun: sweep.Sweep, vmapped_runs: str, *, told: bool) -> int:
    """How many runs are made at once."""
    total = len(runs[sweep.SEED])
    if vmapped_runs != "auto":
        return int(vmapped_runs)
    widths = sorted({min(width, total) for width in _WIDTHS})
    if len(widths) == 1:
        return widths[0]
    measured = sweep.measure_throughput(several, runs, begun.states, widths)
    if told:
        print(measured, flush=True)
    return measured.best
