"""The command line: what it prints, which status it returns, and that no run is lost."""

import contextlib
import io
import itertools
import json
import math
import os
import pty
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shell import BATCH, CNN, LINEAR, TEST, TRAIN, accuracy, ask, complain, part, succeed, write_idx

import functorch_mnist as fm
from functorch_mnist import cli, commands, run_folder
from functorch_mnist.commands import callbacks, images


def checkpoints(run):
    return sorted((run / "checkpoints").iterdir())


def states(run):
    """The bytes of each checkpoint's state."""
    return {path.name: (path / "state.safetensors").read_bytes() for path in checkpoints(run)}


def records(run):
    """The metrics, apart from how long they took."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "examples_per_s"} for line in lines]


def ends_as(run, other):
    assert list(states(run)) == list(states(other))
    last = checkpoints(run)[-1].name
    assert states(run)[last] == states(other)[last]
    assert records(run) == records(other)
    return True


def holds_no_litter(run):
    names = [path.name for path in run.rglob("*")]
    return not [name for name in names if name.startswith(".") or "tmp" in name]


def edit(run, **changes):
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- options


COMMANDS = tuple(cli.opt.COMMANDS)


@pytest.mark.parametrize("command", [(), ("train",), ("sweep",)])
def test_help_answers_in_half_a_second_and_without_torch(command):
    code = f"import sys; from functorch_mnist.cli import main; status = main({[*command, '--help']}); "
    code += "print(status, 'torch' in sys.modules)"
    took = []
    for _ in range(3):  # processor time, the least of three: the machine may be busy with something else
        before = os.times()
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
        if took[-1] < 0.5:
            break
    assert min(took) < 0.5
    assert answer.stdout.startswith("usage: functorch-mnist")
    assert answer.stdout.endswith("0 False\n")


def test_the_command_and_the_module_are_one():
    (script,) = entry_points(group="console_scripts", name="functorch-mnist")
    assert script.load() is cli.main
    answer = subprocess.run([sys.executable, "-m", "functorch_mnist"], capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert all(name in answer.stderr for name in COMMANDS)
    assert "Traceback" not in answer.stderr


def test_the_help_lists_all_commands_in_the_order_of_use():
    out = succeed("--help")
    named = re.findall(r"^  ([a-z-]+)  +[A-Z]", out, re.MULTILINE)
    assert tuple(named) == COMMANDS == (
        "train", "evaluate", "predict", "scores", "mislabelled", "influence", "store", "noise-scale", "account",
        "sweep", "compare", "plan",
    )  # fmt: skip
    assert re.fullmatch(r"functorch-mnist \d.*\n", succeed("--version"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_all_of_its_options_by_topic(command):
    kind, _ = cli.opt.COMMANDS[command]
    out = succeed(command, "--help")
    for field in fields(kind):
        assert field.name == "training" or re.search(rf"^  (--{field.name.replace('_', '-')}\b|[A-Z]+ )", out, re.M)
    heads = [line[:-1] for line in out.splitlines() if re.fullmatch("[a-z]+:", line)]
    topics = ["arguments", "options", *cli.opt.TOPICS]
    assert heads == sorted(heads, key=topics.index)


def test_every_option_of_train_has_a_topic_and_sweeps_take_it_without_repeating_it():
    topics = {name for names in cli.opt.TOPICS.values() for name in names}
    assert {field.name for field in fields(cli.opt.Train)} <= topics
    for command in ("sweep", "compare"):
        out = succeed(command, "--help")
        assert "All options of train" in out and "--batch-size" not in out
    assert cli._parse(["sweep", "--over", "lr=0.1,1", "--batch-size", "7"]).training.batch_size == 7
    assert cli._parse(["compare", "--batch-size", "7"]).training == replace(cli.opt.COMPARED, batch_size=7)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("trian", "train"),
        ("noise_scale", "noise-scale"),
        ("train --bach-size 3", "--batch-size"),
        ("compare --shedules 3", "--schedules"),
        ("train --model scatering", "scattering"),
    ],
)
def test_a_typo_is_answered_in_one_line_with_the_nearest_name(typed, meant):
    assert f"Did you mean {meant}?" in complain(2, *typed.split())


def test_options_may_stand_before_and_between_image_files():
    options = cli._parse(["predict", "--device", "cpu", "run", "a.png", "--save-inputs", "there", "b.png"])
    assert (options.run, options.images) == (Path("run"), (Path("a.png"), Path("b.png")))


def test_a_sweep_of_one_run_is_refused():
    assert "--over" in complain(2, "sweep", "--seeds", "1")


@pytest.mark.parametrize(
    "arguments",
    [
        "trian",
        "train --epochs x",
        "train --epochs 1e3",
        "train --model resnet",
        "train --dropout 0.1",
        "train --resume",
        "train --no-such-option 1",
        "train stray",
        "train --device gpu",
        "evaluate",
        "predict",
        "predict run --test one",
        "influence run",
        "account --epsilon",
        "plan --model resnet",
    ],
)
def test_what_cannot_be_read_is_told_by_name_and_without_a_traceback(arguments):
    answer = ask(*arguments.split())
    assert answer.status == 2
    assert "Traceback" not in answer.err
    assert not answer.out
    assert any(word in answer.err for word in [*arguments.split()[-2:], "RUN", "--test"])
    assert len(answer.err.splitlines()) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        "--epochs -1",
        "--epochs 99999999999999999999",
        "--batch-size 0",
        "--batch-size 99999999999999999999",
        "--save-every 0",
        "--keep 0",
        "--threads 0",
        "--threads 99999",
        "--seed -1",
        "--seed 99999999999999999999",
        "--lr -1",
        "--lr nan",
        "--lr inf",
        "--lr 1e300",
        "--momentum nan",
        "--momentum -0.1",
        "--weight-decay inf",
        "--dampening nan",
        "--dampening 2",
        "--max-norm 0",
        "--max-norm nan",
        "--max-norm inf",
        "--label-smoothing 1.5",
        "--dropout 1.5 0.5",
        "--dropout 0.5 nan",
        "--warmup 0 --schedule one-cycle",
        "--warmup nan --schedule one-cycle",
        "--hidden 16 0 --model mlp",
        "--hidden 99999999999999999999 --model mlp",
    ],
)
def test_a_number_outside_its_range_is_told_in_one_line_before_anything_is_made(wrong, data_dir, tmp_path):
    line = complain(2, "train", "--data-dir", data_dir, "--out", tmp_path / "run", *wrong.split())
    assert line.startswith(wrong.split()[0] + " must be ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "useless",
    [
        "--hidden 64",
        "--dropout 0.1 0.1 --model mlp",
        "--activation tanh --model linear",
        "--label-smoothing 0.1 --loss mse",
        "--warmup 0.5",
    ],
)
def test_an_option_without_an_effect_is_refused(useless):
    assert complain(2, "train", *useless.split()).startswith(useless.split()[0] + " has no effect with ")


@pytest.mark.parametrize("wrong", ["--nesterov --momentum 0", "--nesterov --dampening 0.1"])
def test_options_that_do_not_go_together_are_told_in_one_line(wrong, data_dir, tmp_path):
    assert "nesterov" in complain(2, "train", "--data-dir", data_dir, "--out", tmp_path / "run", *wrong.split())
    assert not list(tmp_path.iterdir())


def test_a_recipe_sets_what_is_not_given():
    fast = cli.opt.RECIPES["fast"]
    assert cli._parse(["train", "--recipe", "fast"]) == fast
    assert cli._parse(["train", "--lr", "0.5", "--recipe=fast"]).lr == 0.5
    assert cli._parse(["train", "--lr", "0.5", "--recipe=fast"]).schedule == fast.schedule


@pytest.mark.parametrize(
    "options",
    [
        *cli.opt.RECIPES.values(),
        cli.opt.Train(data_dir=Path("a b"), dropout=(0.0, 0.1), max_norm=2.0, threads=3, nesterov=True),
        cli.opt.Train(out=Path("run"), resume=Path("run"), model="mlp", hidden=(), seed=2**63 - 1),
    ],
)
def test_options_come_back_from_json_as_they_were(options):
    assert cli.opt.from_json(json.loads(json.dumps(cli.opt.to_json(options), allow_nan=False))) == options


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_a_missing_gpu_is_told_in_one_line(command, linear, tmp_path):
    where = {"train": ["--out", tmp_path / "run"], "evaluate": [linear], "predict": [linear, "--test", "0"]}
    assert "Use --device cpu." in complain(2, command, *where[command], "--device", "cuda")
    assert not list(tmp_path.iterdir())


# ---- a run


def test_a_run_ends_with_the_articles_sentence(data_dir, tmp_path):
    out = succeed("train", "--data-dir", data_dir, *LINEAR, "--out", tmp_path / "run")
    assert re.fullmatch(r"Accuracy of the network on the 64 test images: \d+\.\d\d%", accuracy(out))


def test_a_run_says_first_what_it_trains_and_last_what_to_do_next(data_dir, tmp_path):
    run = tmp_path / "my run"
    first, second, *_ = out = succeed("train", "--data-dir", data_dir, *LINEAR, "--out", run).splitlines()
    assert first == f"Run folder: {run}"
    mean, deviation = fm.data.normalization(part(fm.data.load(), TRAIN, TEST).train.images)
    normalized = f"(pixel mean {mean:.4f}, deviation {deviation:.4f})"
    assert (
        second == f"Training linear: 7,850 parameters, 256 images of mnist {normalized}, on cpu in float32, 1 thread."
    )
    (newest,) = fm.checkpoint.steps(run / "checkpoints")[-1:]
    assert fm.checkpoint.read_manifest(newest)["config"]["normalization"] == [mean, deviation]
    quoted = f"'{run}'"
    assert out[out.index("Next:") + 1 :] == [
        f"  functorch-mnist evaluate {quoted}",
        f"  functorch-mnist predict {quoted} --test 0:10",
        f"  functorch-mnist scores {quoted}",
        f"  functorch-mnist train --resume {quoted} --epochs 4",
    ]
    for line in out[out.index("Next:") + 1 :]:
        assert cli._parse(shlex.split(line)[1:])


@pytest.mark.usefixtures("traced")
def test_a_compiled_run_says_that_it_compiles_and_how_long_it_took(data_dir, tmp_path):
    out = ask("train", "--data-dir", data_dir, *LINEAR, "--compile", "on", "--out", tmp_path / "run").out
    assert "Compiling the step, graph 1: this may take a minute." in out
    assert re.search(r"^Compiled in \d+\.\d s\.$", out, re.MULTILINE)


def test_the_throughput_is_of_the_time_without_compiling():
    progress = fm.train.Progress((), torch.tensor(1.0), 500, 0, 1, False, {})
    compiling = commands.waiting.Compiling("it", enabled=False)
    reporter = callbacks.Reporter(Path(), epochs=1, total=2, done=0, seen=0, compiling=compiling)
    reporter.since -= 10.0
    compiling.seconds = 9.0
    assert reporter._examples_per_second(progress) == pytest.approx(500, rel=0.02)


def test_long_preparations_say_what_they_are_and_how_long_they_took(capsys):
    parts = torch.arange(3000).split(1000)
    kept = list(commands.waiting.slowly(parts, "Deskewing", unit="images", of=1000))
    assert all(map(torch.equal, kept, parts))
    assert re.fullmatch(r"Deskewing: about 3,000 images\.\nDeskewing took 0\.\d s\.\n", capsys.readouterr().out)


def test_without_a_terminal_each_line_has_loss_and_examples_per_second(data_dir, tmp_path):
    out = succeed("train", "--data-dir", data_dir, *LINEAR, "--out", tmp_path / "run")
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2
    for epoch, line in enumerate(lines, start=1):
        assert re.fullmatch(rf"epoch {epoch}/2  step {8 * epoch}/16  mean loss \d\.\d{{4}}  [\d,]+ examples/s", line), (
            line
        )


def test_on_a_terminal_of_80_columns_a_bar_has_loss_and_examples_per_second(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    controller, terminal = pty.openpty()
    shown = bytearray()

    def watch():
        with contextlib.suppress(OSError):  # the terminal is closed
            while data := os.read(controller, 1024):
                shown.extend(data)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out = io.StringIO()
    with open(terminal, "w") as screen, contextlib.redirect_stderr(screen), contextlib.redirect_stdout(out):
        assert cli.main(["train", "--data-dir", str(data_dir), *LINEAR, "--out", str(tmp_path / "run")]) == 0
    watcher.join()
    os.close(controller)
    assert re.search(r"epoch 2/2: 100%\|.*\| 16/16 \[.*, loss \d\.\d{4}, [\d,]+ examples/s\]", shown.decode())
    assert "examples/s" not in out.getvalue()
    assert "Accuracy of the network" in out.getvalue()


def test_a_run_folder_holds_its_options_its_metrics_and_the_newest_checkpoints(linear, data_dir):
    assert {path.name for path in linear.iterdir()} == {"config.json", "metrics.jsonl", "checkpoints"}
    config = json.loads((linear / "config.json").read_text())
    assert (config["model"], config["batch_size"], config["data_dir"]) == ("linear", BATCH, str(data_dir))
    assert [path.name for path in checkpoints(linear)] == ["step-00000012", "step-00000015", "step-00000016"]
    first, second, test = records(linear)
    assert (first["kind"], first["epoch"], first["step"]) == ("epoch", 0, 8)
    assert (second["kind"], second["epoch"], second["step"]) == ("epoch", 1, 16)
    assert (test["kind"], test["step"], test["total"]) == ("test", 16, TEST)
    assert second["loss"] < first["loss"]


def test_metrics_come_every_hundred_steps_too(data_dir, tmp_path):
    succeed("train", "--data-dir", data_dir, "--model", "linear", "--batch-size", "1", "--out", tmp_path / "run")
    assert [(r["kind"], r["step"]) for r in records(tmp_path / "run")] == [
        ("step", 100),
        ("step", 200),
        ("epoch", 256),
        ("test", 256),
    ]


@pytest.mark.parametrize(
    "options",
    [
        "--model linear --schedule cosine --loss mse",
        "--model mlp --hidden --schedule step-decay --activation tanh",
        "--model mlp --hidden 32 16 --schedule one-cycle --warmup 0.5 --activation sigmoid --nesterov",
        "--model mlp --precision bfloat16 --max-norm 1 --weight-decay 0.001 --label-smoothing 0.1 --dampening 0.1",
        "--model cnn --batch-size 128 --recipe fast --epochs 1 --dropout 0 0",
        "--model linear --epochs 0",
    ],
)
def test_a_run_of_any_options_ends_and_can_be_evaluated(options, data_dir, tmp_path):
    trained = succeed("train", "--data-dir", data_dir, "--out", tmp_path / "run", *options.split())
    evaluated = succeed("evaluate", tmp_path / "run")
    assert accuracy(evaluated) == accuracy(trained)


def test_a_batch_larger_than_the_data_is_all_of_the_data(data_dir, tmp_path):
    for size in (TRAIN, 10**9):
        out = ("--batch-size", size, "--out", tmp_path / str(size))
        succeed("train", "--data-dir", data_dir, "--model", "linear", *out)
    assert ends_as(tmp_path / str(10**9), tmp_path / str(TRAIN))


def test_a_compiled_batch_is_not_padded_beyond_the_data(data_dir, tmp_path, monkeypatch):
    def compiled(step):
        return lambda state, images, *rest, **options: (
            sizes.append(len(images)) or step(state, images, *rest, **options)
        )

    sizes = []
    monkeypatch.setattr(fm.train, "compiled", compiled)
    options = ("--model", "linear", "--compile", "on", "--batch-size", 1000)
    succeed("train", "--data-dir", data_dir, *options, "--out", tmp_path / "run")
    assert sizes == [TRAIN]


def test_a_compiled_run_sees_every_example_once(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(fm.train, "compiled", lambda step: step)  # what is compiled pads the last batch
    for compiled in ("on", "off"):
        out = ("--batch-size", "100", "--compile", compiled, "--out", tmp_path / compiled)
        succeed("train", "--data-dir", data_dir, "--model", "linear", *out)
    on, off = (load_file(checkpoints(tmp_path / name)[-1] / "state.safetensors") for name in ("on", "off"))
    for name in on:
        torch.testing.assert_close(on[name], off[name], rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("taken", ["config.json", "metrics.jsonl", "checkpoints"])
def test_a_folder_with_any_part_of_a_run_is_not_taken_for_another(taken, copy, data_dir):
    for path in copy.iterdir():
        if path.name != taken:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = sorted(copy.rglob("*"))
    assert "--resume" in complain(2, "train", "--data-dir", data_dir, *LINEAR, "--out", copy)
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_made_is_told_in_one_line(out, data_dir, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert out in complain(1, "train", "--data-dir", data_dir, *LINEAR, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("fault", ["missing", "empty", "cut", "blank", "a file"])
def test_unusable_data_are_told_in_one_line_before_a_run_is_made(fault, mnist, data_dir, tmp_path):
    data = tmp_path / "data"
    if fault == "empty":
        data.mkdir()
    elif fault == "cut":
        shutil.copytree(data_dir, data)
        (data / "train-images-idx3-ubyte").write_bytes((data / "train-images-idx3-ubyte").read_bytes()[:1000])
    elif fault == "blank":
        split = fm.data.Split(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.arange(4))
        write_idx(data, fm.data.Dataset(split, split, 10))
    elif fault == "a file":
        data.write_text("no folder")
    complain(2 if fault == "blank" else 1, "train", "--data-dir", data, *LINEAR, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", ["--model linear --lr 9e37", "--model mlp --lr 1e30", "--model cnn --lr 1e6", "--momentum 9e37"]
)
def test_a_run_that_diverges_ends_in_one_line_and_saves_no_nan(options, data_dir, tmp_path):
    line = complain(1, "train", "--data-dir", data_dir, "--out", tmp_path / "run", *options.split())
    assert "must be finite" in line
    assert "--lr" in line
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_parameters_that_diverge_after_the_last_loss_are_not_saved(data_dir, tmp_path):
    options = ("--model", "linear", "--lr", "9e37", "--momentum", "9e37", "--batch-size", TRAIN, "--loss", "mse")
    line = complain(1, "train", "--data-dir", data_dir, *options, "--epochs", "2", "--out", tmp_path / "run")
    assert line.startswith("Loss and parameters after step 2 must be finite")


def test_a_model_without_memory_is_told_in_one_line(data_dir, tmp_path, monkeypatch):
    def uniform(*_):
        raise RuntimeError("can't allocate memory\nadvice for developers")

    monkeypatch.setattr(fm.random, "uniform", uniform)
    line = complain(2, "train", "--data-dir", data_dir, *LINEAR, "--out", tmp_path / "run")
    assert line == "The model must fit in memory. Found: can't allocate memory"
    assert not list(tmp_path.iterdir())


def test_a_first_step_that_cannot_be_made_is_told_in_one_line(data_dir, tmp_path, monkeypatch):
    def step(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: no working C++ compiler\nadvice for developers")

    monkeypatch.setattr(fm.train, "compiled", lambda _: step)
    line = complain(2, "train", "--data-dir", data_dir, *LINEAR, "--compile", "on", "--out", tmp_path / "run")
    assert "no working C++ compiler. " in line


def test_a_path_that_is_no_text_is_printed(data_dir, tmp_path):
    out = succeed("train", "--data-dir", data_dir, *LINEAR, "--out", os.fsdecode(bytes(tmp_path) + b"/\xff"))
    assert r"\udcff" in out


# ---- going on


def test_a_finished_run_goes_on_to_the_same_end(copy, linear):
    assert succeed("train", "--resume", copy).splitlines()[0] == "Resuming after step 16."
    assert ends_as(copy, linear)


def test_more_epochs_end_as_if_they_had_been_asked_for_at_first(copy, data_dir, tmp_path):
    assert "epoch 3/3" in succeed("train", "--resume", copy, "--epochs", "3")
    succeed("train", "--data-dir", data_dir, *LINEAR, "--epochs", "3", "--out", tmp_path / "whole")
    assert states(copy)["step-00000024"] == states(tmp_path / "whole")["step-00000024"]
    assert records(copy) == records(tmp_path / "whole")
    assert run_folder.read_config(copy).epochs == 3


def test_fewer_epochs_than_a_run_has_made_are_refused(copy, linear):
    assert complain(2, "train", "--resume", copy, "--epochs", "1").startswith("--epochs must not be fewer")
    assert ends_as(copy, linear)
    assert run_folder.read_config(copy).epochs == 2


@pytest.mark.parametrize(
    "change",
    ["--lr 0.5", "--seed 1", "--model mlp", "--batch-size 16", "--recipe fast", "--out elsewhere", "--schedule cosine"],
)
def test_an_option_that_makes_another_run_is_refused(change, copy, linear):
    line = complain(2, "train", "--resume", copy, *change.split())
    assert line.startswith(f"A resumed run keeps its {change.split()[0]}, which is ")
    assert ends_as(copy, linear)


def test_data_may_move_but_not_change(copy, linear, data_dir, mnist, tmp_path):
    write_idx(tmp_path / "other", part(mnist, 2 * TRAIN, TEST))
    assert "Is --data-dir the right one?" in complain(2, "train", "--resume", copy, "--data-dir", tmp_path / "other")
    moved = shutil.copytree(data_dir, tmp_path / "moved")
    succeed("train", "--resume", copy, "--data-dir", moved)
    assert ends_as(copy, linear)
    assert run_folder.read_config(copy).data_dir == moved


def test_a_run_goes_on_from_another_working_folder(data_dir, tmp_path, monkeypatch, linear):
    monkeypatch.chdir(data_dir.parent)
    succeed("train", "--data-dir", data_dir.name, *LINEAR, "--epochs", "1", "--out", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    succeed("train", "--resume", "run", "--epochs", "2")
    assert ends_as(tmp_path / "run", linear)
    succeed("predict", "run", "--test", "0")


def test_of_two_resumes_the_last_counts(copy, linear):
    succeed("train", "--resume", "nowhere", "--resume", copy)
    assert ends_as(copy, linear)


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff" * 1000])
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_bit_equal(file, damage, copy, linear):
    (checkpoints(copy)[-1] / file).write_bytes(damage)
    for command in (("evaluate", copy), ("predict", copy, "--test", "0:2"), ("train", "--resume", copy)):
        first, *_ = succeed(*command).splitlines()
        assert first.startswith("Passed over a damaged checkpoint: ")
        assert f"step-00000016/{file}" in first
    assert ends_as(copy, linear)


@pytest.mark.parametrize("file", ["state.safetensors", "manifest.json"])
def test_a_run_whose_checkpoints_are_all_damaged_is_told_in_one_line_and_left_as_it_is(file, copy):
    for path in checkpoints(copy):
        (path / file).write_bytes(b"{")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for command in (("evaluate", copy), ("predict", copy, "--test", "0:2"), ("train", "--resume", copy)):
        assert file in complain(1, *command)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_something_else_is_told_in_one_line(copy):
    shutil.rmtree(copy / "checkpoints")
    fm.checkpoint.save(copy / "checkpoints", {"w": torch.zeros(3)}, step=5, config={"options": [1], "normalization": 3})
    for command in (("evaluate", copy), ("train", "--resume", copy)):
        assert "what the run began with" in complain(2, *command)


def test_a_saved_nan_is_told_in_one_line(copy):
    path = checkpoints(copy)[-1]
    template = fm.checkpoint.load(path, _template(copy))
    template.state.state.params["0.bias"].fill_(math.nan)
    fm.checkpoint.save(path.parent, template.state, step=template.step, config=template.config)
    for command in (("evaluate", copy), ("predict", copy, "--test", "0:2")):
        assert "must be finite" in complain(1, *command)


def _template(run):
    begun = commands.restore.newest_origin(run)
    cpu = torch.device("cpu")
    optimizer = commands.build.optimizer(begun.options, 8)
    return commands.build.start(begun.options, commands.build.classifier(begun), optimizer, cpu)


@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a file", "a data folder", "checkpoints only"])
@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_what_is_no_run_is_told_in_one_line(kind, command, data_dir, copy, tmp_path):
    where = tmp_path / "there"
    if kind == "an empty folder":
        where.mkdir()
    elif kind == "a file":
        where.write_text("hello")
    elif kind == "a data folder":
        where = data_dir
    elif kind == "checkpoints only":
        (copy / "config.json").unlink()
        where = copy
    arguments = {"train": ["--resume", where], "evaluate": [where], "predict": [where, "--test", "0"]}
    assert complain(2, command, *arguments[command]).startswith(f"{where} holds no run.")


def test_a_run_without_a_checkpoint_starts_from_the_beginning(copy, linear):
    shutil.rmtree(copy / "checkpoints")
    assert "Has the run been started?" in complain(1, "evaluate", copy)
    assert "starting from the beginning" in succeed("train", "--resume", copy)
    assert ends_as(copy, linear)


@pytest.mark.parametrize("rest", ['{"kind": "epo', "garbage\n", "\x00\n", "[1]\n", '{"step": 1.5}\n', "[" * 10**5, "é"])
def test_metrics_with_a_line_that_is_none_lose_that_line_only(rest, copy, linear):
    with (copy / "metrics.jsonl").open("a", encoding="latin-1") as file:
        file.write(rest)
    succeed("train", "--resume", copy)
    assert ends_as(copy, linear)


def test_the_rate_after_a_resume_counts_only_the_examples_seen_since(copy, monkeypatch):
    for path in checkpoints(copy)[1:]:
        shutil.rmtree(path)
    seconds = itertools.count()
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: next(seconds))
    assert "Resuming after step 12." in succeed("train", "--resume", copy)
    epoch, _ = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()][1:]
    assert (epoch["step"], epoch["examples_per_s"]) == (16, 4 * BATCH)


# ---- an edited config.json


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": math.inf},
        {"lr": math.nan},
        {"lr": 10**400},
        {"lr": True},
        {"lr": "0.1"},
        {"hidden": [1.5]},
        {"hidden": 5},
        {"hidden": [[1]]},
        {"dropout": [0.1]},
        {"dropout": [0.1, 0.2, 0.3]},
        {"model": {}},
        {"compile": ["on"]},
        {"epochs": None},
        {"batch_size": 0},
        {"nesterov": 1},
        {"data_dir": 3},
        {"threads": 10**9},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_hostile_config_is_told_in_one_line(changes, copy):
    edit(copy, **changes)
    (name,) = changes
    for command in (("evaluate", copy), ("train", "--resume", copy)):
        assert name.replace("_", "-") in complain(2, *command).replace("_", "-")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"[" * 10**5, b"{", b"9" * 5000, b" " * 2**20 + b"{}", b"{}"])
def test_a_damaged_config_is_told_in_one_line(text, copy):
    (copy / "config.json").write_bytes(text)
    for command in (("evaluate", copy), ("train", "--resume", copy)):
        complain(2, *command)


def test_a_config_that_is_no_file_is_not_waited_for(copy):
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")
    assert "holds no run" in complain(2, "evaluate", copy)


def test_an_edited_config_cannot_make_a_run_another_one(copy, linear):
    edit(copy, lr=0.5)
    assert complain(2, "train", "--resume", copy) == "A resumed run keeps its --lr, which is 0.01. Found 0.5."
    assert succeed("evaluate", copy) == succeed("evaluate", linear)


# ---- stops


class _Moment:
    """Calls a function just before another has been called for the nth time."""

    def __init__(self, monkeypatch, owner, name, n, act):
        self.function, self.left, self.act = getattr(owner, name), n, act
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            self.act()
        return self.function(*args, **kwargs)


MOMENTS = {
    "before the first step": (fm.train, "fit", 1),
    "in the middle of a step": (fm.losses, "cross_entropy", 11),
    "before a record": (run_folder, "append_metrics", 1),
    "before a checkpoint": (fm.checkpoint, "save", 2),
    "while a checkpoint is written": (os, "rename", 2),
    "before the last checkpoint": (fm.checkpoint, "save", 6),
    "in the evaluation": (fm.train, "evaluate", 1),
    "before the last record": (run_folder, "append_metrics", 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_at_any_moment_leaves_a_checkpoint_that_goes_on_bit_equal(
    moment, number, data_dir, linear, tmp_path, monkeypatch
):
    run = tmp_path / "my run"
    owner, name, n = MOMENTS[moment]
    with monkeypatch.context() as patch:
        _Moment(patch, owner, name, n, lambda: signal.raise_signal(number))
        answer = ask("train", "--data-dir", data_dir, *LINEAR, "--out", run)
    assert answer.status == 130
    told = re.fullmatch(
        r"functorch-mnist: Interrupted after step (\d+)\. Resume with: functorch-mnist train --resume '(.*)'\n",
        answer.err,
    )
    assert told, answer
    assert told[2] == str(run)
    assert int(told[1]) == int(checkpoints(run)[-1].name.removeprefix("step-"))
    assert holds_no_litter(run)
    assert f"Resuming after step {told[1]}." in succeed("train", "--resume", run)
    assert states(run)["step-00000016"] == states(linear)["step-00000016"]
    assert records(run) == records(linear)


def test_a_second_ctrl_c_does_not_break_off_the_save_of_the_first(data_dir, tmp_path, monkeypatch):
    stop = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with monkeypatch.context() as patch:
        _Moment(patch, fm.losses, "cross_entropy", 3, stop)
        _Moment(patch, fm.checkpoint, "save", 1, stop)
        answer = ask("train", "--data-dir", data_dir, *LINEAR, "--out", tmp_path / "run")
    assert answer.status == 130
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]


@pytest.mark.parametrize(("owner", "name"), [(fm.data, "load"), (run_folder, "create")])
def test_ctrl_c_before_a_run_is_there_is_told_in_one_line(owner, name, data_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _Moment(patch, owner, name, 1, lambda: signal.raise_signal(signal.SIGINT))
        assert complain(130, "train", "--data-dir", data_dir, *LINEAR, "--out", tmp_path / "run") == "Interrupted."
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_torch_is_imported_waits_for_its_end(linear):
    code = """
