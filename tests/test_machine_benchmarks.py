"""Eager norms and clipped sums over modules' own passes, as arms: they agree, on tiny networks."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from benchmarks import machines, measure, networks, recipes, subjects
from benchmarks.steps import relative_difference
from functorch_mnist import per_sample

NEEDS = {"BERT": "transformers", "Llama": "transformers", "vit_tiny": "timm"}
SLOW = {"densenet121"}
"""To try and to survey, without being unlike the others."""
QUICK = measure.Setup(quick=True)
BENCHES = {
    f"{number} {bench.recipe.name}": bench
    for number, bench in enumerate(
        (*machines.NETWORKS, *machines.CLIPPED, machines.TABLE, machines.TIED, machines.LENGTHS[0].bench(4))
    )
    if bench.recipe.name not in SLOW
}


def timing(name, *samples, baseline=False, memory=None):
    return measure.Timing(name, "float32", 1.0, list(samples), 0.0, 1.0, baseline, memory=memory)


def called(work):
    work.call()
    return work.outputs()


@pytest.fixture(params=BENCHES)
def bench(request):
    found = BENCHES[request.param]
    package = NEEDS.get(found.recipe.name)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    return found


def test_every_way_finds_what_is_defined_from_the_same_start(bench):
    subject = bench.subject(QUICK)
    ordinary = subjects.ordinary(subject)
    for name, (make, defined) in machines.WAYS.items():
        if bench.dense or name != "norms, dense":
            work = make(subject)
            assert work.start == ordinary.start
            assert relative_difference(called(work), getattr(subject, defined)) < subjects.TOLERANCE


def test_opacus_finds_the_clipped_sum_of_texts():
    pytest.importorskip("opacus")
    subject = machines.LENGTHS[0].bench(2).subject(QUICK)
    ((make, defined),) = machines.OPACUS.values()
    assert relative_difference(called(make(subject)), getattr(subject, defined)) < subjects.TOLERANCE


def test_the_norms_of_one_example_are_those_of_its_ordinary_gradient(bench):
    subject = bench.subject(QUICK)
    alone = subjects.Subject(subject.recipe, subject.sizes._replace(batch=1), "cpu")
    total = sum(g.square().sum() for g in called(subjects.ordinary(alone)).values()).sqrt()
    assert torch.allclose(total[None], alone.norms, rtol=1e-4)


def test_what_is_compared_of_a_prepared_loss_are_its_recorded_ops(monkeypatch):
    seen, prepare = [], per_sample.prepare
    monkeypatch.setattr(per_sample, "prepare", lambda *given: seen.append(prepare(*given)) or seen[-1])
    called(subjects.norms(BENCHES["0 MLP"].subject(QUICK), prepared=True))
    assert " ops" in str(seen[0])


def test_the_tied_table_in_blocks_has_the_losses_of_the_plain_one():
    sizes = recipes.Sizes(2, 5, 0, 8, tokens=300)
    plain, blocks = recipes.Tied(sizes), recipes.TiedInBlocks(sizes)
    blocks.load_state_dict(plain.state_dict())
    inputs, _ = recipes.following_within(sizes)
    assert torch.allclose(plain(**inputs), blocks(**inputs), rtol=1e-5)


def test_the_fused_block_is_the_block_whose_attention_is_written_out():
    plain, fused = networks.Block(8, 2, causal=True), recipes.FusedBlock(8, 2, causal=True)
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain(x), fused(x), atol=1e-6)


def test_later_tokens_do_not_change_earlier_logits():
    sizes = recipes.Sizes(1, 6, 2, 8, 2, tokens=20)
    net, tokens = recipes.Language(sizes), torch.arange(6)[None]
    changed = tokens.clone()
    changed[0, 4] = 19
    assert torch.equal(net(tokens)[:, :4], net(changed)[:, :4])
    assert not torch.equal(net(tokens)[:, 4:], net(changed)[:, 4:])


def test_texts_are_followed_by_their_next_tokens():
    inputs, targets = recipes.following(recipes.Sizes(2, 5, 0, 8, tokens=20))
    assert inputs["tokens"].shape == targets.shape == (2, 5)
    assert torch.equal(inputs["tokens"][:, 1:], targets[:, :-1])


def test_cases_differ_in_name_begin_with_the_modules_pass_and_take_peaks_of_tables_and_lengths():
    for quick in (False, True):
        cases = list(machines.cases(measure.Setup(quick=quick)))
        names = [case.name for case in cases]
        assert len(set(names)) == len(names)
        assert all(case.arms[0].name == machines.ORDINARY for case in cases)
        assert [case.memory for case in cases] == [name.startswith(("table", "T=")) for name in names]
        assert len([case for case in cases if case.axis]) == len(machines.LENGTHS)


def test_the_conclusion_has_times_and_peaks_over_the_modules_pass_and_why_an_arm_has_none():
    timings = [timing(machines.ORDINARY, 1.0, 1.0, baseline=True, memory=100), timing("norms", 1.5, 1.5, memory=120)]
    missing = [measure.Missing("theirs", "failed: ValueError: no | rule", True)]
    found = measure.Comparison("A", timings, missing, {}, {})
    without = replace(found, case="B", timings=[replace(one, memory=None) for one in timings], missing=[])
    assert machines.conclude([found, without]).splitlines()[2:] == [
        "| A | norms | 1.50 (1.50 to 1.50) | 1.20 |",
        r"| A | theirs: failed: ValueError: no \| rule | - | - |",
        "| B | norms | 1.50 (1.50 to 1.50) | - |",
    ]
