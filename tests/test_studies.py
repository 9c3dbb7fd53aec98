"""The studies run, their records are JSON, and their tables are made from the records alone."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results, studies
from benchmarks.studies import __main__ as main
from benchmarks.studies import audit, mislabelled, noise_scale

MADE_HERE = {"mislabelled": mislabelled, "noise_scale": noise_scale, "audit": audit}
TINY_MISLABELLED = mislabelled.QUICK._replace(
    images=200, epochs=4, settings=(mislabelled.Setting(32, 0.05, 0.9),), seeds=(0, 1), whole_images=192, whole_epochs=1
)
TINY_NOISE = noise_scale.Sizes(images=384, moments=2, sampled=16, pairs=4, small=2, large=6, every=1, windows=(2,))
TINY_AUDIT = audit.QUICK._replace(images=100, batch_size=4)


def tiny(monkeypatch):
    """Makes the studies really small."""
    monkeypatch.setattr(mislabelled, "QUICK", TINY_MISLABELLED)
    monkeypatch.setattr(noise_scale, "QUICK", TINY_NOISE)
    monkeypatch.setattr(audit, "QUICK", TINY_AUDIT)


@pytest.fixture(scope="module")
def records():
    """The records of tiny runs, as they come back from JSON, and the progress they reported."""
    with pytest.MonkeyPatch.context() as patch:
        tiny(patch)
        found = {}
        for name, study in MADE_HERE.items():
            lines = []
            record = study.run(quick=True, progress=lines.append)
            found[name] = json.loads(json.dumps(record, allow_nan=False)), record, lines
    return found


def run(monkeypatch, *options):
    """The command's exit status."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["studies", *map(str, options)])
    monkeypatch.setattr(main.allocator, "keep_freed_memory", lambda: True)
    try:
        return main.main()
    except SystemExit as end:
        return end.code
    finally:
        torch.set_num_threads(threads)


class Planted:
    """A study that returns a planted record."""

    QUESTION = "Is it planted?"

    def __init__(self, record):
        self.record = record

    def run(self, *, quick, progress):
        progress("on its way")
        return self.record

    def table(self, record):
        return {"All there is": studies.markdown(["a", "b"], [["x|y", str(record["found"])]])}


def is_markdown(table):
    """Whether each line has the cells of the first, and there is more than a head."""
    lines = table.replace("\\|", "").replace("|E ∇|²", "").splitlines()
    return len(lines) > 2 and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_record_is_json_and_its_tables_come_from_it_alone(name, records):
    read, made, lines = records[name]
    assert read == made
    assert "settings" in read or all("settings" in part for part in read.values())
    tables = MADE_HERE[name].table(read)
    assert tables and all(is_markdown(table) for table in tables.values())
    assert lines and all(isinstance(line, str) for line in lines)


def test_label_noise_is_detected_better_than_by_chance(records):
    record, _, _ = records["mislabelled"]
    for seed in record["thousand"]["seeds"]:
        scores = seed["scores"]
        assert scores["EL2N, mean over epochs"]["auc"] > max(0.7, scores[mislabelled.CONTROL]["auc"])
        for name in scores:
            assert scores[name]["detected"] == sorted(scores[name]["detected"])


def test_a_seed_gives_the_same_record_again(records):
    record, _, _ = records["mislabelled"]
    examples = mislabelled.data.load("mnist").train
    count = TINY_MISLABELLED.images
    some, clean = mislabelled._some(examples, 0, count), mislabelled._some(examples, count, count + 100)
    again = mislabelled._thousand(some, TINY_MISLABELLED.settings[0], TINY_MISLABELLED.epochs, 1, clean)
    assert {"seed": 1, **again} == record["thousand"]["seeds"][1]


def test_the_setting_is_chosen_on_seeds_that_are_not_reported():
    for sizes in (mislabelled.FULL, mislabelled.QUICK):
        assert not set(sizes.choosing) & set(sizes.seeds)
    assert len(mislabelled.FULL.choosing) > 1


def test_the_two_estimates_of_the_noise_scale_share_no_example():
    for sizes in (noise_scale.FULL, noise_scale.QUICK, TINY_NOISE):
        assert sizes.sampled + sizes.pairs * (sizes.small + sizes.large) <= sizes.images


