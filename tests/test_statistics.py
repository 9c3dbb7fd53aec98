"""Statistics against their definitions on dense gradients, their merge law, and the noise scale's error bars."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo import CASES, EXACT, D, dense, difference, linear, mlp, normals, of_model, tutorial_cnn

import functorch_mnist as fm
from functorch_mnist import losses, per_sample, random, statistics, tree
from functorch_mnist.statistics import Alignment, Distribution, KroneckerFactors, Moments, Noise, Norms


def flat(rows):
    """(N, P) of a tree of (N, *w)."""
    leaves = tree.leaves(rows)
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def everything(direction):
    """All statistics in one pass."""
    return lambda gradients: {
        "norms": Norms.of(gradients),
        "moments": Moments.of(gradients),
        "noise": Noise.of(gradients),
        "alignment": Alignment.of(gradients, direction=direction),
        "kronecker": KroneckerFactors.of(gradients),
    }


def answers(found):
    """What can be asked of them."""
    norms, moments, noise = found["norms"], found["moments"], found["noise"]
    return {
        "norm mean": norms.whole.mean,
        "norm root mean square": norms.whole.root_mean_square,
        "norm least": norms.whole.minimum,
        "norm most": norms.whole.maximum,
        "leaf norm mean": {path: leaf.mean for path, leaf in norms.leaves.items()},
        "mean": moments.mean,
        "variance": moments.variance,
        "fisher": moments.fisher,
        "trace": noise.trace,
        "square norm": noise.square_norm,
        "scale": noise.scale,
        "diversity": noise.diversity,
        "cosine mean": found["alignment"].cosines.mean,
    }


def definitions(case, direction):
    """The same from the dense gradients, each by its formula."""
    rows = dense(case.loss_fn, case.params, case.batch)
    matrix = flat(rows)
    count, v = len(matrix), tree.ravel(direction)
    norms = matrix.norm(dim=1)
    mean = matrix.mean(0)
    trace = torch.cov(matrix.T).trace() if matrix.shape[1] < 2000 else (matrix - mean).square().sum() / (count - 1)
    square = mean @ mean - trace / count
    cosines = torch.where(norms > 0, matrix @ v / (norms * v.norm()), 0.0)
    paths = tree.paths(case.params)
    leaves = dict(zip(paths, [leaf.reshape(count, -1).norm(dim=1).mean() for leaf in tree.leaves(rows)], strict=True))
    return {
        "norm mean": norms.mean(),
        "norm root mean square": norms.square().mean().sqrt(),
        "norm least": norms.min(),
        "norm most": norms.max(),
        "leaf norm mean": leaves,
        "mean": tree.map(lambda g: g.mean(0), rows),
        "variance": tree.map(lambda g: (g - g.mean(0)).square().sum(0) / (count - 1), rows),
        "fisher": tree.map(lambda g: g.square().mean(0), rows),
        "trace": trace,
        "square norm": square,
        "scale": trace / square,
        "diversity": norms.square().sum() / matrix.sum(0).square().sum(),
        "cosine mean": cosines.mean(),
    }


@pytest.mark.parametrize("name", CASES)
def test_every_statistic_equals_its_dense_definition(name):
    case = CASES[name]()
    direction = tree.map(lambda w: normals(*w.shape, seed=8), case.params)
    found = statistics.fold(case.loss_fn, case.params, *case.batch, of=everything(direction))
    for quantity, value in definitions(case, direction).items():
        assert difference(answers(found)[quantity], value) <= EXACT, quantity


@pytest.mark.parametrize("name", ["norms_net", "mlp", "tied_linear_and_embedding", "regularised"])
def test_chunks_and_order_change_nothing_and_masked_examples_are_left_out(name):
    case = CASES[name]()
    direction = tree.map(lambda w: normals(*w.shape, seed=8), case.params)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = tuple(rows[order] for rows in case.batch)
    mask = torch.tensor([True, False, True, True])
    poisoned = tuple(
        rows.index_fill(0, torch.tensor([1]), torch.nan) if rows.is_floating_point() else rows for rows in case.batch
    )
    fold = partial(statistics.fold, case.loss_fn, case.params, of=everything(direction))
    whole = fold(*case.batch)
    for other in (fold(*case.batch, chunk_size=1), fold(*case.batch, chunk_size=3), fold(*shuffled, chunk_size=3)):
        assert difference(answers(other), answers(whole)) <= EXACT
    rest = fold(*(rows[mask] for rows in case.batch))
    for other in (fold(*poisoned, mask=mask), fold(*poisoned, mask=mask, chunk_size=3)):
        assert difference(answers(other), answers(rest)) <= EXACT


@given(data=st.data())
def test_the_fold_of_two_parts_is_the_merge_of_their_folds(data):
    sizes = [data.draw(st.integers(0, 5)) for _ in range(3)]
    chunk = data.draw(st.integers(1, 6))
    case = mlp()
    count = sum(sizes)
    x, y = normals(count, 6, seed=count), torch.arange(count) % 3
    direction = tree.map(lambda w: normals(*w.shape, seed=8), case.params)
    fold = partial(statistics.fold, case.loss_fn, case.params, of=everything(direction), chunk_size=chunk)
    a, b, c = (fold(*pair) for pair in zip(x.split(sizes), y.split(sizes), strict=True))
    whole = fold(x, y)
    for merged in (
        statistics.merge(statistics.merge(a, b), c),
        statistics.merge(a, statistics.merge(b, c)),
        statistics.merge(c, statistics.merge(b, a)),
    ):
        for found, expected in zip(tree.leaves(merged), tree.leaves(whole), strict=True):
            torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)


@given(values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), max_size=40), q=st.floats(0, 1), at=st.integers(0, 40))
def test_a_quantile_is_that_of_the_numbers_rounded_to_bfloat16(values, q, at):
    numbers = torch.tensor(values, dtype=D)
    parts = [Distribution.of(part, torch.ones(len(part), dtype=torch.bool)) for part in (numbers[:at], numbers[at:])]
    found = statistics.merge(*parts)
    assert found.count == len(values)
    if not values:
        assert found.quantile(q).isnan()
        assert found.mean.isnan()
        assert (found.minimum, found.maximum) == (math.inf, -math.inf)
        return
    rounded = np.sort(numbers.bfloat16().double().numpy())
    place = min(max(math.ceil(q * len(values)), 1), len(values)) - 1
    assert found.quantile(q) == rounded[place]
    assert (found.minimum, found.maximum) == (numbers.min(), numbers.max())


def test_a_quantile_must_be_from_0_to_1():
    found = Distribution.of(torch.ones(3), torch.ones(3, dtype=torch.bool))
    for q in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"quantile: q must be from 0 to 1"):
            found.quantile(q)


def test_the_signal_to_noise_ratio_is_zero_without_a_signal_and_infinite_without_noise():
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, -1.0, 3.0]], dtype=D)
    found = statistics.fold(lambda w, x: (w * x).sum(), torch.zeros(4, dtype=D), x, of=Moments.of)
    assert found.signal_to_noise.tolist() == [math.inf, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("name", ["norms_net", "sequence_linear", "tied_linear_and_embedding"])
def test_the_kronecker_factors_of_a_fold_are_those_of_per_sample(name):
    case = CASES[name]()
    found = statistics.fold(case.loss_fn, case.params, *case.batch, of=KroneckerFactors.of, chunk_size=3).sums
    expected = per_sample.kronecker(case.loss_fn, case.params, *case.batch)
    assert found.keys() == expected.keys()
    assert difference(found, expected) <= EXACT


def test_cosines_are_those_of_the_gradients_and_zero_for_none():
    case = tutorial_cnn()
    rows = flat(dense(case.loss_fn, case.params, case.batch))
    direction = fm.tree.unravel(case.params, rows.mean(0))
    found = statistics.cosines(case.loss_fn, case.params, *case.batch, direction=direction, chunk_size=3)
    expected = torch.nn.functional.cosine_similarity(rows, rows.mean(0)[None])
    assert difference(found, expected) <= EXACT
    zeros = tree.zeros_like(case.params)
    assert not statistics.cosines(case.loss_fn, case.params, *case.batch, direction=zeros).any()


def test_a_fold_compiles_as_one_graph_to_the_same():
    case = linear()
    direction = case.params

    def fold(params, *batch):
        return statistics.fold(case.loss_fn, params, *batch, of=everything(direction))

    traced = torch.compile(fold, fullgraph=True, backend="eager")  # without the compiler's own rounding
    eager, fast = fold(case.params, *case.batch), traced(case.params, *case.batch)
    for a, b in zip(tree.leaves(fast), tree.leaves(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_is_no_statistic_is_refused_by_name():
    with pytest.raises(TypeError, match=r"merge: statistics must be Sums.*Found Tensor"):
        statistics.merge(torch.ones(1), torch.ones(1))
    case = linear()
    with pytest.raises(ValueError, match=r"statistics.fold: chunk_size"):
        statistics.fold(case.loss_fn, case.params, *case.batch, of=Noise.of, chunk_size=0)


# ---- the noise scale


def quadratic(count, deviation=1.0, seed=0):
    """Gradients w - x_i = -x_i: normal, of known mean and covariance."""
    x = normals(count, 20, seed=seed) * deviation + 0.5
    return (lambda w, x: (w - x).square().sum() / 2), torch.zeros(20, dtype=D), x


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_the_error_bar_is_the_jackknife_of_leaving_each_example_out(chunk_size):
    case = mlp()
    x, y = normals(23, 6) + 2, torch.zeros(23, dtype=torch.int64)
    found = statistics.noise_scale(case.loss_fn, case.params, x, y, chunk_size=chunk_size)
    rows = flat(dense(case.loss_fn, case.params, (x, y)))

    def estimates(rows):
        trace = rows.var(0).sum()
        square = rows.mean(0).square().sum() - trace / len(rows)
        return torch.stack([trace, square, trace / square])

    whole = estimates(rows)
    left_out = torch.stack([estimates(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(23)])
    errors = ((left_out - left_out.mean(0)).square().sum(0) * 22 / 23).sqrt()
    expected = torch.stack([whole[2], errors[2], whole[0], errors[0], whole[1], errors[1]])
    assert difference(torch.tensor(found[:6], dtype=D), expected) <= 1e-8  # differences of nearly equal estimates
    assert found.samples == 23


def test_the_noise_scale_is_that_of_a_known_distribution_within_its_error_bars():
    scale, misses = 20 / (20 * 0.25), 0
    for seed in range(40):
        found = statistics.noise_scale(*quadratic(200, seed=seed))
        misses += abs(found.scale - scale) > 1.96 * found.error
    assert misses <= 6  # 2 expected; more than 6 of 40 has a probability of 0.3 % at 95 % coverage


def test_the_estimate_of_two_batch_sizes_agrees_with_that_of_single_examples_within_the_error_bars():
    model = fm.models.mlp([784, 32, 10])
    params = model.init(random.key(0))
    train = fm.data.load("mnist").train
    images, labels_ = fm.data.normalize(train.images[:1536], 0.1307, 0.3081).flatten(1), train.labels[:1536]

    def loss_fn(params, image, label):
        return losses.cross_entropy(model.apply(params, image), label)

    single = statistics.noise_scale(loss_fn, params, images, labels_, chunk_size=256)
    batch = torch.func.grad(lambda p, x, y: losses.cross_entropy(model.apply(p, x), y).mean())
    large_size, small_size = 64, 8
    squares = {size: [] for size in (small_size, large_size)}
    for size, found in squares.items():
        for part in range(1536 // 64):
            rows = slice(64 * part, 64 * part + size)
            found.append(tree.norm(batch(params, images[rows], labels_[rows])).square())
    small, large = (torch.stack(squares[size]) for size in (small_size, large_size))
    pair = statistics.mean_noise_scale(
        *statistics.two_batch_sizes(small, large, small_size=small_size, large_size=large_size)
    )
    assert abs(single.scale - pair.scale) <= 2 * math.hypot(single.error, pair.error)
    assert single.error < pair.error


def test_the_estimate_of_a_batch_is_that_of_its_norms_and_sum():
    loss_fn, w, x = quadratic(64)
    norms = per_sample.norms(loss_fn, w, x)
    total = torch.func.vmap(torch.func.grad(loss_fn), in_dims=(None, 0))(w, x).sum(0)
    trace, square = statistics.batch_noise(norms, total)
    noise = statistics.fold(loss_fn, w, x, of=Noise.of)
    assert torch.allclose(trace, noise.trace, rtol=1e-12)
    assert torch.allclose(square, noise.square_norm, rtol=1e-12)
    padded = torch.cat([norms, torch.zeros(3, dtype=D)])
    masked = statistics.batch_noise(padded, total, torch.arange(67) < 64)
    assert torch.allclose(torch.stack(masked), torch.stack([trace, square]), rtol=1e-12)
    assert statistics.batch_noise(norms[:1], total)[0].isnan()


def test_the_average_over_steps_is_a_ratio_of_means_with_its_jackknife():
    traces, squares = normals(9, seed=1) + 5, normals(9, seed=2) / 10 + 1
    found = statistics.mean_noise_scale(traces, squares)
    ratios = torch.stack([
        (traces.sum() - traces[i]) / (squares.sum() - squares[i]) for i in range(9)
    ])  # fmt: skip
    assert math.isclose(found.scale, traces.mean() / squares.mean(), rel_tol=1e-12)
    assert math.isclose(found.error, ((ratios - ratios.mean()).square().sum() * 8 / 9).sqrt(), rel_tol=1e-9)
    assert math.isclose(found.trace_error, traces.std() / 3, rel_tol=1e-9)


def test_a_gradient_lost_in_the_noise_has_an_infinite_scale():
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=D)
    found = statistics.noise_scale(lambda w, x: w * x, torch.zeros((), dtype=D), x)
    assert (found.scale, found.error) == (math.inf, math.inf)
    assert found.square_norm < 0 < found.trace


def test_the_critical_batch_size_takes_twice_the_least_of_both():
    assert statistics.efficiency(900.0, 900) == (2.0, 2.0)
    few, many = statistics.efficiency(900.0, 9), statistics.efficiency(900.0, 90_000)
    assert few.steps == 101
    assert few.examples == 1.01
    assert many.examples == 101
    assert many.steps == 1.01


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: statistics.noise_scale(*quadratic(2)), "noise_scale: at least three examples"),
        (lambda: statistics.mean_noise_scale(torch.ones(2), torch.ones(2)), "mean_noise_scale: .* at least 3"),
        (lambda: statistics.mean_noise_scale(torch.ones(3), torch.ones(4)), "mean_noise_scale"),
        (
            lambda: statistics.two_batch_sizes(torch.ones(3), torch.ones(3), small_size=8, large_size=8),
            "small_size must be below",
        ),
        (lambda: statistics.efficiency(-1.0, 5), "efficiency"),
        (lambda: statistics.efficiency(math.nan, 5), "efficiency"),
    ],
)
def test_what_has_no_noise_scale_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()


# ---- the Fisher information


def classifier():
    case = mlp()
    model = fm.models.mlp([6, 8, 8, 3])
    return model.apply, case.params, normals(11, 6)


def dense_fisher(apply, params, x):
    """(P, P): the expectation over the model's own labels, from its definition."""

    def log_probs(params, x):
        return torch.log_softmax(apply(params, x), -1)

    jacobian = torch.func.vmap(torch.func.jacrev(log_probs), in_dims=(None, 0))(params, x)
    rows = torch.cat([leaf.reshape(len(x), 3, -1) for leaf in tree.leaves(jacobian)], 2)
    probs = log_probs(params, x).exp()
    return torch.einsum("nk,nki,nkj->ij", probs, rows, rows) / len(x)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_the_diagonal_of_the_fisher_information_equals_its_definition(chunk_size):
    apply, params, x = classifier()
    found = statistics.fisher_diagonal(apply, params, x, chunk_size=chunk_size)
    assert difference(tree.ravel(found), dense_fisher(apply, params, x).diagonal()) <= EXACT


