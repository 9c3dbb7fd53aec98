"""`train --private`: what it prints, what it writes, what it refuses, and how it goes on."""

import json

import pytest
import torch
from shell import TRAIN, ask, complain, part, succeed, write_idx

import functorch_mnist as fm
from functorch_mnist import commands, privacy

PRIVATE = (
    "--private", "--noise-multiplier", "1.0", "--model", "linear", "--epochs", "2", "--batch-size", "32",
    "--momentum", "0", "--save-every", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(data_dir, tmp_path_factory):
    """A finished private run of 16 steps, and what it printed."""
    folder = tmp_path_factory.mktemp("private") / "run"
    return folder, succeed("train", "--data-dir", data_dir, *PRIVATE, "--out", folder)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_mistake_12_the_summary_says_what_was_spent_by_which_accountant_and_what_is_not_private(run):
    folder, out = run
    spent = privacy.epsilon(privacy.Poisson(32 / TRAIN, 1.0), steps=16, delta=1e-5)
    assert f"Privacy spent in 16 steps: ε = {spent:.3f} at δ = 1e-05, by the privacy loss distribution" in out
    assert "one example added or removed" in out
    assert "Poisson, each example with a chance of 0.125" in out
    assert "Not private" in out
    assert "losses shown" in out
    (record,) = [r for r in metrics(folder) if r["kind"] == "privacy"]
    assert record["epsilon"] == spent
    assert record["private"] is True
    lines = [r["epsilon"] for r in metrics(folder) if r["kind"] == "epoch"]
    assert lines == sorted(lines)
    assert lines[-1] == spent


def test_each_checkpoint_holds_the_ledger_of_its_own_step(run):
    folder, _ = run
    for path in fm.checkpoint.steps(folder / "checkpoints"):
        manifest = fm.checkpoint.read_manifest(path)
        ledger = privacy.Ledger.from_json(manifest["config"]["ledger"])
        mechanism = privacy.Poisson(32 / TRAIN, 1.0)
        entry = privacy.Entry(mechanism, "Flat(max_norm=1.0)", f"mnist, {TRAIN} images", manifest["step"])
        assert ledger == privacy.Ledger((entry,))


def test_a_budget_is_spent_and_not_overspent(data_dir, tmp_path):
    out = succeed(
        "train", "--data-dir", data_dir, "--private", "--epsilon", "3", "--model", "linear", "--batch-size", "32",
        "--epochs", "1", "--out", tmp_path / "run",
    )  # fmt: skip
    (record,) = [r for r in metrics(tmp_path / "run") if r["kind"] == "privacy"]
    assert 2.98 < record["epsilon"] <= 3
    assert f"ε = {record['epsilon']:.3f}" in out


def test_mistake_1_a_shuffled_run_is_accounted_without_amplification(data_dir, tmp_path):
    out = succeed("train", "--data-dir", data_dir, *PRIVATE, "--sampling", "shuffled", "--out", tmp_path / "run")
    spent = privacy.epsilon(privacy.Shuffled(8, 1.0), steps=16, delta=1e-5, accountant="gaussian")
    assert f"ε = {spent:.3f}" in out
    assert "without amplification" in out
    assert "replaced by one without gradient" in out
    assert spent > 1.5 * privacy.epsilon(privacy.Poisson(32 / TRAIN, 1.0), steps=16, delta=1e-5)
    assert "has no effect with --sampling shuffled" in complain(
        2, "train", *PRIVATE, "--sampling", "shuffled", "--accountant", "rdp"
    )


def test_mistake_8_two_private_runs_of_one_seed_differ_and_a_reproduction_says_that_it_is_not_private(
    data_dir, tmp_path
):
    def params(name, *more):
        out = succeed("train", "--data-dir", data_dir, *PRIVATE, *more, "--out", tmp_path / name)
        return commands.restore.trained(tmp_path / name, torch.device("cpu")).params["0.weight"], out

    one, out = params("a")
    assert "NOT PRIVATE" not in out
    assert not torch.equal(one, params("b")[0])
    first, out = params("c", "--noise-seed", "5")
    assert "NOT PRIVATE: sampling and noise are those of --noise-seed 5" in out
    assert torch.equal(first, params("d", "--noise-seed", "5")[0])
    assert [r["private"] for r in metrics(tmp_path / "c") if r["kind"] == "privacy"] == [False]


def test_no_file_of_a_run_holds_its_secret(data_dir, tmp_path, monkeypatch):
    made = []

    class Spied(privacy.Secret):
        def __init__(self, seed=None):
            super().__init__(seed)
            made.append(self)

    monkeypatch.setattr(privacy, "Secret", Spied)
    out = succeed("train", "--data-dir", data_dir, *PRIVATE, "--out", tmp_path / "run")
    (secret,) = made
    assert not secret.reproduction
    keys = [secret.key(), *fm.random.split(secret.key(), 3)]
    texts = [str(secret._seed), *(word for key in keys for word in (str(key.tolist()), *map(str, key.tolist())))]
    raw = [key.numpy().tobytes() for key in keys]
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(bytes_ in content for bytes_ in raw)
            assert not any(text.encode() in content for text in texts)
    assert not any(text in out for text in texts)


def test_a_stopped_run_goes_on_with_the_account_exactly_where_it_was(data_dir, tmp_path):
    whole, half = tmp_path / "whole", tmp_path / "half"
    same = ("--data-dir", data_dir, *PRIVATE, "--noise-seed", "5")
    succeed("train", *same, "--out", whole)
    succeed("train", *same, "--epochs", "1", "--out", half)
    assert "Resuming after step 8" in succeed("train", "--resume", half, "--epochs", "2")
    last = [[r for r in metrics(folder) if r["kind"] == "privacy"][-1] for folder in (whole, half)]
    assert last[0] == last[1]
    device = torch.device("cpu")
    found = [commands.restore.trained(folder, device).params for folder in (whole, half)]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--noise-multiplier", "2.0"), "keeps its --noise-multiplier"),
        (("--batch-size", "16"), "keeps its --batch-size"),
        (("--clip-norm", "2.0"), "keeps its --clip-norm"),
        (("--clipping", "automatic"), "keeps its --clipping"),
        (("--sampling", "shuffled"), "keeps its --sampling"),
    ],
)
def test_mistake_10_another_rate_noise_clip_or_sampling_is_refused_on_resume(run, options, word):
    assert word in complain(2, "train", "--resume", run[0], *options)


