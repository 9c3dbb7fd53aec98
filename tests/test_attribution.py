"""Scores and influences against their definitions on dense gradients, and the ground truth against retraining."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from zoo import CASES, EXACT, D, dense, difference, labels, normals, of_model

import functorch_mnist as fm
from functorch_mnist import attribution, losses, optim, per_sample, random, statistics, tree
from functorch_mnist.statistics import KroneckerFactors, Moments
from functorch_mnist.train import compiled


def flat(rows):
    """(N, P) of a tree of (N, *w)."""
    leaves = tree.leaves(rows)
    return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


def classifier(count, seed=0, widths=(6, 8, 8, 3)):
    """A small classifier as functions of one example, with data."""
    model = fm.models.mlp(widths)
    params = {name: p.to(D) for name, p in model.init(random.key(0)).items()}

    def loss_fn(params, x, y):
        return losses.cross_entropy(model.apply(params, x), y)

    return model.apply, loss_fn, params, normals(count, 6, seed=seed), (torch.arange(count) * 7 + seed) % widths[-1]


# ---- scores


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_all_scores_of_one_pass_equal_their_definitions(chunk_size):
    model = fm.models.cnn(dropout=(0, 0))
    params = {name: p.to(D) for name, p in model.init(random.key(0)).items()}
    images, y = normals(5, 1, 28, 28), labels(5, 10)
    found = attribution.scores(model.apply, params, images, labels=y, chunk_size=chunk_size)
    outputs = model.apply(params, images)
    case = of_model(model.apply, params, images)
    assert difference(found.loss, F.cross_entropy(outputs, y, reduction="none")) <= EXACT
    assert difference(found.grand, flat(dense(case.loss_fn, params, (images, y))).norm(dim=1)) <= EXACT
    assert difference(found.el2n, (outputs.softmax(-1) - F.one_hot(y, 10)).norm(dim=1)) <= EXACT
    assert torch.equal(found.prediction, outputs.argmax(-1))
    for row, label, margin in zip(outputs, y, found.margin, strict=True):
        others = [float(value) for k, value in enumerate(row) if k != label]
        assert math.isclose(margin, float(row[label]) - max(others), rel_tol=1e-12)


def test_masked_examples_have_no_score_and_another_loss_is_differentiated():
    apply, _, params, x, y = classifier(5)
    mask = torch.arange(5) != 2
    poisoned = x.index_fill(0, torch.tensor([2]), torch.nan)

    def loss_fn(outputs, label):
        return losses.mse(outputs.softmax(-1), losses.one_hot(label, 3))

    found = attribution.scores(apply, params, poisoned, labels=y, loss_fn=loss_fn, mask=mask, chunk_size=2)
    alone = attribution.scores(apply, params, x[mask], labels=y[mask], loss_fn=loss_fn)
    for column, rest in zip(found, alone, strict=True):
        assert column[2] == 0
        assert difference(column[mask].double(), rest.double()) <= EXACT


@pytest.mark.usefixtures("traced")
def test_scores_compile_to_the_same():
    apply, _, params, x, y = classifier(5)

    def call(params, x, y):
        return attribution.scores(apply, params, x, labels=y)

    for fast, slow in zip(compiled(call)(params, x, y), call(params, x, y), strict=True):
        torch.testing.assert_close(fast, slow, rtol=EXACT, atol=EXACT)


def test_self_influence_is_tracin_of_an_example_on_itself():
    _, loss_fn, params, x, y = classifier(6)
    checkpoints = [params, tree.map(lambda w: w * 0.5, params)]
    lrs = torch.tensor([0.1, 0.3], dtype=D)
    grand = torch.stack([per_sample.norms(loss_fn, p, x, y) for p in checkpoints])
    pairs = attribution.tracin(loss_fn, checkpoints, (x, y), (x, y), lrs=lrs)
    assert difference(attribution.self_influence(grand, lrs), pairs.diagonal()) <= EXACT


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=8))
def test_forgetting_counts_falls_from_right_to_wrong(rows):
    found = attribution.forgetting_events(torch.tensor(rows))
    for i in range(4):
        history = [row[i] for row in rows]
        falls = sum(a and not b for a, b in itertools.pairwise(history))
        assert found[i] == (falls if any(history) else len(rows))


# ---- influence


@pytest.mark.parametrize("name", ["tutorial_cnn", "mlp", "tied_linear_and_embedding", "norms_net", "regularised"])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_influences_by_inner_products_equal_their_definitions(name, chunk_size):
    case = CASES[name]()
    test = tuple(rows[1:3] for rows in case.batch)
    checkpoints = [case.params, tree.map(lambda w: w * 1.5, case.params)]
    a = [flat(dense(case.loss_fn, params, case.batch)) for params in checkpoints]
    b = [flat(dense(case.loss_fn, params, test)) for params in checkpoints]
    found = attribution.tracin(case.loss_fn, checkpoints, case.batch, test, lrs=[0.1, 0.2], chunk_size=chunk_size)
    assert difference(found, 0.1 * a[0] @ b[0].T + 0.2 * a[1] @ b[1].T) <= EXACT
    cosine = attribution.gradient_cosine(case.loss_fn, case.params, case.batch, test, chunk_size=chunk_size)
    assert difference(cosine, F.cosine_similarity(a[0][:, None], b[0][None], dim=2)) <= EXACT


# ---- projections


@pytest.mark.parametrize("name", CASES)
def test_features_are_the_projections_of_the_dense_gradients(name):
    case = CASES[name]()
    maps = attribution.projection(case.params, key=random.key(1), size=6)
    found = attribution.features(case.loss_fn, case.params, *case.batch, projection=maps, chunk_size=3)
    parts = []
    for rows, (left, right) in zip(tree.leaves(dense(case.loss_fn, case.params, case.batch)), maps.maps, strict=True):
        matrices = rows.reshape(len(rows), left.shape[1], right.shape[1])
        parts.append(torch.einsum("hi,nij,dj->nhd", left, matrices, right).flatten(1))
    assert found.shape[1] == maps.size
    assert difference(found, torch.cat(parts, 1)) <= EXACT


def test_grouped_and_strided_convolutions_are_projected_exactly():
    params = {"a": normals(4, 2, 3, 3, seed=1), "b": normals(6, 4, 2, 2, seed=2)}

    def apply(p, x):
        x = F.conv2d(x, p["a"], stride=2, padding=1, groups=2)
        return F.conv2d(x, p["b"], dilation=2, padding=1).square().mean((-2, -1))

    case = of_model(apply, params, normals(3, 4, 9, 9))
    maps = attribution.projection(params, key=random.key(1), size=9)
    found = attribution.features(case.loss_fn, params, *case.batch, projection=maps)
    rows = dense(case.loss_fn, params, case.batch)
    parts = [
        (left @ g.reshape(3, left.shape[1], right.shape[1]) @ right.T).flatten(1)
        for g, (left, right) in zip(tree.leaves(rows), maps.maps, strict=True)
    ]
    assert difference(found, torch.cat(parts, 1)) <= EXACT


def test_inner_products_of_features_are_those_of_gradients_on_average_and_exactly_if_nothing_is_shortened():
    _, loss_fn, params, x, y = classifier(6)
    gram = per_sample.gram(loss_fn, params, (x, y))

    def products(key, size):
        maps = attribution.projection(params, key=key, size=size)
        rows = attribution.features(loss_fn, params, x, y, projection=maps)
        return rows @ rows.T

    assert difference(products(random.key(0), 64), gram) <= EXACT
    draws = torch.stack([products(key, 16) for key in random.split(random.key(5), 300)])
    error = draws.std(0) / 300**0.5
    assert ((draws.mean(0) - gram).abs() <= 4.5 * error).all()
    assert difference(products(random.key(3), 16), products(random.key(3), 16)) == 0
    assert difference(products(random.key(3), 16), products(random.key(4), 16)) > 1e-3


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), size=st.integers(1, 400))
def test_a_parameter_has_at_most_the_features_asked_for_and_at_least_half_where_it_has_more(rows, columns, size):
    found = attribution.projection([torch.zeros(rows, columns)], key=random.key(0), size=size).size
    assert min(size, rows * columns) / 2 <= found <= size


def test_trak_equals_its_definition_and_finds_what_a_linear_model_leans_on():
    train, test, p = normals(30, 5), normals(4, 5, seed=1), torch.rand(30, dtype=D)
    found = attribution.trak(train, test, p, damping=0.3)
    inverse = torch.linalg.inv(train.T @ train + 0.3 * torch.eye(5, dtype=D))
    for i in range(0, 30, 7):
        for j in range(4):
            assert math.isclose(found[i, j], test[j] @ inverse @ train[i] * (1 - p[i]), rel_tol=1e-9)


def test_log_odds_are_those_of_the_softmax():
    outputs, y = normals(7, 4), labels(7, 4)
    p = outputs.softmax(-1).gather(1, y[:, None]).squeeze(1)
    assert difference(attribution.log_odds(outputs, y), (p / (1 - p)).log()) <= EXACT


# ---- curvature


def test_influence_functions_by_the_gram_matrix_are_the_damped_fisher_solve():
    _, loss_fn, params, x, y = classifier(9)
    test = normals(4, 6, seed=3), labels(4, 3)
    a, b = (flat(dense(loss_fn, params, batch)) for batch in ((x, y), test))
    fisher = a.T @ a / 9
    expected = a @ torch.linalg.solve(fisher + 0.1 * torch.eye(len(fisher), dtype=D), b.T)
    gram, cross = (per_sample.gram(loss_fn, params, (x, y), other) for other in ((x, y), test))
    assert difference(attribution.fisher_influence(gram, cross, damping=0.1), expected) <= EXACT


@pytest.mark.parametrize("name", ["mlp", "tutorial_cnn", "sequence_linear", "views_of_parameters", "norms_net"])
def test_a_kronecker_solve_undoes_the_damped_kronecker_product(name):
    case = CASES[name]()
    if name == "tutorial_cnn":  # the factor of 9,216 inputs would take minutes
        case = case._replace(loss_fn=lambda p, x, y: small_loss(case, p, x, y), params=small_params(case))
    both = statistics.fold(case.loss_fn, case.params, *case.batch, of=lambda g: (KroneckerFactors.of(g), Moments.of(g)))
    factors, diagonal = both[0].mean, both[1].fisher
    assert factors
    vector = tree.map(lambda w: normals(*w.shape, seed=4), case.params)
    solved = attribution.curvature(factors, diagonal).solve(vector, damping=0.2)
    given, found, mean = (dict(zip(tree.paths(t), tree.leaves(t), strict=True)) for t in (vector, solved, diagonal))
    for path, pair in factors.items():
        total = mean[path].sum()
        v, s = (joined(pair, t[path], None if pair.bias is None else t[pair.bias]) for t in (given, found))
        if pair.bias is not None:
            total = total + mean[pair.bias].sum()
        applied = pair.cotangents @ s @ pair.joined  # (A ⊗ G) s, before its scale
        trace = sum(torch.trace(a) * torch.trace(g) for a, g in zip(pair.joined, pair.cotangents, strict=True))
        assert difference(applied * total / trace + 0.2 * s, v) <= 1e-8
    for path in given.keys() - factors.keys() - {pair.bias for pair in factors.values()}:
        assert difference(found[path], given[path] / (mean[path] + 0.2)) <= EXACT


def joined(pair, weight, bias):
    """A weight and its bias as matrices (G, H, D + 1)."""
    m = pair.matrices(weight)
    return m if bias is None else torch.cat([m, bias.reshape(*m.shape[:2], 1)], 2)


def small_params(case):
    return {name: p for name, p in case.params.items() if name.startswith("conv")}


def small_loss(case, params, x, y):
    x = F.conv2d(x, params["conv1.weight"], params["conv1.bias"]).relu()
    x = F.conv2d(x, params["conv2.weight"], params["conv2.bias"])
    return losses.cross_entropy(x.mean((-2, -1))[..., :10], y)


def test_an_embeddings_factors_are_solved_by_their_diagonal():
    params = {"table": normals(7, 3, seed=1)}
    tokens, y = torch.tensor([[0, 1, 2], [3, 3, 1]]), labels(2, 3)

    def loss_fn(p, tokens, y):
        return losses.cross_entropy(F.embedding(tokens, p["table"]).mean(0), y)

    both = statistics.fold(loss_fn, params, tokens, y, of=lambda g: (KroneckerFactors.of(g), Moments.of(g)))
    pair, diagonal = both[0].mean["table"], both[1].fisher
    vector = {"table": normals(7, 3, seed=4)}
    solved = attribution.curvature({"table": pair}, diagonal).solve(vector, damping=0.2)["table"]
    scale = diagonal["table"].sum() / (pair.inputs.sum() * pair.cotangents.diagonal(dim1=1, dim2=2).sum())
    applied = pair.inputs[:, None] * (solved @ pair.cotangents[0]) * scale + 0.2 * solved
    assert difference(applied, vector["table"]) <= EXACT


def test_one_linear_layer_at_one_example_has_an_exact_kronecker_inverse():
    params = {"w": normals(3, 4, seed=1)}
    x, y = normals(1, 4), torch.tensor([1])

    def loss_fn(p, x, y):
        return losses.cross_entropy(F.linear(x, p["w"]), y)

    both = statistics.fold(loss_fn, params, x, y, of=lambda g: (KroneckerFactors.of(g), Moments.of(g)))
    vector = {"w": normals(3, 4, seed=4)}
    solved = attribution.curvature(both[0].mean, both[1].fisher).solve(vector, damping=0.2)
    g = tree.ravel(torch.func.grad(loss_fn)(params, x[0], y[0]))
    expected = torch.linalg.solve(torch.outer(g, g) + 0.2 * torch.eye(12, dtype=D), tree.ravel(vector))
    assert difference(tree.ravel(solved), expected) <= EXACT


# ---- the kernel


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_tangent_kernel_is_the_contraction_of_the_jacobian(chunk_size):
    apply, _, params, x, _ = classifier(5)
    other = normals(3, 6, seed=2)

    def jacobian(x):
        rows = torch.func.vmap(torch.func.jacrev(apply), in_dims=(None, 0))(params, x)
        return torch.cat([leaf.reshape(len(x), 3, -1) for leaf in tree.leaves(rows)], 2)

    expected = torch.einsum("ncp,mcp->nm", jacobian(x), jacobian(other)) / 3
    found = attribution.tangent_kernel(apply, params, (x,), (other,), chunk_size=chunk_size)
    assert difference(found, expected) <= EXACT
    square = attribution.tangent_kernel(apply, params, (x,), chunk_size=chunk_size)
    assert difference(square, torch.einsum("ncp,mcp->nm", jacobian(x), jacobian(x)) / 3) <= EXACT


def test_kernel_regression_of_a_linear_model_is_ridge_regression():
    x, y, new = normals(20, 4), normals(20, 2, seed=1), normals(5, 4, seed=2)
    params = {"w": torch.zeros(2, 4, dtype=D)}

    def apply(p, x):
        return F.linear(x, p["w"])

    kernel, cross = (attribution.tangent_kernel(apply, params, (a,), (x,)) for a in (x, new))
    found = attribution.kernel_regression(kernel, y, cross, ridge=0.7)
    weights = torch.linalg.solve(x.T @ x + 0.7 * torch.eye(4, dtype=D), x.T @ y)
    assert difference(found, new @ weights) <= EXACT


# ---- the ground truth


def small_run(count=12, steps=6, momentum=0.9, widths=(6, 8, 8, 3)):
    _, loss_fn, params, x, y = classifier(count, widths=widths)
    order = torch.stack([(torch.arange(4) * 5 + 3 * s) % count for s in range(steps)])
    test = normals(3, 6, seed=9), labels(3, widths[-1])
    return attribution.Run(loss_fn, optim.sgd(0.2, momentum=momentum), params, (x, y), order), test


def by_hand(run, leave_out=None):
    """Ordinary training with torch.optim, without one example."""
    params = {name: p.clone().requires_grad_() for name, p in run.params.items()}
    optimizer = torch.optim.SGD(list(params.values()), lr=0.2, momentum=0.9)
    for index in run.order:
        rows = [x[index] for x in run.examples]
        each = torch.stack([run.loss_fn(params, *[x[i] for x in rows]) for i in range(len(index))])
        keep = torch.tensor([float(i != leave_out) for i in index], dtype=D)
        optimizer.zero_grad()
        ((each * keep).sum() / len(index)).backward()
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def test_weights_of_one_are_ordinary_training():
    run, _ = small_run()
    assert difference(attribution.trained(run, torch.ones(12, dtype=D)), by_hand(run)) <= EXACT


@pytest.mark.parametrize("chunk_size", [1, 32])
def test_leaving_one_out_is_training_without_it(chunk_size):
    run, test = small_run()
    which = torch.tensor([0, 5, 11])
    found = attribution.leave_one_out(run, test, which, chunk_size=chunk_size)
    for row, i in zip(found, which.tolist(), strict=True):
        for j in range(3):
            example = [x[j] for x in test]
            change = run.loss_fn(by_hand(run, i), *example) - run.loss_fn(by_hand(run), *example)
            assert math.isclose(row[j], change, rel_tol=1e-8, abs_tol=1e-12)


def test_the_unrolled_derivative_is_that_of_finite_differences():
    run, test = small_run()
    found = attribution.unrolled(run, test, chunk_size=2)
    step = 1e-5
    for i in (0, 4, 11):
        ends = torch.ones(2, 12, dtype=D)
        ends[0, i], ends[1, i] = 1 + step, 1 - step
        up, down = attribution.retrained(run, test, ends)
        assert difference(found[i], (down - up) / (2 * step)) <= 1e-6  # of central differences
    assert found.shape == (12, 3)


def test_an_example_that_no_batch_has_has_no_influence():
    run, test = small_run()
    run = run._replace(order=run.order % 6)
    assert not attribution.unrolled(run, test)[6:].any()
    assert attribution.leave_one_out(run, test, torch.tensor([7])).abs().max() < 1e-14


def test_one_step_of_sgd_is_tracin():
    run, test = small_run(steps=1, momentum=0.0)
    run = run._replace(order=torch.arange(12)[None], optimizer=optim.sgd(1e-6))
    found = attribution.unrolled(run, test)
    expected = attribution.tracin(run.loss_fn, [run.params], run.examples, test, lrs=[1e-6 / 12])
    assert difference(found, expected) <= 1e-4  # to first order in the learning rate


# ---- grading


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_auc_counts_pairs_and_ties_as_half(pairs):
    scores = torch.tensor([float(s) for s, _ in pairs])
    positive = torch.tensor([p for _, p in pairs])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match=r"auc: examples of both kinds"):
            attribution.auc(scores, positive)
        return
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive].tolist() for b in scores[~positive].tolist()]
    assert math.isclose(attribution.auc(scores, positive), sum(wins) / len(wins))


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30))
def test_the_rank_correlation_is_pearsons_of_mean_ranks(pairs):
    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]

    a, b = zip(*pairs, strict=True)
    found = attribution.rank_correlation(torch.tensor(a), torch.tensor(b))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert found == 0
        return
    expected = torch.corrcoef(torch.tensor([ranks(a), ranks(b)], dtype=D))[0, 1]
    assert abs(found - expected) <= 1e-12


@given(count=st.integers(1, 60), fraction=st.floats(0, 1), classes=st.integers(2, 10), seed=st.integers(0, 5))
def test_planted_labels_differ_where_they_say_and_nowhere_else(count, fraction, classes, seed):
    before = torch.arange(count) % classes
    after, flipped = attribution.label_noise(before, classes, key=random.key(seed), fraction=fraction)
    assert torch.equal(after != before, flipped)
    assert int(flipped.sum()) == round(fraction * count)
    assert after.min() >= 0
    assert after.max() < classes


def test_a_flipped_label_is_any_other_class_alike():
    after, flipped = attribution.label_noise(torch.zeros(9000, dtype=torch.int64), 10, key=random.key(0), fraction=1.0)
    assert flipped.all()
    counts = after.bincount(minlength=10)
    assert counts[0] == 0
    assert ((counts[1:] - 1000).abs() < 150).all()  # five standard deviations


def test_what_is_found_are_the_positives_among_the_highest():
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    positive = torch.tensor([True, False, True, False, False])
    assert [attribution.recall_at(scores, positive, part) for part in (0, 0.2, 0.4, 0.6, 1)] == [0, 0.5, 0.5, 1, 1]


def test_ties_share_what_is_found_of_them():
    positive = torch.tensor([True, True, False, False])
    assert attribution.recall_at(torch.zeros(4), positive, 0.5) == 0.5
    assert attribution.recall_at(torch.tensor([2.0, 1.0, 1.0, 0.0]), positive, 0.5) == 0.75


# ---- compiled


def _calls():
    """A graph grows with layers, classes and chunks: of each no more than there must be, the last chunk padded.

    `leave_one_out` is `retrained`, and that is `trained` under `vmap`; `fisher_kronecker` draws labels from its key.
    """
    widths = (6, 2)
    apply, loss_fn, params, x, y = classifier(3, widths=widths)
    test = normals(2, 6, seed=1), labels(2, 2)
    maps = attribution.projection(params, key=random.key(0), size=9)
    run, small = small_run(steps=2, widths=widths)
    return {
        "tracin": lambda p: attribution.tracin(loss_fn, [p], (x, y), test, lrs=[0.1], chunk_size=2),
        "gradient_cosine": lambda p: attribution.gradient_cosine(loss_fn, p, (x, y), test),
        "features": lambda p: attribution.features(loss_fn, p, x, y, projection=maps),
        "tangent_kernel": lambda p: attribution.tangent_kernel(apply, p, (x,)),
        "fisher_diagonal": lambda p: statistics.fisher_diagonal(apply, p, x),
        "fisher_kronecker": lambda p: statistics.fisher_kronecker(apply, p, x, key=random.key(0)),
        "cosines": lambda p: statistics.cosines(loss_fn, p, x, y, direction=p),
        "leave_one_out": lambda p: attribution.leave_one_out(run._replace(params=p), small, torch.tensor([3])),
        "unrolled": lambda p: attribution.unrolled(run._replace(params=p), small),
    }


@pytest.mark.parametrize("name", _calls())
def test_compiled_equals_eager_as_one_graph(name):
    call, params = _calls()[name], classifier(3, widths=(6, 2))[2]
    fast = torch.compile(call, fullgraph=True, backend="eager")  # what is traced, without the compiler's own rounding
    for a, b in zip(tree.leaves(fast(params)), tree.leaves(call(params)), strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=1e-12)


# ---- refusals


RUN, TEST = small_run()
ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: attribution.trained(RUN, torch.ones(3)), "trained: weights must be"),
        (lambda: attribution.retrained(RUN, TEST, torch.ones(2, 12), chunk_size=0), "chunk_size"),
        (lambda: attribution.tracin(RUN.loss_fn, [], RUN.examples, TEST, lrs=[]), "tracin: at least one checkpoint"),
        (
            lambda: attribution.tracin(RUN.loss_fn, [RUN.params], RUN.examples, TEST, lrs=[1, 2]),
            "Found 1 and rates of shape",
        ),
        (lambda: attribution.self_influence(torch.ones(2, 3), ONES), "self_influence"),
        (lambda: attribution.forgetting_events(torch.ones(2, 3)), "forgetting_events: correct must be bool"),
        (lambda: attribution.output_scores(torch.ones(3, 1), torch.zeros(3, dtype=torch.int64)), "two classes"),
        (lambda: attribution.log_odds(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)), "two classes. Found 1"),
        (lambda: attribution.projection(RUN.params, key=random.key(0), size=0), "size must be a whole number"),
        (lambda: attribution.trak(torch.ones(3, 2), torch.ones(3, 1), ONES), "trak: features"),
        (lambda: attribution.trak(torch.ones(3, 2), torch.ones(3, 2), ONES, damping=-1), "damping"),
        (lambda: attribution.fisher_influence(torch.eye(3), torch.ones(2, 3), damping=1), "fisher_influence"),
        (lambda: attribution.fisher_influence(torch.eye(3), torch.ones(3, 2), damping=0), "fisher_influence"),
        (lambda: attribution.kernel_regression(torch.eye(3), torch.ones(3, 1), torch.ones(3, 2), ridge=1), "kernel"),
        (lambda: attribution.label_noise(torch.zeros(3).long(), 1, key=random.key(0), fraction=0.1), "label_noise"),
        (
            lambda: attribution.label_noise(torch.zeros(3).long(), 3, key=random.key(0), fraction=math.nan),
            "label_noise",
        ),
        (lambda: attribution.auc(ONES * math.nan, ONES > 0), "auc: scores"),
        (lambda: attribution.recall_at(ONES, ONES > 0, 1.1), "recall_at: checked"),
        (lambda: attribution.recall_at(ONES, ONES > 2, 0.1), "something positive"),
        (lambda: attribution.rank_correlation(ONES, torch.ones(2)), "rank_correlation"),
        (lambda: attribution.rank_correlation(ONES, ONES * math.nan), "rank_correlation: .* NaN"),
        (lambda: attribution.label_noise(torch.full((3,), 9), 3, key=random.key(0), fraction=0.1), "labels must be in"),
        (lambda: attribution.trak(torch.ones(3, 5), torch.ones(3, 5), ONES, damping=0), "fewer examples than features"),
        (lambda: attribution.projection(RUN.params, key=random.key(0), size=2.5), "whole number"),
        (lambda: attribution.unrolled(RUN, TEST, chunk_size=0), "unrolled: chunk_size"),
        (lambda: attribution.retrained(RUN, TEST, torch.ones(2, 7)), r"retrained: weights must be \(R, 12\)"),
        (lambda: attribution.leave_one_out(RUN, TEST, torch.ones(2)), "leave_one_out: which"),
        (lambda: attribution.trained(RUN._replace(order=RUN.order.float()), torch.ones(12)), "order integers"),
        (lambda: attribution.tangent_kernel(RUN.loss_fn, RUN.params, ()), "tangent_kernel: a and b must be tuples"),
        (lambda: attribution.curvature({}, ONES).solve(torch.ones(2, 4), damping=1), "solve: the vector"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(call, said):
    with pytest.raises(ValueError, match=said):
        call()
