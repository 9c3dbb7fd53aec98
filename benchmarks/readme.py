"""Writes the tables and pictures of the pages from committed results.

    python -m benchmarks.readme

A table stands between `<!-- table FILE/CASE -->` and `<!-- end -->`: that case of `benchmarks/results/FILE.json`. For
CASE may stand `exponents`, how costs grow along what was varied, or `conclusion`, what all cases together show. Of a
study it is the table's title.
"""

import json
import re
from pathlib import Path
from typing import TypeVar

from . import pictures, questions, report, results, studies

T = TypeVar("T")

PAGE = Path(__file__).parent / "README.md"
"""The page of all measurements."""
PAGES = (PAGE, Path(__file__).parent.parent / "README.md")
_TABLE = re.compile(r"(<!-- table ([^/\n]+)/([^/\n]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str, folder: Path = results.RESULTS) -> str:
    """A page's text, each table made again from its result.

    Raises:
        ValueError: the folder has no such result, or the result no such case.
    """
    return _TABLE.sub(lambda found: f"{found[1]}{_table(folder / f'{found[2]}.json', found[3])}\n{found[4]}", text)


def _table(path: Path, case: str) -> str:
    if not path.is_file():
        raise ValueError(f"{PAGE.name}: a table must be of a committed result. Found none in {path}.")
    if path.stem.startswith(studies.PREFIX):
        record = json.loads(path.read_text(encoding="utf-8"))
        return _named(studies.load(record["study"]).table(record), case, path)
    comparisons, rates = results.read(path)
    if case == "exponents":
        return report.exponent_table(comparisons)
    if case == "conclusion":
        return questions.load(json.loads(path.read_text(encoding="utf-8"))["question"]).conclude(comparisons)
    return report.markdown(_named({comparison.case: comparison for comparison in comparisons}, case, path), rates)


def _named(found: dict[str, T], case: str, path: Path) -> T:
    if case not in found:
        raise ValueError(f"{PAGE.name}: a table must be of a case of {path}. Found {case!r}, not in {sorted(found)}.")
    return found[case]


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    pictures.write(results.RESULTS)
