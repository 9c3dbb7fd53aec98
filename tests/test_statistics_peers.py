"""The Fisher information of `statistics` against BackPACK's. Needs the `bench` extra; without BackPACK all is skipped.

BackPACK takes its quantities of the mean loss over N examples. The generalised Gauss-Newton matrix of the mean
cross-entropy is the Fisher information, so those are equal as they are; gradients of examples carry 1 / N each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from zoo import EXACT, D, difference, labels, normals

from functorch_mnist import losses, models, statistics
from functorch_mnist.per_sample import Kronecker
from functorch_mnist.statistics import Moments

BATCH = 5
CLASSES = 4


class Case(NamedTuple):
    """A module for BackPACK and the same as a pure function, with a batch."""

    module: nn.Sequential
    apply: Callable[[models.Params, Tensor], Tensor]
    params: models.Params
    x: Tensor


def mlp() -> Case:
    layers = (nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5), nn.Sigmoid(), nn.Linear(5, CLASSES))
    return case_of(nn.Sequential(*layers), normals(BATCH, 6))


def cnn() -> Case:
    """Its convolutions have 9 · 10, 3 · 4 and one position, and no kernel that is symmetric in all of its axes."""
    first = (nn.Conv2d(2, 5, (3, 2), padding=1), nn.ReLU(), nn.MaxPool2d(2))
    second = (nn.Conv2d(5, 4, 2), nn.Sigmoid())
    third = (nn.Conv2d(4, 6, (3, 4), bias=False), nn.ReLU())
    return case_of(nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Linear(6, CLASSES)), normals(BATCH, 2, 9, 9))


def case_of(module: nn.Sequential, x: Tensor) -> Case:
    module = module.to(D)
    for i, parameter in enumerate(module.parameters()):
        spread = 0.2 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
        parameter.data = spread * normals(*parameter.shape, seed=100 + i)
    params, model = models.from_module(module)
    return Case(module, model.apply, params, x)


def of_backpack(case: Case, *extensions: Any) -> dict[str, dict[str, Any]]:
    """What extensions leave at each parameter, by the name of the extension's field and of the parameter."""
    backpack = pytest.importorskip("backpack")
    module, loss = backpack.extend(case.module), backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(*extensions):
        loss(module(case.x), labels(BATCH, CLASSES)).backward()
    fields = [extension.savefield for extension in extensions]
    return {field: {name: getattr(p, field) for name, p in module.named_parameters()} for field in fields}


@pytest.fixture
def extensions() -> Any:
    return pytest.importorskip("backpack.extensions")


# Their hooks sit on the first layer too, whose input is data and needs no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
every_case = pytest.mark.parametrize("make_case", [mlp, cnn])
every_chunk_size = pytest.mark.parametrize("chunk_size", [None, 2])


# ---- the diagonal


@every_case
@every_chunk_size
def test_the_exact_diagonal_equals_backpacks_DiagGGNExact(
    extensions: Any, make_case: Callable[[], Case], chunk_size: int | None
) -> None:
    case = make_case()
    theirs = of_backpack(case, extensions.DiagGGNExact())["diag_ggn_exact"]
    found = statistics.fisher_diagonal(case.apply, case.params, case.x, chunk_size=chunk_size)
    assert_equal(found, theirs)


@every_case
@every_chunk_size
def test_the_empirical_diagonal_equals_backpacks_SumGradSquared_times_the_number_of_examples(
    extensions: Any, make_case: Callable[[], Case], chunk_size: int | None
) -> None:
    case = make_case()
    theirs = of_backpack(case, extensions.SumGradSquared())["sum_grad_squared"]
    found = moments(case, chunk_size).fisher
    assert_equal(found, {name: BATCH * squares for name, squares in theirs.items()})


@every_case
@every_chunk_size
def test_the_empirical_diagonal_and_the_variance_are_those_of_backpacks_BatchGrad_times_the_number_of_examples(
    extensions: Any, make_case: Callable[[], Case], chunk_size: int | None
) -> None:
    case = make_case()
    rows = of_backpack(case, extensions.BatchGrad())["grad_batch"]
    rows = {name: BATCH * grads for name, grads in rows.items()}
    found = moments(case, chunk_size)
    assert_equal(found.fisher, {name: grads.square().mean(0) for name, grads in rows.items()})
    assert_equal(found.variance, {name: grads.var(0) for name, grads in rows.items()})


