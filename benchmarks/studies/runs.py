"""Runs of `functorch-mnist train` in parallel, one on each core: what the studies of training are made of."""

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch

from functorch_mnist import cli, run_folder, train
from functorch_mnist.commands import restore, sources


class Job(NamedTuple):
    """One run to make."""

    name: str
    options: str
    """Of `train`, as they are typed."""
    seed: int


class Result(NamedTuple):
    """The result of a run."""

    name: str
    options: str
    seed: int
    held_out: float | None
    """Accuracy in % on held-out images after the last epoch, where there are any."""
    recall: list[float]
    """In %, of each class of the test images."""
    accuracy: float
    """In % of the test images."""
    seconds: float
    """Of the whole command."""
    threads: int


def made(job: Job, threads: int = 1) -> Result:
    """Makes one run, with its output thrown away.

    Raises:
        RuntimeError: it has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["train", *job.options.split(), "--seed", str(job.seed), "--threads", str(threads)]
        output = io.StringIO()
        start = time.perf_counter()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = cli.main([*arguments, "--out", str(run), "--save-every", "1000000"])
        seconds = time.perf_counter() - start
        if status:
            raise RuntimeError(f"the run {job} failed with status {status}: {output.getvalue()[-500:]}")
        records = {record["kind"]: record for record in run_folder.read_metrics(run)}
        found = restore.trained(run, torch.device("cpu"))
        test = sources.load("mnist", None, torch.device("cpu")).test
        recall = 100 * train.evaluate(found.made.outputs, found.made.test_loss, found.params, *test).recall
    held_out, test_record = records.get("held-out"), records["test"]
    return Result(
        *job,
        None if held_out is None else 100 * held_out["correct"] / held_out["total"],
        [round(part, 4) for part in recall.tolist()],
        100 * test_record["correct"] / test_record["total"],
        round(seconds, 1),
        threads,
    )


def all_made(jobs: Sequence[Job], progress: Callable[[str], object]) -> list[Result]:
    """All runs, in the order of the jobs.

    Raises:
        RuntimeError: one has failed; those that have not begun are not made.
    """
    results: dict[Job, Result] = {}
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(made, job): job for job in jobs}
        for done in as_completed(waiting):
            job = waiting[done]
            if done.exception() is not None:
                pool.shutdown(cancel_futures=True)
            results[job] = done.result()
            progress(f"{len(results)} of {len(jobs)}: {job.name}, seed {job.seed}: {results[job].accuracy:.2f} %")
    return [results[job] for job in jobs]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
