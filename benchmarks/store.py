"""What a store of gradients costs: building it, against an epoch of training, and asking it, for the largest of all.

Tutorial CNN without dropout after 300 steps, float32; all 60,000 training images. The reference of a build is an
ordinary epoch: 938 compiled steps of 64 images of this library. Both are in one process, after their compilation.

A store is asked for the 100 training images with the largest inner products, for each of the 10,000 test images, whose
gradients are computed for it too. The reference holds the features of all in memory and multiplies them in blocks. An
approximate index is built before; the part of its answers that is right is among the settings.

How near a store's inner products are to exact ones is Spearman's rank correlation over training images, the mean of
test images: of 2,000 and 200 of them, from the first files.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from functorch_mnist import attribution, data, losses, models, optim, per_sample, random, train
from functorch_mnist.attribution import store

from .measure import Arm, Case, Comparison, Question, Setup, Work
from .problems import normalized
from .steps import LR, MOMENTUM

FEATURES, COMPACT, DIRECTIONS = 4096, 512, 2048
BATCH, STEPS, CHUNK, LARGEST, COMPARED = 64, 300, 512, 100, (2000, 200)
TOLERANCE = 2e-3
"""Of the largest scores, relative: features are in half precision in one, in float32 in the other."""

MODEL = models.cnn(dropout=(0, 0))


@dataclass(eq=False)
class Stores:
    """What all arms use: the network, the images, the folder and the projections."""

    train: data.Split
    test: data.Split
    params: models.Params
    folder: Path
    maps: dict[str, attribution.Projection] = field(default_factory=dict)

    def projection(self, name: str) -> attribution.Projection:
        """4,096 random features, or 512 principal ones."""
        if name == "random":
            return attribution.projection(self.params, key=random.key(0), size=1190)
        step = max(1, len(self.train.images) // DIRECTIONS)
        some = [x[::step][:DIRECTIONS] for x in self.train]
        return attribution.principal_projection(loss_fn, self.params, *some, size=COMPACT, chunk_size=256)

    def build(self, name: str, folder: Path, call: store.Compile) -> store.Store:
        """The store of all training images, built from scratch with its directions."""
        shutil.rmtree(folder, ignore_errors=True)
        maps = self.projection(name)
        return store.build(folder, loss_fn, [self.params], *self.train, projection=maps, chunk_size=CHUNK, compile=call)

    @cache  # noqa: B019 (as long as the question)
    def built(self, name: str) -> store.Store:
        """The store, kept."""
        return self.build(name, self.folder / name, lambda call: call)


def loss_fn(params: models.Params, image: Tensor, label: Tensor) -> Tensor:
    """Of one image."""
    return losses.cross_entropy(MODEL.apply(params, normalized(image)), label)


def losses_fn(params: models.Params, images: Tensor, labels: Tensor, _keys: Tensor) -> Tensor:
    """Of a batch."""
    return losses.cross_entropy(MODEL.apply(params, normalized(images)), labels)


def epoch(stores: Stores) -> Work:
    """One epoch of training, compiled; the outputs are how many images were seen."""
    optimizer = optim.sgd(LR, momentum=MOMENTUM)
    step = train.compiled(train.make_step(train.batch_gradient(losses_fn), optimizer))
    seen = [0]

    def call() -> None:
        state = train.init_state(stores.params, optimizer, random.key(0))
        train.fit(step, state, stores.train, epochs=1, batch_size=BATCH, callbacks=(count,))

    def count(at: train.Progress) -> None:
        seen[0] = at.examples

    return Work(call, lambda: float(seen[0]))


def building(stores: Stores, name: str, compile: bool) -> Work:
    """A store of all training images, its directions included."""
    folder, call = stores.folder / f"{name}-again", train.compiled if compile else lambda call: call
    found: list[store.Store] = []
    kept: list[Callable[..., Tensor]] = []

    def once(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        kept.append(kept[0] if kept else call(fn))  # compiled once: the pass is the same for each build
        return kept[0]

    def work() -> None:
        found[:] = [stores.build(name, folder, once)]

    return Work(work, lambda: float(len(found[0])), release=lambda: shutil.rmtree(folder, ignore_errors=True))


def opening(stores: Stores) -> Work:
    """Opening the store of 4,096 features; the outputs are how many images it holds."""
    found: list[store.Store] = []
    folder = stores.built("random").folder
    return Work(lambda: found.__setitem__(slice(None), [store.load(folder)]), lambda: float(len(found[0])))


def in_memory(stores: Stores) -> Work:
    """The features of all in memory, multiplied in blocks."""
    maps, rows = stores.projection("random"), stores.built("random").rows()
    found: list[Tensor] = []

    def call() -> None:
        tests = attribution.features(loss_fn, stores.params, *stores.test, projection=maps, chunk_size=CHUNK)
        found[:] = [(part @ rows.T).topk(LARGEST, 1).values for part in tests.split(256)]

    return Work(call, lambda: torch.cat(found))


def asking(stores: Stores, name: str, by: store.queries.By = "dot") -> Work:
    """A store asked for the largest, its test images' gradients included."""
    found: list[Tensor] = []

    def call() -> None:
        opened = store.load(stores.built(name).folder)
        queries = opened.features(loss_fn, [stores.params], *stores.test, chunk_size=CHUNK)
        found[:] = [opened.top(queries, LARGEST, by=by).scores]

    return Work(call, lambda: found[0])


