"""The benchmark harness, on arms whose times and faults are planted."""

import json
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import limits, measure, report, results

SETUP = measure.Setup()
START = measure.Start("weights", "batch", "float32", 1)
RATES = limits.Rates({"float32": 1e9}, 1e9)


def arm(name, call=lambda: None, output=1.0, *, seconds=None, start=START, **settings):
    """An arm that takes some seconds, or does a call, and gives an output."""
    work = measure.Work(call if seconds is None else lambda: time.sleep(seconds), lambda: output, start)
    return measure.Arm(name, lambda: work, **settings)


def case(*arms, rounds=5, lead=0, **settings):
    return measure.Case("planted", arms, lambda a, b: abs(a - b), rounds, lead=lead, **settings)


def compare(*arms, **settings):
    return measure.compare(case(*arms, **settings), SETUP)


def timing(name, samples, *, baseline=False, compilations=0):
    return measure.Timing(name, "float32", 1.0, samples, 0.0, 0.0, baseline, compilations)


def comparison(*timings):
    return measure.Comparison("planted", list(timings), [], {}, {})


def row(result, name):
    """What the table says of an arm."""
    return next(line for line in report.markdown(result, RATES).splitlines() if line.startswith(f"| {name}"))


def counting(output=1.0):
    """The calls so far, and an arm's work that counts them."""
    calls = []
    return calls, measure.Work(lambda: calls.append(1), lambda: output, START)


def test_a_planted_slower_arm_is_found_slower_and_a_faster_one_faster():
    result = compare(
        arm("reference", seconds=0.02), arm("slow", seconds=0.04), arm("fast", seconds=0.005), rounds=7, warmups=0
    )
    reference, slow, fast = result.timings
    assert result.reference is reference
    assert result.ratio(slow) > 1.3 and result.interval(slow)[0] > 1
    assert result.ratio(fast) < 0.7 and result.interval(fast)[1] < 1
    assert slow.quartiles[0] <= slow.median <= slow.quartiles[1]


def test_a_slower_arm_is_printed_with_a_plus_and_a_faster_one_with_a_minus():
    arms = {"base": 0.1, "double": 0.2, "half": 0.05, "near": 0.099}
    result = comparison(*(timing(name, [time] * 3, baseline=name == "base") for name, time in arms.items()))
    for table in (report.text(result, RATES), report.markdown(result, RATES)):
        lines = {line.strip("| ").split()[0]: line for line in table.splitlines()}
        assert "2.00 (2.00 to 2.00)" in lines["double"] and "+100 %" in lines["double"]
        assert "0.50 (0.50 to 0.50)" in lines["half"] and "-50 %" in lines["half"]
        assert "-1.0 %" in lines["near"]
        assert "1 (reference)" in lines["base"] and "%" not in lines["base"]


def test_a_planted_wrong_arm_is_refused_by_name_and_never_timed_while_others_go_on():
    calls, work = counting(1.1)
    wrong = measure.Arm("wrong", lambda: work, tolerance=0.05)
    result = compare(arm("reference"), wrong, arm("close", output=1.04, tolerance=0.05))
    assert [one.name for one in result.timings] == ["reference", "close"]
    assert result.missing == [
        measure.Missing("wrong", "refused: outputs 1.0e-01 from those expected, above 0.05", True)
    ]
    assert len(calls) == 1
    assert "wrong: refused: outputs" in report.text(result, RATES)
    assert "refused: outputs" in row(result, "wrong")


def test_an_arm_is_held_against_what_it_says_is_expected():
    right = arm("right", output=3.0, expected=lambda: 3.0)
    wrong = arm("wrong", output=1.0, expected=lambda: 3.0)
    result = compare(arm("reference"), right, wrong)
    assert [one.name for one in result.timings] == ["reference", "right"]


def test_a_first_arm_that_is_not_as_expected_is_an_error():
    with pytest.raises(RuntimeError, match=r"first arm, reference, must run\. Found: refused: outputs"):
        compare(arm("reference", expected=lambda: 3.0), arm("other"))


def test_an_arm_whose_outputs_are_nan_is_refused():
    result = compare(arm("reference"), arm("nan", output=float("nan"), tolerance=1.0))
    assert result.missing[0].reason.startswith("refused: outputs nan")


@pytest.mark.parametrize(
    "start, reason",
    [
        (START._replace(weights="others"), "it starts from other weights"),
        (START._replace(batch="another"), "it takes another batch"),
        (START._replace(precision="bfloat16"), "it runs in bfloat16, not in float32"),
        (START._replace(threads=2), "it runs on 2 threads, not on 1"),
        (None, "it does not say what it starts from"),
    ],
)
def test_an_arm_that_starts_from_something_else_is_refused_before_it_runs(start, reason):
    calls, work = counting()
    other = measure.Arm("other", lambda: replace(work, start=start))
    result = compare(arm("reference"), other)
    assert result.missing == [measure.Missing("other", f"refused: {reason}", True)]
    assert not calls


