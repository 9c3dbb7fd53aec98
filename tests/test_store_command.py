"""The commands `store` and `influence --store`: what they write, that they go on, and what they refuse."""

import csv
import os
import shutil
import time

import pytest
import torch
import worlds
from forks import Forked
from shell import TEST, TRAIN, complain, part, succeed
from test_analysis import Run, png

from functorch_mnist.attribution import store

QUICK = ("--features", "64", "--images", str(TRAIN))


@pytest.fixture(scope="module")
def stored(linear, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "all"
    succeed("store", linear, "--checkpoints", "all", "--features", "8000", "--precision", "float32", "--out", folder)
    return folder


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_influences_of_a_store_are_those_of_dense_gradients(linear, stored, mnist, tmp_path):
    out = succeed("influence", linear, "--store", stored, "--test", "5:17", "--top", "4", "--out", tmp_path)
    run, data = Run(linear), part(mnist, TRAIN, TEST)
    expected = torch.zeros(TRAIN, 12)
    for point in run.points:
        rows = run.sample_grads(point, *data.train)
        expected += 0.01 * rows @ run.sample_grads(point, *[x[5:17] for x in data.test]).T
    found = read(tmp_path / "influence.csv")
    for test in range(5, 17):
        mine = [row for row in found if int(row["test_index"]) == test]
        helped = [int(row["index"]) for row in mine if float(row["influence"]) > 0]
        hurt = [int(row["index"]) for row in mine if float(row["influence"]) < 0]
        order = expected[:, test - 5].argsort(descending=True)
        assert helped == order[:4].tolist() and hurt == order.flip(0)[:4].tolist()
        values = torch.tensor([float(row["influence"]) for row in mine])
        exact = expected[[int(row["index"]) for row in mine], test - 5]
        torch.testing.assert_close(values, exact, rtol=1e-3, atol=1e-5)
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["influence-00005.png", "influence-00015.png"]
    assert png(tmp_path / "influence-00005.png")
    assert "by tracin" in out and "Test image 5: given label " in out and "and 2 more in influence.csv" in out


def test_the_other_methods_are_asked_for_by_name(linear, tmp_path, no_pictures):
    newest = tmp_path / "newest"
    succeed("store", linear, *QUICK, "--out", newest)
    for method in ("dot", "cosine", "inverse"):
        asked = ("--test", "3", "--method", method, "--out", tmp_path / method)
        assert f"by {method}" in succeed("influence", linear, "--store", newest, *asked)
        assert len(read(tmp_path / method / "influence.csv")) == 20


def test_a_store_of_another_run_is_refused(linear, stored, copy, tmp_path):
    newest = tmp_path / "newest"
    succeed("store", linear, *QUICK, "--out", newest)
    said = complain(2, "influence", linear, "--store", newest, "--test", "1", "--method", "tracin")
    assert said.startswith("TracIn needs the gradients of several checkpoints.")
    shutil.rmtree(sorted((copy / "checkpoints").iterdir())[-1])
    assert "or other parameters" in complain(1, "influence", copy, "--store", newest, "--test", "1")
    assert "holds no store" in complain(1, "influence", linear, "--store", tmp_path, "--test", "1")
    assert "--images has no effect" in complain(
        2, "influence", linear, "--store", newest, "--test", "1", "--images", "3"
    )
    assert "Found other about" in complain(1, "store", linear, "--features", "65", "--out", newest)
    assert "it is finished" not in complain(1, "store", linear, *QUICK[:2], "--images", "9", "--out", newest)


def test_a_store_that_is_killed_goes_on_to_the_same_bits_with_two_processes(linear, tmp_path):
    """Killed at its second part, as by a power cut, and begun again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (*QUICK, "--checkpoints", "all", "--threads", "1")
    succeed("store", linear, *options, "--out", whole)
    line = ["-m", "functorch_mnist", "store", linear, *options, "--out", killed]
    process, end = Forked(line, os.environ), time.monotonic() + 60
    while not (killed / "1" / "000000000.npy").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.communicate(60)
    if not (killed / "manifest.json").exists():  # it was quicker than the kill otherwise
        with pytest.raises(store.StoreError, match="not finished"):
            store.load(killed)
    world = worlds.started(line, 2)
    ends = [one.communicate(120) for one in world]
    assert [one.returncode for one in world] == [0, 0], ends
    mine, theirs = (
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file() and not p.name.startswith(".")}
        for f in (killed, whole)
    )
    assert mine == theirs
