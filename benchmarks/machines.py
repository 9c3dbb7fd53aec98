"""What norms and clipped sums cost in eager mode, prepared and not, over the modules' own passes.

The reference is the gradient of the mean loss of the batch, by the module's own kernels. Of a prepared loss, what is
compared and timed are its recorded ops. Small networks show what Python costs, tables of a large vocabulary and long
texts what memory does: there peaks are taken too. Norms and clipped sums are compared with their definition, a loop
over examples in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from . import recipes, report
from .definitions import difference
from .measure import Arm, Axis, Case, Comparison, Question, Setup, Timing, Work
from .recipes import Recipe, Sizes
from .subjects import TOLERANCE, Subject, clipped, clipped_by_opacus, dense_norms, norms, ordinary, stepped

ORDINARY, STEP = "ordinary", "step, SGD with momentum"


class Bench(NamedTuple):
    """A network, as it is measured."""

    recipe: Recipe
    rounds: int
    quick: Mapping[str, Any]
    """Sizes of a quick run."""
    dense: bool = False
    """Whether sample gradients are formed too: where they fit into memory and take no minute."""

    def subject(self, setup: Setup) -> Subject:
        """The network and its batch."""
        sizes = self.recipe.sizes._replace(**self.quick) if setup.quick else self.recipe.sizes
        return Subject(self.recipe, sizes, setup.device)

    def case(self, name: str, subject: Subject, setup: Setup, ways: Sequence[str], **settings: Any) -> Case:
        """The module's own pass, then these ways, all of one subject."""
        return self.of(name, arms(subject, ways), subject, setup, **settings)

    def of(self, name: str, arms: Sequence[Arm], subject: Subject, setup: Setup, **settings: Any) -> Case:
        """A case of these arms."""
        known = {"model": self.recipe.name, **subject.sizes._asdict(), "max_norm": self.recipe.max_norm}
        rounds = 3 if setup.quick else self.rounds
        return Case(name, arms, difference, rounds, warmups=3, sample=0.02, settings=known, **settings)


WAYS: Mapping[str, tuple[Callable[[Subject], Work], str]] = {
    "norms, prepared": (partial(norms, prepared=True), "norms"),
    "norms, unprepared": (norms, "norms"),
    "norms, dense": (dense_norms, "norms"),
    "clipped, prepared": (partial(clipped, prepared=True), "clipped_sum"),
    "clipped, unprepared": (clipped, "clipped_sum"),
}
"""Each way to work, with what it must find."""
OPACUS: Mapping[str, tuple[Callable[[Subject], Work], str]] = {
    "clipped, Opacus, ghost clipping": (partial(clipped_by_opacus, mode="ghost"), "clipped_sum"),
}
NORMS = "norms, prepared", "norms, unprepared"


def arms(subject: Subject, ways: Sequence[str], suffix: str = "", *, step: bool = False) -> list[Arm]:
    """The module's own pass first, if asked for its whole step, then these ways."""
    found = [Arm(ORDINARY + suffix, partial(ordinary, subject), TOLERANCE)]
    found += [Arm(STEP, partial(stepped, subject), TOLERANCE)] if step else []
    for way in ways:
        make, defined = {**WAYS, **OPACUS}[way]
        found.append(Arm(way + suffix, partial(make, subject), TOLERANCE, expected=partial(getattr, subject, defined)))
    return found


def cases(setup: Setup) -> Iterator[Case]:
    """Norms, clipped sums, tables, lengths."""
    for bench in NETWORKS:
        ways = (*NORMS, "norms, dense") if bench.dense else NORMS
        subject = bench.subject(setup)
        yield bench.of(f"norms of {bench.recipe.name}, eager", arms(subject, ways, step=True), subject, setup)
    for bench in CLIPPED:
        ways = ("clipped, prepared", "clipped, unprepared")
        subject = bench.subject(setup)
        yield bench.of(f"clipped, {bench.recipe.name}, eager", arms(subject, ways, step=True), subject, setup)
    yield TABLE.case("table alone", TABLE.subject(setup), setup, NORMS, memory=True)
    plain = TIED.subject(setup)
    blocks = Subject(BLOCKS, plain.sizes, setup.device)
    both = [*arms(plain, NORMS), *arms(blocks, NORMS, IN_BLOCKS)]
    yield TIED.of("table tied to the output layer", both, plain, setup, memory=True)
    for length in LENGTHS:
        for batch in length.batches:
            bench = length.bench(batch)
            subject = bench.subject(setup)
            positions = subject.sizes.positions
            axis = Axis("T", positions) if batch == 1 else None
            name = f"T={positions}, B={batch}"
            compared = ("clipped, prepared", *OPACUS)
            yield bench.case(name, subject, setup, compared, axis=axis, memory=True)


