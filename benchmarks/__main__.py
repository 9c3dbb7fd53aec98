"""What functional training and per-sample gradients cost on this machine, question by question.

    python -m benchmarks --list
    python -m benchmarks --only step per_sample/clipped --quick

Each question writes one JSON file of its results, a table to the terminal and pictures.
"""

import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from . import command, limits, measure, peak, plots, questions, report, results


def main() -> int:
    parser = command.Parser("python -m benchmarks", __doc__)
    parser.add_argument("--list", action="store_true", help="say what there is to measure, and end")
    parser.add_argument("--only", nargs="+", metavar="QUESTION[/CASE]", help="these alone; CASE is the start of a name")
    parser.add_argument("--out", type=Path, default=results.RESULTS, metavar="FOLDER", help="where results are added")
    command.add_setup(parser)
    options = parser.parse_args()
    wanted: dict[str, list[str]] = {}
    for one in options.only or questions.NAMES:
        name, _, start = one.partition("/")
        wanted.setdefault(name, []).append(start)
    unknown = sorted(set(wanted) - set(questions.NAMES))
    if unknown:
        parser.error(f"no question is named {', '.join(unknown)}. There are {', '.join(questions.NAMES)}.")
    if options.list:
        for name in wanted:
            print(f"{name:<{max(map(len, wanted))}}  {questions.load(name).asks}")
        return 0
    setup = command.setup(parser, options)
    for name, starts in wanted.items():
        names = [case.name for case in questions.load(name).cases(setup)] if any(starts) else []
        for start in starts:
            if start and not any(case.startswith(start) for case in names):
                parser.error(f"no case of {name} begins with {start!r}. There are {'; '.join(names)}.")
    found: list[results.Result] = []
    try:
        faults = _answer_all(wanted, setup, options.out, found)
    except KeyboardInterrupt:
        written = ", ".join(str(result.path) for result in found if result.path)
        print(f"Stopped. Results so far: {written or 'none'}", file=sys.stderr)
        return 130
    return 1 if faults else 0


def _answer_all(wanted: dict[str, list[str]], setup: measure.Setup, folder: Path, found: list[results.Result]) -> int:
    """Measures the cases that begin as wanted, by question; gives how many arms were refused, and adds to `found`."""
    rates = limits.rates(setup.device)
    print(report.rate_line(rates), flush=True)
    machine, faults = {**results.machine(), "rates": rates._asdict()}, 0
    for name, starts in wanted.items():
        question = questions.load(name)
        result = results.Result(name, setup, machine, folder)
        found.append(result)
        for case in question.cases(setup):
            if case.name.startswith(tuple(starts)):
                faults += _answer(question, case, setup, rates, result)
        if result.path:
            _conclude(question, result.comparisons, result.path)
    return faults


def _answer(
    question: measure.Question, case: measure.Case, setup: measure.Setup, rates: limits.Rates, result: results.Result
) -> int:
    """Measures one case, adds it to the result and shows it; gives how many arms were refused."""
    with tqdm(total=measure.calls(case), desc=f"{question.name} {case.name}", leave=False, disable=None) as bar:

        def progress(line: str) -> None:
            bar.set_postfix_str(line[:60], refresh=False)
            bar.update()

        try:
            comparison = measure.compare(case, setup, progress=progress)
        except RuntimeError as error:  # nothing to compare with; the other cases continue
            print(f"{question.name}, {error}", file=sys.stderr)
            return 1
    if case.memory and not setup.quick:
        comparison = _with_memory(question, comparison, setup)
    result.add(comparison)
    print(f"\n{question.name}, {case.name}\n\n{report.text(comparison, rates)}")
    for line in report.limit_lines(comparison, rates):
        print(line)
    sys.stdout.flush()
    return sum(one.refused for one in comparison.missing)


def _with_memory(
    question: measure.Question, comparison: measure.Comparison, setup: measure.Setup
) -> measure.Comparison:
    """The comparison with the peak memory of each arm, one process after another."""
    timings = []
    for timing in tqdm(
        comparison.timings, desc=f"{question.name} {comparison.case}, memory", leave=False, disable=None
    ):
        try:
            timings.append(
                replace(timing, memory=peak.in_own_process(question.name, comparison.case, timing.name, setup))
            )
        except RuntimeError as error:
            print(f"Peak memory is not known of {error}", file=sys.stderr)
            timings.append(timing)
    return replace(comparison, timings=timings)


def _conclude(question: measure.Question, comparisons: list[measure.Comparison], path: Path) -> None:
    """Prints what all cases of a question show together, and where it was written."""
    for table in (report.exponent_table(comparisons), question.conclude(comparisons)):
        if table:
            print(f"\n{table}")
    for written in (path, *plots.draw(question.name, comparisons, path)):
        print(f"Written to {written}")


if __name__ == "__main__":
    sys.exit(main())
