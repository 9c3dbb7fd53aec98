"""The benchmarks' command, its questions, peak memory and the machine's limit, on planted work."""

import argparse
import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import __main__ as main
from benchmarks import command, limits, measure, peak, problems, questions, readme, results, scores
from functorch_mnist import allocator

MB = 10**6
RATES = limits.Rates({"float32": 2e9, "bfloat16": 4e9}, 1e9)
CUDA = torch.cuda.is_available()
PAGE_COMMANDS = re.findall(r"^\S*python -m benchmarks (.*?) +#", readme.PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def bound(monkeypatch):
    """What a command asked of its process, which stays as it is."""
    asked = {}
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: asked.update(cores=list(cores)), raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: asked.update(threads=number))
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: asked.update(kept=True) or True)
    monkeypatch.setattr(limits, "rates", lambda device: RATES)
    return asked


def plant(monkeypatch, *cases):
    """Makes these the cases of the only question."""
    question = measure.Question(
        "planted", "what is planted", lambda setup: iter(cases), lambda found: f"{len(found)} seen"
    )
    monkeypatch.setattr(questions, "NAMES", ("planted",))
    monkeypatch.setattr(questions, "load", lambda name: question)


def arm(name, call=lambda: None, output=1.0):
    return measure.Arm(name, lambda: measure.Work(call, lambda: output))


def case(name, *arms, **settings):
    return measure.Case(name, arms, lambda a, b: abs(a - b), 2, **settings)


