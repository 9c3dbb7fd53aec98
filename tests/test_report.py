"""What becomes of results: tables, fitted powers, pictures, and the tables and pictures of the pages."""

import re

import numpy as np
import pytest

from benchmarks import limits, measure, pictures, plots, processes, questions, readme, report, results, studies

RATES = limits.Rates({"float32": 1e9, "bfloat16": 2e9}, 1e9)


def timing(name, seconds, *, memory=None, baseline=False, precision="float32"):
    return measure.Timing(name, precision, 1.0, [seconds] * 3, 0.0, 0.0, baseline, 0, memory)


def comparison(*timings, name="A", missing=(), **settings):
    return measure.Comparison(name, list(timings), list(missing), {}, {}, **settings)


def curve(*, time, memory=None, values=(16, 32, 64, 128)):
    """Cases along an axis, in which costs grow as powers of it."""
    return [
        comparison(
            timing("base", 1e-3 * value**time, baseline=True, memory=memory and int(1e9 * value**memory)),
            name=f"B={value}",
            axis=measure.Axis("B", value),
        )
        for value in values
    ]


def write(folder, *comparisons, question="planted"):
    result = results.Result(question, measure.Setup(), {**results.machine(), "rates": RATES._asdict()}, folder)
    for one in comparisons:
        path = result.add(one)
    return path.rename(folder / "planted.json")


def size(path):
    """The width and height of a PNG."""
    return np.frombuffer(path.read_bytes()[16:24], ">u4")


def test_planted_powers_are_recovered():
    [found] = report.exponents(curve(time=1.5, memory=0.5))
    assert (found.arm, found.axis) == ("base", "B")
    assert found.time == pytest.approx(1.5, abs=1e-9)
    assert found.memory == pytest.approx(0.5, abs=1e-6)
    assert "| base | B | B^1.50 | B^0.50 |" in report.exponent_table(curve(time=1.5, memory=0.5))


def test_no_power_is_fitted_to_two_points_nor_to_memory_that_was_not_measured():
    assert report.exponents(curve(time=1, values=(16, 32))) == []
    assert report.exponent_table(curve(time=1, values=(16, 32))) == ""
    assert report.exponents(curve(time=1))[0].memory is None


def test_the_share_of_the_limit_is_the_least_time_over_the_median():
    costs = {"float32": measure.Cost(10**8, 10**6), "bfloat16": measure.Cost(10**8, 10**6)}
    half = timing("half", 0.1, precision="bfloat16")
    result = measure.Comparison("A", [timing("base", 0.4, baseline=True), half], [], {}, costs)
    lines = report.markdown(result, RATES).splitlines()
    assert lines[0].endswith("| of the limit |")
    assert lines[2].endswith("| 25 % |")
    assert lines[3].endswith("| 50 % |")
    assert report.limit_lines(result, RATES)[0] == "float32: 0.10 GFLOP and 1.0 MB at the least, 100.00 ms here"


def test_a_column_that_says_nothing_of_any_arm_is_left_out():
    heads = report.markdown(comparison(timing("base", 1.0, baseline=True)), RATES).splitlines()[0]
    assert heads == "| arm | first call, s | median, s | quartiles, s | ratio (95 %) | time |"
    heads = report.markdown(comparison(timing("base", 1.0, baseline=True, memory=2 * 10**6)), RATES).splitlines()[0]
    assert heads.endswith("| peak, MB |")


@pytest.mark.parametrize("seconds, shown", [(2.0, "s"), (0.5, "ms"), (1e-4, "us"), (1e-8, "us")])
def test_times_are_in_the_unit_of_which_the_reference_takes_at_least_one(seconds, shown):
    assert f"| median, {shown} |" in report.markdown(comparison(timing("base", seconds, baseline=True)), RATES)


