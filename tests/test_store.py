"""The store of gradients: what is in it, and what is asked of it, against dense definitions."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from zoo import difference, normals

from functorch_mnist import attribution, losses, per_sample, random, tree
from functorch_mnist.attribution import store

N, M = 23, 5
PATHS = ("a.weight", "a.bias", "conv", "b.weight", "b.bias")


def loss_fn(p, x, y):
    x = F.conv2d(x, p["conv"]).tanh()
    x = F.linear(x.flatten(), p["a.weight"], p["a.bias"]).tanh()
    return losses.cross_entropy(F.linear(x, p["b.weight"], p["b.bias"]), y)


def params(seed=0):
    shapes = {"a.weight": (6, 27), "a.bias": (6,), "conv": (3, 2, 2, 2), "b.weight": (3, 6), "b.bias": (3,)}
    return {name: normals(*shape, seed=seed + i).float() for i, (name, shape) in enumerate(shapes.items())}


def examples(count, seed=0):
    return normals(count, 2, 4, 4, seed=seed).float(), torch.arange(count) % 3


CHECKPOINTS = [params(0), params(10)]
WEIGHTS = [0.5, 2.0]
IDENTITY = attribution.projection(params(), key=random.key(1), size=10**6)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Whole gradients in float32, under the identity."""
    folder = tmp_path_factory.mktemp("built") / "store"
    options = {"projection": IDENTITY, "weights": WEIGHTS, "dtype": torch.float32, "rows": 7, "chunk_size": 4}
    return store.build(folder, loss_fn, CHECKPOINTS, *examples(N), **options)


def small(folder, count=N, **options):
    given = {"projection": attribution.projection(params(), key=random.key(1), size=8), "rows": 7, "chunk_size": 4}
    return store.build(folder, loss_fn, CHECKPOINTS[:1], *examples(count), **given | options)


def flat(p, batch):
    return torch.cat([g.flatten(1) for g in tree.leaves(per_sample.grads(loss_fn, p, *batch))], 1).double()


def definitions(by, damping=None):
    total, lengths = 0, [0, 0]
    for p, w in zip(CHECKPOINTS, WEIGHTS, strict=True):
        a, b = flat(p, examples(N)), flat(p, examples(M, seed=7))
        if by == "inverse":
            moment = a.T @ a / N
            a = a @ torch.linalg.inv(moment + damping * torch.eye(len(moment), dtype=torch.float64))
        total = total + w * a @ b.T
        lengths = [s + w * x.square().sum(1) for s, x in zip(lengths, (a, b), strict=True)]
    return total / (lengths[0][:, None] * lengths[1]).sqrt() if by == "cosine" else total


@pytest.mark.parametrize("by", ["dot", "cosine", "inverse"])
def test_scores_of_whole_gradients_are_those_of_their_definition(built, by):
    damping = 0.05 if by == "inverse" else None
    queries = built.features(loss_fn, CHECKPOINTS, *examples(M, seed=7), chunk_size=2)
    found = built.scores(queries, by=by, damping=damping).double()
    expected = definitions(by, damping)
    assert difference(found, expected) <= 1e-4  # float32
    for lowest in (False, True):
        top = built.top(queries, 6, by=by, damping=damping, lowest=lowest)
        order = found.argsort(0, descending=not lowest)[:6].T
        assert torch.equal(top.indices, order)
        assert torch.equal(top.scores.double(), found.T.gather(1, order))


def test_the_blocks_of_some_parameters_alone_add_up(built):
    queries = built.features(loss_fn, CHECKPOINTS, *examples(M, seed=7))
    parts = [built.scores(queries, paths=[path]) for path in PATHS]
    assert difference(sum(parts).double(), built.scores(queries).double()) <= 1e-5
    assert {path: block.kind for path, block in built.blocks.items()} == {
        "a.weight": "pair", "a.bias": "matrix", "conv": "matrix", "b.weight": "pair", "b.bias": "matrix",
    }  # fmt: skip


def test_groups_are_sums_of_their_examples(built):
    queries = built.features(loss_fn, CHECKPOINTS, *examples(M, seed=7))
    groups = torch.arange(N) % 4
    for by in ("dot", "inverse"):
        scores = built.scores(queries, by=by)
        found = built.scores(queries, by=by, groups=groups)
        expected = torch.stack([scores[groups == k].sum(0) for k in range(4)])
        assert difference(found.double(), expected.double()) <= 1e-5
    assert torch.equal(attribution.group_sums(scores, groups), torch.zeros(4, M).index_add_(0, groups, scores))


