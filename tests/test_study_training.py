"""The studies that are made of runs of `train`: their runs, their choices and their tables."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from benchmarks.studies import best, imbalance, overfitting, runs, tuning
from benchmarks.studies.runs import Job, Result
from functorch_mnist import cli


@pytest.fixture(autouse=True)
def unchanged():
    """The process stays as it is: a run sets threads and how a kill is heard."""
    threads, term = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, term)


def result(name, options, seed, accuracy, held_out=None):
    return Result(name, options, seed, held_out, [accuracy] * 10, accuracy, 1.0, 1)


def jobs():
    yield from overfitting.candidates(1)
    yield from imbalance.jobs((0,), 1)
    yield from (Job("candidate", f"{best.SHARED} {one}", 0) for one in best.CANDIDATES)
    yield Job("best", "--recipe best", 0)
    yield Job("start", f"{tuning.COMMON} {tuning.START}", 0)


@pytest.mark.parametrize("job", list(jobs()), ids=lambda job: f"{job.name} {job.options[-30:]}")
def test_a_job_is_a_run_that_can_be_made(job):
    assert cli._parse(["train", *job.options.split()])


@pytest.mark.parametrize("options", tuning.SWEEPS.values())
def test_a_sweep_of_the_study_can_be_made(options):
    assert cli._parse(["sweep", *tuning.COMMON.split(), *options.split()])


def test_the_recipe_is_the_last_candidate():
    recipe = cli._parse(["train", "--recipe", "best"])
    assert replace(recipe, recipe="tutorial") == cli._parse(["train", *f"{best.SHARED} {best.CANDIDATES[-1]}".split()])


def test_a_run_is_made_and_tells_what_train_tells():
    job = Job("one", "--model linear --train-size 300 --hold-out 100", 3)
    found = runs.made(job)
    assert (found.name, found.options, found.seed, found.threads) == (*job, 1)
    assert 0 <= found.held_out <= 100
    assert 30 < found.accuracy < 95
    assert len(found.recall) == 10
    assert runs.made(job)._replace(seconds=0) == found._replace(seconds=0)
    with pytest.raises(RuntimeError, match=r"failed with status 2.*--hold-out must be below"):
        runs.made(Job("bad", "--model linear --hold-out 60000", 0))


def test_the_strength_of_a_remedy_is_the_best_on_held_out_images():
    tried = [
        result(job.name, job.options, job.seed, 50.0, held_out=place)
        for place, job in enumerate(overfitting.candidates(1))
    ]
    found = overfitting.chosen(tried, (0, 1))
    assert len(found) == 2 * len(overfitting.REMEDIES)
    for job in found:
        assert job.options.endswith(overfitting.REMEDIES[job.name][-1])


def test_tables_are_made_from_records_alone():
    made = [
        result(name, f"{overfitting.PLAIN} {several[0]}", seed, 90 + seed + (name == "all together"), held_out=91.0)
        for name, several in overfitting.REMEDIES.items()
        for seed in (0, 1)
    ]
    table = overfitting.table(json.loads(json.dumps({"runs": [one._asdict() for one in made]})))["Remedies"]
    assert table.splitlines()[-1].endswith("| 91.00 ± 0.00 | 91.50 ± 0.71 | 1.00 ± 0.00 |")
    assert len(table.splitlines()) == 2 + len(overfitting.REMEDIES)
    made = [result(job.name, job.options, job.seed, 95.0 + job.seed) for job in imbalance.jobs((0, 2), 1)]
    table = imbalance.table({"runs": [one._asdict() for one in made]})["Remedies"]
    assert table.splitlines()[2].endswith("| 96.00 ± 1.41 | 96.00 ± 1.41 | 96.00 ± 1.41 | 96.00 ± 1.41 |")
    record = {
        "candidates": [result("a", "", 100, 99.0, held_out=99.5)._asdict()],
        "runs": [result("best", "--recipe best", seed, 99.5 + seed / 10)._asdict() for seed in (0, 1, 2)],
    }
    tables = best.table(record)
    assert "| `a` | 99.50 | 99.00 |" in tables["Candidates"]
    assert "| all | 99.60 ± 0.10 |" in tables["Recipe"]


def test_the_study_of_tuning_runs(monkeypatch):
    """Quick: its parts must fit each other; nothing is measured."""
    monkeypatch.setattr(tuning, "all_made", lambda jobs, progress: [runs.made(job) for job in jobs])
    monkeypatch.setattr(tuning, "SWEEPS", {"a sweep": f"{tuning.OVER} --trials 2"})
    monkeypatch.setattr(
        tuning, "COMPARED", "--seeds 2 --losses cross-entropy --optimizers sgd,adam --schedules constant"
    )
    reported = []
    record = json.loads(json.dumps(tuning.run(quick=True, progress=reported.append), allow_nan=False))
    assert list(record["selected"]) == ["the start", "a sweep", tuning.TUNED]
    tables = tuning.table(record)
    assert len(tables["Ways"].splitlines()) == 5
    assert len(tables["Losses, optimizers and schedules"].splitlines()) == 4
    assert len(reported) == 2