def test_a_resume_with_other_data_is_refused_though_its_pixels_have_the_same_statistics(run, mnist, tmp_path):
    tiny = part(mnist, TRAIN, 64)
    labels = tiny.train.labels.clone()
    labels[0] = (labels[0] + 1) % 10
    other = fm.data.Dataset(fm.data.Split(tiny.train.images, labels), tiny.test, 10)
    folder = write_idx(tmp_path / "other", other)
    before = metrics(run[0])
    line = complain(2, "train", "--resume", run[0], "--epochs", "3", "--data-dir", folder)
    assert "the data that its account is of" in line or "clipping and data that its account is of" in line
    assert metrics(run[0]) == before


def test_a_budget_does_not_stretch_to_more_epochs(data_dir, tmp_path):
    succeed(
        "train", "--data-dir", data_dir, "--private", "--epsilon", "3", "--model", "linear", "--batch-size", "32",
        "--epochs", "1", "--out", tmp_path / "run",
    )  # fmt: skip
    assert "Found mechanism" in complain(2, "train", "--resume", tmp_path / "run", "--epochs", "2")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--private",), "needs one of --epsilon and --noise-multiplier. Found neither"),
        (("--private", "--epsilon", "1", "--noise-multiplier", "1"), "Found both"),
        (("--epsilon", "1"), "--epsilon has no effect without --private"),
        (("--clip-norm", "2"), "--clip-norm has no effect without --private"),
        (("--private", "--epsilon", "nan"), "--epsilon must be"),  # mistake 11
        (("--private", "--epsilon", "inf"), "--epsilon must be"),
        (("--private", "--epsilon", "-1"), "--epsilon must be"),
        (("--private", "--noise-multiplier", "0"), "--noise-multiplier must be"),
        (("--private", "--epsilon", "1", "--delta", "0"), "--delta must be"),
        (("--private", "--epsilon", "1", "--delta", "1"), "--delta must be"),
        (("--private", "--epsilon", "1", "--clip-norm", "inf"), "--clip-norm must be"),
        (("--private", "--epsilon", "1", "--watch", "norms"), "which --private must not"),  # mistake 12
        (("--max-shift", "3"), "--max-shift has no effect without --augment-multiplicity"),
        (
            ("--model", "scattering", "--augment-multiplicity", "2"),
            "--augment-multiplicity has no effect with --model scattering",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(options, word):
    assert word in complain(2, "train", *options)


def test_noise_too_small_for_the_votes_of_a_quantile_is_told(data_dir, tmp_path):
    line = complain(
        2, "train", "--data-dir", data_dir, *PRIVATE, "--clipping", "quantile", "--batch-size", "8",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert "the votes alone would cost more" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rule", ["automatic", "global", "per-layer", "quantile"])
def test_every_rule_trains_and_its_run_can_be_evaluated(rule, data_dir, tmp_path):
    run = tmp_path / "run"
    more = ("--ema-decay", "0.9", "--augment-multiplicity", "2") if rule == "quantile" else ()
    succeed("train", "--data-dir", data_dir, *PRIVATE, "--model", "small-cnn", "--clipping", rule, *more, "--out", run)
    assert "%" in succeed("evaluate", run, "--data-dir", data_dir)


def test_scattering_features_train_and_evaluate_alike(data_dir, tmp_path):
    run = tmp_path / "run"
    out = succeed("train", "--data-dir", data_dir, *PRIVATE, "--model", "scattering", "--lr", "5", "--out", run)
    accuracy = out.split("test images: ")[1].split("%")[0]
    assert f"{accuracy}%" in succeed("evaluate", run, "--data-dir", data_dir)


def test_an_averaged_run_is_tested_at_the_average(data_dir, tmp_path):
    run = tmp_path / "run"
    succeed(
        "train", "--data-dir", data_dir, "--model", "linear", "--ema-decay", "0.9", "--batch-size", "32", "--out", run
    )
    found = commands.restore.trained(run, torch.device("cpu"))
    template = commands.build.start(
        found.begun.options, found.made, commands.build.optimizer(found.begun.options, 8), torch.device("cpu")
    )
    state = fm.checkpoint.latest(run / "checkpoints", template)[0].state.state
    assert torch.equal(found.params["0.weight"], state.optimizer.average["0.weight"])
    assert not torch.equal(found.params["0.weight"], state.params["0.weight"])


def broken_off(step, monkeypatch, *command):
    """Ctrl-C in a command after so many steps."""

    def stop(self, progress):
        if progress.step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(commands.callbacks.Reporter, "__call__", stop)
        assert ask(*command).status == 130


@pytest.mark.parametrize(
    ("noise", "more", "mechanism"),
    [
        ("banded:4", (), privacy.BandMF(32 / TRAIN, 1.0, 4, 16)),
        ("bisr:3", ("--sampling", "shuffled"), privacy.FixedOrder(8, 1.0, "bisr", 3)),
        ("cgd:0.5", ("--sampling", "shuffled"), privacy.FixedOrder(8, 1.0, "cgd", 0.5)),
    ],
)
def test_correlated_noise_is_accounted_and_goes_on_exactly(noise, more, mechanism, data_dir, tmp_path, monkeypatch):
    same = ("--data-dir", data_dir, *PRIVATE, "--noise", noise, *more, "--noise-seed", "5")
    whole, half = tmp_path / "whole", tmp_path / "half"
    out = succeed("train", *same, "--out", whole)
    by = "gaussian" if more else "pld"
    spent = privacy.epsilon(mechanism, steps=16, delta=1e-5, accountant=by)
    assert f"these 16 steps would spend ε = {spent:.3f}" in out
    assert "correlated" in out
    told = succeed("account", "--noise", noise, *more, "--examples", TRAIN, "--batch-size", 32, "--steps", 16,
                   "--noise-multiplier", 1)  # fmt: skip
    assert f"ε = {spent:.4g} at" in told
    broken_off(7, monkeypatch, "train", *same, "--out", half)
    succeed("train", "--resume", half)
    found = [commands.restore.trained(folder, torch.device("cpu")).params["0.weight"] for folder in (whole, half)]
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--noise", "banded"), "--noise must be independent, or like banded:8"),
        (("--noise", "pink:3"), "--noise must be independent"),
        (("--noise", "banded:4", "--sampling", "shuffled"), "--noise banded takes Poisson sampling"),
        (("--noise", "bisr:4"), "Add --sampling shuffled"),
        (("--noise", "banded:65"), "from 1 to 64 bands"),
        (("--noise", "cgd:1", "--sampling", "shuffled"), "below 1"),
        (("--noise", "banded:8.5"), "--noise must be"),
    ],
)
def test_noise_that_means_nothing_is_refused_in_one_line(options, word):
    assert word in complain(2, "train", *PRIVATE, *options)
    assert word in complain(2, "account", "--noise-multiplier", "1", "--epochs", "1", *options)
    assert "--noise has no effect without --private" in complain(2, "train", "--noise", "banded:8")


