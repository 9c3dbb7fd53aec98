"""Commands in several processes: the same result, one folder, one line where something fails, and going on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import worlds
from shell import CNN, LINEAR, complain, succeed

from functorch_mnist import checkpoint

LONG = ("--model", "linear", "--epochs", "100", "--batch-size", "32", "--save-every", "20", "--timeout", "30")
"""800 steps, a second or two."""
SECONDS = 240


def begun(*arguments, program=("-m", "functorch_mnist")):
    """A command in a program of its own."""
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip


def finished(process):
    """Its status, and what it has printed."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def command(*arguments):
    status, out, err = finished(begun(*arguments))
    assert (status, err) == (0, ""), (status, out, err)
    return out


def divided(processes, *arguments):
    """What a command prints that divides its work among processes, which nothing but the environment starts."""
    if processes == 1:
        return succeed(*arguments)
    ends = [finished(one) for one in worlds.started(["-m", "functorch_mnist", *arguments], processes)]
    assert [(status, err) for status, _, err in ends] == [(0, "")] * processes, ends
    return "".join(out for _, out, _ in ends)


def state(run):
    """The bytes of a run's newest checkpoint."""
    return checkpoint.steps(run / "checkpoints")[-1].joinpath("state.safetensors").read_bytes()


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def wait_for_step(run, step):
    """Waits until a run has saved a step."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        paths = checkpoint.steps(run / "checkpoints") if (run / "checkpoints").exists() else []
        if paths and int(paths[-1].name.rpartition("-")[2]) >= step:
            return
        time.sleep(0.02)
    raise AssertionError("nothing was saved")


def ranks(process):
    """The processes that a command has started, in order of rank."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    found = {}
    for pid in map(int, children.split()):
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        found[int(next(line for line in environment if line.startswith("RANK=")).partition("=")[2])] = pid
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def unstopped(data_dir, tmp_path_factory):
    """The end of a run of one process that nothing stops."""
    run = tmp_path_factory.mktemp("unstopped") / "run"
    succeed("train", "--data-dir", data_dir, *LONG, "--shards", "4", "--out", run)
    return state(run)


def test_two_processes_train_what_one_does_into_one_folder(data_dir, cnn, tmp_path):
    run = tmp_path / "run"
    out = command("train", "--data-dir", data_dir, *CNN, "--out", run, "--processes", "2")
    lines = r"Run folder: .*\nTraining cnn: .*\n(epoch .*\n){2}Accuracy of the network on the 64 .*%\n\nNext:"
    assert re.match(lines, out), out
    records = [metrics(one) for one in (cnn, run)]
    for a, b in zip(*records, strict=True):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert [path.name for path in checkpoint.steps(run / "checkpoints")] == [
        path.name for path in checkpoint.steps(cnn / "checkpoints")
    ]


PRIVATE = ("--recipe", "private", "--noise-seed", "1", "--epochs", "1", "--batch-size", "64")
AVERAGED = (
    "--watch",
    "noise-scale,norms",
    "--hold-out",
    "32",
    "--patience",
    "1",
    "--ema-decay",
    "0.9",
    "--max-norm",
    "1",
)


@pytest.mark.parametrize("options", [PRIVATE, (*AVERAGED, *LINEAR)], ids=["private", "averaged"])
def test_with_shards_two_processes_write_the_bytes_that_one_does(options, data_dir, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    for run, processes in zip(runs, (1, 2), strict=True):
        divided(processes, "train", "--data-dir", data_dir, *options, "--shards", "4", "--out", run)
    assert state(runs[0]) == state(runs[1])
    records = [[{k: v for k, v in one.items() if k != "examples_per_s"} for one in metrics(run)] for run in runs]
    assert records[0] == records[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1)])
def test_a_run_that_is_killed_goes_on_with_any_number_of_processes_to_the_same_bytes(
    before, after, data_dir, unstopped, tmp_path
):
    run = tmp_path / "run"
    process = begun("train", "--data-dir", data_dir, *LONG, "--shards", 4, "--processes", before, "--out", run)
    wait_for_step(run, 60)
    victim = ranks(process)[-1] if before > 1 else process.pid
    os.kill(victim, signal.SIGKILL)
    status, _, err = finished(process)
    if before > 1:
        assert status == 128 + signal.SIGKILL or status == 1
        (line,) = err.splitlines()
        assert re.match(r"functorch-mnist: Process 1 of 2 ", line), line
    out = succeed("train", "--resume", run, "--processes", after)
    assert "Resuming after step" in out
    assert state(run) == unstopped


