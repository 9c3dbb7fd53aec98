"""`per_sample` against others' per-sample gradients: Opacus, BackPACK and JAX. Needs the `bench` extra; what is not
installed is skipped. JAX's numbers are in `golden/per_sample_jax.json`, beside their script, and need nothing."""

import json
import multiprocessing
import runpy
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from functorch_mnist import layers, losses, models, per_sample, random

SCRIPT = Path(__file__).parent / "golden" / "make_per_sample_jax.py"
GOLDEN = json.loads(SCRIPT.with_name("per_sample_jax.json").read_text())["cases"]

RTOL = 1e-10  # float64 throughout, and sums of at most a million products
BATCH = 5

Loss = Callable[..., Tensor]


class Case(NamedTuple):
    """A module for a peer and the same as a pure loss, with a batch."""

    module: nn.Module
    loss_fn: Loss
    params: models.Params
    x: Tensor
    labels: Tensor

    def arguments(self) -> tuple[Loss, models.Params, Tensor, Tensor]:
        return self.loss_fn, self.params, self.x, self.labels


def tutorial_cnn() -> Case:
    images = random.normal(random.key(1), (BATCH, 1, 28, 28)).double()
    convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.Flatten())
    head = (nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, 10), nn.LogSoftmax(-1))
    return case_of(nn.Sequential(*convolutions, *head), images, 10)


def group_norm_cnn() -> Case:
    images = random.normal(random.key(2), (BATCH, 3, 9, 9)).double()
    first = (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, 8), nn.ReLU())
    second = (nn.Conv2d(8, 12, 3, padding=1, groups=2), nn.GroupNorm(2, 12), nn.ReLU())
    return case_of(nn.Sequential(*first, *second, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 4)), images, 4)


def token_net() -> Case:
    tokens = random.randint(random.key(3), (BATCH, 7), 0, 5)  # five words in seven places: each example repeats some
    embed = (nn.Embedding(6, 8), nn.Linear(8, 10), nn.Tanh(), nn.LayerNorm(10))
    return case_of(nn.Sequential(*embed, nn.Linear(10, 3), nn.Flatten(), nn.Linear(21, 4)), tokens, 4)


def case_of(module: nn.Module, x: Tensor, classes: int) -> Case:
    module = module.double()
    for i, parameter in enumerate(module.parameters()):
        drawn = random.normal(random.key(100 + i), tuple(parameter.shape)).double()
        if parameter.dim() == 1:
            parameter.data += 0.2 * drawn  # of norm layers too, whose ones and zeros would hide mistakes
        else:
            parameter.data = drawn / parameter[0].numel() ** 0.5
    params, model = models.from_module(module, example_ndim=x.dim() - 1)

    def loss_fn(params: models.Params, x: Tensor, label: Tensor) -> Tensor:
        return losses.cross_entropy(model.apply(params, x), label)

    return Case(module, loss_fn, params, x, random.randint(random.key(4), (BATCH,), 0, classes))


CASES = {"tutorial_cnn": tutorial_cnn, "group_norm_cnn": group_norm_cnn, "token_net": token_net}
# Their hooks sit on the first layer too, whose input is data and needs no gradient.
hooked = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
every_case = pytest.mark.parametrize("make_case", CASES.values(), ids=CASES.keys())


# Opacus


@pytest.fixture
def opacus() -> Any:
    return pytest.importorskip("opacus")


@hooked
@every_case
def test_grads_and_norms_equal_the_grad_samples_of_opacus(opacus: Any, make_case: Callable[[], Case]) -> None:
    case = make_case()
    wrapped = opacus.GradSampleModule(case.module, loss_reduction="sum")
    nn.CrossEntropyLoss(reduction="sum")(wrapped(case.x), case.labels).backward()
    grad_samples = {name: p.grad_sample for name, p in case.module.named_parameters()}
    assert_close(per_sample.grads(*case.arguments()), grad_samples)
    assert_close(per_sample.norms(*case.arguments()), flat(grad_samples).norm(dim=1))