import signal, sys
from functorch_mnist.cli import main

class CtrlC:
    def find_spec(self, name, *_):
        if "torch" in sys.modules:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
print(main(["evaluate", sys.argv[1]]), "functorch_mnist.commands.train" in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", code, linear], capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == ("130 True\n", "functorch-mnist: Interrupted.\n")


def test_ctrl_c_in_another_command_is_told_in_one_line(linear, monkeypatch):
    _Moment(monkeypatch, fm.train, "predictions", 1, lambda: signal.raise_signal(signal.SIGINT))
    assert complain(130, "predict", linear, "--test", "0") == "Interrupted."


def test_a_real_ctrl_c_ends_the_process_with_130_and_a_second_changes_nothing(data_dir, tmp_path):
    run = tmp_path / "run"
    process = start(data_dir, tmp_path, "--model", "linear", "--epochs", "100000", "--out", run)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(r"functorch-mnist: Interrupted after step \d+\. Resume with: .*\n", err)
    assert succeed("evaluate", run)


def start(data_dir, folder, *options):
    """A train command in a process of its own."""
    command = [sys.executable, "-m", "functorch_mnist", "train", *map(str, options)]
    if "--resume" not in options:
        command += ["--data-dir", str(data_dir)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(condition, process):
    """Waits for it, closely."""
    end = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end


def test_a_run_that_is_killed_again_and_again_ends_bit_equal(cnn, data_dir, tmp_path):
    run = tmp_path / "run"
    folder = run / "checkpoints"
    before = set()
    moments = [
        lambda: (folder / "step-00000003").exists(),
        lambda: {path.name for path in folder.iterdir() if path.name.startswith(".tmp-")} - before,  # in a save
        lambda: (folder / "step-00000012").exists(),
    ]
    options = [*CNN, "--out", run]
    chance = random.Random(0)
    for number, moment in enumerate(moments):
        before |= {path.name for path in folder.iterdir()} if number else set()
        process = start(data_dir, tmp_path, *options)
        until(moment, process)
        time.sleep(chance.uniform(0, 0.1) * (number != 1))
        process.kill()
        process.communicate()
        options = ["--resume", run]
    succeed("train", "--resume", run)
    assert ends_as(run, cnn)
    assert holds_no_litter(run)


# ---- where nothing can be written


@contextlib.contextmanager
def no_file_larger_than(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(copy, data_dir, tmp_path):
    before = states(copy)
    with no_file_larger_than(10_000):  # enough for anything but a checkpoint
        line = complain(1, "train", "--resume", copy, "--epochs", "3")
    assert "step-00000018: cannot be saved" in line
    assert states(copy) == before
    assert holds_no_litter(copy)
    succeed("train", "--resume", copy, "--epochs", "3")
    succeed("train", "--data-dir", data_dir, *LINEAR, "--epochs", "3", "--out", tmp_path / "whole")
    assert ends_as(copy, tmp_path / "whole")


def test_a_disk_too_full_for_a_line_of_metrics_loses_nothing(copy, data_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        _Moment(patch, run_folder, "append_metrics", 1, _full_disk)
        assert complain(1, "train", "--resume", copy, "--epochs", "3") == "No space left on device."
    assert checkpoints(copy)[-1].name == "step-00000023"  # the step before
    succeed("train", "--resume", copy, "--epochs", "3")
    succeed("train", "--data-dir", data_dir, *LINEAR, "--epochs", "3", "--out", tmp_path / "whole")
    assert records(copy) == records(tmp_path / "whole")


def _full_disk():
    raise OSError(28, os.strerror(28))


def test_output_onto_a_full_disk_is_told_in_one_line_and_loses_nothing(data_dir, linear, tmp_path):
    err = io.StringIO()
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full), contextlib.redirect_stderr(err):
        assert cli.main(["evaluate", str(linear)]) == 1
    assert err.getvalue() == "functorch-mnist: No space left on device.\n"


def test_output_that_nobody_reads_ends_a_run_quietly_and_loses_nothing(data_dir, linear, tmp_path):
    run, err = tmp_path / "run", io.StringIO()
    read, write = os.pipe()
    with open(write, "w") as pipe, contextlib.redirect_stdout(pipe), contextlib.redirect_stderr(err):
        threading.Thread(target=lambda: (_read_until(read, b"epoch 2/"), os.close(read))).start()  # as head does
        until_closed = ["train", "--data-dir", str(data_dir), *LINEAR, "--out", str(run), "--epochs", "1000"]
        assert cli.main(until_closed) == 1
    assert not err.getvalue()
    assert holds_no_litter(run)
    assert checkpoints(run)
    assert succeed("evaluate", run)


def _read_until(file, text):
    seen = b""
    while text not in seen:
        seen += os.read(file, 1000)


def test_closed_streams_are_no_fault(copy, linear, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert cli.main(["train", "--resume", str(copy)]) == 0
        assert cli.main(["evaluate", "nowhere"]) == 2
        sys.stdout.close()
        sys.stderr.close()
    assert ends_as(copy, linear)


# ---- evaluate


def table(out):
    """The confusion matrix, and recall, precision and F1 of each class, that `evaluate` printed."""
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d ", line)]
    return torch.tensor([[int(n) for n in row[1:-3]] for row in rows]), *zip(*[row[-3:] for row in rows], strict=True)


def test_evaluate_prints_accuracy_recall_and_the_confusion_matrix(linear, mnist):
    out = succeed("evaluate", linear)
    params = load_file(checkpoints(linear)[-1] / "state.safetensors")
    weight, bias = params["state/params/0.weight"], params["state/params/0.bias"]
    mean, deviation = fm.data.normalization(mnist.train.images[:TRAIN])
    counts = torch.zeros(10, 10, dtype=torch.int64)
    for image, label in zip(mnist.test.images[:TEST], mnist.test.labels[:TEST], strict=True):
        predicted = (weight @ ((image.flatten() / 255 - mean) / deviation) + bias).argmax()
        counts[label, predicted] += 1
    confusion, recalls, precisions, scores = table(out)
    assert torch.equal(confusion, counts)
    correct = int(counts.diagonal().sum())
    assert out.startswith(f"Accuracy of the network on the 64 test images: {100 * correct / TEST:.2f}%\n")
    for row, recall in enumerate(recalls):
        assert recall == f"{100 * counts[row, row] / counts[row].sum():.2f}%"
        assert precisions[row] == f"{100 * counts[row, row] / counts[:, row].sum().clamp(min=1):.2f}%"
    harmonic = [2 * counts[k, k].item() / (counts[k].sum() + counts[:, k].sum()).item() for k in range(10)]
    assert list(scores) == [f"{one:.4f}" for one in harmonic]
    assert f"Macro-F1: {sum(harmonic) / 10:.4f}, " in out
    assert succeed("evaluate", linear, "--batch-size", "7") == out
    assert succeed("evaluate", linear, "--batch-size", 10**30) == out


def test_a_class_without_images_has_no_recall(linear, mnist, tmp_path):
    sevens = mnist.test.labels == 7
    split = fm.data.Split(mnist.test.images[sevens][:20], mnist.test.labels[sevens][:20])
    write_idx(tmp_path / "sevens", fm.data.Dataset(split, split, 10))
    out = succeed("evaluate", linear, "--data-dir", tmp_path / "sevens")
    confusion, recalls, _, _ = table(out)
    assert int(confusion[7].sum()) == int(confusion.sum()) == 20
    assert [recall == "none" for recall in recalls] == [row != 7 for row in range(10)]


def test_another_data_set_is_normalized_as_the_training_images_were(linear, data_dir, mnist, tmp_path):
    inverted = fm.data.Split(255 - mnist.train.images[:TRAIN], mnist.train.labels[:TRAIN])
    test = fm.data.Split(mnist.test.images[:TEST], mnist.test.labels[:TEST])
    write_idx(tmp_path / "other", fm.data.Dataset(inverted, test, 10))
    out = succeed("evaluate", linear, "--dataset", "kmnist", "--data-dir", tmp_path / "other")
    assert out == succeed("evaluate", linear)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ((), ("mnist", "run")),
        (("--dataset", "kmnist"), ("kmnist", None)),
        (("--data-dir", "there"), ("mnist", Path("there"))),
        (("--dataset", "qmnist", "--data-dir", "there"), ("qmnist", Path("there"))),
    ],
)
def test_evaluate_takes_the_runs_data_set_unless_told_otherwise(options, wanted, linear, data_dir, mnist, monkeypatch):
    def load(name, *, folder):
        asked.append((name, "run" if folder == data_dir else folder))
        return part(mnist, TRAIN, TEST)

    asked = []
    monkeypatch.setattr(fm.data, "load", load)
    succeed("evaluate", linear, *options)
    assert asked == [wanted]


@pytest.mark.parametrize("wrong", ["--batch-size 0", "--data-dir nowhere", "--dataset letters"])
def test_evaluate_refuses_what_it_cannot_use(wrong, linear):
    answer = ask("evaluate", linear, *wrong.split())
    assert answer.status in (1, 2)
    assert "Traceback" not in answer.err
    assert wrong.split()[1] in answer.err


@pytest.mark.parametrize("name", ["matrix.png", "matrix.PNG"])
def test_the_confusion_matrix_can_be_drawn(name, linear, tmp_path):
    assert f"drawn into {tmp_path / name}" in succeed("evaluate", linear, "--png", tmp_path / name)
    with Image.open(tmp_path / name) as image:
        image.load()
        assert image.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "command", [("evaluate", "run"), ("account", "--noise-multiplier", "1", "--epochs", "1")], ids=lambda c: c[0]
)
@pytest.mark.parametrize("name", ["matrix", "matrix.xyz", "nowhere/matrix.png", "folder.png"])
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(name, command, tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert complain(2, *command, "--png", tmp_path / name).startswith("--png must be a file ")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.png"]


def test_a_picture_on_a_full_disk_leaves_the_old_one(linear, tmp_path):
    (tmp_path / "matrix.png").write_bytes(b"old")
    succeed("evaluate", linear, "--png", tmp_path / "warm.png")  # matplotlib may write its caches
    with no_file_larger_than(1000):
        answer = ask("evaluate", linear, "--png", tmp_path / "matrix.png")
    assert answer.status == 1
    assert answer.err == f"functorch-mnist: File too large: {tmp_path / 'matrix.png'}.\n"
    assert (tmp_path / "matrix.png").read_bytes() == b"old"


# ---- predict

SHOWN = 40


@pytest.fixture(scope="session")
def reader(mnist, tmp_path_factory):
    """A run that reads most digits."""
    folder = tmp_path_factory.mktemp("reader")
    write_idx(folder / "data", part(mnist, 12_800, 200))
    options = ("--model", "mlp", "--lr", "0.05", "--epochs", "2")
    succeed("train", "--data-dir", folder / "data", *options, "--out", folder / "run")
    return folder / "run"


def predictions(out):
    """The likeliest digits and their probabilities, line by line; each line has two more, less and less likely."""
    pattern = r".*: (\d) \((\d\.\d{4})\), (\d) \((\d\.\d{4})\), (\d) \((\d\.\d{4})\)"
    lines = [re.fullmatch(pattern, line).groups() for line in out.splitlines()]
    assert all(float(a) >= float(b) >= float(c) and len({*digits}) == 3 for *digits, a, b, c in (
        (x, y, z, a, b, c) for x, a, y, b, z, c in lines))  # fmt: skip
    return [(int(digit), float(probability)) for digit, probability, *_ in lines]


def test_a_range_of_test_images_has_a_digit_and_its_probability_each(reader, mnist):
    out = succeed("predict", reader, "--test", "3:43")
    shown = predictions(out)
    for number, line in enumerate(out.splitlines(), start=3):
        assert line.startswith(f"test image {number}, label {mnist.test.labels[number]}: ")
    assert len(shown) == 40
    assert all(0.1 <= probability <= 1 for _, probability in shown)
    right = sum(digit == int(label) for (digit, _), label in zip(shown, mnist.test.labels[3:43], strict=True))
    assert right >= 36


def large(image, size=(100, 140)):
    return Image.fromarray(image[0].numpy()).resize(size, Image.Resampling.BICUBIC)


def inverted(image):
    return Image.eval(image, lambda value: 255 - value)


def transparent(image, color):
    drawn = Image.new("RGBA", image.size, color)
    drawn.putalpha(image)
    return drawn


def deep(image, dtype, scale):
    return Image.fromarray((np.asarray(image).astype(np.float64) * scale).astype(dtype))


def on_paper(image):
    paper = Image.new("L", (300, 250), 255)
    paper.paste(inverted(image), (20, 90))
    return paper


def faint(image):
    return Image.eval(image, lambda value: 90 + value // 3)


def turned(image):
    return image.rotate(90, expand=True)  # the EXIF data say how to turn it back


FORMS = {
    "upscaled.png": large,
    "inverted.png": lambda image: inverted(large(image)),
    "inverted.jpg": lambda image: inverted(large(image)).convert("RGB"),
    "transparent-black.png": lambda image: transparent(large(image), "black"),
    "transparent-white.png": lambda image: transparent(large(image), "white"),
    "grey-alpha.png": lambda image: large(image).convert("LA"),
    "palette.png": lambda image: large(image).convert("P"),
    "palette.gif": lambda image: inverted(large(image)),
    "cmyk.jpg": lambda image: large(image).convert("CMYK"),
    "16-bit.png": lambda image: deep(large(image), np.uint16, 257),
    "16-bit-dark.png": lambda image: deep(large(image), np.uint16, 4),
    "32-bit.tif": lambda image: deep(large(image), np.int32, 2**23),
    "float.tif": lambda image: deep(large(image), np.float32, 1 / 255),
    "black-and-white.png": lambda image: large(image, (280, 280)).convert("1", dither=Image.Dither.NONE),
    "paper.bmp": lambda image: on_paper(large(image)),
    "lossy.webp": large,
    "faint.png": lambda image: faint(large(image)),
    "turned.jpg": lambda image: turned(large(image)),
    "itself.png": lambda image: Image.fromarray(image[0].numpy()),
    "itself-inverted.png": lambda image: inverted(Image.fromarray(image[0].numpy())),
}


@pytest.mark.parametrize("name", FORMS)
def test_an_image_of_any_form_is_read_as_the_test_image_it_shows(name, reader, mnist, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90 degrees
    paths = []
    for number in range(SHOWN):
        paths.append(tmp_path / f"{number}-{name}")
        FORMS[name](mnist.test.images[number]).save(paths[-1], **({"exif": exif} if name == "turned.jpg" else {}))
    shown = predictions(succeed("predict", reader, *paths))
    wanted = predictions(succeed("predict", reader, "--test", f"0:{SHOWN}"))
    same = sum(digit == other for (digit, _), (other, _) in zip(shown, wanted, strict=True))
    assert same >= (SHOWN if name.startswith("itself") else 0.9 * SHOWN)
    if name.startswith("itself"):
        assert shown == wanted


def test_a_test_image_with_a_wider_border_is_put_back_in_its_place(mnist, tmp_path):
    shown = mnist.test.images[:SHOWN]
    for number, image in enumerate(shown):
        Image.fromarray(np.pad(image[0].numpy(), 30)).save(tmp_path / f"{number}.png")
    found = torch.stack([images.read(tmp_path / f"{number}.png") for number in range(SHOWN)])
    assert (found.float() - shown.float()).abs().mean() < 1  # a shift by a pixel makes 15; a faint edge may be cut off


def test_of_an_animated_image_the_first_frame_counts(reader, mnist, tmp_path):
    first, second = large(mnist.test.images[0]), large(mnist.test.images[1])
    first.save(tmp_path / "still.gif")
    first.save(tmp_path / "animated.gif", save_all=True, append_images=[second])
    still, animated = predictions(succeed("predict", reader, tmp_path / "still.gif", tmp_path / "animated.gif"))
    assert still == animated


def test_an_image_with_damaged_exif_data_is_read(reader, mnist, tmp_path):
    inverted(large(mnist.test.images[0])).save(tmp_path / "good.jpg")
    good = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "odd.jpg").write_bytes(good[:2] + b"\xff\xe1\x00\x10Exif\0\0MM\0*\xff\xff\xff\xff" + good[2:])
    one, other = predictions(succeed("predict", reader, tmp_path / "good.jpg", tmp_path / "odd.jpg"))
    assert one == other


def _bad_images(folder, image):
    image.save(folder / "good.png")
    image.save(folder / "good.jpg")
    for ending in ("png", "jpg"):
        good = (folder / f"good.{ending}").read_bytes()
        (folder / f"cut.{ending}").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("a digit")
    (folder / "empty.png").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    Image.new("L", (1, 1)).save(folder / "1x1.png")
    Image.new("L", (50, 50), "white").save(folder / "blank.png")
    Image.new("L", (28, 28), 7).save(folder / "blank28.png")
    Image.new("RGBA", (50, 50)).save(folder / "invisible.png")
    Image.new("1", (15_000, 15_000)).save(folder / "huge.png")
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(folder / "nan.tif")
    dots = np.zeros((1000, 1000), np.uint8)
    dots[100, 100] = dots[900, 900] = 255
    Image.fromarray(dots).save(folder / "dots.png")


def test_what_is_no_image_of_a_digit_is_told_in_one_line_by_its_name(reader, mnist, tmp_path):
    _bad_images(tmp_path, large(mnist.test.images[0]))
    assert len(predictions(succeed("predict", reader, tmp_path / "good.png", tmp_path / "good.jpg"))) == 2
    bad = [path for path in tmp_path.iterdir() if path.stem != "good"]
    assert len(bad) >= 13
    for path in [*bad, tmp_path / "missing.png"]:
        answer = ask("predict", reader, path, tmp_path / "good.png")
        assert answer.status == 1
        assert len(predictions(answer.out)) == 1 and answer.out.startswith(f"{tmp_path / 'good.png'}: ")
        assert answer.err.startswith(f"functorch-mnist: {path} must ") and len(answer.err.splitlines()) == 1


def test_what_the_network_sees_is_saved(reader, mnist, tmp_path):
    large(mnist.test.images[0]).save(tmp_path / "a.png")
    folder = tmp_path / "seen"
    succeed("predict", reader, tmp_path / "a.png", "--save-inputs", folder)
    succeed("predict", reader, "--test", "5", "--save-inputs", folder)
    assert {path.name for path in folder.iterdir()} == {"000-a.png", "000-test-image-5.png"}
    with Image.open(folder / "000-test-image-5.png") as image:
        shown = np.asarray(image)
    assert np.array_equal(shown[::10, ::10], mnist.test.images[5, 0].numpy()) and shown.shape == (280, 280)


def test_a_deskewing_run_sees_deskewed_images(mnist):
    some = mnist.test.images[:2]
    for options in (cli.opt.Train(deskew=True), cli.opt.Train(model="scattering")):
        assert torch.equal(commands.build.seen(options, some), fm.data.deskewed(some.float()))
    assert commands.build.seen(cli.opt.Train(), some) is some


@pytest.mark.parametrize("size", [(1, 2), (1, 5000), (5000, 1), (27, 28), (28, 29), (3, 3)])
def test_an_image_of_any_size_is_read(size, reader, tmp_path):
    image = Image.new("L", size)
    image.putpixel((size[0] // 2, size[1] // 2), 255)
    image.save(tmp_path / "image.png")
    assert len(predictions(succeed("predict", reader, tmp_path / "image.png"))) == 1


@pytest.mark.parametrize("wrong", ["", "--test 5:3", "--test=-1", "--test 0:201", "--test 3:3", "a.png --test 0"])
def test_predict_needs_images_or_a_range_of_test_images(wrong, reader):
    assert "--test" in complain(2, "predict", reader, *wrong.split())


# ---- plan


def ways(out):
    """The printed way of each parameter."""
    head, _, *lines = out.splitlines()
    start, stop = head.index("way"), head.index("memory") - 2
    return {line.split()[0]: line[start:stop].strip() for line in lines if line.split()[0].count(".") == 1}


@pytest.mark.parametrize("options", ["--model cnn", "--model mlp --hidden 8 4", "--model linear --precision bfloat16"])
def test_plan_prints_every_parameter_and_its_way(options):
    out = succeed("plan", *options.split())
    training = cli._parse(["plan", *options.split()]).training
    made = commands.build.classifier(commands.build.Origin(training, (0.0, 1.0), 1, 10))
    kinds = {"conv1.weight": "build", "conv2.weight": "build"}
    wanted = {
        path: kinds.get(path, "outer product") if path.endswith("weight") else "sum"
        for path in made.init(fm.random.key(0))
    }
    assert ways(out) == wanted
    assert max(map(len, out.splitlines())) <= 120


def test_plan_counts_a_batch_by_hand():
    out = succeed("plan", "--batch-size", "100", "--override", "conv2.weight=build")
    (line,) = [line for line in out.splitlines() if "conv2.weight" in line]
    # 64 x 288 numbers of 4 bytes and 2 x 576 x 64 x 288 operations, for each of 100 images
    assert line.endswith("7.37 MB  2.12 GFLOP  asked for")


def test_an_override_changes_its_row_only():
    before = ways(succeed("plan"))
    out = succeed("plan", "--override", "conv2.weight=gram", "--override", "fc1.bias=dense")
    assert ways(out) == before | {"conv2.weight": "gram", "fc1.bias": "dense"}
    assert out.count("asked for") == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("--override conv3.weight=gram", "'conv3.weight'"),
        ("--override conv2.weight=quickly", "'quickly'"),
        ("--override conv2.weight", "NAME=WAY"),
        ("--batch-size 0", "--batch-size must be"),
        ("--hidden 0 --model mlp", "--hidden must be"),
        ("--hidden 8", "--hidden has no effect"),
        ("--hidden 2147483647 2147483647 --model mlp", "must fit in memory"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_line(wrong, said):
    assert said in complain(2, "plan", *wrong.split())
