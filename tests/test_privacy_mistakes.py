"""Mistakes of private training that were published since 2025, each shown not to be made here.

The twelve before are in `test_privacy.py`, `test_accounting.py` and `test_private_command.py`, by number.

| mistake | of | published |
|---|---|---|
| 13 | an epoch that is shuffled again after a resume counted as one | lerobot 3769 (2026), without privacy |
| 14 | neighbours that differ in the divisor | opacus 819, arXiv 2605.15648 (2026) |
| 15 | "glue" that depends on the data: exact functions of it beside the model | arXiv 2602.17454 (2026) |
| 16 | spending that a restart forgets | NVFlare 4470 (2026) |
| 17 | replaced examples accounted with the sensitivity of added ones | google/differential-privacy 378 (2025) |
| 18 | the account of one direction | arXiv 2405.20769 (2024), opacus 844 (2026) |
| 19 | a rate from the length of a loader; weighted draws accounted as uniform | opacus 813 to 816 (2026) |
| 20 | noise calibrated for the sum and added to the mean | jax-privacy 383 (2026) |
| 21 | skipped chunks of padding that repeat the first one | jax-privacy 223 (2026) |
| 22 | a mean over ignored tokens where a sum was asked for | opacus 792 (2025) |
| 23 | ε below zero, or none, at a large δ | opacus 844 (2026) |
| 24 | "steps" that count settings | opacus 834 (2026) |
| 25 | the best of several runs at the ε of one | arXiv 2402.13087 (NDSS 2026) |
"""

import dataclasses
import json
import math

import pytest
import torch
from shell import TRAIN, complain, part, succeed, write_idx

import functorch_mnist as fm
from functorch_mnist import optim, per_sample, privacy, random, run_folder, train, tree
from functorch_mnist.privacy import Draw, Entry, Event, Flat, Ledger, Poisson, Secret, Shuffled
from functorch_mnist.privacy import pld as plds

DELTA = 1e-5
PRIVATE = (
    "--private", "--noise-multiplier", "1.0", "--model", "linear", "--epochs", "2", "--batch-size", "32",
    "--momentum", "0", "--save-every", "3",
)  # fmt: skip


def linear(w, g, key):
    return w @ g


def moved(step, rows, secret=None):
    """The mean gradient that a step lets out."""
    state = train.init_private_state(torch.zeros(rows.shape[1]), step.optimizer, random.key(0), step.clipping)
    return -step(state, (secret or Secret(1)).roots(), rows)[0].params


FLAT = Flat(1.0)


def made(mechanism, examples, rule=FLAT, **more):
    return train.make_private_step(
        linear, optim.sgd(1.0), clipping=rule, mechanism=mechanism, examples=examples, **more
    )


def test_mistake_13_a_resumed_epoch_of_shuffled_batches_is_counted_again():
    before, after = Secret(1).roots()[0], Secret(2).roots()[0]
    drawn = [
        privacy.draw(Shuffled(10, 1.0), before if step < 5 else after, step=step, population=100).numbers
        for step in range(10)
    ]
    times = torch.cat(drawn).bincount(minlength=100)
    assert times.max() == 2  # some come twice in one epoch
    entry = Entry(Shuffled(10, 1.0), "a", "mnist", 5).resumed(5, seen=5)
    spent = Ledger((dataclasses.replace(entry, steps=10),)).epsilon(delta=DELTA, accountant="gaussian")
    assert spent == privacy.composed([Event(1.0, 1.0, 2)], delta=DELTA, accountant="gaussian")


def test_mistake_14_neighbours_have_the_same_divisor_rate_and_steps():
    rows = torch.eye(6)
    step = made(Poisson(1.0, 0.0), 6)
    beside = rows.clone()
    beside[2] = 0  # an example without gradient: as if it were not there
    assert torch.allclose(moved(step, rows) - moved(step, beside), rows[2] / 6)
    with pytest.raises(ValueError, match="it must get the 6 examples"):
        moved(step, rows[:5])  # whose sums another number would divide
    for mechanism in (Poisson(0.1, 1.0), Poisson(0.1, 1.0, unit="user")):
        assert mechanism.relation.endswith("their number public")