def test_more_bands_than_batches_is_told(data_dir, tmp_path):
    line = complain(2, "train", "--data-dir", data_dir, *PRIVATE, "--noise", "banded:9", "--out", tmp_path / "run")
    assert "bands must be at most 1 / rate" in line
    assert not (tmp_path / "run").exists()


AUDITED = ("--private", "--epsilon", "4", "--model", "linear", "--epochs", "4", "--batch-size", "128",
           "--momentum", "0", "--audit", "400", "--save-every", "3")  # fmt: skip


def test_an_audited_run_prints_a_lower_bound_beside_epsilon_and_saves_the_model_alone(data_dir, tmp_path):
    run = tmp_path / "run"
    out = succeed("train", "--data-dir", data_dir, *AUDITED, "--out", run)
    assert "Audit of this run with 400 canaries: at a confidence of 95 % ε is at least" in out
    assert "ACCOUNTED" not in out
    (record,) = [r for r in metrics(run) if r["kind"] == "privacy"]
    assert 0.3 * 4 < record["audit"]["independent"] < record["epsilon"] <= 4
    assert record["audit"]["epsilon"] <= record["audit"]["gaussian"]
    assert record["data"] == f"mnist, {TRAIN} images, 400 canaries"
    found = commands.restore.trained(run, torch.device("cpu")).params
    assert set(found) == {"0.weight", "0.bias"}
    assert "%" in succeed("evaluate", run, "--data-dir", data_dir)