# ---- the Kronecker factors


@every_case
@every_chunk_size
def test_the_factors_of_inputs_equal_backpacks_KFLR(
    extensions: Any, make_case: Callable[[], Case], chunk_size: int | None
) -> None:
    case = make_case()
    theirs = of_backpack(case, extensions.KFLR())["kflr"]
    found = kronecker(case, chunk_size)
    assert_equal(
        {name: pair.inputs[0] for name, pair in found.items()},
        {name: in_our_order(theirs[name][1], case.params[name]) for name in found},
    )


@pytest.mark.parametrize(
    ("make_case", "single"),
    [(mlp, ("0.weight", "2.weight", "4.weight")), (cnn, ("5.weight", "8.weight"))],
    ids=["mlp", "cnn"],
)
@every_chunk_size
def test_the_factors_of_cotangents_at_one_position_equal_backpacks_KFLR(
    extensions: Any, make_case: Callable[[], Case], single: tuple[str, ...], chunk_size: int | None
) -> None:
    case = make_case()
    theirs = of_backpack(case, extensions.KFLR())["kflr"]
    found = kronecker(case, chunk_size)
    assert_equal({name: found[name].cotangents[0] for name in single}, {name: theirs[name][0] for name in single})


@every_chunk_size
def test_the_factors_of_cotangents_at_positions_are_their_products_summed_from_the_root_that_KFLR_propagates(
    extensions: Any, chunk_size: int | None
) -> None:
    case = cnn()
    convolution = pytest.importorskip("backpack.extensions.secondorder.hbp.conv2d").HBPConv2d

    class SumOfProducts(convolution):  # type: ignore[misc]
        """KFLR's own factor is `Σ_n (Σ_t g) (Σ_t g)ᵀ`, the Fisher information of the bias; this is `Σ_n Σ_t g gᵀ`."""

        def _factor_from_sqrt(self, module: nn.Conv2d, backproped: Tensor) -> Tensor:
            return torch.einsum("kniyx,knjyx->ij", backproped, backproped)

    kflr = extensions.KFLR()
    kflr.set_module_extension(nn.Conv2d, SumOfProducts(), overwrite=True)
    theirs = of_backpack(case, kflr)["kflr"]
    found = kronecker(case, chunk_size)
    assert_equal({name: pair.cotangents[0] for name, pair in found.items()}, {name: theirs[name][0] for name in found})


@every_case
def test_the_diagonal_of_biases_is_the_diagonal_of_backpacks_KFLR(
    extensions: Any, make_case: Callable[[], Case]
) -> None:
    case = make_case()
    theirs = of_backpack(case, extensions.KFLR())["kflr"]
    found = statistics.fisher_diagonal(case.apply, case.params, case.x)
    biases = [name for name in found if name.endswith("bias")]
    assert_equal({name: found[name] for name in biases}, {name: theirs[name][0].diagonal() for name in biases})


# ---- helpers


def moments(case: Case, chunk_size: int | None) -> Moments:
    def loss_fn(params: models.Params, x: Tensor, label: Tensor) -> Tensor:
        return losses.cross_entropy(case.apply(params, x), label)

    batch = (case.x, labels(BATCH, CLASSES))
    return statistics.fold(loss_fn, case.params, *batch, of=Moments.of, chunk_size=chunk_size)


def kronecker(case: Case, chunk_size: int | None) -> dict[str, Kronecker]:
    """Ours, of the weights, each of which is one matrix."""
    found = statistics.fisher_kronecker(case.apply, case.params, case.x, chunk_size=chunk_size)
    assert {name for name in case.params if name.endswith("weight")} == found.keys()
    assert all(len(factor) == 1 for pair in found.values() for factor in (pair.inputs, pair.cotangents))
    return found


def in_our_order(factor: Tensor, weight: Tensor) -> Tensor:
    """A factor of inputs in `torch.nn.Unfold`'s order, channel then kernel, in ours, kernel then channel."""
    places = torch.arange(len(factor)).view(weight.shape[1:]).movedim(0, -1).flatten()
    return factor[places][:, places]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(leaf.dtype == D for leaf in (*found.values(), *expected.values()))
    assert difference(found, {name: expected[name] for name in found}) <= EXACT
