"""The benchmark harness, on arms whose times and faults are planted."""

import json
import re
import time
from pathlib import Path

import pytest

from benchmarks import epoch, measure, readme


def arm(name, seconds, value=1.0, tolerance=0.0):
    return measure.Arm(name, lambda: time.sleep(seconds), lambda: value, tolerance)


def compare(*arms, rounds=5):
    return measure.compare(
        "planted", arms, rounds=rounds, difference=lambda a, b: abs(a - b), settings={"n": 1}, show=lambda line: None
    )


def test_a_planted_slower_arm_is_found_slower_and_a_faster_one_faster():
    result = compare(arm("reference", 0.02), arm("slow", 0.04), arm("fast", 0.005))
    reference, slow, fast = result.timings
    assert result.ratio(reference) == 1
    assert result.ratio(slow) > 1.3
    assert result.ratio(fast) < 0.7
    low, high = slow.quartiles
    assert low <= slow.median <= high


def test_a_planted_wrong_arm_is_refused_by_name_and_nothing_is_timed():
    calls = []
    wrong = measure.Arm("wrong", lambda: calls.append(1), lambda: 1.1, 0.05)
    with pytest.raises(measure.DisagreementError, match=r"wrong: outputs must be within 0\.05 of reference"):
        compare(arm("reference", 0), wrong)
    assert len(calls) == 1


def test_an_arm_whose_outputs_are_nan_is_refused():
    with pytest.raises(measure.DisagreementError):
        compare(arm("reference", 0), arm("nan", 0, float("nan"), 1.0))


def test_the_first_call_is_kept_apart():
    seconds = iter([0.05] + [0.0] * 100)
    slow_first = measure.Arm("compiles", lambda: time.sleep(next(seconds)), lambda: 1.0)
    timing = compare(slow_first).reference
    assert timing.first > 0.05
    assert timing.median < 0.02


def test_rounds_are_shuffled_and_every_arm_is_timed_in_each():
    order = []
    arms = [measure.Arm(name, lambda name=name: order.append(name), lambda: 1.0) for name in "abc"]
    compare(*arms, rounds=8)
    rounds = ["".join(order[6 + 3 * n : 9 + 3 * n]) for n in range(8)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 1


@pytest.mark.parametrize("arms, rounds", [((), 5), ((arm("a", 0), arm("a", 0)), 5), ((arm("a", 0),), 0)])
def test_no_arm_two_of_a_name_or_no_round_are_refused(arms, rounds):
    with pytest.raises(ValueError, match="at least one round"):
        compare(*arms, rounds=rounds)


def test_a_result_is_added_never_overwritten_and_reads_back(tmp_path):
    result = compare(arm("reference", 0), arm("other", 0.001))
    paths = {measure.write(result, tmp_path) for _ in range(3)}
    assert len(paths) == 3
    for path in paths:
        again = measure.read(path)
        assert again.timings == result.timings
        assert measure.table(again) == measure.table(result)
        machine = json.loads(path.read_text())["machine"]
        assert {"processor", "threads", "versions", "commit", "python"} <= machine.keys()


def test_a_slower_arm_is_printed_as_slower():
    result = measure.Comparison(
        "q", [measure.Timing("a", 1, [0.1] * 3, 0, 0), measure.Timing("b", 1, [0.2] * 3, 0, 0)], {}
    )
    assert measure.table(result).splitlines()[-1].endswith("| 2.00 |")


def test_the_readmes_tables_are_those_of_the_committed_results():
    text = readme.README.read_text(encoding="utf-8")
    assert readme.with_tables(text) == text
    assert len(re.findall("<!-- table", text)) >= 2


def test_a_program_without_an_accuracy_is_an_error():
    with pytest.raises(RuntimeError, match="must end with an accuracy"):
        epoch.Program("-c", "print('done')").call()


def test_a_programs_accuracy_is_read_and_each_call_has_the_next_seed():
    program = epoch.Program("-c", "print('on the 10000 test images: 9{seed}.50%')")
    program.call()
    program.call()
    assert program.accuracies == [90.5, 91.5]
    assert epoch.lacking(97.5, 0) == 0.5
    assert epoch.lacking(98.5, 0) == 0


def test_every_committed_result_holds_its_samples():
    results = sorted(measure.RESULTS.glob("*.json"))
    assert results
    for path in results:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        assert all(len(one["samples_s"]) >= 3 for one in record["arms"])


def test_the_readmes_accuracies_are_those_of_the_committed_result():
    record = json.loads((measure.RESULTS / "epoch-2-cores.json").read_text(encoding="utf-8"))
    accuracies = record["settings"]["accuracies"]
    text = " ".join(readme.README.read_text(encoding="utf-8").split())
    for name in ("article's program, float32", "train, float32", "train, bfloat16", "train, fast recipe"):
        assert f"{sum(accuracies[name]) / 5:.2f} %" in text
    both = accuracies["train, float32"] + accuracies["train, bfloat16"]
    for runs in (both, accuracies["train, fast recipe"]):
        assert f"({min(runs):.2f} to {max(runs):.2f} %)" in text
