"""Correlated noise: strategies against closed forms, against all patterns of participation and against jax-privacy."""

import itertools
import math

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from functorch_mnist import random, train
from functorch_mnist.privacy.correlation import BlockDiagonal, Toeplitz, inverse, noise_draws
from functorch_mnist.privacy.strategies import banded, banded_toeplitz, bisr, lambda_cgd

D = torch.float64
INDEPENDENT = Toeplitz((1.0,))
STRATEGIES = {
    "independent": INDEPENDENT,
    "banded:1": banded(1, 20),
    "banded:2": banded(2, 20),
    "banded:3": banded(3, 1000),
    "bisr:2": bisr(2),
    "bisr:4": bisr(4),
    "bisr:9": bisr(9),
    "cgd:0.9": lambda_cgd(0.9),
    "toeplitz:3": banded_toeplitz(3, 20),
}

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES.keys())


def noising(strategy, steps):
    """C⁻¹ as the weights of all steps say it: (n, n) float64."""
    matrix = torch.zeros(steps, steps, dtype=D)
    for t in range(steps):
        for k, weight in enumerate(strategy.weights(t).tolist()[: t + 1]):
            matrix[t, t - k] = weight
    return matrix


def worst(matrix, min_separation, participations):
    """The longest sum of columns of C that one example's participations can be, by trying all."""
    steps = len(matrix)
    return max(
        float(matrix[:, list(pattern)].sum(1).norm())
        for count in range(1, participations + 1)
        for pattern in itertools.combinations(range(steps), count)
        if all(b - a >= min_separation for a, b in itertools.pairwise(pattern))
    )


# Closed forms


def test_lambda_cgd_is_a_geometric_series():
    strategy, lam, steps = lambda_cgd(0.75), 0.75, 30
    c = lam ** torch.arange(steps, dtype=D)
    torch.testing.assert_close(strategy.coefficients(steps), c, rtol=0, atol=1e-14)
    alone = math.sqrt((1 - lam ** (2 * steps)) / (1 - lam**2))
    assert strategy.sensitivity(steps, participations=1) == pytest.approx(alone, rel=1e-12)
    every = ((1 - lam ** torch.arange(1, steps + 1, dtype=D)) / (1 - lam)).norm()
    assert strategy.sensitivity(steps) == pytest.approx(float(every), rel=1e-12)
    assert strategy.errors(steps).tolist() == pytest.approx([1 + t * (1 - lam) ** 2 for t in range(steps)])


def test_bisr_has_the_coefficients_of_the_root_of_1_minus_x():
    assert bisr(8).noise == (1, -1 / 2, -1 / 8, -1 / 16, -5 / 128, -7 / 256, -21 / 1024, -33 / 2048)
    assert bisr(2) == lambda_cgd(0.5)
    assert bisr(1) == INDEPENDENT


def test_bisr_of_all_bands_factors_prefix_sums_into_equal_halves():
    c = bisr(40).coefficients(40)
    assert torch.allclose(torch.tensor([float(c[: t + 1] @ c[: t + 1].flip(0)) for t in range(40)]), torch.ones(40))
    assert torch.allclose(torch.tensor(bisr(40).noise, dtype=D).cumsum(0), c)  # A C⁻¹ = C


def test_two_bands_by_hand():
    # C = [[a, 0], [b, 1]] with a² + b² = 1: the errors of the first sum and of a whole block are 1 / a² and
    # ((1 - b) / a)² + 1, and before a step are 0 to 19 blocks.
    steps, best = 40, math.inf
    for a in torch.linspace(0.3, 0.9, 60_001, dtype=D).tolist():
        b = math.sqrt(1 - a * a)
        first, whole = 1 / a**2, ((1 - b) / a) ** 2 + 1
        best = min(best, (first + whole) / 2 + (steps / 2 - 1) / 2 * whole)
    strategy = banded(2, steps)
    found = float(strategy.errors(steps).mean()) * strategy.sensitivity(steps, participations=1) ** 2
    assert found == pytest.approx(best, rel=2e-5)  # noise is rounded