def test_each_moment_has_both_estimates_and_the_epoch_its_averages(records):
    record, _, _ = records["noise_scale"]
    steps = -(-TINY_NOISE.images // noise_scale.BATCH_SIZE)
    assert list(record["arms"]) == ["dropout off", "dropout on"]
    for arm in record["arms"].values():
        assert [one["step"] for one in arm["moments"]] == [0, steps]
        assert all(one["examples"]["samples"] == TINY_NOISE.sampled for one in arm["moments"])
        assert all(one["two_sizes"]["samples"] == TINY_NOISE.pairs for one in arm["moments"])
        watched = arm["steps"]
        assert watched["step"] == list(range(1, steps + 1))
        ratio = sum(watched["trace"]) / sum(watched["square_norm"])
        assert math.isclose(watched["average"]["scale"], ratio, rel_tol=1e-9)


def test_the_audited_runs_show_a_part_of_their_epsilon(records):
    record, _, _ = records["audit"]
    assert [one["seed"] for one in record["runs"]] == list(TINY_AUDIT.seeds)
    for one in record["runs"]:
        assert 0 < one["epsilon"] < one["gaussian"] < one["independent"] < audit.EPSILON
    assert {name: len(of) for name, of in record["seconds"].items()} == {"without": 2, "with": 2}


def test_a_noise_scale_without_end_is_told_by_a_dash():
    found = noise_scale.statistics.NoiseScale(math.inf, math.inf, 1.0, 0.1, -0.5, 0.2, 10)
    assert noise_scale._shown(noise_scale._record(found)) == "- ± -"
    scores = noise_scale._scores(found, found._replace(trace=1.2))
    assert scores["scale"] is None
    assert math.isclose(scores["trace"], 0.2 / math.hypot(0.1, 0.1))


@pytest.mark.parametrize("name", [name for name in MADE_HERE if (results.RESULTS / f"study-{name}.json").is_file()])
def test_a_committed_record_gives_its_tables(name):
    record = json.loads((results.RESULTS / f"study-{name}.json").read_text(encoding="utf-8"))
    assert record["study"] == name and not record["quick"]
    assert all(is_markdown(table) for table in MADE_HERE[name].table(record).values())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["nothing"], f"no study is named nothing. There are {', '.join(studies.NAMES)}."),
        (["mislabelled", "b", "a"], f"no study is named a, b. There are {', '.join(studies.NAMES)}."),
        (["--threads", 0], "--threads must be from 1 to"),
        (["--threads", 10**6], "--threads must be from 1 to"),
    ],
)
def test_what_cannot_be_had_is_one_line_and_status_2(options, complaint, monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, *options, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m benchmarks.studies: {complaint}")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_prints_its_tables_and_writes_its_record(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main, "load", lambda name: Planted({"found": name}))
    assert run(monkeypatch, "noise_scale", "--out", tmp_path / "new", "--threads", 1) == 0
    out = capsys.readouterr().out
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "study-noise_scale.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["study"], record["question"], record["found"]) == ("noise_scale", "Is it planted?", "noise_scale")
    assert record["machine"]["threads"] == 1 and record["machine"]["versions"]["torch"] and record["time"]
    assert "All there is\n\n| a | b |\n|---|---:|\n| x\\|y | noise_scale |" in out
    assert f"Written to {path}" in out


def test_without_names_all_studies_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main, "load", lambda name: Planted({"found": name}))
    assert run(monkeypatch, "--out", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"study-{name}.json" for name in studies.NAMES}
    capsys.readouterr()


def test_a_quick_look_is_written_only_where_a_folder_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(main, "load", lambda name: Planted({"found": 1}))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    assert run(monkeypatch, "mislabelled", "--quick") == 0
    assert not list(tmp_path.iterdir())
    assert run(monkeypatch, "mislabelled", "--quick", "--out", tmp_path) == 0
    assert json.loads((tmp_path / "study-mislabelled.json").read_text(encoding="utf-8"))["quick"]
    assert "Written to" in capsys.readouterr().out


def test_a_record_that_is_not_json_leaves_the_file_before_it_as_it_was(tmp_path):
    path = tmp_path / "study-x.json"
    main._write({"found": 1}, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        main._write({"found": math.nan}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["study-x.json"]
    assert json.loads(path.read_text(encoding="utf-8")) == {"found": 1}


@pytest.mark.parametrize("name", MADE_HERE)
def test_a_study_is_found_by_its_name(name):
    study = studies.load(name)
    assert study is MADE_HERE[name]
    assert study.QUESTION.endswith("?")


def test_the_map_names_each_file():
    names = {path.name for path in Path(studies.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert all(f"`{name}`" in studies.__doc__ for name in names)