@hooked
@every_case
def test_clipped_sum_equals_the_clipped_grad_samples_of_opacus(opacus: Any, make_case: Callable[[], Case]) -> None:
    case = make_case()
    max_norm = between(case)
    wrapped = opacus.GradSampleModule(case.module, loss_reduction="sum")
    sgd = torch.optim.SGD(wrapped.parameters(), lr=0.0)
    constants = {"noise_multiplier": 0.0, "max_grad_norm": max_norm, "expected_batch_size": None}
    optimizer = opacus.optimizers.DPOptimizer(sgd, loss_reduction="sum", **constants)
    nn.CrossEntropyLoss(reduction="sum")(wrapped(case.x), case.labels).backward()
    optimizer.clip_and_accumulate()
    ours = per_sample.clipped_sum(*case.arguments(), max_norm=as_opacus_clips(max_norm))
    assert_close(ours.grads, {name: p.summed_grad for name, p in case.module.named_parameters()})
    grad_samples = {name: p.grad_sample for name, p in case.module.named_parameters()}
    factors = (max_norm / flat(grad_samples).norm(dim=1)).clamp(max=1)
    by_hand = {name: torch.tensordot(factors, leaf, 1) for name, leaf in grad_samples.items()}
    assert_close(per_sample.clipped_sum(*case.arguments(), max_norm=max_norm).grads, by_hand)


@hooked
@every_case
def test_norms_and_clipped_sum_equal_those_of_opacus_ghost_clipping(opacus: Any, make_case: Callable[[], Case]) -> None:
    case = make_case()
    max_norm = between(case)
    ghost = opacus.grad_sample.GradSampleModuleFastGradientClipping(
        case.module, loss_reduction="sum", max_grad_norm=max_norm, use_ghost_clipping=True
    )
    sgd = torch.optim.SGD(ghost.parameters(), lr=0.0)
    constants = {"noise_multiplier": 0.0, "max_grad_norm": max_norm, "expected_batch_size": None}
    optimizer = opacus.optimizers.DPOptimizerFastGradientClipping(sgd, loss_reduction="sum", **constants)
    utils = pytest.importorskip("opacus.utils.fast_gradient_clipping_utils")
    criterion = nn.CrossEntropyLoss(reduction="sum")
    loss = utils.DPLossFastGradientClipping(ghost, optimizer, criterion, loss_reduction="sum")
    loss(ghost(case.x), case.labels).backward()
    ours = per_sample.clipped_sum(*case.arguments(), max_norm=as_opacus_clips(max_norm))
    assert_close(ours.norms, ghost.per_sample_gradient_norms)
    assert_close(ours.losses.sum(), criterion(ghost(case.x), case.labels).detach())
    assert_close(ours.grads, {name: p.grad for name, p in case.module.named_parameters()})


def as_opacus_clips(max_norm: float) -> Callable[[Tensor], Tensor]:
    """Opacus adds 1e-6 to the norms before it divides by them; we do not."""
    return lambda norms: (max_norm / (norms + 1e-6)).clamp(max=1)


# BackPACK


@pytest.fixture
def backpack_of_the_cnn() -> tuple[Case, dict[str, dict[str, Tensor]]]:
    backpack, extensions = pytest.importorskip("backpack"), pytest.importorskip("backpack.extensions")
    images = random.normal(random.key(5), (BATCH, 2, 11, 11)).double()
    convolutions = (nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 2, stride=2))
    sequential = nn.Sequential(*convolutions, nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 9), nn.Tanh(), nn.Linear(9, 4))
    made = case_of(sequential, images, 4)
    module, loss = backpack.extend(made.module), backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(extensions.BatchGrad(), extensions.BatchL2Grad(), extensions.SumGradSquared()):
        loss(module(made.x), made.labels).backward()
    names = ("grad_batch", "batch_l2", "sum_grad_squared")
    return made, {name: {key: getattr(p, name) for key, p in module.named_parameters()} for name in names}


@hooked
def test_grads_equal_the_batch_grad_of_backpack(
    backpack_of_the_cnn: tuple[Case, dict[str, dict[str, Tensor]]],
) -> None:
    case, theirs = backpack_of_the_cnn
    assert_close(per_sample.grads(*case.arguments()), theirs["grad_batch"])


@hooked
def test_squared_norms_equal_the_batch_l2_grad_of_backpack(
    backpack_of_the_cnn: tuple[Case, dict[str, dict[str, Tensor]]],
) -> None:
    case, theirs = backpack_of_the_cnn
    assert_close(per_sample.norms(*case.arguments()).square(), torch.stack(list(theirs["batch_l2"].values())).sum(0))
    squares = {name: norms.square() for name, norms in per_sample.leaf_norms(*case.arguments()).items()}
    assert_close(squares, theirs["batch_l2"])