def conclude(comparisons: Sequence[Comparison]) -> str:
    """Each arm's time and peak over the module's own pass, or why there is none."""
    lines = ["| case | arm | time over the module's own pass | peak over it |", "|---|---|---:|---:|"]
    for one in comparisons:
        for timing in one.timings:
            if timing.name != ORDINARY:
                time, peak = report.ratio(one, timing), _peak(timing, one.reference)
                lines.append(f"| {one.case} | {timing.name} | {time} | {peak} |")
        lines += [f"| {one.case} | {report.without_time(missing)} | - | - |" for missing in one.missing]
    return "\n".join(lines)


def _peak(timing: Timing, reference: Timing) -> str:
    return f"{timing.memory / reference.memory:.2f}" if timing.memory and reference.memory else "-"


IN_BLOCKS = ", in blocks"
TEXTS = Sizes(3, 16, 2, 32, 2)
IMAGES = Sizes(16, 0, 0, 0, side=64)
QUICK_TEXTS, QUICK_IMAGES = {"positions": 8, "tokens": 50}, {"batch": 2, "side": 32}

MLP = Recipe("MLP", recipes.mlp, recipes.points, recipes.itself, Sizes(32, 1, 2, 64), 4.3)
CNN = Recipe("CNN", recipes.cnn, recipes.gray_images, recipes.itself, Sizes(64, 0, 0, 0, side=28), 10.9)
BERT = Recipe("BERT", recipes.bert, recipes.texts, recipes.of_output, TEXTS)
LLAMA = Recipe("Llama", recipes.llama, recipes.next_tokens, recipes.but_the_last, TEXTS)
DENSENET = Recipe("densenet121", recipes.densenet121, recipes.images, recipes.itself, IMAGES)
MOBILENET = Recipe("mobilenet_v3_small", recipes.mobilenet, recipes.images, recipes.itself, IMAGES)
VIT = Recipe("vit_tiny", recipes.vit_tiny, recipes.images, recipes.itself, IMAGES._replace(side=224))
WORDS = Recipe("table", recipes.Words, recipes.words, recipes.itself, Sizes(64, 256, 0, 32, tokens=50257))
PLAIN = Recipe(
    "tied table", recipes.Tied, recipes.following_within, recipes.itself, Sizes(16, 32, 0, 64, tokens=50257),
    loss=recipes.mean,
)  # fmt: skip
BLOCKS = PLAIN._replace(module=recipes.TiedInBlocks)

NETWORKS = (
    Bench(MLP, 60, {"batch": 4}, dense=True),
    Bench(BERT, 30, QUICK_TEXTS, dense=True),
    Bench(LLAMA, 30, QUICK_TEXTS, dense=True),
    Bench(DENSENET, 15, QUICK_IMAGES),
    Bench(MOBILENET, 15, QUICK_IMAGES, dense=True),
    Bench(VIT, 9, QUICK_IMAGES),
)
CLIPPED = Bench(CNN, 30, {"batch": 4}), Bench(MLP, 60, {"batch": 4})
TABLE = Bench(WORDS, 30, {"batch": 4, "positions": 8, "tokens": 100})
TIED = Bench(PLAIN, 11, {"batch": 4, "positions": 8, "tokens": 300, "width": 16})


class Length(NamedTuple):
    """Texts of a length."""

    positions: int
    rounds: int
    max_norm: float
    """Below the norms of the texts."""
    batches: tuple[int, ...] = (1, 4)

    def bench(self, batch: int) -> Bench:
        """A causal transformer of them."""
        sizes = Sizes(batch, self.positions, 2, 64, 4, tokens=256)
        recipe = Recipe("transformer", recipes.Language, recipes.following, recipes.itself, sizes, self.max_norm)
        return Bench(recipe, self.rounds, {"positions": self.positions // 64})


LENGTHS = (
    Length(1024, 15, 0.30),
    Length(2048, 15, 0.22),
    Length(4096, 11, 0.16),
    Length(8192, 9, 0.12, (1,)),
    Length(16384, 7, 0.10, (1,)),
)

QUESTION = Question(
    "machines", "norms and clipped sums in eager mode, prepared: small networks, large tables, long texts", cases,
    conclude,
)  # fmt: skip