def test_ctrl_c_ends_all_processes_with_one_line_and_one_checkpoint(data_dir, tmp_path):
    run = tmp_path / "run"
    process = begun("train", "--data-dir", data_dir, *LONG, "--processes", "2", "--out", run)
    wait_for_step(run, 60)
    pids = ranks(process)
    os.kill(process.pid, signal.SIGINT)
    status, _, err = finished(process)
    assert (status, len(err.splitlines())) == (130, 1), err
    (line,) = err.splitlines()
    step = re.fullmatch(r"functorch-mnist: Interrupted after step (\d+)\. Resume with: .* --resume .*", line)
    assert step, line
    assert checkpoint.steps(run / "checkpoints")[-1].name.endswith(f"-{int(step[1]):08}")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_where_the_launcher_is_killed_its_processes_stop_and_the_run_can_go_on(data_dir, tmp_path):
    run = tmp_path / "run"
    process = begun("train", "--data-dir", data_dir, *LONG, "--epochs", 2000, "--processes", 2, "--out", run)
    wait_for_step(run, 60)
    pids = ranks(process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    last = int(checkpoint.steps(run / "checkpoints")[-1].name.rpartition("-")[2])
    assert "Resuming after step" in succeed("train", "--resume", run, "--processes", 1, "--epochs", last // 8 + 3)


def test_torchrun_starts_the_processes_as_well(data_dir, linear, tmp_path):
    torchrun = ("-m", "torch.distributed.run")
    run = tmp_path / "run"
    arguments = ("-m", "functorch_mnist", "train", "--data-dir", data_dir, *LINEAR, "--out", run)
    status, out, err = finished(begun("--standalone", "--nproc-per-node", 2, *arguments, program=torchrun))
    assert status == 0, err
    assert out.count("Accuracy of the network") == 1
    a, b = (checkpoint.read_manifest(checkpoint.steps(one / "checkpoints")[-1]) for one in (linear, run))
    assert a["step"] == b["step"]


def test_two_launchers_on_one_address_make_one_run(data_dir, tmp_path):
    port, run = worlds.free_port(), tmp_path / "run"
    launchers = [
        begun("--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port",
              port, "-m", "functorch_mnist", "train", "--data-dir", data_dir, *LINEAR, "--shards", 2, "--out", run,
              program=("-m", "torch.distributed.run"))
        for node in range(2)
    ]  # fmt: skip
    ends = [finished(launcher) for launcher in launchers]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert sum(out.count("Accuracy of the network") for _, out, _ in ends) == 1
    alone = tmp_path / "alone"
    succeed("train", "--data-dir", data_dir, *LINEAR, "--shards", 2, "--out", alone)
    assert state(run) == state(alone)


def test_processes_with_other_options_are_refused(data_dir, tmp_path):
    def arguments(rank):
        return [
            "-m",
            "functorch_mnist",
            "train",
            "--data-dir",
            data_dir,
            *LINEAR,
            "--seed",
            rank,
            "--out",
            tmp_path / "x",
        ]

    processes = worlds.started(arguments, 2)
    ends = [finished(process) for process in processes]
    assert [status for status, _, _ in ends] == [1, 1]
    (line,) = "".join(err for _, _, err in ends).splitlines()
    assert line.startswith("functorch-mnist: Starting: all processes must have the same options. Found others"), line
    assert not (tmp_path / "x").exists()


def test_analyses_of_other_runs_are_refused(linear, data_dir, tmp_path):
    other = tmp_path / "other"
    succeed("train", "--data-dir", data_dir, *LINEAR, "--seed", 1, "--out", other)
    processes = worlds.started(lambda rank: ["-m", "functorch_mnist", "noise-scale", (linear, other)[rank]], 2)
    ends = [finished(process) for process in processes]
    assert [status for status, _, _ in ends] == [1, 1]
    (line,) = "".join(err for _, _, err in ends).splitlines()
    assert "all processes must have the same data" in line


def test_a_folder_that_holds_a_run_is_refused_in_one_line(data_dir, linear):
    process = begun("train", "--data-dir", data_dir, *LINEAR, "--processes", "2", "--out", linear)
    status, _, err = finished(process)
    assert status == 2
    (line,) = err.splitlines()
    assert "holds a run already" in line


def test_analyses_divide_their_examples_and_write_the_same_files(linear, tmp_path):
    for name in ("scores", "noise-scale"):
        written = []
        for processes in (1, 2):
            out = tmp_path / f"{name}-{processes}"
            divided(processes, name, linear, "--out", out)
            written.append((out / f"{name}.csv").read_bytes())
        if name == "noise-scale":  # a sum over examples
            numbers = [[line.split(",")[3:5] for line in text.decode().splitlines()[1:]] for text in written]
            for a, b in zip(*numbers, strict=True):
                assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-4)
        else:
            assert written[0] == written[1]


def test_a_sweep_divides_its_runs_and_finds_the_same(data_dir, tmp_path):
    options = ("--data-dir", data_dir, "--model", "linear", "--epochs", "2", "--batch-size", "32", "--hold-out", "32",
               "--over", "lr=0.01,0.1,1", "--halve-every", "1", "--halve-keep", "0.3",
               "--vmapped-runs", "2")  # fmt: skip
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        divided(processes, "sweep", *options, "--out", out)
        found.append((out / "runs.csv").read_text())
    assert found[0] == found[1]


def test_options_that_do_not_go_together_are_refused(data_dir):
    assert "must divide --shards 4" in complain(2, "train", "--shards", "4", "--processes", "3")
    assert "power of two" in complain(2, "train", "--shards", "6")
    assert "--processes must be" in complain(2, "train", "--processes", "0")
    assert "--timeout must be" in complain(2, "train", "--timeout", "0")


def test_one_thread_each_with_shards(data_dir, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        succeed("train", "--data-dir", data_dir, *LINEAR, "--shards", "2", "--out", tmp_path / "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_shards_are_refused_where_no_batch_is_divided():
    assert "--shards" in complain(2, "sweep", "--over", "lr=0.1,1", "--hold-out", "32", "--shards", "2")
