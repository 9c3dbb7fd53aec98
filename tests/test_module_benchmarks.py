"""Modules as they are, as arms: they start alike and agree, on tiny networks."""

from dataclasses import replace

import pytest
import torch

from benchmarks import measure, modules, recipes, subjects
from benchmarks.steps import relative_difference
from functorch_mnist import tree

TINY = recipes.Sizes(batch=3, positions=6, layers=2, width=8, heads=2, tokens=20)
RECIPES = {recipe.name: recipe for recipe in modules.RECIPES}


@pytest.fixture(params=RECIPES)
def subject(request):
    recipe = RECIPES[request.param]
    if recipe.name != "LSTM":
        pytest.importorskip("transformers")
    subject = subjects.Subject(recipe, TINY, "cpu")
    subject.recipe.logits(subject.module(**subject.batch[0]))  # where a package warns, it does so once
    return subject


def called(work):
    work.call()
    return work.outputs()


def test_the_clipped_sum_is_its_definition_at_any_norm(subject):
    found = called(subjects.clipped(subject))
    assert relative_difference(found, subject.clipped_sum) < subjects.TOLERANCE
    large = subjects.Subject(subject.recipe._replace(max_norm=1e6), TINY, "cpu")
    mean = called(subjects.ordinary(large))
    total = tree.map(lambda g: len(large.batch[1]) * g, mean)
    assert relative_difference(large.clipped_sum, total) < subjects.TOLERANCE
    small = subjects.Subject(subject.recipe._replace(max_norm=1e-3), TINY, "cpu")
    assert tree.norm(called(subjects.clipped(small))) <= len(small.batch[1]) * 1e-3 * (1 + 1e-4)


def test_arms_start_alike_and_leave_the_module_as_it_is(subject):
    before = {name: p.clone() for name, p in subject.module.state_dict().items()}
    works = [subjects.ordinary(subject), subjects.clipped(subject)]
    assert works[0].start == works[1].start
    for work in works:
        work.call()
    assert not subject.module.training
    assert all(torch.equal(p, before[name]) for name, p in subject.module.state_dict().items())


def test_the_loop_over_positions_is_the_lstm():
    subject = subjects.Subject(RECIPES["LSTM"], TINY, "cpu")
    native, loop = subjects.ordinary(subject), subjects.ordinary(subject, as_loop=True)
    assert native.start == loop.start
    assert relative_difference(called(loop), called(native)) < 1e-5


def test_padding_is_left_out_of_the_shorter_texts():
    inputs, labels = RECIPES["BERT, padded"].batch(TINY)
    assert inputs["attention_mask"].sum(1).tolist() == [3, 4, 6]
    assert labels.shape == (3,)


def test_a_network_without_its_package_says_so(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(recipes, "import_module", missing)
    subject = subjects.Subject(RECIPES["BERT"], TINY, "cpu")
    case = measure.Case("BERT", modules.arms(subject, compile=False), relative_difference, 1)
    with pytest.raises(RuntimeError, match="not installed: No module named 'transformers'"):
        measure.compare(case, measure.Setup(threads=torch.get_num_threads()))


def timing(name, *samples, baseline=False):
    return measure.Timing(name, "float32", 1.0, list(samples), 0.0, 1.0, baseline)


def test_the_conclusion_compares_with_the_modules_pass_and_with_the_loop():
    timings = [
        timing("ordinary, eager module", 1.0, 1.0, baseline=True),
        timing(modules.LOOP, 2.0, 2.0),
        timing("clipped, eager", 3.0, 3.0),
    ]
    missing = [measure.Missing("clipped, Opacus, hooks", "failed: ValueError: no | rule", True)]
    found = measure.Comparison("LSTM, eager", timings, missing, {}, {})
    without = replace(found, case="GPT-2, eager", timings=[timings[0], timings[2]], missing=[])
    assert modules.conclude([found, without]).splitlines()[2:] == [
        "| LSTM, eager | clipped, eager | 3.00 (3.00 to 3.00) | 1.50 (1.50 to 1.50) |",
        r"| LSTM, eager | clipped, Opacus, hooks: failed: ValueError: no \| rule | - | - |",
        "| GPT-2, eager | clipped, eager | 3.00 (3.00 to 3.00) | - |",
    ]
