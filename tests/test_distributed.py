"""One result for any number of processes: results of `worlds.py`, in processes of their own, against one process."""

import re
import socket
import time
from functools import cache

import pytest
import torch
import worlds
from forks import Forked

from functorch_mnist import distributed, optim, train, tree
from functorch_mnist.data import Batch
from functorch_mnist.distributed import SINGLE_PROCESS, World, rows_of
from functorch_mnist.distributed.attendance import is_collective_error
from functorch_mnist.distributed.rows import split_rows

SECONDS = 240
"""No world takes longer."""


def equal(a, b):
    return torch.equal(a.nan_to_num(nan=-7.0), b.nan_to_num(nan=-7.0)) if a.is_floating_point() else torch.equal(a, b)


def close(a, b):
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=2e-5, atol=2e-6, equal_nan=True)


@cache
def alone(shards, cases):
    torch.set_num_threads(1)
    return {case: worlds.CASES[case](World(shards=shards)) for case in cases}


def ended(started):
    """What some processes have printed, and their statuses."""
    deadline = time.monotonic() + SECONDS
    try:
        found = [one.communicate(timeout=max(1, deadline - time.monotonic())) for one in started]
    finally:
        for one in started:
            one.kill()
    return [one.returncode for one in started], [out for out, _ in found], [err for _, err in found]


def results(folder, size, *, shards=None, cases=tuple(worlds.CASES), **options):
    """Leaves by rank."""
    statuses, _, errors = ended(worlds.started([worlds.__file__, folder, shards or 0, *cases], size, **options))
    assert statuses == [0] * size, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


COMPARED = tuple(case for case in worlds.CASES if case not in ("half_training", "compiled_training", "sums"))


@pytest.mark.parametrize("size", [2, 3])
def test_any_number_of_processes_finds_what_one_does_and_all_the_same_bits(size, tmp_path):
    cases, start = (COMPARED, Forked) if size == 3 else ((*COMPARED, "compiled_training"), worlds.program)
    found = results(tmp_path, size, cases=cases, start=start)
    one = alone(None, cases)
    for name, mine, theirs in zip(tree.paths(one), tree.leaves(one), found[0], strict=True):
        assert close(mine, theirs), (name, mine, theirs)
    for other in found[1:]:
        assert all(map(equal, found[0], other))
    different = [
        name for name, a, b in zip(tree.paths(one), tree.leaves(one), found[0], strict=True) if not equal(a, b)
    ]
    # What does not sum over examples has the bits of one process, but for Gram blocks of a set with itself, of which
    # one process takes each pair once, and for chunks of another size.
    rows = {name for name in different if name.startswith(("evaluation", "rows", "swept"))}
    assert all(name.startswith(("rows/3", "rows/6")) for name in rows), rows


@pytest.mark.parametrize("size", [2, 4])
def test_with_shards_any_number_of_processes_finds_the_same_bits(size, tmp_path):
    cases = (*COMPARED, "half_training")
    found = results(tmp_path, size, shards=4, cases=cases)
    one = alone(4, cases)
    for ranks in found:
        for name, mine, theirs in zip(tree.paths(one), tree.leaves(one), ranks, strict=True):
            assert equal(mine, theirs), name


@pytest.mark.parametrize("size", [2, 3])
def test_a_tree_of_all_kinds_of_numbers_is_summed_in_its_own_types(size, tmp_path):
    for found in results(tmp_path, size, cases=("sums",)):
        expected = [
            torch.tensor([sum(0.5 + r for r in range(size))] * 3),
            torch.full((2, 1), sum(2**40 + r for r in range(size))),
            torch.tensor(sum(r / 4 for r in range(size)), dtype=torch.float64),
            torch.tensor([sum(1.5 * r for r in range(size))], dtype=torch.bfloat16),
            torch.zeros(0),
        ]
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_world_of_one_returns_what_it_is_given():
    values = {"a": torch.zeros(2)}
    for of in (distributed.all_reduce, distributed.all_gather, distributed.broadcast):
        assert of(SINGLE_PROCESS, values) is values
    assert distributed.reduce_scatter(SINGLE_PROCESS, values["a"]) is values["a"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 2, "size": 2, "group": "0"}, "below size"),
        ({"rank": -1}, "from 0"),
        ({"size": 2}, "need a process group"),
        ({"shards": 3}, "power of two"),
        ({"shards": 0}, "power of two"),
        ({"size": 3, "group": "0", "shards": 4}, "must divide"),
    ],
)
def test_a_world_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        World(**values)


