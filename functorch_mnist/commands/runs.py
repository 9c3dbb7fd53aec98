"""Many runs of one kind, vmapped: the program of one run, the number of runs in a call, the folder of a sweep."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from tqdm import tqdm

from .. import checkpoint, data, privacy, random, run_folder, sweep, tree
from .. import train as training
from ..checkpoint import JSON
from ..distributed import World, broadcast, digest, map_rows
from ..models import Params
from ..options import CHANGEABLE, PRIVATE_OVER, Search, Train, UsageError, set_to, to_json
from ..run_folder import BEST, CHECKPOINTS
from . import build, outputs, restore
from .build import Classifier, Origin, Saved
from .passes import bar
from .processes import check_data
from .sources import Parts
from .waiting import say

NOISE = 1
"""Folded into a run's key for the noise of its steps."""
_WIDTHS = (1, 8, 64)
"""The numbers of vmapped runs that are timed, as far as there are as many runs."""


class Swept(NamedTuple):
    """A sweep that has ended."""

    runs: sweep.Runs
    state: sweep.Sweep
    origin: Origin
    """Of all runs: those of the sweep's options."""
    classifier: Classifier
    """Of all runs: what they differ in changes no output."""
    width: int
    """The number of vmapped runs."""
    held_out: Tensor
    """(K,) float64: accuracy on the held-out images at each run's best epoch, NaN for one that failed."""
    tested: Tensor
    """(K,) float64: accuracy on the test images there, NaN likewise."""

    @property
    def epochs(self) -> list[int]:
        """The number of epochs of each run."""
        made: list[int] = (~self.state.score.isnan()).sum(1).tolist()
        return made

    def best_of(self, some: Tensor) -> int:
        """The run with the highest held-out accuracy among some, which have all made an epoch."""
        return int(some[self.held_out[some].argmax()])


class Spread(NamedTuple):
    """Means and standard deviations over the seeds of each setting: (settings,) each."""

    rows: Tensor
    """int64: the first run of each setting."""
    mean: Tensor
    """NaN where a run of the setting has failed or ended without an epoch."""
    deviation: Tensor
    """NaN where there is one seed alone."""


class _Steps(sweep.VmappedStep):
    """Steps that a bar counts, which report what they compile and for how long."""

    progress: "tqdm[Any] | None" = None
    seconds = 0.0
    """In calls that compiled."""

    def step_(
        self, runs: sweep.Runs, states: training.State, index: Tensor, keys: Tensor, mask: Tensor | None
    ) -> Tensor:
        width = len(keys)
        new = self.compile and width not in self._steps
        if new:
            say(f"Compiling the step of {outputs.plural(width, 'vmapped run')}.")
        start = time.perf_counter()
        losses = super().step_(runs, states, index, keys, mask)
        if new:
            seconds = time.perf_counter() - start
            self.seconds += seconds
            say(f"Compiled in {seconds:.0f} s.")
        if self.progress is not None:
            self.progress.update(width)
        return losses


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


def claim(folder: Path, options: Search) -> None:
    """Makes the folder of a sweep or comparison, and writes its options; one that holds the same stays as it is.

    Raises:
        UsageError: the folder holds something else.
        OSError: it cannot be written.
    """
    begun = run_folder.exists(folder)
    if begun:
        run_folder.check_same(folder, options)
    elif folder.exists() and any(path.name != CHECKPOINTS for path in folder.iterdir()):
        raise UsageError(f"{folder} must be empty or hold this sweep. Found other files. Choose another --out.")
    outputs.check_writable(folder)
    if not begun:
        run_folder.write_config(folder, options)


