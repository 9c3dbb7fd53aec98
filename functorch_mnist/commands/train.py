"""`train`: one run, from the data to the accuracy on the test images."""

import shlex
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint, data, per_sample, random, run_folder
from .. import train as training
from ..distributed import World, broadcast
from ..distributed.attendance import deferred_signals, is_collective_error
from ..models import Params
from ..options import Train, UsageError, check_resumed, private_steps_per_epoch, watched
from . import build, restore, sources
from .build import Best, Origin, Saved, Values
from .callbacks import Judge, Reporter, Saver, Valuer, Watcher
from .faults import check_finite, first_line
from .private import LEDGER, Private
from .processes import check_data, load, processes
from .sources import Parts
from .tuning import tuned
from .waiting import Compiling

_NEXT = """
  functorch-mnist evaluate {run}
  functorch-mnist predict {run} --test 0:10
  functorch-mnist scores {run}
  functorch-mnist train --resume {run} --epochs {epochs}"""


def train(options: Train) -> int:
    """Trains as the options say, or resumes; prints the accuracy on the test images, and what to do next."""
    with processes(options) as world:
        parts = sources.divided(options, load(options, world))
        folder = options.resume or options.out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
        if options.tune is not None and options.resume is None:
            options = tuned(options, parts, folder, world)
        run_name = shlex.quote(str(folder))
        run(options, parts, folder, again=f"functorch-mnist train --resume {run_name}", world=world)
        print(f"\nNext:{_NEXT.format(run=run_name, epochs=2 * max(1, options.epochs))}")
        if options.private:
            print(f"  functorch-mnist account {run_name}")
        return 0