@pytest.mark.parametrize("count", [1, 5, 8, 13])
@pytest.mark.parametrize(("size", "shards"), [(1, None), (2, None), (3, None), (1, 4), (2, 4), (4, 4)])
def test_rows_are_shared_in_equal_parts_each_real_row_once_and_in_order(count, size, shards):
    batch = Batch(torch.arange(10, 10 + count), None)
    parts = [rows_of(World(rank, size, group="0", shards=shards), batch) for rank in range(size)]
    assert len({len(part.examples) for part in parts}) == 1
    seen = [part.examples if part.mask is None else part.examples[part.mask] for part in parts]
    assert torch.equal(torch.cat(seen), batch.examples)


def test_rows_that_are_masked_already_stay_so():
    batch = Batch(torch.tensor([1, 2, 3]), torch.tensor([True, False, True]))
    found = rows_of(World(1, 2, group="0"), batch)
    assert found.examples.tolist() == [3, 1]
    assert found.mask.tolist() == [True, False]


def test_shares_are_whole_units_and_cover_all_rows():
    for count in range(12):
        for parts in (1, 2, 3, 5):
            for unit in (1, 2, 5):
                found = split_rows(count, parts, unit=unit)
                assert [n for part in found for n in range(count)[part]] == list(range(count))
                assert all(part.start % unit == 0 or part.start == count for part in found)


def test_sharded_refuses_an_update_that_mixes_numbers_and_parameters_of_two_types():
    params = {"w": torch.zeros(2), "b": torch.zeros(1, dtype=torch.float64)}
    clipping = optim.clip_by_global_norm(optim.sgd(0.1), max_norm=1.0)
    with pytest.raises(ValueError, match="depend on that number alone"):
        distributed.sharded(clipping, SINGLE_PROCESS, {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="depend on that number alone"):
        distributed.sharded(
            optim.exponential_moving_average(clipping, decay=0.5), SINGLE_PROCESS, {"w": torch.zeros(2)}
        )
    with pytest.raises(ValueError, match="one type"):
        distributed.sharded(optim.sgd(0.1), SINGLE_PROCESS, params)


def test_an_optimizer_in_shards_cannot_be_taken_for_a_plain_one():
    made = distributed.sharded(optim.sgd(0.1), SINGLE_PROCESS, torch.zeros(2))
    with pytest.raises(AttributeError):
        optim.exponential_moving_average(made, decay=0.5)


def test_sharded_state_is_a_part_and_its_whole_is_the_plain_one():
    params = {"w": torch.arange(6.0).view(2, 3), "b": torch.zeros(())}
    made = distributed.sharded(optim.adam(0.1), World(shards=2), params, keep_params=False)
    plain = optim.adam(0.1)
    state = plain.init(params)
    _, state = plain.update(params, state, params)
    assert all(map(torch.equal, tree.leaves(made.whole(made.split(state))), tree.leaves(state)))
    two = [distributed.sharded(plain, World(rank, 2, group="0"), params) for rank in range(2)]
    shards = [one.split(params).values for one in two]
    assert len({len(shard) for shard in shards}) == 1
    assert torch.equal(torch.cat(shards)[:7], tree.ravel(params))


def test_a_step_of_several_processes_needs_a_divisor():
    step = train.make_step(lambda w, x: w * x, optim.sgd(0.1), World(0, 2, group="0"))
    state = train.init_state(torch.zeros(()), optim.sgd(0.1), worlds.KEY)
    with pytest.raises(ValueError, match="processes need a divisor"):
        step(state, torch.ones(3))


def test_a_step_refuses_rows_that_its_parts_do_not_divide():
    step = train.make_step(lambda w, x: w * x, optim.sgd(0.1), World(shards=2))
    state = train.init_state(torch.zeros(()), optim.sgd(0.1), worlds.KEY)
    with pytest.raises(ValueError, match="must divide its rows"):
        step(state, torch.ones(3))


def faulted(tmp_path, fault, *, size=3, seconds=3, **environment):
    """Exit statuses, what each said, and how long all took, of processes of which number 1 has a fault."""
    start = time.monotonic()
    arguments = [worlds.__file__, tmp_path, 0, "faulty"]
    processes = worlds.started(arguments, size, FAULT=fault, SECONDS=str(seconds), **environment)
    if fault == "SIGSTOP":
        while processes[0].poll() is None and time.monotonic() - start < SECONDS:
            time.sleep(0.1)
        processes[1].kill()  # it never ends by itself
    statuses, _, errors = ended(processes)
    return statuses, [text.strip() for text in errors], time.monotonic() - start


def test_where_a_process_dies_the_others_end_at_once_and_one_names_it(tmp_path):
    statuses, errors, seconds = faulted(tmp_path, "SIGKILL")
    assert all(statuses)
    told = [error for error in errors if error]
    assert len(told) == 1, told
    assert re.fullmatch(r"LostError: Process 1 of 3 \(pid \d+ on \S+\) is gone or stopped: .*", told[0]), told
    assert seconds < 60


def test_a_process_that_is_stopped_is_named_after_the_stated_time(tmp_path):
    statuses, errors, seconds = faulted(tmp_path, "SIGSTOP")
    assert all(statuses)
    told = [error for error in errors if error]
    assert len(told) == 1 and told[0].startswith("LostError: Process 1 of 3"), told
    assert 3 < seconds < 60


def test_a_process_that_is_alive_and_does_not_go_on_is_named(tmp_path):
    start = time.monotonic()
    processes = worlds.started([worlds.__file__, tmp_path, 0, "faulty"], 2, FAULT="hang", SECONDS="3")
    _, error = processes[0].communicate(timeout=SECONDS)
    processes[1].kill()
    ended(processes[1:])
    assert re.search(r"Process 1 of 2 \(pid \d+ on \S+\) is not going on, while the others wait", error), error
    assert time.monotonic() - start < 60


def test_a_process_that_comes_late_is_named(tmp_path):
    statuses, errors, _ = faulted(tmp_path, "late", size=2)
    assert statuses == [1, 1]
    (told,) = [error for error in errors if error]
    assert re.match(r"LostError: Process 1 of 2 \(.*\) is (late: the others have waited|not going on)", told), told


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("drift", r"DisagreementError: Training, after step 100: .* same state. Found .* on process 1\."),
        ("data", r"DisagreementError: fit, .* same examples. Found others .* on process 1\. .*chosen by rank"),
        ("state", r"DisagreementError: Training, after step 0: .* same state"),
    ],
)
def test_processes_that_do_not_agree_or_fail_end_with_one_line(fault, message, tmp_path):
    statuses, errors, _ = faulted(tmp_path, fault, size=2, seconds=30)
    assert all(statuses)
    told = [error for error in errors if error]
    assert len(told) == 1, told
    assert re.match(message, told[0]), told