def test_without_correlation_all_is_as_in_dp_sgd():
    for strategy in (INDEPENDENT, lambda_cgd(0.0), bisr(1), banded(1, 9), banded_toeplitz(1, 9)):
        assert strategy.errors(9).tolist() == pytest.approx(list(range(1, 10)))
        assert strategy.sensitivity(9, min_separation=2) == pytest.approx(math.sqrt(5))
        assert strategy.weights(5)[0] == 1 and strategy.weights(5)[1:].abs().sum() < 1e-15
    assert len(INDEPENDENT.weights(5)) == len(lambda_cgd(0.0).weights(5)) == len(banded(1, 9).weights(5)) == 1


@each_strategy
def test_a_strategy_times_its_noise_is_the_identity(strategy):
    steps = 20
    if isinstance(strategy, Toeplitz):
        c = strategy.coefficients(steps)
        place = torch.arange(steps)
        matrix = torch.where(place[:, None] >= place, c[(place[:, None] - place).clamp(min=0)], 0)
    else:
        matrix = torch.block_diag(*[strategy.block()] * steps)[:steps, :steps]
    tolerance = 1e-6 if strategy is STRATEGIES["toeplitz:3"] else 1e-12  # whose weights are rounded
    assert (matrix @ noising(strategy, steps) - torch.eye(steps, dtype=D)).abs().max() < tolerance


@each_strategy
def test_errors_are_those_of_prefix_sums_of_the_noise(strategy):
    steps = 17  # no multiple of the bands
    expected = noising(strategy, steps).cumsum(0).square().sum(1)
    torch.testing.assert_close(strategy.errors(steps), expected, rtol=1e-6, atol=0)


# Sensitivity


