"""Ways that are measured: what is tried, what is kept, and who follows it."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F

from functorch_mnist import cli, per_sample, random, tree
from functorch_mnist.commands import build
from functorch_mnist.options import Train
from functorch_mnist.per_sample import measured, tuning


def loss(w, x, y):
    hidden = F.conv2d(x, w["kernel"], w["shift"], padding=1).relu()
    return F.cross_entropy(F.linear(hidden.flatten(), w["head"]), y)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    params = {"kernel": draw(4, 2, 3, 3), "shift": draw(4), "head": draw(3, 144)}
    return params, draw(5, 2, 6, 6), torch.arange(5) % 3


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "ways.json"


def test_what_is_tried_costs_about_as_much_and_builds_in_one_way(problem):
    params, x, y = problem
    plan = per_sample.plan(loss, params, x[0], y[0], batch_size=5)
    ways = {row.path: tuning.candidates(row) for row in plan.rows}
    assert ways == {"kernel": ["unfold", "grouped convolution"], "shift": ["sum"], "head": ["outer product"]}


def test_times_are_kept_and_not_measured_again(problem, file, monkeypatch):
    params, x, y = problem
    plan = per_sample.tune(loss, params, x, y, file=file, seconds=0.01)
    row = next(row for row in plan.rows if row.path == "kernel")
    (record,) = json.loads(file.read_text())["records"]
    assert set(record["milliseconds"]) == set(tuning.candidates(row))
    assert record["batch"] == 5
    assert record["threads"] == torch.get_num_threads()
    assert record["torch"] == torch.__version__
    assert "shape=(4, 2, 3, 3)" in record["forms"][0]
    assert row.reason.startswith("measured: ")
    monkeypatch.setattr(tuning, "_times", None)  # would be called
    assert per_sample.tune(loss, params, x, y, file=file) == plan


@pytest.mark.parametrize("fastest", ["unfold", "grouped convolution"])
def test_the_fastest_way_is_taken_and_gives_the_same(problem, file, fastest):
    params, x, y = problem
    per_sample.tune(loss, params, x, y, file=file, seconds=0.01)
    content = json.loads(file.read_text())
    for way in content["records"][0]["milliseconds"]:
        content["records"][0]["milliseconds"][way] = 1.0 if way == fastest else 2.0
    file.write_text(json.dumps(content))
    plan = per_sample.tune(loss, params, x, y, file=file, measure=False)
    assert next(row.way for row in plan.rows if row.path == "kernel") == fastest
    expected = per_sample.clipped_sum(loss, params, x, y, max_norm=1.0)
    for fn in (plan.of(loss), per_sample.prepare(plan.of(loss), params, x[0], y[0])):
        found = per_sample.clipped_sum(fn, params, x, y, max_norm=1.0)
        for mine, theirs in zip(tree.leaves(found), tree.leaves(expected), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    assert plan.of(loss)(params, x[0], y[0]) == loss(params, x[0], y[0])


def test_a_batch_near_in_size_is_known_where_nothing_is_timed(problem, file):
    params, x, y = problem
    plan = per_sample.tune(loss, params, x, y, file=file, seconds=0.01)
    doubled = per_sample.tune(loss, params, torch.cat([x, x]), torch.cat([y, y]), file=file, measure=False)
    assert doubled.rows == plan.rows
    many = [torch.cat([rows] * 5) for rows in (x, y)]
    far = per_sample.tune(loss, params, *many, file=file, measure=False)
    assert far.rows == per_sample.plan(loss, params, x[0], y[0], batch_size=25).rows


ZERO = '{"format": 1, "records": [{"milliseconds": {"gram": 0}}]}'


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": 2, "records": []}', '{"format": 1, "records": 3}', ZERO, "\\xff"]
)
def test_a_damaged_file_is_ignored_and_said(problem, file, content):
    params, x, y = problem
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match="cannot be read as measured ways and is ignored"):
        plan = per_sample.tune(loss, params, x, y, file=file, measure=False)
    assert plan.rows == per_sample.plan(loss, params, x[0], y[0], batch_size=5).rows
    with pytest.warns(UserWarning, match="ignored"):
        per_sample.tune(loss, params, x, y, file=file, seconds=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(measured.read(file)) == 1  # it has been replaced


def test_a_file_that_cannot_be_written_is_left_as_it_was(problem, file, monkeypatch):
    params, x, y = problem
    per_sample.tune(loss, params, x, y, file=file, seconds=0.01)
    before = file.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measured.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        per_sample.tune(loss, params, x[:3], y[:3], file=file, seconds=0.01)
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]


def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert measured.default_file() == tmp_path / "functorch_mnist" / "ways.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert measured.default_file().parts[-3:] == (".cache", "functorch_mnist", "ways.json")


def test_an_empty_batch_is_refused(problem, file):
    params, x, y = problem
    with pytest.raises(ValueError, match="at least one example"):
        per_sample.tune(loss, params, x[:0], y[:0], file=file)


def test_the_command_keeps_times_and_train_follows_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["plan", "--tune", "--model", "small-cnn", "--batch-size", "4"]) == 0
    printed = capsys.readouterr().out
    file = measured.default_file()
    assert "measured: " in printed
    assert f"Kept in {file}." in printed
    content = json.loads(file.read_text())
    for record in content["records"]:
        times = record["milliseconds"]
        record["milliseconds"] = {way: 1.0 if way == "unfold" else 2.0 for way in times}
    file.write_text(json.dumps(content))
    options = Train(model="small-cnn", batch_size=4)
    made = build.classifier(build.Origin(options, (0.0, 1.0), 1, 10))
    params = made.init(random.key(0))
    example = torch.zeros(1, 28, 28, dtype=torch.uint8), torch.tensor(0), random.key(0)
    fn = build.fastest(build.losses(made, options), params, *example, options=options, batch_size=4)
    assert {row.path: row.way for row in fn.plan.rows if "conv" in row.path and "weight" in row.path} == {
        "conv1.weight": "unfold",
        "conv2.weight": "unfold",
    }
    file.write_text("{")
    build.fastest(build.losses(made, options), params, *example, options=options, batch_size=4)
    assert "is ignored" in capsys.readouterr().err


def test_what_only_times_is_refused_without_tune(capsys):
    assert cli.main(["plan", "--threads", "1"]) == 2
    assert "--threads has no effect without --tune" in capsys.readouterr().err
