"""Benchmarks: one harness, one script per question, one command: `python -m benchmarks`.

| file | concern |
|---|---|
| `measure.py` | the harness: arms that agree, timed in interleaved rounds |
| `results.py`, `report.py`, `plots.py` | files, tables, pictures of a result |
| `readme.py`, `pictures.py` | the tables and the pictures of the pages |
| `limits.py`, `peak.py` | the least that work takes and the most that a machine does; peak memory |
| `command.py`, `__main__.py`, `questions.py` | the options of each command; the one command; the questions' names |
| `networks.py`, `problems.py` | what is trained: modules, weights and batches |
| `recipes.py`, `subjects.py` | modules as they are, of others' packages too, and the works on them |
| `steps.py`, `quantities.py`, `peers.py` | the works: this library's, a module's, others' |
| `definitions.py` | what the works must equal |
| `article.py`, `programs.py` | whole programs as works |
| the others | a question each, see `python -m benchmarks --list` |
"""