@pytest.mark.parametrize("min_separation", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("participations", [1, 2, 3])
@each_strategy
def test_sensitivity_is_that_of_the_worst_pattern(strategy, min_separation, participations):
    steps, given = 12, {"min_separation": min_separation, "participations": participations}
    if isinstance(strategy, BlockDiagonal) and min_separation < strategy.bands:
        with pytest.raises(ValueError, match=r"at least the [23] bands"):
            strategy.sensitivity(steps, **given)
        return
    found = strategy.sensitivity(steps, **given)
    expected = worst(torch.linalg.inv(noising(strategy, steps)), min_separation, participations)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found >= expected * (1 - (1e-6 if strategy is STRATEGIES["toeplitz:3"] else 1e-12))


@pytest.mark.parametrize("strategy", [bisr(4), lambda_cgd(0.9)], ids=["bisr", "cgd"])
def test_no_gradients_of_more_dimensions_move_it_further(strategy):
    c = torch.linalg.inv(noising(strategy, 12))[:, [0, 4, 8]]
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(1000, 3, 5, dtype=D, generator=generator)
    moved = (c @ (gradients / gradients.norm(dim=-1, keepdim=True))).flatten(1).norm(dim=1)
    assert moved.max() <= strategy.sensitivity(12, min_separation=4)


def test_participations_are_no_more_than_there_is_room_for():
    strategy = bisr(4)
    assert strategy.sensitivity(20, min_separation=7, participations=3) == strategy.sensitivity(20, min_separation=7)
    assert strategy.sensitivity(20, min_separation=7, participations=99) == strategy.sensitivity(20, min_separation=7)
    one = strategy.sensitivity(20, min_separation=20) / strategy.coefficients(20).norm().item()
    assert math.isclose(strategy.sensitivity(1), one, rel_tol=1e-14)  # norms are summed in another order


# jax-privacy

PUBLISHED = {  # what jax-privacy 2.0.0 finds: n, bands, coefficients, ‖c‖² times the mean error
    (100, 4): ([0.6829825767, 0.4828022136, 0.4144575606, 0.358694512], 15.336178170715025),
    (1000, 2): ([0.7501528255, 0.6612644996], 253.45664449096236),
    (1000, 8): (
        [0.5004987387, 0.3867882203, 0.356326099, 0.3380476499, 0.3233950564, 0.3092971842, 0.2931190855, 0.2692275504],
        69.74992959831258,
    ),
}
SENSITIVITIES = {  # of 1,000 steps, by separation and participations
    "bisr:2": [3.6514837167011076, 2.0, 13.915739217241121, 1.1547005383792515],
    "bisr:8": [4.3306762583508505, 2.3720061393250282, 23.601947892003984, 1.3694735389200317],
    "cgd:0.9": [7.2549359298425316, 3.973667434371167, 45.920538125645635, 2.294157338705618],
}
SCHEMES = [(100, None), (100, 3), (7, None), (1, 1)]


@pytest.mark.parametrize(("steps", "bands"), PUBLISHED)
def test_banded_toeplitz_is_that_of_jax_privacy(steps, bands):
    coefficients, error = PUBLISHED[steps, bands]
    found = banded_toeplitz(bands, steps)
    assert found.coefficients(steps)[:bands].tolist() == pytest.approx(coefficients, abs=1e-6)
    assert found.coefficients(steps)[bands:].abs().max() < 1e-12
    assert float(found.errors(steps).mean()) == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize("name", SENSITIVITIES)
def test_sensitivities_are_those_of_jax_privacy(name):
    strategy = {"bisr:2": bisr(2), "bisr:8": bisr(8), "cgd:0.9": lambda_cgd(0.9)}[name]
    found = [strategy.sensitivity(1000, min_separation=b, participations=k) for b, k in SCHEMES]
    assert found == pytest.approx(SENSITIVITIES[name], rel=1e-6)


def test_jax_privacy_itself_says_the_same():
    pytest.importorskip("jax_privacy")
    import jax
    from jax_privacy.matrix_factorization import sensitivity, toeplitz

    with jax.enable_x64():
        for steps, bands in PUBLISHED:
            theirs = toeplitz.optimize_banded_toeplitz(steps, bands)
            ours = banded_toeplitz(bands, steps)
            assert ours.coefficients(bands).tolist() == pytest.approx(theirs.tolist(), abs=1e-6)
            assert ours.noise == pytest.approx(toeplitz.inverse_coef(theirs, steps).tolist(), abs=1e-6)
        for strategy, coefficients in (
            (bisr(8), toeplitz.optimal_max_error_noising_coefs(8)),
            (lambda_cgd(0.9), jax.numpy.array([1.0, -0.9])),
        ):
            assert strategy.noise == pytest.approx(coefficients.tolist(), abs=1e-6)
            c = toeplitz.inverse_coef(coefficients, 300)
            assert strategy.coefficients(300).tolist() == pytest.approx(c.tolist(), abs=1e-6)
            errors = toeplitz.per_query_error(noising_coef=toeplitz.pad_coefs_to_n(coefficients, 300))
            assert strategy.errors(300).tolist() == pytest.approx(errors.tolist(), rel=1e-6)
            for b, k in SCHEMES:
                theirs = float(toeplitz.minsep_sensitivity_squared(c, b, k, 300)) ** 0.5
                assert strategy.sensitivity(300, min_separation=b, participations=k) == pytest.approx(theirs, rel=1e-6)
        strategy = banded(4, 40)
        c = jax.numpy.array(torch.block_diag(*[strategy.block()] * 10).numpy())
        theirs = float(sensitivity.get_sensitivity_banded(c, min_sep=4))
        assert strategy.sensitivity(40) == pytest.approx(theirs, rel=1e-6)


# The block diagonal strategy


def least_error(bands, steps):
    """The least mean error of blocks with unit columns, by the fixed point of Denisov et al. (2022)."""
    full, rest = divmod(steps, bands)
    counts = full + (torch.arange(bands) < rest).to(D)
    counts[-1] += bands * full * (full - 1) / 2 + rest * full
    sums = torch.ones(bands, bands, dtype=D).tril()
    workload, v = sums.T @ (counts[:, None] * sums) / steps, torch.ones(bands, dtype=D)
    for _ in range(2000):
        values, vectors = torch.linalg.eigh(v.sqrt()[:, None] * workload * v.sqrt())
        v = ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).diagonal()
    return float(v.sum())  # tr W X⁻¹ = tr X V, and the diagonal of X is 1