def test_a_bug_in_one_process_is_shown_with_its_place_and_by_it_alone(tmp_path):
    statuses, errors, _ = faulted(tmp_path, "bug", size=2, seconds=30)
    assert all(statuses)
    assert errors[0] == ""
    assert "RuntimeError: this process has a bug" in errors[1] and "worlds.py" in errors[1]


def test_missing_processes_are_named_in_the_stated_time(tmp_path):
    processes = worlds.started([worlds.__file__, tmp_path, 0, "sums"], 4, ranks=(0, 1), SECONDS="4")
    statuses, _, errors = ended(processes)
    assert statuses[0] == 1
    assert "JoinError: All 4 processes must come within 4 s. Found no processes 2, 3." in errors[0]


def test_a_port_in_use_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (process,) = worlds.started([worlds.__file__, tmp_path, 0, "sums"], 1, port=port, SECONDS="4")
        _, _, errors = ended([process])
    assert f"JoinError: Process 0 must be able to open port {port}. Found: Address already in use." in errors[0]


def test_an_address_that_does_not_answer_is_told_in_the_stated_time(tmp_path):
    start = time.monotonic()
    _, _, errors = ended(worlds.started([worlds.__file__, tmp_path, 0, "sums"], 2, ranks=(1,), SECONDS="3"))
    assert "JoinError: Process 1 must reach 127.0.0.1:" in errors[0]
    assert time.monotonic() - start < 60


def test_an_environment_that_is_not_whole_is_refused():
    for environment, message in (
        ({"RANK": "0"}, "Found no WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "must be numbers"),
        ({"RANK": "2", "WORLD_SIZE": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "below WORLD_SIZE"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(distributed.JoinError, match=message), distributed.joined():
                pass


def test_an_error_that_is_not_of_a_sum_is_not_taken_for_a_lost_process():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert not is_collective_error(caught.value)


def test_aux_that_is_neither_a_sum_nor_rows_is_refused_of_several_parts_and_left_as_it_is_of_one():
    def estimate(params, *batch, mask):
        return torch.ones(()), {"loss": torch.zeros(()), "counts": torch.arange(5)}

    state = train.init_state(torch.zeros(()), optim.sgd(0.1), worlds.KEY)
    seen = []
    fit = lambda world: train.fit(  # noqa: E731
        train.make_step(train.Estimator(estimate), optim.sgd(0.1), world), state, (torch.ones(4),), epochs=1,
        batch_size=2, callbacks=(lambda progress: seen.append(progress.aux["counts"]),), world=world,
    )  # fmt: skip
    fit(SINGLE_PROCESS)
    assert all(len(counts) == 5 for counts in seen)
    with pytest.raises(ValueError, match=r"rows of the 1 examples. Found counts \(5,\)"):
        fit(World(shards=2))