def test_an_arm_in_its_own_precision_is_not_refused():
    lower = arm("lower", start=START._replace(precision="bfloat16"), precision="bfloat16")
    assert not compare(arm("reference"), lower).missing


def test_an_arm_whose_package_is_missing_is_a_row_that_says_so():
    def make():
        import a_package_that_nobody_has  # noqa: F401

    result = compare(arm("reference"), measure.Arm("theirs", make), arm("ours"))
    assert [one.name for one in result.timings] == ["reference", "ours"]
    assert not result.missing[0].refused
    assert "not installed: No module named 'a_package_that_nobody_has'" in row(result, "theirs")


def test_an_arm_that_raises_is_a_row_and_the_others_go_on():
    def fail():
        raise KeyError("planted\nsecond line")

    def fail_to_call():
        raise MemoryError

    result = compare(arm("reference"), measure.Arm("unmade", fail), arm("uncalled", fail_to_call), arm("other"))
    assert [one.name for one in result.timings] == ["reference", "other"]
    assert all(one.refused for one in result.missing)
    assert "failed: KeyError: " in row(result, "unmade")
    assert "failed: MemoryError" in row(result, "uncalled")


def test_a_first_arm_that_fails_is_an_error():
    def fail():
        raise ValueError("planted")

    with pytest.raises(RuntimeError, match=r"planted: the first arm, broken, must run\. Found: failed: ValueError"):
        compare(arm("broken", fail), arm("other"))


@pytest.mark.parametrize("arms, rounds", [((), 5), ((arm("a"), arm("a")), 5), ((arm("a"),), 0)])
def test_no_arm_two_of_a_name_or_no_round_are_refused(arms, rounds):
    with pytest.raises(ValueError, match="at least one round"):
        compare(*arms, rounds=rounds)


def test_a_planted_recompilation_is_reported_and_a_steady_compiled_arm_reports_none():
    x, numbers = torch.ones(3), iter(range(2, 100))

    def scaled(x, number):
        return x * number

    def doubled(x):
        return x * 2

    growing, steady = (torch.compile(fn, backend="eager") for fn in (scaled, doubled))
    result = compare(
        arm("steady", lambda: steady(x)), arm("growing", lambda: growing(x, next(numbers))), arm("plain"), warmups=1
    )
    assert [one.compilations for one in result.timings] == [0, 1, 0]
    heads = report.markdown(result, RATES).splitlines()[0]
    assert heads.endswith("| recompilations |")
    assert row(result, "growing").endswith("| 1 |")
    assert row(result, "steady").endswith("|  |")


def test_where_nothing_is_compiled_anew_the_table_has_no_column_of_it():
    assert "recompilations" not in report.markdown(compare(arm("reference")), RATES)


def test_more_than_eight_compiled_forms_over_several_cases_stay_compiled():
    def total(x):
        compiled.append(torch.compiler.is_compiling())
        return x.sum()

    compiled = []
    fast = torch.compile(total, backend="eager", dynamic=False)
    for size in range(2, 14):
        x = torch.ones(size)
        compare(arm("compiled", lambda x=x: fast(x)), rounds=1, warmups=0)
    assert compiled == [True] * 24


def test_the_first_call_is_kept_apart():
    seconds = iter([0.05] + [0.0] * 100)
    timing = compare(arm("compiles", lambda: time.sleep(next(seconds)))).reference
    assert timing.first > 0.05
    assert timing.median < 0.02


def test_rounds_are_shuffled_and_each_arm_is_timed_once_in_each():
    order = []
    arms = [arm(name, lambda name=name: order.append(name)) for name in "abc"]
    result = compare(*arms, rounds=8, warmups=2)
    rounds = ["".join(order[9 + 3 * n : 12 + 3 * n]) for n in range(8)]
    assert order[:9] == list("abcaabbcc")
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(order) == 33 and len(set(rounds)) > 1
    assert all(len(one.samples) == 8 for one in result.timings)


def test_progress_is_told_of_every_call():
    arms, reported = [arm("a"), arm("b"), arm("c", output=9.0)], []
    planted = case(*arms, rounds=3, warmups=2)
    measure.compare(planted, SETUP, progress=reported.append)
    assert measure.calls(planted) == 18
    assert len(reported) == 18 - 5  # "c" is refused at its first call