def test_drawn_labels_give_the_fisher_information_on_average_and_the_same_for_one_key():
    apply, params, x = classifier()
    key = random.key(3)
    exact = tree.ravel(statistics.fisher_diagonal(apply, params, x))

    def drawn(i, **options):
        key_ = random.fold_in(key, i)
        return tree.ravel(statistics.fisher_diagonal(apply, params, x, key=key_, draws=25, **options))

    each = torch.stack([drawn(i) for i in range(16)])
    mean, deviation = each.mean(0), each.std(0) / 4
    assert ((mean - exact).abs() <= 5 * deviation + 1e-12).all()
    assert (mean - exact).norm() < 0.1 * exact.norm()
    assert difference(drawn(0, chunk_size=4), each[0]) <= EXACT
    assert difference(each[1], each[0]) > 1e-3


def test_kronecker_factors_of_the_fisher_information_equal_their_definition():
    apply, params, x = classifier()
    found = statistics.fisher_kronecker(apply, params, x, chunk_size=4)
    assert difference(found["0.weight"].inputs[0], x.T @ x / len(x)) <= EXACT

    def output_scores(bias, x):  # the cotangents of the first layer's outputs are the gradients of its bias
        return torch.log_softmax(apply({**params, "0.bias": bias}, x), -1)

    rows = torch.func.vmap(torch.func.jacrev(output_scores), in_dims=(None, 0))(params["0.bias"], x)  # (N, K, H)
    probs = torch.func.vmap(output_scores, in_dims=(None, 0))(params["0.bias"], x).exp()
    expected = torch.einsum("nk,nki,nkj->ij", probs, rows, rows) / len(x)
    assert difference(found["0.weight"].cotangents[0], expected) <= EXACT
    folded = statistics.fold(
        of_model(apply, params, x).loss_fn, params, x, torch.arange(11) % 3, of=KroneckerFactors.of
    )
    assert difference(folded.mean["0.weight"].inputs, found["0.weight"].inputs) <= EXACT


