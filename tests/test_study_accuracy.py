"""The study of `train` and the article's program, on planted programs, and that both make the same steps."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import article, results
from benchmarks.studies import accuracy
from functorch_mnist import data, random, train
from functorch_mnist.commands import build
from functorch_mnist.options import Train

RECORD = results.RESULTS / "study-accuracy.json"


def planted(shift):
    """A command whose accuracy is the seed's, shifted, and that wants the images."""
    code = (
        "import pathlib; assert len(list(pathlib.Path(r'{root}').glob('MNIST/raw/*-ubyte'))) == 4; "
        f"print('on the 10000 test images: %.2f%%' % (97.5 + {{seed}} + {shift}))"
    )
    return "-c", code


class Times(torch.nn.Module):
    """The input times a fixed mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.fixture(scope="module")
def reported():
    return []


@pytest.fixture(scope="module")
def record(reported):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "COMMANDS", {accuracy.ARTICLE: planted(0.0), accuracy.TRAIN: planted(0.25)})
        return accuracy.run(quick=True, progress=reported.append)


def test_each_program_has_each_seed(record, reported):
    found = {(one["program"], one["seed"]): one["accuracy"] for one in record["runs"]}
    assert found == {
        (accuracy.ARTICLE, 0): 97.5,
        (accuracy.TRAIN, 0): 97.75,
        (accuracy.ARTICLE, 1): 98.5,
        (accuracy.TRAIN, 1): 98.75,
    }
    assert len(reported) == 4


def test_a_record_is_json_and_its_table_comes_from_it_alone(record):
    read = json.loads(json.dumps(record, allow_nan=False))
    (table,) = accuracy.table(read).values()
    _, _, article, train, difference = table.splitlines()
    assert article == "| article's program | 2 | 98.000 ± 0.707 | 97.50 | 98.50 | 1 |"
    assert train == "| train | 2 | 98.250 ± 0.707 | 97.75 | 98.75 | 1 |"
    assert difference.startswith("| difference |  | +0.250 (-")


def test_a_program_that_fails_ends_the_study(monkeypatch):
    monkeypatch.setattr(accuracy, "COMMANDS", {accuracy.TRAIN: ("-c", "raise SystemExit('no disk')")})
    with pytest.raises(RuntimeError, match="no disk"):
        accuracy.run(quick=True, progress=lambda line: None)


def test_the_interval_is_welchs():
    first, second = [1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0]
    found = accuracy.difference(first, second)  # of variances 2.5 and 2.75
    square = 2.5 / 5 + 2.75 / 11
    assert found.mean == 1.5
    assert math.isclose(found.error, math.sqrt(square))
    assert math.isclose(found.degrees, square**2 / (0.5**2 / 4 + 0.25**2 / 10))
    half = accuracy.student_quantile(0.975, found.degrees) * math.sqrt(square)
    assert math.isclose(found.interval[0], 1.5 - half) and math.isclose(found.interval[1], 1.5 + half)


@pytest.mark.parametrize(("degrees", "published"), [(10, 2.228), (20, 2.086), (30, 2.042), (60, 2.000), (120, 1.980)])
def test_students_quantiles_are_the_published_ones(degrees, published):
    assert round(accuracy.student_quantile(0.975, degrees), 3) == published


def test_the_commands_differ_in_nothing_but_the_program():
    article, train = accuracy.COMMANDS[accuracy.ARTICLE], accuracy.COMMANDS[accuracy.TRAIN]
    assert article[:2] == ("-m", "benchmarks.article") and train[:3] == ("-m", "functorch_mnist", "train")
    assert article[-3:] == ("100", "cpu", "1")  # it ends after its one epoch, whatever it has reached
    assert train[-2:] == ("--threads", "1")


def test_an_epoch_of_train_is_the_articles_given_its_draws():
    """The initial parameters, order and masks are `train`'s; the last of three batches is short."""
    options, images, labels = Train(seed=3), *(rows[:150] for rows in data.load("mnist").train)
    made = build.classifier(build.Origin(options, (0.1307, 0.3081), len(images), 10))
    optimizer = build.optimizer(options, 3)
    state = build.start(options, made, optimizer, torch.device("cpu")).state
    step = train.make_step(train.batch_gradient(build.losses(made, options)), optimizer)
    found = train.fit(step, state, (images, labels), epochs=1, batch_size=options.batch_size).params

    net = article.Net()
    net.load_state_dict(state.params)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    drawn = train.draws.epoch_draws(state.key, 150, epoch=0, batch_size=64)
    for index, keys in zip(drawn.examples.split(64), drawn.keys.split(64), strict=True):
        channel_keys, unit_keys = random.split(keys).unbind(-2)
        net.dropout1 = Times(random.bernoulli(channel_keys, 0.75, (64, 1, 1)) / 0.75)
        net.dropout2 = Times(random.bernoulli(unit_keys, 0.5, (128,)) / 0.5)
        sgd.zero_grad()
        F.cross_entropy(net((images[index] / 255 - 0.1307) / 0.3081), labels[index]).backward()
        sgd.step()
    for name, expected in net.named_parameters():
        # Sums in another order: float32 keeps seven digits of each.
        assert (found[name] - expected).norm() < 1e-6 * expected.norm(), name
        assert (found[name] - state.params[name]).norm() > 1e-4 * expected.norm(), name


def test_the_committed_record_is_of_all_seeds_and_gives_its_table():
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    assert found["study"] == "accuracy" and not found["quick"]
    runs = [(one["program"], one["seed"]) for one in found["runs"]]
    assert runs == [(name, seed) for seed in range(accuracy.SEEDS) for name in accuracy.COMMANDS]
    low, high = found["difference"]["interval"]
    assert low < found["difference"]["mean"] < high
    (table,) = accuracy.table(found).values()
    assert len(table.splitlines()) == 5