def test_mistake_15_a_checkpoint_of_a_private_run_tells_no_data_set_from_its_neighbour(mnist, tmp_path):
    tiny = part(mnist, TRAIN, 64)
    folders = []
    seed = 7
    drawn = {
        number
        for step in range(16)
        for number in privacy.draw(
            Poisson(32 / TRAIN, 1.0), Secret(seed).roots()[0], step=step, population=TRAIN
        ).numbers.tolist()
    }
    (never, *_) = sorted(set(range(TRAIN)) - drawn)
    for name in ("one", "other"):
        images = tiny.train.images.clone()
        if name == "other":
            images[never] = 255 - images[never]
        dataset = fm.data.Dataset(fm.data.Split(images, tiny.train.labels), tiny.test, 10)
        folder = write_idx(tmp_path / "data", dataset)
        run = tmp_path / "run"
        succeed("train", "--data-dir", folder, *PRIVATE, "--noise-seed", seed, "--out", run)
        folders.append(run.rename(tmp_path / name))
        folder.rename(tmp_path / f"data-{name}")
    one, other = [
        [path.read_bytes() for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()] for run in folders
    ]
    assert one == other  # every byte of parameters, losses and account
    assert run_folder.read_unpublished(folders[0])["data"] != run_folder.read_unpublished(folders[1])["data"]


def test_mistake_15_no_number_in_a_private_checkpoint_is_of_single_examples_without_noise(data_dir, tmp_path):
    run = tmp_path / "run"
    succeed("train", "--data-dir", data_dir, *PRIVATE, "--out", run)
    options = run_folder.read_config(run)
    made = fm.commands.restore.trained(run, torch.device("cpu")).made
    start = fm.commands.build.start(options, made, fm.commands.build.optimizer(options, 8), torch.device("cpu"))
    for path in fm.checkpoint.steps(run / "checkpoints"):
        assert fm.checkpoint.load(path, start).state.loss == 0
    assert set(run_folder.read_unpublished(run)["losses"]) >= {"12", "15", "16"}


def test_mistake_15_options_that_choose_images_by_the_images_are_refused(tmp_path, data_dir):
    assert "--imbalance" in complain(2, "train", *PRIVATE, "--imbalance", "8=0.5")
    out = succeed("train", "--data-dir", data_dir, *PRIVATE, "--train-size", "200", "--out", tmp_path / "run")
    assert "Only the chosen images are protected" in out


def test_mistake_16_steps_that_were_made_and_lost_stay_in_the_account(data_dir, tmp_path):
    run = tmp_path / "run"
    succeed("train", "--data-dir", data_dir, *PRIVATE, "--out", run)
    newest = fm.checkpoint.steps(run / "checkpoints")[-1]
    for path in newest.iterdir():
        path.write_bytes(b"damaged")
    out = succeed("train", "--resume", run)
    assert "Counted part by part, each with its own secret: steps 1 to 16, steps 16 to 16." in out
    spent = privacy.epsilon(Poisson(32 / TRAIN, 1.0), steps=17, delta=DELTA)
    assert f"Privacy spent in 16 steps: ε = {spent:.3f}" in out
    assert f"ε = {spent:.4g} at δ = 1e-05" in succeed("account", run)


@pytest.mark.parametrize("change", [1.0, 2.0])
def test_mistake_17_the_sensitivity_is_that_of_the_stated_neighbours(change):
    rows = torch.zeros(4, 3)
    rows[1, 0] = 50.0
    beside = rows.clone()
    beside[1, 0] = 0.0 if change == 1 else -50.0  # without gradient, or replaced by its opposite
    step = made(Poisson(1.0, 0.0), 4, chunk_sizes=(2,))
    difference = ((moved(step, rows) - moved(step, beside)) * 4).norm().item()
    assert difference == pytest.approx(change, rel=1e-5)
    assert "replaced by one without gradient" in Shuffled(3, 1.0).relation
    assert "added or removed" in Poisson(0.5, 1.0).relation


def test_mistake_18_the_account_is_the_larger_of_adding_and_removing_after_composition():
    pytest.importorskip("dp_accounting")
    event = Event(0.3, 1.5, 20)
    both = plds._release(event.rate, event.noise_multiplier, 1e-3).self_compose(event.times, 1e-15)
    each = [pmf.get_epsilon_for_delta(DELTA) for pmf in (both._pmf_remove, both._pmf_add)]
    assert min(each) < max(each) <= privacy.composed([event], delta=DELTA) * (1 + 1e-3)