def swept(
    options: Train,
    parts: Parts,
    runs: sweep.Runs,
    folder: Path,
    *,
    vmapped_runs: str,
    halving: sweep.Halving | None = None,
    verbose: bool = True,
    again: str,
    world: World,
) -> Swept:
    """The sweep after all its runs have ended; resumes one that was interrupted.

    Args:
        options: of all runs.
        parts: the images.
        runs: what they differ in.
        folder: where the sweep is kept, after each epoch.
        vmapped_runs: their number, or `auto`.
        halving: whether only the better settings continue.
        verbose: print a line after each epoch.
        again: the command that resumes it.
        world: the processes, of which the first keeps the folder.

    Raises:
        UsageError: the folder holds another sweep.
        KeyboardInterrupt: after Ctrl-C; it says how to resume.
    """
    where = parts.train.images.device
    runs = {name: column.to(where) for name, column in runs.items()}
    origin = build.origin(options, parts)
    classifier = build.classifier(origin)
    images = build.prepared(classifier, parts.train.images)
    one = program(origin, parts)
    steps = _Steps(
        one,
        (images, parts.train.labels),
        batch_size=min(options.batch_size, len(images)),
        compile=options.compile == "on",
    )
    start = sweep.init_sweep(one, runs, epochs=options.epochs)
    fixed = {name: value for name, value in to_json(options).items() if name not in CHANGEABLE - {"epochs"}}
    config: dict[str, JSON] = {
        "options": fixed | {"out": None},
        "digest": digest((runs, parts.train, parts.held_out)),
        "halving": list(halving) if halving else None,
    }
    check_data(world, (runs, parts.train, parts.held_out, parts.test))
    state, width = start, 0
    if world.rank == 0:
        state, width = _kept(folder, start, config, vmapped_runs)
    state, kept_width = broadcast(world, (state, torch.tensor([width], device=where)))
    width = int(kept_width) or _width(steps, runs, start, vmapped_runs)
    width = int(broadcast(world, torch.tensor([width], device=where)))
    config["width"] = width
    total, per_epoch = len(runs[sweep.SEED]), data.steps_per_epoch(len(images), steps.batch_size)
    saved, since, compiling = int(state.epoch), time.perf_counter(), steps.seconds

    def keep(now: sweep.Sweep) -> None:
        nonlocal saved, since, compiling
        epoch, left = int(now.epoch), int((now.ended == sweep.RUNNING).sum())
        if world.rank == 0:
            checkpoint.save(folder / CHECKPOINTS, now, step=epoch, config=config, keep=2)
        saved = epoch
        seconds = time.perf_counter() - since - (steps.seconds - compiling)
        examples = int((~now.score[:, epoch - 1].isnan()).sum()) * len(images)
        since, compiling = time.perf_counter(), steps.seconds
        progress.total = progress.n + left * (options.epochs - epoch) * per_epoch
        if verbose:
            score = now.at_best("accuracy").nan_to_num(nan=-1)
            best = int(score.argmax())
            leader = f"; best {100 * score[best].item():.2f}% held out: {described(runs, best)}" * bool(
                score[best] >= 0
            )
            rate = f"{seconds:.1f} s, {examples / max(seconds, 1e-9):,.0f} examples/s"
            line = f"epoch {epoch}/{options.epochs}: {left} of {total} runs continue, {rate}{leader}"
            say(line)

    remaining = int((state.ended == sweep.RUNNING).sum()) * (options.epochs - saved) * per_epoch
    try:
        with bar(total=remaining, unit=" steps", silent=world.rank > 0) as progress:
            steps.progress = progress
            state = sweep.fit(
                steps,
                runs,
                state,
                width=width,
                halving=halving,
                patience=options.patience,
                callbacks=(keep,),
                world=world,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Interrupted after epoch {saved} of {options.epochs}. Resume with: {again}") from None
    tested = torch.full((total,), torch.nan, dtype=torch.float64)
    with_epoch = (state.best_epoch >= 0).nonzero().squeeze(1)

    def accuracies(which: Tensor) -> Tensor:
        predicted = _outputs(classifier, state.best, which, parts.test.images, width).argmax(-1)
        return (predicted == parts.test.labels).double().mean(-1)

    if len(with_epoch):
        tested[with_epoch.cpu()] = map_rows(world, accuracies, with_epoch, unit=width).cpu()
    failed = state.ended.cpu() == sweep.FAILED
    held_out = state.at_best("accuracy").cpu().masked_fill(failed, torch.nan)
    runs = tree.map(Tensor.cpu, runs)
    return Swept(runs, state, origin, classifier, width, held_out, tested.masked_fill(failed, torch.nan))


def write_best(done: Swept, place: int, folder: Path, parts: Parts) -> None:
    """Writes a run of a sweep as the folder of a run of `train` that has kept its best epoch, where there is none yet.

    Args:
        done: the sweep.
        place: which run of it; its steps are those of `train`.
        folder: of the sweep or comparison.
        parts: its images.
    """
    best, state, options = folder / BEST, done.state, done.origin.options
    if run_folder.exists(best):
        return
    for name, column in done.runs.items():
        value = column[place].item()
        options = set_to(options, name, int(value) if name == sweep.SEED else float(shortest(value)))
    options = build.with_values(options, {"patience": options.patience or options.epochs, "out": None})
    epoch, held_out = int(state.best_epoch[place]), len(parts.judging.labels)
    correct = [round(x * held_out) for x in state.scores["accuracy"][place, : done.epochs[place]].tolist()]
    saved = Saved(
        tree.map(lambda leaf: leaf[place], state.states),
        torch.zeros((), dtype=torch.float64),
        build.Best(tree.map(lambda leaf: leaf[place], state.best), torch.tensor(correct[epoch]), torch.tensor(epoch)),
    )
    step = int(saved.state.step)
    config = restore.to_config(done.origin._replace(options=options))
    checkpoint.save(best / CHECKPOINTS, saved, step=step, config=config, keep=1)
    for number, right in enumerate(correct):
        record = {"kind": "held-out", "epoch": number, "step": step * (number + 1) // len(correct)}
        loss = state.scores["loss"][place, number].item()
        run_folder.append_metrics(best, {**record, "loss": loss, "correct": right, "total": held_out})
    run_folder.write_config(best, options)  # what makes it a run, so it is written last


def resume_command(command: str, folder: Path) -> str:
    """The command that resumes a sweep or comparison."""
    return f"functorch-mnist {command} --resume {shlex.quote(str(folder))}"


def outputs_of(swept: Swept, which: Tensor, images: Tensor) -> Tensor:
    """The outputs of some runs after their best epochs: (len(which), N, classes)."""
    return _outputs(swept.classifier, swept.state.best, which, images, swept.width)


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


def described(runs: sweep.Runs, place: int) -> str:
    """The hyperparameters of a run."""
    return ", ".join(f"{name.replace('_', '-')} {column[place].item():.4g}" for name, column in runs.items())


def percent(mean: Tensor, deviation: Tensor) -> str:
    """A fraction as percent, with its deviation where there is one."""
    text = f"{100 * mean.item():.2f}"
    return text if deviation.isnan() else f"{text} ± {100 * deviation.item():.2f}"


def shortest(value: float) -> str:
    """The shortest decimal number that is the same float32."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if torch.tensor(float(text)).item() == torch.tensor(value).item())


def _outputs(classifier: Classifier, params: Params, which: Tensor, images: Tensor, width: int) -> Tensor:
    """Outputs of stacked models, `width` of them at a time."""
    logits = []
    for some in which.split(width):
        part = {name: leaf[some] for name, leaf in params.items()}
        if width == 1:
            one = {name: leaf[0] for name, leaf in part.items()}
            logits.append(training.predictions(classifier.outputs, one, images)[None])
        else:
            logits.append(vmap(lambda one: training.predictions(classifier.outputs, one, images))(part))
    return torch.cat(logits)


def _kept(folder: Path, start: sweep.Sweep, config: Mapping[str, Any], vmapped_runs: str) -> tuple[sweep.Sweep, int]:
    """The newest state of a sweep in its folder, and its number of vmapped runs, 0 where that is not settled."""
    good, faults = None, list[checkpoint.CheckpointError]()
    for path in reversed(checkpoint.steps(folder / CHECKPOINTS)):
        try:
            before = checkpoint.read_manifest(path)["config"]
            if {name: before.get(name) for name in config} != config:
                raise UsageError(f"{folder} holds another sweep, or one of other images. Choose another --out.")
            if vmapped_runs not in ("auto", str(before["width"])):
                raise UsageError(
                    f"A resumed sweep keeps its --vmapped-runs, which is {before['width']}. Found {vmapped_runs}."
                )
            good = checkpoint.load(path, start)
            break
        except checkpoint.CheckpointError as error:
            faults.append(error)
    for fault in faults:
        print(f"Passed over a damaged checkpoint: {fault}")
    if good is None:
        return start, 0
    print(f"Resuming after epoch {good.step}.", flush=True)
    state: sweep.Sweep = good.state
    return state, int(str(good.config["width"]))


def _width(steps: sweep.VmappedStep, runs: sweep.Runs, start: sweep.Sweep, vmapped_runs: str) -> int:
    """The number of vmapped runs: the one asked for, or the one with the fastest step."""
    total = len(runs[sweep.SEED])
    if vmapped_runs != "auto":
        return int(vmapped_runs)
    widths = sorted({min(width, total) for width in _WIDTHS})
    if len(widths) == 1:
        return widths[0]
    print(f"Timing a step of {', '.join(map(str, widths))} vmapped runs.", flush=True)
    measured = sweep.measure_throughput(steps, runs, start.states, widths)
    print(measured, flush=True)
    return measured.best