def test_every_row_of_a_table_has_as_many_cells_as_its_head():
    missing = [measure.Missing("theirs", "failed: a | b", True)]
    lines = report.markdown(comparison(timing("base", 1.0, baseline=True), missing=missing), RATES).splitlines()
    assert lines[-1].startswith(r"| theirs: failed: a \| b |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_a_long_reason_does_not_widen_the_columns_of_the_terminals_table():
    missing = [measure.Missing("theirs", "failed: " + "x" * 150, True)]
    short, long = (
        report.text(comparison(timing("base", 1.0, baseline=True), missing=one), RATES) for one in ([], missing)
    )
    assert long == f"{short}\ntheirs: {missing[0].reason}"


def test_bars_and_curves_are_drawn_for_many_arms_in_many_cases(tmp_path):
    cases = [
        comparison(
            timing("base", 1.0, baseline=True),
            *(timing(f"an arm of a rather long name, number {n}", 0.3 * 1.3**n, memory=n) for n in range(20)),
            name=f"B={2**number}",
            missing=[measure.Missing("theirs", "not installed: No module named 'theirs'", False)],
            axis=measure.Axis("B", 2**number),
        )
        for number in range(7)
    ]
    drawn = plots.draw("planted", cases, tmp_path / "planted.json")
    assert [path.name for path in drawn] == ["planted-bars.png", "planted-B.png"]
    assert all((size(path) < 2500).all() for path in drawn)


def test_a_single_arm_and_cases_of_other_arms_are_drawn(tmp_path):
    cases = [
        comparison(timing("base", 1.0, baseline=True)),
        comparison(timing("base", 1.0, baseline=True), timing("other", 1e-4), name="B"),
    ]
    [path] = plots.draw("planted", cases, tmp_path / "planted.json")
    assert size(path).all()


def test_no_curve_is_drawn_through_a_single_point(tmp_path):
    drawn = plots.draw("planted", curve(time=1, values=(16,)), tmp_path / "planted.json")
    assert [path.name for path in drawn] == ["planted-bars.png"]


def test_a_readme_table_is_made_from_the_case_of_a_result(tmp_path):
    first, second = (
        comparison(timing("base", 1.0, baseline=True)),
        comparison(timing("other", 2.0, baseline=True), name="clipped, B=64"),
    )
    write(tmp_path, first, second)
    text = "a\n<!-- table planted/clipped, B=64 -->\nold\n<!-- end -->\nb\n<!-- table planted/A -->\n<!-- end -->\nc"
    expected = (
        f"a\n<!-- table planted/clipped, B=64 -->\n{report.markdown(second, RATES)}\n<!-- end -->\n"
        f"b\n<!-- table planted/A -->\n{report.markdown(first, RATES)}\n<!-- end -->\nc"
    )
    assert readme.with_tables(text, tmp_path) == expected
    assert readme.with_tables(expected, tmp_path) == expected


def test_a_readme_table_may_be_of_exponents_or_of_a_questions_conclusion(tmp_path, monkeypatch):
    cases = curve(time=2)
    write(tmp_path, *cases)
    question = measure.Question("planted", "", lambda setup: iter(()), lambda found: f"{len(found)} cases")
    monkeypatch.setattr(questions, "load", {"planted": question}.__getitem__)
    text = "<!-- table planted/exponents -->\n<!-- end --><!-- table planted/conclusion -->\n<!-- end -->"
    made = readme.with_tables(text, tmp_path)
    assert report.exponent_table(cases) in made
    assert "\n4 cases\n" in made


def test_a_readme_table_without_its_result_or_case_is_an_error_that_names_it(tmp_path):
    write(tmp_path, comparison(timing("base", 1.0, baseline=True)))
    with pytest.raises(ValueError, match=r"Found none in .*nothing\.json"):
        readme.with_tables("<!-- table nothing/A -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match=r"of a case of .*planted\.json. Found 'C', not in \['A'\]"):
        readme.with_tables("<!-- table planted/C -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize("page", readme.PAGES, ids=lambda page: page.parent.name)
def test_the_tables_of_a_page_are_those_of_the_committed_results(page):
    text = page.read_text(encoding="utf-8")
    assert readme.with_tables(text) == text
    assert len(re.findall("<!-- table", text)) == len(re.findall("<!-- table [^/\n]+/[^/\n]+ -->\n", text))


def test_every_committed_result_has_a_table_on_the_page_of_measurements():
    shown = set(re.findall("<!-- table ([^/\n]+)/", readme.PAGE.read_text(encoding="utf-8")))
    assert {path.stem for path in results.RESULTS.glob("*.json")} == shown


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_committed_picture_is_drawn_from_the_committed_results(name):
    numbers = pictures.PICTURES[name].numbers(results.RESULTS)
    assert pictures.digest_of(results.RESULTS / name) == pictures.digest(numbers)
    assert f"(results/{name})" in readme.PAGE.read_text(encoding="utf-8")


def test_a_picture_is_drawn_and_carries_the_digest_of_its_numbers(tmp_path, monkeypatch):
    def numbers(folder):
        return {"here": {"1": [1.0, 2.0]}, "published": {"theirs": [[1.0, 98.0 if folder == tmp_path else 97.0]]}}

    picture = pictures.PICTURES["frontier.png"]._replace(numbers=numbers)
    monkeypatch.setattr(pictures, "PICTURES", {"planted.png": picture})
    [path] = pictures.write(tmp_path, tmp_path)
    assert size(path).all()
    assert (
        pictures.digest_of(path) == pictures.digest(numbers(tmp_path)) != pictures.digest(numbers(tmp_path / "other"))
    )


def committed():
    """The names of the committed results, apart from those of studies."""
    names = sorted(path.name for path in results.RESULTS.glob("*.json"))
    return [name for name in names if not name.startswith(studies.PREFIX)]


@pytest.mark.parametrize("name", committed())
def test_every_committed_result_holds_its_samples(name):
    comparisons, rates = results.read(results.RESULTS / name)
    assert comparisons
    for one in comparisons:
        assert len({len(timing.samples) for timing in one.timings}) == 1
        assert one.reference.samples
        assert one.reference.name in report.markdown(one, rates)


def test_a_sum_over_processes_takes_latency_and_bytes():
    constants = processes.Constants(latency=1e-3, bandwidth=1e6)
    assert constants.seconds(4, 1000) == pytest.approx(2 * 1e-3 + 1.5 * 4000 / 1e6)
    comparisons, _ = results.read(results.RESULTS / "processes-2-cores.json")
    found = {comparison.case: comparison for comparison in comparisons}
    for size, one in processes.constants(found).items():
        small, large = (timing.median / 10 for timing in found[f"sums, P={size}"].timings)
        assert one.seconds(size, 1) == pytest.approx(small, rel=1e-3)
        assert one.seconds(size, found["sums, P=2"].settings["numbers"]) == pytest.approx(large)