def test_numpy_alone_reads_it_and_half_precision_errs_as_stated(tmp_path, built):
    whole = built
    half = store.build(
        tmp_path / "half", loss_fn, [{n: p * 1e-9 if n == "b.bias" else p for n, p in CHECKPOINTS[0].items()}],
        *examples(N), projection=IDENTITY, rows=7, chunk_size=4,
    )  # fmt: skip
    rows = np.load(tmp_path / "half" / "0" / "000000007.npy", mmap_mode="r")
    values = rows["scale"][:, None] * rows["values"].astype(np.float32)
    assert np.array_equal(values, half.rows(0, 7, 14).numpy())
    assert half.error < 5e-4 and whole.error < 1e-7
    exact = store.build(
        tmp_path / "exact", loss_fn, [{n: p * 1e-9 if n == "b.bias" else p for n, p in CHECKPOINTS[0].items()}],
        *examples(N), projection=IDENTITY, rows=7, chunk_size=4, dtype=torch.float32,
    )  # fmt: skip
    moved = (half.rows() - exact.rows()).norm(dim=1) / exact.rows().norm(dim=1)
    assert 0 < float(moved.max()) <= half.error


def digests(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_build_that_stopped_goes_on_to_the_same_bits(tmp_path):
    small(tmp_path / "whole")
    done = []

    def stop(count):
        done.append(count)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "stopped", progress=stop)
    with pytest.raises(store.StoreError, match="not finished"):
        store.load(tmp_path / "stopped")
    with pytest.raises(store.StoreError, match=r"being built\. Found other dtype"):
        small(tmp_path / "stopped", dtype=torch.float32)
    small(tmp_path / "stopped")
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")