def test_masked_inputs_are_left_out_of_the_fisher_information():
    apply, params, x = classifier()
    mask = torch.arange(11) != 4
    poisoned = x.index_fill(0, torch.tensor([4]), torch.nan)
    found = statistics.fisher_diagonal(apply, params, poisoned, mask=mask, chunk_size=4)
    assert difference(found, statistics.fisher_diagonal(apply, params, x[mask])) <= EXACT
    for draws in (0, -1):
        with pytest.raises(ValueError, match=r"fisher: at least one example and one draw"):
            statistics.fisher_diagonal(apply, params, x, draws=draws)


# ---- precision, and what is refused


def dot_loss(w, x):
    return (w * x).sum()  # whose gradient is x


def test_sums_of_bfloat16_gradients_are_not_rounded_to_it():
    x = (torch.randn(6000, 5, generator=torch.Generator().manual_seed(0)) + 10).bfloat16()
    w = torch.zeros(5, dtype=torch.bfloat16)
    found = statistics.fold(dot_loss, w, x, of=lambda g: (Noise.of(g), Moments.of(g)), chunk_size=1000)
    expected = x.double().var(0)
    assert abs(found[0].trace - expected.sum()) <= 1e-3 * expected.sum()
    assert ((found[1].variance - expected).abs() <= 1e-3 * expected).all()