@pytest.mark.parametrize(("bands", "steps"), [(1, 50), (2, 1000), (3, 3), (5, 23), (8, 1000), (16, 200)])
def test_no_blocks_have_a_lower_error(bands, steps):
    strategy = banded(bands, steps)
    norms = strategy.block().norm(dim=0)
    assert (norms - 1).abs().max() < 1e-4
    scaled = float(strategy.errors(steps).mean()) * float(norms.max()) ** 2
    assert scaled == pytest.approx(least_error(bands, steps), rel=1e-4)
    assert scaled >= least_error(bands, steps) * (1 - 1e-9)


def test_blocks_cost_2_to_7_percent_of_error_and_the_toeplitz_strategy_hundreds_of_draws():
    costs, seen = [], []
    for bands in (2, 4, 8, 16):
        best = banded_toeplitz(bands, 1000)
        costs.append(float((banded(bands, 1000).errors(1000).mean() / best.errors(1000).mean()).sqrt()))
        r = torch.tensor(best.noise, dtype=D)
        rest = r.abs().flip(0).cumsum(0).flip(0)  # what a cut may leave out, where draws are at most 1
        seen.append(int((rest > 2**-25 * r.norm()).sum()))  # half a unit in the last place of the noise
    assert [round(100 * (cost - 1)) for cost in costs] == [2, 3, 5, 7]
    assert seen == pytest.approx([149, 189, 282, 441], abs=2)


def test_a_search_is_exact_to_more_than_what_is_kept_of_it():
    for bands, steps in ((3, 100), (8, 1000)):
        numbers = torch.cat([torch.tensor(row, dtype=D) for row in banded(bands, steps).noise]) * 1e5
        assert (numbers - numbers.round()).abs().max() < 0.05


# Noise


@pytest.mark.parametrize("name", ["independent", "banded:3", "bisr:4", "cgd:0.9"])
def test_noise_has_the_covariance_of_the_strategy(name):
    steps, size, strategy = 7, 200_000, STRATEGIES[name]
    noise = torch.stack(
        [random.box_muller_sum(*noise_draws(strategy, random.key(5), t), (size,)) for t in range(steps)]
    )
    rows = noising(strategy, steps)
    expected = rows @ rows.T
    scale = expected.diagonal().sqrt()
    error = (noise.double() @ noise.double().T / size - expected) / (scale[:, None] * scale)
    assert error.abs().max() < 5 / math.sqrt(size)


@pytest.mark.parametrize("name", ["banded:3", "bisr:4", "cgd:0.9"])
def test_noise_is_the_weighted_sum_of_the_draws_of_its_steps(name):
    strategy, key, size = STRATEGIES[name], random.key(6), 1001
    draws = torch.stack([random.box_muller(random.fold_in(key, t), (size,)) for t in range(9)]).double()
    expected = noising(strategy, 9) @ draws
    for t in (8, 0, 3):  # in any order: nothing is kept
        found = random.box_muller_sum(*noise_draws(strategy, key, t), (size,))
        torch.testing.assert_close(found.double(), expected[t], rtol=0, atol=3e-6)


def test_independent_noise_is_one_draw_of_the_steps_key():
    key = random.key(3)
    found = random.box_muller_sum(*noise_draws(INDEPENDENT, key, torch.tensor(4)), (5, 3))
    assert torch.equal(found, random.box_muller(random.fold_in(key, 4), (5, 3)))