def run(options: Train, parts: Parts, folder: Path, *, again: str, world: World) -> int:
    """Trains on images in a folder, or resumes there if `options.resume` is set; the exit status.

    Args:
        options: of the run.
        parts: what it is trained and tested on, on the run's device.
        folder: the run's.
        again: the command that resumes it, for whoever interrupts it.
        world: the processes; the first of them writes.
    """
    check_data(world, (parts.train, parts.held_out, parts.test))
    where = parts.train.images.device
    begun = build.origin(options, parts)
    watches = watched(options)
    if begun.examples < 2 and "noise-scale" in watches:
        raise UsageError("--watch noise-scale needs two training images at least. Found one.")
    batch_size = min(options.batch_size, begun.examples)
    per_epoch = data.steps_per_epoch(begun.examples, batch_size)
    if options.private:
        per_epoch = private_steps_per_epoch(options.batch_size, begun.examples)
    total = options.epochs * per_epoch
    made = build.classifier(begun)
    optimizer = build.optimizer(options, per_epoch)
    private = Private(options, parts.train, made, optimizer, world) if options.private else None
    saved, saved_step = build.start(options, made, optimizer, where, examples=begun.examples), -1
    if world.rank == 0:
        if options.resume is None:
            run_folder.create(folder, options)
        else:
            saved, saved_step = _resumed(folder, saved, begun, total, private)
            run_folder.write_config(folder, options)
    saved, step = broadcast(world, (saved, torch.tensor([saved_step], device=where)))
    saved_step = int(step)
    print(f"Run folder: {folder}", flush=True)
    print(_start_line(begun, saved.state.params, where), flush=True)
    if private:
        print(private.start_line(), flush=True)
    losses_fn = build.losses(made, options, build.partners(options, parts.train))
    compiled = options.compile == "on"

    def step_of(estimator: training.Estimator) -> training.Step:
        if compiled and world.shards:  # whose parts must be called alike, however many a process has
            parts = replace(estimator, fn=training.compiled(estimator.fn))
            if estimator.shared is not None:
                shared = estimator.shared._replace(fn=training.compiled(estimator.shared.fn))
                parts = replace(parts, shared=shared)
            update = optimizer._replace(update=training.compiled(optimizer.update))
            return training.make_step(parts, update, world)
        step = training.make_step(estimator, optimizer, world)
        return training.compiled(step) if compiled else step

    examples = (build.prepared(made, parts.train.images), parts.train.labels)
    ordinary = training.batch_gradient(losses_fn)
    watch, watcher, valued = None, Watcher(folder, watches), build.values_watched(options)
    if options.watch:  # a batch's loss of one example is that example's loss
        example = (*[x[0] for x in examples], random.key(0))
        tuned_fn = build.fastest(losses_fn, saved.state.params, *example, options=options, batch_size=batch_size)
        loss_fn = per_sample.prepare(tuned_fn, saved.state.params, *example)
        every = options.watch_every
        estimator = training.gradient_with_noise(loss_fn)
        if valued:
            estimator = build.valuing(made, loss_fn, parts.judging, where)
            if every == 1:
                ordinary = build.valuing(made, loss_fn, parts.judging, where, renew=False)
                every = build.VALUE_RENEWED
        watch = training.Watch(step_of(estimator), every)

    def config(step: int) -> dict[str, Any]:
        return restore.to_config(begun) | ({LEDGER: private.ledger(step).to_json()} if private else {})

    done = int(saved.state.step)
    valuer = None
    if isinstance(saved.values, Values):
        valuer = Valuer(folder, saved.values, parts, build.schedule(options, per_epoch))
    judge = Judge(folder, options, made, parts.held_out, saved.best, world)
    saver = Saver(
        folder, saved, judge, saved_step=saved_step, every=options.save_every, keep=options.keep, config=config,
        world=world, valuer=valuer, private=private,
    )  # fmt: skip
    compiling = Compiling("the step", enabled=compiled)
    reporter = Reporter(
        folder, epochs=options.epochs, total=total, done=done, seen=done % per_epoch * batch_size, compiling=compiling,
        epsilon=private.epsilon if private else None, silent=world.rank > 0,
    )  # fmt: skip
    # a checkpoint never comes before the records of its steps
    valuers = () if valuer is None else (valuer,)
    callbacks = (reporter, watcher, *valuers, saver) if world.rank == 0 else (*valuers, saver)
    try:
        with compiling, closing(reporter):
            if private:
                private.fit(saved, examples, callbacks)
            elif done % per_epoch or not judge.over(done // per_epoch):
                training.fit(
                    step_of(ordinary),
                    saved.state,
                    examples,
                    epochs=options.epochs,
                    batch_size=batch_size,
                    pad=compiled,
                    order=build.order(options, parts.train.labels),
                    loss=saved.loss,
                    watch=watch,
                    until=judge,
                    callbacks=callbacks,
                    world=world,
                )
        saver.save()
        if isinstance(judge.best, Best) and int(judge.best.epoch) >= 0:
            print(f"Testing the parameters of epoch {int(judge.best.epoch) + 1}, the best on the held-out images.")
        tested = build.tested(options, saver.newest)
        result = training.evaluate(made.outputs, made.test_loss, tested, *parts.test, world=world)
        check_finite(result.loss, "The loss on the test images")
        record = {"loss": result.loss.item(), "correct": result.correct, "total": result.total}
        if world.rank == 0:
            run_folder.append_metrics(folder, {"kind": "test", "step": saver.saved_step, **record})
        print(f"Accuracy of the network on the {result.total} test images: {100 * result.accuracy:.2f}%")
        if valuer is not None and world.rank == 0:
            valuer.show(valuer.values)
        if private and world.rank == 0:
            run_folder.append_metrics(folder, private.record(saver.saved_step))
            print(private.summary(saver.saved_step))
    except OSError:  # a full disk, or nobody reads on
        with deferred_signals():
            saver.save()
        raise
    except KeyboardInterrupt:
        with deferred_signals():
            last = saver.save()
        place = f"Interrupted after step {last}. " if world.rank == 0 else ""  # which alone has saved it
        raise KeyboardInterrupt(f"{place}Resume with: {again}") from None
    except RuntimeError as error:
        if is_collective_error(error):
            with deferred_signals():
                last = saver.save()
            error.add_note(
                f"Saved after step {last}. Resume with: {again}" if world.rank == 0 else f"Resume with: {again}"
            )
            raise
        if saver.newest is not saved:
            raise
        raise UsageError(
            f"The first step must be possible. Found: {first_line(error)}. "
            "Is the batch too large for the memory, or is there no C++ compiler for --compile on?"
        ) from error
    return 0


def _start_line(begun: Origin, params: Params, where: torch.device) -> str:
    """What is about to be trained, and with what."""
    count = sum(leaf.numel() for leaf in params.values())
    threads = torch.get_num_threads()
    options, (mean, deviation) = begun.options, begun.normalization
    scaled = "" if options.model == "scattering" else f" (pixel mean {mean:.4f}, deviation {deviation:.4f})"
    return (
        f"Training {options.model}: {count:,} parameters, {begun.examples:,} images of {options.dataset}{scaled}, "
        f"on {where.type} in {options.precision}, {threads} thread{'s' * (threads > 1)}."
    )


def _resumed(run: Path, start: Saved, begun: Origin, total: int, private: Private | None) -> tuple[Saved, int]:
    """The newest good state of a run and its step; its start and -1 where it has saved none.

    Args:
        run: its folder.
        start: its state before the first step.
        begun: what it would begin with now.
        total: the step it shall end with.
        private: what it spends, if it is a private run.

    Raises:
        UsageError: it would be another run.
        CheckpointError: no checkpoint is good.
    """
    if not checkpoint.steps(run / run_folder.CHECKPOINTS):
        print("The run has no checkpoint yet: starting from the beginning.")
        run_folder.forget_metrics_after(run, 0)
        return start, -1
    before = restore.newest_origin(run)
    check_resumed(begun.options, before.options)
    if begun[1:] != before[1:]:
        raise UsageError(
            f"A resumed run keeps its {before.examples} training images. Found other {begun.examples}. "
            "Is --data-dir the right one?"
        )
    newest = restore.newest(run, start)
    if newest.step > total:
        raise UsageError(
            f"--epochs must not be fewer than the run has begun. It is after step {newest.step}, they end with {total}."
        )
    if private:
        private.resume(run, newest.config, newest.step)
    print(f"Resuming after step {newest.step}.")
    run_folder.forget_metrics_after(run, newest.step)
    saved: Saved = newest.state
    if private:
        saved = private.restored(saved, run, newest.step)
    return saved, newest.step