def test_labels_of_bfloat16_outputs_are_drawn_without_bias():
    params = torch.zeros(100, dtype=torch.bfloat16)
    x = torch.zeros(20000, 1, dtype=torch.bfloat16)
    found = statistics.fisher_diagonal(lambda w, x: w + 0 * x.sum(), params, x, key=random.key(1))
    assert ((found - 0.0099).abs() < 0.0035).all()  # 0.0099 is exact, five standard deviations of 20,000 draws


def test_a_nan_is_not_taken_for_a_right_angle():
    x = torch.tensor([[1.0, 0.0], [math.nan, 1.0], [0.0, 0.0]], dtype=D)
    direction, params = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)
    found = statistics.cosines(dot_loss, params, x, direction=direction)
    assert found.isnan().tolist() == [False, True, False]
    assert found[2] == 0
    folded = statistics.fold(dot_loss, params, x, of=partial(Alignment.of, direction=direction))
    assert folded.cosines.mean.isnan()


def test_equal_gradients_have_no_noise():
    found = statistics.noise_scale(dot_loss, torch.zeros(3, dtype=D), torch.full((50, 3), 0.1, dtype=D))
    assert 0 <= found.scale < 1e-12
    assert statistics.efficiency(0.0, 64) == (1.0, math.inf)