def test_mistake_18_the_divergences_of_both_directions_are_integrals_of_their_definition():
    q, sigma = 0.2, 1.3
    x = torch.linspace(-16, 18, 400_001, dtype=torch.float64)
    none = (-(x**2) / 2 / sigma**2).exp() / sigma / math.sqrt(2 * math.pi)
    joined = (1 - q) * none + q * (-((x - 1) ** 2) / 2 / sigma**2).exp() / sigma / math.sqrt(2 * math.pi)
    for epsilon in (-0.3, -0.1, 0.0, 0.05, 0.2, 1.0):
        at = torch.tensor([epsilon], dtype=torch.float64)
        removed = torch.trapezoid((joined - math.exp(epsilon) * none).clamp(min=0), x)
        added = torch.trapezoid((none - math.exp(epsilon) * joined).clamp(min=0), x)
        assert plds.removed(at, q, sigma).item() == pytest.approx(removed.item(), abs=1e-9)
        assert plds.added(at, q, sigma).item() == pytest.approx(added.item(), abs=1e-9)


def test_mistake_19_the_rate_that_is_drawn_is_the_rate_that_is_accounted():
    mechanism = Poisson(0.2, 1.0)
    step = made(mechanism, 500)
    roots = Secret(3).roots()
    counts = [len(privacy.draw(step.mechanism, roots[0], step=t, population=step.size)) for t in range(400)]
    assert sum(counts) / 400 == pytest.approx(500 * mechanism.rate, abs=5 * math.sqrt(500 * 0.16 / 400))
    assert step.expected == 100
    other = dataclasses.replace(step, mechanism=Poisson(0.4, 2.0))
    assert other.expected == 200  # all of a step follows from its mechanism


@pytest.mark.parametrize("numbers", [[3, 3, 3], [0, 5, 5], [4, 2]])
def test_mistake_19_who_is_drawn_twice_is_refused(numbers):
    with pytest.raises(ValueError, match="an example drawn twice moves a sum by twice the sensitivity"):
        Draw(torch.tensor(numbers))
    with pytest.raises(TypeError, match="it must be a Draw"):
        privacy.chunks(torch.tensor(numbers), (8,))


def test_mistake_19_no_step_takes_a_batch_of_somebody_elses_draw():
    order = fm.data.balanced_order(torch.tensor([0] * 9 + [1]), key=random.key(0), epoch=0)
    assert order.unique().numel() < len(order)  # weighted draws repeat
    batch = next(fm.data.batches(order, batch_size=10, pad=True))
    step = made(Poisson(0.5, 1.0), 10)
    state = train.init_private_state(torch.zeros(3), step.optimizer, random.key(0), step.clipping)
    with pytest.raises((TypeError, ValueError, AttributeError)):
        step(state, Secret(0).roots(), batch, torch.ones(10, 3))
    with pytest.raises(TypeError, match="unexpected keyword"):
        train.fit_private(step, state, (torch.ones(10, 3),), secret=Secret(0), steps=1, order=order)
    assert "--sampler balanced" in complain(2, "train", *PRIVATE, "--sampler", "balanced")


@pytest.mark.parametrize("sigma", [0.0, 0.1, 1.0])
def test_mistake_19_the_noise_of_a_step_is_that_of_its_account(sigma):
    with pytest.raises(TypeError, match="noise_multiplier"):
        train.make_private_step(
            linear, optim.sgd(1.0), clipping=Flat(1.0), noise_multiplier=sigma, expected=10,
            mechanism=Poisson(0.1, 1.0), examples=10,
        )  # fmt: skip
    step = made(Poisson(0.05, sigma), 1000)
    noise = moved(step, torch.zeros(1000, 4000)) * step.expected  # nothing but noise comes out
    assert noise.std().item() == pytest.approx(sigma, rel=0.05)
    spent = privacy.epsilon(step.mechanism, steps=200, delta=DELTA)
    assert spent == math.inf if sigma == 0 else spent < math.inf
    assert sigma == 1.0 or spent > 100


def test_mistake_20_noise_of_the_released_mean_is_that_of_the_sum_over_the_divisor():
    step = made(Poisson(0.5, 3.0), 400, rule=Flat(0.5))
    noise = moved(step, torch.zeros(400, 20_000))
    assert noise.std().item() == pytest.approx(3.0 * 0.5 / 200, rel=0.03)