@hooked
def test_second_moment_equals_the_sum_grad_squared_of_backpack(
    backpack_of_the_cnn: tuple[Case, dict[str, dict[str, Tensor]]],
) -> None:
    case, theirs = backpack_of_the_cnn
    assert_close(per_sample.second_moment(*case.arguments()), theirs["sum_grad_squared"])


# JAX


def jax_mlp(params: models.Params, x: Tensor, label: Tensor) -> Tensor:
    return losses.cross_entropy(models.mlp((3, 4, 2), activation=torch.tanh).apply(params, x), label)


def jax_cnn(params: models.Params, x: Tensor, label: Tensor) -> Tensor:
    x = layers.relu(layers.conv2d(x, params["conv1.weight"], params["conv1.bias"]))
    x = layers.max_pool2d(layers.conv2d(x, params["conv2.weight"], params["conv2.bias"], padding=1))
    logits = layers.linear(layers.flatten(x), params["fc.weight"], params["fc.bias"])
    return losses.cross_entropy(logits, label)


def assert_as_jax(stored: dict[str, Any]) -> None:
    """Norms, inner products and clipped sum are the stored ones (see `golden/make_per_sample_jax.py` for of what)."""
    loss_fn = {"mlp": jax_mlp, "cnn": jax_cnn}[stored["model"]]
    params, expected = (
        {name: float64(leaf) for name, leaf in stored[key].items()} for key in ("params", "clipped_sum")
    )
    batch = (float64(stored["x"]), torch.tensor(stored["labels"]))
    clipped = per_sample.clipped_sum(loss_fn, params, *batch, max_norm=stored["max_norm"])
    assert_close(per_sample.norms(loss_fn, params, *batch), float64(stored["norms"]))
    assert_close(per_sample.gram(loss_fn, params, batch), float64(stored["gram"]))
    assert_close(clipped.norms, float64(stored["norms"]))
    assert_close(clipped.grads, expected)


every_golden = pytest.mark.parametrize("stored", GOLDEN, ids=[stored["model"] for stored in GOLDEN])


@every_golden
def test_norms_gram_and_clipped_sum_equal_the_stored_ones_of_jax(stored: dict[str, Any]) -> None:
    assert_as_jax(stored)


@pytest.fixture(scope="module")
def jax_case() -> Iterator[Callable[[str, int], dict[str, Any]]]:
    # In a process of its own: JAX warns of every later fork in its process, and torch.compile forks.
    if find_spec("jax") is None:
        pytest.skip("needs jax")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda *arguments: pool.submit(case_by_jax, *arguments).result()


def case_by_jax(model: str, seed: int) -> dict[str, Any]:
    made: dict[str, Any] = runpy.run_path(str(SCRIPT))["case"](model, seed)
    return made


@every_golden
def test_norms_gram_and_clipped_sum_equal_vmap_of_grad_in_jax(
    jax_case: Callable[[str, int], dict[str, Any]], stored: dict[str, Any]
) -> None:
    for seed in (1, 2):
        assert_as_jax(jax_case(stored["model"], seed))


@every_golden
def test_the_stored_numbers_are_what_jax_gives_today(
    jax_case: Callable[[str, int], dict[str, Any]], stored: dict[str, Any]
) -> None:
    today = jax_case(stored["model"], stored["seed"])
    assert today.keys() == stored.keys()
    for key in ("params", "x", "labels"):
        assert today[key] == stored[key], key
    for key in ("norms", "gram", "max_norm"):
        assert_close(float64(today[key]), float64(stored[key]))
    for key, leaf in stored["clipped_sum"].items():
        assert_close(float64(today["clipped_sum"][key]), float64(leaf))


# Helpers


def between(case: Case) -> float:
    """A norm that clips some of the examples and spares the others."""
    norms = per_sample.norms(*case.arguments()).sort().values
    return (norms[1] + norms[2]).item() / 2


def flat(sample_grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([leaf.flatten(1) for leaf in sample_grads.values()], 1)


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(found: Any, expected: Any) -> None:
    """Equal to RTOL of the greatest entry of each tensor: a sum that cancels is no more exact than its terms."""
    pairs = [(found, expected)] if isinstance(expected, Tensor) else [(found[key], expected[key]) for key in expected]
    assert isinstance(expected, Tensor) or found.keys() == expected.keys()
    for ours, theirs in pairs:
        assert theirs.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=0, atol=RTOL * theirs.abs().max().item())