def run(monkeypatch, *options):
    """The exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, options)])
    try:
        return main.main()
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("line", PAGE_COMMANDS)
def test_a_command_of_the_page_names_questions_that_there_are(line, monkeypatch, capsys):
    assert run(monkeypatch, *shlex.split(line), "--list") == 0
    assert capsys.readouterr().out


def test_the_list_names_every_question_with_its_line(monkeypatch, capsys):
    assert run(monkeypatch, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [[name, questions.load(name).asks] for name in questions.NAMES]


@pytest.mark.parametrize("name", questions.NAMES)
def test_every_question_has_a_quick_case_of_arms_with_different_names(name, monkeypatch):
    monkeypatch.setattr(scores, "run", lambda *line: "")  # trains the network that its arms would score
    question = questions.load(name)
    assert question.name == name
    case = next(iter(question.cases(measure.Setup(quick=True))))
    names = [arm.name for arm in case.arms]
    assert names and len(set(names)) == len(names)
    assert case.name and "/" not in case.name
    assert case.rounds >= 1


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--only", "nothing"], "no question is named nothing. There are planted."),
        (["--only", "planted/C"], "no case of planted begins with 'C'."),
        (["--threads", 0], "--threads must be from 1 to"),
        (["--threads", 10**6], "--threads must be from 1 to"),
        (["--device", "nonsense"], "--device must be cpu or cuda. Found 'nonsense'."),
        (["--device", "meta"], "--device must be cpu or cuda. Found 'meta'."),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch finds no GPU here.",
            marks=pytest.mark.skipif(CUDA, reason="there is a GPU"),
        ),
    ],
)
def test_what_cannot_be_had_is_one_line_and_status_2(options, complaint, monkeypatch, bound, capsys, tmp_path):
    plant(monkeypatch, case("A", arm("one")))
    assert run(monkeypatch, *options, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m benchmarks: {complaint}")
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_run_writes_a_result_prints_its_table_and_draws_it(monkeypatch, bound, capsys, tmp_path):
    axes = [measure.Axis("B", 2**n) for n in range(3)]
    plant(monkeypatch, *(case(f"B={axis.value}", arm("one"), arm("two"), axis=axis) for axis in axes))
    assert run(monkeypatch, "--out", tmp_path, "--threads", 1) == 0
    out = capsys.readouterr().out
    written = {path.suffix: path for path in tmp_path.iterdir()}
    comparisons, rates = results.read(written[".json"])
    assert [one.case for one in comparisons] == ["B=1", "B=2", "B=4"]
    assert rates == RATES
    assert "planted, B=4\n\narm " in out
    assert "| two | B | B^" in out
    assert "3 seen" in out
    assert [path.name.rsplit("-", 1)[1] for path in sorted(tmp_path.glob("*.png"))] == ["B.png", "bars.png"]
    assert all(f"Written to {path}" in out for path in tmp_path.iterdir())
    assert bound["threads"] == 1 and len(bound["cores"]) == 1 and bound["kept"]


def test_only_the_cases_asked_for_are_measured(monkeypatch, bound, tmp_path):
    plant(monkeypatch, *(case(name, arm("one")) for name in ("A 1", "A 2", "B")))
    assert run(monkeypatch, "--only", "planted/A 2", "planted/B", "--out", tmp_path) == 0
    comparisons, _ = results.read(next(tmp_path.glob("*.json")))
    assert [one.case for one in comparisons] == ["A 2", "B"]


def test_a_refused_arm_makes_the_status_1(monkeypatch, bound, capsys, tmp_path):
    plant(monkeypatch, case("A", arm("one"), arm("wrong", output=2.0)))
    assert run(monkeypatch, "--out", tmp_path) == 1
    assert "wrong: refused" in capsys.readouterr().out


def test_a_case_without_its_first_arm_is_one_line_and_the_other_cases_go_on(monkeypatch, bound, capsys, tmp_path):
    plant(monkeypatch, case("A", arm("one", output=float("nan"))), case("B", arm("one")))
    assert run(monkeypatch, "--out", tmp_path) == 1
    assert capsys.readouterr().err.startswith("planted, A: the first arm, one, must run. Found: refused")
    (path,) = tmp_path.glob("*.json")
    assert [comparison.case for comparison in results.read(path)[0]] == ["B"]


def test_an_arm_whose_package_is_missing_leaves_the_status_0(monkeypatch, bound, tmp_path):
    def make():
        raise ModuleNotFoundError("No module named 'theirs'")

    plant(monkeypatch, case("A", arm("one"), measure.Arm("theirs", make)))
    assert run(monkeypatch, "--out", tmp_path) == 0


def test_ctrl_c_leaves_the_cases_measured_so_far_and_says_where(monkeypatch, bound, capsys, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    plant(monkeypatch, case("A", arm("one")), case("B", arm("one"), arm("two", interrupt)))
    assert run(monkeypatch, "--out", tmp_path) == 130
    [path] = tmp_path.iterdir()
    assert capsys.readouterr().err == f"Stopped. Results so far: {path}\n"
    assert [one.case for one in results.read(path)[0]] == ["A"]


def test_ctrl_c_before_any_result_says_that_there_is_none(monkeypatch, bound, capsys, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    plant(monkeypatch, case("A", arm("one", interrupt)))
    assert run(monkeypatch, "--out", tmp_path) == 130
    assert capsys.readouterr().err == "Stopped. Results so far: none\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setup", [measure.Setup(), measure.Setup("cpu", 1, quick=True, keep_freed_memory=False)])
def test_the_options_of_a_setup_give_that_setup(setup, bound):
    parser = argparse.ArgumentParser()
    command.add_setup(parser)
    assert command.setup(parser, parser.parse_args(command.options_of(setup))) == setup


def test_a_planted_allocation_is_found_as_the_peak():
    work = measure.Work(lambda: np.ones(64 * MB, dtype=np.uint8), lambda: None)
    assert peak.of(work, "cpu") == pytest.approx(64 * MB, rel=0.1)


def test_what_is_held_between_calls_is_no_part_of_the_peak():
    held = [np.ones(64 * MB, dtype=np.uint8)]
    assert peak.of(measure.Work(lambda: held[0].sum(), lambda: None), "cpu") < 6 * MB


def test_what_a_call_leaves_behind_is_part_of_the_peak_where_it_is_released_between_calls():
    left = []
    work = measure.Work(lambda: left.append(np.ones(64 * MB, dtype=np.uint8)), lambda: None, release=left.clear)
    assert peak.of(work, "cpu") == pytest.approx(64 * MB, rel=0.1)


def test_the_peaks_own_command_prints_the_bytes_of_the_arm_it_names(monkeypatch, bound, capsys):
    big = arm("big", lambda: np.ones(64 * MB, dtype=np.uint8))
    plant(monkeypatch, case("A", arm("big")), case("B", arm("small"), big))
    monkeypatch.setattr(sys, "argv", ["peak", "planted", "B", "big", "--threads", "1"])
    peak.main()
    assert json.loads(capsys.readouterr().out) == pytest.approx(64 * MB, rel=0.1)


def test_peak_memory_is_measured_of_cases_that_ask_for_it_unless_they_are_quick(monkeypatch, bound, tmp_path):
    plant(monkeypatch, case("A", arm("one"), memory=True), case("B", arm("one")))
    monkeypatch.setattr(peak, "in_own_process", lambda question, case, arm, setup: 3 * MB)
    for options, expected in ([], [3 * MB, None]), (["--quick"], [None, None]):
        folder = tmp_path / "-".join(["run", *options])
        assert run(monkeypatch, *options, "--out", folder) == 0
        comparisons, _ = results.read(next(folder.glob("*.json")))
        assert [one.timings[0].memory for one in comparisons] == expected


def test_a_process_that_ends_badly_is_an_error_that_names_the_arm(monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="an arm: its own process ended with 1"):
        peak.in_own_process("planted", "A", "an arm", measure.Setup())


def test_the_least_time_is_that_of_the_slower_of_arithmetic_and_memory():
    assert RATES.seconds(measure.Cost(arithmetic=6 * 10**9, bytes=10**9), "float32") == 3
    assert RATES.seconds(measure.Cost(arithmetic=6 * 10**9, bytes=10**9), "bfloat16") == 1.5
    assert RATES.seconds(measure.Cost(arithmetic=6 * 10**9, bytes=4 * 10**9), "float32") == 4


def test_the_cost_of_a_step_is_that_counted_by_hand():
    B, D, H, K = 32, 20, 30, 10

    def module():
        return nn.Sequential(nn.Linear(D, H, bias=False), nn.Sigmoid(), nn.Linear(H, K, bias=False))

    params = dict(module().named_parameters())
    labels = torch.arange(B) % K
    problem = problems.Problem(module, lambda params, x: x, params, torch.randn(B, D), lambda x: x, labels)
    forward, weights = 2 * B * D * H + 2 * B * H * K, 2 * B * D * H + 2 * B * H * K
    hidden_gradient = 2 * B * H * K  # the examples need none
    parameters, batch = 4 * (D * H + H * K), 4 * B * D
    saved = 4 * (B * H + B * K + 1)  # hidden values, log-probabilities, and how many examples the mean is over
    cost = limits.of_step(problem, torch.float32)
    assert cost == measure.Cost(forward + weights + hidden_gradient, 4 * parameters + batch + 2 * saved)


def test_rates_are_positive_and_known_of_both_precisions(monkeypatch):
    monkeypatch.setattr(limits, "_least_seconds", lambda call, device: 2.0)
    rates = limits.rates("cpu")
    assert rates.bytes == 2**28
    assert set(rates.arithmetic) == {"float32", "bfloat16"}
    assert rates.arithmetic["float32"] == max(1536**3, 32 * 54 * 54 * 64 * 64 * 9)