def test_what_a_case_asks_for_is_called_after_the_first_calls_and_before_the_rounds():
    order = []
    arms = [arm(name, lambda name=name: order.append(name)) for name in "ab"]
    compare(*arms, rounds=1, warmups=0, compared=lambda: order.append("compared"))
    assert order[:3] == ["a", "b", "compared"] and len(order) == 5


def test_ratios_are_to_the_fastest_baseline():
    fast, slow = timing("fast", [1.0] * 3, baseline=True), timing("slow", [2.0] * 3, baseline=True)
    ours = timing("ours", [0.5] * 3)
    result = comparison(slow, fast, ours)
    assert result.reference is fast
    assert [result.ratio(one) for one in result.timings] == [2, 1, 0.5]


def test_the_first_arm_is_a_baseline_unasked():
    result = compare(arm("first"), arm("second"), arm("third", baseline=True))
    assert [one.baseline for one in result.timings] == [True, False, True]


def test_constant_samples_give_an_interval_of_one_point():
    ours = timing("ours", [3.0] * 5)
    assert comparison(timing("base", [2.0] * 5, baseline=True), ours).interval(ours) == (1.5, 1.5)


def test_rounds_that_were_slow_for_all_arms_cancel_in_the_interval():
    times = [1.0, 8.0, 2.0, 1.0, 4.0, 16.0, 1.0]
    base, ours = timing("base", times, baseline=True), timing("ours", [3 * one for one in times])
    assert comparison(base, ours).interval(ours) == (3, 3)
    alone = timing("alone", [3 * one for one in reversed(times)])
    low, high = comparison(base, alone).interval(alone)
    assert low < 3 < high


def test_a_digest_differs_for_values_shapes_and_types():
    x = torch.arange(6.0)
    others = [x + 1, x.reshape(2, 3), x.double(), x[:5]]
    assert len({measure.digest([one]) for one in (x, *others)}) == 5
    assert measure.digest([x]) == measure.digest([x.clone()])
    assert measure.digest([x, x + 1]) != measure.digest([x + 1, x])
    assert measure.digest([x.reshape(2, 3).T]) == measure.digest([x.reshape(2, 3).T.contiguous()])


def result_in(folder):
    return results.Result("planted", SETUP, {**results.machine(), "rates": RATES._asdict()}, folder)


def full_comparison():
    result = compare(
        arm("reference"),
        arm("wrong", output=2.0),
        arm("other"),
        settings={"n": 1},
        costs={"float32": measure.Cost(10, 20)},
        axis=measure.Axis("B", 4),
    )
    return replace(result, timings=[replace(one, memory=7, compilations=2) for one in result.timings])


def test_results_are_added_and_never_overwritten(tmp_path):
    paths = {result_in(tmp_path).add(full_comparison()) for _ in range(3)}
    assert len(paths) == 3
    assert set(tmp_path.iterdir()) == paths


def test_a_result_reads_back_equal(tmp_path):
    written = full_comparison()
    path = result_in(tmp_path).add(written)
    assert results.read(path) == ([written], RATES)


def test_a_result_is_whole_after_each_comparison(tmp_path):
    result, first, second = result_in(tmp_path), full_comparison(), comparison(timing("a", [1.0], baseline=True))
    path = result.add(first)
    assert results.read(path)[0] == [first]
    assert result.add(second) == path
    assert results.read(path)[0] == [first, second]
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_is_made_where_no_case_was_measured(tmp_path):
    assert result_in(tmp_path / "new").path is None
    assert not list(tmp_path.iterdir())


def test_a_result_says_on_what_it_was_measured(tmp_path):
    record = json.loads(result_in(tmp_path).add(full_comparison()).read_text(encoding="utf-8"))
    assert {"processor", "cores", "threads", "versions", "commit", "python", "rates"} <= record["machine"].keys()
    assert record["setup"] == SETUP._asdict()
    assert record["cases"][0]["reference"] in ("reference", "other")


def test_an_arm_that_fails_in_a_round_is_a_row_and_the_others_go_on():
    calls = iter([None, None, None])
    breaks = arm("breaks", call=lambda: next(calls))
    result = compare(arm("reference"), breaks)
    assert [timing.name for timing in result.timings] == ["reference"]
    assert [(one.name, one.refused) for one in result.missing] == [("breaks", True)]
    assert "failed: StopIteration" in result.missing[0].reason


def test_a_timed_call_follows_one_of_its_own_arm():
    order = []
    arms = [arm(name, call=lambda name=name: order.append(name)) for name in "abc"]
    compare(*arms, rounds=6, warmups=0, lead=1)
    calls = order[3:]
    assert len(calls) == 6 * 3 * 2
    assert all(first == second for first, second in zip(calls[::2], calls[1::2], strict=True))
