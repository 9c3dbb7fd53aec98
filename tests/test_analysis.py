"""The commands that ask a run about its training images: what they write, that they go on, and what they refuse."""

import csv
import json
import math
import shutil
import signal
from functools import partial
from importlib import import_module

import numpy
import pytest
import torch
from shell import BATCH, LINEAR, TEST, TRAIN, ask, complain, part, succeed, write_idx
from torch import nn
from torch.func import grad, vmap

import functorch_mnist as fm
from functorch_mnist import commands, random, statistics, tree
from functorch_mnist.commands import passes, restore

ALL = "loss,el2n,grand,margin,self-influence,forgetting"
CPU = torch.device("cpu")
noise_scale = import_module("functorch_mnist.commands.noise_scale")


def table(path):
    """The columns of a CSV file, as numbers."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in rows[0]}


def png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def litter(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".") or "tmp" in path.name]


class Run:
    """A run, read with the public parts of the library."""

    def __init__(self, folder):
        self.found = restore.trained(folder, CPU)
        self.points = restore.points(folder, self.found, CPU)

    def outputs(self, point, images):
        return self.found.made.outputs(point.params, images)

    def sample_grads(self, point, images, labels):
        """(N, P), dense."""

        def loss_fn(params, image, label):
            return self.found.made.loss(self.found.made.outputs(params, image), label)

        rows = vmap(grad(loss_fn), in_dims=(None, 0, 0))(point.params, images, labels)
        return torch.cat([leaf.reshape(len(images), -1) for leaf in tree.leaves(rows)], 1)


# ---- scores


def test_scores_writes_every_score_of_every_image(linear, mnist, tmp_path):
    out = succeed("scores", linear, "--scores", ALL, "--checkpoints", "all", "--out", tmp_path / "out")
    found = table(tmp_path / "out" / "scores.csv")
    run, (images, labels) = Run(linear), part(mnist, TRAIN, TEST).train
    outputs = torch.stack([run.outputs(point, images) for point in run.points])
    losses = torch.stack([nn.functional.cross_entropy(o, labels, reduction="none") for o in outputs])
    norms = torch.stack([run.sample_grads(point, images, labels).norm(dim=1) for point in run.points])
    right = outputs.argmax(-1) == labels
    assert len(run.points) == 3
    assert torch.equal(found["index"], torch.arange(TRAIN).float())
    assert torch.equal(found["given_label"].long(), labels)
    assert torch.equal(found["predicted"].long(), outputs[-1].argmax(-1))
    torch.testing.assert_close(found["loss"], losses.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["grand"], norms.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["self-influence"], 0.01 * norms.square().sum(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(found["forgetting"].long(), fm.attribution.forgetting_events(right))
    assert png(tmp_path / "out" / "histograms.png")
    assert png(tmp_path / "out" / "gallery.png")
    assert f"Scoring {TRAIN} training images at 3 checkpoints, the last after step 16." in out
    assert not litter(tmp_path / "out")


def test_scores_are_those_of_the_newest_checkpoint_by_default_and_go_into_the_runs_folder(linear, mnist):
    succeed("scores", linear, "--scores", "loss")
    found = table(linear / "scores" / "scores.csv")
    run, (images, labels) = Run(linear), part(mnist, TRAIN, TEST).train
    expected = nn.functional.cross_entropy(run.outputs(run.points[-1], images), labels, reduction="none")
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
    assert list(found) == ["index", "given_label", "predicted", "loss"]
    out = succeed("scores", linear, "--scores", "el2n")
    assert (
        f"Replacing {linear / 'scores' / 'scores.csv'}, which had the columns index, given_label, predicted, loss."
        in out
    )
    shutil.rmtree(linear / "scores")


@pytest.mark.usefixtures("traced")
def test_compiled_scores_are_the_same(linear, tmp_path, no_pictures):
    for name, options in (("eager", ()), ("compiled", ("--compile", "on"))):
        columns = ("--scores", "grand,margin")  # compiling takes seconds
        assert ask("scores", linear, "--images", "200", *columns, "--out", tmp_path / name, *options).status == 0
    eager, fast = (table(tmp_path / name / "scores.csv") for name in ("eager", "compiled"))
    for name, column in eager.items():
        torch.testing.assert_close(fast[name], column, rtol=1e-4, atol=1e-5)  # of float32


def test_self_influence_at_one_checkpoint_is_left_out_next_to_grand_and_said_to_be(linear, tmp_path, no_pictures):
    names = ("--scores", "self-influence,grand,loss")
    out = succeed("scores", linear, *names, "--out", tmp_path / "one")
    assert out.count("the same ranking: left out") == 1
    assert list(table(tmp_path / "one" / "scores.csv"))[3:] == ["grand", "loss"]
    out = succeed("scores", linear, *names, "--checkpoints", "all", "--out", tmp_path / "all")
    assert "left out" not in out
    assert list(table(tmp_path / "all" / "scores.csv"))[3:] == ["self-influence", "grand", "loss"]


# ---- the data set's own indices


@pytest.fixture(scope="module")
def drawn(data_dir, tmp_path_factory):
    """A run on 90 images that are drawn from what --hold-out and --imbalance leave of 256."""
    run = tmp_path_factory.mktemp("drawn") / "run"
    parts = ("--hold-out", "40", "--imbalance", "3=0.5", "--train-size", "90", "--epochs", "1")
    succeed("train", "--data-dir", data_dir, *LINEAR, *parts, "--out", run)
    return run


def test_indices_of_a_drawn_subset_are_those_of_the_data_set(drawn, mnist, tmp_path, no_pictures):
    train, run = part(mnist, TRAIN, TEST).train, Run(drawn)
    succeed("scores", drawn, "--scores", "loss", "--out", tmp_path)
    found = table(tmp_path / "scores.csv")
    index = found["index"].long()
    assert len(index.unique()) == 90 and (index.diff() > 0).all() and int(index[-1]) >= 90
    images, labels = train.images[index], train.labels[index]
    assert torch.equal(found["given_label"].long(), labels)
    loss = nn.functional.cross_entropy(run.outputs(run.points[-1], images), labels, reduction="none")
    torch.testing.assert_close(found["loss"], loss, rtol=1e-4, atol=1e-5)
    out = succeed("mislabelled", drawn, "--scores", "loss", "--top", "3", "--out", tmp_path)
    assert torch.equal(table(tmp_path / "suspicious.csv")["index"].long(), index[loss.argsort(descending=True)])
    assert [int(line.split()[0]) for line in out.splitlines() if line[:8].strip().isdigit()] == index[
        loss.argsort(descending=True)[:3]
    ].tolist()


def test_influence_and_a_store_name_images_by_their_indices_in_the_data_set(drawn, mnist, tmp_path, no_pictures):
    (images, labels), test = part(mnist, TRAIN, TEST).train, part(mnist, TRAIN, TEST).test
    run, ask_for = Run(drawn), ("--test", "7", "--method", "dot", "--top", "3")
    (query,) = run.sample_grads(run.points[-1], test.images[7:8], test.labels[7:8])
    succeed("influence", drawn, *ask_for, "--images", "50", "--out", tmp_path / "exact")
    found = table(tmp_path / "exact" / "influence.csv")
    index = found["index"].long()
    expected = run.sample_grads(run.points[-1], images[index], labels[index]) @ query
    torch.testing.assert_close(found["influence"], expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(found["given_label"].long(), labels[index])
    store = tmp_path / "store"
    succeed("store", drawn, "--images", "50", "--features", "8000", "--precision", "float32", "--out", store)
    kept = torch.from_numpy(numpy.load(store / "index.npy"))
    assert torch.equal(kept, index.sort().values)
    out = succeed("influence", drawn, "--store", store, *ask_for, "--out", tmp_path / "stored")
    order = expected.argsort(descending=True)
    assert table(tmp_path / "stored" / "influence.csv")["index"][:3].tolist() == index[order[:3]].tolist()
    best = int(index[order[0]])
    assert out.partition("most helpful:\n")[2].splitlines()[1].split()[:3] == [
        "1",
        str(int(best)),
        str(int(labels[best])),
    ]
    (store / "index.npy").unlink()
    again = succeed("influence", drawn, "--store", store, *ask_for, "--out", tmp_path / "stored")
    assert "does not hold the indices of its images in the data set" in again
    numpy.save(store / "index.npy", kept.numpy() + 1)
    said = complain(1, "influence", drawn, "--store", store, *ask_for, "--out", tmp_path / "stored")
    assert "must hold the indices of the run's training images" in said


# ---- going on


@pytest.fixture
def small_chunks(monkeypatch, no_pictures):
    monkeypatch.setattr(passes, "CHUNK", 50)


class _Stop:
    """Ctrl-C at the n-th call of a function."""

    def __init__(self, monkeypatch, owner, name, at):
        self.calls, self.at, self.fn = 0, at, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __get__(self, owner, _):
        return partial(self, owner)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        return self.fn(*args, **kwargs)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_stopped_command_goes_on_where_it_was_and_ends_the_same(at, linear, tmp_path, monkeypatch, small_chunks):
    command = ("scores", linear, "--scores", "loss,grand", "--checkpoints", "all", "--out")
    succeed(*command, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _Stop(patch, fm.attribution, "scores", at)
        said = complain(130, *command, tmp_path / "out")
    done = (at - 1) // 6 * TRAIN + (at - 1) % 6 * 50
    assert said == f"Interrupted after {done} of 768 examples. The same command goes on from there."
    counted = _Stop(monkeypatch, fm.attribution, "scores", -1)
    out = succeed(*command, tmp_path / "out")
    assert (f"Resuming after {done} examples." in out) == (done > 0)
    assert counted.calls == 18 - (at - 1)
    assert (tmp_path / "out" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()
    assert not litter(tmp_path / "out")


def test_what_another_command_has_left_is_not_gone_on_with(linear, tmp_path, monkeypatch, small_chunks):
    with monkeypatch.context() as patch:
        _Stop(patch, fm.attribution, "scores", 3)
        ask("scores", linear, "--out", tmp_path)
    out = succeed("scores", linear, "--images", "120", "--out", tmp_path)
    assert "Going on" not in out
    assert len(table(tmp_path / "scores.csv")["index"]) == 120


def test_what_was_kept_is_passed_over_if_damaged(linear, tmp_path, monkeypatch, small_chunks):
    with monkeypatch.context() as patch:
        _Stop(patch, fm.attribution, "scores", 3)
        ask("scores", linear, "--out", tmp_path)
    (state,) = (tmp_path / ".partial").rglob("state.safetensors")
    state.write_bytes(state.read_bytes()[:-7])
    assert "Passed over a damaged file" in succeed("scores", linear, "--out", tmp_path)
    assert len(table(tmp_path / "scores.csv")["index"]) == TRAIN


def test_long_passes_are_saved_from_time_to_time(linear, tmp_path, monkeypatch, small_chunks):
    monkeypatch.setattr(passes, "SAVE_EVERY", 0.0)
    saves = []
    save = fm.checkpoint.save
    monkeypatch.setattr(fm.checkpoint, "save", lambda *a, **k: saves.append(k["step"]) or save(*a, **k))
    succeed("scores", linear, "--out", tmp_path)
    assert saves == [50, 100, 150, 200, 250, 256]


def test_what_was_computed_from_other_labels_or_parameters_is_not_gone_on_with(
    linear, copy, mnist, tmp_path, monkeypatch, small_chunks
):
    data = part(mnist, TRAIN, TEST)
    train = fm.data.Split(data.train.images, (data.train.labels + 1) % 10)
    other = write_idx(tmp_path / "data", fm.data.Dataset(train, data.test, data.classes))
    for changed in ((linear, "--data-dir", other), (copy,)):
        with monkeypatch.context() as patch:
            _Stop(patch, fm.attribution, "scores", 3)
            ask("scores", linear, "--out", tmp_path / "out")
        if changed[0] == copy:
            shutil.rmtree(checkpoints_of(copy)[-1])
        assert "Going on" not in succeed("scores", *changed, "--out", tmp_path / "out")


def checkpoints_of(run):
    return sorted((run / "checkpoints").iterdir())


def test_a_second_ctrl_c_does_not_break_off_the_save_of_the_first(linear, tmp_path, monkeypatch, small_chunks):
    with monkeypatch.context() as patch:
        _Stop(patch, fm.attribution, "scores", 3)
        _Stop(patch, fm.checkpoint, "save", 1)
        assert "Interrupted after 100 of 256" in complain(130, "scores", linear, "--out", tmp_path)
    assert "Resuming after 100 examples." in succeed("scores", linear, "--out", tmp_path)


def test_a_checkpoints_learning_rate_is_that_of_its_own_schedule(data_dir, tmp_path):
    run, options = tmp_path / "run", ("--schedule", "cosine", "--save-every", "4", "--keep", "100")
    succeed("train", "--data-dir", data_dir, *LINEAR, "--out", run, *options)
    before = [point.lr for point in Run(run).points]
    assert before == sorted(before, reverse=True)
    assert math.isclose(before[0], 0.01 * (1 + math.cos(math.pi * 3 / 16)) / 2, rel_tol=1e-5)
    succeed("train", "--resume", run, "--epochs", "4")
    assert [point.lr for point in Run(run).points][:4] == before


# ---- mislabelled


def test_planted_flips_are_found_better_than_at_random(linear, mnist, tmp_path):
    out = succeed(
        "mislabelled", linear, "--label-noise", "0.2", "--scores", ALL, "--seed", "3", "--out", tmp_path / "out"
    )
    found = table(tmp_path / "out" / "scores.csv")
    labels = part(mnist, TRAIN, TEST).train.labels
    planted, flipped = fm.attribution.label_noise(labels, 10, key=random.key(3), fraction=0.2)
    assert torch.equal(found["original_label"].long(), labels)
    assert torch.equal(found["given_label"].long(), planted)
    assert torch.equal(found["flipped"].bool(), flipped)
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.count("%") == 4}
    for name in ("loss", "el2n", "margin"):
        score = -found[name] if name == "margin" else found[name]
        auc, *shares = rows[name][1:]
        assert math.isclose(float(auc), fm.attribution.auc(score, flipped), abs_tol=2e-3)  # of rounded scores
        assert float(auc) > 0.75 > 0.65 > float(rows["random"][1]) > 0.35
        for share, checked in zip(shares, (0.05, 0.1, 0.2, 0.3), strict=True):
            assert math.isclose(
                float(share.strip("%")) / 100, fm.attribution.recall_at(score, flipped, checked), abs_tol=0.02
            )
    top = [int(line.split()[0]) for line in out.partition("20 most suspicious of 256 labels")[2].splitlines()[3:23]]
    assert top == found["mean_rank"].argsort(stable=True)[:20].tolist()
    assert flipped[top].double().mean() > 0.5
    assert png(tmp_path / "out" / "detection.png")
    (training,) = (tmp_path / "out").glob("training-*")
    assert len(Run(training).points) == 2  # one for each epoch
    assert not litter(tmp_path / "out")


def test_a_stopped_training_on_flipped_labels_goes_on_to_the_same_end(linear, tmp_path, monkeypatch, no_pictures):
    command = ("mislabelled", linear, "--label-noise", "0.2", "--scores", "loss", "--out")
    succeed(*command, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _Stop(patch, commands.callbacks.Reporter, "__call__", 11)
        answer = ask(*command, tmp_path / "out")
    assert answer.status == 130
    assert "Resume with: the same command" in answer.err
    succeed(*command, tmp_path / "out")
    assert (tmp_path / "out" / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


def test_real_labels_are_ranked_by_the_mean_rank_of_the_scores(linear, tmp_path):
    out = succeed("mislabelled", linear, "--scores", "loss,margin", "--top", "5", "--out", tmp_path)
    found = table(tmp_path / "suspicious.csv")
    order = found["index"].long()
    assert sorted(order.tolist()) == list(range(TRAIN))
    ranks = torch.stack(
        [(-found["loss"]).argsort(stable=True).argsort(), found["margin"].argsort(stable=True).argsort()]
    )
    mean = ranks.double().mean(0)
    assert (mean.diff() >= -1).all()  # up to ties of rounded scores
    torch.testing.assert_close(found["mean_rank"], (mean + 1).float(), rtol=0, atol=2)
    assert (found["mean_rank"].diff() >= 0).all()
    assert "loss (high)" in out and "margin (low)" in out and "This run keeps" not in out
    listed = [int(line.split()[0]) for line in out.splitlines() if line[:8].strip().isdigit()]
    assert listed == order[:5].tolist()
    assert png(tmp_path / "suspicious.png")


def test_other_flips_in_the_same_folder_are_trained_on_anew(linear, tmp_path, no_pictures):
    command = ("mislabelled", linear, "--scores", "loss")
    succeed(*command, "--label-noise", "0.1", "--out", tmp_path / "both")
    for other in (
        ("--label-noise", "0.3"),
        ("--label-noise", "0.1", "--seed", "1"),
        ("--label-noise", "0.1", "--images", "100"),
    ):
        succeed(*command, *other, "--out", tmp_path / "both")
        fresh = tmp_path / "-".join(other)
        succeed(*command, *other, "--out", fresh)
        assert (tmp_path / "both" / "scores.csv").read_bytes() == (fresh / "scores.csv").read_bytes()


def test_the_same_flips_go_on_wherever_the_run_is_moved_to(copy, tmp_path, no_pictures):
    command = ("--label-noise", "0.1", "--scores", "loss")
    succeed("mislabelled", copy, *command)
    copy.rename(tmp_path / "moved")
    assert "Resuming after step 16." in succeed("mislabelled", tmp_path / "moved", *command)


def test_equal_scores_have_equal_ranks(linear, tmp_path, no_pictures):
    succeed("mislabelled", linear, "--scores", "forgetting,loss", "--out", tmp_path)
    found = table(tmp_path / "suspicious.csv")
    never = found["forgetting"] == 0
    assert (found["loss"][never].diff() <= 1e-6).all()  # among equals the other score decides


def test_a_run_with_one_checkpoint_is_advised_to_keep_one_for_each_epoch(copy, tmp_path, no_pictures):
    for path in checkpoints_of(copy)[:-1]:
        shutil.rmtree(path)
    out = succeed("mislabelled", copy, "--images", "50", "--out", tmp_path)
    assert "ranking: left out." in out
    assert "This run keeps 1 checkpoint; train with --epochs 10 --save-every 8 --keep 10 to average scores" in out


# ---- influence


@pytest.mark.parametrize("method", ["tracin", "dot", "cosine"])
def test_influence_is_that_of_the_dense_gradients(method, linear, mnist, tmp_path):
    out = succeed("influence", linear, "--test", "7", "--method", method, "--top", "3", "--out", tmp_path)
    ranked = table(tmp_path / "influence.csv")
    assert ranked["rank"].tolist() == list(range(1, TRAIN + 1)) and (ranked["influence"].diff() <= 0).all()
    found = ranked["influence"][ranked["index"].argsort()]
    run, data = Run(linear), part(mnist, TRAIN, TEST)
    points = run.points if method == "tracin" else run.points[-1:]
    expected = torch.zeros(TRAIN)
    for point in points:
        rows = run.sample_grads(point, *data.train)
        (test,) = run.sample_grads(point, data.test.images[7:8], data.test.labels[7:8])
        products = rows @ test
        if method == "cosine":
            products = products / (rows.norm(dim=1) * test.norm())
        expected += products * (0.01 if method == "tracin" else 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    listed = [line.split() for line in out.partition("most helpful:\n")[2].splitlines()[1:4]]
    best = expected.argsort(descending=True)[:3]
    predicted = run.outputs(run.points[-1], data.train.images).argmax(-1)
    for rank, (line, i) in enumerate(zip(listed, best.tolist(), strict=True), 1):
        assert line[:4] == [str(rank), str(i), str(int(data.train.labels[i])), str(int(predicted[i]))]
    label, guess = data.test.labels[7], run.outputs(run.points[-1], data.test.images[7:8]).argmax()
    assert f"Test image 7: given label {label}, predicted label {guess}" in out
    assert (ranked["test_index"] == 7).all() and (ranked["test_label"] == label).all()
    assert (ranked["test_predicted"] == guess).all()
    assert png(tmp_path / "influence.png")


def test_only_images_of_positive_influence_are_helpful_and_only_of_negative_harmful(linear, tmp_path, no_pictures):
    out = succeed("influence", linear, "--test", "7", "--images", "6", "--top", "6", "--out", tmp_path)
    found = table(tmp_path / "influence.csv")["influence"]
    for title, good in (("helpful", found > 0), ("harmful", found < 0)):
        listed = out.partition(f"most {title}:")[2].partition("most")[0].splitlines()
        assert sum(line[:8].strip().isdigit() for line in listed) == int(good.sum())
        assert ("none" in listed[0]) == (not good.any())


# ---- the noise scale, and training that watches it


@pytest.fixture(scope="module")
def watched(data_dir, tmp_path_factory):
    """A run that was watched at every second step."""
    run = tmp_path_factory.mktemp("watched") / "run"
    options = ("--watch", "noise-scale,norms", "--watch-every", "2")
    out = succeed("train", "--data-dir", data_dir, *LINEAR, "--out", run, *options)
    return run, out


def lines(run, kind):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def test_a_watched_run_records_the_norms_and_the_noise_of_its_batches(watched, mnist):
    run, out = watched
    found = lines(run, "watch")
    assert [row["step"] for row in found] == list(range(1, 17, 2))
    first = Run(run).found
    params = first.made.init(random.split(random.key(0))[0])
    order_key, _ = random.split(random.split(random.key(0))[1]).unbind(0)
    index = fm.data.epoch_order(TRAIN, key=order_key, epoch=0)[:BATCH]
    images, labels = (rows[index] for rows in part(mnist, TRAIN, TEST).train)
    rows = Run(run).sample_grads(restore.Point(0, params, None, 0.01), images, labels).double()
    norms, trace = rows.norm(dim=1), rows.var(0).sum()
    assert math.isclose(found[0]["trace"], trace, rel_tol=1e-4)
    assert math.isclose(found[0]["square_norm"], rows.mean(0).square().sum() - trace / BATCH, rel_tol=1e-3)
    assert math.isclose(found[0]["norms"]["mean"], norms.mean(), rel_tol=1e-4)
    assert math.isclose(
        found[0]["norms"]["50 %"], norms.median() / 2 + norms.sort().values[BATCH // 2] / 2, rel_tol=1e-4
    )
    assert math.isclose(found[0]["norms"]["most"], norms.max(), rel_tol=1e-4)
    columns = torch.tensor([[row["trace"], row["square_norm"]] for row in found[:4]]).unbind(1)
    assert f"Gradient noise scale of the epoch: {statistics.mean_noise_scale(*columns)}, from 4 steps" in out
    assert "Largest norm of a per-sample gradient in the epoch" in out


def test_watching_changes_no_parameter_but_by_rounding(watched, linear):
    for mine, other in zip(Run(watched[0]).points, Run(linear).points, strict=True):
        for a, b in zip(tree.leaves(mine.params), tree.leaves(other.params), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("watch", ["norms", "noise-scale"])
def test_only_what_is_asked_for_is_recorded(watch, data_dir, tmp_path):
    succeed("train", "--data-dir", data_dir, *LINEAR, "--epochs", "1", "--out", tmp_path / "run", "--watch", watch)
    row = lines(tmp_path / "run", "watch")[0]
    assert ("norms" in row, "trace" in row) == (watch == "norms", watch == "noise-scale")


def test_a_watched_run_that_stops_and_goes_on_ends_as_one_that_did_not(watched, data_dir, tmp_path, monkeypatch):
    run, options = tmp_path / "run", ("--watch", "noise-scale,norms", "--watch-every", "2")
    with monkeypatch.context() as patch:
        _Stop(patch, commands.callbacks.Reporter, "__call__", 8)
        assert ask("train", "--data-dir", data_dir, *LINEAR, "--out", run, *options).status == 130
    succeed("train", "--resume", run)
    assert lines(run, "watch") == lines(watched[0], "watch")


@pytest.mark.usefixtures("traced")
def test_the_last_batch_of_an_epoch_may_be_of_one_example(data_dir, mnist, tmp_path):
    folder = write_idx(tmp_path / "data", part(mnist, 33, 8))
    options = ("--epochs", "1", "--batch-size", "32", "--watch", "noise-scale,norms", "--model", "linear")
    for form in ("off", "on"):
        assert ask("train", "--data-dir", folder, "--out", tmp_path / form, "--compile", form, *options).status == 0
    plain, compiled = (lines(tmp_path / form, "watch") for form in ("off", "on"))
    assert ["trace" in row for row in plain] == [True, False]
    for a, b in zip(plain, compiled, strict=True):
        assert a["norms"] == pytest.approx(b["norms"], rel=1e-4)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("form", ["off", "on"])
def test_a_last_batch_of_any_size_is_recorded_whole(form, mnist, tmp_path):
    folder = write_idx(tmp_path / "data", part(mnist, 148, 8))
    options = ("--epochs", "1", "--batch-size", "64", "--watch", "norms", "--model", "linear", "--compile", form)
    assert ask("train", "--data-dir", folder, "--out", tmp_path / "run", *options).status == 0
    run = Run(tmp_path / "run")
    last = lines(tmp_path / "run", "watch")[-1]
    order_key, _ = random.split(random.split(random.key(0))[1]).unbind(0)
    index = fm.data.epoch_order(148, key=order_key, epoch=0)
    images, labels = part(mnist, 148, 8).train
    params = run.found.made.init(random.split(random.key(0))[0])
    velocity = tree.zeros_like(params)
    for rows in index.split(64)[:2]:
        loss = grad(lambda p, i, y: nn.functional.cross_entropy(run.found.made.outputs(p, i), y))
        velocity = tree.map(lambda v, g: 0.9 * v + g, velocity, loss(params, images[rows], labels[rows]))
        params = tree.map(lambda w, v: w - 0.01 * v, params, velocity)
    norms = run.sample_grads(restore.Point(2, params, None, 0.01), images[index[128:]], labels[index[128:]]).norm(dim=1)
    assert len(norms) == 20
    assert math.isclose(last["norms"]["mean"], norms.mean(), rel_tol=1e-3)
    assert math.isclose(last["norms"]["most"], norms.max(), rel_tol=1e-3)


def test_an_epoch_that_was_stopped_is_summed_up_whole(watched, data_dir, tmp_path, monkeypatch):
    run, options = tmp_path / "run", ("--watch", "noise-scale,norms", "--watch-every", "2")
    with monkeypatch.context() as patch:
        _Stop(patch, commands.callbacks.Reporter, "__call__", 5)
        ask("train", "--data-dir", data_dir, *LINEAR, "--out", run, *options)
    said = [
        line for line in succeed("train", "--resume", run).splitlines() if "of the epoch" in line or "Largest" in line
    ]
    assert said == [line for line in watched[1].splitlines() if "of the epoch" in line or "Largest" in line]


VALUED = (*LINEAR, "--hold-out", "40", "--watch", "value", "--schedule", "cosine")


@pytest.fixture(scope="module")
def valued(data_dir, tmp_path_factory):
    """A run whose images are valued at every step."""
    run = tmp_path_factory.mktemp("valued") / "run"
    return run, succeed("train", "--data-dir", data_dir, *VALUED, "--out", run)


def test_values_are_sums_over_the_watched_steps_and_written_with_a_picture(valued, mnist):
    run, out = valued
    found = table(run / "values.csv")
    train, index = part(mnist, TRAIN, TEST).train, found["index"].long()
    parts = commands.sources.divided(Run(run).found.options, part(mnist, TRAIN, TEST))
    assert torch.equal(train.images[index], parts.train.images)
    assert torch.equal(found["given_label"].long(), train.labels[index])
    assert (found["times"] == 2).all() and found["value"].all()
    assert png(run / "values.png")
    order = found["value"].argsort(stable=True)
    assert f"lowest{int(index[order[0]]):>8}" in out and f"highest{int(index[order[-1]]):>8}" in out
    assert not litter(run)


def test_the_first_value_of_an_image_is_the_definition(data_dir, mnist, tmp_path):
    options = ("--hold-out", "40", "--watch", "value", "--watch-every", "99", "--epochs", "1", "--model", "linear")
    succeed("train", "--data-dir", data_dir, *options, "--out", tmp_path / "run", "--batch-size", "32")
    run, found = Run(tmp_path / "run"), table(tmp_path / "run" / "values.csv")
    parts = commands.sources.divided(run.found.options, part(mnist, TRAIN, TEST))
    init_key, key = random.split(random.key(0)).unbind(0)
    start = restore.Point(0, run.found.made.init(init_key), None, 0.01)
    drawn = random.randint(random.fold_in(random.fold_in(key, 2), 0), (commands.build.VALUE_DRAW,), 0, 40)
    direction = run.sample_grads(start, *[rows[drawn] for rows in parts.held_out]).mean(0)
    index = fm.data.epoch_order(216, key=random.split(key)[0], epoch=0)[:BATCH]
    rows = run.sample_grads(start, *[rows[index] for rows in parts.train])
    torch.testing.assert_close(found["value"][index], 0.01 / BATCH * rows @ direction, rtol=1e-4, atol=1e-8)
    assert found["times"].sum() == BATCH
    assert torch.equal(found["value"] == 0, found["times"] == 0)


@pytest.mark.parametrize("at", [2, 8])
def test_values_of_a_run_that_stops_and_goes_on_are_the_same_bytes(at, valued, data_dir, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        _Stop(patch, commands.callbacks.Saver, "__call__", at)  # after the step is valued, before it is to be saved
        assert ask("train", "--data-dir", data_dir, *VALUED, "--out", run).status == 130
    assert (
        succeed("train", "--resume", run).split("Values of")[1].split("Written")[0]
        == (valued[1].split("Values of")[1].split("Written")[0])
    )
    assert (run / "values.csv").read_bytes() == (valued[0] / "values.csv").read_bytes()
    newest = [Run(one).points[-1] for one in (run, valued[0])]
    assert all(map(torch.equal, *[tree.leaves(one.params) for one in newest]))


@pytest.mark.parametrize(
    "left",
    ['{"config": 1}', "[" * 100_000, '{"estimates": {"12": [1, 2]}, "config": {}}', '{"estimates": [], "config": {}}'],
)
def test_what_is_left_of_a_noise_scale_and_damaged_is_dropped(left, linear, tmp_path):
    (tmp_path / ".partial.json").write_text(left)
    succeed("noise-scale", linear, "--out", tmp_path)
    assert len((tmp_path / "noise-scale.csv").read_text().splitlines()) == 4


def test_a_record_that_was_edited_by_hand_is_left_out(copy, tmp_path):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "watch", "step": 3, "epoch": 0, "trace": "abc"}\n')
    succeed("noise-scale", copy, "--out", tmp_path)


def test_the_noise_scale_of_a_run_is_that_of_its_records_and_of_its_checkpoints(watched, tmp_path):
    run, _ = watched
    out = succeed("noise-scale", run, "--windows", "2", "--out", tmp_path)
    with (tmp_path / "noise-scale.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["from"], row["first_step"], row["last_step"]) for row in rows] == [
        ("batches", "1", "7"), ("batches", "9", "15"),
        ("checkpoint", "12", "12"), ("checkpoint", "15", "15"), ("checkpoint", "16", "16"),
    ]  # fmt: skip
    records = lines(run, "watch")
    columns = torch.tensor([[row["trace"], row["square_norm"]] for row in records[:4]]).unbind(1)
    assert float(rows[0]["noise_scale"]) == statistics.mean_noise_scale(*columns).scale
    together = torch.tensor([[row["trace"], row["square_norm"]] for row in records]).unbind(1)
    assert f"Noise scale of the watched steps together: {statistics.mean_noise_scale(*together)}" in out
    assert "times the fewest steps" in out
    assert png(tmp_path / "noise-scale.png")
    assert not litter(tmp_path)


def test_the_noise_scale_at_a_checkpoint_is_that_of_its_gradients(linear, mnist, tmp_path):
    succeed("noise-scale", linear, "--images", "100", "--out", tmp_path)
    with (tmp_path / "noise-scale.csv").open() as file:
        rows = list(csv.DictReader(file))
    run, train = Run(linear), part(mnist, 100, TEST).train
    for row, point in zip(rows, run.points, strict=True):
        grads = run.sample_grads(point, *train).double()
        trace = grads.var(0).sum()
        assert math.isclose(float(row["trace"]), trace, rel_tol=1e-4)
        assert math.isclose(float(row["square_norm"]), grads.mean(0).square().sum() - trace / 100, rel_tol=1e-3)


def test_a_stopped_noise_scale_goes_on_at_the_next_checkpoint(linear, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _Stop(patch, noise_scale.statistics, "noise_scale", 3)
        said = complain(130, "noise-scale", linear, "--out", tmp_path)
    assert said == "Interrupted after 2 of 3 checkpoints. The same command resumes from there."
    counted = _Stop(monkeypatch, noise_scale.statistics, "noise_scale", -1)
    succeed("noise-scale", linear, "--out", tmp_path)
    assert counted.calls == 1
    assert not litter(tmp_path)


def test_a_gradient_lost_in_its_noise_is_reported_in_words():
    estimate = statistics.NoiseScale(math.inf, math.inf, 1.0, 0.1, -0.1, 0.1, 10)
    assert "lost in its noise" in noise_scale._advice(estimate, 64)


def test_estimates_that_disagree_are_reported_with_the_one_to_trust():
    def measured(first, last, square_norm, samples):
        estimate = statistics.NoiseScale(10 / square_norm, 1.0, 10.0, 0.5, square_norm, 0.1, samples)
        return noise_scale.Measured(first, last, estimate)

    batches = [measured(1, 9, 5.0, 9), measured(10, 20, 1.0, 11)]
    apart = noise_scale._trust(batches, measured(16, 16, 0.6, 4096))  # 0.4 is above 2 √2 x 0.1
    assert apart.startswith(
        "At step 16 16.67 ± 1 examples by the checkpoint, 10 ± 1 examples by the batches of steps 10 "
    )
    assert "Trust the checkpoint's for step 16" in apart and "4,096 independent examples" in apart
    assert "they agree" in noise_scale._trust(batches, measured(16, 16, 0.8, 4096))
    assert "they disagree" in noise_scale._trust(batches, measured(3, 3, 0.8, 4096))


# ---- refusals


EACH = {"scores": (), "mislabelled": (), "influence": ("--test", "1"), "store": (), "noise-scale": ()}


@pytest.mark.parametrize("command", EACH)
def test_what_is_no_run_is_told_in_one_line(command, tmp_path):
    assert complain(2, command, tmp_path, *EACH[command]).startswith(f"{tmp_path} holds no run.")


@pytest.mark.parametrize("command", EACH)
def test_a_run_without_a_checkpoint_is_told_in_one_line(command, copy):
    shutil.rmtree(copy / "checkpoints")
    assert "Has the run been started?" in complain(1, command, copy, *EACH[command])


@pytest.mark.parametrize("command", EACH)
def test_other_training_images_are_refused(command, linear, mnist, tmp_path):
    folder = write_idx(tmp_path / "data", part(mnist, 100, 8))
    said = complain(2, command, linear, *EACH[command], "--data-dir", folder)
    assert said.startswith("The run's 256 training images are needed. Found other 100.")


@pytest.mark.parametrize("command", EACH)
def test_a_run_of_another_model_is_told_in_one_line(command, copy, cnn):
    shutil.rmtree(copy / "checkpoints")
    shutil.copytree(cnn / "checkpoints", copy / "checkpoints")
    answer = ask(command, copy, *EACH[command], "--images", "64")
    assert answer.status == 2, answer
    said = "functorch-mnist: The run's config.json and its checkpoints must be of one run. Found different model"
    assert answer.err.startswith(said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("train", "--watch", ","), "--watch must name one of noise-scale, norms, value at least."),
        (("train", "--watch", "noise-scale", "--batch-size", "1"), "--watch noise-scale needs a --batch-size of 2"),
        (("mislabelled", "--top", "101"), "--top must be from 1 to 100"),
        (("scores", "--scores", "loss,grond"), "--scores must be of loss, el2n, grand, margin"),
        (("scores", "--scores", ","), "--scores must name one of"),
        (("scores", "--scores", "forgetting"), "The score forgetting needs two checkpoints at least."),
        (("scores", "--images", "0"), "--images must be at least 1"),
        (("scores", "--threads", "0"), "--threads must be from 1 to 1024"),
        (("influence", "--test", "64"), "--test must be below 64. Found 64."),
        (("influence", "--test=-1"), "--test must be a number from 0, or a range such as 0:100. Found -1."),
        (("influence", "--test", "3:3"), "--test must be a range with a test image in it. Found 3:3."),
        (
            ("influence", "--test", "0:3"),
            "A range of test images needs a --store. Make one with: functorch-mnist store",
        ),
        (("influence", "--test", "1", "--method", "inverse"), "--method inverse needs a --store."),
        (("store", "--features", "7"), "--features must be at least 8"),
        (("influence", "--test", "1", "--top", "0"), "--top must be from 1 to 100"),
        (("mislabelled", "--label-noise", "0"), "--label-noise must be above 0 and below 1"),
        (("mislabelled", "--label-noise", "1"), "--label-noise must be above 0 and below 1"),
        (("mislabelled", "--label-noise", "nan"), "--label-noise must be above 0 and below 1"),
        (("mislabelled", "--label-noise", "0.001"), "--label-noise must flip some of 256 labels"),
        (("mislabelled", "--seed", "-1"), "--seed must be at least 0"),
        (("noise-scale", "--images", "2"), "--images must be 3 at least"),
        (("noise-scale", "--windows", "0"), "--windows must be at least 1"),
        (("train", "--watch", "norm"), "--watch must be of noise-scale, norms, value. Found 'norm'."),
        (("train", "--watch", "value"), "--watch value needs held-out images. Found none. Set --hold-out"),
        (
            ("train", "--watch", "value,norms", "--hold-out", "9"),
            "--watch value makes steps of its own. Found value,norms",
        ),
        (("train", "--watch-every", "2"), "--watch-every has no effect without --watch."),
        (("train", "--watch", "norms", "--watch-every", "0"), "--watch-every must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_told_in_one_line_and_nothing_is_left(wrong, said, linear, data_dir, tmp_path):
    command, *rest = wrong
    out = ["--out", tmp_path / "out"]
    given = ["--data-dir", data_dir, *LINEAR, *out] if command == "train" else [linear, *out]
    assert complain(2, command, *given, *rest).startswith(said)
    assert not (tmp_path / "out").exists()


def test_a_missing_gpu_is_told_in_one_line(linear):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for command, rest in EACH.items():
        assert "Use --device cpu." in complain(2, command, linear, *rest, "--device", "cuda")


@pytest.mark.parametrize("command", EACH)
def test_a_folder_that_cannot_be_written_is_reported_before_the_work(command, linear, tmp_path):
    (tmp_path / "file").write_text("in the way")
    answer = ask(command, linear, *EACH[command], "--out", tmp_path / "file" / "out")
    assert (answer.status, answer.out) == (1, "")
    assert answer.err == f"functorch-mnist: Not a directory: {tmp_path / 'file' / 'out'}.\n"