@pytest.mark.parametrize("name", ["banded:3", "bisr:4", "cgd:0.9"])
def test_steps_as_tensors_and_compiled_give_the_same_draws(name):
    strategy = STRATEGIES[name]
    compiled = torch.compile(lambda key, step: noise_draws(strategy, key, step), fullgraph=True, backend="eager")
    for t in (0, 1, 5):
        expected = noise_draws(strategy, random.key(1), t)
        for found in (noise_draws(strategy, random.key(1), torch.tensor(t)), compiled(random.key(1), torch.tensor(t))):
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_sums_of_noise_are_smaller_at_the_same_privacy():
    steps, epoch = 1000, 100
    free = math.sqrt(float(INDEPENDENT.errors(steps).mean())) * INDEPENDENT.sensitivity(steps, min_separation=epoch)
    for strategy, most in ((bisr(8), 0.5), (lambda_cgd(0.9), 0.35), (banded(8, steps), 0.4)):
        error = math.sqrt(float(strategy.errors(steps).mean())) * strategy.sensitivity(steps, min_separation=epoch)
        assert error < most * free


# The sum of draws


def test_one_draw_of_weight_1_is_box_muller_bit_for_bit():
    for shape in ((), (1,), (7,), (3, 5), (0,)):
        key = random.key(8)
        assert torch.equal(random.box_muller_sum(key[None], torch.ones(1), shape), random.box_muller(key, shape))


def test_a_sum_of_draws_is_added_in_the_order_of_the_keys():
    keys, weights = random.split(random.key(2), 4), torch.tensor([1.0, -0.5, 0.0, 3.7])
    expected = weights[0] * random.box_muller(keys[0], (33,))
    for key, weight in zip(keys[1:], weights[1:], strict=True):
        expected = expected + weight * random.box_muller(key, (33,))
    assert torch.equal(random.box_muller_sum(keys, weights, (33,)), expected)


def test_a_compiled_sum_of_draws_is_one_loop_with_memory_of_the_result():
    keys, weights = random.split(random.key(2), 4), torch.tensor([1.0, -0.5, 0.25, 3.0])
    compiled = train.compiled(lambda keys, weights: random.box_muller_sum(keys, weights, (4096,)))
    found, (code,) = run_and_get_code(compiled, keys, weights)
    torch.testing.assert_close(found, random.box_muller_sum(keys, weights, (4096,)), rtol=0, atol=3e-6)
    assert code.count("= empty_strided_cpu((") == 1 and code.count("for(") == 1


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Toeplitz(()), "finite numbers, the first above 0"),
        (lambda: Toeplitz((0.0, 1.0)), "the first above 0"),
        (lambda: Toeplitz((1.0, math.nan)), "finite"),
        (lambda: Toeplitz((1.0, 0.5)).sensitivity(9), "must fall and be at least 0"),
        (lambda: Toeplitz((1.0, -2.0)).sensitivity(9), "must fall"),
        (lambda: BlockDiagonal(()), "rows of 1, 2"),
        (lambda: BlockDiagonal(((1.0,), (1.0,))), r"Found \[1, 1\]"),
        (lambda: BlockDiagonal(((1.0,), (1.0, 0.0))), "diagonal above 0"),
        (lambda: bisr(3).sensitivity(0), "at least 1"),
        (lambda: bisr(3).sensitivity(9, min_separation=0), "at least 1"),
        (lambda: bisr(3).sensitivity(9, participations=0), "at least 1"),
        (lambda: bisr(0), "bands must be at least 1"),
        (lambda: banded(9, 8), "at most the steps"),
        (lambda: banded_toeplitz(0, 8), "at least 1"),
        (lambda: lambda_cgd(1.0), "below 1"),
        (lambda: lambda_cgd(1 - 1e-12), "below 1"),
        (lambda: lambda_cgd(-0.1), "at least 0"),
        (lambda: lambda_cgd(math.nan), "at least 0"),
        (lambda: random.box_muller_sum(random.key(0), torch.ones(1)), r"keys are \(K, 2\)"),
        (lambda: random.box_muller_sum(random.key(0)[None], torch.ones(2)), r"weights float32 \(2,\)"),
        (lambda: random.box_muller_sum(random.key(0)[None], torch.ones(1).double()), "weights float64"),
        (lambda: random.box_muller_sum(random.split(random.key(0), 0), torch.ones(0)), "K at least 1"),
    ],
)
def test_what_is_wrong_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_inverse_can_be_differentiated():
    a = torch.tensor([1.3, -0.4, 0.2], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: inverse(a, 7), (a,))
