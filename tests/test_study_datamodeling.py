"""The study of the linear datamodeling score, in tiny sizes."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import results
from benchmarks.studies import datamodeling

TINY = replace(
    datamodeling.QUICK, train=60, hidden=(6, 5), epochs=2, subsets=4, others=2, models=(1, 2), draws=5,
    own=(datamodeling.Own("tanh", 0.0, 2, (0.1, 0.5)),), own_subsets=8, again=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodeling, "QUICK", TINY)
        return datamodeling.run(quick=True, progress=lambda _: None)


def test_a_record_is_json_and_its_tables_are_made_from_that_alone(record):
    tables = datamodeling.table(json.loads(json.dumps(record, allow_nan=False)))
    assert tables == datamodeling.table(record)
    for table in tables.values():
        heads, rule, *rows = table.splitlines()
        assert rows and {line.count("|") for line in (heads, rule, *rows)} == {heads.count("|")}


def test_each_method_has_an_interval_at_its_best_damping_alone(record):
    grades = record["grades"]
    for name, models in {(row["method"], row["models"]) for row in grades}:
        rows = [row for row in grades if (row["method"], row["models"]) == (name, models)]
        (best,) = [row for row in rows if row["low"] is not None]
        assert best["score"] == max(row["score"] for row in rows)
        assert best["low"] <= best["high"]


def test_of_own_runs_that_are_smooth_few_left_out_examples_are_foretold(record):
    (row,) = [row for row in record["own"] if row["left_out"] == 0.1]
    assert row["mean"] > 0.8


def test_what_is_stored_is_not_made_again(tmp_path):
    stored = datamodeling.Stored(tmp_path / "new")
    made = []

    def make():
        made.append(1)
        return {"x": torch.ones(2)}

    first, again = stored("a", make), stored("a", make)
    assert torch.equal(first["x"], again["x"]) and len(made) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pt"]
    assert datamodeling.Stored(None)("a", make) and len(made) == 2


def test_other_settings_are_stored_elsewhere():
    assert datamodeling._folder(datamodeling.FULL) != datamodeling._folder(TINY)


def test_the_committed_record_renders():
    path = results.RESULTS / "study-datamodeling.json"
    if not path.exists():
        pytest.skip("no record is committed")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert not record["quick"]
    assert "Linear datamodeling score" in datamodeling.table(record)
