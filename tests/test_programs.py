"""Commands as arms, on planted programs."""

from pathlib import Path

import pytest

from benchmarks import definitions, epoch, problems, programs, start_up
from functorch_mnist import tree


def test_a_programs_accuracy_is_read_and_each_call_has_the_next_seed():
    program = programs.Program("-c", "print('on the 10000 test images: 9{seed}.50%')")
    work = program.work()
    work.call()
    assert work.outputs() == 90.5
    work.call()
    assert work.outputs() == 91.5
    assert program.accuracies == [90.5, 91.5]


def test_each_call_has_an_empty_folder_that_is_gone_afterwards(tmp_path):
    seen = tmp_path / "seen"
    code = f"import os; print(repr(os.listdir(r'{{folder}}')), r'{{folder}}', file=open(r'{seen}', 'a')); "
    program = programs.Program("-c", code + "open(r'{folder}/file', 'w'); print('test images: 1.00%')")
    program.call()
    program.call()
    listings, folders = zip(*(line.split() for line in seen.read_text().splitlines()), strict=True)
    assert listings == ("[]", "[]")
    assert len(set(folders)) == 2
    assert not any(Path(folder).exists() for folder in folders)


def test_a_program_without_an_accuracy_is_an_error():
    with pytest.raises(RuntimeError, match="must end with an accuracy"):
        programs.Program("-c", "print('done')").call()


def test_a_program_that_fails_is_an_error_that_begins_with_its_last_words():
    program = programs.Program("-c", "print('test images: 99.00%'); raise SystemExit('no disk')")
    with pytest.raises(RuntimeError, match=r"^status 1, no disk\n"):
        program.call()
    assert program.accuracies == []


def test_variables_are_set_beside_those_of_this_process(monkeypatch):
    monkeypatch.setenv("OURS", "1")
    code = "import os; print(os.environ['OURS'], os.environ['THEIRS'])"
    assert programs.run("-c", code, variables={"THEIRS": "2"}).stdout == "1 2\n"


def test_an_accuracy_lacks_what_it_misses_the_least_one_by():
    assert epoch.lacking(97.5, 98.0) == 0.5
    assert epoch.lacking(98.5, 98.0) == 0


@pytest.mark.parametrize("name", start_up.EAGER)
def test_a_first_step_has_the_norm_of_its_definition(name):
    problem = problems.cnn(start_up.BATCH_SIZE)
    first = start_up.EAGER[name]
    work = first.work(problem)
    work.call()
    expected = tree.norm(getattr(definitions.Definitions(problem), first.quantity))
    assert start_up.relative_difference(float(tree.norm(work.outputs())), float(expected)) < start_up.TOLERANCE