def test_mistake_21_chunks_of_padding_alone_add_nothing_at_any_place():
    rows = torch.eye(5)
    step = made(Poisson(1.0, 0.0), 5)
    parts, state = step._parts, train.init_private_state(torch.zeros(5), step.optimizer, random.key(0), step.clipping)
    (batch,) = privacy.chunks(Draw(torch.arange(5)), (8,))
    padding = fm.data.Batch(torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.bool))
    none = privacy.zero_sums(state.params, step.clipping)
    alone = parts.add(state, none, Secret(1).roots(), batch, None, rows)
    for order in ([padding, batch], [batch, padding], [padding, padding, batch, padding]):
        sums = none
        for one in order:
            sums = parts.add(state, sums, Secret(1).roots(), one, None, rows)
        assert all(torch.equal(a, b) for a, b in zip(tree.leaves(sums), tree.leaves(alone), strict=True))


def test_mistake_22_clipped_sums_of_a_loss_with_ignored_tokens_equal_those_of_its_dense_gradients():
    table = {"w": random.normal(random.key(0), (7, 5)).double()}
    tokens = random.randint(random.key(1), (6, 4), 0, 7)
    labels = random.randint(random.key(2), (6, 4), 0, 5)
    labels[0, 1:] = -100
    labels[3] = -100  # none is left

    def loss_fn(params, tokens, labels):
        each = torch.nn.functional.cross_entropy(params["w"][tokens], labels.clamp(min=0), reduction="none")
        return (each * (labels >= 0)).sum()

    found = privacy.clipped_sums(loss_fn, table, tokens, labels, clipping=Flat(0.7))
    dense = per_sample.grads(loss_fn, table, tokens, labels)["w"]
    factors = (0.7 / dense.flatten(1).norm(dim=1)).clamp(max=1)
    assert torch.allclose(found.grads["w"], (factors[:, None, None] * dense.nan_to_num()).sum(0), atol=1e-10)


@pytest.mark.parametrize("accountant", ["pld", "rdp", "rdp-old", "gaussian"])
def test_mistake_23_no_accountant_gives_epsilon_below_zero_or_fails_at_a_large_delta(accountant):
    for delta in (0.3, 0.9, 0.999):
        for sigma in (0.7, 20.0, 1e6):
            spent = privacy.epsilon(Shuffled(5, sigma), steps=3, delta=delta, accountant=accountant)
            assert 0 <= spent < math.inf


def test_mistake_24_the_ledger_counts_steps_and_not_settings(data_dir, tmp_path):
    run = tmp_path / "run"
    succeed("train", "--data-dir", data_dir, *PRIVATE, "--out", run)
    newest = fm.checkpoint.steps(run / "checkpoints")[-1]
    (entry,) = json.loads(json.dumps(fm.checkpoint.read_manifest(newest)["config"]["ledger"]))
    assert entry["steps"] == 16


def test_mistake_25_a_search_is_accounted_as_all_its_runs(data_dir, tmp_path):
    runs = []
    for lr in (0.1, 1):
        runs.append(tmp_path / f"lr-{lr}")
        succeed("train", "--data-dir", data_dir, *PRIVATE, "--lr", lr, "--out", runs[-1])
    runs.append(tmp_path / "more-noise")
    succeed("train", "--data-dir", data_dir, *PRIVATE, "--noise-multiplier", "2", "--epochs", "1", "--out", runs[-1])
    out = succeed("account", *runs)
    q = 32 / TRAIN
    together = privacy.composed([Event(q, 1.0, 32), Event(q, 2.0, 8)], delta=DELTA)
    assert f"Spent by 3 runs together: ε = {together:.4g} at δ = 1e-05" in out
    alone = privacy.epsilon(Poisson(q, 1.0), steps=16, delta=DELTA)
    assert out.count(f"alone: ε = {alone:.4g}") == 2
    assert "Each folder must be given once" in complain(2, "account", runs[0], runs[0])
    assert "--epsilon has no effect" in complain(2, "account", runs[0], "--epsilon", "1")


def test_an_account_of_folders_tells_what_is_no_private_run_or_not_private(data_dir, tmp_path):
    ordinary, seeded = tmp_path / "ordinary", tmp_path / "seeded"
    succeed("train", "--data-dir", data_dir, "--model", "linear", "--batch-size", "32", "--out", ordinary)
    assert "Found one without a ledger" in complain(2, "account", ordinary)
    assert "holds no run" in complain(2, "account", tmp_path / "nowhere")
    succeed("train", "--data-dir", data_dir, *PRIVATE, "--noise-seed", "5", "--out", seeded)
    assert "NOT PRIVATE" in succeed("account", seeded)