def test_a_finished_store_is_opened_and_another_is_refused(tmp_path):
    first = small(tmp_path / "s")
    before = (tmp_path / "s" / "manifest.json").stat().st_mtime_ns
    assert small(tmp_path / "s").plan == first.plan
    assert (tmp_path / "s" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(store.StoreError, match=r"holds another store\. Found other examples"):
        small(tmp_path / "s", count=N - 1)


def test_examples_are_appended_and_numbered_on(tmp_path):
    small(tmp_path / "s", count=9)
    more = examples(N)
    found = store.append(tmp_path / "s", loss_fn, CHECKPOINTS[:1], *[x[9:] for x in more], chunk_size=4)
    assert len(found) == N and len(store.load(tmp_path / "s")) == N
    whole = small(tmp_path / "whole")
    assert difference(found.rows(), whole.rows()) <= 1e-3  # other chunks, rounded to half precision
    assert len(store.append(tmp_path / "s", loss_fn, CHECKPOINTS[:1], *[x[9:] for x in more], chunk_size=4)) == N
    with pytest.raises(store.StoreError, match="or other parameters"):
        store.append(tmp_path / "s", loss_fn, CHECKPOINTS[1:], *more)


def damage(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def test_what_is_damaged_or_foreign_is_refused_by_name(tmp_path):
    with pytest.raises(store.StoreError, match="holds no store"):
        store.load(tmp_path)
    folder = tmp_path / "s"
    small(folder)
    part = folder / "0" / "000000007.npy"
    whole = part.read_bytes()
    damage(part)
    found = store.load(folder)
    found.rows(0, 0, 7)
    with pytest.raises(store.StoreError, match=r"000000007.npy must have the SHA-256"):
        found.rows(0, 0, 9)
    with pytest.raises(store.StoreError, match=r"000000007.npy must have the SHA-256"):
        found.verify()
    part.write_bytes(whole[:-1])
    with pytest.raises(store.StoreError, match=r"000000007.npy must have \d+ bytes"):
        store.load(folder)
    part.unlink()
    with pytest.raises(store.StoreError, match=r"000000007.npy must be there"):
        store.load(folder)
    part.write_bytes(whole)
    store.load(folder).verify()
    damage(folder / "maps" / "0-left.npy")
    with pytest.raises(store.StoreError, match=r"0-left.npy must have the SHA-256"):
        store.load(folder)
    body = json.loads((folder / "manifest.json").read_bytes())
    body["plan"]["loss"] = "other"
    (folder / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(store.StoreError, match="checksum"):
        store.load(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(store.StoreError, match="Found another file"):
        store.load(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(store.StoreError, match="must be JSON"):
        store.load(folder)


def test_what_does_not_fit_is_refused(tmp_path, built):
    queries = built.features(loss_fn, CHECKPOINTS, *examples(M, seed=7))
    for call, said in [
        (lambda: built.top(queries, 0), "count must be from 1"),
        (lambda: built.top(queries, N + 1), "count must be from 1"),
        (lambda: built.top(queries, 1, damping=1.0), "belongs to the inverse"),
        (lambda: built.top(queries, 1, by="inverse", damping=0.0), "damping above 0"),
        (lambda: built.top(queries, 1, paths=["c"]), "paths must be of its parameters"),
        (lambda: built.top(store.Queries(queries.rows[:1]), 1), "queries must be of 2 checkpoints"),
        (lambda: built.scores(queries, groups=torch.zeros(3, dtype=torch.int64)), "groups must be int64"),
        (lambda: small(tmp_path / "a", dtype=torch.float64), "dtype float16 or float32"),
        (lambda: small(tmp_path / "a", weights=[1.0, 2.0]), "a finite weight for each"),
        (lambda: small(tmp_path / "a", rows=0), "at least 1"),
        (lambda: attribution.principal_projection(loss_fn, params(), *examples(N), size=4), "size must be at least 5"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    with pytest.raises(store.StoreError, match="features must be finite"):
        bad = {**CHECKPOINTS[0], "b.bias": torch.full((3,), torch.nan)}
        given = attribution.projection(params(), key=random.key(1), size=8)
        store.build(tmp_path / "b", loss_fn, [bad], *examples(N), projection=given)


def test_principal_directions_keep_gradients_of_few_dimensions_whole():
    x, y = examples(40)
    x = torch.einsum("ni,ichw->nchw", normals(40, 2).float(), normals(2, 2, 4, 4, seed=3).float())
    found = attribution.principal_projection(loss_fn, params(), x, y, size=200)
    assert sum(len(a) * len(b) for a, b in found.maps) > 200  # pairs are fewer numbers than their products
    rows, other = (
        attribution.features(loss_fn, params(), *[z[half] for z in (x, y)], projection=found)
        for half in (slice(0, 30), slice(30, 40))
    )
    exact = per_sample.gram(loss_fn, params(), (x[:30], y[:30]), (x[30:], y[30:]))
    assert difference((rows @ other.T).double(), exact.double()) <= 0.05
    for left, right in found.maps:
        for m in (left, right):
            assert (m @ m.T - torch.eye(len(m))).abs().max() <= 1e-5


def test_more_features_are_nearer_to_the_exact_inner_products():
    exact = per_sample.gram(loss_fn, params(), examples(N), examples(M, seed=7)).double()
    errors = []
    for size in (15, 40, 400):
        maps = attribution.principal_projection(loss_fn, params(), *examples(N), size=size, chunk_size=5)
        rows = [
            attribution.features(loss_fn, params(), *e, projection=maps) for e in (examples(N), examples(M, seed=7))
        ]
        errors.append(float(((rows[0] @ rows[1].T).double() - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] <= 1e-5


def test_approximate_search_finds_what_is_in_its_lists(built):
    pytest.importorskip("faiss")
    queries = built.features(loss_fn, CHECKPOINTS, *examples(M, seed=7))
    for by in ("dot", "cosine"):
        found = store.index(built, by=by, lists=3)
        assert found.recall(queries, 4, probes=3) == 1.0
        exact, near = built.top(queries, 4, by=by), found.top(queries, 4, probes=3)
        assert difference(near.scores.double(), exact.scores.double()) <= 1e-5


def test_without_faiss_approximate_search_says_what_to_install(built):
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "from pathlib import Path\nfrom functorch_mnist.attribution import store\n"
        "try:\n    store.index(store.load(Path(sys.argv[1])))\nexcept store.StoreError as error:\n    print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code, str(built.folder)], capture_output=True, text=True, check=True)
    assert "Install faiss-cpu" in told.stdout
