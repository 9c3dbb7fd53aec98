"""The study of attribution graded by ground truth, in tiny sizes."""

import json

import pytest

from benchmarks import results
from benchmarks.studies import ground_truth

TINY = ground_truth.Settings(
    seeds=2, train=40, test=6, left_out=10, side=7, hidden=6, batch_size=20, steps=12, checkpoints=3, models=2,
    features=(9,), dampings=(1e-2, 1.0), lengths=(2, 12), parts=(1.0, 1e-6), in_part=4,
)  # fmt: skip
KINDS = ("logistic regression", "MLP with tanh", "MLP with ReLU")


@pytest.fixture(scope="module")
def reported():
    return []


@pytest.fixture(scope="module")
def record(reported):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ground_truth, "QUICK", TINY)
        return ground_truth.run(quick=True, progress=reported.append)


def grades(record, method, truth):
    """By model and seed; of the largest damping."""
    rows = [row for row in record["grades"] if row["method"] == method and row["truth"] == truth]
    return {(row["model"], row["seed"]): row["mean"] for row in rows}


def test_a_record_is_json_and_its_tables_are_made_from_that_alone(record, reported):
    text = json.dumps(record, allow_nan=False)
    assert reported == [f"{kind}, seed {seed}" for seed in range(2) for kind in KINDS]
    tables = ground_truth.table(json.loads(text))
    assert tables == ground_truth.table(record)
    for kind in KINDS:
        assert f"| {ground_truth.TRACIN} |" in tables[f"{kind}, grades"]
    for table in tables.values():
        heads, rule, *rows = table.splitlines()
        assert rows
        assert {line.count("|") for line in (heads, rule, *rows)} == {heads.count("|")}


@pytest.mark.parametrize("truth", ground_truth.TRUTHS)
def test_of_a_short_run_tracin_is_near_the_truth_and_random_numbers_are_not(record, truth):
    control, tracin = (grades(record, method, truth) for method in (ground_truth.RANDOM, ground_truth.TRACIN))
    assert tracin.keys() == control.keys() == {(kind, seed) for kind in KINDS for seed in range(2)}
    assert min(tracin.values()) > 0.5
    assert abs(sum(control.values())) / len(control) < 0.2
    assert abs(sum(control.values())) < sum(tracin.values()) / 3


def test_with_a_large_damping_every_form_of_the_fisher_information_grades_as_the_gradient_dot(record):
    dot = grades(record, ground_truth.DOT, ground_truth.UNROLLED)
    for method in (ground_truth.EXACT, ground_truth.EMPIRICAL, ground_truth.KRONECKER):
        damped = grades(record, method, ground_truth.UNROLLED)
        for key, grade in dot.items():
            assert abs(damped[key] - grade) < 0.1


def test_a_small_part_of_a_weight_taken_away_is_the_derivative(record):
    found = [row["mean"] for row in record["parts"] if row["part"] == 1e-6]
    assert len(found) == 6
    assert min(found) > 0.999


def test_a_method_is_shown_at_the_damping_of_its_highest_grade_by_the_derivative():
    rows = [
        {"model": "m", "method": "a", "damping": damping, "truth": truth, "mean": mean, "standard_error": 0.3}
        for damping, pair in ((0.1, (0.2, 0.9)), (0.01, (0.4, 0.5)))
        for truth, means in zip(ground_truth.TRUTHS, ((pair[0], pair[0] + 0.2), (pair[1], pair[1])), strict=True)
        for mean in means
    ]
    record = {"grades": rows, "lengths": [], "parts": [], "runs": []}
    line = ground_truth.table(record)["m, grades"].splitlines()[2]
    # two seeds: the error is 0.3 / √2
    assert line == "| a | 0.01 tr | 0.500 ± 0.212 | 0.400 to 0.600 | 0.500 ± 0.212 | 0.500 to 0.500 |"


def test_the_committed_record_renders():
    path = results.RESULTS / "study-ground_truth.json"
    if not path.exists():
        pytest.skip("no record is committed")
    tables = ground_truth.table(json.loads(path.read_text()))
    assert all(f"{kind}, grades" in tables for kind in KINDS)
