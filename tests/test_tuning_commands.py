"""The commands and options that look for better training: held-out images, remedies, --tune, sweep and compare."""

import csv
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shell import accuracy, ask, complain, succeed

import functorch_mnist as fm
from functorch_mnist import options, plots, sweep
from functorch_mnist.commands import build, runs, sources
from functorch_mnist.commands.runs import shortest

LINES = ("--model", "linear", "--batch-size", "32", "--hold-out", "64")
"""192 images are left to train on: six steps an epoch."""


def table(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def records(run, kind):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(run):
    (*_, newest) = sorted((run / "checkpoints").iterdir())
    return (newest / "state.safetensors").read_bytes()


# ---- train


def test_held_out_images_are_judged_after_each_epoch_and_not_trained_on(data_dir, tmp_path):
    out = succeed("train", "--data-dir", data_dir, *LINES, "--epochs", 3, "--out", tmp_path / "run")
    found = records(tmp_path / "run", "held-out")
    assert [(line["epoch"], line["step"], line["total"]) for line in found] == [(0, 6, 64), (1, 12, 64), (2, 18, 64)]
    for line in found:
        assert f"after epoch {line['epoch'] + 1}: {100 * line['correct'] / 64:.2f}%" in out


def test_patience_ends_the_run_and_tests_the_best_epoch(data_dir, tmp_path):
    run = tmp_path / "run"
    options = ("--data-dir", data_dir, *LINES, "--epochs", 40, "--patience", 2, "--lr", "0.01")
    out = succeed("train", *options, "--out", run)
    found = [line["correct"] for line in records(run, "held-out")]
    best = found.index(max(found))
    assert len(found) == best + 3 < 40
    assert f"Testing the parameters of epoch {best + 1}, the best on the held-out images." in out
    test = records(run, "test")[0]
    short = succeed("train", *options[:-4], "--lr", "0.01", "--epochs", best + 1, "--out", tmp_path / "short")
    assert accuracy(short) == f"Accuracy of the network on the 64 test images: {100 * test['correct'] / 64:.2f}%"
    assert accuracy(succeed("evaluate", run)) == accuracy(short)
    before = weights(run)
    again = succeed("train", "--resume", run)  # there is nothing more to do
    assert weights(run) == before
    assert accuracy(again) == accuracy(short)


def test_a_run_with_patience_goes_on_from_any_checkpoint_to_the_same_end(data_dir, tmp_path):
    shared = ("--data-dir", data_dir, *LINES, "--patience", 2, "--lr", "0.01", "--save-every", 4, "--keep", 99)
    succeed("train", *shared, "--epochs", 30, "--out", tmp_path / "whole")
    succeed("train", *shared, "--epochs", 2, "--out", tmp_path / "part")
    succeed("train", "--resume", tmp_path / "part", "--epochs", 30)
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    assert records(tmp_path / "part", "held-out") == records(tmp_path / "whole", "held-out")


REMEDIES = {
    "cut": ("--imbalance", "3=0.5,4=0.2"),
    "images": ("--train-size", "100"),
    "focal": ("--focal-gamma", "2"),
    "balanced weights": ("--class-weights", "balanced"),
    "effective weights": ("--class-weights", "effective"),
    "given weights": ("--class-weights", "1,1,1,1,1,1,1,1,2,2"),
    "weights of mse": ("--loss", "mse", "--class-weights", "balanced"),
    "logit adjustment": ("--logit-adjustment", "1"),
    "balanced draw": ("--sampler", "balanced"),
    "augment": ("--augment", "shift=2,rotate=10,scale=0.1,shear=0.1,elastic=1,erase=0.3"),
    "mixup": ("--mixup", "0.4"),
    "both": ("--mixup", "0.4", "--augment", "rotate=10"),
    "adam": ("--optimizer", "adam", "--lr", "0.001"),
    "adamw": ("--optimizer", "adamw", "--beta2", "0.99", "--weight-decay", "0.1"),
    "weight average": ("--swa-start", "0.5"),
    "average": ("--ema-decay", "0.9"),
    "deskew": ("--deskew",),
    "deskew and augment": ("--deskew", "--augment", "shift=1"),
}


@pytest.fixture(scope="module")
def plain(data_dir, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    succeed("train", "--data-dir", data_dir, *LINES, "--epochs", 2, "--out", run)
    return run


@pytest.mark.parametrize("name", REMEDIES)
def test_each_remedy_changes_the_run_and_goes_on_bit_equal(name, plain, data_dir, tmp_path, no_pictures):
    shared = ("--data-dir", data_dir, *LINES, *REMEDIES[name])
    succeed("train", *shared, "--epochs", 2, "--out", tmp_path / "whole")
    assert weights(tmp_path / "whole") != weights(plain)
    succeed("train", *shared, "--epochs", 1, "--out", tmp_path / "part")
    if name != "weight average":  # which begins at a part of all epochs
        succeed("train", "--resume", tmp_path / "part", "--epochs", 2)
        assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    out = succeed("evaluate", tmp_path / "whole")
    assert "Macro-F1: " in out
    assert out.splitlines()[0].startswith("Accuracy of the network on the 64 test images: ")
    assert "precision" in succeed("evaluate", tmp_path / "whole")
    kept = succeed("scores", tmp_path / "whole", "--scores", "el2n", "--out", tmp_path / "scores")
    images = {"cut": None, "images": 100}.get(name, 192)
    if images:
        assert f"{images}" in kept


@pytest.mark.usefixtures("traced")
def test_compiled_remedies_equal_eager_ones(data_dir, tmp_path):
    remedies = "--mixup 0.4 --augment shift=2 --class-weights balanced --logit-adjustment 1 --focal-gamma 1"
    shared = ("--data-dir", data_dir, *LINES, "--epochs", 1, *remedies.split(), "--swa-start", "0")
    found = []
    for compile in ("off", "on"):
        assert ask("train", *shared, "--compile", compile, "--out", tmp_path / compile).status == 0
        found.append(records(tmp_path / compile, "epoch")[0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_tuning_improves_a_bad_learning_rate_and_the_run_keeps_what_it_found(data_dir, tmp_path):
    run = tmp_path / "run"
    out = succeed(
        "train", "--data-dir", data_dir, *LINES, "--epochs", 2, "--lr", "1e-5", "--tune", "lr,momentum,weight-decay",
        "--tune-steps", 8, "--tune-rounds", 6, "--out", run,
    )  # fmt: skip
    rounds = [json.loads(line) for line in (run / "tuning.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["round"]) for record in rounds] == [("tune", n) for n in range(1, 7)]
    losses = [record["held_out_loss"] for record in rounds]
    for record in rounds:
        line = f"round {record['round']}: --lr {record['lr']:.4g}, --momentum {record['momentum']:.4g}, --weight-decay "
        assert f"{line}{record['weight_decay']:.4g}: held-out loss {record['held_out_loss']:.4f}, after " in out
    assert min(losses) < losses[0] - 0.01
    kept = json.loads((run / "config.json").read_text())
    assert kept["lr"] > 1e-4
    assert f"The best is --lr {kept['lr']:.4g}, --momentum {kept['momentum']:.4g}" in out
    again = succeed("train", "--resume", run, "--epochs", 3)
    assert "Tuning" not in again


MISTAKES = {
    ("--hold-out", "256"): "--hold-out must be below the 256 training images",
    ("--train-size", "300"): "--train-size must be at most 192",
    ("--imbalance", "8=2"): "--imbalance takes numbers from 0 to 1",
    ("--imbalance", "12=0.1"): "--imbalance takes each of 0, 1",
    ("--imbalance", "8"): "--imbalance takes numbers",
    ("--imbalance", ","): "must hold a NAME=NUMBER",
    ("--class-weights", "1,2"): "a number for each of 10 classes",
    ("--class-weights", "1,1,1,1,1,1,1,1,1,x"): "takes numbers",
    ("--augment", "twist=1"): "--augment takes each of shift, rotate",
    ("--augment", "shift=1,shift=2"): "once",
    ("--augment", "shift=-1"): "from 0 to 100",
    ("--augment", "shift=1", "--augment-multiplicity", "2"): "Leave one out",
    ("--augment", "shift=1", "--model", "scattering"): "computed once",
    ("--deskew", "--model", "scattering"): "--deskew has no effect",
    ("--mixup", "0.01"): "0 or from 0.05 to 100",
    ("--mixup", "0.4", "--loss", "mse"): "--loss cross-entropy",
    ("--focal-gamma", "2", "--loss", "mse"): "--focal-gamma",
    ("--focal-gamma", "2", "--label-smoothing", "0.1"): "no smoothed labels",
    (
        "--recipe",
        "best",
        "--compile",
        "off",
        "--augment-multiplicity",
        "2",
    ): "--augment-multiplicity is of shifted images. Found --augment",
    ("--tune", "momentum", "--momentum", "1"): "must be below 1",
    ("--tune", "lr", "--lr", "1e-50"): "1e-30 at least",
    ("--tune", "weight-decay", "--weight-decay", "1e-50"): "1e-30 at least",
    ("--tune", "momentum", "--momentum", "0", "--nesterov"): "nesterov needs momentum",
    ("--watch", "noise-scale", "--train-size", "1"): "two training images",
    ("--ema-decay", "0.9", "--swa-start", "0.5"): "two averages",
    ("--nesterov", "--optimizer", "adam"): "--nesterov",
    ("--beta2", "0.9"): "--beta2",
    ("--patience", "2", "--hold-out", "0"): "--patience needs held-out images",
    ("--tune", "lr", "--hold-out", "0"): "--tune needs held-out images",
    ("--tune", "dropout"): "--tune must be of lr, momentum, weight-decay",
    ("--tune", ","): "at least",
    ("--tune", "lr", "--lr", "0"): "1e-30 at least",
    ("--tune", "lr", "--sampler", "balanced"): "Leave one out",
    ("--tune-steps", "10"): "no effect without --tune",
    ("--private", "--epsilon", "3"): "--hold-out uses more of the images than private steps do",
    ("--private", "--epsilon", "3", "--hold-out", "0", "--sampler", "balanced"): "must not",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_before_anything_is_written(mistake, data_dir, tmp_path):
    run = tmp_path / "run"
    line = complain(2, "train", "--data-dir", data_dir, *LINES, "--epochs", "1", *mistake, "--out", run)
    assert MISTAKES[mistake] in line
    assert not run.exists()


# ---- sweep


SWEEP = ("--over", "lr=0.01,0.1", "--over", "label-smoothing=0,0.2", "--seeds", 2, "--epochs", 3)


@pytest.fixture(scope="module")
def swept(data_dir, tmp_path_factory):
    """A finished sweep of eight runs, four at once."""
    folder = tmp_path_factory.mktemp("sweep") / "found"
    out = succeed("sweep", "--data-dir", data_dir, *LINES, *SWEEP, "--vmapped-runs", 4, "--out", folder)
    return folder, out


def test_a_sweep_tells_its_best_settings_and_writes_a_row_for_each_run(swept):
    folder, out = swept
    rows = table(folder / "runs.csv")
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"finished"}
    means = {}
    for row in rows:
        means.setdefault((row["lr"], row["label_smoothing"]), []).append(float(row["held_out_accuracy"]))
    best = max(means, key=lambda name: sum(means[name]))
    first = out.splitlines()[
        out.splitlines().index(next(line for line in out.splitlines() if "held out, %" in line)) + 1
    ]
    assert (float(first.split()[0]), float(first.split()[1])) == tuple(map(float, best))
    assert f"{100 * sum(means[best]) / 2:.2f} ± " in first
    assert "Ensemble of the 2 models of the best setting" in out
    assert "Expected calibration error, temperature" in out
    for name in ("lr.png", "label-smoothing.png", "reliability.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_number_is_typed_so_that_it_is_read_back_and_no_longer(value):
    text = shortest(value)
    assert torch.tensor(float(text)).item() == value
    assert len(shortest(torch.tensor(0.03).item())) == 4


def test_a_run_of_a_sweep_is_that_of_train(swept, data_dir, tmp_path):
    row = table(swept[0] / "runs.csv")[-1]
    out = succeed(
        "train", "--data-dir", data_dir, *LINES, "--epochs", row["best_epoch"], "--lr", row["lr"], "--label-smoothing",
        row["label_smoothing"], "--seed", row["seed"], "--out", tmp_path / "run",
    )  # fmt: skip
    assert f"{100 * float(row['test_accuracy']):.2f}%" in accuracy(out)
    assert records(tmp_path / "run", "held-out")[-1]["correct"] == round(64 * float(row["held_out_accuracy"]))


def test_a_sweep_tests_the_average_where_one_is_kept(data_dir, tmp_path):
    shared = ("--data-dir", data_dir, *LINES, "--ema-decay", "0.9", "--epochs", 2)
    succeed("sweep", *shared, "--over", "lr=0.01", "--vmapped-runs", 2, "--out", tmp_path / "sweep")
    (row,) = table(tmp_path / "sweep" / "runs.csv")
    out = succeed("train", *shared, "--epochs", row["best_epoch"], "--out", tmp_path / "run")
    assert f"{100 * float(row['test_accuracy']):.2f}%" in accuracy(out)
    assert records(tmp_path / "run", "held-out")[-1]["correct"] == round(64 * float(row["held_out_accuracy"]))


def test_a_sweep_that_is_finished_tells_the_same_again_and_another_is_refused(swept, data_dir):
    folder, out = swept
    before = (folder / "runs.csv").read_bytes()
    again = succeed("sweep", "--data-dir", data_dir, *LINES, *SWEEP, "--out", folder)
    assert "Resuming after epoch 3." in again
    assert again.splitlines()[-1] == out.splitlines()[-1]
    assert (folder / "runs.csv").read_bytes() == before
    for other in (("--seed", 5), ("--halve-every", 1), ("--vmapped-runs", 2), ("--momentum", 0.5)):
        line = complain(2, "sweep", "--data-dir", data_dir, *LINES, *SWEEP, *other, "--out", folder)
        assert "another sweep" in line or "--vmapped-runs, which is 4" in line


def test_a_sweep_that_was_broken_off_goes_on_to_the_same_bits(swept, data_dir, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    command = ("sweep", "--data-dir", data_dir, *LINES, *SWEEP, "--vmapped-runs", 4, "--out", folder)
    made = sweep.VmappedStep.epoch_

    def broken(self, *arguments, epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return made(self, *arguments, epoch=epoch)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.VmappedStep, "epoch_", broken)
        line = complain(options.INTERRUPTED, *command)
    assert line == f"Interrupted after epoch 1 of 3. Resume with: functorch-mnist sweep --resume {folder}"
    assert "Resuming after epoch 1." in succeed(*command)
    assert (folder / "runs.csv").read_bytes() == (swept[0] / "runs.csv").read_bytes()


def test_the_best_run_of_a_sweep_is_evaluated_and_scored_by_the_sweeps_folder(swept, data_dir, tmp_path):
    folder, out = swept
    rows = table(folder / "runs.csv")
    place = max(range(8), key=lambda k: (rows[k]["setting"] == best_setting(rows), float(rows[k]["held_out_accuracy"])))
    row = rows[place]
    expected = f"Accuracy of the network on the 64 test images: {100 * float(row['test_accuracy']):.2f}%"
    assert succeed("evaluate", folder).splitlines()[0] == expected
    assert out.splitlines()[-1] == f"Try: functorch-mnist evaluate {folder}"
    kept = json.loads((folder / "best" / "config.json").read_text())
    assert (kept["lr"], kept["label_smoothing"], kept["seed"]) == (
        float(row["lr"]), float(row["label_smoothing"]), int(row["seed"]),
    )  # fmt: skip
    run = ("train", "--data-dir", data_dir, *LINES, "--lr", row["lr"], "--label-smoothing", row["label_smoothing"])
    succeed(*run, "--seed", row["seed"], "--epochs", 3, "--patience", 3, "--out", tmp_path / "run")
    assert [line["correct"] for line in records(tmp_path / "run", "held-out")] == [
        line["correct"] for line in records(folder / "best", "held-out")
    ]
    assert "Scoring 192 training images" in succeed("scores", folder, "--scores", "loss", "--out", tmp_path / "scores")
    assert "must hold a run. Found a sweep" in complain(2, "train", "--resume", folder)


def best_setting(rows):
    held_out = {}
    for row in rows:
        held_out.setdefault(row["setting"], []).append(float(row["held_out_accuracy"]))
    return max(held_out, key=lambda setting: sum(held_out[setting]))


def test_a_best_run_continues_as_a_run_of_train(swept, tmp_path):
    best = shutil.copytree(swept[0] / "best", tmp_path / "best")
    assert "after step 18" in succeed("train", "--resume", best, "--epochs", 4)
    assert [line["epoch"] for line in records(best, "held-out")] == [0, 1, 2, 3]


def test_a_sweep_is_resumed_by_its_folder_alone(swept):
    folder, out = swept
    again = succeed("sweep", "--resume", folder)
    assert "Resuming after epoch 3." in again
    assert again.splitlines()[-4:] == out.splitlines()[-4:]
    assert "must hold a compare. Found a sweep" in complain(2, "compare", "--resume", folder)


def test_a_sweep_without_a_best_run_says_how_to_resume_it(swept, tmp_path):
    (tmp_path / "config.json").write_bytes((swept[0] / "config.json").read_bytes())
    assert f"Try functorch-mnist sweep --resume {tmp_path}" in complain(2, "evaluate", tmp_path)


def test_failures_and_cuts_are_told_of(data_dir, tmp_path):
    out = succeed(
        "sweep", "--data-dir", data_dir, *LINES, "--over", "lr=0.00001,0.01,0.1,3e37", "--epochs", 6,
        "--halve-every", 2, "--out", tmp_path / "sweep", "--vmapped-runs", 1,
    )  # fmt: skip
    rows = table(tmp_path / "sweep" / "runs.csv")
    assert rows[3]["status"] == "failed"
    assert rows[3]["held_out_accuracy"] == ""
    assert int(rows[3]["failed_at_step"]) < 6
    assert "pruned" in {row["status"] for row in rows}
    assert f"Not finite after step {rows[3]['failed_at_step']}: lr 3e+37, seed 0" in out
    out = ask("sweep", "--data-dir", data_dir, *LINES, "--over", "lr=3e37", "--epochs", 1, "--out", tmp_path / "none")
    assert out.status == 1
    assert "No setting has made an epoch" in out.out


def test_a_setting_that_failed_after_a_good_epoch_is_not_the_best(data_dir, tmp_path):
    """Momentum makes the first epoch of one large step look fine; the second is not finite."""
    shared = ("--data-dir", data_dir, *LINES, "--batch-size", 192, "--epochs", 6, "--vmapped-runs", 2)
    out = succeed("sweep", *shared, "--over", "lr=0.0001,5e37", "--out", tmp_path / "sweep")
    rows = table(tmp_path / "sweep" / "runs.csv")
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert (rows[1]["best_epoch"] != "", rows[1]["held_out_accuracy"], rows[1]["test_accuracy"]) == (True, "", "")
    lines = out.splitlines()
    best = lines[lines.index(next(line for line in lines if "held out, %" in line)) + 1]
    assert float(best.split()[0]) == 1e-4
    names = ("--losses", "cross-entropy", "--optimizers", "momentum", "--schedules", "constant")
    answer = ask(
        "compare", *shared, *names, "--train-size", 192, "--seeds", 2, "--lrs", "5e37", "--out", tmp_path / "compare"
    )
    assert (answer.status, answer.err) == (1, "")
    assert answer.out.splitlines()[-1] == "Nothing has stayed finite with all seeds."


def test_a_comparison_that_was_broken_off_tells_its_own_folder(data_dir, tmp_path, monkeypatch):
    def broken(self, *arguments, epoch):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep.VmappedStep, "epoch_", broken)
    line = complain(
        options.INTERRUPTED,
        "compare",
        "--data-dir",
        data_dir,
        *LINES,
        "--train-size",
        100,
        "--out",
        tmp_path / "my runs",
    )
    assert (
        line
        == f"Interrupted after epoch 0 of 3. Resume with: functorch-mnist compare --resume '{tmp_path / 'my runs'}'"
    )


def test_a_sweep_goes_on_where_only_a_part_of_its_first_checkpoint_was_written(data_dir, tmp_path):
    (tmp_path / "sweep" / "checkpoints" / ".tmp-1").mkdir(parents=True)
    succeed(
        "sweep", "--data-dir", data_dir, *LINES, "--over", "lr=0.1", "--vmapped-runs", 2, "--out", tmp_path / "sweep"
    )


def test_tuning_is_refused_before_it_begins_where_the_folder_holds_a_run(plain, data_dir):
    line = complain(2, "train", "--data-dir", data_dir, *LINES, "--tune", "lr", "--out", plain)
    assert "holds a run already" in line


def test_ranges_are_drawn_from_and_clipped_and_noisy_steps_swept(data_dir, tmp_path):
    out = succeed(
        "sweep", "--data-dir", data_dir, *LINES, "--over", "clip-norm=0.1:10", "--over", "noise-multiplier=0.1,2",
        "--trials", 5, "--epochs", 1, "--vmapped-runs", 5, "--out", tmp_path / "sweep",
    )  # fmt: skip
    assert "not accounted for" in out
    rows = table(tmp_path / "sweep" / "runs.csv")
    assert len({row["clip_norm"] for row in rows}) == 5
    assert all(0.1 <= float(row["clip_norm"]) <= 10 and float(row["noise_multiplier"]) in (0.1, 2) for row in rows)
    one = succeed(
        "sweep", "--data-dir", data_dir, *LINES, "--over", f"clip-norm={rows[2]['clip_norm']}", "--over",
        f"noise-multiplier={rows[2]['noise_multiplier']}", "--epochs", 1, "--vmapped-runs", 2,
        "--out", tmp_path / "one",
    )  # fmt: skip
    assert "1 run: 1 setting, each with 1 seed." in one
    alone = table(tmp_path / "one" / "runs.csv")[0]
    assert float(alone["train_loss"]) == pytest.approx(float(rows[2]["train_loss"]), rel=1e-5)


def test_a_clipped_run_of_a_sweep_clips_and_adds_noise_as_it_says(mnist):
    given = options.Train(model="linear", hold_out=64, batch_size=8, lr=1.0, momentum=0.0)
    images, labels = (part[:200] for part in mnist.train)
    parts = sources.Parts(
        fm.data.Split(images, labels), fm.data.Split(images[:64], labels[:64]), mnist.test, 10, torch.arange(200)
    )
    program = runs.program(build.origin(given, parts), parts)

    def moved(noise, key):
        hyper = {"clip_norm": torch.tensor(1e-3), "noise_multiplier": torch.tensor(noise)}
        state = program.init(hyper, random_key(key))
        after, aux = program.step(
            hyper, state, images[:8], labels[:8], fm.random.split(fm.random.key(1), 8),
            mask=torch.ones(8, dtype=torch.bool), divisor=torch.tensor(8.0),
        )  # fmt: skip
        assert int(aux["clipped"]) == 8
        return fm.tree.norm(fm.tree.map(torch.sub, after.params, state.params)).item()

    random_key = fm.random.key
    assert moved(0.0, 0) <= 1e-3
    expected = 2.0 * 1e-3 / 8 * (28 * 28 * 10 + 10) ** 0.5
    assert moved(2.0, 0) == pytest.approx(expected, rel=0.05)


SWEEP_MISTAKES = {
    ("--over", "lr"): "NAME=VALUES",
    ("--over", "speed=1"): "--over takes each of lr, momentum",
    ("--over", "lr=0.1", "--over", "lr=0.2"): "once",
    ("--over", "lr="): "different numbers",
    ("--over", "lr=0.1,0.1"): "different numbers",
    ("--over", "lr=0.1,0.1000000001"): "different numbers of float32",
    ("--over", "momentum=0,0.9", "--trials", "5"): "--trials draws from a range",
    ("--over", "momentum=0,0.9", "--nesterov"): "--nesterov needs a momentum above 0",
    ("--over", "label-smoothing=0,0.1", "--focal-gamma", "1"): "without --focal-gamma",
    ("--over", "label-smoothing=0", "--loss", "mse"): "needs --loss cross-entropy",
    ("--over", "lr=0.1", "--seeds", "2", "--seed", str(2**63 - 1)): "below 2**63",
    ("--over", "lr=0.1:1"): "set --trials",
    ("--over", "lr=0:1", "--trials", "2"): "above 0",
    ("--over", "momentum=0.9:0.1", "--trials", "2"): "from low to high",
    ("--over", "momentum=1.5", "--optimizer", "adam"): "--momentum must be below 1",
    ("--over", "dropout=0.1"): "--dropout",
    ("--over", "clip-norm=0"): "above 0",
    ("--over", "lr=0.1", "--lr", "0.2"): "leave it out",
    ("--trials", "2"): "--trials draws from a range",
    ("--halve-keep", "0.3"): "no effect without --halve-every",
    ("--halve-every", "1", "--halve-keep", "1"): "above 0 and below 1",
    ("--seeds", "0"): "from 1 to 1000",
    ("--vmapped-runs", "many"): "--vmapped-runs must be auto",
    ("--vmapped-runs", "0"): "--vmapped-runs must be auto",
    ("--hold-out", "0"): "held-out images",
    ("--epochs", "0"): "--epochs must be at least 1",
    ("--sampler", "balanced"): "single runs",
    ("--tune", "lr"): "single runs",
    ("--private", "--epsilon", "1"): "single runs",
    ("--watch", "norms"): "single runs",
    ("--keep", "5"): "single runs",
}


@pytest.mark.parametrize("mistake", SWEEP_MISTAKES)
def test_a_mistake_in_a_sweep_is_told_in_one_line(mistake, data_dir, tmp_path):
    folder = tmp_path / "sweep"
    line = complain(2, "sweep", "--data-dir", data_dir, *LINES, *mistake, "--out", folder)
    assert SWEEP_MISTAKES[mistake] in line
    assert not folder.exists()


def test_a_folder_that_holds_something_else_is_left_as_it_is(data_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    line = complain(2, "sweep", "--data-dir", data_dir, *LINES, "--over", "lr=0.1", "--out", tmp_path)
    assert "must be empty or hold this sweep" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_picture_marks_stopped_runs_and_counts_the_error_bars_that_it_clips():
    _, axes = plots._subplots()
    axes.set_ylim(0, 100)
    points = [plots.Point(0.1, 50, 60), plots.Point(0.2, 90, 1, stopped=True), plots.Point(0.3, 99, 2)]
    note = plots._draw(axes, [plots.Band("one", points), plots.Band("empty", [])])
    assert note == "\n(2 error bars cut off at the edge)"
    (marked,) = [line for line in axes.get_lines() if line.get_label() == "stopped early"]
    assert (list(marked.get_xdata()), list(marked.get_ydata()), marked.get_marker()) == ([0.2], [90], "X")
    assert axes.get_ylim() == (0, 100)


# ---- compare


def test_a_comparison_tells_each_at_its_best_learning_rate(data_dir, tmp_path):
    shared = ("--data-dir", data_dir, "--model", "linear", "--batch-size", 32, "--hold-out", 64, "--train-size", 128)
    command = ("compare", *shared, "--epochs", 2, "--seeds", 2, "--lrs", "0.001,0.1", "--losses", "cross-entropy,mse",
               "--optimizers", "momentum,adam", "--schedules", "constant", "--out", tmp_path / "found")  # fmt: skip
    out = succeed(*command)
    rows = table(tmp_path / "found" / "compared.csv")
    assert len(rows) == 8
    for loss in ("cross-entropy", "mse"):
        for optimizer in ("momentum", "adam"):
            own = [row for row in rows if (row["loss"], row["optimizer"]) == (loss, optimizer)]
            best = max(own, key=lambda row: float(row["held_out_accuracy"]))
            line = next(line for line in out.splitlines() if line.startswith(f"{loss}, {optimizer}, constant  "))
            assert float(line[36:46]) == float(best["lr"])
            assert f"{100 * float(best['test_accuracy']):.2f} ± " in line
    assert (tmp_path / "found" / "compared.png").read_bytes().startswith(b"\x89PNG")
    assert succeed("evaluate", tmp_path / "found").startswith("Accuracy of the network on the 64 test images: ")
    assert succeed(*command).splitlines()[-6:] == out.splitlines()[-6:]  # from what is kept


@pytest.mark.parametrize(
    ("mistake", "fault"),
    [
        (("--optimizers", "lion"), "--optimizers must be of sgd"),
        (("--losses", ","), "at least"),
        (("--lrs", "0.1,0.1"), "different numbers"),
        (("--lrs", "x"), "takes numbers"),
        (("--lr", "0.3"), "Leave it out"),
        (("--optimizer", "adam"), "Leave it out"),
        (("--hold-out", "0"), "held-out"),
    ],
)
def test_a_mistake_in_a_comparison_is_told_in_one_line(mistake, fault, data_dir, tmp_path):
    line = complain(2, "compare", "--data-dir", data_dir, "--hold-out", 64, *mistake, "--out", tmp_path / "found")
    assert fault in line
    assert not (tmp_path / "found").exists()
