"""`account`: what it finds, prints, draws and refuses."""

import pytest
from shell import complain, succeed

from functorch_mnist import privacy


def rows(out):
    """The lines of the table, as numbers."""
    lines = [line.split() for line in out.splitlines() if line[:14].strip().replace(",", "").isdigit()]
    return [[float(word.replace(",", "")) for word in line] for line in lines]


def test_the_spent_epsilon_is_told_by_all_accountants():
    out = succeed("account", "--noise-multiplier", "1.1", "--epochs", "60", "--batch-size", "240")
    assert "each of 60,000 examples with a chance of 0.004 in each step" in out
    assert "one example added or removed" in out
    assert "ε = 2.305 at δ = 1e-05, by the privacy loss distribution of dp-accounting" in out
    table = rows(out)
    assert len(table) == 10
    assert table[-1] == [15_000, 60, 2.905, 2.503, 2.305]
    assert [row[0] for row in table] == [1500 * i for i in range(1, 11)]


def test_the_noise_for_a_budget_is_the_calibrated_one():
    out = succeed("account", "--epsilon", "2", "--steps", "100", "--batch-size", "600", "--accountant", "rdp")
    sigma = privacy.calibrated(
        lambda sigma: privacy.Poisson(0.01, sigma), budget=2, delta=1e-5, steps=100, accountant="rdp"
    )
    assert f"Least noise multiplier for ε = 2: {sigma:g}" in out
    assert "by the Rényi accountant, improved conversion" in out


def test_the_steps_for_a_budget_are_the_most():
    out = succeed("account", "--epsilon", "1", "--noise-multiplier", "2", "--batch-size", "600", "--delta", "1e-6")
    most = privacy.max_steps(privacy.Poisson(0.01, 2.0), budget=1, delta=1e-6)
    assert f"Most steps for ε = 1: {most:,}, {most / 100:,.4g} epochs" in out
    assert rows(out)[-1][0] == most


def test_mistake_1_shuffled_batches_have_one_column_and_no_amplification():
    out = succeed("account", "--noise-multiplier", "1", "--epochs", "4", "--sampling", "shuffled")
    spent = privacy.epsilon(privacy.Shuffled(234, 1.0), steps=4 * 234, delta=1e-5, accountant="gaussian")
    assert "without amplification" in out
    assert f"ε = {spent:.4g} at δ = 1e-05, by the exact account" in out
    assert {len(row) for row in rows(out)} == {3}


def test_the_picture_is_written(tmp_path):
    png = tmp_path / "spent.png"
    out = succeed("account", "--noise-multiplier", "2", "--steps", "3", "--png", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert f"drawn into {png}" in out
    assert len(rows(out)) == 3


def test_steps_without_end_and_little_privacy_are_found_in_seconds():
    out = succeed("account", "--epsilon", "5", "--noise-multiplier", "5000", "--batch-size", "1")
    assert "100,000,000 or more" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "takes two of"),
        (("--epsilon", "1"), "takes two of"),
        (("--epsilon", "1", "--epochs", "1", "--noise-multiplier", "1"), "Found 3 of them"),
        (("--epochs", "1", "--steps", "1", "--epsilon", "1"), "one of --epochs and --steps"),
        (("--epsilon", "nan", "--epochs", "1"), "--epsilon must be"),
        (("--epsilon", "inf", "--epochs", "1"), "--epsilon must be"),
        (("--epsilon", "1", "--noise-multiplier", "-1"), "--noise-multiplier must be"),
        (("--epsilon", "1", "--epochs", "0"), "--epochs must be"),
        (("--epsilon", "1", "--epochs", "1", "--delta", "1"), "--delta must be"),
        (("--epsilon", "1", "--epochs", "1", "--batch-size", "70000"), "at most --examples"),
        (("--epsilon", "1", "--steps", "100000001"), "from 1 to 100,000,000"),
        (("--epsilon", "0.001", "--noise-multiplier", "0.3"), "must be enough for one step"),
        (("--epochs", "1", "--noise-multiplier", "1", "--sampling", "shuffled", "--accountant", "rdp"), "no effect"),
        (
            ("--epochs", "1", "--noise-multiplier", "1", "--png", "/nowhere/at/all.png"),
            "--png must be a file in a folder that is there",
        ),
        (("--epochs", "1", "--noise-multiplier", "1", "--png", "all.what"), "what"),
    ],
)
def test_what_means_nothing_is_told_in_one_line(options, words):
    assert words in complain(2, "account", *options)
