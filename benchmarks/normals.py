"""What keyed normals cost: 1.2 million of them, compiled, against `torch.randn`.

python -m benchmarks.normals [--rounds 60]
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from functorch_mnist import random, train

from . import measure

COUNT = 1_200_000


def arm(name: str, draw: Callable[[], Tensor]) -> measure.Arm:
    """An arm whose outputs are the mean and the standard deviation of what it drew last."""
    last = torch.zeros(0)

    def call() -> None:
        nonlocal last
        last = draw()

    return measure.Arm(name, call, lambda: (float(last.mean()), float(last.std())), tolerance=0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    normal = train.compiled(lambda key: random.normal(key, (COUNT,)))
    arms = [
        arm("torch.randn", partial(torch.randn, COUNT)),
        arm("random.normal, compiled", partial(normal, random.key(0))),
    ]
    result = measure.compare(
        "normals",
        arms,
        rounds=options.rounds,
        difference=lambda found, expected: max(abs(a - b) for a, b in zip(found, expected, strict=True)),
        settings={"count": COUNT},
        warmups=5,
    )
    print(f"\n{measure.table(result)}\n\nWritten to {measure.write(result)}")


if __name__ == "__main__":
    main()