def searching(stores: Stores, index: Callable[[], store.Index]) -> Work:
    """An index searched for the largest."""
    near, found = index(), list[Tensor]()

    def call() -> None:
        queries = near.store.features(loss_fn, [stores.params], *stores.test, chunk_size=CHUNK)
        found[:] = [near.top(queries, LARGEST).scores]

    return Work(call, lambda: found[0])


def correlation(stores: Stores, name: str) -> float:
    """Of the store's inner products with exact ones."""
    rows, tests = ([x[:n] for x in split] for n, split in zip(COMPARED, (stores.train, stores.test), strict=True))
    exact = per_sample.gram(loss_fn, stores.params, rows, tests, chunk_size=250)
    folder = stores.folder / f"{name}-some"
    some = store.build(folder, loss_fn, [stores.params], *rows, projection=stores.projection(name), chunk_size=CHUNK)
    found = some.scores(some.features(loss_fn, [stores.params], *tests))
    shutil.rmtree(folder)
    return float(attribution.rank_correlation(found, exact).mean())


def missed(found: Tensor, expected: Tensor) -> float:
    """The largest relative difference of the largest scores."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1e-12)).max())


def apart(found: float, expected: float) -> float:
    """The difference of two counts."""
    return abs(found - expected)


def cases(setup: Setup) -> Iterator[Case]:
    """Built, opened, asked."""
    with tempfile.TemporaryDirectory() as name:
        stores = _stores(Path(name), setup)
        images = f"{len(stores.train.images):,} images"
        rounds = 1 if setup.quick else 3
        yield Case(
            f"build, {images}",
            [
                Arm("ordinary epoch, compiled", partial(epoch, stores)),
                Arm("store of 4,096 random features, compiled", partial(building, stores, "random", True)),
                Arm("store of 512 principal numbers, compiled", partial(building, stores, "principal", True)),
                Arm("store of 512 principal numbers, eager", partial(building, stores, "principal", False)),
            ],
            apart,
            rounds,
            warmups=0,
            lead=0,
        )
        sizes = {
            arm: {
                "bytes_an_image": stores.built(kind).bytes / len(stores.train.images),
                "numbers": stores.built(kind).plan.width,
                "rank_correlation": correlation(stores, kind),
            }
            for arm, kind in (("random", "random"), ("principal", "principal"))
        }
        start = time.perf_counter()
        store.load(stores.built("random").folder)
        opened = time.perf_counter() - start
        asked = f"ask for {LARGEST} of {images}, {len(stores.test.images):,} test images"
        settings = {"stores": sizes, "seconds_to_open": opened}
        yield Case(
            asked,
            [
                Arm("4,096 features in memory", partial(in_memory, stores)),
                Arm("store of 4,096 features, dot", partial(asking, stores, "random"), TOLERANCE),
                Arm(
                    "store of 512 numbers, dot",
                    partial(asking, stores, "principal"),
                    TOLERANCE,
                    expected=partial(_multiplied_out, stores),
                ),
            ],
            missed,
            rounds,
            warmups=0,
            lead=0,
            settings=settings,
            memory=True,
        )


def _multiplied_out(stores: Stores) -> Tensor:
    """What the store of 512 numbers must find: its features, multiplied out."""
    opened = stores.built("principal")
    rows = store.numbers.dense(opened.rows(), opened.plan.blocks)
    queries = opened.features(loss_fn, [stores.params], *stores.test, chunk_size=CHUNK)
    tests = store.numbers.dense(queries.rows[0], opened.plan.blocks)
    return torch.cat([(part @ rows.T).topk(LARGEST, 1).values for part in tests.split(256)])


def _stores(folder: Path, setup: Setup) -> Stores:
    """A network that has been trained a little, and the images."""
    stored = data.load()
    train_, test = stored.train, stored.test
    if setup.quick:
        train_, test = (data.Split(*[x[:n] for x in split]) for n, split in ((1500, train_), (200, test)))
    optimizer = optim.sgd(LR, momentum=MOMENTUM)
    step = train.make_step(train.batch_gradient(losses_fn), optimizer)
    state = train.init_state(MODEL.init(random.key(0)), optimizer, random.key(1))
    seen = data.Split(*[x[: BATCH * (5 if setup.quick else STEPS)] for x in stored.train])
    state = train.fit(step, state, seen, epochs=1, batch_size=BATCH)
    return Stores(train_, test, state.params, folder)


def conclude(comparisons: Sequence[Comparison]) -> str:
    """How large the stores are, and how near to exact inner products."""
    settings = comparisons[-1].settings
    lines = ["| store | numbers an image | bytes an image | of 4,096 in float32 | rank correlation with exact |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, one in settings["stores"].items():
        part = 4 * FEATURES / one["bytes_an_image"]
        row = [name, f"{one['numbers']:,}", f"{one['bytes_an_image']:,.0f}", f"1/{part:.1f}"]
        lines.append("| " + " | ".join([*row, f"{one['rank_correlation']:.4f}"]) + " |")
    return "\n".join([*lines, "", f"Opened in {1000 * settings['seconds_to_open']:.0f} ms."])


QUESTION = Question(
    "store", "a store of gradients: built against an epoch, and asked for the largest of all", cases, conclude
)