def test_an_audited_run_that_goes_on_has_the_scores_of_its_whole(data_dir, tmp_path, monkeypatch):
    same = ("--data-dir", data_dir, *AUDITED, "--noise-seed", "5")
    whole, half = tmp_path / "whole", tmp_path / "half"
    succeed("train", *same, "--out", whole)
    broken_off(5, monkeypatch, "train", *same, "--out", half)
    succeed("train", "--resume", half)
    one, other = [[r for r in metrics(folder) if r["kind"] == "privacy"][-1] for folder in (whole, half)]
    assert one["audit"] == other["audit"]


def test_a_fault_in_what_runs_is_told_by_the_audit(data_dir, tmp_path, monkeypatch):
    def less(*args, noise_multiplier, **kwargs):
        return privacy.noisy_mean(*args, noise_multiplier=noise_multiplier / 4, **kwargs)

    monkeypatch.setattr("functorch_mnist.train.private.noisy_mean", less)
    out = succeed("train", "--data-dir", data_dir, *AUDITED, "--out", tmp_path / "run")
    assert "THIS IS MORE THAN THE" in out


def test_an_audit_that_cannot_be_is_refused_before_anything_is_written(data_dir, tmp_path):
    run = tmp_path / "run"
    line = complain(2, "train", "--data-dir", data_dir, *AUDITED, "--clipping", "quantile", "--out", run)
    assert "--audit needs a clipping norm that stays" in line
    assert not run.exists()
    assert "--audit must be 0, or from 20 to 100000" in complain(2, "train", *AUDITED, "--audit", "3")
    assert "--audit has no effect without --private" in complain(2, "train", "--audit", "100")


def test_ctrl_c_in_a_private_run_tells_how_to_go_on(data_dir, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.callbacks.Reporter, "__call__", stop)
    answer = ask("train", "--data-dir", data_dir, *PRIVATE, "--out", tmp_path / "run")
    assert answer.status == 130
    assert "--resume" in answer.err
