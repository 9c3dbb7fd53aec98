"""Writes the tables of the README from committed results.

    python -m benchmarks.readme

In the README a table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME.json is in `benchmarks/results`.
"""

import re
from pathlib import Path

from . import measure

README = Path(__file__).parent.parent / "README.md"
_TABLE = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The README's text, each table made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}{_table(found[2])}\n{found[3]}", text)


def _table(name: str) -> str:
    return measure.table(measure.read(measure.RESULTS / f"{name}.json"))


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
