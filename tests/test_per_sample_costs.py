"""What the strategies cost, which of them is taken, and how a plan is printed: numbers by hand."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from zoo import normals

from functorch_mnist import per_sample
from functorch_mnist.per_sample.capture import Survey, Use
from functorch_mnist.per_sample.forms import ConvolutionForm, Cost, LookupForm, MatrixForm, ScaleForm, ShiftForm, Sizes
from functorch_mnist.per_sample.layout import View, layout
from functorch_mnist.per_sample.planning import Plan, Row, _human
from functorch_mnist.per_sample.strategies import _cheapest, alike, choose, choose_all, together
from functorch_mnist.per_sample.weights import Made, Weight

MATRIX = MatrixForm(layout((2, 5, 4), groups=(0,), outputs=(1,)), (0, 1, 2))
KERNEL = ConvolutionForm((6, 2, 3, 2), (1, 1), (0, 0), (1, 1), 2, swapped=False)
SWAPPED = ConvolutionForm((6, 2, 3, 2), (1, 1), (0, 0), (1, 1), 2, swapped=True)


def test_sizes_are_those_of_one_example():
    assert MATRIX.sizes(torch.Size((2, 3, 4)), torch.Size((2, 3, 5))) == Sizes(2, 3, 4, 5)
    assert KERNEL.sizes(torch.Size((7, 4, 9, 6)), torch.Size((7, 6, 4, 5))) == Sizes(2, 7 * 4 * 5, 2 * 3 * 2, 3)
    assert SWAPPED.sizes(torch.Size((7, 6, 4, 5)), torch.Size((7, 4, 9, 6))) == Sizes(2, 7 * 4 * 5, 2 * 3 * 2, 3)
    assert LookupForm((7, 2), None).sizes(torch.Size((3,)), torch.Size((3, 2))) == Sizes(1, 3, 7, 2)
    assert ShiftForm((3,), (3,)).sizes((), torch.Size((4, 3))) == Sizes(1, 4, 1, 3)
    assert ScaleForm((3, 2), (3, 1, 2)).sizes((), torch.Size((3, 4, 2))) == Sizes(1, 4, 1, 6)
    assert ShiftForm((0,), (0,)).sizes((), torch.Size((4, 0))) == Sizes(1, 0, 1, 0)


def test_costs_are_numbers_stored_and_multiplications_and_additions():
    gram, build = Cost(2 * 2 * 9, 2 * 2 * 9 * (4 + 5)), Cost(2 * 4 * 5, 2 * 2 * 3 * 4 * 5)
    assert MATRIX.costs(Sizes(2, 3, 4, 5)) == {"gram": gram, "build": build}
    assert MATRIX.costs(Sizes(2, 1, 4, 5)) == {
        "outer product": Cost(0, 2 * 2 * 9),
        "gram": Cost(4, 2 * 2 * 9),
        "build": Cost(40, 2 * 2 * 20),
    }
    assert KERNEL.costs(Sizes(2, 20, 12, 3)) == {  # pixels have 2 channels and meet 6 offsets of the kernel
        "gram": Cost(2 * (2 * 400 + 2 * 400), 2 * 2 * 400 * (2 + 3) + 2 * 400 * 6),
        "build": Cost(2 * 3 * 12, 2 * 2 * 20 * 3 * 12),
        "unfold": Cost(2 * 3 * 12 + 2 * 20 * 12, 2 * 2 * 20 * 3 * 12),
        "grouped convolution": Cost(2 * 3 * 12 + 2 * 20 * (2 + 3), 2 * 2 * 20 * 3 * 12),
    }
    sparse = replace(KERNEL, stride=(2, 2))  # 16 pairs of pixels for one of places: products of patches are fewer
    assert sparse.costs(Sizes(2, 20, 12, 3))["gram"] == Cost(2 * 2 * 400 + 2 * 20 * 12, 2 * 2 * 400 * 15)
    assert KERNEL.costs(Sizes(1, 1, 12, 3))["outer product"] == Cost(0, 30)
    assert KERNEL.costs(Sizes(2, 1, 12, 3))["outer product"] == Cost(24, 60)
    assert LookupForm((7, 2), None).costs(Sizes(1, 3, 7, 2)) == {"gram": Cost(12, 18), "build": Cost(14, 6 + 28)}
    assert ShiftForm((3,), (3,)).costs(Sizes(1, 4, 1, 3)) == {"sum": Cost(3, 12)}
    assert ScaleForm((3,), (3,)).costs(Sizes(1, 4, 1, 3)) == {"sum": Cost(3, 24)}


def test_less_arithmetic_is_taken_unless_it_outgrows_the_factors():
    sizes = Sizes(1, 2, 4, 4)
    even = _cheapest(sizes, MATRIX.costs(sizes), 16)  # 64 operations either way
    assert (even.strategy, even.reason) == ("build", "1.0 times less arithmetic")
    few = _cheapest(sizes, MATRIX.costs(Sizes(1, 1, 4, 4)), 8)
    assert (few.strategy, few.reason) == ("outer product", "one position: |a|² |g|²")
    wide = Sizes(1, 2, 8, 8)
    assert _cheapest(wide, MATRIX.costs(wide), 32)[::3] == ("gram", "2.0 times less arithmetic")
    for rows, strategy in ((1, "build"), (3, "build"), (4, "gram")):  # 2 T H numbers, or the V H of the table
        table = Sizes(1, 2, rows, 5)
        assert _cheapest(table, LookupForm((rows, 5), None).costs(table), 10).strategy == strategy
    sizes = Sizes(2, 3, 4, 1)  # factors of 30
    for memory, other, strategy in ((30, 1, "gram"), (31, 30, "build"), (31, 31, "gram"), (40, 39, "build")):
        found = _cheapest(sizes, {"gram": Cost(memory, 1), "build": Cost(other, 2)}, 30)
        assert found.strategy == strategy
        assert ("outgrow" in found.reason) == (strategy == "build")
    assert _cheapest(sizes, {"gram": Cost(1, 4), "build": Cost(1, 0)}, 30).reason == "4.0 times less arithmetic"
    assert _cheapest(sizes, {"build": Cost(1, 1)}, 30).reason.startswith("no rule")
    assert _cheapest(sizes, {"sum": Cost(1, 1)}, 30).strategy == "sum"


def loss_fn(params, x, rows):
    y = torch.tanh(x @ params["w"].T + params["b"])
    y = y @ params["again"].T + F.embedding(rows, params["table"])
    y = torch.tanh(y @ params["again"].T) @ (params["low"] @ params["rank"])
    return (y * params["s"] * params["s"]).square().sum() + y.sum()


PARAMS = {
    "w": normals(3, 4, seed=1), "b": normals(3, seed=2), "again": normals(3, 3, seed=3),
    "table": normals(50, 3, seed=4),
    "low": normals(3, 1, seed=5), "rank": normals(1, 6, seed=6), "s": normals(6, seed=7), "unused": normals(2, 2),
}  # fmt: skip


def test_a_plan_tells_the_way_the_sizes_and_the_costs_of_each_parameter():
    plan = per_sample.plan(loss_fn, PARAMS, normals(2, 4), torch.tensor([4, 9]), batch_size=10)
    rows = {row.path: row for row in plan.rows}
    assert {path: row.way for path, row in rows.items()} == {
        "w": "build", "b": "sum", "again": "build", "table": "gram", "low": "build", "rank": "build", "s": "sum",
        "unused": "dense",
    }  # fmt: skip
    assert rows["w"].sizes == Sizes(1, 2, 4, 3)
    assert rows["again"].sizes == Sizes(1, 4, 3, 3)  # two uses of two positions
    assert rows["again"].cost == Cost(9, 2 * 4 * 9)
    assert rows["table"].cost == Cost(2 * 6, 3 * 6)
    assert rows["low"].sizes == Sizes(1, 2, 3, 6)
    assert rows["low"].cost == Cost(8, 2 * 2 * 18)  # the memory of Gram matrices, less than 18 numbers
    assert rows["low"].reason == "made into a weight: pulled back"
    assert rows["s"].sizes == Sizes(1, 4, 1, 6)
    assert rows["s"].reason == "2 shifts or scales: sums of cotangents"
    assert rows["unused"].costs == {"dense": Cost(4, 8)}
    assert rows["w"].itemsize == 8


ROWS = (
    Row("w", (3, 4), 8, ("linear", "linear", "mm"), Sizes(2, 3, 4, 5), "gram", {"gram": Cost(100, 20)}, "because"),
    Row("s", (), 2, (), None, "dense", {"dense": Cost(1, 2), "build": Cost(3, 4)}, "unseen"),
)


def test_a_printed_plan_is_a_table_of_its_rows_with_totals_of_the_batch():
    assert str(Plan(ROWS, 10, ("histc",))).split("\n") == [
        "parameter  shape  ops             T  D  H  way     memory  arithmetic  why",
        "---------  -----  ----------  -----  -  -  -----  -------  ----------  -------",
        "w          3x4    linear, mm  2 x 3  4  5  gram   8.00 kB    200 FLOP  because",
        "s          ()     none                     dense     20 B     20 FLOP  unseen",
        "T positions, D inputs and H outputs of the op, per example",
        "batch of 10: 8.02 kB besides the factors, 220 FLOP",
        "slow: vmap runs histc one example at a time",
    ]


def test_a_plan_with_another_way_keeps_its_other_rows():
    plan = Plan(ROWS, 10).override("s", "build")
    assert plan.rows[0] is ROWS[0]
    assert (plan.rows[1].way, plan.rows[1].reason, plan.rows[1].cost) == ("build", "asked for", Cost(3, 4))
    assert (plan.memory, plan.arithmetic) == (10 * (800 + 6), 10 * (20 + 4))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1234, "1.23 kB"), (45600, "45.6 kB"), (999_400, "999 kB"),
        (999_500, "1.00 MB"), (4_720_000, "4.72 MB"), (5 * 10**9, "5.00 GB"), (7 * 10**12, "7.00 TB"),
        (8 * 10**15, "8.00 PB"), (4 * 10**18, "4.00e+03 PB"),
    ],
)  # fmt: skip
def test_counts_are_printed_with_three_digits(count, text):
    assert _human(count, "B") == text


def test_a_weight_selects_where_each_of_its_numbers_is_another_one_of_a_parameter():
    whole = Weight((0,))

    def made(op, *args, **kwargs):
        return Weight((0,), Made(op, args, kwargs, None))

    rows = made(torch.Tensor.__getitem__, whole, (slice(0, 2), None, ..., 1))
    assert whole.selects
    assert whole.viewed(View((2, 3), (1, 0), (3, 2))).selects
    assert rows.selects
    assert made(torch.narrow, rows, 0, 0, 1).selects
    assert made(torch.split, whole, [1, 2], dim=0).selects
    assert not made(torch.Tensor.__getitem__, whole, torch.tensor([0, 0])).selects
    assert not made(torch.Tensor.__getitem__, whole, (0, torch.tensor([0, 0]))).selects
    assert not made(torch.split, whole, [1, 2], dim=torch.tensor(0)).selects
    assert not made(torch.mul, whole, 2).selects
    assert not made(torch.narrow, made(torch.mul, whole, 2), 0, 0, 1).selects
    assert not made(torch.narrow, torch.ones(2), 0, 0, 1).selects
    assert not made(torch.narrow).selects


def use(form, weight, t=2):
    return Use("linear", Sizes(1, t, 4, 3), "", form, weight)


LINEAR = MatrixForm(layout((3, 4)), (0, 1))


def product(*leaves):
    return Weight(leaves, Made(torch.matmul, tuple(Weight((leaf,)) for leaf in leaves), {}, None))


def test_what_is_made_into_one_weight_with_a_dense_parameter_is_dense():
    first, second = product(0, 1), product(1, 2)
    untold = Use("sort", None, "why", None, Weight((0,)))
    uses = [
        [use(LINEAR, first), untold],
        [use(LINEAR, first), use(LINEAR, second)],
        [use(LINEAR, second)],
        [use(LINEAR, Weight((3,)))],
        [],
    ]
    found = Survey(uses, [], [])
    choices = choose_all(found)
    taken = "made into one weight with a parameter that is taken densely"
    assert [(choice.strategy, choice.reason) for choice in choices[:3]] == [
        (None, "sort: why"), (None, taken), (None, taken)
    ]  # fmt: skip
    assert choices[3].strategy == "build"
    assert choices[4][:3] == (None, None, {})
    assert choices[4].reason == "no op that it enters was seen"
    assert together(found, [False, False, True, False, True]) == [True, True, True, False, False]
    assert together(found, [False, False, False, True, False]) == [False, False, False, True, False]


def test_uses_of_one_map_are_counted_together_and_of_several_are_built():
    whole, other = Weight((0,)), Weight((0,)).viewed(View((3, 4), (1, 0), (4, 3)))
    again, flat = Weight((0,)).viewed(View((3, 4), (1, 0), (4, 3))), Weight((0,)).viewed(View((2, 6), (0, 1), (3, 4)))
    turned = MatrixForm(layout((4, 3)), (0, 1))
    columns = MatrixForm(layout((3, 4), outputs=(1,)), (0, 1))
    both = [use(LINEAR, whole, 1), use(LINEAR, whole, 2)]

    assert alike(*both)
    for one in (use(turned, other), use(columns, whole), use(turned, again)):
        assert alike(use(LINEAR, whole), one)
        assert alike(one, use(LINEAR, whole))
    assert not alike(use(LINEAR, whole), use(LINEAR, flat))
    assert alike(use(LINEAR, flat), use(LINEAR, flat))
    assert not alike(use(ShiftForm((3,), (3,)), whole, 1), use(ShiftForm((3,), (3,)), whole, 2))
    made = product(0, 1)
    assert alike(use(LINEAR, made), use(LINEAR, made))
    assert not alike(use(LINEAR, made), use(LINEAR, product(0, 1)))
    choice = choose(both)
    assert choice.sizes == Sizes(1, 3, 4, 3)
    assert choice.costs == {"gram": Cost(18, 18 * 7), "build": Cost(12, 72)}
    apart = choose([use(LINEAR, whole, 1), use(LINEAR, flat, 2)])
    assert apart.strategy == "build"
    assert apart.costs == {"build": Cost(0 + 8, 24 + 48)}
    assert apart.reason == "2 uses that must be summed before squaring"
    mixed = choose([use(ShiftForm((3,), (3,)), whole, 1), use(LINEAR, whole, 2)])
    assert mixed.costs == {"build": Cost(3 + 8, 3 + 48)}
    pulled = choose([use(LINEAR, made)])
    assert (pulled.strategy, pulled.reason) == ("build", "made into a weight: pulled back")
    shifts = choose([use(ShiftForm((3,), (3,)), whole, 1), use(ShiftForm((3,), (3,)), whole, 2)])
    assert (shifts.strategy, shifts.costs) == ("sum", {"sum": Cost(3, 3)})
