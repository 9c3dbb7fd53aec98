"""What memory per-sample quantities take: the clipped step against the size of its chunks, and the ways without chunks.

Tutorial CNN without dropout; this library's arms are compiled, in float32. The reference is the ordinary step of the
compiled `nn.Module`. Peaks are taken as in `benchmarks.peak`; the times next to them show what smaller chunks cost.
"""

from collections.abc import Iterator
from functools import partial

from . import peers
from .definitions import Definitions, difference
from .measure import Arm, Case, Question, Setup
from .per_sample import QUANTITIES, Make, arm, ordinary_arms, settings
from .problems import Problem, cnn
from .quantities import Deviation, clipped_step, dense, factored, quantity

BATCH_SIZES = (64, 512)
CHUNKS = (32, 64, 128, 256, 512)


def arms_of(problem: Problem, definitions: Definitions, noise: Deviation) -> list[Arm]:
    """The ordinary step, clipped steps and the other quantities."""
    arms = ordinary_arms(problem, definitions)[:1]
    for chunk in CHUNKS:
        if chunk <= len(problem.labels):
            make = partial(clipped_step, partial(factored, problem, chunk_size=chunk), noise, compile=True)
            arms.append(arm(f"clipped, factored, chunks of {chunk}", make, definitions, "clipped_step"))
    others: dict[str, Make] = {
        "clipped, vmap(grad), eager": partial(clipped_step, partial(dense, problem), noise, compile=False),
        "clipped, Opacus, hooks": partial(peers.opacus_step, problem, noise, mode="hooks"),
        "clipped, Opacus, ghost clipping": partial(peers.opacus_step, problem, noise, mode="ghost"),
    }
    arms += [arm(name, make, definitions, "clipped_step") for name, make in others.items()]
    for name, attribute in QUANTITIES.items():
        make_quantity = partial(quantity, partial(factored, problem), attribute, compile=True)
        arms.append(arm(f"{name}, factored", make_quantity, definitions, attribute))
    return arms


def cases(setup: Setup) -> Iterator[Case]:
    """A case for each batch size."""
    for batch_size in BATCH_SIZES[:1] if setup.quick else BATCH_SIZES:
        problem, noise = cnn(batch_size, setup.device), Deviation()
        yield Case(
            f"B={batch_size}",
            arms_of(problem, Definitions(problem), noise),
            difference,
            5,
            warmups=3,
            settings=settings(batch_size),
            memory=True,
            compared=noise.turn_on,
        )


QUESTION = Question("memory", "what memory clipped steps and other quantities take, against the size of chunks", cases)