def test_parameters_that_require_gradients_leave_no_graph():
    w = torch.zeros(3, dtype=D, requires_grad=True)
    found = statistics.fold(dot_loss, w, normals(4, 3), of=Noise.of, chunk_size=2)
    assert not any(leaf.requires_grad for leaf in tree.leaves(found))


class Pair(NamedTuple):
    noise: Noise
    norms: Norms


def test_a_named_tuple_of_statistics_stays_one():
    w, x = torch.zeros(3, dtype=D), normals(4, 3)
    for chunk_size in (None, 3):
        found = statistics.fold(dot_loss, w, x, of=lambda g: Pair(Noise.of(g), Norms.of(g)), chunk_size=chunk_size)
        assert isinstance(found, Pair)
        assert found.noise.count == 4


W, X = torch.zeros(3, dtype=D), normals(6, 3)
NOISE = statistics.fold(dot_loss, W, X, of=Noise.of)
OTHER = statistics.fold(dot_loss, W[:1], X[:, :1], of=Noise.of)
NORMS = [
    statistics.fold(lambda p, x: sum((w * x).sum() for w in p.values()), dict.fromkeys(names, W), X, of=Norms.of)
    for names in ("a", "ab")
]


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: statistics.merge(NOISE, OTHER), ValueError, "merge: two of the same parameters"),
        (lambda: statistics.merge(*NORMS), ValueError, "merge: two of the same parameters"),
        (lambda: statistics.merge(NOISE, NORMS[0]), TypeError, "merge: two of one kind. Found Noise and Norms"),
        (lambda: statistics.merge({"a": NOISE}, {"b": NOISE}), ValueError, "merge: two with the same statistics"),
        (lambda: statistics.merge((NOISE,), (NOISE, NOISE)), ValueError, "merge: two with the same statistics"),
        (lambda: statistics.fold(dot_loss, W, X, of=lambda g: g.norms), TypeError, "fold: statistics must be Sums"),
        (lambda: statistics.fold(dot_loss, W, [1.0], of=Noise.of), TypeError, "Found list"),
        (lambda: statistics.fold(dot_loss, W, X, of=Noise.of, mask=[True] * 6), TypeError, "Found list"),
        (
            lambda: statistics.fold(dot_loss, W, X, of=partial(Alignment.of, direction=W[:2])),
            ValueError,
            "dot: direction must have the shapes",
        ),
        (lambda: statistics.batch_noise(torch.ones(3), W, torch.ones(4).bool()), ValueError, "batch_noise: the mask"),
        (lambda: statistics.batch_noise(torch.ones(3), W, torch.ones(3)), ValueError, "batch_noise: the mask"),
        (lambda: statistics.mean_noise_scale(torch.ones(3), torch.ones(3) * math.nan), ValueError, "must be finite"),
        (
            lambda: statistics.two_batch_sizes(torch.ones(3), torch.ones(1), small_size=1, large_size=2),
            ValueError,
            "must be of pairs",
        ),
        (lambda: statistics.fisher_diagonal(dot_loss, W, X), ValueError, r"the outputs of one example must be \(K,\)"),
        (lambda: statistics.fisher_diagonal(lambda w, x: w, W, X, draws=5), ValueError, "draws need a key"),
        (
            lambda: statistics.fisher_diagonal(lambda w, x: w, W, X, key=random.split(random.key(0))),
            ValueError,
            r"key must be \(2,\)",
        ),
        (
            lambda: per_sample.norms(lambda p, x: (p["a"]["b"] * p["a/b"] * x).sum(), {"a": {"b": W}, "a/b": W}, X),
            ValueError,
            "parameters must have different paths",
        ),
        (
            lambda: per_sample.factored(lambda w, x: ((w * x).sum(), 1.0), W, X, has_aux=True),
            TypeError,
            "aux must be a pytree of tensors. Found float",
        ),
        (
            lambda: per_sample.factored(lambda w, x: ((w * x).sum(), x, x), W, X, has_aux=True),
            ValueError,
            r"must return a tuple \(loss, aux\). Found a tuple of 3",
        ),
        (
            lambda: per_sample.factored(dot_loss, W, X).project([(torch.ones(2, 2), torch.ones(1, 1))]),
            ValueError,
            "project: a map's sizes",
        ),
    ],
)
def test_a_users_mistake_is_told_in_words(call, error, said):
    with pytest.raises(error, match=said):
        call()
